//! Parameters and launch dimensions.

use crate::common::layout::{BatchTables, HeadStrides, PageStrides, absent, absent_mut};
use crate::launch::Dims;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block: one 16-byte piece each of a token with 8 heads of 128.
pub(super) const THREADS: u32 = 128;
/// Elements of a 16-byte piece.
pub const PIECE: u32 = 8;

/// Parameters of [`append`](super::kernel::append).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AppendParams {
    /// \[num_tokens, num_kv_heads, head_dim\] 2-byte floats by `new_k_stride`, read.
    pub k: GlobalPtr<u16>,
    /// As `k`, by `new_v_stride`.
    pub v: GlobalPtr<u16>,
    /// Paged by `k_stride`, written.
    pub k_pages: GlobalMut<u16>,
    /// Paged by `v_stride`, written.
    pub v_pages: GlobalMut<u16>,
    /// Rows and page tables, after the block was added.
    pub batch: BatchTables,
    /// Strides of the block's keys; multiples of 8.
    pub new_k_stride: HeadStrides,
    /// Strides of the block's values; multiples of 8.
    pub new_v_stride: HeadStrides,
    /// Strides of the pages of keys; multiples of 8.
    pub k_stride: PageStrides,
    /// Strides of the pages of values; multiples of 8.
    pub v_stride: PageStrides,
    /// `qo_indptr[num_rows]`.
    pub num_tokens: u32,
    /// KV heads of a token.
    pub num_kv_heads: u32,
    /// Elements of a head, a multiple of 8.
    pub head_dim: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<AppendParams>() == 168);

impl AppendParams {
    /// Nothing to append.
    pub const fn none(batch: BatchTables) -> AppendParams {
        AppendParams {
            k: absent(),
            v: absent(),
            k_pages: absent_mut(),
            v_pages: absent_mut(),
            batch,
            new_k_stride: HeadStrides { token: 0, head: 0 },
            new_v_stride: HeadStrides { token: 0, head: 0 },
            k_stride: PageStrides { page: 0, token: 0, head: 0 },
            v_stride: PageStrides { page: 0, token: 0, head: 0 },
            num_tokens: 0,
            num_kv_heads: 0,
            head_dim: PIECE,
            reserved: 0,
        }
    }

    /// One block per token. No launch is needed where there is none.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.num_tokens, THREADS, 0)
    }
}
