//! *Softmax states*: the largest logit `m` so far and the sum `s` of `exp(logit - m)`, from which a softmax is made in one pass.
//!
//! ```text
//! push x:      if x > m: s *= exp(m - x), m = x;   s += exp(x - m)
//! merge m', s': M = max(m, m');   s = s exp(m - M) + s' exp(m' - M);   m = M
//! lse:         m + log(s)
//! ```
//! Nothing pushed yet is `m = -inf, s = 0`, and counts nothing in a merge.
//!
//! | state | logits | NaN | infinite `m` |
//! |---|---|---|---|
//! | [`VoteSoftmax`], of votes | base e, as they lie in memory | passed over | the limit of a large one: logits equal to it count 1 |
//! | [`Running`], [`Partial`], of attention | base 2, scaled by log2(e) | stays NaN | the same: +inf counts as [`LARGEST`] |

use super::block::strided;
use crate::simt::{math, warp};
use core::f32::consts::{LN_2, LOG2_E};

/// Statistics of a head's logits, for votes.
#[derive(Clone, Copy)]
pub struct VoteSoftmax {
    /// The largest logit that is a number.
    pub max: f32,
    /// Sum of `exp(logit - max)`.
    pub sum: f32,
}

impl VoteSoftmax {
    /// Of no logit.
    pub const EMPTY: VoteSoftmax = VoteSoftmax { max: f32::NEG_INFINITY, sum: 0.0 };

    /// `exp(x - max)` of a maximum, which is a number: 1 where they are equal, infinite or not.
    pub fn ratio(x: f32, max: f32) -> f32 {
        if x == max { 1.0 } else { math::ex2((x - max) * LOG2_E) }
    }

    /// Counts one logit.
    pub fn push(&mut self, logit: f32) {
        if logit > self.max {
            self.sum *= VoteSoftmax::ratio(self.max, logit);
            self.max = logit;
        }
        let term = math::ex2((logit - self.max) * LOG2_E);
        let term = if logit.is_nan() { 0.0 } else { term };
        self.sum += if logit == self.max { 1.0 } else { term };
    }

    /// Takes in others, in order; their sums wait for the largest of their maxima alone, not for each other.
    pub fn merge<const N: usize>(&mut self, others: [VoteSoftmax; N]) {
        let mut max = self.max;
        for i in 0..N {
            max = max.max(others[i].max);
        }
        self.sum *= VoteSoftmax::ratio(self.max, max);
        for i in 0..N {
            self.sum += others[i].sum * VoteSoftmax::ratio(others[i].max, max);
        }
        self.max = max;
    }

    /// Merged with those of the lane at `distance`.
    ///
    /// # Safety
    /// - All lanes of the warp call it.
    #[track_caller]
    pub unsafe fn merge_lane(&mut self, distance: u32) {
        let max = warp::shuffle_xor(warp::FULL, self.max, distance);
        let sum = warp::shuffle_xor(warp::FULL, self.sum, distance);
        self.merge([VoteSoftmax { max, sum }]);
    }
}

/// What a logit of +inf counts as in attention, and so the largest logit of all. Differences of it are numbers: tokens that
/// reach it weigh 1 each, others nothing. (It is no logit that leaves any weight to others, so it stands for +inf alone.)
pub const LARGEST: f32 = f32::MAX;

/// A logit as it counts in attention: [`LARGEST`] for +inf. NaN stays.
pub fn bounded(logit: f32) -> f32 {
    if logit == f32::INFINITY { LARGEST } else { logit }
}

