//! Barriers in shared memory and bulk copies.
//!
//! Nothing uses a barrier before its maker has published it: publishing counts as one more write to it, so that whoever is
//! not ordered behind that races.
//!
//! At issue the target is poisoned and marked as under way. The bytes arrive when the first thread waits for the phase
//! that counts them, and the source is read then. To the vector clocks ([`race`](super::race)) each barrier is one more
//! thread, whose count is its phase: a copy is a write by it, ordered before those alone that know, by waiting or from
//! somebody who has, that the phase has ended.

use super::access::Access;
use super::block::{Block, Wait, with};
use super::copies::Source;
use super::race::Clock;
use super::report::{Kind, Site};

/// Barriers of a block at most: what the clocks have room for.
pub(crate) const MAX_BARRIERS: usize = 64;

/// Bytes and arrivals that a barrier can count.
const LIMIT: i64 = 1 << 20;

/// Where a copy or a barrier lies: address, and the bounds of its array.
type Target = (u32, (u32, u32));

struct Copy {
    dst: Target,
    src: Source,
}

pub(crate) struct MBarrier {
    addr: u32,
    bounds: (u32, u32),
    /// The thread that made it, where, and whether that has published it.
    maker: usize,
    site: Site,
    is_published: bool,
    /// Arrivals of a phase, and those that are missing in the one under way.
    arrivals: u32,
    missing: u32,
    /// Bytes announced less bytes copied.
    outstanding: i64,
    phase: u32,
    /// What was released to the phases up to this one, and up to the one before it.
    clock: Clock,
    ended: Clock,
    /// Copies that the phase under way counts, and those of ended phases that nobody has waited for.
    copies: Vec<Copy>,
    landed: Vec<Copy>,
    waiting: Vec<usize>,
}

impl MBarrier {
    /// Whether a copy is under way that nobody has waited for.
    pub fn has_copies(&self) -> bool {
        !self.copies.is_empty() || !self.landed.is_empty()
    }

    /// Where those read.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        self.copies.iter().chain(&self.landed).map(|copy| &copy.src)
    }
}

#[inline(never)]
pub(crate) fn init(addr: u32, bounds: (u32, u32), arrivals: u32, site: Site) {
    with(|block| {
        if arrivals == 0 || arrivals as i64 >= LIMIT {
            let what = format!("an mbarrier of {arrivals} arrivals, a phase has 1 to {}", LIMIT - 1);
            block.fail(Kind::MBarrier, what, site);
        }
        if block.mbarriers.iter().any(|barrier| barrier.addr == addr) {
            let what = format!("there is an mbarrier at shared byte {addr} already");
            block.fail(Kind::MBarrier, what, site);
        }
        assert!(block.mbarriers.len() < MAX_BARRIERS, "the emulator knows {MAX_BARRIERS} mbarriers a block");
        block.shared_access(block.current, addr, bounds, 8, Access::Write, site);
        block.mbarriers.push(MBarrier {
            addr,
            bounds,
            maker: block.current,
            site,
            is_published: false,
            arrivals,
            missing: arrivals,
            outstanding: 0,
            phase: 0,
            clock: Clock::new(),
            ended: Clock::new(),
            copies: Vec::new(),
            landed: Vec::new(),
            waiting: Vec::new(),
        });
    })
}

/// The running thread publishes the barriers that it has made.
#[inline(never)]
pub(crate) fn publish() {
    with(|block| {
        for index in 0..block.mbarriers.len() {
            let barrier = &mut block.mbarriers[index];
            if barrier.maker == block.current && !barrier.is_published {
                barrier.is_published = true;
                let MBarrier { addr, bounds, site, .. } = *barrier;
                block.shared_access(block.current, addr, bounds, 8, Access::Write, site);
            }
        }
    })
}

/// The running thread arrives, after it has announced `bytes` bytes.
#[inline(never)]
pub(crate) fn arrive(addr: u32, bounds: (u32, u32), bytes: u32, site: Site) {
    with(|block| {
        let index = block.mbarrier((addr, bounds), site);
        block.release_to(index);
        let barrier = &mut block.mbarriers[index];
        if barrier.missing == 0 {
            let what = format!(
                "arrival at the mbarrier at shared byte {addr}, where all {} of the phase have arrived",
                barrier.arrivals
            );
            block.fail(Kind::MBarrier, what, site);
        }
        barrier.missing -= 1;
        block.count_bytes(index, bytes as i64, site);
    })
}

