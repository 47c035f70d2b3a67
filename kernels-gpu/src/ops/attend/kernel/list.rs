//! The list that a row attends to, its query rows, and how a product becomes a logit and an output.

use crate::common::element::{Element, add_low, split, split_scaled};
use crate::common::fragment::Accumulator;
use crate::common::layout::Tokens;
use crate::ops::attend::AttendParams;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
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
    /// The row's last token.
    pub last_token: u32,
    /// The row's first page, as an index into the page tables.
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

impl List {
    /// The position at which query `t` of the row's block is rotated.
    pub fn query_position(&self, t: u32) -> u32 {
        (self.first_bound + t).saturating_sub(1)
    }
}

impl<T> AttendParams<T> {
    /// The list of a row. Lengths that are wrong are brought into their bounds here, tokens in [`place`](Self::place), ranks where
    /// a key is rotated.
    ///
    /// # Safety
    /// - `row` is a row of the batch, and the tables are as [`AttendParams`] says.
    #[track_caller]
    pub unsafe fn list(&self, row: u32) -> List {
        let queries = self.batch.queries(row);
        let first_page = self.batch.first_page(row);
        let kv_len = self.batch.kv_len(row);
        let len = if self.selected.addr() != 0 {
            let len = self.selected_len.add(row as u64).load().min(self.max_selected);
            if kv_len == 0 { 0 } else { len }
        } else {
            kv_len
        };
        let total = if self.ranks.addr() != 0 { self.total_len.add(row as u64).load() } else { len };
        let first_bound = (total.min(self.last_position + 1) + 1).saturating_sub(queries.len());
        List { row, queries, len, last_token: kv_len.saturating_sub(1), first_page, first_bound }
    }

    /// Looks up place `place` of a list that is not empty. Its rank may be any number.
    ///
    /// # Safety
    /// - As for [`list`](Self::list); `list.len > 0`.
    #[track_caller]
    pub unsafe fn place(&self, list: &List, place: u32) -> Place {
        let inside = place < list.len;
        let place = place.min(list.len - 1);
        let entry = list.row as u64 * self.max_selected as u64 + place as u64;
        let token = if self.selected.addr() != 0 { self.selected.add(entry).load() } else { place };
        let rank = if self.ranks.addr() != 0 { self.ranks.add(entry).load() } else { place };
        Place { token: token.min(list.last_token), rank: if inside { rank } else { NOWHERE } }
    }

    /// The token of place `place` of a row's list, if it has so many; anything if not, and wherever the list is wrong. It can be
    /// read before it is known how many there are. 0 without lists.
    ///
    /// # Safety
    /// - As for [`list`](Self::list).
    #[track_caller]
    pub unsafe fn early_token(&self, row: u32, place: u32) -> u32 {
        if self.selected.addr() == 0 || place >= self.max_selected {
            return 0;
        }
        self.selected.add(row as u64 * self.max_selected as u64 + place as u64).load()
    }

    /// Page of a row's token, and the token's index in it.
    ///
    /// # Safety
    /// - As for [`list`](Self::list); the row has the token.
    #[track_caller]
    pub unsafe fn page(&self, list: &List, token: u32) -> (u32, u32) {
        let (page, within) = self.batch.split_token(token);
        let entry = list.first_page as u64 + page as u64;
        (self.batch.kv_indices.add(entry).load(), within)
    }

    /// Where the key of place `place` lies in `k_pages`; its page and its token's index in it are asked for where it is not gathered.
    pub fn key_offset(
        &self,
        list: &List,
        kv_head: u32,
        place: u32,
        page: impl FnOnce() -> (u32, u32),
    ) -> u64 {
        if self.k_is_gathered != 0 {
            return self.k_stride.offset(list.row, place.min(list.len - 1), kv_head);
        }
        let (page, within) = page();
        self.k_stride.offset(page, within, kv_head)
    }

    /// Query heads.
    pub fn num_qo_heads(&self) -> u32 {
        self.num_kv_heads * self.group
    }

    /// Query row `i` of a KV head.
    pub fn q_row(&self, list: &List, kv_head: u32, i: u32) -> GlobalPtr<T> {
        let group = self.group.max(1);
        let (t, member) = (i / group, i % group);
        self.q.add(self.q_stride.offset(list.queries.begin + t, kv_head * self.group + member))
    }

    /// Where query row `i` of a KV head lies in `lse`, and times `head_dim` in `out`; and which query of the block it
    /// belongs to.
    pub fn query_row(&self, list: &List, kv_head: u32, i: u32) -> (u64, u32) {
        let group = self.group.max(1);
        let (t, member) = (i / group, i % group);
        let token = (list.queries.begin + t) as u64;
        (token * self.num_qo_heads() as u64 + (kv_head * self.group + member) as u64, t)
    }

    /// Query rows of a KV head.
    pub fn num_query_rows(&self, list: &List) -> u32 {
        list.queries.len() * self.group
    }

    /// Two rotated values as high and low halves. High halves of a narrow type are scaled.
    pub fn split_rotated(&self, x: f32, y: f32) -> (u32, u32)
    where
        T: Element,
    {
        if T::IS_NARROW {
            split_scaled::<T>(x, y, [self.rotated_scale, self.inverse_scale])
        } else {
            split::<T>(x, y)
        }
    }

    /// The product of two vectors in such halves, times `rotated_scale` squared where they are scaled: of high halves, with that of
    /// either high halves with the other low ones added.
    pub fn join_rotated(&self, high: f32, low: f32) -> f32
    where
        T: Element,
    {
        add_low(high, if T::IS_NARROW { low * self.rotated_scale } else { low })
    }

    /// Turns products into logits, base 2: scaled, with the soft cap. (One branch for all: with one for each, what is hardly ever
    /// executed lies between what always is, and is fetched with it.)
    #[inline(always)]
    pub fn logits<const N: usize>(&self, products: &mut [Accumulator; N]) {
        for n in 0..N {
            for i in 0..4 {
                products[n].0[i] *= self.sm_scale_log2;
            }
        }
        if self.soft_cap_log2 != 0.0 {
            for n in 0..N {
                for i in 0..4 {
                    products[n].0[i] = self.capped(products[n].0[i]);
                }
            }
        }
    }

    /// The soft cap `c tanh(x / c)` of a logit.
    #[inline(always)]
    fn capped(&self, x: f32) -> f32 {
        let y = x / self.soft_cap_log2;
        let square = y * y;
        if square < 1.0 / 64.0 {
            // A series, exact to 3e-7: of a small y, what follows would leave few digits.
            return x * math::fma(math::fma(2.0 / 15.0, square, -1.0 / 3.0), square, 1.0);
        }
        // tanh(y) = 1 - 2 / (1 + exp(2 y)), whose exponential may be 0 or infinite.
        let e = math::ex2(y * (2.0 * core::f32::consts::LOG2_E));
        self.soft_cap_log2 * (1.0 - 2.0 / (1.0 + e))
    }

    /// Writes four adjacent elements of an output.
    ///
    /// # Safety
    /// - They lie inside `out`, at a multiple of 4.
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

    /// Writes the log-sum-exp of a query row, if it is wanted.
    ///
    /// # Safety
    /// - `at` lies inside `lse`.
    #[track_caller]
    pub unsafe fn store_lse(&self, at: u64, lse: f32) {
        if self.lse.addr() != 0 {
            self.lse.add(at).store(lse);
        }
    }
}