/// `max` as it is subtracted from logits: 0 where there is no number yet, so that -inf stays -inf.
fn subtracted(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Largest logits, base 2, from which on rounding of products with the scale would be seen in weights.
pub const FAR: f32 = (1 << 20) as f32;

/// By how much a logit, base 2, may be larger than what [`Running::raise_lazily`] takes for the largest: weights of up to 256 lose
/// nothing.
pub const SLACK: f32 = 8.0;

/// The softmax of two query rows while attention goes through its tiles: the largest logit of each, the same in all lanes that
/// hold the row, and the lane's own terms of the sum.
#[derive(Clone, Copy)]
pub struct Running {
    /// Largest logits, base 2, [`bounded`].
    pub max: [f32; 2],
    /// The lane's terms.
    pub sum: [f32; 2],
}

impl Running {
    /// Before the first tile.
    pub const EMPTY: Running = Running { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2] };

    /// Raises the largest logit of a row to `max`, that of all lanes, which is [`bounded`]; what was summed up before is to be multiplied by what it
    /// returns.
    pub fn raise(&mut self, row: usize, max: f32) -> f32 {
        let correction = math::ex2(self.max[row] - subtracted(max));
        self.max[row] = max;
        self.sum[row] *= correction;
        correction
    }

    /// [`raise`](Self::raise) where `max` is larger by more than [`SLACK`], or the first number; 1 elsewhere.
    pub fn raise_lazily(&mut self, row: usize, max: f32) -> f32 {
        if max <= self.max[row] + SLACK { 1.0 } else { self.raise(row, max) }
    }

    /// The weight of a product whose logit is `scale` times as large, as [`weigh`](Self::weigh) for a largest logit of less than
    /// [`FAR`]: rounding of that counts alike for all weights.
    pub fn weigh_product(&mut self, row: usize, product: f32, scale: f32) -> f32 {
        let weight = math::ex2(math::fma(product, scale, -subtracted(self.max[row])));
        self.sum[row] += weight;
        weight
    }

    /// The weight of a logit that is no larger than the row's largest, or by [`SLACK`] at most, and counts it.
    pub fn weigh(&mut self, row: usize, logit: f32) -> f32 {
        let weight = math::ex2(logit - subtracted(self.max[row]));
        self.sum[row] += weight;
        weight
    }
}

/// Attention over some places of a list: four elements of an output that is not divided by its sum yet.
#[derive(Clone, Copy)]
pub struct Partial {
    /// Largest logit, base 2, [`bounded`].
    pub max: f32,
    /// Sum of exponentials.
    pub sum: f32,
    /// Sum of values times exponentials.
    pub out: [f32; 4],
}

impl Partial {
    /// Over nothing.
    pub const EMPTY: Partial = Partial { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };

    /// Takes in others, in order; their sums wait for the largest of their maxima alone, not for each other.
    pub fn merge<const N: usize>(&mut self, others: [Partial; N]) {
        let before = *self;
        for i in 0..N {
            self.max = self.max.max(others[i].max);
        }
        (self.sum, self.out) = (0.0, [0.0; 4]);
        self.add(before);
        for i in 0..N {
            self.add(others[i]);
        }
    }

    /// Adds one whose largest logit is at most `max`.
    fn add(&mut self, other: Partial) {
        // One that saw nothing counts nothing, whatever the maximum.
        let factor = if other.sum == 0.0 { 0.0 } else { math::ex2(other.max - subtracted(self.max)) };
        self.sum += factor * other.sum;
        for i in 0..4 {
            self.out[i] += factor * other.out[i];
        }
    }

    /// Those that `load` gives for `first`, `first + step`, … below `end`, merged in order, `N` loads in flight at a time.
    pub fn merged<const N: usize>(first: u32, end: u32, step: u32, load: impl Fn(u32) -> Partial) -> Partial {
        let mut merged = Partial::EMPTY;
        for first in strided(first, end, N as u32 * step) {
            let mut batch = [Partial::EMPTY; N];
            for i in 0..N {
                let at = first + i as u32 * step;
                if at < end {
                    batch[i] = load(at);
                }
            }
            merged.merge(batch);
        }
        merged
    }

    /// Merged with that of the lane at `distance`.
    ///
    /// # Safety
    /// - All lanes of the warp call it.
    #[track_caller]
    pub unsafe fn merge_lane(&mut self, distance: u32) {
        let get = |x: f32| warp::shuffle_xor(warp::FULL, x, distance);
        let [a, b, c, d] = self.out;
        let (max, sum) = (get(self.max), get(self.sum));
        self.merge([Partial { max, sum, out: [get(a), get(b), get(c), get(d)] }]);
    }

    /// The output; 0 over nothing.
    pub fn finish(&self) -> [f32; 4] {
        let inverse = 1.0 / self.sum;
        self.out.map(|x| if self.sum == 0.0 { 0.0 } else { x * inverse })
    }
}

/// Natural log of the sum of exponentials, of a largest logit in base 2, [`bounded`]; -inf over nothing.
pub fn log_sum_exp(max: f32, sum: f32) -> f32 {
    // An infinite logit in place of the bounded one; beside a NaN it is NaN.
    let max = if max == LARGEST { f32::INFINITY } else { max };
    if sum == 0.0 { f32::NEG_INFINITY } else { (max + math::lg2(sum)) * LN_2 }
}
