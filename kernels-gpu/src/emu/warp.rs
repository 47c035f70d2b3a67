//! Collectives of a warp: arrivals are gathered per mask, the last one computes the result for all.
//!
//! Arguments and results go through the lane's `words`, one word at a time: passed by value they would be stored as
//! vectors and read back as words, which stalls the store buffer.

use super::block::{Block, Wait, with};
use super::report::{Kind, Site, lanes};
use super::tensor;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    SyncWarp,
    ShuffleIdx,
    ShuffleXor,
    ShuffleUp,
    ShuffleDown,
    Ballot,
    ReduceAdd,
    ReduceMin,
    ReduceMax,
    LdMatrix,
    LdMatrixTrans,
    MmaF16,
    MmaBf16,
    MmaOfWarpgroup,
    MmaOfWarpgroupFromShared,
}

impl Op {
    /// Whether all lanes must reach it through the same instruction.
    fn is_aligned(self) -> bool {
        use Op::*;
        matches!(
            self,
            LdMatrix | LdMatrixTrans | MmaF16 | MmaBf16 | MmaOfWarpgroup | MmaOfWarpgroupFromShared
        )
    }
}

/// A collective that some lanes of a warp have reached and others not.
pub(crate) struct Pending {
    op: Op,
    mask: u32,
    arrived: u32,
    first_site: Site,
}

#[inline(never)]
fn words() -> *mut u32 {
    with(|block| block.lanes[block.current].words.as_mut_ptr())
}

/// Lays down the running lane's arguments.
#[inline(always)]
pub(crate) fn arguments<const N: usize>(values: [u32; N]) {
    const { assert!(N <= 12) };
    let words = words();
    for (i, value) in values.into_iter().enumerate() {
        // SAFETY: `N` is at most the 12 words of a lane.
        unsafe { words.add(i).write(value) }
    }
}

/// Picks up the running lane's results.
#[inline(always)]
pub(crate) fn result<const N: usize>() -> [u32; N] {
    const { assert!(N <= 12) };
    // SAFETY: `N` is at most the 12 words of a lane.
    unsafe { words().cast::<[u32; N]>().read() }
}

/// The running lane arrives at a collective; true if it must suspend.
#[inline(never)]
pub(crate) fn arrive(op: Op, mask: u32, site: Site) -> bool {
    with(|block| block.arrive_in_warp(op, mask, site))
}

impl Block {
    fn arrive_in_warp(&mut self, op: Op, mask: u32, site: Site) -> bool {
        let (warp, bit) = (self.current / 32, 1u32 << (self.current % 32));
        if mask & bit == 0 {
            self.fail(
                Kind::Divergence,
                format!("{op:?}: mask {mask:#010x} does not name the calling lane"),
                site,
            );
        }
        let pending = &mut self.pending[warp];
        let at = pending.iter().position(|p| (p.op, p.mask) == (op, mask)).unwrap_or_else(|| {
            pending.push(Pending { op, mask, arrived: 0, first_site: site });
            pending.len() - 1
        });
        let meeting = &mut pending[at];
        if op.is_aligned() && meeting.first_site != site {
            let (others, first) = (lanes(meeting.arrived), meeting.first_site);
            let what = format!("{op:?} is aligned, but lanes {others} of the warp execute it at {first}");
            self.fail(Kind::Divergence, what, site);
        }
        meeting.arrived |= bit;
        if meeting.arrived != mask {
            let lane = &mut self.lanes[self.current];
            (lane.wait, lane.site) = (Wait::Warp { op, mask }, site);
            return true;
        }
        pending.swap_remove(at);
        self.stats.collectives += 1;
        self.complete(op, warp * 32, mask, site);
        // In random order the last arrival has no privilege: it queues with the others.
        let again = self.is_random();
        self.wake(warp, if again { mask } else { mask & !bit });
        again
    }

    /// Computes the results of all lanes in `mask` of the warp that begins with thread `first`.
    fn complete(&mut self, op: Op, first: usize, mask: u32, site: Site) {
        match op {
            Op::SyncWarp => {
                if self.options.races {
                    self.shadow.clocks.synchronise(members(mask).map(|lane| first + lane));
                }
            }
            Op::ShuffleIdx | Op::ShuffleXor | Op::ShuffleUp | Op::ShuffleDown => {
                self.shuffle(op, first, mask, site)
            }
            Op::Ballot => {
                let ballot = self.fold(first, mask, 0, |bits, lane, word| bits | word << lane);
                self.broadcast(first, mask, ballot);
            }
            Op::ReduceAdd => {
                let sum = self.fold(first, mask, 0, |sum, _, word| sum.wrapping_add(word));
                self.broadcast(first, mask, sum);
            }
            Op::ReduceMin => {
                let min = self.fold(first, mask, u32::MAX, |min, _, word| min.min(word));
                self.broadcast(first, mask, min);
            }
            Op::ReduceMax => {
                let max = self.fold(first, mask, 0, |max, _, word| max.max(word));
                self.broadcast(first, mask, max);
            }
            Op::LdMatrix => self.ldmatrix(first, false, site),
            Op::LdMatrixTrans => self.ldmatrix(first, true, site),
            Op::MmaF16 => tensor::mma_f16(&mut self.lanes[first..first + 32]),
            Op::MmaBf16 => tensor::mma_bf16(&mut self.lanes[first..first + 32]),
            Op::MmaOfWarpgroup => self.gather_rows(first, site),
            Op::MmaOfWarpgroupFromShared => self.find_rows(first, site),
        }
    }

    /// Words: value, then source lane, xor mask or distance.
    fn shuffle(&mut self, op: Op, first: usize, mask: u32, site: Site) {
        let values: [u32; 32] = std::array::from_fn(|lane| self.lanes[first + lane].words[0]);
        for lane in members(mask) {
            let operand = self.lanes[first + lane].words[1];
            // The instruction takes the low five bits of its operand.
            let by = operand as usize % 32;
            let source = match op {
                Op::ShuffleIdx => by,
                Op::ShuffleXor => lane ^ by,
                Op::ShuffleUp => lane.checked_sub(by).unwrap_or(lane),
                _ if lane + by < 32 => lane + by,
                _ => lane,
            };
            if mask >> source & 1 == 0 {
                self.current = first + lane;
                let what = format!("{op:?} reads lane {source}, which is not in the mask {mask:#010x}");
                self.fail(Kind::Divergence, what, site);
            }
            self.lanes[first + lane].words[0] = values[source];
        }
    }

    fn fold(&self, first: usize, mask: u32, start: u32, f: impl Fn(u32, u32, u32) -> u32) -> u32 {
        members(mask).fold(start, |acc, lane| f(acc, lane as u32, self.lanes[first + lane].words[0]))
    }

    fn broadcast(&mut self, first: usize, mask: u32, value: u32) {
        for lane in members(mask) {
            self.lanes[first + lane].words[0] = value;
        }
    }
}

fn members(mask: u32) -> impl Iterator<Item = usize> + Clone {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}
