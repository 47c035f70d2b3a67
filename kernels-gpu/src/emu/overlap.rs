//! Launches that overlap, as programmatic dependent launch lets them.
//!
//! # What may be unfinished
//! A launch may begin as soon as every block of the one before has called
//! [`launch_dependents`](crate::simt::grid::launch_dependents) or ended. So the one before is unfinished; and if some block
//! of that one called before it had waited itself, whatever that one found unfinished may be so still. Copies, and whatever
//! the host does with the memory, wait for everything. Launches have numbers, so that what is unfinished when launch `n`
//! begins is a range `oldest..n`.
//!
//! # The rules
//! 1. Before its [`wait_for_previous`](crate::simt::grid::wait_for_previous) a thread reads nothing that an unfinished launch
//!    writes, and writes nothing that one reads or writes.
//! 2. Nothing that an unfinished launch writes is read through the read-only path, not even behind the wait: its lines are
//!    not looked up again.
//! 3. A block does not end before one of its threads has waited: that the launch has ended tells those behind it that all
//!    before it have.
//!
//! A thread is *behind the wait* if it has waited, or if it is ordered behind a thread that has, by the vector clocks of
//! [`race`](super::race) or a barrier of the cluster. An order by flags in global memory is not seen.
//!
//! # How they are checked
//! Launches run one after the other here. Each leaves its number with what it reads and writes ([`Marks`], 4 bytes at a
//! time), and finds the number of the last launch before it. All accesses of the launches before have left theirs by then,
//! so the verdict depends on no schedule.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use super::access::Access;
use super::block::{Block, with};
use super::memory::Place;
use super::report::{Fault, Kind};

/// Bytes of global memory per cell, and cells per page. A page is allocated when first touched.
const CELL: usize = 4;
const PAGE: usize = 1024;

/// For writes and for reads: the number of the last launch with one in the lower half, that of the last launch before that
/// in the upper; 0: none.
#[derive(Default)]
struct Cell {
    write: AtomicU64,
    read: AtomicU64,
}

/// Leaves `number`, and returns the last one before it. Threads of one launch that come at the same time leave the same.
#[inline]
fn leave(word: &AtomicU64, number: u32) -> u32 {
    let seen = word.load(Ordering::Relaxed);
    if seen as u32 == number {
        return (seen >> 32) as u32;
    }
    word.store((seen & u32::MAX as u64) << 32 | number as u64, Ordering::Relaxed);
    seen as u32
}

/// The last launch before `number`.
#[inline]
fn before(word: &AtomicU64, number: u32) -> u32 {
    let seen = word.load(Ordering::Relaxed);
    if seen as u32 == number { (seen >> 32) as u32 } else { seen as u32 }
}

#[cold]
fn fresh_page() -> Box<[Cell]> {
    (0..PAGE).map(|_| Cell::default()).collect()
}

/// Which launches have read and written an allocation.
pub(crate) struct Marks {
    pages: Box<[OnceLock<Box<[Cell]>>]>,
}

impl Marks {
    /// Those of a fresh allocation.
    pub fn new(bytes: usize) -> Marks {
        Marks { pages: (0..bytes.div_ceil(CELL * PAGE)).map(|_| OnceLock::new()).collect() }
    }

    /// Leaves the mark of an access by launch `number`; returns the last launches before it that wrote, and, if it writes,
    /// that read there.
    fn access(&self, offset: usize, bytes: usize, writes: bool, number: u32) -> (u32, u32) {
        let (mut wrote, mut read) = (0, 0);
        let (mut index, end) = (offset / CELL, (offset + bytes).div_ceil(CELL));
        while index < end {
            let page = self.pages[index / PAGE].get_or_init(fresh_page);
            let cells = &page[index % PAGE..PAGE.min(index % PAGE + end - index)];
            for cell in cells {
                if writes {
                    wrote = leave(&cell.write, number).max(wrote);
                    read = before(&cell.read, number).max(read);
                } else {
                    leave(&cell.read, number);
                    wrote = before(&cell.write, number).max(wrote);
                }
            }
            index += cells.len();
        }
        (wrote, read)
    }
}

/// The launches of a memory.
#[derive(Default)]
pub(crate) struct Stream(Mutex<Numbers>);

