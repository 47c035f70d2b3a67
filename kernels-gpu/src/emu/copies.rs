//! `cp.async`: the bytes arrive when the issuing thread waits for their group, not before.
//!
//! At issue the target is poisoned and marked as under way, so that touching it before the wait is a fault and, with
//! all checks off, a NaN. The source is read at the wait: a kernel that overwrites it meanwhile sees the new values.

use std::collections::VecDeque;

use super::access::Access;
use super::block::{Block, with};
use super::report::Site;

const BYTES: usize = 16;

struct Copy {
    dst: u32,
    bounds: (u32, u32),
    src: *const u8,
    bytes: usize,
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
}

#[inline(never)]
pub(crate) fn start(dst: u32, bounds: (u32, u32), src: u64, bytes: u32, site: Site) {
    with(|block| {
        assert!(bytes as usize <= BYTES, "cp.async of {bytes} bytes, the instruction copies at most {BYTES}");
        // With no byte to copy, the source may be anything.
        let source = match bytes {
            0 => std::ptr::null(),
            _ => block.global_access(src, bytes as usize, BYTES, Access::Read, site).cast_const(),
        };
        let target = block.shared_access(block.current, dst, bounds, BYTES, Access::AsyncStart, site);
        // SAFETY: `shared_access` returned the address of `BYTES` bytes.
        unsafe { target.write_bytes(0xff, BYTES) }
        let copy = Copy { dst, bounds, src: source, bytes: bytes as usize };
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

impl Block {
    fn finish(&mut self, copy: &Copy, site: Site) {
        let target = self.shared_access(self.current, copy.dst, copy.bounds, BYTES, Access::AsyncEnd, site);
        // SAFETY: both sides were checked, the source when the copy started; allocations outlive the launch.
        unsafe {
            target.write_bytes(0, BYTES);
            if copy.bytes > 0 {
                target.copy_from_nonoverlapping(copy.src, copy.bytes);
            }
        }
    }
}
