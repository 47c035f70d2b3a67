//! `score` with keys streamed through shared memory by the copy engine (Hopper).
//!
//! ```text
//! producer warp:    for each stage: wait until it is empty; copy 16 tokens, all heads, of each stream
//! consumer warps:   for each stage: wait until it is full; load fragments; say that it is empty; multiply, write
//! ```
//! Departures from the kernel that loads keys to registers:
//! 1. A bulk copy is as large as the pages allow, up to 16 tokens of all heads: 32 KiB with 8 heads of 128. In a study in
//!    CUDA C++ on an H200, with a million tokens and logits of 16 bits, copies of 2 KiB took 545 µs, of 8 KiB 517, where
//!    loads to registers took 525 without writing anything; reading alone takes 511.
//! 2. A block serves all KV heads, a warp one of them. With fewer heads than warps a block works on several *streams*: stream
//!    `s` takes the chunk and the tile `s` after the ones of stream 0.
//! 3. The lanes of the producer warp look up a page each, for up to 32 stages, and the pages of the 32 after those are loaded
//!    meanwhile.
//! 4. Keys are asked for while the launch before this one, which pools the queries, is still at work
//!    ([`stages_ahead`](ScoreParams::stages_ahead)); the other stages not before the queries, which would arrive behind them.
//!
//! Tiles are of 16 tokens; chunks, their statistics and the logits are those of the other kernel with such tiles, bit for
//! bit.

use super::{Layout, ScoreParams, THREADS, WARPS, columns};
use crate::launch::{Dims, GpuInfo};
use crate::simt::data::V4;
use crate::simt::shared::{Carve, Region};
use crate::stream::{self, Pages, TILE};

const _: () = assert!(WARPS == stream::WARPS);

/// Bytes of keys for each SM from which on they are better streamed: [`GpuInfo::score_stream_bytes`] of a GPU. With fewer the
/// kernel that loads keys to registers is faster, which does not work on several stages at the end of a block, when all keys
/// are there: on an H100 a selection of 32 k tokens took 44 µs and not 48, of 256 k 230 and 232, of 512 k 444 and 438.
pub const STREAM_BYTES_OF_SM: u64 = 3 << 20;
/// Threads of a block: the consumers, and the producer warp.
const STREAM_THREADS: u32 = THREADS + 32;
/// Blocks of an SM: one, with all of its shared memory.
const STREAM_BLOCKS_PER_SM: u32 = 1;
/// Shared memory of a block at most.
const BLOCK_BYTES: u32 = (227 << 10) / STREAM_BLOCKS_PER_SM;
/// Bytes of stages that are wanted: those under way hide the latency of memory.
const STAGES_BYTES: u32 = (192 << 10) / STREAM_BLOCKS_PER_SM;

/// Shared memory of a block. A host without a machine needs the byte count alone.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct StreamLayout {
    base: Layout,
    /// Keys: \[num_stages, streams, tile\]; a tile is `[token, head, head_dim]`, or `[head, token, head_dim]` where pages
    /// are so.
    stages: Region<V4<u32>>,
    /// Barriers of each stage: the copies have arrived; the consumers have read them.
    full: Region<u64>,
    empty: Region<u64>,
    num_stages: u32,
    bytes: u32,
}

impl StreamLayout {
    /// For instances with so many columns, as [`Layout::new`].
    const fn new(head_dim: u32, columns: u32) -> StreamLayout {
        let mut carve = Carve::new();
        let base = Layout::carve(&mut carve, head_dim, columns);
        let stage_bytes = WARPS * TILE * head_dim * 2;
        // Behind the stages come two barriers for each.
        let room = (BLOCK_BYTES - carve.bytes().next_multiple_of(128)) / (stage_bytes + 16);
        let wanted = STAGES_BYTES / stage_bytes;
        let num_stages = if room < wanted { room } else { wanted };
        StreamLayout {
            base,
            stages: carve.array(num_stages * stage_bytes / 16, 128),
            full: carve.array(num_stages, 8),
            empty: carve.array(num_stages, 8),
            num_stages,
            bytes: carve.bytes(),
        }
    }
}

