//! The arithmetic of many queries: a warp's 16 query rows in the rows of products, places in their columns (letters as in
//! [`fragment`](crate::common::fragment)).

use super::list::{List, NOWHERE};
use crate::common::element::Element;
use crate::common::fragment::{A, Accumulator, Lane, lane, over_columns};
use crate::common::softmax::{FAR, LARGEST, Running, bounded, log_sum_exp};
use crate::ops::attend::AttendParams;
use crate::simt::data::{V2, V4};
use crate::simt::shared::Shared;
use crate::simt::tensor::ldmatrix_x4;
use crate::simt::warp;

/// 16 query rows of a KV head, those of one warp.
pub struct QueryRows<'a, T> {
    pub params: &'a AttendParams<T>,
    pub list: List,
    pub kv_head: u32,
    first_row: u32,
    /// Query rows of the KV head, not 0.
    num_rows: u32,
    /// Ranks that the lane's rows `g` and `g + 8` see; or places, of [`in_places`](Self::in_places).
    pub bounds: [u32; 2],
}

/// Ranks that query row `row` of `num_rows` sees; of rows beyond, those of the last. Where ranks are the places, no more than there are.
pub fn bound<T>(params: &AttendParams<T>, list: &List, row: u32, num_rows: u32) -> u32 {
    let bound = list.first_bound + row.min(num_rows - 1) / params.group.max(1);
    if params.ranks.addr() == 0 { bound.min(list.len) } else { bound }
}

impl<'a, T: Element> QueryRows<'a, T> {
    pub fn new(params: &'a AttendParams<T>, list: List, kv_head: u32, first_row: u32, num_rows: u32) -> Self {
        let g = lane().g;
        let bounds = [g, g + 8].map(|row| bound(params, &list, first_row + row, num_rows));
        QueryRows { params, list, kv_head, first_row, num_rows, bounds }
    }

    /// The same with places for bounds.
    ///
    /// # Safety
    /// - The tables are as [`AttendParams`] says.
    pub unsafe fn in_places(self) -> Self {
        let bounds = self.bounds.map(|bound| unsafe { self.params.places_below(&self.list, bound) });
        QueryRows { bounds, ..self }
    }

    /// Ranks that all rows of the warp see.
    pub fn least_bound(&self) -> u32 {
        bound(self.params, &self.list, self.first_row, self.num_rows)
    }

