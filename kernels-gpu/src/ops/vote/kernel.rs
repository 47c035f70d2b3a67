//! The kernel: statistics of the heads, then the votes of the block's share.

use super::params::*;
use crate::common::block::strided;
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::common::radix::{self, Histogram};
use crate::ops::pool::SCORE;
use crate::ops::score::kernel::chunks::{Chunks, num_chunks};
use crate::simt::data::{V2, V4};
use crate::simt::shared::Shared;
use crate::simt::{grid, math, thread, warp};

/// Tiles that a warp has in flight.
const TILES: usize = 2;
/// Pieces of each that a lane has in flight.
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
    let count = if params.overlap.chunk_tile() == 0 {
        0
    } else {
        num_chunks(candidates, params.overlap.chunk_tile(), params.num_kv_heads)
    };
    let chunks = Chunks::new(params.partial, row, params.num_kv_heads, params.group, count);
    grid::wait_for_previous();
    grid::launch_dependents();
    let action = params.actions.add(row as u64).load();
    let heads = LAYOUT.heads.get();
    let stats = params.stats.cast::<V2<f32>>().add((row * chunks.num_qo_heads) as u64);
    // The chunks are loaded before the action is known: one trip to memory for both.
    let is_scored = chunks.fold(
        LAYOUT.fold,
        || action == SCORE,
        |head, folded| {
            if params.overlap.chunk_tile() != 0 {
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
    unsafe fn load(at: Shared<V2<f32>>) -> Self {
        let mut heads = Heads { max: [0.0; V], inverse: [0.0; V] };
        for i in 0..V {
            [heads.max[i], heads.inverse[i]] = at.add(i as u32).load().0;
        }
        heads
    }

    /// The sum of the heads' probabilities.
    fn sum(&self, logits: [f32; V]) -> f32 {
        let mut sum = 0.0;
        for i in 0..V {
            let e = math::ex2((logits[i] - self.max[i]) * core::f32::consts::LOG2_E);
            // Not the difference of two infinities.
            sum += if logits[i] == self.max[i] { self.inverse[i] } else { e * self.inverse[i] };
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
    fn skip(&mut self, count: u32, group: u32) {
        self.member += count;
        while self.member >= group {
            self.member -= group;
            self.kv += 1;
        }
    }
}

/// Writes and counts the votes of the block's tokens.
unsafe fn vote_share<const V: usize>(
    params: &VoteParams,
    row: u32,
    share: Tokens,
    of_heads: Shared<V2<f32>>,
    histogram: Histogram,
) {
    let (within, half) = (warp::lane_id() % LOGIT_TILE, warp::lane_id() / LOGIT_TILE);
    let base = params.batch.logit_tile(row);
    let votes = params.votes.add(params.batch.token_base(row));
    let end = share.end.div_ceil(LOGIT_TILE);
    for tile in strided(
        share.begin / LOGIT_TILE + warp::warp_id() * TILES as u32,
        end,
        TILES as u32 * (radix::THREADS / warp::SIZE),
    ) {
        let mut sums = [0.0; TILES];
        let mut head = Head { kv: 0, member: 0 };
        head.skip(V as u32 * half, params.group);
        while head.kv < params.num_kv_heads {
            let mut logits = [[[0.0; V]; TILES]; PIECES];
            let mut heads = [head; PIECES];
            for p in 0..PIECES {
                heads[p] = head;
                for i in 0..TILES {
                    if head.kv < params.num_kv_heads && tile + (i as u32) < end {
                        logits[p][i] = load::<V>(params, base + (tile + i as u32) as u64, within, head);
                    }
                }
                head.skip(2 * V as u32, params.group);
            }
            for p in 0..PIECES {
                if heads[p].kv < params.num_kv_heads {
                    let heads = Heads::<V>::load(of_heads.add(heads[p].kv * params.group + heads[p].member));
                    for i in 0..TILES {
                        sums[i] += heads.sum(logits[p][i]);
                    }
                }
            }
        }
        for i in 0..TILES {
            let vote = sums[i] + warp::shuffle_xor(warp::FULL, sums[i], LOGIT_TILE);
            let token = (tile + i as u32) * LOGIT_TILE + within;
            // The two lanes of a token take turns.
            if token >= share.begin && token < share.end && half == i as u32 % 2 {
                votes.add(token as u64).store(vote);
                histogram.count(radix::bin(radix::key(vote)));
            }
        }
    }
}

/// The logits of `V` heads from `head` on, of one token of a tile.
unsafe fn load<const V: usize>(params: &VoteParams, tile: u64, within: u32, head: Head) -> [f32; V] {
    let line = (tile * params.num_kv_heads as u64 + head.kv as u64) * LOGIT_TILE as u64 + within as u64;
    let at = params.logits.add(line * params.group as u64 + head.member as u64);
    let mut logits = [0.0; V];
    if V == 4 {
        let quad = at.cast::<V4<f32>>().load_once().0;
        for i in 0..V {
            logits[i] = quad[i];
        }
    } else {
        logits[0] = at.load_once();
    }
    logits
}
