//! The shadow of shared memory: races, uninitialised reads, copies under way.
//!
//! # Happens-before by vector clocks
//! Every thread counts its synchronisations; `clock[t]` is what a thread knows of thread `t`. Access *x* of thread `t`
//! at count `c` happens before access *y* of thread `u` exactly if `u` knows `t`'s count `c` at *y*. Two accesses to
//! the same memory, one of them a write, neither happening before the other, are a race, in whatever order the
//! schedule happened to run them. Only barriers and `sync_warp` pass knowledge on. A count per barrier instead of a
//! clock per thread would be wrong as soon as two named barriers are in use.
//!
//! What threads know is shared: all that met at a barrier know the same, but for their own count. So a thread's clock
//! is an index into a table of vectors plus its own count, and a barrier makes one vector ([`Clocks`]).
//!
//! # Cells
//! A cell shadows 2 bytes, the smallest access there is, so that neighbours in one word never look like a race. It
//! remembers the last write, and all reads and atomics since that write that do not happen before one another.

use std::panic::Location;

use super::access::Access;
use super::bulk::MAX_BARRIERS;
use super::report::{Kind, Site};

/// Bytes of shared memory per cell.
const CELL: usize = 2;

/// What a synchronisation passes on: for each thread of the block, then for each barrier in shared memory, a count; and
/// last, 1 if a thread it comes from is behind the wait for the launches before this one ([`overlap`](super::overlap)).
pub(crate) type Clock = Vec<u32>;

/// The clocks of a block's threads.
#[derive(Default)]
pub(crate) struct Clocks {
    /// Per thread: its own count, and the row of `rows` that holds what it knows of the others.
    own: Vec<u32>,
    row: Vec<usize>,
    /// Per thread: whether it has waited for the launches before this one.
    waited: Vec<bool>,
    rows: Vec<Clock>,
    users: Vec<usize>,
    spare_rows: Vec<usize>,
    spare: Vec<Clock>,
}

impl Clocks {
    fn reset(&mut self, threads: usize) {
        self.spare.append(&mut self.rows);
        self.users.clear();
        self.spare_rows.clear();
        self.own.clear();
        self.own.resize(threads, 1);
        let mut nothing = self.empty();
        nothing.resize(threads + MAX_BARRIERS + 1, 0);
        self.rows.push(nothing);
        self.users.push(threads);
        self.row.clear();
        self.row.resize(threads, 0);
        self.waited.clear();
        self.waited.resize(threads, false);
    }

    /// `thread` waits for the launches before this one.
    pub fn wait_for_launches(&mut self, thread: usize) {
        self.waited[thread] = true;
    }

    /// Every thread has waited for them, or is ordered behind one that has.
    pub fn all_wait_for_launches(&mut self) {
        self.waited.fill(true);
    }

    /// Whether some thread has.
    pub fn any_waited(&self) -> bool {
        self.waited.contains(&true)
    }

    /// Whether `thread` has, or is ordered behind one that has.
    #[inline]
    pub fn is_behind_wait(&self, thread: usize) -> bool {
        self.waited[thread] || self.rows[self.row[thread]][self.own.len() + MAX_BARRIERS] != 0
    }

    /// How often `thread` has synchronised.
    pub fn count(&self, thread: usize) -> u32 {
        self.own[thread]
    }

    /// Whether what `other` did at `count` happened before what `thread` does now.
    pub fn knows(&self, thread: usize, other: usize, count: u32) -> bool {
        self.rows[self.row[thread]][other] >= count
    }

    /// A clock without entries, to [`release`](Clocks::release) into.
    pub fn empty(&mut self) -> Clock {
        let mut clock = self.spare.pop().unwrap_or_default();
        clock.clear();
        clock
    }

    /// Adds what `thread` has done and knows to `clock`.
    pub fn release(&self, thread: usize, clock: &mut Clock) {
        let row = &self.rows[self.row[thread]];
        // Neighbours mostly share their row, and then it is in `clock` already.
        let shared = thread > 0 && self.row[thread - 1] == self.row[thread];
        if clock.is_empty() {
            clock.extend_from_slice(row);
        } else if !shared || clock[thread - 1] < self.own[thread - 1] {
            clock.iter_mut().zip(row).for_each(|(known, new)| *known = (*known).max(*new));
        }
        clock[thread] = self.own[thread];
        if self.waited[thread] {
            clock[self.own.len() + MAX_BARRIERS] = 1;
        }
    }