    /// Hides the places that a row does not see, [`in_places`](Self::in_places): `first` is that of the tile's first.
    #[inline(always)]
    pub fn hide_places<const C: usize>(&self, logits: &mut [Accumulator; C], first: u32) {
        // What is compared with it are constants, which need no registers.
        let left = self.bounds.map(|bound| bound.saturating_sub(first + 2 * lane().t));
        for n in 0..C {
            for i in 0..4 {
                let place = (8 * n + Accumulator::column_half(i)) as u32;
                if place >= left[Accumulator::row_half(i)] {
                    logits[n].0[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Hides the places that a row does not see: `ranks(c)` are those of the lane's places in fragment `c`.
    #[inline(always)]
    pub fn hide_ranks<const C: usize>(
        &self,
        logits: &mut [Accumulator; C],
        ranks: impl Fn(usize) -> [u32; 2],
    ) {
        for n in 0..C {
            let ranks = ranks(n);
            for i in 0..4 {
                if ranks[Accumulator::column_half(i)] >= self.bounds[Accumulator::row_half(i)] {
                    logits[n].0[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// What is left to multiply products by, to make them logits: 1 once they are. Where that cannot be left for later, they are
    /// here.
    #[inline(always)]
    pub fn scale_left<const C: usize>(&self, products: &mut [Accumulator; C]) -> f32 {
        let scale = self.params.sm_scale_log2;
        if self.params.soft_cap_log2 == 0.0 && scale > 0.0 {
            return scale;
        }
        self.params.logits(products);
        1.0
    }

    /// Turns products, of which `scale` times are logits, into weights, `exp(logit - max)`, and counts them. Returns what the output so
    /// far is to be [scaled](scale) by.
    ///
    /// *Convergence:* all 32 lanes.
    ///
    /// # Safety
    /// - All lanes of the warp call it; `scale` is from [`scale_left`](Self::scale_left).
    #[inline(always)]
    pub unsafe fn weigh<const C: usize>(
        &self,
        scale: f32,
        weights: &mut [Accumulator; C],
        softmax: &mut Running,
    ) -> [f32; 2] {
        let mut largest = [f32::NEG_INFINITY; 2];
        for n in 0..C {
            for i in 0..4 {
                let row = Accumulator::row_half(i);
                largest[row] = largest[row].max(weights[n].0[i]);
            }
        }
        let max = largest.map(|largest| (over_columns(largest, f32::max) * scale).min(LARGEST));
        let correction = [softmax.raise_lazily(0, max[0]), softmax.raise_lazily(1, max[1])];
        let is_far = |max: f32| max != f32::NEG_INFINITY && max.abs() >= FAR;
        if is_far(softmax.max[0]) || is_far(softmax.max[1]) {
            for n in 0..C {
                for i in 0..4 {
                    let logit = bounded(weights[n].0[i] * scale);
                    weights[n].0[i] = softmax.weigh(Accumulator::row_half(i), logit);
                }
            }
        } else {
            for n in 0..C {
                for i in 0..4 {
                    let row = Accumulator::row_half(i);
                    weights[n].0[i] = softmax.weigh_product(row, weights[n].0[i], scale);
                }
            }
        }
        correction
    }

    /// Divides by the sums and writes the warp's rows: `N` fragments of eight dimensions.
    ///
    /// *Convergence:* all 32 lanes.
    ///
    /// # Safety
    /// - All lanes of the warp call it; `head_dim` is `8 N`.
    #[inline(always)]
    pub unsafe fn write<const N: usize>(&self, out: &[Accumulator; N], softmax: &Running) {
        let (params, Lane { g, t }) = (self.params, lane());
        for half in 0..2 {
            let sum = over_columns(softmax.sum[half], |a, b| a + b);
            let inverse = 1.0 / sum;
            let scaled = |x: f32| if sum == 0.0 { 0.0 } else { x * inverse };
            let odd = t % 2 == 1;
            // Adjacent lanes' pairs make four adjacent elements: even lanes have those of the first of two fragments.
            let mut quads = [[0.0; 4]; N];
            for n in (0..N).step_by(2) {
                let pair = |n: usize| [scaled(out[n].0[2 * half]), scaled(out[n].0[2 * half + 1])];
                let (first, second) = (pair(n), pair(n + 1));
                let give = if odd { first } else { second };
                let [x, y] = give.map(|x| warp::shuffle_xor(warp::FULL, x, 1));
                quads[n] = if odd { [x, y, second[0], second[1]] } else { [first[0], first[1], x, y] };
            }
            let row = self.first_row + g + 8 * half as u32;
            if row < self.num_rows {
                let (at, _) = params.query_row(&self.list, self.kv_head, row);
                // The odd lane's eight columns to the right of the even one's, and two to the left of its own.
                let first = at * (8 * N) as u64 + (2 * t + 6 * (t % 2)) as u64;
                if params.out_is_f32 != 0 {
                    let to = params.out.cast::<f32>().add(first);
                    for n in (0..N).step_by(2) {
                        to.add((8 * n) as u64).cast().store(V4(quads[n]));
                    }
                } else {
                    let to = params.out.add(first);
                    for n in (0..N).step_by(2) {
                        let [a, b, c, d] = quads[n];
                        to.add((8 * n) as u64).cast().store(V2([T::pack(a, b), T::pack(c, d)]));
                    }
                }
                if t == 0 {
                    params.store_lse(at, log_sum_exp(softmax.max[half], sum));
                }
            }
        }
    }
}

/// The A fragments of a warp's 16 query rows in shared memory, the first at `queries`, `pitch` elements from one to the next.
///
/// *Convergence:* aligned; all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it; the rows have `16 K` elements, at multiples of 16 bytes.
#[inline(always)]
pub unsafe fn query_fragments<const K: usize>(queries: Shared<u16>, pitch: u32) -> [A; K] {
    let lane = warp::lane_id();
    let from = queries.add(lane % 16 * pitch + lane / 16 * 8);
    let mut fragments = [A([0; 4]); K];
    for k in 0..K {
        fragments[k] = A(ldmatrix_x4(from.add(16 * k as u32)));
    }
    fragments
}

/// Weights of 16 places, two fragments, as an operand.
#[inline(always)]
pub fn as_operand<T: Element>([first, second]: [Accumulator; 2]) -> A {
    let [first, second] = [first.0, second.0];
    A([
        T::pack(first[0], first[1]),
        T::pack(first[2], first[3]),
        T::pack(second[0], second[1]),
        T::pack(second[2], second[3]),
    ])
}

/// Multiplies both rows of an output by what [`QueryRows::weigh`] says.
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[inline(always)]
pub unsafe fn scale<const N: usize>(out: &mut [Accumulator; N], correction: [f32; 2]) {
    if !warp::any(warp::FULL, correction != [1.0; 2]) {
        return;
    }
    for n in 0..N {
        for i in 0..4 {
            out[n].0[i] *= correction[Accumulator::row_half(i)];
        }
    }
}

impl<T> AttendParams<T> {
    /// The rank of place `place` of a list that is not empty; it may be any number.
    ///
    /// # Safety
    /// - As for [`list`](Self::list).
    #[track_caller]
    pub unsafe fn rank(&self, list: &List, place: u32) -> u32 {
        if place >= list.len {
            return NOWHERE;
        }
        if self.ranks.addr() == 0 {
            return place;
        }
        self.ranks.add(list.row as u64 * self.max_selected as u64 + place as u64).load()
    }

    /// Places whose ranks are below `bound`: the first ones of a list, since ranks ascend.
    ///
    /// # Safety
    /// - As for [`list`](Self::list).
    pub unsafe fn places_below(&self, list: &List, bound: u32) -> u32 {
        if self.ranks.addr() == 0 {
            return list.len.min(bound);
        }
        let (mut below, mut end) = (0, list.len);
        while below < end {
            let middle = below + (end - below) / 2;
            if self.rank(list, middle) < bound {
                below = middle + 1;
            } else {
                end = middle;
            }
        }
        below
    }

    /// Places that some query of a block whose last sees the ranks below `last_bound` may see: where ranks are the places, none beyond.
    pub fn useful_places(&self, list: &List, last_bound: u32) -> u32 {
        if self.ranks.addr() != 0 { list.len } else { last_bound }
    }
}
