//! The kernel: a producer warp, and the consumers' way through their tiles.

mod merge;
pub use merge::attend_stream_merge;

use super::params::*;
use crate::common::element::Element;
use crate::common::fragment::{A, Accumulator, B, Lane, lane, over_rows};
use crate::common::layout::BatchTables;
use crate::common::paged::{PagedProducer, Pages, SEGMENT, Schedule, TILE, TileLayout, WARPS, stage_tiles};
use crate::common::ring::Stage;
use crate::common::softmax::Running;
use crate::common::words::{load_row, load_shared};
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::List;
use crate::ops::attend::kernel::splits::Splits;
use crate::ops::attend::kernel::tile::{
    Key, Out, Values, Work, add_seen, add_values, any_value_not_finite, each_quad, transpose, weigh,
};
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{bulk, grid, thread, warp};

impl Layout {
    /// Keys or values of a stage, from its first tile on.
    fn rows(&self, stage: Stage) -> Shared<V4<u32>> {
        self.stages.get().byte_add(stage.index * self.stage_bytes)
    }

    fn after(&self, stage: Stage) -> Stage {
        stage.next(self.ring.num_stages())
    }
}

/// Place in the tile of row `g + 8 half` of the products.
fn place_of_row(g: u32, half: u32) -> u32 {
    SEGMENT * (2 * (g % 2) + g / 2 % 2) + 2 * half + g / 4
}

/// The rows of the places `4 segment` and `4 segment + 1`; those of the next two are 8 further.
fn rows_of_segment(segment: u32) -> [u32; 2] {
    let row = 2 * (segment % 2) + segment / 2;
    [row, row + 4]
}

/// What a block attends to: the steps `begin..end` of its row. A step is as many tiles as a stage holds.
struct Split<'a, T> {
    params: &'a AttendParams<T>,
    list: List,
    pages: Pages,
    layout: TileLayout,
    step_tiles: u32,
    num_tiles: u32,
    begin: u32,
    end: u32,
}

impl<'a, T> Split<'a, T> {
    unsafe fn new(params: &'a AttendParams<T>, list: List, head_dim: u32) -> Self {
        let step_tiles = stage_tiles(params.num_kv_heads);
        core::hint::assert_unchecked(step_tiles != 0);
        let num_tiles = list.len.div_ceil(TILE);
        let (steps, blocks) = (num_tiles.div_ceil(step_tiles), thread::grid_dim_x().max(1));
        let begin = |block: u32| steps / blocks * block + block.min(steps % blocks);
        let block = thread::block_idx_x();
        let pages = params.pages(head_dim);
        Split {
            params,
            list,
            pages,
            layout: TileLayout::new(&pages, PAD),
            step_tiles,
            num_tiles,
            begin: begin(block),
            end: begin(block + 1),
        }
    }
}

impl<T> Schedule for Split<'_, T> {
    fn first_token(&self, step: u32, tile: u32) -> Option<u32> {
        let tile = step * self.step_tiles + tile;
        (step < self.end && tile < self.num_tiles).then_some(tile * TILE)
    }

    fn last_token(&self) -> u32 {
        self.list.len - 1
    }

    fn tables(&self) -> &BatchTables {
        &self.params.batch
    }

    fn page_table(&self) -> GlobalPtr<u32> {
        self.params.batch.kv_indices.add(self.list.first_page as u64)
    }
}

/// See the module. `W` words a piece, `C` chunks of keys, `V` chunks of values.
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - [`AttendParams::can_stream`]; `num_splits` is [`AttendParams::stream_splits`].
/// - `head_dim = 8 W C = 16 W V`.
/// - Launched with [`AttendParams::stream_dims`].
pub unsafe fn attend_stream<T: Element, const W: usize, const C: usize, const V: usize>(
    params: AttendParams<T>,
) {
    thread::launch_bounds::<THREADS, 1>();
    if !bulk::AVAILABLE {
        return bulk::publish(); // stops the launch
    }
    core::hint::assert_unchecked(params.num_kv_heads != 0 && params.num_kv_heads <= WARPS);
    let layout = const { &Layout::new((8 * W * C) as u32) };
    let (warp, is_producer) = (warp::warp_id(), warp::warp_id() == WARPS);
    if is_producer && warp::lane_id() == 0 {
        layout.ring.init(stage_tiles(params.num_kv_heads) * params.num_kv_heads);
    }
    // Without lists these are tables alone, which may be read before the wait.
    let list = params.list(thread::block_idx_y());
    let num_rows = params.num_query_rows(&list);
    if num_rows == 0 || list.len == 0 {
        return grid::wait_for_previous();
    }
    if is_producer {
        bulk::publish();
    }
    thread::sync_threads();
    let split = Split::new(&params, list, (8 * W * C) as u32);
    if is_producer {
        produce(&split, layout);
        return;
    }
    let (tile, kv_head) = (warp / params.num_kv_heads, warp % params.num_kv_heads);
    grid::wait_for_previous();
    grid::launch_dependents();
    if tile < split.step_tiles {
        let work = Work::new(&params, list, kv_head, 0, num_rows);
        let (out, softmax) = consume::<T, W, C, V>(&split, &work, layout, tile);
        store(&split, &work, tile, &out, softmax);
    }
}

