//! The kernel, and its steps, which `append_pool` takes too.

use super::params::*;
use crate::common::block::strided;
use crate::common::layout::{HeadStrides, PageStrides, Row};
use crate::simt::data::V4;
use crate::simt::{grid, thread};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`AppendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - No two rows share a page that this writes.
/// - Launched with [`AppendParams::dims`].
pub unsafe fn append(params: AppendParams) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let query = thread::block_idx_x();
    let row = params.batch.row_of_query(query);
    let Some(slot) = params.slot(params.batch.row(row), query) else { return };
    let pieces = params.pieces();
    for piece in strided(thread::thread_idx_x(), pieces, THREADS) {
        params.copy_piece(query, piece, slot);
    }
}

impl AppendParams {
    /// Pieces of a token's keys, and of its values.
    pub(crate) fn pieces(&self) -> u32 {
        self.num_kv_heads * (self.head_dim / PIECE)
    }

    /// Page, and index in it, of the token of query `query` of a row; `None` for padding.
    pub(crate) unsafe fn slot(&self, row: Row, query: u32) -> Option<(u32, u32)> {
        if row.kv_len == 0 {
            return None;
        }
        let (page_index, token_in_page) = self.batch.split_token(row.kv_len + query - row.queries.end);
        let entry = self.batch.kv_indices.add((row.first_page + page_index) as u64);
        Some((entry.load(), token_in_page))
    }

    /// Copies piece `piece` of the keys and of the values of query `query`'s token to its slot.
    pub(crate) unsafe fn copy_piece(&self, query: u32, piece: u32, (page, token_in_page): (u32, u32)) {
        let pieces_of_head = self.head_dim / PIECE;
        core::hint::assert_unchecked(pieces_of_head != 0);
        let (head, within) = (piece / pieces_of_head, (piece % pieces_of_head * PIECE) as u64);
        let from = |strides: &HeadStrides| strides.offset(query, head) + within;
        let k = self.k.add(from(&self.new_k_stride)).cast::<V4<u32>>().load_constant_once();
        let v = self.v.add(from(&self.new_v_stride)).cast::<V4<u32>>().load_constant_once();
        let to = |strides: &PageStrides| strides.offset(page, token_in_page, head) + within;
        self.k_pages.add(to(&self.k_stride)).cast::<V4<u32>>().store(k);
        self.v_pages.add(to(&self.v_stride)).cast::<V4<u32>>().store(v);
    }
}
