//! Device memory, and which allocation an address belongs to.
//!
//! A device address is the number of its allocation, shifted by 40 bits, plus an offset. So no arithmetic short of a
//! terabyte leads from one allocation into another: every overrun is seen, and looking an address up is one index.

use std::cell::UnsafeCell;

use super::access::Access;
use super::overlap::{Marks, Stream};
use super::report::Kind;
use super::slots::Slots;
use crate::simt::data::Pod;
use crate::simt::global::{GlobalMut, GlobalPtr};

const OFFSET_BITS: u32 = 40;

/// Device memory is handed out in these units, aligned as a driver's allocations are.
#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Line([u8; 256]);

struct Allocation {
    name: String,
    bytes: usize,
    read_only: bool,
    home: Home,
}

/// Where the bytes of an allocation are.
enum Home {
    Own {
        lines: Box<[UnsafeCell<Line>]>,
        marks: Marks,
    },
    /// In the allocation with number `root`, from byte `start` on.
    View {
        root: u32,
        start: usize,
    },
}

/// The memory of an emulated device: what its launches may touch.
///
/// Contents of a fresh allocation are 0xff bytes, NaN in every float format.
#[derive(Default)]
pub struct Memory {
    allocations: Slots<Allocation>,
    /// The launches so far.
    pub(super) stream: Stream,
}

// SAFETY: blocks on several OS threads write through the cells, as blocks of a GPU do. Host-side methods that read take
// `&self` and those that write `&mut self`; a launch borrows the memory for as long as it runs, and returns once all
// its OS threads have ended. Two blocks that write the same place unordered are a fault of the kernel, which the
// emulator reports (`Kind::GlobalRace`).
unsafe impl Sync for Memory {}

/// A resolved address.
pub(crate) struct Place<'a> {
    pub host: *mut u8,
    /// Slot of the allocation or view that the address names, and the offset in it.
    pub named: usize,
    pub offset: usize,
    /// Number of the allocation that holds the bytes, its slot, its marks, and the offset in it.
    number: u32,
    pub root: usize,
    pub marks: &'a Marks,
    pub root_offset: usize,
    /// Whether the bytes cannot change during a launch.
    pub constant: bool,
}

impl Memory {
    /// A device without allocations.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// An uninitialised allocation of `bytes` bytes; `name` is what reports call it. Returns its address.
    pub fn alloc_bytes(&mut self, name: &str, bytes: usize) -> u64 {
        assert!(
            bytes < 1 << (OFFSET_BITS - 1),
            "an emulated allocation is at most 512 GiB, asked for {bytes} bytes"
        );
        let lines = vec![Line([0xff; 256]); bytes.div_ceil(256)].into_iter().map(UnsafeCell::new);
        let home = Home::Own { lines: lines.collect(), marks: Marks::new(bytes) };
        self.insert(Allocation { name: name.into(), bytes, read_only: false, home })
    }

    /// Takes an allocation in; returns its address.
    fn insert(&mut self, allocation: Allocation) -> u64 {
        (self.allocations.insert(allocation) as u64) << OFFSET_BITS
    }

    /// An uninitialised allocation of `len` elements.
    pub fn alloc<T: Pod>(&mut self, name: &str, len: usize) -> GlobalMut<T> {
        GlobalMut::from_addr(self.alloc_bytes(name, len * size_of::<T>()))
    }

    /// An allocation that holds `values`.
    pub fn buffer<T: Pod>(&mut self, name: &str, values: &[T]) -> GlobalMut<T> {
        let ptr = self.alloc(name, values.len());
        self.write(ptr, values);
        ptr
    }

