//! `append`: writes the keys and values of each row's block into its pages.
//!
//! ```text
//! for each query token i of the batch (row r, place t in its block), KV head h:
//!     token = n_r - T_r + t
//!     pages[page of token, token % page_size, h] = new[i, h]          for keys and for values
//! ```
//! **Thread mapping.** One block per query token; its threads copy the token's heads, 16 bytes of keys and of values at
//! a time. The copy does not look into the elements, so one entry serves f16 and bf16 and every head dimension.
//!
//! **Bytes.** Keys and values once each way: `num_tokens * num_kv_heads * head_dim * 8`.

use crate::launch::Dims;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use crate::layout::Row;
use crate::layout::{BatchTables, PageStrides, absent, absent_mut};
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block: one 16-byte piece each of a token with 8 heads of 128.
const THREADS: u32 = 128;

/// Elements of a 16-byte piece.
pub const PIECE: u32 = 8;

/// Parameters of [`append`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AppendParams {
    /// \[num_tokens, num_kv_heads, head_dim\] 2-byte floats, read.
    pub k: GlobalPtr<u16>,
    /// As `k`.
    pub v: GlobalPtr<u16>,
    /// Paged by `stride`, written.
    pub k_pages: GlobalMut<u16>,
    /// As `k_pages`.
    pub v_pages: GlobalMut<u16>,
    /// Rows and page tables, after the block was added.
    pub batch: BatchTables,
    /// Strides of the pages; multiples of 8.
    pub stride: PageStrides,
    /// `qo_indptr[num_rows]`.
    pub num_tokens: u32,
    /// KV heads of a token.
    pub num_kv_heads: u32,
    /// Elements of a head, a multiple of 8.
    pub head_dim: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<AppendParams>() == 128);

impl AppendParams {
    /// Nothing to append.
    pub const fn none(batch: BatchTables) -> AppendParams {
        AppendParams {
            k: absent(),
            v: absent(),
            k_pages: absent_mut(),
            v_pages: absent_mut(),
            batch,
            stride: PageStrides { page: 0, token: 0, head: 0 },
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

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`AppendParams`] says, and 16-byte aligned; every page number lies in the pool.
/// - No two rows share a page that this writes.
/// - Launched with [`AppendParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn append(params: AppendParams) {
    use crate::simt::{grid, thread};

    grid::wait_for_previous();
    grid::launch_dependents();
    let query = thread::block_idx_x();
    let row = params.batch.row_of_query(query);
    let Some(place) = params.place(params.batch.row(row), query) else { return };
    let pieces = params.pieces();
    let mut piece = thread::thread_idx_x();
    while piece < pieces {
        params.copy_piece(query, piece, place);
        piece += THREADS;
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl AppendParams {
    /// Pieces of a token's keys, and of its values.
    #[inline(always)]
    pub(crate) fn pieces(&self) -> u32 {
        self.num_kv_heads * (self.head_dim / PIECE)
    }

    /// Page and place in it of the token of query `query` of a row; `None` for padding.
    #[inline(always)]
    pub(crate) unsafe fn place(&self, row: Row, query: u32) -> Option<(u32, u32)> {
        if row.kv_len == 0 {
            return None;
        }
        let (page_index, token_in_page) = self.batch.split_token(row.kv_len + query - row.queries.end);
        let entry = self.batch.kv_indices.add((row.first_page + page_index) as u64);
        Some((entry.load(), token_in_page))
    }

    /// Copies piece `piece` of the keys and of the values of query `query`'s token to its place.
    #[inline(always)]
    pub(crate) unsafe fn copy_piece(&self, query: u32, piece: u32, (page, token_in_page): (u32, u32)) {
        use crate::simt::data::V4;

        let from = (query as u64 * self.pieces() as u64 + piece as u64) * PIECE as u64;
        let k = self.k.add(from).cast::<V4<u32>>().load_stream();
        let v = self.v.add(from).cast::<V4<u32>>().load_stream();
        let pieces_of_head = self.head_dim / PIECE;
        core::hint::assert_unchecked(pieces_of_head != 0);
        let (head, within) = (piece / pieces_of_head, piece % pieces_of_head * PIECE);
        let to = self.stride.offset(page, token_in_page, head) + within as u64;
        self.k_pages.add(to).cast::<V4<u32>>().store(k);
        self.v_pages.add(to).cast::<V4<u32>>().store(v);
    }
}
