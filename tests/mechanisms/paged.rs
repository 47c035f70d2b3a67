//! Tiles of pages: every row arrives where the layout says, whatever the pages, heads and strides.

use tokenselect_kernels::common::layout::{BatchTables, PageStrides, absent, page_division};
use tokenselect_kernels::common::paged::{
    PagedProducer, Pages, Schedule, TILE, TileLayout, WARPS, stage_tiles,
};
use tokenselect_kernels::common::ring::{Ring, Stage};
use tokenselect_kernels::simt::data::V4;
use tokenselect_kernels::simt::global::GlobalPtr;
use tokenselect_kernels::simt::shared::{Carve, Region};
use tokenselect_kernels::simt::{bulk, thread, warp};

use super::*;

const HEAD_DIM: u32 = 128;
const STAGES: u32 = 2;
const PAD: u32 = 32;
/// Room for the tiles of a stage, padded.
const STAGE_BYTES: u32 = WARPS * TILE * HEAD_DIM * 2 + 8 * PAD;

struct Layout {
    stages: Region<V4<u32>>,
    ring: Ring,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    let stages = carve.array(STAGES * STAGE_BYTES / 16, 128);
    Layout { stages, ring: Ring::carve(&mut carve, STAGES), bytes: carve.bytes() }
};

/// All tokens of a sequence, tile after tile.
struct Sequence {
    tables: BatchTables,
    len: u32,
    tiles: u32,
}

impl Schedule for Sequence {
    fn first_token(&self, stage: u32, tile: u32) -> Option<u32> {
        let first = (stage * self.tiles + tile) * TILE;
        (first < self.len).then_some(first)
    }

    fn last_token(&self) -> u32 {
        self.len - 1
    }

    fn tables(&self) -> &BatchTables {
        &self.tables
    }

    fn page_table(&self) -> GlobalPtr<u32> {
        self.tables.kv_indices
    }
}

/// Checks all tokens of a sequence of `len`; its pages are in reverse order, two apart.
fn check(page_size: u32, num_kv_heads: u32, nhd: bool, len: u32, pad: u32) {
    let (heads, dim) = (num_kv_heads as u64, HEAD_DIM as u64);
    let [token, head] = if nhd { [heads * dim, dim] } else { [dim, page_size as u64 * dim] };
    let stride = PageStrides { page: 2 * page_size as u64 * heads * dim, token, head };
    let pages = Pages { page_size, num_kv_heads, head_dim: HEAD_DIM, stride };
    let what = format!("pages of {page_size}, {num_kv_heads} heads, {len} tokens, nhd {nhd}, pad {pad}");
    assert!(pages.can_stream(), "{what}");

    let num_pages = len.div_ceil(page_size);
    let indices: Vec<u32> = (0..num_pages).rev().collect();
    let mut memory = Memory::new();
    // The first word of a row names it; what lies between is poison.
    let mut words = vec![u32::MAX; (num_pages as u64 * stride.page / 2) as usize];
    for t in 0..len {
        for h in 0..num_kv_heads {
            let at = stride.offset(indices[(t / page_size) as usize], t % page_size, h) / 2;
            words[at as usize] = t * WARPS + h;
            words[(at + dim / 2 - 1) as usize] = t * WARPS + h;
        }
    }
    let from = memory.input("pages", &words).cast::<u16>();
    let (page_magic, page_shift) = page_division(page_size);
    let tables = BatchTables {
        qo_indptr: absent(),
        kv_indptr: absent(),
        kv_indices: memory.input("page table", &indices),
        kv_last_page_len: absent(),
        candidates: absent(),
        num_rows: 1,
        page_size,
        page_magic,
        page_shift,
    };
    let tiles = stage_tiles(num_kv_heads);
    let sequence = Sequence { tables, len, tiles };
    let num_tiles = len.div_ceil(TILE);
    let rows = (num_tiles * TILE * num_kv_heads) as usize;
    let out = memory.buffer("out", &vec![0u32; 2 * rows]);
    let kernel = || unsafe {
        let layout = TileLayout::new(&pages, pad);
        let is_producer = warp::warp_id() == WARPS;
        if is_producer && warp::lane_id() == 0 {
            LAYOUT.ring.init(tiles * num_kv_heads);
            bulk::publish();
        }
        thread::sync_threads();
        let (tile, head) = (warp::warp_id() / num_kv_heads, warp::warp_id() % num_kv_heads);
        let mut producer = PagedProducer::NONE;
        if is_producer {
            producer = PagedProducer::new(&sequence, &layout, tiles, 0);
        } else if tile >= tiles {
            return;
        }
        let mut stage = Stage::FIRST;
        for step in 0..num_tiles.div_ceil(tiles) {
            let at = LAYOUT.stages.get().byte_add(stage.index * STAGE_BYTES);
            if is_producer {
                let there = (num_tiles - step * tiles).min(tiles);
                LAYOUT.ring.acquire(stage, there * num_kv_heads * TILE * HEAD_DIM * 2);
                producer.copy(from, &pages, &layout, at, LAYOUT.ring.arrived(stage));
                producer.advance(&sequence, &layout);
            } else {
                LAYOUT.ring.wait(stage);
                let token = warp::lane_id();
                if token < TILE && step * tiles + tile < num_tiles {
                    let row = tile * layout.tile + head * layout.head + layout.of_token(token);
                    let row = at.byte_add(row).cast::<u32>();
                    let to = ((step * tiles + tile) * TILE + token) * num_kv_heads + head;
                    out.add(2 * to as u64).store(row.load());
                    out.add(2 * to as u64 + 1).store(row.add(HEAD_DIM / 2 - 1).load());
                }
                LAYOUT.ring.release(stage);
            }
            stage = stage.next(STAGES);
        }
    };
    let dims = Dims::linear(1, 32 * (WARPS + 1), LAYOUT.bytes);
    for options in schedules().step_by(3) {
        run(dims, &memory, options, kernel).unwrap_or_else(|report| panic!("{what}: {report}"));
        for (row, ends) in memory.read(out, 2 * rows).chunks(2).enumerate() {
            let (token, head) = (row as u32 / num_kv_heads, row as u32 % num_kv_heads);
            // What lies behind the last token is whatever its page holds.
            if token < len {
                assert_eq!(ends, [token * WARPS + head; 2], "{what}: token {token}, head {head}");
            }
        }
    }
}

#[test]
fn rows_arrive_where_the_layout_says() {
    for (page_size, heads) in [(2, 8), (4, 4), (4, 5), (8, 3), (16, 1), (16, 2), (16, 8), (64, 8), (64, 3)] {
        for len in [1, 15, 16, 17, 100, 150] {
            check(page_size, heads, true, len, if len % 2 == 0 { 0 } else { PAD });
        }
    }
    for (page_size, heads) in [(16, 1), (16, 8), (32, 3)] {
        for len in [1, 31, 90] {
            check(page_size, heads, false, len, PAD);
        }
    }
}
