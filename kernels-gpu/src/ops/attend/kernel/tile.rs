//! The arithmetic of few queries: tiles of 16 places and 8 query rows of one KV head, by one warp.
//!
//! Everything is transposed, so that the 16 rows of the tensor cores' products are tokens, then dimensions, and query rows, of
//! which there are few, their 8 columns (letters as in [`fragment`](crate::common::fragment)):
//! ```text
//! logits  [16 places, 8 query rows]  =  keys [16 places, D]  ·  queries^T [D, 8]          A: keys,     B: queries
//! out^T   [D, 8 query rows]         +=  values^T [D, 16 places]  ·  weights [16, 8]       A: values,   B: weights
//! ```
//! The head dimension is permuted alike in queries and keys, so that the piece of `W` words that a lane loads from a key *is* its
//! A fragment: chunk `c` of `8 W` dimensions gives lane `t` the dimensions `8 W c + 2 W t ..`. Of values a lane loads the same
//! piece of four tokens, and pairs them by byte permutation: word `w` of chunk `v` holds the dimensions
//! `16 W v + 2 W g + 2 w` and the next.

use super::list::List;
use crate::common::element::{Element, any_not_finite};
use crate::common::fragment::{A, Accumulator, B, lane, over_rows};
use crate::common::softmax::{LARGEST, Running, bounded};
use crate::limits::FRAGMENT_COLUMNS;
use crate::ops::attend::AttendParams;
use crate::simt::warp;

/// The lane's words of a key: `[chunk, word]`.
pub type Key<const W: usize, const C: usize> = [[u32; W]; C];
/// The lane's words of its four values: `[token, chunk, word]`.
pub type Values<const W: usize, const V: usize> = [[[u32; W]; V]; 4];
/// The lane's values of the output: `[chunk, word]`; rows are the word's two dimensions, columns the query rows `2 t`, `2 t + 1`.
pub type Out<const W: usize, const V: usize> = [[Accumulator; W]; V];

/// What a warp works on: up to 8 query rows of a KV head of a row.
pub struct Work<'a, T> {
    pub params: &'a AttendParams<T>,
    pub list: List,
    pub kv_head: u32,
    /// First query row.
    pub first_row: u32,
    /// Query rows from the first on, at least 1. How many of them are the warp's own follows: one value in a register, not two.
    rows_left: u32,
    /// Ranks that the lane's query rows `2 t` and `2 t + 1` see.
    bounds: [u32; 2],
}

impl<'a, T> Work<'a, T> {
    pub fn new(
        params: &'a AttendParams<T>,
        list: List,
        kv_head: u32,
        first_row: u32,
        rows_left: u32,
    ) -> Self {
        let t = lane().t;
        let bound = |i: u32| list.first_bound + (first_row + i.min(rows_left - 1)) / params.group.max(1);
        let bounds = [bound(2 * t), bound(2 * t + 1)];
        Work { params, list, kv_head, first_row, rows_left, bounds }
    }

    /// Query rows that there are, 1 to 8.
    pub fn num_rows(&self) -> u32 {
        self.rows_left.min(FRAGMENT_COLUMNS)
    }
}

/// Turns products into weights, `exp(logit - max)`, with the softmax and the output so far brought up to date. `ranks` are
/// those of the rows `g` and `g + 8`.
pub unsafe fn weigh<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    ranks: [u32; 2],
    products: Accumulator,
    softmax: &mut Running,
    out: &mut Out<W, V>,
) -> Accumulator {
    let mut logits = [products];
    work.params.logits(&mut logits);
    let [Accumulator(mut weights)] = logits;
    let mut largest = softmax.max;
    for i in 0..4 {
        let column = Accumulator::column_half(i);
        let seen = ranks[Accumulator::row_half(i)] < work.bounds[column];
        weights[i] = if seen { weights[i] } else { f32::NEG_INFINITY };
        largest[column] = largest[column].max(weights[i]);
    }
    let max = largest.map(|largest| over_rows(largest, f32::max).min(LARGEST));
    if max[0].max(max[1]) == LARGEST {
        weights = weights.map(bounded);
    }
    for column in 0..2 {
        let correction = softmax.raise(column, max[column]);
        for v in 0..V {
            for w in 0..W {
                out[v][w].0[column] *= correction;
                out[v][w].0[column + 2] *= correction;
            }
        }
    }
    for i in 0..4 {
        weights[i] = softmax.weigh(Accumulator::column_half(i), weights[i]);
    }
    Accumulator(weights)
}

