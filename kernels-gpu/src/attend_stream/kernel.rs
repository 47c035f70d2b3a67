//! The kernel: a producer warp, and the consumers' way through their tiles.

use super::*;
use crate::attend_decode::kernel::{
    Key, Out, Softmax, Values, Work, add_seen, add_values, any_value_not_finite, fold, load_shared_words,
    load_words, transpose,
};
use crate::attention::List;
use crate::element::Element;
use crate::simt::bulk::{self, MBarrier};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{grid, thread, warp};
use crate::stream::Place;

/// The halves of a stage.
const KEYS: u32 = 0;
const VALUES: u32 = 1;

impl Layout {
    #[inline(always)]
    fn full(&self, place: Place, half: u32) -> MBarrier {
        MBarrier::at(self.full.get().add(2 * place.stage + half))
    }

    #[inline(always)]
    fn empty(&self, place: Place, half: u32) -> MBarrier {
        MBarrier::at(self.empty.get().add(2 * place.stage + half))
    }

    /// Keys or values of a stage, from the tile of stream 0 on.
    #[inline(always)]
    fn rows(&self, place: Place, half: u32) -> Shared<V4<u32>> {
        self.stages.get().byte_add((2 * place.stage + half) * self.slot_bytes)
    }
}

impl Places {
    /// Offset of a token of the tile.
    #[inline(always)]
    fn token(&self, token: u32) -> u32 {
        token / PART * self.part + token % PART * self.token
    }
}

/// Place in the tile of row `g + 8 half` of the `mma`.
#[inline(always)]
fn place_of_row(g: u32, half: u32) -> u32 {
    PART * (2 * (g % 2) + g / 2 % 2) + 2 * half + g / 4
}

/// The rows of the places `4 part` and `4 part + 1`; those of the next two are 8 further.
#[inline(always)]
fn rows_of_part(part: u32) -> [u32; 2] {
    let row = 2 * (part % 2) + part / 2;
    [row, row + 4]
}

/// The stages of a block, `begin..end` of those of its row.
struct Share<'a, T> {
    params: &'a AttendParams<T>,
    list: List,
    head_dim: u32,
    places: Places,
    num_streams: u32,
    num_tiles: u32,
    begin: u32,
    end: u32,
}

impl<'a, T> Share<'a, T> {
    #[inline(always)]
    unsafe fn new(params: &'a AttendParams<T>, list: List, head_dim: u32) -> Self {
        let num_streams = streams(params.num_kv_heads);
        core::hint::assert_unchecked(num_streams != 0);
        let num_tiles = list.len.div_ceil(TILE);
        let (stages, blocks) = (num_tiles.div_ceil(num_streams), thread::grid_dim_x().max(1));
        let begin = |block: u32| stages / blocks * block + block.min(stages % blocks);
        let block = thread::block_idx_x();
        Share {
            params,
            list,
            head_dim,
            places: Places::new(&params.pages(head_dim)),
            num_streams,
            num_tiles,
            begin: begin(block),
            end: begin(block + 1),
        }
    }
}

/// See the module. `W` words a piece, `C` chunks of keys, `V` chunks of values.
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers lie in the pool.
/// - [`AttendParams::can_stream`]; `num_shares` is [`AttendParams::stream_shares`].
/// - `head_dim = 8 W C = 16 W V`.
/// - Launched with [`AttendParams::stream_dims`].
#[inline(always)]
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
        make_barriers(layout, streams(params.num_kv_heads) * params.num_kv_heads);
    }
    // Without lists these are tables alone, which need not be waited for.
    let list = params.list(thread::block_idx_y());
    let num_rows = params.num_query_rows(&list).min(QUERY_ROWS);
    if num_rows == 0 || list.len == 0 {
        return grid::wait_for_previous();
    }
    if is_producer {
        bulk::publish();
    }
    thread::sync_threads();
    let share = Share::new(&params, list, (8 * W * C) as u32);
    let (stream, kv_head) = (warp / params.num_kv_heads, warp % params.num_kv_heads);
    if is_producer {
        produce(&share, layout);
        return;
    }
    grid::wait_for_previous();
    grid::launch_dependents();
    if stream < share.num_streams {
        let work = Work::new(&params, list, kv_head, 0, num_rows);
        let (out, softmax) = consume::<T, W, C, V>(&share, &work, layout, stream);
        store::<T, W, V>(&share, &work, stream, &out, softmax);
    }
}