/// The producer warp: looks up the first pages, waits for the launch before this one, and fills stage after stage.
unsafe fn produce<T: Element>(split: &Split<'_, T>, layout: &Layout) {
    let params = split.params;
    let tile_bytes = params.num_kv_heads * TILE * split.pages.head_dim * 2;
    let mut paged = PagedProducer::new(split, &split.layout, split.step_tiles, split.begin);
    grid::wait_for_previous();
    grid::launch_dependents();
    let mut stage = Stage::FIRST;
    for step in split.begin..split.end {
        let tiles = (split.num_tiles - step * split.step_tiles).min(split.step_tiles);
        for half in 0..2 {
            let from = if half == 0 { params.k_pages } else { params.v_pages };
            layout.ring.acquire(stage, tiles * tile_bytes);
            let (to, arrived) = (layout.rows(stage), layout.ring.arrived(stage));
            paged.copy(from, &split.pages, &split.layout, to, arrived);
            stage = layout.after(stage);
        }
        paged.advance(split, &split.layout);
    }
    // Bytes in flight belong to the consumers, who wait for them.
}

/// A consumer warp: attention of one KV head over one tile of each step.
unsafe fn consume<T: Element, const W: usize, const C: usize, const V: usize>(
    split: &Split<'_, T>,
    work: &Work<'_, T>,
    layout: &Layout,
    tile_of_step: u32,
) -> (Out<W, V>, Running) {
    let queries = load_queries::<T, W, C>(work);
    let (mut out, mut softmax) = ([[Accumulator::ZERO; W]; V], Running::EMPTY);
    let Lane { g, t } = lane();
    let own = tile_of_step * split.layout.tile + work.kv_head * split.layout.head;
    let mut stage = Stage::FIRST;
    // Large heads fill the registers: their keys are multiplied as they are loaded, before the stage is released, and their values loaded a
    // chunk at a time, once more behind the search where there is one.
    let at_once = const { 16 * W * V <= 128 };
    for step in split.begin..split.end {
        let tile = step * split.step_tiles + tile_of_step;
        let exists = tile < split.num_tiles;
        let (mut keys, mut products) = ([[[0; W]; C]; 2], Accumulator::ZERO);
        layout.ring.wait(stage);
        if exists {
            let from = layout.rows(stage).byte_add(own);
            if at_once {
                keys = load_keys(from, &split.layout);
            } else {
                for c in 0..C {
                    let keys = load_keys::<W, 1>(from.byte_add((16 * W * c) as u32), &split.layout);
                    multiply::<T, W, 1>(&mut products, &[queries[c]], &keys);
                }
            }
        }
        layout.ring.release(stage);
        stage = layout.after(stage);
        let mut weights = Accumulator::ZERO;
        if exists {
            if at_once {
                multiply::<T, W, C>(&mut products, &queries, &keys);
            }
            let ranks = [TILE * tile + place_of_row(g, 0), TILE * tile + place_of_row(g, 1)];
            weights = weigh(work, ranks, products, &mut softmax, &mut out);
        }
        layout.ring.wait(stage);
        if exists {
            let from = layout.rows(stage).byte_add(own);
            let left = work.list.len - TILE * tile;
            // Whether some place of the tile is hidden from some query of the block.
            let hides_some = TILE * tile + left.min(TILE) > work.list.first_bound;
            let mut values = [[[0; W]; V]; 4];
            let chunk =
                |v: usize| load_values::<W, 1>(from.byte_add((32 * W * v) as u32), &split.layout, left);
            let mut is_any_not = false;
            if at_once {
                values = load_values(from, &split.layout, left);
                is_any_not = hides_some && any_value_not_finite::<T, W, V>(&values);
            } else if hides_some {
                // In a loop that is not unrolled, since the compiler does not know the count.
                for v in 0..warp::shuffle_xor(warp::FULL, V as u32, 0) {
                    is_any_not |= any_value_not_finite::<T, W, 1>(&chunk(v as usize));
                }
            }
            if is_any_not {
                let row = |place: u32| {
                    let [first, second] = rows_of_segment(place / SEGMENT);
                    (if place.is_multiple_of(2) { first } else { second }) + 8 * (place / 2 % 2)
                };
                let value = |place: u32| {
                    let from = from.byte_add(split.layout.of_token(place)).cast::<u32>().add(W as u32 * g);
                    move |element: u32| from.add(element / 2).load()
                };
                let (places, rank) = (left.min(TILE), |place| TILE * tile + place);
                add_seen::<T, W, V, _>(work, places, weights, row, rank, value, &mut out);
            } else if at_once {
                add_values::<T, W, V>(transpose::<T>(weights, rows_of_segment(t)), &values, &mut out);
            } else {
                let weights = transpose::<T>(weights, rows_of_segment(t));
                for v in 0..V {
                    add_values::<T, W, 1>(weights, &chunk(v), core::array::from_mut(&mut out[v]));
                }
            }
        }
        layout.ring.release(stage);
        stage = layout.after(stage);
    }
    (out, softmax)
}