impl<T> ScoreParams<T> {
    /// The keys, as copies see them.
    const fn pages(&self) -> Pages {
        Pages {
            page_size: self.batch.page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            stride: self.stride,
        }
    }

    /// Whether [`score_stream`] scores these pages of a batch with so many places for tokens.
    pub const fn streams(&self, gpu: &GpuInfo, num_places: u64) -> bool {
        let bytes = num_places * self.num_kv_heads as u64 * self.head_dim as u64 * 2;
        gpu.bulk_copies && bytes >= gpu.score_stream_bytes && self.can_stream()
    }

    /// Whether [`score_stream`] can score these pages, and is worth it for long contexts.
    pub const fn can_stream(&self) -> bool {
        let has_instance = self.head_dim.is_multiple_of(32) && self.head_dim <= 256;
        has_instance && self.pages().can_stream()
    }

    /// Whether no copy of [`score_stream`] reaches beyond a row's candidates and local tokens: keys may then be asked for
    /// while a block is appended.
    pub const fn spares_block(&self) -> bool {
        self.n_local + 1 >= TILE
    }

    /// The launch of [`score_stream`]: a grid that fills the device, shared evenly by the rows.
    pub const fn stream_dims(&self, gpu: &GpuInfo) -> Dims {
        let columns = match columns(self.group) {
            Some(columns) => columns,
            None => 16,
        };
        let layout = StreamLayout::new(self.head_dim, columns);
        // Not one block more than run at a time, as long as every row has one.
        let fair = gpu.num_sms * STREAM_BLOCKS_PER_SM / self.batch.num_rows;
        let blocks = if fair == 0 { 1 } else { fair };
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [STREAM_THREADS, 1, 1],
            shared_bytes: layout.bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::score_stream;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Limits;
    use crate::layout::{BatchTables, PageStrides, absent, absent_mut};

    /// Heads adjacent to one another, or tokens.
    fn params(page_size: u32, num_kv_heads: u32, head_dim: u32, nhd: bool) -> ScoreParams<u16> {
        let (dim, heads) = (head_dim as u64, num_kv_heads as u64);
        let [token, head] = if nhd { [heads * dim, dim] } else { [dim, page_size as u64 * dim] };
        let batch = BatchTables {
            qo_indptr: absent(),
            kv_indptr: absent(),
            kv_indices: absent(),
            kv_last_page_len: absent(),
            candidates: absent(),
            num_rows: 1,
            page_size,
            page_magic: 0,
            page_shift: 0,
        };
        ScoreParams {
            k_pages: absent(),
            queries: absent(),
            actions: absent(),
            logits: absent_mut(),
            stats: absent_mut(),
            partial: absent_mut(),
            counters: absent_mut(),
            batch,
            stride: PageStrides { page: 2 * page_size as u64 * heads * dim, token, head },
            num_kv_heads,
            group: 4,
            n_init: 0,
            n_local: 0,
            score_scale: 1.0,
            head_dim,
            folds: 1,
            stages_ahead: 0,
            top_k: 0,
            reserved: 0,
        }
    }

    #[test]
    fn pages_that_can_be_streamed() {
        let streams = |page_size, heads, dim, nhd| params(page_size, heads, dim, nhd).can_stream();
        for dim in [64, 96, 128, 256] {
            for heads in 1..=8 {
                for page_size in [16, 32, 64, 1024] {
                    let [all_heads, one_head] = [32 * heads * dim, 32 * dim].map(|bytes| bytes >= 4096);
                    assert_eq!(streams(page_size, heads, dim, true), all_heads, "{heads} heads of {dim}");
                    assert_eq!(streams(page_size, heads, dim, false), one_head || heads == 1 && all_heads);
                }
            }
            assert!(!streams(16, 9, dim, true), "a warp for each head");
            assert!(!streams(48, 8, dim, true) && !streams(7, 8, dim, false), "no power of two");
        }
        // Small pages: one copy a page, if that is large enough.
        assert!(!streams(1, 8, 128, true) && streams(2, 8, 128, true) && !streams(2, 4, 128, true));
        assert!(streams(8, 8, 64, true) && streams(4, 8, 64, true) && !streams(2, 8, 64, true));
        assert!(streams(1, 8, 256, true) && streams(1, 8, 256, false));
        assert!(!streams(16, 8, 80, true), "no such instance");
    }

    /// With 8 heads of 128, from some 200 k tokens on; not without bulk copies.
    #[test]
    fn short_contexts_are_not_streamed() {
        let score_stream_bytes = 132 * STREAM_BYTES_OF_SM;
        let gpu = GpuInfo { num_sms: 132, limits: Limits::SM_90, bulk_copies: true, score_stream_bytes };
        let nhd = params(16, 8, 128, true);
        assert!(!nhd.streams(&gpu, 192 << 10) && nhd.streams(&gpu, 256 << 10));
        assert!(!nhd.streams(&GpuInfo { bulk_copies: false, ..gpu }, 256 << 10));
        assert!(!params(1, 8, 128, true).streams(&gpu, 256 << 10), "pages of one token");
    }

    #[test]
    fn gaps_between_rows_are_not_streamed() {
        let nhd = params(16, 8, 128, true);
        for (token, head) in [(1032, 128), (1024, 136), (2048, 256)] {
            let stride = PageStrides { token, head, ..nhd.stride };
            assert!(!ScoreParams { stride, ..nhd }.can_stream(), "{stride:?}");
        }
    }

    /// At least three stages, but for heads of 256 with large groups, and never more than a block can have.
    #[test]
    fn stages_fit() {
        for head_dim in [64, 96, 128, 256] {
            for columns in [4, 8, 16] {
                let layout = StreamLayout::new(head_dim, columns);
                assert!(layout.bytes <= BLOCK_BYTES, "{} bytes", layout.bytes);
                assert!(layout.num_stages >= if head_dim == 256 { 1 } else { 3 }, "{}", layout.num_stages);
            }
        }
        assert_eq!(StreamLayout::new(128, 4).num_stages, 6);
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::super::statistics::Stats;
    use super::super::steps::{
        Queries, Tile, Work, ask_for_queries, fold, multiply, put_queries, store_stats, write_products,
    };
    use super::*;
    use crate::element::Element;
    use crate::simt::bulk::{self, MBarrier};
    use crate::simt::shared::Shared;
    use crate::simt::{grid, thread, warp};
    use crate::stream::{Place, streams};

    impl StreamLayout {
        #[inline(always)]
        fn full(&self, stage: u32) -> MBarrier {
            MBarrier::at(self.full.get().add(stage))
        }

        #[inline(always)]
        fn empty(&self, stage: u32) -> MBarrier {
            MBarrier::at(self.empty.get().add(stage))
        }

        /// Keys of a stage, from the tile of stream 0 on.
        #[inline(always)]
        fn keys(&self, stage: u32) -> Shared<V4<u32>> {
            self.stages.get().add(stage * (self.stages.len() / self.num_stages))
        }
    }

    impl<T> Work<'_, T> {
        /// The tile of stream 0 in the block's first stage.
        #[inline(always)]
        fn lead(&self) -> Tile {
            let chunk = thread::block_idx_x() * streams(self.params.num_kv_heads);
            Tile { chunk, index: chunk }
        }

        /// That of stage `stage`, as [`after`](Self::after) would come to it. The first chunks have a tile more than the others.
        #[inline(always)]
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
        #[inline(always)]
        fn after(&self, lead: Tile) -> Tile {
            let (index, chunk) = (lead.index + self.num_chunks, lead.chunk + self.step);
            if index < self.num_tiles { Tile { index, ..lead } } else { Tile { chunk, index: chunk } }
        }

        /// The tile of a stream beside that of stream 0.
        #[inline(always)]
        fn beside(&self, lead: Tile, stream: u32) -> Tile {
            Tile { chunk: lead.chunk + stream, index: lead.index + stream }
        }

        #[inline(always)]
        fn exists(&self, tile: Tile) -> bool {
            tile.chunk < self.num_chunks && tile.index < self.num_tiles
        }
    }

    /// See the module. `C` chunks of 32 dimensions, `N` column tiles of 8 heads; `PACKED`: groups of up to 4 heads, high and
    /// low parts in one column tile.
    ///
    /// # Safety
    /// - The buffers and tables are as [`ScoreParams`] says, and 16-byte aligned; every page number lies in the pool.
    /// - [`ScoreParams::can_stream`]; the device has bulk copies.
    /// - `head_dim = 32 C`; the group has at most `8 N` heads, 4 if packed.
    /// - Launched with [`ScoreParams::stream_dims`].
    #[inline(always)]
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
        let num_streams = streams(params.num_kv_heads);
        let (warp, is_producer) = (warp::warp_id(), warp::warp_id() == WARPS);
        if is_producer && warp::lane_id() == 0 {
            make_barriers(layout, num_streams * params.num_kv_heads);
        }
        let row = thread::block_idx_y();
        let step = thread::grid_dim_x() * num_streams;
        let work = Work::new(&params, row, TILE, warp % params.num_kv_heads, step);
        // Rows that may have nothing to do find out before anything is looked up for them.
        let asks_ahead = params.stages_ahead != 0;
        if !asks_ahead && is_idle_when_known(&work) {
            return;
        }
        let mut producer = Producer::NONE;
        if is_producer {
            producer = begin(&work, layout);
        }
        if asks_ahead && is_idle_when_known(&work) {
            if is_producer {
                await_stages(layout, producer.place);
            }
            return;
        }
        let stream = warp / params.num_kv_heads;
        let consumes = !is_producer && stream < num_streams;
        let mut queries = [[[[0.0; 4]; 2]; C]; N];
        if consumes {
            queries = ask_for_queries::<T, C, N, PACKED>(&work);
        }
        thread::sync_threads(); // so the other stages are asked for behind the queries
        if is_producer {
            while producer.has_next(&work) {
                producer.fill(&work, layout);
            }
        } else if consumes {
            consume::<T, C, N, PACKED>(&work, layout, stream, &queries);
        }
        if params.folds != 0 && grid::is_last_block(params.counters.add(row as u64), thread::grid_dim_x()) {
            fold(&work, layout.base.stats);
        }
    }