/// Makes the barriers: half a stage is filled by one warp and emptied by `consumers`.
#[inline(always)]
unsafe fn make_barriers(layout: &Layout, consumers: u32) {
    let mut i = 0;
    while i < 2 * layout.num_stages {
        MBarrier::at(layout.full.get().add(i)).init(1);
        MBarrier::at(layout.empty.get().add(i)).init(consumers);
        i += 1;
    }
}

/// What one lane of the producer copies: one copy's tokens of the stages that are its turn.
struct Piece {
    /// The lane's stages are those with this number in each batch.
    turn: u32,
    stream: u32,
    /// First token of the piece in its tile.
    token: u32,
}

/// The producer warp: looks up the first pages, waits for the launch before this one, and fills stage after stage.
#[inline(always)]
unsafe fn produce<T: Element>(share: &Share<'_, T>, layout: &Layout) {
    let (params, places) = (share.params, &share.places);
    core::hint::assert_unchecked(places.copy_tokens != 0 && places.copy_tokens <= TILE);
    let pieces_of_tile = TILE / places.copy_tokens;
    let pieces = share.num_streams * pieces_of_tile;
    core::hint::assert_unchecked(pieces != 0);
    // Stages for which the lanes look up pages together.
    let batch = warp::SIZE / pieces;
    let lane = warp::lane_id();
    let piece = Piece {
        turn: lane / pieces,
        stream: lane % pieces / pieces_of_tile,
        token: lane % pieces_of_tile * places.copy_tokens,
    };
    let tile_bytes = params.num_kv_heads * TILE * share.head_dim * 2;
    // The lane's own stage in this batch, and the pages of that and the next.
    let mut own = share.begin + piece.turn;
    let mut at = look_up(share, own, &piece);
    let mut next_at = look_up(share, own + batch, &piece);
    grid::wait_for_previous();
    grid::launch_dependents();
    let mut place = Place::FIRST;
    let mut turn = 0;
    let mut stage = share.begin;
    while stage < share.end {
        let tiles = (share.num_tiles - stage * share.num_streams).min(share.num_streams);
        let copies = turn == piece.turn && piece.stream < tiles;
        let mut half = KEYS;
        while half <= VALUES {
            layout.empty(place, half).wait(place.parity ^ 1);
            // A lane with nothing to copy must not fall behind: two phases later the parity is the same again.
            warp::sync_warp(warp::FULL);
            if lane == 0 {
                layout.full(place, half).arrive_expecting(tiles * tile_bytes);
            }
            if copies {
                let from = if half == KEYS { params.k_pages } else { params.v_pages };
                copy_piece(share, layout, &piece, from.add(at), place, half);
            }
            half += 1;
        }
        turn += 1;
        if turn == batch {
            turn = 0;
            own += batch;
            at = next_at;
            next_at = look_up(share, own + batch, &piece);
        }
        stage += 1;
        place = place.next(layout.num_stages);
    }
    // Bytes still on their way belong to the consumers, who wait for them.
}

/// Offset of a lane's piece of a stage in keys and values. Pieces beyond the list become the last with one of its tokens.
#[inline(always)]
unsafe fn look_up<T: Element>(share: &Share<'_, T>, stage: u32, piece: &Piece) -> u64 {
    let tile = stage * share.num_streams + piece.stream;
    if stage >= share.end || tile >= share.num_tiles {
        return 0;
    }
    let token = (tile * TILE + piece.token).min(share.list.len - 1);
    let (page, within) = share.params.page(&share.list, token);
    // The last token may lie within a piece.
    share.params.k_stride.offset(page, within & !(share.places.copy_tokens - 1), 0)
}

/// Starts the copies of a lane's piece: one if the heads are adjacent, else one a head.
#[inline(always)]
unsafe fn copy_piece<T: Element>(
    share: &Share<'_, T>,
    layout: &Layout,
    piece: &Piece,
    from: GlobalPtr<T>,
    place: Place,
    half: u32,
) {
    let (places, heads) = (&share.places, share.params.num_kv_heads);
    let to = layout.rows(place, half).byte_add(piece.stream * places.tile + places.token(piece.token));
    let (from, full) = (from.cast::<V4<u32>>(), layout.full(place, half));
    let bytes = places.copy_tokens * share.head_dim * 2;
    if places.heads_are_adjacent {
        bulk::copy_to_shared(to, from, bytes * heads, full);
        return;
    }
    let mut head = 0;
    while head < heads {
        let from = from.add(head as u64 * (share.params.k_stride.head / 8));
        bulk::copy_to_shared(to.byte_add(head * places.head), from, bytes, full);
        head += 1;
    }
}

