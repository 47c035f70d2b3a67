//! Clusters: blocks that run together, meet at a barrier, and use each other's shared memory.
//!
//! One OS thread runs the blocks of a cluster in turn, each until none of its lanes can go on. Between two barriers of
//! the cluster, its *phases*, nothing orders one block behind another. So two accesses to the same shared memory, one by
//! another block and one a write, race exactly if they fall in one phase, in whatever order the schedule ran them: a
//! [`Cell`] remembers the phases of the last ones. A block whose memory is used before all have met may not have begun, and
//! one whose memory is used when they meet no more may have ended.

use std::ops::Range;
use std::panic::Location;

use super::access::Access;
use super::block::{Block, Wait, with};
use super::report::{Fault, Kind, Site};

/// Bytes of shared memory per cell.
const CELL: usize = 2;

/// An access to a piece of shared memory: its phase, from 1 on (0: none), by which block of the cluster and thread, and
/// where in the source.
#[derive(Clone, Copy)]
struct Stamp {
    phase: u32,
    by: (u16, u16),
    site: Site,
}

const NEVER: Stamp = Stamp { phase: 0, by: (0, 0), site: Location::caller() };

/// The last accesses to a piece of shared memory, by the block itself and by others. Of reads by others in one phase two by
/// different threads are kept: whoever writes differs from one of them.
#[derive(Clone, Copy)]
struct Cell {
    read: Stamp,
    written: Stamp,
    read_by_other: Stamp,
    read_by_another: Stamp,
    written_by_other: Stamp,
}

const UNTOUCHED: Cell = Cell {
    read: NEVER,
    written: NEVER,
    read_by_other: NEVER,
    read_by_another: NEVER,
    written_by_other: NEVER,
};

impl Cell {
    /// What an access races with, if anything; remembers it.
    fn access(&mut self, own: bool, writes: bool, stamp: Stamp) -> Option<(Stamp, &'static str)> {
        // Accesses by the block itself are ordered by its own barriers, which the clocks know.
        let candidates = [
            (!own && writes, self.read, "the block's own read"),
            (!own, self.written, "the block's own write"),
            (writes, self.read_by_other, "a read by another block"),
            (writes, self.read_by_another, "a read by another block"),
            (true, self.written_by_other, "a write by another block"),
        ];
        let races = |&&(relevant, other, _): &&(bool, Stamp, &str)| {
            relevant && other.phase == stamp.phase && other.by != stamp.by
        };
        if let Some((_, other, what)) = candidates.iter().find(races) {
            return Some((*other, what));
        }
        let first = &self.read_by_other;
        let is_second = first.phase == stamp.phase && first.by != stamp.by;
        *match (own, writes) {
            (true, false) => &mut self.read,
            (true, true) => &mut self.written,
            (false, false) if is_second => &mut self.read_by_another,
            (false, false) => &mut self.read_by_other,
            (false, true) => &mut self.written_by_other,
        } = stamp;
        None
    }
}

/// What a block knows of its cluster.
pub(crate) struct Member {
    /// All blocks of the cluster, by rank. One alone: none.
    pub blocks: Vec<*mut Block>,
    /// Threads that have arrived in this phase.
    arrived: usize,
    /// Barriers of the cluster that have been passed: those that order memory, and all.
    phase: u32,
    meetings: u32,
    /// Whether the barrier at which threads wait orders memory.
    orders: bool,
    cells: Vec<Cell>,
    /// Cells that may differ from `UNTOUCHED`.
    touched: Range<usize>,
    /// The last access by another block, its phase counted in meetings.
    used_by_other: Stamp,
}

impl Default for Member {
    fn default() -> Self {
        Member {
            blocks: Vec::new(),
            arrived: 0,
            phase: 0,
            meetings: 0,
            orders: true,
            cells: Vec::new(),
            touched: 0..0,
            used_by_other: NEVER,
        }
    }
}

impl Member {
    /// Prepares for a block with so much shared memory, alone or with others.
    pub fn reset(&mut self, shared_bytes: usize, blocks: &[*mut Block]) {
        self.blocks.clear();
        self.cells[self.touched.clone()].fill(UNTOUCHED);
        self.touched = 0..0;
        if blocks.len() > 1 {
            self.blocks.extend_from_slice(blocks);
            self.cells.resize(shared_bytes.div_ceil(CELL), UNTOUCHED);
        }
        (self.arrived, self.phase, self.meetings, self.used_by_other) = (0, 0, 0, NEVER);
    }

    /// An access by thread `by.1` of block `by.0` of the cluster, the block itself or another; says what is wrong with it,
    /// if anything.
    pub fn access(
        &mut self,
        own: bool,
        by: (u32, usize),
        (at, bytes): (usize, usize),
        access: Access,
        site: Site,
    ) -> Option<String> {
        if self.blocks.is_empty() {
            return None;
        }
        let stamp = Stamp { phase: self.phase + 1, by: (by.0 as u16, by.1 as u16), site };
        if !own {
            self.used_by_other = Stamp { phase: self.meetings + 1, ..stamp };
            if self.meetings == 0 {
                return Some(format!("{access} of shared memory of a block that may not have begun"));
            }
        }
        let writes = !access.reads() || access == Access::Atomic;
        let range = at / CELL..(at + bytes).div_ceil(CELL);
        self.touched = match self.touched.is_empty() {
            true => range.clone(),
            false => self.touched.start.min(range.start)..self.touched.end.max(range.end),
        };
        let mut cells = self.cells[range].iter_mut();
        let (other, what) = cells.find_map(|cell| cell.access(own, writes, stamp))?;
        let whose = if own { "" } else { "another block's " };
        Some(format!("{access} of {whose}shared byte {at} races with {what} at {}", other.site))
    }

