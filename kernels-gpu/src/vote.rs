//! `vote`: softmax probabilities of each candidate, summed over heads, and how many sums lie in which bin.
//!
//! ```text
//! for each scored row, candidate token j:
//!     vote[j] = sum over heads h of exp(logit[j, h] - max[h]) / sum[h]        NaN and inf: docs/definitions.md
//! ```
//! **Thread mapping.** Logits lie in tiles of 16 tokens. A warp takes two tiles at a time: a lane a token of each, and
//! every other piece of its heads (4 adjacent ones, or 1 where the group is no multiple of 4); the two lanes of a token are
//! added at the end, in the same order for every launch.
//!
//! **Bytes.** `n * num_qo_heads * 4` read, `n * 4` written.
//!
//! **Statistics.** Every block puts those of all heads in shared memory: a step leaves them in chunks, which each block
//! folds for itself, in the order in which [`score`](mod@crate::score) would.
//!
//! The histogram of the votes and the search in it are those of [`radix`].

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix::{self, RadixTables};
use crate::score;
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Query heads at most.
pub const MAX_HEADS: u32 = 512;

/// Parameters of [`vote`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VoteParams {
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::pool::SCORE) vote.
    pub actions: GlobalPtr<u32>,
    /// \[tiles, num_kv_heads, LOGIT_TILE, group\] f32 (see [`LOGIT_TILE`](crate::layout::LOGIT_TILE)), read for candidates.
    pub logits: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads, 2\] f32: largest logit, sum of exponentials. Read, or written if `tile_tokens` is not 0.
    pub stats: GlobalMut<f32>,
    /// Statistics of chunks, as [`ScoreParams::partial`](score::ScoreParams::partial). Read if `tile_tokens` is not 0.
    pub partial: GlobalMut<f32>,
    /// \[max_tokens\] f32, written for candidates.
    pub votes: GlobalMut<f32>,
    /// Workspace; the state is written.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// Places for tokens of all rows: no row has more.
    pub max_tokens: u32,
    /// How far votes are counted: [`NO_COUNTS`](radix::NO_COUNTS), [`COUNTS`](radix::COUNTS) or [`BIN`](radix::BIN).
    pub wanted: u32,
    /// Tokens of a tile of the [`score`](mod@crate::score) that has left its chunks unfolded; 0: `stats` is there.
    pub tile_tokens: u32,
}
const _: () = assert!(size_of::<VoteParams>() == 152);

/// Shared memory of a block, behind that of [`radix`].
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Of each head, largest logit and inverse sum of exponentials.
    heads: Region<V2<f32>>,
    /// Statistics of each thread while the chunks are folded.
    fold: Region<V2<f32>>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::after(radix::LAYOUT.bytes);
    Layout { heads: carve.array(MAX_HEADS, 16), fold: carve.array(score::THREADS, 16), bytes: carve.bytes() }
};
const _: () = assert!(radix::THREADS == score::THREADS);

impl VoteParams {
    /// Shares of the candidates of each row.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::vote;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::layout::{LOGIT_TILE, Tokens};
    use crate::pool::SCORE;
    use crate::radix::Histogram;
    use crate::score::statistics::{Chunks, num_chunks};
    use crate::simt::data::V4;
    use crate::simt::shared::Shared;
    use crate::simt::{grid, math, thread, warp};

    /// Tiles that a warp has under way.
    const TILES: usize = 2;
    /// Pieces of each that a lane has under way.
    const PIECES: usize = 4;

    /// See the module. `V` logits are read at a time.
    ///
    /// # Safety
    /// - The buffers and tables are as [`VoteParams`] says, and 16-byte aligned.
    /// - `V` is 4, and then divides `group`, or 1. There are at most [`MAX_HEADS`] query heads.
    /// - Launched with [`VoteParams::dims`].
    pub unsafe fn vote<const V: usize>(params: VoteParams) {
        let row = thread::block_idx_y();
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let count = if params.tile_tokens == 0 {
            0
        } else {
            num_chunks(candidates, params.tile_tokens, params.num_kv_heads)
        };
        let chunks = Chunks::new(params.partial, row, params.num_kv_heads, params.group, count);
        grid::wait_for_previous();
        grid::launch_dependents();
        let action = params.actions.add(row as u64).load();
        let heads = LAYOUT.heads.get();
        let stats = params.stats.cast::<V2<f32>>().add((row * chunks.num_qo_heads) as u64);
        // Chunks are asked for before the action is known: one trip to memory for both.
        let is_scored = chunks.fold(
            LAYOUT.fold,
            || action == SCORE,
            |head, folded| {
                if params.tile_tokens != 0 {
                    heads.add(head).store(V2([folded.max, 1.0 / folded.sum]));
                    if thread::block_idx_x() == 0 {
                        stats.add(head as u64).store(V2([folded.max, folded.sum]));
                    }
                } else {
                    let [max, sum] = stats.add(head as u64).load().0;
                    heads.add(head).store(V2([max, 1.0 / sum]));
                }
            },
        );
        if !is_scored {
            return;
        }
        let histogram = Histogram::clear(); // where the block meets
        let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
        vote_share::<V>(&params, row, share, heads, histogram);
        histogram.finish(&params.radix, row, params.top_k.min(candidates.len()), params.wanted);
    }