/// A consumer warp: attention of one KV head over the tiles of one stream.
#[inline(always)]
unsafe fn consume<T: Element, const W: usize, const C: usize, const V: usize>(
    share: &Share<'_, T>,
    work: &Work<'_, T>,
    layout: &Layout,
    stream: u32,
) -> (Out<W, V>, Softmax) {
    let queries = load_queries::<T, W, C>(work);
    let (mut out, mut softmax) = ([[[0.0; 4]; W]; V], Softmax::EMPTY);
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let own = stream * share.places.tile + work.kv_head * share.places.head;
    let rows = rows_of_part(t);
    let mut place = Place::FIRST;
    let mut stage = share.begin;
    while stage < share.end {
        let tile = stage * share.num_streams + stream;
        let exists = tile < share.num_tiles;
        let mut keys = [[[0; W]; C]; 2];
        layout.full(place, KEYS).wait(place.parity);
        if exists {
            keys = load_keys(layout.rows(place, KEYS).byte_add(own), &share.places);
        }
        release(layout.empty(place, KEYS));
        let mut weights = [0.0; 4];
        if exists {
            let products = multiply::<T, W, C>(&queries, &keys);
            let ranks = [TILE * tile + place_of_row(g, 0), TILE * tile + place_of_row(g, 1)];
            weights = fold(work, ranks, products, &mut softmax, &mut out);
        }
        layout.full(place, VALUES).wait(place.parity);
        if exists {
            let from = layout.rows(place, VALUES).byte_add(own);
            let left = work.list.len - TILE * tile;
            let values = load_values::<W, V>(from, &share.places, left);
            // Whether some place of the tile is hidden from some query of the block.
            let hides_some = TILE * tile + left.min(TILE) > work.list.first_bound;
            if hides_some && any_value_not_finite::<T, W, V>(&values) {
                accumulate_seen::<T, W, V>(work, &share.places, from, tile, weights, &mut out);
            } else {
                let b = [
                    transpose::<T>(weights[0], weights[1], rows),
                    transpose::<T>(weights[2], weights[3], rows),
                ];
                add_values::<T, W, V>(b, &values, &mut out);
            }
        }
        release(layout.empty(place, VALUES));
        stage += 1;
        place = place.next(layout.num_stages);
    }
    (out, softmax)
}

/// Says that the warp has read its part of half a stage.
#[inline(always)]
unsafe fn release(empty: MBarrier) {
    warp::sync_warp(warp::FULL);
    if warp::lane_id() == 0 {
        empty.arrive();
    }
}

/// The lane's B fragments of the query rows. Rows that there are not are zero.
#[inline(always)]
unsafe fn load_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) -> [[u32; W]; C] {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut queries = [[0; W]; C];
    if g < work.num_rows {
        let (at, _) = work.params.query_row(&work.list, work.kv_head, g);
        let from = work.params.q.add(at * (8 * W * C) as u64 + (2 * W as u32 * t) as u64);
        let mut c = 0;
        while c < C {
            queries[c] = load_words(from.add((8 * W * c) as u64));
            c += 1;
        }
    }
    queries
}

/// The lane's pieces of the keys in rows `g` and `g + 8`, from the first of the tile's head on.
#[inline(always)]
unsafe fn load_keys<const W: usize, const C: usize>(
    from: Shared<V4<u32>>,
    places: &Places,
) -> [Key<W, C>; 2] {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut keys = [[[0; W]; C]; 2];
    let mut half = 0;
    while half < 2 {
        let place = place_of_row(g, half as u32);
        let from = from.byte_add(places.token(place)).cast::<u32>().add(W as u32 * t);
        let mut c = 0;
        while c < C {
            keys[half][c] = load_shared_words(from.add((4 * W * c) as u32));
            c += 1;
        }
        half += 1;
    }
    keys
}