/// The lane's B fragments of the query rows. Rows that there are not are zero.
unsafe fn load_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) -> [[u32; W]; C] {
    let Lane { g, t } = lane();
    let mut queries = [[0; W]; C];
    if g < work.num_rows() {
        let from = work.params.q_row(&work.list, work.kv_head, g).add((2 * W as u32 * t) as u64);
        for c in 0..C {
            queries[c] = load_row(from.add((8 * W * c) as u64));
        }
    }
    queries
}

/// The lane's pieces of the keys in rows `g` and `g + 8`, from the first of the tile's head on.
unsafe fn load_keys<const W: usize, const C: usize>(
    from: Shared<V4<u32>>,
    layout: &TileLayout,
) -> [Key<W, C>; 2] {
    let Lane { g, t } = lane();
    let mut keys = [[[0; W]; C]; 2];
    for half in 0..2 {
        let place = place_of_row(g, half as u32);
        let from = from.byte_add(layout.of_token(place)).cast::<u32>().add(W as u32 * t);
        for c in 0..C {
            keys[half][c] = load_shared(from.add((4 * W * c) as u32));
        }
    }
    keys
}

/// The lane's pieces of the values at places `4 t ..`; zero beyond the `left` places that there are.
unsafe fn load_values<const W: usize, const V: usize>(
    from: Shared<V4<u32>>,
    layout: &TileLayout,
    left: u32,
) -> Values<W, V> {
    let Lane { g, t } = lane();
    let mut values = [[[0; W]; V]; 4];
    for i in 0..4 {
        let place = SEGMENT * t + i as u32;
        let from = from.byte_add(layout.of_token(place)).cast::<u32>().add(W as u32 * g);
        for v in 0..V {
            values[i][v] = load_shared(from.add((8 * W * v) as u32));
        }
        if place >= left {
            values[i] = [[0; W]; V];
        }
    }
    values
}

/// Adds products of the tile's keys with all query rows.
unsafe fn multiply<T: Element, const W: usize, const C: usize>(
    d: &mut Accumulator,
    queries: &[[u32; W]; C],
    keys: &[Key<W, C>; 2],
) {
    for c in 0..C {
        let (query, upper, lower) = (&queries[c], &keys[0][c], &keys[1][c]);
        for w in (0..W).step_by(2) {
            let a = A([upper[w], lower[w], upper[w + 1], lower[w + 1]]);
            T::mma(d, a, B([query[w], query[w + 1]]));
        }
    }
}

/// Leaves the output of a split and its softmax in the workspace: a split for each tile of a step.
unsafe fn store<T: Element, const W: usize, const V: usize>(
    split: &Split<'_, T>,
    work: &Work<'_, T>,
    tile_of_step: u32,
    out: &Out<W, V>,
    softmax: Running,
) {
    let (params, at) = (work.params, lane());
    let unit = work.list.row * params.num_kv_heads + work.kv_head;
    let splits = Splits { unit, count: params.num_splits };
    let own = thread::block_idx_x() * split.step_tiles + tile_of_step;
    for column in 0..2 {
        let sum = over_rows(softmax.sum[column], |a, b| a + b);
        let row = 2 * at.t + column as u32;
        if row < work.num_rows() {
            if at.g == 0 {
                splits.store_stats(params, own, row, softmax.max[column], sum);
            }
            each_quad(out, column, |dimension, quad| {
                splits.store_quad(params, own, row, split.pages.head_dim, (dimension, quad));
            });
        }
    }
}