    /// An allocation that holds `values` and that kernels may not write.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T]) -> GlobalPtr<T> {
        let ptr = self.buffer(name, values);
        let allocation = self.allocations.get_mut((ptr.addr() >> OFFSET_BITS) as u32);
        allocation.expect("just allocated").read_only = true;
        ptr.as_const()
    }

    /// `bytes` bytes from `addr` on under a name and an address of their own, so that leaving them is reported even where
    /// the allocation goes on: for workspaces that hold many arrays. Contents are shared with the allocation.
    ///
    /// # Panics
    /// If they are not inside one allocation.
    pub fn view_bytes(&mut self, name: &str, addr: u64, bytes: usize) -> u64 {
        let place = match self.resolve(addr, bytes, Access::Read) {
            Ok(place) => place,
            Err((_, why)) => panic!("view of {bytes} bytes: {why}"),
        };
        let home = Home::View { root: place.number, start: place.root_offset };
        let read_only = place.constant;
        self.insert(Allocation { name: name.into(), bytes, read_only, home })
    }

    /// [`view_bytes`](Memory::view_bytes) of `len` elements.
    ///
    /// # Panics
    /// If they are not inside one allocation.
    pub fn view<T: Pod>(&mut self, name: &str, ptr: GlobalMut<T>, len: usize) -> GlobalMut<T> {
        GlobalMut::from_addr(self.view_bytes(name, ptr.addr(), len * size_of::<T>()))
    }

    /// Ends an allocation or a view. Any later access to it, or to a view of it, is reported.
    ///
    /// # Panics
    /// If `addr` is not the start of a live allocation.
    pub fn free(&mut self, addr: u64) {
        let starts = addr.is_multiple_of(1 << OFFSET_BITS);
        let freed = starts.then(|| self.allocations.remove((addr >> OFFSET_BITS) as u32)).flatten();
        assert!(freed.is_some(), "{addr:#x} is not the start of a live allocation");
    }

    /// The `len` elements from `ptr` on.
    ///
    /// # Panics
    /// If they are not inside one allocation.
    pub fn read<T: Pod>(&self, ptr: GlobalMut<T>, len: usize) -> Vec<T> {
        let host = self.host_range(ptr.addr(), len * size_of::<T>());
        // SAFETY: the range is inside the allocation, no launch runs (it would borrow `self`, and a kernel cannot call
        // this), and every bit pattern is a `T`.
        (0..len).map(|i| unsafe { host.cast::<T>().add(i).read_unaligned() }).collect()
    }

    /// Writes `values` from `ptr` on.
    ///
    /// # Panics
    /// If they do not fit into the allocation.
    pub fn write<T: Pod>(&mut self, ptr: GlobalMut<T>, values: &[T]) {
        let host = self.host_range(ptr.addr(), size_of_val(values));
        // SAFETY: the range is inside the allocation, and `&mut self` excludes everyone else.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), host, size_of_val(values)) }
    }

    /// Copies bytes from device address `addr` on.
    ///
    /// # Panics
    /// If they are not inside one allocation.
    pub fn copy_out(&self, addr: u64, bytes: &mut [u8]) {
        let host = self.host_range(addr, bytes.len());
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies bytes to device address `addr` on.
    ///
    /// # Panics
    /// If they do not fit into the allocation.
    pub fn copy_in(&mut self, addr: u64, bytes: &[u8]) {
        let host = self.host_range(addr, bytes.len());
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) }
    }

    /// Waits until all launches so far have ended, so that the next overlaps with none ([`Options::overlap`]). Whatever the
    /// host reads or writes is waited for too.
    ///
    /// [`Options::overlap`]: super::Options::overlap
    pub fn synchronize(&self) {
        self.stream.synchronize()
    }

    fn host_range(&self, addr: u64, bytes: usize) -> *mut u8 {
        self.synchronize();
        match self.resolve(addr, bytes, Access::Read) {
            Ok(place) => place.host,
            Err((_, why)) => panic!("copy of {bytes} bytes: {why}"),
        }
    }

    /// Where an access goes, or what is wrong with it.
    pub(super) fn resolve(
        &self,
        addr: u64,
        bytes: usize,
        access: Access,
    ) -> Result<Place<'_>, (Kind, String)> {
        let number = (addr >> OFFSET_BITS) as u32;
        let offset = (addr & ((1 << OFFSET_BITS) - 1)) as usize;
        let found = self.allocations.find(number);
        let Some((named, to)) = found.and_then(|slot| Some((slot, self.allocations.get(slot)?))) else {
            return Err((Kind::GlobalBounds, self.explain(addr, bytes)));
        };
        if offset + bytes > to.bytes {
            return Err((Kind::GlobalBounds, self.explain(addr, bytes)));
        }
        let writes = !access.reads() || access == Access::Atomic;
        if to.read_only && writes {
            return Err((Kind::ReadOnly, format!("`{}` is an input", to.name)));
        }
        let (number, root, start) = match to.home {
            Home::Own { .. } => (number, Some(named), 0),
            Home::View { root, start } => (root, self.allocations.find(root), start),
        };
        let found = root.and_then(|slot| Some((slot, self.allocations.get(slot)?)));
        let Some((root, Allocation { home: Home::Own { lines, marks }, read_only, .. })) = found else {
            return Err((
                Kind::GlobalBounds,
                format!("the allocation that `{}` is a view of was freed", to.name),
            ));
        };
        let root_offset = start + offset;
        let host = lines.as_ptr().cast::<u8>().cast_mut().wrapping_add(root_offset);
        Ok(Place { host, named, offset, number, root, marks, root_offset, constant: *read_only })
    }

    fn explain(&self, addr: u64, bytes: usize) -> String {
        // An offset in the upper half is a step back from the next allocation.
        let number = ((addr as u128 + (1 << (OFFSET_BITS - 1))) >> OFFSET_BITS) as u32;
        let start = (number as u64) << OFFSET_BITS;
        match self.allocations.find(number).and_then(|slot| self.allocations.get(slot)) {
            Some(to) if addr < start => {
                format!("it begins {} bytes before the start of `{}`", start - addr, to.name)
            }
            Some(to) => {
                let end = addr - start + bytes as u64;
                let past = end - to.bytes as u64;
                format!("it ends {past} bytes past the end of `{}` ({} bytes)", to.name, to.bytes)
            }
            None if self.allocations.is_gone(number) => {
                format!("the allocation of address {addr:#x} was freed")
            }
            None => format!("address {addr:#x} belongs to no allocation"),
        }
    }

    /// Name of the allocation in a slot.
    pub(super) fn name(&self, allocation: usize) -> &str {
        self.allocations.get(allocation).map_or("(freed)", |a| &a.name)
    }

    /// For each slot, the size in bytes of an allocation that kernels may write; 0 for the others, views among them.
    pub(super) fn writable_bytes(&self) -> impl Iterator<Item = usize> + '_ {
        self.allocations.iter().map(|allocation| match allocation {
            Some(Allocation { home: Home::Own { .. }, read_only: false, bytes, .. }) => *bytes,
            _ => 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_survive_the_round_trip() {
        let mut memory = Memory::new();
        let values: Vec<u16> = (0..1000).collect();
        let a = memory.buffer("a", &values);
        let b = memory.alloc::<u16>("b", 3);
        memory.write(b.add(1), &[7, 8]);
        assert_eq!(memory.read(a, 1000), values);
        assert_eq!(memory.read(b, 3), [0xffff, 7, 8]);
        let mut bytes = [0; 4];
        memory.copy_out(b.addr() + 2, &mut bytes);
        assert_eq!(bytes, [7, 0, 8, 0]);
    }

    #[test]
    fn views_share_contents_and_have_bounds_of_their_own() {
        let mut memory = Memory::new();
        let all = memory.buffer("all", &[0u32, 1, 2, 3, 4, 5]);
        let middle = memory.view("middle", all.add(2), 3);
        let last = memory.view("last", middle.add(2), 1);
        memory.write(last, &[40]);
        assert_eq!(memory.read(all, 6), [0, 1, 2, 3, 40, 5]);
        assert_eq!(memory.read(middle, 3), [2, 3, 40]);
        let fault = |memory: &Memory, addr| memory.resolve(addr, 4, Access::Read).map(|_| ()).unwrap_err().1;
        assert!(fault(&memory, middle.add(3).addr()).contains("4 bytes past the end of `middle`"));
        memory.free(all.addr());
        assert!(fault(&memory, last.addr()).contains("the allocation that `last` is a view of was freed"));
    }

    #[test]
    fn freed_addresses_are_not_used_again() {
        let mut memory = Memory::new();
        let a = memory.alloc::<u32>("a", 4);
        memory.free(a.addr());
        let b = memory.alloc::<u32>("b", 4);
        assert_ne!(a.addr(), b.addr());
        let (kind, why) = memory.resolve(a.addr(), 4, Access::Read).map(|_| ()).unwrap_err();
        assert_eq!(kind, Kind::GlobalBounds);
        assert!(why.contains("was freed"), "{why}");
    }

    #[test]
    #[should_panic(expected = "past the end of `a`")]
    fn host_copies_are_checked() {
        let mut memory = Memory::new();
        let a = memory.alloc::<u32>("a", 4);
        memory.read(a, 5);
    }
}