/// Weights as a B fragment: from lanes with a place and two query rows to lanes with a query row and two places. Word `i` takes
/// the rows `8 i + rows[0]` and `8 i + rows[1]`.
pub unsafe fn transpose<T: Element>(Accumulator(weights): Accumulator, rows: [u32; 2]) -> B {
    let g = lane().g;
    let mut words = [0; 2];
    for i in 0..2 {
        let pair = T::pack(weights[2 * i], weights[2 * i + 1]);
        let upper = warp::shuffle_idx(warp::FULL, pair, 4 * rows[0] + g / 2);
        let lower = warp::shuffle_idx(warp::FULL, pair, 4 * rows[1] + g / 2);
        words[i] = if g.is_multiple_of(2) { low_halves(upper, lower) } else { high_halves(upper, lower) };
    }
    B(words)
}

fn low_halves(a: u32, b: u32) -> u32 {
    a & 0xffff | b << 16
}

fn high_halves(a: u32, b: u32) -> u32 {
    a >> 16 | b & 0xffff_0000
}

/// `out += values^T * weights`.
pub unsafe fn add_values<T: Element, const W: usize, const V: usize>(
    weights: B,
    values: &Values<W, V>,
    out: &mut Out<W, V>,
) {
    for v in 0..V {
        for w in 0..W {
            let [first, second] = [[values[0][v][w], values[1][v][w]], [values[2][v][w], values[3][v][w]]];
            let a = A([
                low_halves(first[0], first[1]),
                high_halves(first[0], first[1]),
                low_halves(second[0], second[1]),
                high_halves(second[0], second[1]),
            ]);
            T::mma(&mut out[v][w], a, weights);
        }
    }
}

/// Whether a value of the tile is infinite or NaN; the same in all lanes.
pub unsafe fn any_value_not_finite<T: Element, const W: usize, const V: usize>(
    values: &Values<W, V>,
) -> bool {
    let mut found = false;
    for i in 0..4 {
        for v in 0..V {
            for w in 0..W {
                found |= any_not_finite::<T>(values[i][v][w]);
            }
        }
    }
    warp::any(warp::FULL, found)
}

/// `out += values^T * weights` of the first `places` places, one at a time, so that a value a query does not see, infinite or
/// NaN, is not multiplied by its weight of 0 either. For the rare tile that has such a value among the block's own tokens.
///
/// Of place `p`, `row(p)` is the row in `weights` and `rank(p)` the rank; `value(p)` loads two elements of the value, counted from
/// the lane's first, `2 W g`.
pub unsafe fn add_seen<T: Element, const W: usize, const V: usize, F: Fn(u32) -> u32>(
    work: &Work<'_, T>,
    places: u32,
    Accumulator(weights): Accumulator,
    row: impl Fn(u32) -> u32,
    rank: impl Fn(u32) -> u32,
    value: impl Fn(u32) -> F,
    out: &mut Out<W, V>,
) {
    let t = lane().t;
    // A count that is not constant keeps the loop from being unrolled.
    for place in 0..places {
        let (row, rank) = (row(place), rank(place));
        let own = if row < 8 { [weights[0], weights[1]] } else { [weights[2], weights[3]] };
        let from = 4 * (row % 8) + t;
        let weights =
            [warp::shuffle_idx(warp::FULL, own[0], from), warp::shuffle_idx(warp::FULL, own[1], from)];
        let pair = value(place);
        for v in 0..V {
            for w in 0..W {
                let [x, y] = T::unpack(pair((16 * W * v + 2 * w) as u32));
                for column in 0..2 {
                    if rank < work.bounds[column] {
                        out[v][w].0[column] += weights[column] * x;
                        out[v][w].0[column + 2] += weights[column] * y;
                    }
                }
            }
        }
    }
}

/// Calls `f` with each four adjacent dimensions that the lane holds of query row `2 t + column`: the first of them, and the values.
pub fn each_quad<const W: usize, const V: usize>(
    out: &Out<W, V>,
    column: usize,
    mut f: impl FnMut(u32, [f32; 4]),
) {
    let first = 2 * W as u32 * lane().g;
    for v in 0..V {
        for w in (0..W).step_by(2) {
            let (low, high) = (out[v][w].0, out[v][w + 1].0);
            let quad = [low[column], low[column + 2], high[column], high[column + 2]];
            f((16 * W * v + 2 * w) as u32 + first, quad);
        }
    }
}
