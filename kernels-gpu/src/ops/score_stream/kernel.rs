//! The kernel: a producer warp, and consumer warps that do what a warp of [`score`](mod@crate::ops::score) does.

use super::params::*;
use crate::common::element::Element;
use crate::common::fragment::lane;
use crate::common::layout::BatchTables;
use crate::common::paged::{PagedProducer, Pages, Schedule, TILE, TileLayout, WARPS, stage_tiles};
use crate::common::ring::Stage;
use crate::common::softmax::VoteSoftmax;
use crate::ops::score::ScoreParams;
use crate::ops::score::kernel::steps::{
    Keys, Queries, Tile, Work, fold, load_queries, multiply, put_queries, store_stats, write_products,
};
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{bulk, grid, thread, warp};

impl StreamLayout {
    /// Keys of a stage.
    fn keys(&self, stage: Stage) -> Shared<V4<u32>> {
        self.keys.get().add(stage.index * (self.keys.len() / self.ring.num_stages()))
    }
}

/// The way of a block through a row's tiles. Its stages follow those of the first tile of each, the *lead*.
impl<T> Work<'_, T> {
    /// The lead of the block's first stage.
    fn lead(&self) -> Tile {
        let chunk = thread::block_idx_x() * stage_tiles(self.params.num_kv_heads);
        Tile { chunk, index: chunk }
    }

    /// That of stage `stage`, as [`after`](Self::after) would come to it. The first chunks have a tile more than the others.
    fn lead_of(&self, stage: u32) -> Tile {
        let (count, first) = (self.num_chunks.max(1), self.lead().chunk);
        let (tiles, longer) = ((self.num_tiles / count).max(1), self.num_tiles % count);
        let of_block = longer.saturating_sub(first).div_ceil(self.step.max(1));
        let (chunk, tile) = if stage < of_block * (tiles + 1) {
            (stage / (tiles + 1), stage % (tiles + 1))
        } else {
            let stage = stage - of_block * (tiles + 1);
            (of_block + stage / tiles, stage % tiles)
        };
        let chunk = first + chunk * self.step;
        Tile { chunk, index: chunk + tile * self.num_chunks }
    }

    /// That of the stage after the one of `lead`; its chunk does not exist if that was the last.
    fn after(&self, lead: Tile) -> Tile {
        let (index, chunk) = (lead.index + self.num_chunks, lead.chunk + self.step);
        if index < self.num_tiles { Tile { index, ..lead } } else { Tile { chunk, index: chunk } }
    }

    /// Tile `tile` of the stage of `lead`.
    fn beside(&self, lead: Tile, tile: u32) -> Tile {
        Tile { chunk: lead.chunk + tile, index: lead.index + tile }
    }

    fn exists(&self, tile: Tile) -> bool {
        tile.chunk < self.num_chunks && tile.index < self.num_tiles
    }

    /// Tiles of the stage of `lead` that exist, of `most`.
    fn tiles_beside(&self, lead: Tile, most: u32) -> u32 {
        (self.num_chunks - lead.chunk).min(self.num_tiles - lead.index).min(most)
    }
}

impl<T> Schedule for Work<'_, T> {
    fn first_token(&self, stage: u32, tile: u32) -> Option<u32> {
        let tile = self.beside(self.lead_of(stage), tile);
        self.exists(tile).then_some(self.first + tile.index * TILE)
    }

    fn last_token(&self) -> u32 {
        self.candidates.end - 1
    }

    fn tables(&self) -> &BatchTables {
        &self.params.batch
    }

    fn page_table(&self) -> GlobalPtr<u32> {
        self.pages
    }
}

/// See the module. `C` chunks of 32 dimensions, `N` column tiles of 8 heads; `PACKED`: groups of up to 4 heads, high and
/// low halves in one column tile.
///
/// # Safety
/// - The buffers and tables are as [`ScoreParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - [`ScoreParams::can_stream`]; the device has bulk copies.
/// - `head_dim = 32 C`; the group has at most `8 N` heads, 4 if packed.
/// - Launched with [`ScoreParams::stream_dims`].
pub unsafe fn score_stream<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    params: ScoreParams<T>,
) {
    thread::launch_bounds::<STREAM_THREADS, STREAM_BLOCKS_PER_SM>();
    grid::launch_dependents();
    if !bulk::AVAILABLE {
        return bulk::publish(); // stops the launch
    }
    core::hint::assert_unchecked(params.num_kv_heads != 0 && params.num_kv_heads <= WARPS);
    let layout = const { &StreamLayout::new(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 }) };
    let num_tiles = stage_tiles(params.num_kv_heads);
    let (warp, is_producer) = (warp::warp_id(), warp::warp_id() == WARPS);
    if is_producer && warp::lane_id() == 0 {
        layout.ring.init(num_tiles * params.num_kv_heads);
    }
    let row = thread::block_idx_y();
    let step = thread::grid_dim_x() * num_tiles;
    let work = Work::new(&params, row, TILE, warp % params.num_kv_heads, step);
    let (pages, tile_layout) = (params.pages(), params.tile_layout());
    // Rows that may have nothing to do find out before anything is looked up for them.
    let prefetches = params.overlap.prefetched_stages() != 0;
    if !prefetches && is_idle_when_known(&work) {
        return;
    }
    let mut producer = Producer::none();
    if is_producer {
        producer = Producer::begin(&work, layout, &pages, &tile_layout);
    }
    if prefetches && is_idle_when_known(&work) {
        if is_producer {
            layout.ring.drain(producer.stage);
        }
        return;
    }
    let tile = warp / params.num_kv_heads;
    let consumes = !is_producer && tile < num_tiles;
    let mut queries = [[[[0.0; 4]; 2]; C]; N];
    if consumes {
        queries = load_queries::<T, C, N, PACKED>(&work);
    }
    thread::sync_threads(); // so that copies to the other stages start behind the loads of the queries
    if is_producer {
        while producer.has_next(&work) {
            producer.fill(&work, layout, &pages, &tile_layout);
        }
    } else if consumes {
        consume::<T, C, N, PACKED>(&work, layout, &tile_layout, tile, &queries);
    }
    let folds = params.overlap.chunk_tile() == 0;
    if folds && grid::is_last_block(params.counters.add(row as u64), thread::grid_dim_x()) {
        fold(&work, layout.base.stats);
    }
}