    /// What turns `V` adjacent heads' logits into probabilities.
    #[derive(Clone, Copy)]
    struct Heads<const V: usize> {
        max: [f32; V],
        inverse: [f32; V],
    }

    impl<const V: usize> Heads<V> {
        /// Those of `V` heads from `at` on.
        #[inline(always)]
        unsafe fn load(at: Shared<V2<f32>>) -> Self {
            let mut heads = Heads { max: [0.0; V], inverse: [0.0; V] };
            let mut i = 0;
            while i < V {
                [heads.max[i], heads.inverse[i]] = at.add(i as u32).load().0;
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

    /// A query head: member `member` of the group of KV head `kv`.
    #[derive(Clone, Copy)]
    struct Head {
        kv: u32,
        member: u32,
    }

    impl Head {
        /// Goes on by `count` heads.
        #[inline(always)]
        fn skip(&mut self, count: u32, group: u32) {
            self.member += count;
            while self.member >= group {
                self.member -= group;
                self.kv += 1;
            }
        }
    }

    /// Writes and counts the votes of the block's tokens.
    #[inline(always)]
    unsafe fn vote_share<const V: usize>(
        params: &VoteParams,
        row: u32,
        share: Tokens,
        of_heads: Shared<V2<f32>>,
        histogram: Histogram,
    ) {
        let (slot, half) = (warp::lane_id() % LOGIT_TILE, warp::lane_id() / LOGIT_TILE);
        let base = params.batch.logit_tile(row);
        let votes = params.votes.add(params.batch.token_base(row));
        let end = share.end.div_ceil(LOGIT_TILE);
        let mut tile = share.begin / LOGIT_TILE + warp::warp_id() * TILES as u32;
        while tile < end {
            let mut sums = [0.0; TILES];
            let mut head = Head { kv: 0, member: 0 };
            head.skip(V as u32 * half, params.group);
            while head.kv < params.num_kv_heads {
                let mut logits = [[[0.0; V]; TILES]; PIECES];
                let mut heads = [head; PIECES];
                let mut p = 0;
                while p < PIECES {
                    heads[p] = head;
                    let mut i = 0;
                    while i < TILES {
                        if head.kv < params.num_kv_heads && tile + (i as u32) < end {
                            logits[p][i] = load::<V>(params, base + (tile + i as u32) as u64, slot, head);
                        }
                        i += 1;
                    }
                    head.skip(2 * V as u32, params.group);
                    p += 1;
                }
                let mut p = 0;
                while p < PIECES {
                    if heads[p].kv < params.num_kv_heads {
                        let heads =
                            Heads::<V>::load(of_heads.add(heads[p].kv * params.group + heads[p].member));
                        let mut i = 0;
                        while i < TILES {
                            sums[i] += heads.sum(logits[p][i]);
                            i += 1;
                        }
                    }
                    p += 1;
                }
            }
            let mut i = 0;
            while i < TILES {
                let vote = sums[i] + warp::shuffle_xor(warp::FULL, sums[i], LOGIT_TILE);
                let token = (tile + i as u32) * LOGIT_TILE + slot;
                // The two lanes of a token take turns.
                if token >= share.begin && token < share.end && half == i as u32 % 2 {
                    votes.add(token as u64).store(vote);
                    histogram.count(radix::bin(radix::key(vote)));
                }
                i += 1;
            }
            tile += TILES as u32 * (radix::THREADS / warp::SIZE);
        }
    }

    /// The logits of `V` heads from `head` on, of one token of a tile.
    #[inline(always)]
    unsafe fn load<const V: usize>(params: &VoteParams, tile: u64, slot: u32, head: Head) -> [f32; V] {
        let line = (tile * params.num_kv_heads as u64 + head.kv as u64) * LOGIT_TILE as u64 + slot as u64;
        let at = params.logits.add(line * params.group as u64 + head.member as u64);
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
}