    /// [`Work::is_idle`], once the launch before this one has ended.
    #[inline(always)]
    unsafe fn is_idle_when_known<T>(work: &Work<'_, T>) -> bool {
        grid::wait_for_previous();
        work.is_idle(work.params.actions.add(work.row as u64).load())
    }

    /// Waits for the stages before `place` of the first round: a block must not end before its copies have arrived.
    #[inline(always)]
    unsafe fn await_stages(layout: &StreamLayout, end: Place) {
        let filled = if end.parity == 0 { end.stage } else { layout.num_stages };
        let mut stage = 0;
        while stage < filled {
            layout.full(stage).wait(0);
            stage += 1;
        }
    }

    /// Makes the barriers: a stage is filled by one warp and emptied by `consumers`.
    #[inline(always)]
    unsafe fn make_barriers(layout: &StreamLayout, consumers: u32) {
        let mut stage = 0;
        while stage < layout.num_stages {
            layout.full(stage).init(1);
            layout.empty(stage).init(consumers);
            stage += 1;
        }
    }

    /// What one lane of the producer copies: `copy_tokens` tokens of the stages that are its turn.
    #[derive(Clone, Copy)]
    struct Part {
        /// The lane's stages are those with this number in each batch.
        turn: u32,
        stream: u32,
        /// First token of the part in its tile.
        token: u32,
    }