/// The lane's pieces of the values at places `4 t ..`; zero beyond the `left` places that there are.
#[inline(always)]
unsafe fn load_values<const W: usize, const V: usize>(
    from: Shared<V4<u32>>,
    places: &Places,
    left: u32,
) -> Values<W, V> {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut values = [[[0; W]; V]; 4];
    let mut i = 0;
    while i < 4 {
        let place = PART * t + i as u32;
        let from = from.byte_add(places.token(place)).cast::<u32>().add(W as u32 * g);
        let mut v = 0;
        while v < V {
            values[i][v] = load_shared_words(from.add((8 * W * v) as u32));
            v += 1;
        }
        if place >= left {
            values[i] = [[0; W]; V];
        }
        i += 1;
    }
    values
}

/// Products of the tile's keys with all query rows.
#[inline(always)]
unsafe fn multiply<T: Element, const W: usize, const C: usize>(
    queries: &[[u32; W]; C],
    keys: &[Key<W, C>; 2],
) -> [f32; 4] {
    let mut d = [0.0; 4];
    let mut c = 0;
    while c < C {
        let (query, upper, lower) = (&queries[c], &keys[0][c], &keys[1][c]);
        let mut w = 0;
        while w < W {
            T::mma(&mut d, [upper[w], lower[w], upper[w + 1], lower[w + 1]], [query[w], query[w + 1]]);
            w += 2;
        }
        c += 1;
    }
    d
}

/// `out += values^T * weights` one place at a time, so that a value a query does not see is not multiplied by its weight
/// of 0 either.
#[inline(always)]
unsafe fn accumulate_seen<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    places: &Places,
    from: Shared<V4<u32>>,
    tile: u32,
    weights: [f32; 4],
    out: &mut Out<W, V>,
) {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    // A count that is not constant keeps the loop from being unrolled.
    let left = (work.list.len - TILE * tile).min(TILE);
    let mut place = 0;
    while place < left {
        let [first, second] = rows_of_part(place / PART);
        let lane = 4 * (if place % 2 == 0 { first } else { second }) + t;
        let own = if place / 2 % 2 == 0 { [weights[0], weights[1]] } else { [weights[2], weights[3]] };
        let weights =
            [warp::shuffle_idx(warp::FULL, own[0], lane), warp::shuffle_idx(warp::FULL, own[1], lane)];
        let value = from.byte_add(places.token(place)).cast::<u32>().add(W as u32 * g);
        let pair = |element: u32| value.add(element / 2).load();
        add_seen::<T, W, V>(work, TILE * tile + place, weights, pair, out);
        place += 1;
    }
}

/// Writes the output of a share and its softmax to the workspace.
#[inline(always)]
unsafe fn store<T: Element, const W: usize, const V: usize>(
    share: &Share<'_, T>,
    work: &Work<'_, T>,
    stream: u32,
    out: &Out<W, V>,
    softmax: Softmax,
) {
    let (params, head_dim) = (work.params, share.head_dim);
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let unit = work.list.row * params.num_kv_heads + work.kv_head;
    let of_row = thread::block_idx_x() * share.num_streams + stream;
    let part = (unit as u64 * params.num_shares as u64 + of_row as u64) * QUERY_ROWS as u64;
    let mut row = 0;
    while row < 2 {
        let sum = softmax.sum[row] + warp::shuffle_xor(warp::FULL, softmax.sum[row], 4);
        let sum = sum + warp::shuffle_xor(warp::FULL, sum, 8);
        let sum = sum + warp::shuffle_xor(warp::FULL, sum, 16);
        let query_row = 2 * t + row as u32;
        if query_row < work.num_rows {
            let at = part + query_row as u64;
            if g == 0 {
                params.partial_stats.add(at).store(V2([softmax.max[row], sum]));
            }
            let to = params.partial.add(at * head_dim as u64 + (2 * W as u32 * g) as u64);
            let mut v = 0;
            while v < V {
                let to = to.add((16 * W * v) as u64).cast::<V4<f32>>();
                let mut w = 0;
                while w < W {
                    let (low, high) = (out[v][w], out[v][w + 1]);
                    to.add(w as u64 / 2).store(V4([low[row], low[row + 2], high[row], high[row + 2]]));
                    w += 2;
                }
                v += 1;
            }
        }
        row += 1;
    }
}
