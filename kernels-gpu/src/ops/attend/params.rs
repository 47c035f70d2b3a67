//! Parameters. Launch dimensions are those of each kernel.

use crate::common::layout::{BatchTables, HeadStrides, PageStrides};
use crate::common::rope::RopeTables;
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`attend_decode`](mod@crate::ops::attend_decode), [`attend_stream`](mod@crate::ops::attend_stream),
/// [`attend_prefill`](mod@crate::ops::attend_prefill) and [`attend_warpgroups`](mod@crate::ops::attend_warpgroups).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AttendParams<T> {
    /// \[num_tokens, num_qo_heads, head_dim\] T by `q_stride`, read.
    pub q: GlobalPtr<T>,
    /// Paged by `k_stride`, read. Where `k_is_gathered`: rotated keys, by row, head and place.
    pub k_pages: GlobalPtr<T>,
    /// Paged by `v_stride`, read.
    pub v_pages: GlobalPtr<T>,
    /// \[num_rows, max_selected\] u32, read: the tokens of each list, ascending. Address 0: all tokens. Whatever lists, ranks
    /// and lengths hold, no access is out of bounds (the module says what is made of wrong ones).
    pub selected: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: lengths of the lists. Unused without lists.
    pub selected_len: GlobalPtr<u32>,
    /// \[num_rows, max_selected\] u32, read: ranks of partial lists, ascending. Address 0: the places.
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
    /// Strides of the queries; multiples of 8.
    pub q_stride: HeadStrides,
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
    /// The last position that the tables of angles cover; [`MAX_POSITION`] without them.
    pub last_position: u32,
    /// The longest list that launches are shaped for; longer ones cost time, no correctness.
    pub max_len: u32,
    /// 1: keys come from [`gather`](mod@crate::ops::gather).
    pub k_is_gathered: u32,
    /// 1: `out` is f32.
    pub out_is_f32: u32,
    /// Rotated queries and keys of a narrow type are kept times this power of two, and products times its square.
    pub rotated_scale: f32,
    /// `1 / rotated_scale`.
    pub inverse_scale: f32,
    /// Factor on the products, times log2(e), and `inverse_scale` squared.
    pub sm_scale_log2: f32,
    /// `c` of the soft cap `c tanh(x / c)`, times log2(e), finite; 0 for none.
    pub soft_cap_log2: f32,
    /// Splits that [`attend_stream`](mod@crate::ops::attend_stream) cuts a row's list into; unused by others.
    pub num_splits: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<AttendParams<u16>>() == 288);

/// The last position of any token, and the longest list.
pub const MAX_POSITION: u32 = i32::MAX as u32;