    /// The producer warp's way through its stages: what a lane is to copy next.
    #[derive(Clone, Copy)]
    struct Producer {
        part: Part,
        /// Stages for which the lanes look up pages together, and how many of these are filled.
        batch: u32,
        turn: u32,
        /// The lane's own tile in this batch and in the next, and their pages.
        tile: Tile,
        page: u32,
        next_tile: Tile,
        next_page: u32,
        /// The lane's stage in the next batch.
        next_stage: u32,
        /// Tile of stream 0 in the next stage, and that stage.
        lead: Tile,
        place: Place,
    }

    impl Producer {
        const NONE: Producer = {
            let tile = Tile { chunk: 0, index: 0 };
            Producer {
                part: Part { turn: 0, stream: 0, token: 0 },
                batch: 1,
                turn: 0,
                tile,
                page: 0,
                next_tile: tile,
                next_page: 0,
                next_stage: 0,
                lead: tile,
                place: Place::FIRST,
            }
        };

        /// Before the first stage. Looks up the first pages.
        #[inline(always)]
        unsafe fn new<T: Element>(work: &Work<'_, T>) -> Self {
            let copy_tokens = work.params.pages().copy_tokens();
            core::hint::assert_unchecked(copy_tokens != 0);
            let parts_of_tile = TILE / copy_tokens;
            let parts = streams(work.params.num_kv_heads) * parts_of_tile;
            core::hint::assert_unchecked(parts_of_tile != 0 && parts != 0);
            let lane = warp::lane_id();
            let part = Part {
                turn: lane / parts,
                stream: lane % parts / parts_of_tile,
                token: lane % parts_of_tile * copy_tokens,
            };
            let batch = warp::SIZE / parts;
            let next_stage = part.turn + batch;
            let (tile, next_tile) = (work.lead_of(part.turn), work.lead_of(next_stage));
            let page = look_up(work, tile, &part);
            let next_page = look_up(work, next_tile, &part);
            let (lead, place) = (work.lead(), Place::FIRST);
            Producer { part, batch, turn: 0, tile, page, next_tile, next_page, next_stage, lead, place }
        }

