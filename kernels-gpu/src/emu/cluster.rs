//! Clusters: blocks that run together, meet at a barrier, and read each other's shared memory.
//!
//! One OS thread runs the blocks of a cluster in turn, each until none of its lanes can go on. Between two barriers of
//! the cluster, its *phases*, nothing orders one block behind another. So two accesses to the same shared memory, one by
//! another block and one a write, race exactly if they fall in one phase, in whatever order the schedule ran them: a
//! [`Trace`] remembers the phases of the last ones. A block whose memory is read in its last phase may have ended
//! before that, and one whose memory is read in its first phase may not have begun.

use std::panic::Location;

use super::access::Access;
use super::block::{Block, Wait, with};
use super::report::{Fault, Kind, Site};

/// Bytes of shared memory per trace.
const CELL: usize = 2;

/// The last accesses to a piece of shared memory: their phases from 1 on, and where they were. 0: none.
#[derive(Clone, Copy)]
struct Cell {
    written: (u32, Site),
    read_by_other: (u32, Site),
}

const UNTOUCHED: Cell = Cell { written: (0, Location::caller()), read_by_other: (0, Location::caller()) };

/// What a block knows of its cluster.
#[derive(Default)]
pub(crate) struct Member {
    /// All blocks of the cluster, by rank. One alone: none.
    pub blocks: Vec<*mut Block>,
    /// Threads that have arrived in this phase.
    arrived: usize,
    /// Barriers of the cluster that have been passed.
    phase: u32,
    cells: Vec<Cell>,
    /// The last phase, from 1 on, in which another block read, and where.
    read_by_other: Option<(u32, Site)>,
}

impl Member {
    /// Prepares for a block with so much shared memory, alone or with others.
    pub fn reset(&mut self, shared_bytes: usize, blocks: &[*mut Block]) {
        self.blocks.clear();
        self.cells.clear();
        if blocks.len() > 1 {
            self.blocks.extend_from_slice(blocks);
            self.cells.resize(shared_bytes.div_ceil(CELL), UNTOUCHED);
        }
        (self.arrived, self.phase, self.read_by_other) = (0, 0, None);
    }

    /// An access by the block itself; says what is wrong with it, if anything.
    pub fn own_access(&mut self, at: usize, bytes: usize, access: Access, site: Site) -> Option<String> {
        if self.cells.is_empty() || access.reads() && access != Access::Atomic {
            return None;
        }
        for cell in &mut self.cells[at / CELL..(at + bytes).div_ceil(CELL)] {
            if cell.read_by_other.0 == self.phase + 1 {
                let read = cell.read_by_other.1;
                return Some(format!(
                    "{access} of shared byte {at} races with a read by another block at {read}"
                ));
            }
            cell.written = (self.phase + 1, site);
        }
        None
    }

    fn read_by_other(&mut self, at: usize, bytes: usize, site: Site) -> Option<String> {
        self.read_by_other = Some((self.phase + 1, site));
        for cell in &mut self.cells[at / CELL..(at + bytes).div_ceil(CELL)] {
            if cell.written.0 == self.phase + 1 {
                let write = cell.written.1;
                return Some(format!(
                    "read of another block's shared byte {at} races with its write at {write}"
                ));
            }
            cell.read_by_other = (self.phase + 1, site);
        }
        None
    }

    /// What is wrong where the block has ended in this phase.
    pub fn check_end(&self) -> Result<(), Fault> {
        match self.read_by_other {
            Some((phase, site)) if phase == self.phase + 1 => Err(Fault {
                kind: Kind::Race,
                message: format!(
                    "the block may end before another block of the cluster reads its shared memory at {site}"
                ),
            }),
            _ => Ok(()),
        }
    }

    /// How many threads of the block wait at the cluster's barrier.
    pub fn arrived(&self) -> usize {
        self.arrived
    }
}

/// The running thread arrives at the barrier of its cluster; true if it must suspend.
#[inline(never)]
pub(crate) fn arrive(site: Site) -> bool {
    with(|block| {
        let current = block.current;
        (block.lanes[current].wait, block.lanes[current].site) = (Wait::Cluster, site);
        block.cluster.arrived += 1;
        let own = std::ptr::from_mut(block);
        let alone = [own];
        let blocks =
            if block.cluster.blocks.is_empty() { alone.to_vec() } else { block.cluster.blocks.clone() };
        // SAFETY: the blocks of a cluster live while it runs, on this OS thread, and of `block` no other borrow is used
        // from here on.
        unsafe {
            if blocks.iter().all(|&b| (*b).cluster.arrived == (&(*b).lanes).len()) {
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
    for &block in blocks {
        let block = unsafe { &mut *block };
        block.order.take(&known);
        block.cluster.arrived = 0;
        block.cluster.phase += 1;
        block.stats.barriers += 1;
        if block.options.races {
            block.shadow.clocks.synchronise(0..block.lanes.len());
        }
        for warp in 0..block.lanes.len() / 32 {
            block.wake(warp, u32::MAX);
        }
        block.lanes.iter_mut().for_each(|lane| lane.wait = Wait::Nothing);
    }
}

/// The host address of `bytes` bytes of shared memory at `addr` of block `rank` of the cluster, to be read.
#[inline(never)]
pub(crate) fn remote(rank: u32, addr: u32, bounds: (u32, u32), bytes: usize, site: Site) -> *mut u8 {
    with(|block| {
        if rank >= block.dims.cluster {
            let what = format!("block {rank} of a cluster of {}", block.dims.cluster);
            block.fail(Kind::SharedBounds, what, site);
        }
        if rank == block.rank_in_cluster() {
            return block.shared_access(block.current, addr, bounds, bytes, Access::Read, site);
        }
        // SAFETY: another block than the borrowed one, which lives while the cluster runs, on this OS thread.
        let other = unsafe { &mut *block.cluster.blocks[rank as usize] };
        match other.read_by_other(addr, bounds, bytes, site) {
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

    fn read_by_other(
        &mut self,
        addr: u32,
        bounds: (u32, u32),
        bytes: usize,
        site: Site,
    ) -> Result<*mut u8, (Kind, String)> {
        if let Some(fault) = self.bounds_fault(addr, bounds, bytes, Access::Read) {
            return Err(fault);
        }
        let at = addr as usize;
        if self.options.races
            && let Some(what) = self.cluster.read_by_other(at, bytes, site)
        {
            return Err((Kind::Race, what));
        }
        if self.options.uninitialised
            && let Some(fault) = self.shadow.uninitialised(at, bytes)
        {
            return Err(fault);
        }
        // SAFETY: inside the launch's shared memory, as `bounds_fault` has found.
        Ok(unsafe { self.shared.as_mut_ptr().cast::<u8>().add(at) })
    }
}
