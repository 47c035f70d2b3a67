//! Barriers of a block: `bar.sync`, `bar.arrive`, `bar.red`.
//!
//! A phase begins with the first arrival, which fixes the number of threads, and ends with the last. Arrivals release
//! what their thread did; the waiting threads acquire it when the phase ends.

use super::block::{Block, Wait, with};
use super::race::Clock;
use super::report::{Kind, Site};

/// How a thread takes part.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Arrival {
    /// `bar.arrive`.
    Pass,
    /// `bar.sync`.
    Wait,
    /// `bar.red.popc` of this predicate.
    Count(bool),
}

#[derive(Default)]
pub(crate) struct Barrier {
    threads: u32,
    arrived: u32,
    counting: bool,
    count: u32,
    /// Per warp: who has arrived in this phase, who of those waits, and where the first arrived.
    seen: [u32; 32],
    waiting: [u32; 32],
    sites: [Option<Site>; 32],
    clock: Option<Clock>,
}

impl Barrier {
    pub fn arrived(&self) -> u32 {
        self.arrived
    }

    /// What is wrong with this arrival, if anything.
    fn objection(&self, id: u32, thread: usize, threads: u32, counting: bool, site: Site) -> Option<String> {
        if id >= 16 {
            return Some(format!("a block has barriers 0 to 15, this call says {id}"));
        }
        if threads == 0 || !threads.is_multiple_of(32) {
            return Some(format!("barrier {id} is asked to wait for {threads} threads, no multiple of 32"));
        }
        if self.arrived == 0 {
            return None;
        }
        if self.threads != threads {
            return Some(format!(
                "barrier {id} is in use with {} threads, this call says {threads}",
                self.threads
            ));
        }
        if self.counting != counting {
            return Some(format!("barrier {id} is in use by the other of bar.sync and bar.red"));
        }
        if self.seen[thread / 32] >> (thread % 32) & 1 == 1 {
            return Some(format!("second arrival at barrier {id} before its phase was complete"));
        }
        match self.sites[thread / 32] {
            Some(first) if first != site => Some(format!(
                "barriers are aligned, but other lanes of the warp arrived at barrier {id} at {first}"
            )),
            _ => None,
        }
    }
}

/// The running thread arrives at barrier `id`; true if it must suspend.
#[inline(never)]
pub(crate) fn arrive(id: u32, threads: Option<u32>, how: Arrival, site: Site) -> bool {
    with(|block| block.arrive_at_barrier(id, threads, how, site))
}

impl Block {
    fn arrive_at_barrier(&mut self, id: u32, threads: Option<u32>, how: Arrival, site: Site) -> bool {
        let thread = self.current;
        let (warp, bit) = (thread / 32, 1u32 << (thread % 32));
        let threads = threads.unwrap_or(self.lanes.len() as u32);
        let waits = how != Arrival::Pass;
        let counting = matches!(how, Arrival::Count(_));
        let barrier = &mut self.barriers[id as usize % 16];
        if let Some(what) = barrier.objection(id, thread, threads, counting, site) {
            self.fail(Kind::Divergence, what, site);
        }

        barrier.threads = threads;
        barrier.counting = counting;
        barrier.arrived += 1;
        barrier.count += (how == Arrival::Count(true)) as u32;
        barrier.seen[warp] |= bit;
        barrier.sites[warp].get_or_insert(site);
        if self.options.races {
            let clock = barrier.clock.get_or_insert_with(|| self.shadow.clocks.empty());
            self.shadow.clocks.release(thread, clock);
            if !waits {
                self.shadow.clocks.advance(thread);
            }
        }
        if waits {
            barrier.waiting[warp] |= bit;
            self.lanes[thread].site = site;
        }
        if barrier.arrived < threads {
            if waits {
                self.lanes[thread].wait = Wait::Barrier { id, threads };
            }
            return waits;
        }
        self.complete_barrier(id, waits)
    }

    /// Ends the phase: everyone who waits may run. True if the running thread must suspend.
    fn complete_barrier(&mut self, id: u32, waits: bool) -> bool {
        let barrier = std::mem::take(&mut self.barriers[id as usize]);
        self.stats.barriers += 1;
        let waiting = barrier.waiting;
        let threads = (0..self.lanes.len()).filter(|t| waiting[t / 32] >> (t % 32) & 1 == 1);
        if barrier.counting {
            for thread in threads.clone() {
                self.lanes[thread].words[0] = barrier.count;
            }
        }
        if let Some(clock) = barrier.clock {
            self.shadow.clocks.acquire(threads, clock);
        }
        // In random order the last arrival has no privilege: it queues with the others.
        let again = waits && self.is_random();
        for (warp, &mask) in waiting.iter().enumerate().filter(|(_, mask)| **mask != 0) {
            let me = if warp == self.current / 32 && !again { 1 << (self.current % 32) } else { 0 };
            self.wake(warp, mask & !me);
        }
        again
    }
}
