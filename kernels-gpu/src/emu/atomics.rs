//! Global atomics and fences, and the order they give to blocks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use super::access::Access;
use super::block::with;
use super::global_race::GlobalRaces;
use super::report::Site;

/// For each block heard of, the count up to which its accesses are known to have happened.
pub(crate) type BlockClock = BTreeMap<u32, u32>;

fn merge(into: &mut BlockClock, from: &BlockClock) {
    for (&block, &count) in from {
        let known = into.entry(block).or_default();
        *known = count.max(*known);
    }
}

/// What a block has done and knows of others; see [`global_race`](super::global_race).
#[derive(Default)]
pub(crate) struct BlockOrder {
    pub block: u32,
    /// Grows with each fence: what came before the fence has a smaller count than what comes after.
    pub count: u32,
    known: BlockClock,
    /// Per thread that used an atomic or a fence: what its next fence takes in, and what its next atomic gives out.
    taken: BTreeMap<usize, BlockClock>,
    given: BTreeMap<usize, BlockClock>,
}

impl BlockOrder {
    pub fn new(block: u32) -> BlockOrder {
        BlockOrder { block, count: 1, ..BlockOrder::default() }
    }

    /// Whether everything after now is ordered behind the access that left `mark`.
    pub fn is_behind(&self, mark: u64) -> bool {
        if mark == 0 {
            return true;
        }
        let (block, count) = ((mark >> 32) as u32 - 1, mark as u32 >> 1);
        block == self.block || self.known.get(&block).is_some_and(|&known| known >= count)
    }

    /// Whether `thread` of the block has fenced.
    pub fn has_fenced(&self, thread: usize) -> bool {
        self.given.contains_key(&thread)
    }

    /// At a barrier of the cluster: adds what the block has done and knows.
    pub fn give(&self, known: &mut BlockClock) {
        merge(known, &self.known);
        known.insert(self.block, self.count);
    }

    /// At a barrier of the cluster: everything after now is ordered behind `known`.
    pub fn take(&mut self, known: &BlockClock) {
        merge(&mut self.known, known);
        self.count += 1;
    }

    fn fence(&mut self, thread: usize) {
        if let Some(taken) = self.taken.remove(&thread) {
            merge(&mut self.known, &taken);
        }
        let mut given = self.known.clone();
        given.insert(self.block, self.count);
        self.given.insert(thread, given);
        self.count += 1;
    }

    /// An atomic of `thread` on a word to which `released` was given out.
    fn meet(&mut self, thread: usize, released: &mut BlockClock) {
        if !released.is_empty() {
            merge(self.taken.entry(thread).or_default(), released);
        }
        if let Some(given) = self.given.get(&thread) {
            merge(released, given);
        }
    }
}

/// `fence.acq_rel.gpu` of the running thread.
#[inline(never)]
pub(crate) fn fence() {
    with(|block| {
        if block.global_races().is_some() {
            block.order.fence(block.current);
        }
    })
}

/// The running lane could go on, but lets others go first: without this, a lane that spins would spin forever.
#[inline(never)]
pub(crate) fn requeue() {
    with(|block| block.requeue())
}

/// Replaces the word at `addr` by `f` of it, at once for all blocks; returns what was there.
#[inline(never)]
pub(crate) fn read_modify_write(addr: u64, f: &dyn Fn(u32) -> u32, site: Site) -> u32 {
    with(|block| {
        let host = block.global_access(addr, 4, 4, Access::Atomic, site).cast::<u32>();
        // SAFETY: checked to be inside an allocation and aligned; concurrent accesses by other blocks are atomic too,
        // or a race of the kernel.
        let word = unsafe { AtomicU32::from_ptr(host) };
        let update = || {
            let old = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(f(old)));
            old.unwrap_or_else(|old| old)
        };
        let thread = block.current;
        let Some(races) = block.global_races() else {
            return update();
        };
        // SAFETY: the launch owns the shadow, so that borrowing it need not keep `block.order` from changing.
        let races: &GlobalRaces = unsafe { &*std::ptr::from_ref(races) };
        races.with_released(addr, |released| {
            block.order.meet(thread, released);
            update()
        })
    })
}
