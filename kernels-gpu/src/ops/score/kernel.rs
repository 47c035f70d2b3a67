//! The kernel: a warp's way through its chunks, with the keys of the next tile in flight.

pub(crate) mod chunks;
pub(crate) mod steps;

use self::steps::{Keys, Tile, Work, fold, load_queries, multiply, put_queries, store_stats, write_products};
use super::params::*;
use crate::common::element::Element;
use crate::common::fragment::Accumulator;
use crate::common::softmax::VoteSoftmax;
use crate::simt::data::V4;
use crate::simt::shared::Region;
use crate::simt::{grid, thread, warp};

/// See the module. `C` chunks of 32 dimensions, `N` column tiles of 8 heads, `U` tiles of 16 tokens at a time;
/// `PACKED`: groups of up to 4 heads, high and low halves in one column tile.
///
/// # Safety
/// - The buffers and tables are as [`ScoreParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 32 C`; the group has at most `8 N` heads, 4 if packed; `16 U` is [`tile_tokens`].
/// - Launched with [`ScoreParams::dims`].
#[inline(always)]
pub unsafe fn score<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
    params: ScoreParams<T>,
) {
    const { assert!(16 * U as u32 == tile_tokens(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 })) };
    let row = thread::block_idx_y();
    core::hint::assert_unchecked(params.num_kv_heads != 0);
    let warp_of_row = thread::block_idx_x() * WARPS + warp::warp_id();
    let kv_head = warp_of_row % params.num_kv_heads;
    let step = thread::grid_dim_x() * WARPS / params.num_kv_heads;
    let work = Work::new(&params, row, 16 * U as u32, kv_head, step);
    grid::wait_for_previous();
    grid::launch_dependents();
    let layout = const { &Layout::new(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 }) };
    let action = params.actions.add(row as u64).load();
    if work.is_idle(action) {
        return;
    }
    let chunk = warp_of_row / params.num_kv_heads;
    if chunk < work.step && chunk < work.num_chunks {
        score_chunks::<T, C, N, U, PACKED>(&work, layout.queries, chunk);
    }
    if params.overlap.chunk_tile() == 0
        && grid::is_last_block(params.counters.add(row as u64), thread::grid_dim_x())
    {
        fold(&work, layout.stats);
    }
}

/// The warp's chunks, from `chunk` on: their tiles, one after the other, pipelined over the chunks' borders.
#[inline(always)]
unsafe fn score_chunks<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    queries: Region<V4<u32>>,
    chunk: u32,
) {
    let queries =
        put_queries::<T, C, N, PACKED>(work.params, &load_queries::<T, C, N, PACKED>(work), queries);
    let mut tile = Tile { chunk, index: chunk };
    let pages = load_pages::<T, U>(work, tile);
    let mut keys = [[[[0; 4]; C]; 2]; U];
    for u in 0..U {
        keys[u] = load_keys::<T, C, U>(work, tile, u as u32, pages[u]);
    }
    let mut next = work.next_tile(tile);
    let mut pages = load_pages::<T, U>(work, next);
    let mut stats = [[VoteSoftmax::EMPTY; 2]; N];
    loop {
        for u in 0..U {
            let mut products = [Accumulator::ZERO; N];
            for n in 0..N {
                products[n] = multiply::<T, C, PACKED>(&keys[u], queries, n as u32);
            }
            keys[u] = load_keys::<T, C, U>(work, next, u as u32, pages[u]);
            for n in 0..N {
                write_products::<T, U, PACKED>(work, tile, u as u32, n as u32, products[n], &mut stats[n]);
            }
        }
        if next.chunk != tile.chunk || next == tile {
            store_stats::<T, N, PACKED>(work, tile.chunk, stats);
            stats = [[VoteSoftmax::EMPTY; 2]; N];
        }
        if next == tile {
            return;
        }
        tile = next;
        next = work.next_tile(tile);
        pages = load_pages::<T, U>(work, next);
    }
}

/// Page numbers of the tokens whose keys the lane loads. Tokens beyond the candidates become the last.
#[inline(always)]
unsafe fn load_pages<T: Element, const U: usize>(work: &Work<'_, T>, tile: Tile) -> [[u32; 2]; U] {
    let mut pages = [[0; 2]; U];
    for u in 0..U {
        for half in 0..2 {
            let token = work.token(tile, 16 * U as u32, u as u32, half as u32);
            let token = token.min(work.candidates.end - 1);
            let (page, _) = work.params.batch.split_token(token);
            // Not `load_constant`: the assembler would move such a load behind the products, next to its use.
            pages[u][half] = work.pages.add(page as u64).load();
        }
    }
    pages
}

/// The lane's A fragments of 16 tokens: 16 bytes of each of its two tokens from each chunk of 32 dimensions.
#[inline(always)]
unsafe fn load_keys<T: Element, const C: usize, const U: usize>(
    work: &Work<'_, T>,
    tile: Tile,
    u: u32,
    pages: [u32; 2],
) -> Keys<C> {
    let within = 8 * (warp::lane_id() % 4) as u64;
    let mut keys = [[[0; 4]; C]; 2];
    for half in 0..2 {
        let token = work.token(tile, 16 * U as u32, u, half as u32).min(work.candidates.end - 1);
        let (_, token_in_page) = work.params.batch.split_token(token);
        let offset = work.params.stride.offset(pages[half], token_in_page, work.kv_head) + within;
        let at = work.params.k_pages.add(offset).cast::<V4<u32>>();
        for c in 0..C {
            keys[half][c] = at.add(4 * c as u64).load_constant_row().0;
        }
    }
    keys
}