    /// Gives `threads` the knowledge in `clock`. What they do from now on is not part of it.
    pub fn acquire(&mut self, threads: impl Iterator<Item = usize>, clock: Clock) {
        let row = self.spare_rows.pop().unwrap_or_else(|| {
            self.rows.push(Clock::new());
            self.users.push(0);
            self.rows.len() - 1
        });
        self.rows[row] = clock;
        for thread in threads {
            let old = std::mem::replace(&mut self.row[thread], row);
            self.users[row] += 1;
            self.users[old] -= 1;
            if self.users[old] == 0 {
                self.spare.push(std::mem::take(&mut self.rows[old]));
                self.spare_rows.push(old);
            }
            self.own[thread] += 1;
        }
        if self.users[row] == 0 {
            self.spare.push(std::mem::take(&mut self.rows[row]));
            self.spare_rows.push(row);
        }
    }

    /// Gives one thread the knowledge in `clock`, beside its own.
    pub fn learn(&mut self, thread: usize, clock: &Clock) {
        let mut known = self.empty();
        let own = &self.rows[self.row[thread]];
        known.extend(own.iter().zip(clock).map(|(own, new)| own.max(new)));
        self.acquire(std::iter::once(thread), known);
    }

    /// Starts a new count: what `thread` does from now on is not part of what it has released.
    pub fn advance(&mut self, thread: usize) {
        self.own[thread] += 1;
    }

    /// All of `threads` learn what each of them has done.
    pub fn synchronise(&mut self, threads: impl Iterator<Item = usize> + Clone) {
        let mut clock = self.empty();
        threads.clone().for_each(|thread| self.release(thread, &mut clock));
        self.acquire(threads, clock);
    }
}

/// One access that a later one may race with.
#[derive(Clone, Copy)]
struct Stamp {
    /// The thread's count; 0: no access.
    count: u32,
    /// A thread of the block, or behind those the barrier that counts a bulk copy.
    thread: u16,
    atomic: bool,
    site: Site,
}

impl Stamp {
    /// `the write by thread 3 at file:1:2`, or the bulk copy there.
    #[cold]
    fn describe(&self, what: &str, threads: usize) -> String {
        let Stamp { thread, site, .. } = self;
        if (*thread as usize) < threads {
            format!("the {what} by thread {thread} at {site}")
        } else {
            format!("the bulk copy started at {site}")
        }
    }
}

const NEVER: Stamp = Stamp { count: 0, thread: 0, atomic: false, site: Location::caller() };

#[derive(Clone, Copy)]
struct Cell {
    write: Stamp,
    /// A read or atomic since `write`; further ones are in list `others` of the overflow.
    since: Stamp,
    /// 0: none.
    others: u32,
    has_reads: bool,
    has_atomics: bool,
    initialised: bool,
    in_flight: bool,
}

const FRESH: Cell = Cell {
    write: NEVER,
    since: NEVER,
    others: 0,
    has_reads: false,
    has_atomics: false,
    initialised: false,
    in_flight: false,
};

/// Which of the shadow's checks are on.
#[derive(Clone, Copy)]
pub(crate) struct Checks {
    pub races: bool,
    pub uninitialised: bool,
}

/// Accesses that do not fit into their cells: per cell that needs one, a list sorted by thread and kind.
#[derive(Default)]
struct Overflow {
    lists: Vec<Vec<Stamp>>,
    used: usize,
}

impl Overflow {
    fn list(&self, number: u32) -> &[Stamp] {
        if number == 0 { &[] } else { &self.lists[number as usize - 1] }
    }

    fn clear(&mut self, number: u32) {
        if number != 0 {
            self.lists[number as usize - 1].clear();
        }
    }

