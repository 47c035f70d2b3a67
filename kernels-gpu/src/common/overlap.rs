//! *Launches that overlap*: what a kernel may do before the launch before it has ended.
//!
//! A host may launch kernels so that each begins while the one before it ends (programmatic dependent launch). Every kernel then
//! calls two functions of [`grid`](crate::simt), which do nothing where launches do not overlap:
//! ```text
//! wait_for_previous    returns when all launches before have ended, and what they wrote can be read
//! launch_dependents    the next launch may begin, once every block has called it or ended
//! ```
//! The rules, which the emulator checks:
//! 1. Before it has waited, a kernel reads nothing that a launch still at work may write, and writes nothing that one may read or
//!    write.
//! 2. It waits before it ends, on every path. So when a kernel has waited, *all* launches before it have ended.
//! 3. It reads through the non-coherent path (`ld.global.nc`) only what nobody writes from its first instruction to its last: not
//!    what a launch still at work when it begins may write, also after the wait.
//!
//! What is still at work when a kernel begins? The launch before it; and the one before that, if the launch before lets others
//! begin before it has itself waited, and so on. Those are `score_stream`, and `pool` behind `append`; all others let the next
//! begin when they have waited ([`Op::ordering`](crate::entries::Op::ordering)). Tables of a batch and of angles are written by copies and by `translate`, which end before later launches begin: they may be
//! read at once.
//!
//! `attend_decode`, `gather` and `score` read pages through that path, since attention is 8 % slower over all tokens without
//! (`docs/performance.md`). While a launch that writes pages may be at work a host therefore launches them so that they do not
//! overlap; but for `score` in a step, which reads candidates alone, and no token appended before it.
//!
//! Queries, keys and values of a block are read so, too. Where they are the output of attention at work, it does the same.
//!
//! | kernel | does before it waits |
//! |---|---|
//! | `pool` behind `append` | everything, and writes its outputs: it waits at its end ([`Overlap::waiting_last`]) |
//! | `score`, `score_stream` | reads tables; `score_stream` also the first stages of keys ([`Overlap::prefetching`]) |
//! | `vote` | reads tables |
//! | `vote` of blocks | everything but what needs the sums: behind `fold`, tables, actions, scoring queries and keys are older |
//! | `top_k` (the launch that writes the lists) | reads tables, actions, scoring queries and cached selections: behind `vote` these are older; else a host lets it not overlap |
//! | `attend_stream`, `attend_stream_merge` | reads tables |
//! | others | nothing |

/// How a launch is tied to those before and after it in a step; the host decides, the kernels named obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Overlap(u32);

impl Overlap {
    const WAITS_LAST: u32 = 1 << 8;
    const CHUNK_TILE: u32 = 16;

    /// The kernel waits before it reads anything but tables, and leaves nothing to the next.
    pub const NONE: Overlap = Overlap(0);

    /// `pool`: the launch before is [`append`](crate::ops::append), and nothing here depends on it; the kernel waits at its end.
    pub const fn waiting_last(self) -> Overlap {
        Overlap(self.0 | Overlap::WAITS_LAST)
    }

    /// `score_stream`: prefetches `stages` stages of keys, up to 255, of rows that may be scored. Only where no launch
    /// still at work writes a candidate's key: behind `append_pool`, or `append` and `pool`, of which the first has waited.
    pub const fn prefetching(self, stages: u32) -> Overlap {
        assert!(stages < Overlap::WAITS_LAST);
        Overlap(self.0 & !(Overlap::WAITS_LAST - 1) | stages)
    }

    /// `score` and `vote`: the former leaves the statistics of its chunks, of tiles of `tile_tokens` tokens, unfolded, and the
    /// latter folds them.
    pub const fn folding_in_vote(self, tile_tokens: u32) -> Overlap {
        assert!(tile_tokens > 0 && tile_tokens < 1 << (32 - Overlap::CHUNK_TILE));
        Overlap(self.0 & ((1 << Overlap::CHUNK_TILE) - 1) | tile_tokens << Overlap::CHUNK_TILE)
    }

    /// See [`waiting_last`](Self::waiting_last).
    pub const fn waits_last(self) -> bool {
        self.0 & Overlap::WAITS_LAST != 0
    }

    /// See [`prefetching`](Self::prefetching).
    pub const fn prefetched_stages(self) -> u32 {
        self.0 & (Overlap::WAITS_LAST - 1)
    }

    /// Tokens of a tile of the chunks that `vote` folds; 0 if `score` does. See [`folding_in_vote`](Self::folding_in_vote).
    pub const fn chunk_tile(self) -> u32 {
        self.0 >> Overlap::CHUNK_TILE
    }
}

#[cfg(test)]
mod tests {
    use super::Overlap;

    #[test]
    fn flags_do_not_touch_each_other() {
        let all = Overlap::NONE.folding_in_vote(32).waiting_last().prefetching(255);
        assert!(all.waits_last() && (all.prefetched_stages(), all.chunk_tile()) == (255, 32));
        let none = Overlap::NONE;
        assert!(!none.waits_last() && (none.prefetched_stages(), none.chunk_tile()) == (0, 0));
        assert_eq!(all.prefetching(2).folding_in_vote(16).prefetched_stages(), 2);
    }
}
