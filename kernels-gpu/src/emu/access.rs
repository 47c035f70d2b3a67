//! One access to memory: bounds, alignment, permission, and the shadows.

use std::fmt;

use super::block::{Block, with};
use super::global_race::Accessor;
use super::race::Checks;
use super::report::{Kind, Site};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    /// Through the read-only path: nothing may write there during the launch.
    ReadConstant,
    /// By the copy engine, which does not see what the launch writes either.
    EngineRead,
    Write,
    Atomic,
    /// A `cp.async` begins to write.
    AsyncStart,
    /// It has written.
    AsyncEnd,
    /// A bulk copy begins to write, which this phase of this barrier counts.
    BulkStart {
        barrier: u16,
        phase: u32,
    },
    /// It has written.
    BulkEnd,
}

impl Access {
    /// Whether its outcome depends on what is there.
    pub fn reads(self) -> bool {
        matches!(self, Access::Read | Access::Atomic) || self.is_constant()
    }

    /// Whether it is a read that does not see what the launch writes.
    pub fn is_constant(self) -> bool {
        matches!(self, Access::ReadConstant | Access::EngineRead)
    }

    /// Whether it is the begin of a copy.
    pub fn starts_copy(self) -> bool {
        matches!(self, Access::AsyncStart | Access::BulkStart { .. })
    }

    /// Whether it is the end of a copy.
    pub fn ends_copy(self) -> bool {
        matches!(self, Access::AsyncEnd | Access::BulkEnd)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::ReadConstant => "read-only load",
            Access::EngineRead => "read by the copy engine",
            Access::Write => "write",
            Access::Atomic => "atomic",
            Access::AsyncStart => "cp.async",
            Access::AsyncEnd => "end of a cp.async",
            Access::BulkStart { .. } => "bulk copy",
            Access::BulkEnd => "end of a bulk copy",
        })
    }
}

/// Now and then true: the running lane should suspend before its access to shared memory, since the schedule asks for it
/// or since it has had many accesses.
#[inline(always)]
pub(crate) fn preempted() -> bool {
    with(|block| block.options.preempt != 0 && block.preempt() || block.tires())
}

/// The same before an access to global memory, where the schedule does not ask.
#[inline(always)]
pub(crate) fn tires() -> bool {
    with(|block| block.tires())
}

/// The host address of `bytes` bytes of shared memory at `addr`, of an array that occupies `bounds`.
#[inline(never)]
pub(crate) fn shared(addr: u32, bounds: (u32, u32), bytes: usize, access: Access, site: Site) -> *mut u8 {
    with(|block| block.shared_access(block.current, addr, bounds, bytes, access, site))
}

/// The host address of `bytes` bytes of global memory at `addr`.
#[inline(never)]
pub(crate) fn global(addr: u64, bytes: usize, access: Access, site: Site) -> *mut u8 {
    with(|block| block.global_access(addr, bytes, bytes, access, site))
}

impl Block {
    #[inline(never)]
    fn preempt(&mut self) -> bool {
        let now = self.is_random() && self.random(self.options.preempt) == 0;
        if now {
            self.requeue();
        }
        now
    }

    /// The checks of a shared access by `thread`, which need not be the running one: in `ldmatrix` each lane reads the
    /// row it names.
    pub fn shared_access(
        &mut self,
        thread: usize,
        addr: u32,
        bounds: (u32, u32),
        bytes: usize,
        access: Access,
        site: Site,
    ) -> *mut u8 {
        let at = addr as usize;
        if let Some((kind, what)) = self.bounds_fault(addr, bounds, bytes, access) {
            self.current = thread;
            self.fail(kind, what, site);
        }
        if !self.operands_under_way.is_empty() && !access.reads() && self.is_read_by_product(addr, bytes) {
            self.current = thread;
            let what =
                format!("{access} of shared byte {addr}, which a product under way reads (no wait yet)");
            self.fail(Kind::Warpgroup, what, site);
        }
        let checks = Checks { races: self.options.races, uninitialised: self.options.uninitialised };
        let copies = access.starts_copy() || access.ends_copy();
        if (checks.races || checks.uninitialised || copies)
            && let Err((kind, what)) = self.shadow.access(thread, at, bytes, access, checks, site)
        {
            self.current = thread;
            self.fail(kind, what, site);
        }
        if checks.races
            && let Some(what) =
                self.cluster.access(true, (self.rank_in_cluster(), thread), (at, bytes), access, site)
        {
            self.current = thread;
            self.fail(Kind::Race, what, site);
        }
        // SAFETY: `at + bytes <= end <= shared_bytes`, the size of the buffer rounded up.
        unsafe { self.shared.as_mut_ptr().cast::<u8>().add(at) }
    }

    /// What is wrong with the place of an access to shared memory, if anything.
    pub fn bounds_fault(
        &self,
        addr: u32,
        (begin, end): (u32, u32),
        bytes: usize,
        access: Access,
    ) -> Option<(Kind, String)> {
        let at = addr as usize;
        let (kind, why) = if end > self.dims.shared_bytes {
            let have = self.dims.shared_bytes;
            (
                Kind::SharedBounds,
                format!("its array (bytes {begin} to {end}) passes the {have} of the launch"),
            )
        } else if addr < begin || at + bytes > end as usize {
            (Kind::SharedBounds, format!("it leaves its array (bytes {begin} to {end})"))
        } else if !at.is_multiple_of(bytes.min(16)) {
            (Kind::Misaligned, format!("the address is no multiple of {}", bytes.min(16)))
        } else {
            return None;
        };
        Some((kind, format!("{bytes}-byte {access} at shared byte {addr}: {why}")))
    }

    /// The checks of a global access by the running lane.
    pub fn global_access(
        &mut self,
        addr: u64,
        bytes: usize,
        align: usize,
        access: Access,
        site: Site,
    ) -> *mut u8 {
        if !addr.is_multiple_of(align as u64) {
            let what = format!("{bytes}-byte {access} at global address {addr:#x}: no multiple of {align}");
            self.fail(Kind::Misaligned, what, site);
        }
        let place = match self.memory().resolve(addr, bytes, access) {
            Ok(place) => place,
            Err((kind, why)) => self.fail(kind, format!("{bytes}-byte global {access}: {why}"), site),
        };
        let clocks = self.options.races.then_some(&self.shadow.clocks);
        let who = Accessor { order: &self.order, thread: self.current, clocks };
        if let (Some(races), false) = (self.global_races(), place.constant)
            && let Some((kind, why)) = races.access(&place, bytes, access, &who)
        {
            let (name, offset) = (self.memory().name(place.named), place.offset);
            self.fail(kind, format!("{access} of byte {offset} of `{name}` {why}"), site);
        }
        if (!access.reads() || access == Access::Atomic)
            && self.under_way.may_read(place.host.addr(), bytes)
            && let Some(copy) = self.copy_from(place.host.addr(), bytes)
        {
            let (name, offset) = (self.memory().name(place.named), place.offset);
            let what = format!(
                "{access} of byte {offset} of `{name}`, from where the copy started at {copy} reads (no wait yet)"
            );
            self.fail(Kind::AsyncCopy, what, site);
        }
        if let (Some(launch), false) = (self.running(), place.constant)
            && let Some(why) = self.overlap_fault(launch, &place, bytes, access)
        {
            let (name, offset) = (self.memory().name(place.named), place.offset);
            let what = format!("{access} of byte {offset} of `{name}` (address {addr:#x}), {why}");
            self.fail(Kind::Overlap, what, site);
        }
        place.host
    }
}