    /// Puts `stamp` into a list, in the place of an older one of the same thread and kind; returns the list's number.
    #[inline(never)]
    fn insert(&mut self, mut number: u32, stamp: Stamp) -> u32 {
        if number == 0 {
            if self.used == self.lists.len() {
                self.lists.push(Vec::new());
            }
            self.lists[self.used].clear();
            self.used += 1;
            number = self.used as u32;
        }
        let list = &mut self.lists[number as usize - 1];
        match list.binary_search_by_key(&(stamp.thread, stamp.atomic), |s| (s.thread, s.atomic)) {
            Ok(at) => list[at] = stamp,
            Err(at) => list.insert(at, stamp),
        }
        number
    }
}

/// The accessing thread: its stamp, and what it knows of others.
struct Accessor<'a> {
    stamp: Stamp,
    thread: u16,
    access: Access,
    known: &'a [u32],
}

impl Accessor<'_> {
    fn is_behind(&self, other: &Stamp) -> bool {
        other.count == 0 || other.thread == self.thread || self.known[other.thread as usize] >= other.count
    }

    /// An earlier access to the cell that this one needs to be ordered behind, and is not.
    #[inline]
    fn conflict(&self, cell: &Cell, overflow: &Overflow) -> Option<(Stamp, &'static str)> {
        if !self.is_behind(&cell.write) {
            return Some((cell.write, "write"));
        }
        let relevant = match self.access {
            Access::Read => cell.has_atomics,
            Access::Atomic => cell.has_reads,
            _ => cell.since.count != 0,
        };
        if !relevant {
            return None;
        }
        let harmless = |stamp: &Stamp| match self.access {
            Access::Read => !stamp.atomic,
            Access::Atomic => stamp.atomic,
            _ => false,
        };
        let all = std::iter::once(&cell.since).chain(overflow.list(cell.others));
        let found = all.into_iter().find(|stamp| !harmless(stamp) && !self.is_behind(stamp))?;
        Some((*found, if found.atomic { "atomic" } else { "read" }))
    }

    #[inline]
    fn record(&self, cell: &mut Cell, overflow: &mut Overflow) {
        if self.access == Access::BulkEnd {
            // Written by the barrier, in a phase that the waiting thread need not be the only one to know.
            cell.in_flight = false;
            return;
        }
        if !matches!(self.access, Access::Read | Access::Atomic) {
            overflow.clear(cell.others);
            cell.write = self.stamp;
            cell.since.count = 0;
            cell.has_reads = false;
            cell.has_atomics = false;
            cell.initialised = true;
            cell.in_flight = self.access.starts_copy();
            return;
        }
        // An access that happens before this one, of the same kind, adds nothing: whoever is ordered behind this one is
        // ordered behind it too.
        let first = &mut cell.since;
        if first.count == 0 || first.atomic == self.stamp.atomic && self.is_behind(first) {
            *first = self.stamp;
        } else {
            cell.others = overflow.insert(cell.others, self.stamp);
        }
        cell.has_reads |= self.access == Access::Read;
        cell.has_atomics |= self.access == Access::Atomic;
        cell.initialised |= self.access == Access::Atomic;
    }
}

/// The shadow of one block's shared memory.
#[derive(Default)]
pub(crate) struct Shadow {
    pub clocks: Clocks,
    cells: Vec<Cell>,
    overflow: Overflow,
    /// Per thread, the count up to which its writes are known to the tensor cores, and the writes of others that it knew of when it
    /// last said so: these are known to its own products.
    fenced: Vec<(u32, Clock)>,
    /// Cells that may differ from `FRESH`.
    touched: std::ops::Range<usize>,
}

impl Shadow {
    /// Forgets the last block.
    pub fn reset(&mut self, bytes: usize, threads: usize) {
        self.clocks.reset(threads);
        self.cells[self.touched.clone()].fill(FRESH);
        self.touched = 0..0;
        self.cells.resize(bytes.div_ceil(CELL), FRESH);
        self.overflow.used = 0;
        self.fenced.resize_with(threads, Default::default);
        for (count, known) in &mut self.fenced {
            *count = 0;
            known.clear();
        }
    }

    /// What `thread` has written so far is known to the tensor cores, once others are ordered behind it; what it knows of others, to
    /// its own products.
    pub fn fence_writes(&mut self, thread: usize) {
        let (count, known) = &mut self.fenced[thread];
        *count = self.clocks.own[thread];
        known.clone_from(&self.clocks.rows[self.clocks.row[thread]]);
        self.clocks.advance(thread);
    }

