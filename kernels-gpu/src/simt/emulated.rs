//! The machine on the CPU: each primitive in terms of [`emu`](crate::emu).
//!
//! A collective asks the emulator whether its lane must wait, and if so switches to the scheduler. Everything between a
//! kernel and that switch is inlined: a call frame that straddles it would return, later, in an order that defeats the
//! processor's return predictor, which doubles the cost of every collective. The bookkeeping is out of line.

use core::panic::Location;

use super::data::Pod;
use super::shared::Shared;
use super::warpgroup::{Columns, Rows};
use crate::emu::access::Access;
use crate::emu::barrier::{self, Arrival};
use crate::emu::block::{suspend, with};
use crate::emu::warp::{self, Op};
use crate::emu::{access, atomics, bulk, cluster, copies, numeric, overlap, warpgroup};

#[inline(always)]
fn wait_if(must_wait: bool) {
    if must_wait {
        suspend()
    }
}

// Indices.

#[inline(always)]
pub fn thread_idx(axis: usize) -> u32 {
    with(|block| block.thread_idx(axis))
}

#[inline(always)]
pub fn block_idx(axis: usize) -> u32 {
    with(|block| block.index[axis])
}

#[inline(always)]
pub fn block_dim(axis: usize) -> u32 {
    with(|block| block.dims.block[axis])
}

#[inline(always)]
pub fn grid_dim(axis: usize) -> u32 {
    with(|block| block.dims.grid[axis])
}

#[inline(always)]
pub fn lane_id() -> u32 {
    with(|block| block.current as u32 % 32)
}

/// Registers are without limit here.
#[inline(always)]
pub fn launch_bounds<const THREADS: u32, const BLOCKS: u32>() {}

// Barriers.

#[inline(always)]
#[track_caller]
pub fn sync_threads() {
    wait_if(barrier::arrive(0, None, Arrival::Wait, Location::caller()))
}

#[inline(always)]
#[track_caller]
pub fn sync_threads_count(predicate: bool) -> u32 {
    wait_if(barrier::arrive(0, None, Arrival::Count(predicate), Location::caller()));
    warp::result::<1>()[0]
}

#[inline(always)]
#[track_caller]
pub fn sync_named(id: u32, threads: u32) {
    wait_if(barrier::arrive(id, Some(threads), Arrival::Wait, Location::caller()))
}

#[inline(always)]
#[track_caller]
pub fn sync_named_count(id: u32, threads: u32, predicate: bool) -> u32 {
    wait_if(barrier::arrive(id, Some(threads), Arrival::Count(predicate), Location::caller()));
    warp::result::<1>()[0]
}

#[inline(always)]
#[track_caller]
pub fn arrive_named(id: u32, threads: u32) {
    wait_if(barrier::arrive(id, Some(threads), Arrival::Pass, Location::caller()))
}

// Warp collectives.

#[inline(always)]
#[track_caller]
pub fn sync_warp(mask: u32) {
    wait_if(warp::arrive(Op::SyncWarp, mask, Location::caller()))
}

#[inline(always)]
#[track_caller]
fn shuffle(op: Op, mask: u32, value: u32, source: u32) -> u32 {
    warp::arguments([value, source]);
    wait_if(warp::arrive(op, mask, Location::caller()));
    warp::result::<1>()[0]
}

#[inline(always)]
#[track_caller]
pub fn shuffle_idx(mask: u32, value: u32, lane: u32) -> u32 {
    shuffle(Op::ShuffleIdx, mask, value, lane)
}

#[inline(always)]
#[track_caller]
pub fn shuffle_xor(mask: u32, value: u32, lane_mask: u32) -> u32 {
    shuffle(Op::ShuffleXor, mask, value, lane_mask)
}

#[inline(always)]
#[track_caller]
pub fn shuffle_up(mask: u32, value: u32, delta: u32) -> u32 {
    shuffle(Op::ShuffleUp, mask, value, delta)
}

#[inline(always)]
#[track_caller]
pub fn shuffle_down(mask: u32, value: u32, delta: u32) -> u32 {
    shuffle(Op::ShuffleDown, mask, value, delta)
}

#[inline(always)]
#[track_caller]
fn one_word(op: Op, mask: u32, value: u32) -> u32 {
    warp::arguments([value]);
    wait_if(warp::arrive(op, mask, Location::caller()));
    warp::result::<1>()[0]
}

