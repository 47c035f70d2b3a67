//! `cp.async`: the bytes arrive when the issuing thread waits for their group, not before.
//!
//! At issue the target is poisoned and marked as under way, so that touching it before the wait is a fault and, with
//! all checks off, a NaN. The source is read at the wait: a kernel that overwrites it meanwhile sees the new values, and
//! is reported, as it is for the sources of bulk copies.

use std::collections::VecDeque;
use std::ops::Range;

use super::access::Access;
use super::block::{Block, with};
use super::bulk::MBarrier;
use super::report::{Fault, Kind, Site};

const BYTES: usize = 16;

/// Where a copy under way reads: host address, bytes, and the place that issued it.
pub(crate) struct Source {
    pub start: *const u8,
    pub bytes: usize,
    pub site: Site,
}

/// How many copies of a block are under way, and a range that holds the sources of all.
#[derive(Default)]
pub(crate) struct UnderWay {
    copies: usize,
    hull: Range<usize>,
}

impl UnderWay {
    /// One more.
    pub fn start(&mut self, source: &Source) {
        let (start, end) = (source.start.addr(), source.start.addr() + source.bytes);
        self.hull = match self.copies {
            0 => start..end,
            _ => self.hull.start.min(start)..self.hull.end.max(end),
        };
        self.copies += 1;
    }

    /// One fewer.
    pub fn end(&mut self) {
        self.copies -= 1;
    }

    /// Whether some may read from there.
    #[inline]
    pub fn may_read(&self, start: usize, bytes: usize) -> bool {
        self.copies > 0 && start < self.hull.end && start + bytes > self.hull.start
    }
}

struct Copy {
    dst: u32,
    bounds: (u32, u32),
    src: Source,
}

/// The copies of one thread: those not yet committed, and the groups under way, oldest first.
#[derive(Default)]
pub(crate) struct Copies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Copies {
    pub fn clear(&mut self) {
        self.open.clear();
        self.groups.clear();
    }

    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.groups.iter().flatten().chain(&self.open).map(|copy| &copy.src)
    }
}

#[inline(never)]
pub(crate) fn start(dst: u32, bounds: (u32, u32), src: u64, bytes: u32, site: Site) {
    with(|block| {
        assert!(bytes as usize <= BYTES, "cp.async of {bytes} bytes, the instruction copies at most {BYTES}");
        // With no byte to copy, the source may be anything.
        let start = match bytes {
            0 => std::ptr::null(),
            _ => block.global_access(src, bytes as usize, BYTES, Access::Read, site).cast_const(),
        };
        let target = block.shared_access(block.current, dst, bounds, BYTES, Access::AsyncStart, site);
        // SAFETY: `shared_access` returned the address of `BYTES` bytes.
        unsafe { target.write_bytes(0xff, BYTES) }
        let copy = Copy { dst, bounds, src: Source { start, bytes: bytes as usize, site } };
        if bytes > 0 {
            block.under_way.start(&copy.src);
        }
        block.copies[block.current].open.push(copy);
    })
}

#[inline(never)]
pub(crate) fn commit() {
    with(|block| {
        let copies = &mut block.copies[block.current];
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    })
}

#[inline(never)]
pub(crate) fn wait(pending: usize, site: Site) {
    with(|block| {
        while block.copies[block.current].groups.len() > pending {
            let group = block.copies[block.current].groups.pop_front();
            for copy in group.iter().flatten() {
                block.finish(copy, site);
            }
        }
    })
}

/// The running thread's copies land, those of no group, too.
#[inline(never)]
pub(crate) fn finish_all(site: Site) {
    commit();
    wait(0, site)
}

impl Block {
    fn finish(&mut self, copy: &Copy, site: Site) {
        let target = self.shared_access(self.current, copy.dst, copy.bounds, BYTES, Access::AsyncEnd, site);
        // SAFETY: both sides were checked, the source when the copy started; allocations outlive the launch.
        unsafe {
            target.write_bytes(0, BYTES);
            if copy.src.bytes > 0 {
                target.copy_from_nonoverlapping(copy.src.start, copy.src.bytes);
                self.under_way.end();
            }
        }
    }

    /// The place of a copy under way that reads from there.
    #[cold]
    pub fn copy_from(&self, start: usize, bytes: usize) -> Option<Site> {
        let by_threads = self.copies.iter().flat_map(Copies::sources);
        let mut all = by_threads.chain(self.mbarriers.iter().flat_map(MBarrier::sources));
        let reads = |source: &&Source| {
            let from = source.start.addr();
            from < start + bytes && start < from + source.bytes
        };
        all.find(reads).map(|source| source.site)
    }

    /// A block must not end before its copies have: whoever issued a `cp.async` waits for it, and somebody for each bulk
    /// copy.
    pub fn check_copies(&self) -> Result<(), Fault> {
        let fault = |message| Err(Fault { kind: Kind::AsyncCopy, message });
        if self.mbarriers.iter().any(MBarrier::has_copies) {
            return fault("the block ended with a bulk copy under way that nobody has waited for".into());
        }
        for (thread, copies) in self.copies.iter().enumerate() {
            if let Some(Source { site, .. }) = copies.sources().next() {
                let who = self.describe(thread);
                return fault(format!(
                    "{who} ended with a cp.async under way that it has not waited for, at {site}"
                ));
            }
        }
        Ok(())
    }
}
