//! What the attention kernels share: parameters, where the places of a list lie, and the arithmetic of one logit.
//!
//! A row attends to a *list* of tokens, or to all of its tokens. The list's entries are its *places*; the *rank* of a
//! place is its position in the whole list, which differs from the place only where the list is part of a longer one.
//! With `m` the length of the whole list, query `t` of a block of `T` sees the ranks up to `m - T + t`, and is rotated
//! at `m - T + t` (docs/definitions.md).
//!
//! The query heads of a group and the tokens of a block read the same keys, so they are packed: row `i` of a KV head's
//! *query rows* is query `i / G` of the block in head `i % G` of the group.

use crate::layout::{BatchTables, PageStrides};
use crate::rope::RopeTables;
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`attend_decode`](mod@crate::attend_decode) and [`attend_prefill`](mod@crate::attend_prefill).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AttendParams<T> {
    /// \[num_tokens, num_qo_heads, head_dim\] T, read.
    pub q: GlobalPtr<T>,
    /// Paged by `k_stride`, read. Where `k_is_gathered`: rotated keys, by row, head and place.
    pub k_pages: GlobalPtr<T>,
    /// Paged by `v_stride`, read.
    pub v_pages: GlobalPtr<T>,
    /// \[num_rows, max_selected\] u32, read: the tokens of each list, ascending. Address 0: all tokens.
    pub selected: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: lengths of the lists. Unused without lists.
    pub selected_len: GlobalPtr<u32>,
    /// \[num_rows, max_selected\] u32, read: ranks of parts of lists, ascending. Address 0: the places.
    pub ranks: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: lengths of the whole lists. Unused without ranks.
    pub total_len: GlobalPtr<u32>,
    /// \[num_tokens, num_qo_heads, head_dim\], written: T, or f32 where `out_is_f32`.
    pub out: GlobalMut<T>,
    /// \[num_tokens, num_qo_heads\] f32, written: natural log of the sum of exponentials. Address 0: not wanted.
    pub lse: GlobalMut<f32>,
    /// \[units, splits, 8, head_dim\] f32, workspace of the decode kernels; a unit is a row's KV head to `attend_stream`.
    pub partial: GlobalMut<f32>,
    /// \[units, splits, 8\] pairs of f32, workspace of the decode kernels: largest logit (base 2), sum.
    pub partial_stats: GlobalMut<V2<f32>>,
    /// \[units\] u32, zero before and after.
    pub counters: GlobalMut<u32>,
    /// Rows and page tables.
    pub batch: BatchTables,
    /// Strides of the keys; multiples of 8.
    pub k_stride: PageStrides,
    /// Strides of the values; multiples of 8.
    pub v_stride: PageStrides,
    /// Rotation of queries, and of keys that are not gathered.
    pub rope: RopeTables,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// Width of `selected`.
    pub max_selected: u32,
    /// The longest block of the batch.
    pub max_block_len: u32,
    /// The longest list that launches are shaped for; longer ones cost time, no correctness.
    pub max_len: u32,
    /// 1: keys come from [`gather`](mod@crate::gather).
    pub k_is_gathered: u32,
    /// 1: `out` is f32.
    pub out_is_f32: u32,
    /// Factor on the products, times log2(e).
    pub sm_scale_log2: f32,
    /// `c` of the soft cap `c tanh(x / c)`, times log2(e); 0 for none.
    pub soft_cap_log2: f32,
    /// Shares that [`attend_stream`](mod@crate::attend_stream) cuts a row's list into; unused by others.
    pub num_shares: u32,
}
const _: () = assert!(size_of::<AttendParams<u16>>() == 264);

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) use machine::*;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod machine {
    use super::*;
    use crate::element::Element;
    use crate::layout::Tokens;
    use crate::simt::data::V4;
    use crate::simt::math;

    /// Rank of a place beyond the end of a list: no query sees it.
    pub const NOWHERE: u32 = u32::MAX;

    /// A row's list.
    #[derive(Clone, Copy)]
    pub struct List {
        pub row: u32,
        /// Queries of the row, as rows of `q` and `out`.
        pub queries: Tokens,
        /// Places.
        pub len: u32,
        /// The row's first page, as a place in the page tables.
        pub first_page: u32,
        /// Ranks that the first query sees, `m - T + 1`; each later one sees one more.
        pub first_bound: u32,
    }

    /// One place: its token (or the last one's, beyond the end) and its rank.
    #[derive(Clone, Copy)]
    pub struct Place {
        pub token: u32,
        pub rank: u32,
    }

    impl<T> AttendParams<T> {
        /// The list of a row.
        ///
        /// # Safety
        /// - `row` is a row of the batch, and the tables are as [`AttendParams`] says.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn list(&self, row: u32) -> List {
            let queries = self.batch.queries(row);
            let first_page = self.batch.first_page(row);
            let listed = self.selected.addr() != 0;
            let len = if listed {
                self.selected_len.add(row as u64).load().min(self.max_selected)
            } else {
                self.batch.kv_len(row)
            };
            let total = if self.ranks.addr() != 0 { self.total_len.add(row as u64).load() } else { len };
            let first_bound = (total + 1).saturating_sub(queries.len());
            List { row, queries, len, first_page, first_bound }
        }

        /// Looks up place `place` of a list that is not empty.
        ///
        /// # Safety
        /// - As for [`list`](Self::list); `list.len > 0`.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn place(&self, list: &List, place: u32) -> Place {
            let inside = place < list.len;
            let place = place.min(list.len - 1);
            let entry = list.row as u64 * self.max_selected as u64 + place as u64;
            let token = if self.selected.addr() != 0 { self.selected.add(entry).load() } else { place };
            let rank = if self.ranks.addr() != 0 { self.ranks.add(entry).load() } else { place };
            Place { token, rank: if inside { rank } else { NOWHERE } }
        }

        /// The token of place `place` of a row's list, if it has so many; anything if not. It can be read before it is known
        /// how many there are. 0 without lists.
        ///
        /// # Safety
        /// - As for [`list`](Self::list).
        #[inline(always)]
        #[track_caller]
        pub unsafe fn early_token(&self, row: u32, place: u32) -> u32 {
            if self.selected.addr() == 0 || place >= self.max_selected {
                return 0;
            }
            self.selected.add(row as u64 * self.max_selected as u64 + place as u64).load()
        }

        /// Page of a row's token, and its place within.
        ///
        /// # Safety
        /// - As for [`list`](Self::list); the row has the token.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn page(&self, list: &List, token: u32) -> (u32, u32) {
            let (page, within) = self.batch.split_token(token);
            let entry = list.first_page as u64 + page as u64;
            (self.batch.kv_indices.add(entry).load(), within)
        }

        /// Query heads.
        #[inline(always)]
        pub fn num_qo_heads(&self) -> u32 {
            self.num_kv_heads * self.group
        }

        /// Place of query row `i` of a KV head in `q`, `out` (times `head_dim`) and `lse`; and its place in the block.
        #[inline(always)]
        pub fn query_row(&self, list: &List, kv_head: u32, i: u32) -> (u64, u32) {
            let group = self.group.max(1);
            let (t, member) = (i / group, i % group);
            let token = (list.queries.begin + t) as u64;
            (token * self.num_qo_heads() as u64 + (kv_head * self.group + member) as u64, t)
        }

        /// Query rows of a KV head.
        #[inline(always)]
        pub fn num_query_rows(&self, list: &List) -> u32 {
            list.queries.len() * self.group
        }

        /// A product as a logit, base 2: scaled, with the soft cap.
        #[inline(always)]
        pub fn logit(&self, product: f32) -> f32 {
            let x = product * self.sm_scale_log2;
            if self.soft_cap_log2 == 0.0 {
                return x;
            }
            // tanh(y) = 1 - 2 / (1 + exp(2 y)), whose exponential may be 0 or infinite.
            let e = math::ex2(x / self.soft_cap_log2 * (2.0 * core::f32::consts::LOG2_E));
            self.soft_cap_log2 * (1.0 - 2.0 / (1.0 + e))
        }

        /// Writes four adjacent elements of an output.
        ///
        /// # Safety
        /// - They lie inside `out`, at a multiple of 4.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn store_out(&self, at: u64, x: [f32; 4])
        where
            T: Element,
        {
            if self.out_is_f32 != 0 {
                self.out.cast::<f32>().add(at).cast::<V4<f32>>().store(V4(x));
            } else {
                self.out.add(at).cast::<V2<u32>>().store(V2([T::pack(x[0], x[1]), T::pack(x[2], x[3])]));
            }
        }

        /// Writes the log-sum-exp of a query row, if it is wanted. `max` is in base 2.
        ///
        /// # Safety
        /// - `at` lies inside `lse`.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn store_lse(&self, at: u64, max: f32, sum: f32) {
            if self.lse.addr() != 0 {
                let lse = if sum == 0.0 {
                    f32::NEG_INFINITY
                } else {
                    (max + math::lg2(sum)) * core::f32::consts::LN_2
                };
                self.lse.add(at).store(lse);
            }
        }
    }

    /// Two values as packed high parts and packed remainders, which together keep 16 bits of mantissa (bf16) or 22.
    #[inline(always)]
    pub fn split<T: Element>(x: f32, y: f32) -> (u32, u32) {
        let high = T::pack(x, y);
        let [hx, hy] = T::unpack(high);
        // Beyond the type's range the high part is infinite, and there is no remainder.
        let rest = |x: f32, high: f32| if (x - high).is_finite() { x - high } else { 0.0 };
        (high, T::pack(rest(x, hx), rest(y, hy)))
    }

    /// A product of high parts with that of low parts added. Where a key is infinite or NaN, the low parts (0, or of the
    /// other sign) would say something else than the high ones, which decide alone.
    #[inline(always)]
    pub fn add_low(high: f32, low: f32) -> f32 {
        high + if low.is_finite() { low } else { 0.0 }
    }

    /// Whether one of two packed values is infinite or NaN.
    #[inline(always)]
    pub fn any_not_finite<T: Element>(pair: u32) -> bool {
        let [x, y] = T::unpack(pair);
        !(x.is_finite() && y.is_finite())
    }

    /// `max` as it is subtracted from logits: 0 where there is no number yet, so that -inf stays -inf.
    #[inline(always)]
    pub fn subtracted(max: f32) -> f32 {
        if max == f32::NEG_INFINITY { 0.0 } else { max }
    }
}