/// [`Work::is_idle`], once the launch before this one has ended.
unsafe fn is_idle_when_known<T>(work: &Work<'_, T>) -> bool {
    grid::wait_for_previous();
    work.is_idle(work.params.actions.add(work.row as u64).load())
}

/// The producer warp's way through its stages: the next one, and its lead.
#[derive(Clone, Copy)]
struct Producer {
    paged: PagedProducer,
    lead: Tile,
    stage: Stage,
}

impl Producer {
    fn none() -> Producer {
        let lead = Tile { chunk: 0, index: 0 };
        Producer { paged: PagedProducer::NONE, lead, stage: Stage::FIRST }
    }

    /// What the producer warp does before it waits for the launch before this one: makes the barriers known, looks up pages,
    /// and prefetches the first stages, if they may be wanted.
    unsafe fn begin<T: Element>(
        work: &Work<'_, T>,
        layout: &StreamLayout,
        pages: &Pages,
        tile_layout: &TileLayout,
    ) -> Producer {
        bulk::publish();
        warp::sync_warp(warp::FULL);
        let paged = PagedProducer::new(work, tile_layout, stage_tiles(pages.num_kv_heads), 0);
        let mut producer = Producer { paged, lead: work.lead(), stage: Stage::FIRST };
        let may_be_scored = work.candidates.len() > work.params.top_k;
        let wanted = work.params.overlap.prefetched_stages().min(layout.ring.num_stages());
        for _ in 0..if may_be_scored { wanted } else { 0 } {
            if producer.has_next(work) {
                producer.fill(work, layout, pages, tile_layout);
            }
        }
        producer
    }

    /// Whether there is a stage left to fill.
    fn has_next<T>(&self, work: &Work<'_, T>) -> bool {
        self.lead.chunk < work.num_chunks
    }

    /// Fills the next stage, when it is empty. Bytes in flight belong to those who wait for them.
    unsafe fn fill<T: Element>(
        &mut self,
        work: &Work<'_, T>,
        layout: &StreamLayout,
        pages: &Pages,
        tile_layout: &TileLayout,
    ) {
        let tile_bytes = pages.num_kv_heads * TILE * pages.head_dim * 2;
        let tiles = work.tiles_beside(self.lead, stage_tiles(pages.num_kv_heads));
        layout.ring.acquire(self.stage, tiles * tile_bytes);
        let (to, arrived) = (layout.keys(self.stage), layout.ring.arrived(self.stage));
        self.paged.copy(work.params.k_pages, pages, tile_layout, to, arrived);
        self.paged.advance(work, tile_layout);
        self.lead = work.after(self.lead);
        self.stage = self.stage.next(layout.ring.num_stages());
    }
}

/// A consumer warp: one KV head of one tile of each stage.
unsafe fn consume<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    layout: &StreamLayout,
    tile_layout: &TileLayout,
    tile_of_stage: u32,
    queries: &Queries<C, N>,
) {
    let queries = put_queries::<T, C, N, PACKED>(work.params, queries, layout.base.queries);
    let at = lane();
    // The lane's 16 bytes of its first token; its other token is 8 further.
    let own = tile_of_stage * tile_layout.tile + work.kv_head * tile_layout.head + 16 * at.t;
    let tokens = [tile_layout.of_token(at.g), tile_layout.of_token(at.g + 8)];
    let mut stats = [[VoteSoftmax::EMPTY; 2]; N];
    let mut lead = work.lead();
    let mut stage = Stage::FIRST;
    while lead.chunk < work.num_chunks {
        let tile = work.beside(lead, tile_of_stage);
        let mut keys = [[[0; 4]; C]; 2];
        layout.ring.wait(stage);
        if work.exists(tile) {
            keys = load_keys(layout.keys(stage).byte_add(own), tokens);
        }
        layout.ring.release(stage);
        if work.exists(tile) {
            for n in 0..N {
                let products = multiply::<T, C, PACKED>(&keys, queries, n as u32);
                write_products::<T, 1, PACKED>(work, tile, 0, n as u32, products, &mut stats[n]);
            }
        }
        let next = work.after(lead);
        if next.chunk != lead.chunk {
            if tile.chunk < work.num_chunks {
                store_stats::<T, N, PACKED>(work, tile.chunk, stats);
            }
            stats = [[VoteSoftmax::EMPTY; 2]; N];
        }
        lead = next;
        stage = stage.next(layout.ring.num_stages());
    }
}

/// The lane's A fragments of 16 tokens: of those `tokens` bytes behind `at`.
unsafe fn load_keys<const C: usize>(at: Shared<V4<u32>>, tokens: [u32; 2]) -> Keys<C> {
    let mut keys = [[[0; 4]; C]; 2];
    for c in 0..C {
        for half in 0..2 {
            keys[half][c] = at.byte_add(tokens[half]).add(4 * c as u32).load().0;
        }
    }
    keys
}