#[inline(always)]
#[track_caller]
pub fn ballot(mask: u32, predicate: bool) -> u32 {
    one_word(Op::Ballot, mask, predicate as u32)
}

#[inline(always)]
#[track_caller]
pub fn reduce_add(mask: u32, value: u32) -> u32 {
    one_word(Op::ReduceAdd, mask, value)
}

#[inline(always)]
#[track_caller]
pub fn reduce_min(mask: u32, value: u32) -> u32 {
    one_word(Op::ReduceMin, mask, value)
}

#[inline(always)]
#[track_caller]
pub fn reduce_max(mask: u32, value: u32) -> u32 {
    one_word(Op::ReduceMax, mask, value)
}

// Shared memory: addresses are offsets from the start of the launch's.

#[inline(always)]
pub fn shared_base() -> u32 {
    0
}

/// The host address of what `p` points to, checked; may let other lanes run first.
#[inline(always)]
#[track_caller]
fn shared<T: Pod>(p: Shared<T>, access: Access) -> *mut T {
    let site = Location::caller();
    wait_if(access::preempted());
    access::shared(p.addr(), p.bounds(), size_of::<T>(), access, site).cast()
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_shared<T: Pod>(p: Shared<T>) -> T {
    shared(p, Access::Read).read()
}

#[inline(always)]
#[track_caller]
pub unsafe fn store_shared<T: Pod>(p: Shared<T>, value: T) {
    shared(p, Access::Write).write(value)
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_add_shared(p: Shared<u32>, value: u32) -> u32 {
    let word = shared(p, Access::Atomic);
    word.replace(word.read().wrapping_add(value))
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_max_shared(p: Shared<u32>, value: u32) -> u32 {
    let word = shared(p, Access::Atomic);
    word.replace(word.read().max(value))
}

// Global memory.

/// The host address of what `addr` points to, checked; now and then lets other lanes run first.
#[inline(always)]
#[track_caller]
fn global<T: Pod>(addr: u64, access: Access) -> *mut T {
    let site = Location::caller();
    wait_if(access::tires());
    access::global(addr, size_of::<T>(), access, site).cast()
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global<T: Pod>(addr: u64) -> T {
    global::<T>(addr, Access::Read).read()
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global_once<T: Pod>(addr: u64) -> T {
    load_global(addr)
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global_settled<T: Pod>(addr: u64) -> T {
    load_global(addr)
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global_constant<T: Pod>(addr: u64) -> T {
    global::<T>(addr, Access::ReadConstant).read()
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global_constant_once<T: Pod>(addr: u64) -> T {
    load_global_constant(addr)
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_global_constant_row<T: Pod>(addr: u64) -> T {
    load_global_constant(addr)
}

#[inline(always)]
#[track_caller]
pub unsafe fn store_global<T: Pod>(addr: u64, value: T) {
    global::<T>(addr, Access::Write).write(value)
}

#[inline(always)]
#[track_caller]
pub unsafe fn store_global_evict_first<T: Pod>(addr: u64, value: T) {
    store_global(addr, value)
}

/// Lets others run, so that a lane may spin on the word, then applies `f` to it.
#[inline(always)]
#[track_caller]
fn atomic(addr: u64, f: impl Fn(u32) -> u32) -> u32 {
    let site = Location::caller();
    atomics::requeue();
    suspend();
    atomics::read_modify_write(addr, &f, site)
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_add_global(addr: u64, value: u32) -> u32 {
    atomic(addr, |old| old.wrapping_add(value))
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_add_global_f32(addr: u64, value: f32) -> f32 {
    f32::from_bits(atomic(addr, |old| (f32::from_bits(old) + value).to_bits()))
}

#[inline(always)]
#[track_caller]
pub unsafe fn reduce_add_global_f32(addr: u64, value: f32) {
    atomic_add_global_f32(addr, value);
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_max_global(addr: u64, value: u32) -> u32 {
    atomic(addr, |old| old.max(value))
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_exchange_global(addr: u64, value: u32) -> u32 {
    atomic(addr, |_| value)
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_cas_global(addr: u64, expected: u32, new: u32) -> u32 {
    atomic(addr, |old| if old == expected { new } else { old })
}

#[inline(always)]
#[track_caller]
pub unsafe fn atomic_inc_global(addr: u64, last: u32) -> u32 {
    atomic(addr, |old| if old >= last { 0 } else { old + 1 })
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_acquire_global(addr: u64) -> u32 {
    let value = atomic(addr, |old| old);
    atomics::fence();
    value
}

#[inline(always)]
#[track_caller]
pub unsafe fn store_release_global(addr: u64, value: u32) {
    atomics::fence();
    atomic(addr, |_| value);
}

// The grid.

#[inline(always)]
pub fn fence() {
    atomics::fence()
}

#[inline(always)]
pub fn launch_dependents() {
    overlap::launch_dependents()
}

#[inline(always)]
pub fn wait_for_previous() {
    overlap::wait_for_previous()
}

// Clusters.

#[inline(always)]
pub fn cluster_block_rank() -> u32 {
    with(|block| block.rank_in_cluster())
}

#[inline(always)]
pub fn cluster_num_blocks() -> u32 {
    with(|block| block.dims.cluster)
}

#[inline(always)]
#[track_caller]
pub unsafe fn cluster_sync() {
    wait_if(cluster::arrive(true, Location::caller()))
}

#[inline(always)]
#[track_caller]
pub unsafe fn cluster_meet() {
    wait_if(cluster::arrive(false, Location::caller()))
}

#[inline(always)]
#[track_caller]
pub unsafe fn load_remote<T: Pod>(own: Shared<T>, rank: u32) -> T {
    let site = Location::caller();
    wait_if(access::preempted());
    remote(own, rank, Access::Read, site).read()
}

#[inline(always)]
#[track_caller]
pub unsafe fn store_remote<T: Pod>(own: Shared<T>, rank: u32, value: T) {
    let site = Location::caller();
    wait_if(access::preempted());
    remote(own, rank, Access::Write, site).write(value)
}

#[inline(always)]
fn remote<T: Pod>(own: Shared<T>, rank: u32, access: Access, site: &'static Location<'static>) -> *mut T {
    cluster::remote(rank, (own.addr(), own.bounds()), size_of::<T>(), access, site).cast()
}

// Asynchronous copies and the tensor core.

#[inline(always)]
#[track_caller]
pub fn cp_async_16<T: Pod>(dst: Shared<T>, src: u64, bytes: u32) {
    copies::start(dst.addr(), dst.bounds(), src, bytes, Location::caller())
}

#[inline(always)]
pub fn cp_async_commit() {
    copies::commit()
}

#[inline(always)]
#[track_caller]
pub fn cp_async_wait<const PENDING: u32>() {
    copies::wait(PENDING as usize, Location::caller())
}

// Bulk copies.

pub const BULK_COPIES: bool = true;

#[inline(always)]
#[track_caller]
pub fn mbarrier_init(word: Shared<u64>, arrivals: u32) {
    wait_if(access::preempted());
    bulk::init(word.addr(), word.bounds(), arrivals, Location::caller())
}

#[inline(always)]
#[track_caller]
pub fn mbarrier_arrive(word: Shared<u64>) {
    mbarrier_arrive_expecting(word, 0)
}

#[inline(always)]
#[track_caller]
pub fn mbarrier_arrive_expecting(word: Shared<u64>, bytes: u32) {
    wait_if(access::preempted());
    bulk::arrive(word.addr(), word.bounds(), bytes, Location::caller())
}

/// The copies land now: that nobody but those who wait knows of it is what clocks tell.
#[inline(always)]
#[track_caller]
pub fn mbarrier_arrive_with_copies(word: Shared<u64>) {
    copies::finish_all(Location::caller());
    mbarrier_arrive(word)
}

#[inline(always)]
#[track_caller]
pub fn mbarrier_wait(word: Shared<u64>, parity: u32) {
    wait_if(access::preempted());
    while bulk::must_wait(word.addr(), word.bounds(), parity, Location::caller()) {
        suspend()
    }
}

/// Of memory the emulator has one view.
#[inline(always)]
pub fn publish_mbarriers() {
    bulk::publish()
}

#[inline(always)]
#[track_caller]
pub fn copy_bulk<T: Pod>(dst: Shared<T>, src: u64, bytes: u32, arrived: Shared<u64>) {
    wait_if(access::preempted());
    let (word, site) = ((arrived.addr(), arrived.bounds()), Location::caller());
    bulk::start((dst.addr(), dst.bounds()), src, bytes, word, site)
}

#[inline(always)]
#[track_caller]
pub fn ldmatrix_x4<T: Pod>(row: Shared<T>, trans: bool) -> [u32; 4] {
    let (begin, end) = row.bounds();
    warp::arguments([row.addr(), begin, end]);
    let op = if trans { Op::LdMatrixTrans } else { Op::LdMatrix };
    wait_if(warp::arrive(op, u32::MAX, Location::caller()));
    warp::result()
}

#[inline(always)]
#[track_caller]
fn mma(op: Op, d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    let c = d.map(f32::to_bits);
    warp::arguments([c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]]);
    wait_if(warp::arrive(op, u32::MAX, Location::caller()));
    *d = warp::result::<4>().map(f32::from_bits);
}

#[inline(always)]
#[track_caller]
pub fn mma_f16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    mma(Op::MmaF16, d, a, b)
}

#[inline(always)]
#[track_caller]
pub fn mma_bf16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    mma(Op::MmaBf16, d, a, b)
}

// Products of warpgroups.

#[inline(always)]
pub fn has_warpgroup_products() -> bool {
    with(|block| block.options.warpgroups)
}

#[inline(always)]
pub fn fence_writes_for_products() {
    warpgroup::fence_writes()
}

#[inline(always)]
pub fn warpgroup_fence() {
    warpgroup::fence()
}

#[inline(always)]
pub fn warpgroup_commit() {
    warpgroup::commit()
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_wait<const N: usize, const PENDING: u32>(d: &mut [[f32; 4]; N]) {
    warpgroup::wait(d, PENDING, Location::caller())
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_registers<const REGISTERS: u32, const TAKES: bool>() {
    warpgroup::set_registers(REGISTERS, Location::caller())
}

/// The lanes of a warp bring the rows of A together, or find them in shared memory; each then multiplies its own two.
#[inline(always)]
#[track_caller]
fn warpgroup_mma<T: Pod, const N: usize>(
    d: &mut [[f32; 4]; N],
    (op, a): (Op, [u32; 4]),
    b: Columns<T>,
    (adds, by_rows): (bool, bool),
    unpack: impl Fn(u32) -> [f32; 2],
) {
    let (addr, (begin, end)) = (b.start.addr(), b.start.bounds());
    let operand = warpgroup::Operand {
        addr,
        row_bytes: b.row_bytes,
        column_bytes: b.column_bytes,
        fragments: N as u32,
        is_by_rows: by_rows,
        is_swizzled: b.is_swizzled,
    };
    let [b0, b1, b2, b3, b4] = operand.words();
    warp::arguments([a[0], a[1], a[2], a[3], begin, end, b0, b1, b2, b3, b4]);
    wait_if(warp::arrive(op, u32::MAX, Location::caller()));
    let a = (op == Op::MmaOfWarpgroupFromShared).then(|| warpgroup::Operand::of_rows(a));
    warpgroup::multiply(d, a, operand, adds, unpack, Location::caller())
}

/// A in registers.
fn from_registers(a: [u32; 4]) -> (Op, [u32; 4]) {
    (Op::MmaOfWarpgroup, a)
}

/// A in shared memory: bounds, address and stride.
fn from_shared<T: Pod>(a: Rows<T>) -> (Op, [u32; 4]) {
    let (begin, end) = a.start.bounds();
    (Op::MmaOfWarpgroupFromShared, [begin, end, a.start.addr(), a.row_bytes])
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_mma_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    warpgroup_mma(d, from_registers(a), b, (ADDS, BY_ROWS), numeric::unpack_f16)
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_mma_bf16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    warpgroup_mma(d, from_registers(a), b, (ADDS, BY_ROWS), super::math::unpack_bf16)
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_mma_from_shared_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    warpgroup_mma(d, from_shared(a), b, (ADDS, BY_ROWS), numeric::unpack_f16)
}

#[inline(always)]
#[track_caller]
pub fn warpgroup_mma_from_shared_bf16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    warpgroup_mma(d, from_shared(a), b, (ADDS, BY_ROWS), super::math::unpack_bf16)
}

// Arithmetic.

pub(super) use numeric::{add_times_zero_bf16, add_times_zero_f16};
pub(super) use numeric::{ex2, fma, lg2, pack_bf16, pack_f16, rcp, sqrt, sqrt_f64, unpack_f16};