        /// Whether there is a stage left to fill.
        #[inline(always)]
        fn has_next<T>(&self, work: &Work<'_, T>) -> bool {
            self.lead.chunk < work.num_chunks
        }

        /// Fills the next stage, when it is empty. Bytes on their way belong to those who wait for them.
        #[inline(always)]
        unsafe fn fill<T: Element>(&mut self, work: &Work<'_, T>, layout: &StreamLayout) {
            let num_streams = streams(work.params.num_kv_heads);
            let (place, lead) = (self.place, self.lead);
            layout.empty(place.stage).wait(place.parity ^ 1);
            // A lane with nothing to copy must not fall behind: two phases later the parity is the same again.
            warp::sync_warp(warp::FULL);
            if warp::lane_id() == 0 {
                let tile_bytes = work.params.num_kv_heads * TILE * work.params.head_dim * 2;
                let tiles = (work.num_chunks - lead.chunk).min(work.num_tiles - lead.index);
                layout.full(place.stage).arrive_expecting(tiles.min(num_streams) * tile_bytes);
            }
            if self.turn == self.part.turn {
                copy_part(work, layout, self.tile, &self.part, self.page, place.stage);
            }
            self.turn += 1;
            if self.turn == self.batch {
                self.turn = 0;
                (self.tile, self.page) = (self.next_tile, self.next_page);
                self.next_stage += self.batch;
                self.next_tile = work.lead_of(self.next_stage);
                self.next_page = look_up(work, self.next_tile, &self.part);
            }
            self.lead = work.after(lead);
            self.place = place.next(layout.num_stages);
        }
    }

    /// What the producer warp does before it waits for the launch before this one: makes the barriers known, looks up pages,
    /// and fills the first stages, if they may be wanted.
    #[inline(always)]
    unsafe fn begin<T: Element>(work: &Work<'_, T>, layout: &StreamLayout) -> Producer {
        bulk::publish();
        warp::sync_warp(warp::FULL);
        let mut producer = Producer::new(work);
        let may_be_scored = work.candidates.len() > work.params.top_k;
        let stages = if may_be_scored { work.params.stages_ahead.min(layout.num_stages) } else { 0 };
        let mut filled = 0;
        while filled < stages && producer.has_next(work) {
            producer.fill(work, layout);
            filled += 1;
        }
        producer
    }

    /// The token of the row that a lane's part begins with. Parts beyond the candidates become the last with one.
    #[inline(always)]
    fn first_token<T>(work: &Work<'_, T>, lead: Tile, part: &Part) -> u32 {
        let token = work.first + work.beside(lead, part.stream).index * TILE + part.token;
        token.min(work.candidates.end - 1)
    }

    /// Number of the page that a lane's part lies in.
    #[inline(always)]
    unsafe fn look_up<T>(work: &Work<'_, T>, lead: Tile, part: &Part) -> u32 {
        if !work.exists(work.beside(lead, part.stream)) {
            return 0;
        }
        let (page, _) = work.params.batch.split_token(first_token(work, lead, part));
        work.pages.add(page as u64).load()
    }