    /// What is wrong where the block has ended in this phase.
    pub fn check_end(&self) -> Result<(), Fault> {
        if self.used_by_other.phase != self.meetings + 1 {
            return Ok(());
        }
        let site = self.used_by_other.site;
        let message =
            format!("the block may end before another block of the cluster uses its shared memory at {site}");
        Err(Fault { kind: Kind::Race, message })
    }

    /// How many threads of the block wait at the cluster's barrier.
    pub fn arrived(&self) -> usize {
        self.arrived
    }
}

/// The running thread arrives at the barrier of its cluster, which orders memory or does not; true if it must suspend.
#[inline(never)]
pub(crate) fn arrive(orders: bool, site: Site) -> bool {
    with(|block| {
        let current = block.current;
        if block.cluster.arrived > 0 && block.cluster.orders != orders {
            let what =
                "a barrier of the cluster, at which other threads wait that want the other kind".into();
            block.fail(Kind::Divergence, what, site);
        }
        block.cluster.orders = orders;
        (block.lanes[current].wait, block.lanes[current].site) = (Wait::Cluster, site);
        block.cluster.arrived += 1;
        let own = std::ptr::from_mut(block);
        let alone = [own];
        let blocks =
            if block.cluster.blocks.is_empty() { alone.to_vec() } else { block.cluster.blocks.clone() };
        // SAFETY: the blocks of a cluster live while it runs, on this OS thread, and of `block` no other borrow is used
        // from here on.
        unsafe {
            let has_arrived = |block: &Block| block.cluster.arrived == block.lanes.len();
            if blocks.iter().all(|&block| has_arrived(&*block)) {
                complete(&blocks);
            }
        }
    });
    true
}

/// Ends the phase: every thread of the cluster may run.
///
/// # Safety
/// - The blocks are alive, and none is borrowed.
unsafe fn complete(blocks: &[*mut Block]) {
    let mut known = Default::default();
    for &block in blocks {
        unsafe { (*block).order.give(&mut known) }
    }
    let have_waited = blocks.iter().any(|&block| unsafe { (*block).shadow.clocks.any_waited() });
    for &block in blocks {
        let block = unsafe { &mut *block };
        block.cluster.arrived = 0;
        block.cluster.meetings += 1;
        block.stats.barriers += 1;
        let orders = block.cluster.orders;
        if orders {
            block.order.take(&known);
            block.cluster.phase += 1;
            if have_waited {
                block.shadow.clocks.all_wait_for_launches();
            }
        }
        if orders && block.options.races {
            block.shadow.clocks.synchronise(0..block.lanes.len());
        }
        for warp in 0..block.lanes.len() / 32 {
            block.wake(warp, u32::MAX);
        }
        block.lanes.iter_mut().for_each(|lane| lane.wait = Wait::Nothing);
    }
}

/// The host address of `bytes` bytes of shared memory of block `rank` of the cluster. `to`: address, and bounds of its array.
#[inline(never)]
pub(crate) fn remote(rank: u32, to: (u32, (u32, u32)), bytes: usize, access: Access, site: Site) -> *mut u8 {
    with(|block| {
        if rank >= block.dims.cluster {
            let what = format!("block {rank} of a cluster of {}", block.dims.cluster);
            block.fail(Kind::SharedBounds, what, site);
        }
        let by = (block.rank_in_cluster(), block.current);
        if rank == by.0 {
            return block.shared_access(block.current, to.0, to.1, bytes, access, site);
        }
        // SAFETY: another block than the borrowed one, which lives while the cluster runs, on this OS thread.
        let other = unsafe { &mut *block.cluster.blocks[rank as usize] };
        match other.access_by_other(by, to, bytes, access, site) {
            Ok(host) => host,
            Err((kind, what)) => block.fail(kind, what, site),
        }
    })
}

impl Block {
    /// The block's place in its cluster.
    pub fn rank_in_cluster(&self) -> u32 {
        self.index[0] % self.dims.cluster
    }

    fn access_by_other(
        &mut self,
        by: (u32, usize),
        (addr, bounds): (u32, (u32, u32)),
        bytes: usize,
        access: Access,
        site: Site,
    ) -> Result<*mut u8, (Kind, String)> {
        if let Some(fault) = self.bounds_fault(addr, bounds, bytes, access) {
            return Err(fault);
        }
        let at = addr as usize;
        if self.options.races
            && let Some(what) = self.cluster.access(false, by, (at, bytes), access, site)
        {
            return Err((Kind::Race, what));
        }
        if self.options.uninitialised
            && let Some(fault) = self.shadow.access_by_other(at, bytes, access)
        {
            return Err(fault);
        }
        // SAFETY: inside the launch's shared memory, as `bounds_fault` has found.
        Ok(unsafe { self.shared.as_mut_ptr().cast::<u8>().add(at) })
    }
}