    /// The first byte that a thread has written with no [`fence_writes`](Self::fence_writes) since, neither its own nor one by each
    /// of the threads `by` that knew of it; and the thread.
    pub fn unfenced(&self, addr: usize, bytes: usize, by: std::ops::Range<usize>) -> Option<(usize, usize)> {
        let is_unfenced = |write: &Stamp| {
            let thread = write.thread as usize;
            let knows =
                |(_, known): &(u32, Clock)| known.get(thread).is_some_and(|&count| count >= write.count);
            let own = self.fenced.get(thread);
            own.is_some_and(|own| write.count > own.0) && !self.fenced[by.clone()].iter().all(knows)
        };
        let cells = self.cells[addr / CELL..(addr + bytes) / CELL].iter().zip((addr..).step_by(CELL));
        cells
            .filter_map(|(cell, byte)| {
                let since = std::iter::once(&cell.since).chain(self.overflow.list(cell.others));
                let writes = std::iter::once(&cell.write).chain(since.filter(|stamp| stamp.atomic));
                writes.into_iter().find(|stamp| is_unfenced(stamp)).map(|stamp| (byte, stamp.thread as usize))
            })
            .next()
    }

    /// One access of `thread` to `bytes` bytes at `addr`, both multiples of [`CELL`]; an error says what is wrong.
    pub fn access(
        &mut self,
        thread: usize,
        addr: usize,
        bytes: usize,
        access: Access,
        checks: Checks,
        site: Site,
    ) -> Result<(), (Kind, String)> {
        let range = addr / CELL..(addr + bytes) / CELL;
        self.touched = if self.touched.is_empty() {
            range.clone()
        } else {
            self.touched.start.min(range.start)..self.touched.end.max(range.end)
        };
        let threads = self.clocks.own.len();
        let (count, by) = match access {
            Access::BulkStart { barrier, phase } => (phase + 1, threads + barrier as usize),
            _ => (self.clocks.own[thread], thread),
        };
        let stamp = Stamp { count, thread: by as u16, atomic: access == Access::Atomic, site };
        let known = &self.clocks.rows[self.clocks.row[thread]];
        let accessor = Accessor { stamp, thread: thread as u16, access, known };
        for (cell, byte) in self.cells[range].iter_mut().zip((addr..).step_by(CELL)) {
            if cell.in_flight && !access.ends_copy() {
                return Err(in_flight(access, byte, &cell.write.describe("cp.async", threads)));
            }
            if checks.uninitialised && !cell.initialised && access.reads() {
                return Err(uninitialised(access, byte));
            }
            if checks.races
                && !access.ends_copy()
                && let Some((other, what)) = accessor.conflict(cell, &self.overflow)
            {
                return Err(race(access, byte, &other.describe(what, threads)));
            }
            accessor.record(cell, &mut self.overflow);
        }
        Ok(())
    }
}

impl Shadow {
    /// What is wrong with an access by another block, which the clocks know nothing of: a read of what nothing has written.
    pub fn access_by_other(&mut self, addr: usize, bytes: usize, access: Access) -> Option<(Kind, String)> {
        let range = addr / CELL..(addr + bytes) / CELL;
        if !access.reads() {
            self.touched = if self.touched.is_empty() {
                range.clone()
            } else {
                self.touched.start.min(range.start)..self.touched.end.max(range.end)
            };
            self.cells[range].iter_mut().for_each(|cell| cell.initialised = true);
            return None;
        }
        let missing = self.cells[range].iter().position(|cell| !cell.initialised)?;
        Some(uninitialised(Access::Read, addr + missing * CELL))
    }
}

#[cold]
fn in_flight(access: Access, byte: usize, copy: &str) -> (Kind, String) {
    (Kind::AsyncCopy, format!("{access} of shared byte {byte} while {copy} is under way (no wait yet)"))
}

#[cold]
fn uninitialised(access: Access, byte: usize) -> (Kind, String) {
    (Kind::Uninitialised, format!("{access} of shared byte {byte} that nothing has written"))
}

#[cold]
fn race(access: Access, byte: usize, other: &str) -> (Kind, String) {
    (Kind::Race, format!("{access} of shared byte {byte} races with {other}"))
}