    /// Starts the copies of a lane's part of a stage: one if the heads are adjacent, else one a head.
    #[inline(always)]
    unsafe fn copy_part<T: Element>(
        work: &Work<'_, T>,
        layout: &StreamLayout,
        lead: Tile,
        part: &Part,
        page: u32,
        stage: u32,
    ) {
        if !work.exists(work.beside(lead, part.stream)) {
            return;
        }
        let params = work.params;
        let (dim, heads, tokens) = (params.head_dim, params.num_kv_heads, params.pages().copy_tokens());
        let (_, token_in_page) = params.batch.split_token(first_token(work, lead, part));
        // The last candidate may lie within a part.
        let token_in_page = token_in_page & !(tokens - 1);
        let from = params.k_pages.add(params.stride.offset(page, token_in_page, 0)).cast::<V4<u32>>();
        let tile = layout.keys(stage).add(part.stream * (heads * TILE * dim / 8));
        let full = layout.full(stage);
        if params.pages().heads_are_adjacent() {
            let to = tile.add(part.token * (heads * dim / 8));
            bulk::copy_to_shared(to, from, tokens * heads * dim * 2, full);
            return;
        }
        let mut head = 0;
        while head < heads {
            let to = tile.add((head * TILE + part.token) * (dim / 8));
            let from = from.add(head as u64 * (params.stride.head / 8));
            bulk::copy_to_shared(to, from, tokens * dim * 2, full);
            head += 1;
        }
    }

    /// A consumer warp: one KV head of one stream.
    #[inline(always)]
    unsafe fn consume<T: Element, const C: usize, const N: usize, const PACKED: bool>(
        work: &Work<'_, T>,
        layout: &StreamLayout,
        stream: u32,
        queries: &Queries<C, N>,
    ) {
        let queries = put_queries::<T, C, N, PACKED>(queries, layout.base.queries);
        let heads = work.params.num_kv_heads;
        // 16-byte places from a token to the next and from a head to the next.
        let row = 4 * C as u32;
        let (token, head) =
            if work.params.pages().heads_are_adjacent() { (heads * row, row) } else { (row, TILE * row) };
        let lane = warp::lane_id();
        let own = stream * heads * TILE * row + work.kv_head * head + lane / 4 * token + lane % 4;
        let mut stats = [[Stats::EMPTY; 2]; N];
        let mut lead = work.lead();
        let mut place = Place::FIRST;
        while lead.chunk < work.num_chunks {
            let tile = work.beside(lead, stream);
            let mut keys = [[[0; 4]; C]; 2];
            layout.full(place.stage).wait(place.parity);
            if work.exists(tile) {
                keys = load_keys(layout.keys(place.stage).add(own), 8 * token);
            }
            warp::sync_warp(warp::FULL);
            if lane == 0 {
                layout.empty(place.stage).arrive();
            }
            if work.exists(tile) {
                let mut n = 0;
                while n < N {
                    let products = multiply::<T, C, PACKED>(&keys, queries, n as u32);
                    write_products::<T, 1, PACKED>(work, tile, 0, n as u32, products, &mut stats[n]);
                    n += 1;
                }
            }
            let next = work.after(lead);
            if next.chunk != lead.chunk {
                if tile.chunk < work.num_chunks {
                    store_stats::<T, N, PACKED>(work, tile.chunk, stats);
                }
                stats = [[Stats::EMPTY; 2]; N];
            }
            lead = next;
            place = place.next(layout.num_stages);
        }
    }

    /// The lane's A fragments of 16 tokens, from its 16 bytes of its first token on; `half`: places to its other token.
    #[inline(always)]
    unsafe fn load_keys<const C: usize>(at: Shared<V4<u32>>, half: u32) -> [[[u32; 4]; C]; 2] {
        let mut keys = [[[0; 4]; C]; 2];
        let mut c = 0;
        while c < C {
            keys[0][c] = at.add(4 * c as u32).load().0;
            keys[1][c] = at.add(half + 4 * c as u32).load().0;
            c += 1;
        }
        keys
    }
}
