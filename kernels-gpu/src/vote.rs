//! `vote`: softmax probabilities of each candidate, summed over heads, and how often their first digits occur.
//!
//! ```text
//! for each scored row, candidate token j:
//!     vote[j] = sum over heads h of exp(logit[j, h] - max[h]) / sum[h]        NaN and inf: docs/definitions.md
//! ```
//! **Thread mapping.** The logits of a token are adjacent. As many lanes as they have 16-byte pieces (4-byte, where the
//! number of heads is no multiple of 4), rounded up to a power of two, share a token, so that a warp reads whole lines;
//! the lanes' sums are added by a butterfly, in the same order for every launch. A lane has four tokens under way.
//!
//! **Bytes.** `n * num_qo_heads * 4` read, `n * 4` written.
//!
//! The histogram is that of the first pass of the [radix select](crate::radix); [`top_k`](mod@crate::top_k) can begin with
//! its second.

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix::{self, RadixTables};
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`vote`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VoteParams {
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::pool::SCORE) vote.
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens, num_qo_heads\] f32, read for candidates.
    pub logits: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads, 2\] f32, read: largest logit, sum of exponentials.
    pub stats: GlobalPtr<f32>,
    /// \[max_tokens\] f32, written for candidates.
    pub votes: GlobalMut<f32>,
    /// Workspace; the state is that after the first digit.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// Query heads.
    pub num_qo_heads: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// Places for tokens of all rows: no row has more.
    pub max_tokens: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<VoteParams>() == 136);

impl VoteParams {
    /// Shares of the candidates of each row.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: radix::LAYOUT.bytes,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::vote;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::layout::Tokens;
    use crate::pool::SCORE;
    use crate::radix::Histogram;
    use crate::simt::data::V4;
    use crate::simt::{grid, math, thread, warp};

    /// Tokens that a lane has under way.
    const TOKENS: usize = 4;

    /// See the module. `V` logits are read at a time.
    ///
    /// # Safety
    /// - The buffers and tables are as [`VoteParams`] says, and 16-byte aligned.
    /// - `V` is 4, and then divides `num_qo_heads`, or 1.
    /// - Launched with [`VoteParams::dims`].
    pub unsafe fn vote<const V: usize>(params: VoteParams) {
        grid::wait_for_previous();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        let histogram = Histogram::clear();
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
        vote_share::<V>(&params, row, share, histogram);
        histogram.finish(&params.radix, row, 0, params.top_k.min(candidates.len()));
    }

    /// What turns `V` adjacent heads' logits into probabilities.
    #[derive(Clone, Copy)]
    struct Heads<const V: usize> {
        max: [f32; V],
        inverse: [f32; V],
    }

    impl<const V: usize> Heads<V> {
        /// Those of piece `piece` of a row's heads.
        #[inline(always)]
        unsafe fn load(params: &VoteParams, row: u32, piece: u32) -> Self {
            let at =
                params.stats.add((row as u64 * params.num_qo_heads as u64 + (piece * V as u32) as u64) * 2);
            let mut heads = Heads { max: [0.0; V], inverse: [0.0; V] };
            let mut i = 0;
            while i < V {
                heads.max[i] = at.add(2 * i as u64).load_cached();
                heads.inverse[i] = 1.0 / at.add(2 * i as u64 + 1).load_cached();
                i += 1;
            }
            heads
        }

        /// The sum of the heads' probabilities.
        #[inline(always)]
        fn sum(&self, logits: [f32; V]) -> f32 {
            let mut sum = 0.0;
            let mut i = 0;
            while i < V {
                let e = math::ex2((logits[i] - self.max[i]) * core::f32::consts::LOG2_E);
                // Not the difference of two infinities.
                sum += if logits[i] == self.max[i] { self.inverse[i] } else { e * self.inverse[i] };
                i += 1;
            }
            sum
        }
    }

    /// Writes and counts the votes of the block's tokens.
    #[inline(always)]
    unsafe fn vote_share<const V: usize>(params: &VoteParams, row: u32, share: Tokens, histogram: Histogram) {
        let pieces = params.num_qo_heads / V as u32;
        let lanes = pieces.next_power_of_two().min(warp::SIZE);
        let (piece, group, groups) =
            (warp::lane_id() & (lanes - 1), warp::lane_id() / lanes, warp::SIZE / lanes);
        let base = params.batch.token_base(row);
        let first = if piece < pieces {
            Heads::<V>::load(params, row, piece)
        } else {
            Heads { max: [0.0; V], inverse: [0.0; V] }
        };
        let tokens_of_warp = TOKENS as u32 * groups;
        let mut begin = share.begin + warp::warp_id() * tokens_of_warp;
        while begin < share.end {
            let token = begin + group;
            let mut sums = [0.0; TOKENS];
            let mut logits = [[0.0; V]; TOKENS];
            let mut i = 0;
            while i < TOKENS {
                let token = token + i as u32 * groups;
                if token < share.end && piece < pieces {
                    logits[i] = load::<V>(params, base + token as u64, piece);
                }
                i += 1;
            }
            let mut i = 0;
            while i < TOKENS {
                sums[i] = if piece < pieces { first.sum(logits[i]) } else { 0.0 };
                i += 1;
            }
            let mut more = piece + lanes;
            while more < pieces {
                let heads = Heads::<V>::load(params, row, more);
                let mut i = 0;
                while i < TOKENS {
                    let token = token + i as u32 * groups;
                    if token < share.end {
                        sums[i] += heads.sum(load::<V>(params, base + token as u64, more));
                    }
                    i += 1;
                }
                more += lanes;
            }
            let mut i = 0;
            while i < TOKENS {
                let vote = sum_over(sums[i], lanes);
                let token = token + i as u32 * groups;
                // The lanes of a token take turns.
                if token < share.end && piece == i as u32 & (lanes - 1) {
                    params.votes.add(base + token as u64).store(vote);
                    histogram.count(radix::key(vote), 0);
                }
                i += 1;
            }
            begin += tokens_of_warp * (radix::THREADS / warp::SIZE);
        }
    }

    /// Piece `piece` of the logits of the token at `place`.
    #[inline(always)]
    unsafe fn load<const V: usize>(params: &VoteParams, place: u64, piece: u32) -> [f32; V] {
        let at = params.logits.add(place * params.num_qo_heads as u64 + (piece * V as u32) as u64);
        let mut logits = [0.0; V];
        if V == 4 {
            let quad = at.cast::<V4<f32>>().load_stream().0;
            let mut i = 0;
            while i < V {
                logits[i] = quad[i];
                i += 1;
            }
        } else {
            logits[0] = at.load_stream();
        }
        logits
    }

    /// The sum over groups of `lanes` lanes, the same bits in each of them.
    #[inline(always)]
    unsafe fn sum_over(value: f32, lanes: u32) -> f32 {
        let mut sum = value;
        let mut distance = 1;
        while distance < lanes {
            sum += warp::shuffle_xor(warp::FULL, sum, distance);
            distance *= 2;
        }
        sum
    }
}