/// Whether the running thread must suspend and ask again.
#[inline(never)]
pub(crate) fn must_wait(addr: u32, bounds: (u32, u32), parity: u32, site: Site) -> bool {
    with(|block| {
        let (index, thread) = (block.mbarrier((addr, bounds), site), block.current);
        let barrier = &mut block.mbarriers[index];
        if barrier.phase % 2 == parity {
            barrier.waiting.push(thread);
            let lane = &mut block.lanes[thread];
            (lane.wait, lane.site) = (Wait::MBarrier { index, parity }, site);
            return true;
        }
        if block.options.races && !barrier.ended.is_empty() {
            block.shadow.clocks.learn(thread, &barrier.ended);
        }
        for copy in std::mem::take(&mut barrier.landed) {
            let (dst, bounds) = copy.dst;
            let target = block.shared_access(thread, dst, bounds, copy.src.bytes, Access::BulkEnd, site);
            // SAFETY: both sides were checked when the copy started; allocations outlive the launch.
            unsafe { target.copy_from_nonoverlapping(copy.src.start, copy.src.bytes) }
            block.under_way.end();
        }
        false
    })
}

/// A copy by the engine, counted by the barrier at `word`.
#[inline(never)]
pub(crate) fn start(dst: Target, src: u64, bytes: u32, word: Target, site: Site) {
    with(|block| {
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes as i64 >= LIMIT {
            let what = format!("bulk copy of {bytes} bytes, no multiple of 16 from 16 to {}", LIMIT - 16);
            block.fail(Kind::Misaligned, what, site);
        }
        let index = block.mbarrier(word, site);
        let src = block.global_access(src, bytes as usize, 16, Access::EngineRead, site).cast_const();
        let begins = Access::BulkStart { barrier: index as u16, phase: block.mbarriers[index].phase };
        let target = block.shared_access(block.current, dst.0, dst.1, bytes as usize, begins, site);
        // SAFETY: `shared_access` returned the address of so many bytes.
        unsafe { target.write_bytes(0xff, bytes as usize) }
        let src = Source { start: src, bytes: bytes as usize, site };
        block.under_way.start(&src);
        block.mbarriers[index].copies.push(Copy { dst, src });
        block.count_bytes(index, -(bytes as i64), site);
    })
}

impl Block {
    /// The barrier at an address, which the running thread uses.
    fn mbarrier(&mut self, (addr, bounds): Target, site: Site) -> usize {
        let Some(index) = self.mbarriers.iter().position(|barrier| barrier.addr == addr) else {
            let what = format!("no mbarrier was made at shared byte {addr}");
            self.fail(Kind::MBarrier, what, site);
        };
        self.shared_access(self.current, addr, bounds, 8, Access::Atomic, site);
        if !self.mbarriers[index].is_published {
            let made = self.mbarriers[index].site;
            let what = format!(
                "the mbarrier at shared byte {addr}, made at {made}, is used before its maker has called bulk::publish"
            );
            self.fail(Kind::MBarrier, what, site);
        }
        index
    }

    /// What the running thread has done is known to those that wait for the phase under way.
    fn release_to(&mut self, index: usize) {
        if self.options.races {
            self.shadow.clocks.release(self.current, &mut self.mbarriers[index].clock);
            self.shadow.clocks.advance(self.current);
        }
    }

    /// Counts bytes, and ends the phase if nothing is missing any more.
    fn count_bytes(&mut self, index: usize, bytes: i64, site: Site) {
        let barrier = &mut self.mbarriers[index];
        barrier.outstanding += bytes;
        if barrier.outstanding.abs() >= LIMIT {
            let what = format!("{} bytes at a time, an mbarrier counts {LIMIT}", barrier.outstanding.abs());
            self.fail(Kind::MBarrier, what, site);
        }
        if barrier.missing > 0 || barrier.outstanding != 0 {
            return;
        }
        barrier.phase += 1;
        barrier.missing = barrier.arrivals;
        barrier.landed.append(&mut barrier.copies);
        if !barrier.clock.is_empty() {
            let threads = self.lanes.len();
            barrier.clock[threads + index] = barrier.phase;
            barrier.ended.clone_from(&barrier.clock);
        }
        self.stats.barriers += 1;
        for thread in std::mem::take(&mut self.mbarriers[index].waiting) {
            self.wake(thread / 32, 1 << (thread % 32));
        }
    }

    /// What a waiting thread waits for.
    pub fn describe_mbarrier(&self, index: usize, parity: u32) -> String {
        let MBarrier { addr, arrivals, missing, outstanding, phase, .. } = &self.mbarriers[index];
        format!(
            "wait at the mbarrier at shared byte {addr} for parity {parity} (phase {phase}: {} of {arrivals} arrived, \
             {outstanding} bytes outstanding)",
            arrivals - missing
        )
    }
}
