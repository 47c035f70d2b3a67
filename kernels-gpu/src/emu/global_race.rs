//! The shadow of writable global memory: unordered accesses, of different blocks and within one.
//!
//! **Between blocks** only atomics and fences order. A block counts its fences, and a fence followed by an atomic passes
//! the block's count on to whoever reads that word atomically and fences afterwards ([`atomics`]). Of several blocks
//! that read a cell only the last is remembered.
//!
//! **Within a block** barriers order as they do for shared memory, so the clocks of [`race`] decide. Only the last
//! writing thread of a cell is remembered, so a read that comes too late is found, a write that comes too early is not;
//! and nothing is said about threads that have fenced, since they may have met through a flag.
//!
//! So some races are missed; none is invented.
//!
//! Blocks run on several OS threads, so cells (2 bytes each) are atomic. An access first leaves its marks and then looks
//! at those of others, with a sequentially consistent fence or exchange between: of two accesses that race in time, at
//! least one sees the other.
//!
//! [`atomics`]: super::atomics
//! [`race`]: super::race

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

use super::access::Access;
use super::atomics::{BlockClock, BlockOrder};
use super::memory::{Memory, Place};
use super::race::Clocks;
use super::report::Kind;

/// Bytes of global memory per cell, and cells per page. A page is allocated when first touched.
const CELL: usize = 2;
const PAGE: usize = 2048;

#[derive(Default)]
struct Cell {
    /// Marks: 0 for none, else block + 1 in the upper half, twice its count in the lower, plus 1 for an atomic write, and
    /// for reads once one of them was through the read-only path.
    write: AtomicU64,
    read: AtomicU64,
    /// The thread of the last write in the upper half, its clock's count in the lower. Only threads of the block that
    /// wrote last look at it.
    writer: AtomicU64,
}

/// Who accesses global memory.
pub(crate) struct Accessor<'a> {
    pub order: &'a BlockOrder,
    pub thread: usize,
    /// The clocks of the block, if the launch keeps them.
    pub clocks: Option<&'a Clocks>,
}

impl Accessor<'_> {
    fn mark(&self, atomic: bool) -> u64 {
        (self.order.block as u64 + 1) << 32 | (self.order.count as u64) << 1 | atomic as u64
    }

    fn writer(&self) -> u64 {
        (self.thread as u64) << 32 | self.clocks.map_or(0, |clocks| clocks.count(self.thread)) as u64
    }

    /// The thread of the own block that left `mark` and `writer`, if this access should be behind it and is not.
    fn unordered_thread(&self, mark: u64, writer: u64) -> Option<usize> {
        let (other, count) = ((writer >> 32) as usize, writer as u32);
        let unordered = mark >> 32 == self.order.block as u64 + 1
            && other != self.thread
            && !self.clocks?.knows(self.thread, other, count)
            && !self.order.has_fenced(other);
        unordered.then_some(other)
    }
}

type Page = OnceLock<Box<[Cell]>>;

/// The shadow of one launch.
pub(crate) struct GlobalRaces {
    pages: Vec<Box<[Page]>>,
    /// What was released to each word that atomics touched.
    released: Mutex<HashMap<u64, BlockClock>>,
}

impl GlobalRaces {
    pub fn new(memory: &Memory) -> GlobalRaces {
        let pages = |bytes: usize| (0..bytes.div_ceil(CELL * PAGE)).map(|_| Page::new()).collect();
        GlobalRaces { pages: memory.writable_bytes().map(pages).collect(), released: Mutex::default() }
    }

    /// Runs `f` on what was released to the word at `addr`, while no other atomic runs.
    pub fn with_released<R>(&self, addr: u64, f: impl FnOnce(&mut BlockClock) -> R) -> R {
        let mut released = self.released.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        f(released.entry(addr).or_default())
    }

    /// One access; says what is wrong with it, if anything.
    pub fn access(
        &self,
        place: &Place<'_>,
        bytes: usize,
        access: Access,
        who: &Accessor<'_>,
    ) -> Option<(Kind, String)> {
        let mark = who.mark(access == Access::Atomic);
        let (mut index, end) = (place.root_offset / CELL, (place.root_offset + bytes).div_ceil(CELL));
        while index < end {
            let page = self.pages[place.root][index / PAGE]
                .get_or_init(|| (0..PAGE).map(|_| Cell::default()).collect());
            let cells = &page[index % PAGE..PAGE.min(index % PAGE + end - index)];
            let fault = match access {
                Access::Read | Access::ReadConstant | Access::EngineRead => read(cells, access, mark, who),
                _ => cells.iter().find_map(|cell| cell.write(access, mark, who)),
            };
            if fault.is_some() {
                return fault;
            }
            index += cells.len();
        }
        None
    }
}

/// A read of some cells: one fence for all is much cheaper than an exchange for each.
fn read(cells: &[Cell], access: Access, mark: u64, who: &Accessor<'_>) -> Option<(Kind, String)> {
    let mut is_new = false;
    for cell in cells {
        is_new |= cell.leave_read(mark | (access == Access::ReadConstant) as u64);
    }
    if is_new {
        fence(Ordering::SeqCst);
    }
    cells.iter().find_map(|cell| cell.check_read(access, who))
}

impl Cell {
    /// Leaves the mark of a read; says whether it was not there.
    #[inline]
    fn leave_read(&self, mark: u64) -> bool {
        let last = self.read.load(Ordering::Relaxed);
        let mark = mark | last & 1;
        if last != mark {
            self.read.store(mark, Ordering::Relaxed);
        }
        last != mark
    }

    #[inline]
    fn check_read(&self, access: Access, who: &Accessor<'_>) -> Option<(Kind, String)> {
        let write = self.write.load(Ordering::Relaxed);
        if access.is_constant() && write != 0 {
            let text = format!("that block {} of this launch has written", (write >> 32) - 1);
            return Some((Kind::ReadOnly, text));
        }
        if !who.order.is_behind(write) {
            return Some(between_blocks(write, "write"));
        }
        who.unordered_thread(write, self.writer.load(Ordering::Relaxed)).map(within_block)
    }

    fn write(&self, access: Access, mark: u64, who: &Accessor<'_>) -> Option<(Kind, String)> {
        let write = self.write.swap(mark, Ordering::SeqCst);
        // No exchange: it matters within a block alone, which is on one OS thread.
        let writer = self.writer.load(Ordering::Relaxed);
        self.writer.store(who.writer(), Ordering::Relaxed);
        let both_atomic = access == Access::Atomic && write & 1 == 1;
        if !both_atomic && !who.order.is_behind(write) {
            return Some(between_blocks(write, if write & 1 == 1 { "atomic" } else { "write" }));
        }
        let read = self.read.load(Ordering::SeqCst);
        if read & 1 == 1 {
            let text = "that this launch has read through the read-only path";
            return Some((Kind::ReadOnly, text.into()));
        }
        if !who.order.is_behind(read) {
            return Some(between_blocks(read, "read"));
        }
        if both_atomic { None } else { who.unordered_thread(write, writer).map(within_block) }
    }
}

#[cold]
fn between_blocks(mark: u64, what: &str) -> (Kind, String) {
    let block = (mark >> 32) - 1;
    (Kind::GlobalRace, format!("races with a {what} by block {block}: only atomics with fences order blocks"))
}

#[cold]
fn within_block(thread: usize) -> (Kind, String) {
    (
        Kind::GlobalRace,
        format!("races with a write by thread {thread} of the same block: no barrier between them"),
    )
}