#[derive(Default)]
struct Numbers {
    /// The last launch, and the first that may be unfinished when the next begins.
    last: u32,
    oldest: u32,
    /// Names of the launches from `oldest` on.
    names: VecDeque<String>,
}

impl Numbers {
    fn forget_before(&mut self, oldest: u32) {
        let ended = oldest.saturating_sub(self.oldest) as usize;
        self.names.drain(..ended.min(self.names.len()));
        self.oldest = oldest;
    }
}

impl Stream {
    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Everything has ended.
    pub fn synchronize(&self) {
        let mut numbers = self.numbers();
        let next = numbers.last + 1;
        numbers.forget_before(next);
    }

    /// The next launch begins.
    pub fn begin(&self, kernel: &str) -> Running {
        let mut numbers = self.numbers();
        numbers.last += 1;
        numbers.oldest = numbers.oldest.max(1);
        numbers.names.push_back(kernel.into());
        let (number, oldest) = (numbers.last, numbers.oldest);
        Running { number, oldest, is_early: AtomicBool::new(false) }
    }

    /// It has ended without a fault.
    pub fn end(&self, launch: &Running) {
        let oldest = if launch.is_early.load(Ordering::Relaxed) { launch.oldest } else { launch.number };
        self.numbers().forget_before(oldest);
    }

    /// The name of a launch that may be unfinished.
    fn name(&self, number: u32) -> String {
        let numbers = self.numbers();
        let name = number.checked_sub(numbers.oldest).and_then(|at| numbers.names.get(at as usize));
        name.cloned().unwrap_or_default()
    }
}

/// A launch that runs.
pub(crate) struct Running {
    number: u32,
    /// The first launch that may be unfinished; `number` if none is.
    oldest: u32,
    /// Whether a block let the next launch begin before it had waited.
    is_early: AtomicBool,
}

impl Running {
    fn has_unfinished(&self) -> bool {
        self.oldest < self.number
    }
}

/// `griddepcontrol.wait` of the running thread.
#[inline(never)]
pub(crate) fn wait_for_previous() {
    with(|block| block.shadow.clocks.wait_for_launches(block.current))
}

/// `griddepcontrol.launch_dependents` of the running thread.
#[inline(never)]
pub(crate) fn launch_dependents() {
    with(|block| {
        if let Some(launch) = block.running()
            && !block.shadow.clocks.is_behind_wait(block.current)
        {
            launch.is_early.store(true, Ordering::Relaxed);
        }
    })
}

impl Block {
    /// Leaves the mark of an access by the running thread; says which rule it breaks, if any. `place` is not constant.
    pub fn overlap_fault(
        &self,
        launch: &Running,
        place: &Place<'_>,
        bytes: usize,
        access: Access,
    ) -> Option<String> {
        let writes = !access.reads() || access == Access::Atomic;
        let (wrote, read) = place.marks.access(place.root_offset, bytes, writes, launch.number);
        let read_only = access == Access::ReadConstant;
        let last = wrote.max(read);
        if last < launch.oldest {
            return None;
        }
        let is_behind_wait = self.shadow.clocks.is_behind_wait(self.current);
        if is_behind_wait && !read_only {
            return None;
        }
        let what = if last == wrote { "writes" } else { "reads" };
        let name = self.memory().stream.name(last);
        let rule = if is_behind_wait {
            "and which was unfinished when this one began: the read-only path may show what was there before, \
             even behind grid::wait_for_previous"
        } else {
            "and which may be unfinished: this thread is not behind grid::wait_for_previous"
        };
        Some(format!("which the earlier launch of `{name}` {what}, {rule}"))
    }

    /// What is wrong with a block that has ended, if nothing in it has waited.
    pub fn check_waits(&self) -> Result<(), Fault> {
        let Some(launch) = self.running().filter(|launch| launch.has_unfinished()) else { return Ok(()) };
        if self.shadow.clocks.any_waited() {
            return Ok(());
        }
        let name = self.memory().stream.name(launch.number - 1);
        let message = format!(
            "the block ended without grid::wait_for_previous, while the earlier launch of `{name}` may be unfinished: \
             those behind this launch take its end for the end of all before it"
        );
        Err(Fault { kind: Kind::Overlap, message })
    }
}
