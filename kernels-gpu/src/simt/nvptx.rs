//! The machine on an NVIDIA GPU: one PTX instruction, or a few, per primitive.
//!
//! What the options of each `asm!` say to the compiler, since speed and correctness hang on them:
//! - Loads are `pure`: they may be merged, moved and batched, read-only ones (`nomem`) over stores as well, others
//!   (`readonly`) not over anything that writes memory.
//! - Arithmetic is `pure, nomem`.
//! - Collectives are never `pure`. LLVM does not know inline PTX to be convergent; a pure `mma` whose result is used in
//!   one branch only would be sunk into that branch, and then only some lanes execute it. Without `pure` it stays in
//!   place. LLVM's passes that duplicate code over branches are off for this target.
//! - Barriers, stores, atomics and fences write memory as far as the compiler knows (no `nomem`): no load moves over
//!   them.

use core::arch::{asm, global_asm, nvptx};

use super::data::Pod;
use super::shared::Shared;
use super::warpgroup::{Columns, Rows};

// 1024: the alignment that 128-byte swizzled tiles of bulk copies need.
global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

/// Bits of a value, whatever its size: the arms of `load!` that do not fit are never executed.
#[inline(always)]
unsafe fn reinterpret<A, B: Copy>(a: &A) -> B {
    (a as *const A).cast::<B>().read_unaligned()
}

/// `$op` with the width of `$t`: `.b16`, `.b32`, `.b64` or `.v4.b32`.
macro_rules! load {
    ($op:literal, $t:ty, $class:ident $addr:expr, $($option:ident),*) => {
        match size_of::<$t>() {
            2 => {
                let x: u16;
                asm!(concat!($op, ".b16 {}, [{}];"), out(reg16) x, in($class) $addr, options($($option),*));
                reinterpret(&x)
            }
            4 => {
                let x: u32;
                asm!(concat!($op, ".b32 {}, [{}];"), out(reg32) x, in($class) $addr, options($($option),*));
                reinterpret(&x)
            }
            8 => {
                let x: u64;
                asm!(concat!($op, ".b64 {}, [{}];"), out(reg64) x, in($class) $addr, options($($option),*));
                reinterpret(&x)
            }
            _ => {
                let (a, b, c, d): (u32, u32, u32, u32);
                asm!(
                    concat!($op, ".v4.b32 {{{}, {}, {}, {}}}, [{}];"),
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in($class) $addr,
                    options($($option),*)
                );
                reinterpret(&[a, b, c, d])
            }
        }
    };
}

/// The stores that belong to `load!`.
macro_rules! store {
    ($op:literal, $class:ident $addr:expr, $value:expr) => {
        match size_of_val(&$value) {
            2 => {
                let x: u16 = reinterpret(&$value);
                asm!(concat!($op, ".b16 [{}], {};"), in($class) $addr, in(reg16) x, options(nostack));
            }
            4 => {
                let x: u32 = reinterpret(&$value);
                asm!(concat!($op, ".b32 [{}], {};"), in($class) $addr, in(reg32) x, options(nostack));
            }
            8 => {
                let x: u64 = reinterpret(&$value);
                asm!(concat!($op, ".b64 [{}], {};"), in($class) $addr, in(reg64) x, options(nostack));
            }
            _ => {
                let [a, b, c, d]: [u32; 4] = reinterpret(&$value);
                asm!(
                    concat!($op, ".v4.b32 [{}], {{{}, {}, {}, {}}};"),
                    in($class) $addr, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
                    options(nostack)
                );
            }
        }
    };
}

/// `$op` on one word of memory: returns what was there.
macro_rules! atomic {
    ($op:literal, $class:ident $addr:expr, $($value:expr),*) => {{
        let old;
        asm!(atomic!(@text $op, $($value),*), out(reg32) old, in($class) $addr, $(in(reg32) $value,)* options(nostack));
        old
    }};
    (@text $op:literal, $a:expr) => { concat!($op, " {}, [{}], {};") };
    (@text $op:literal, $a:expr, $b:expr) => { concat!($op, " {}, [{}], {}, {};") };
}

// Indices.

#[inline(always)]
pub fn thread_idx(axis: usize) -> u32 {
    unsafe {
        (match axis {
            0 => nvptx::_thread_idx_x(),
            1 => nvptx::_thread_idx_y(),
            _ => nvptx::_thread_idx_z(),
        }) as u32
    }
}

#[inline(always)]
pub fn block_idx(axis: usize) -> u32 {
    unsafe {
        (match axis {
            0 => nvptx::_block_idx_x(),
            1 => nvptx::_block_idx_y(),
            _ => nvptx::_block_idx_z(),
        }) as u32
    }
}

#[inline(always)]
pub fn block_dim(axis: usize) -> u32 {
    unsafe {
        (match axis {
            0 => nvptx::_block_dim_x(),
            1 => nvptx::_block_dim_y(),
            _ => nvptx::_block_dim_z(),
        }) as u32
    }
}

#[inline(always)]
pub fn grid_dim(axis: usize) -> u32 {
    unsafe {
        (match axis {
            0 => nvptx::_grid_dim_x(),
            1 => nvptx::_grid_dim_y(),
            _ => nvptx::_grid_dim_z(),
        }) as u32
    }
}

#[inline(always)]
pub fn lane_id() -> u32 {
    let lane: u32;
    unsafe { asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack)) };
    lane
}

// Barriers.

#[inline(always)]
pub unsafe fn sync_threads() {
    nvptx::_syncthreads()
}

#[inline(always)]
pub unsafe fn sync_threads_count(predicate: bool) -> u32 {
    let count: u32;
    asm!(
        "{{.reg .pred p; setp.ne.u32 p, {1}, 0; bar.red.popc.u32 {0}, 0, p;}}",
        out(reg32) count, in(reg32) predicate as u32, options(nostack)
    );
    count
}

#[inline(always)]
pub unsafe fn sync_named(id: u32, threads: u32) {
    asm!("bar.sync {}, {};", in(reg32) id, in(reg32) threads, options(nostack))
}

#[inline(always)]
pub unsafe fn sync_named_count(id: u32, threads: u32, predicate: bool) -> u32 {
    let count: u32;
    asm!(
        "{{.reg .pred p; setp.ne.u32 p, {3}, 0; bar.red.popc.u32 {0}, {1}, {2}, p;}}",
        out(reg32) count, in(reg32) id, in(reg32) threads, in(reg32) predicate as u32, options(nostack)
    );
    count
}

#[inline(always)]
pub unsafe fn arrive_named(id: u32, threads: u32) {
    asm!("bar.arrive {}, {};", in(reg32) id, in(reg32) threads, options(nostack))
}

#[inline(always)]
pub unsafe fn sync_warp(mask: u32) {
    asm!("bar.warp.sync {};", in(reg32) mask, options(nostack))
}

/// A comment, which `cargo ptx` turns into directives of the entry that it stands in.
#[inline(always)]
pub fn launch_bounds<const THREADS: u32, const BLOCKS: u32>() {
    unsafe { asm!("// launch_bounds {} {}", const THREADS, const BLOCKS, options(nomem, nostack)) }
}

// Warp collectives. The last but one operand of `shfl` clamps: lane 31 upwards, lane 0 (`0`) for `up`.

#[inline(always)]
pub unsafe fn shuffle_idx(mask: u32, value: u32, lane: u32) -> u32 {
    let out: u32;
    asm!(
        "shfl.sync.idx.b32 {}, {}, {}, 31, {};",
        out(reg32) out, in(reg32) value, in(reg32) lane, in(reg32) mask, options(nomem, nostack)
    );
    out
}

#[inline(always)]
pub unsafe fn shuffle_xor(mask: u32, value: u32, lane_mask: u32) -> u32 {
    let out: u32;
    asm!(
        "shfl.sync.bfly.b32 {}, {}, {}, 31, {};",
        out(reg32) out, in(reg32) value, in(reg32) lane_mask, in(reg32) mask, options(nomem, nostack)
    );
    out
}

#[inline(always)]
pub unsafe fn shuffle_up(mask: u32, value: u32, delta: u32) -> u32 {
    let out: u32;
    asm!(
        "shfl.sync.up.b32 {}, {}, {}, 0, {};",
        out(reg32) out, in(reg32) value, in(reg32) delta, in(reg32) mask, options(nomem, nostack)
    );
    out
}

#[inline(always)]
pub unsafe fn shuffle_down(mask: u32, value: u32, delta: u32) -> u32 {
    let out: u32;
    asm!(
        "shfl.sync.down.b32 {}, {}, {}, 31, {};",
        out(reg32) out, in(reg32) value, in(reg32) delta, in(reg32) mask, options(nomem, nostack)
    );
    out
}

#[inline(always)]
pub unsafe fn ballot(mask: u32, predicate: bool) -> u32 {
    let out: u32;
    asm!(
        "{{.reg .pred p; setp.ne.u32 p, {1}, 0; vote.sync.ballot.b32 {0}, p, {2};}}",
        out(reg32) out, in(reg32) predicate as u32, in(reg32) mask, options(nomem, nostack)
    );
    out
}

#[inline(always)]
pub unsafe fn reduce_add(mask: u32, value: u32) -> u32 {
    let out: u32;
    asm!("redux.sync.add.u32 {}, {}, {};", out(reg32) out, in(reg32) value, in(reg32) mask, options(nomem, nostack));
    out
}

#[inline(always)]
pub unsafe fn reduce_min(mask: u32, value: u32) -> u32 {
    let out: u32;
    asm!("redux.sync.min.u32 {}, {}, {};", out(reg32) out, in(reg32) value, in(reg32) mask, options(nomem, nostack));
    out
}

#[inline(always)]
pub unsafe fn reduce_max(mask: u32, value: u32) -> u32 {
    let out: u32;
    asm!("redux.sync.max.u32 {}, {}, {};", out(reg32) out, in(reg32) value, in(reg32) mask, options(nomem, nostack));
    out
}

// Shared memory.

#[inline(always)]
pub fn shared_base() -> u32 {
    let base: u32;
    unsafe { asm!("mov.u32 {}, dynamic_shared;", out(reg32) base, options(pure, nomem, nostack)) };
    base
}

#[inline(always)]
pub unsafe fn load_shared<T: Pod>(p: Shared<T>) -> T {
    load!("ld.shared", T, reg32 p.addr(), pure, readonly, nostack)
}

#[inline(always)]
pub unsafe fn store_shared<T: Pod>(p: Shared<T>, value: T) {
    store!("st.shared", reg32 p.addr(), value)
}

#[inline(always)]
pub unsafe fn atomic_add_shared(p: Shared<u32>, value: u32) -> u32 {
    atomic!("atom.shared.add.u32", reg32 p.addr(), value)
}

#[inline(always)]
pub unsafe fn atomic_max_shared(p: Shared<u32>, value: u32) -> u32 {
    atomic!("atom.shared.max.u32", reg32 p.addr(), value)
}

// Global memory.

#[inline(always)]
pub unsafe fn load_global<T: Pod>(addr: u64) -> T {
    load!("ld.global", T, reg64 addr, pure, readonly, nostack)
}

#[inline(always)]
pub unsafe fn load_global_once<T: Pod>(addr: u64) -> T {
    load!("ld.global.L1::no_allocate", T, reg64 addr, pure, readonly, nostack)
}

#[inline(always)]
pub unsafe fn load_global_settled<T: Pod>(addr: u64) -> T {
    load!("ld.global", T, reg64 addr, pure, nomem, nostack)
}

#[inline(always)]
pub unsafe fn load_global_constant<T: Pod>(addr: u64) -> T {
    load!("ld.global.nc", T, reg64 addr, pure, nomem, nostack)
}

#[inline(always)]
pub unsafe fn load_global_constant_once<T: Pod>(addr: u64) -> T {
    load!("ld.global.nc.L1::no_allocate", T, reg64 addr, pure, nomem, nostack)
}

#[inline(always)]
pub unsafe fn load_global_constant_row<T: Pod>(addr: u64) -> T {
    load!("ld.global.nc.L1::no_allocate.L2::256B", T, reg64 addr, pure, nomem, nostack)
}

#[inline(always)]
pub unsafe fn store_global<T: Pod>(addr: u64, value: T) {
    store!("st.global", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn store_global_evict_first<T: Pod>(addr: u64, value: T) {
    store!("st.global.cs", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn atomic_add_global(addr: u64, value: u32) -> u32 {
    atomic!("atom.relaxed.gpu.global.add.u32", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn atomic_add_global_f32(addr: u64, value: f32) -> f32 {
    atomic!("atom.relaxed.gpu.global.add.f32", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn reduce_add_global_f32(addr: u64, value: f32) {
    asm!("red.global.add.f32 [{}], {};", in(reg64) addr, in(reg32) value, options(nostack))
}

#[inline(always)]
pub unsafe fn atomic_max_global(addr: u64, value: u32) -> u32 {
    atomic!("atom.relaxed.gpu.global.max.u32", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn atomic_exchange_global(addr: u64, value: u32) -> u32 {
    atomic!("atom.relaxed.gpu.global.exch.b32", reg64 addr, value)
}

#[inline(always)]
pub unsafe fn atomic_cas_global(addr: u64, expected: u32, new: u32) -> u32 {
    atomic!("atom.relaxed.gpu.global.cas.b32", reg64 addr, expected, new)
}

#[inline(always)]
pub unsafe fn atomic_inc_global(addr: u64, last: u32) -> u32 {
    atomic!("atom.relaxed.gpu.global.inc.u32", reg64 addr, last)
}

#[inline(always)]
pub unsafe fn load_acquire_global(addr: u64) -> u32 {
    let value: u32;
    asm!("ld.acquire.gpu.global.u32 {}, [{}];", out(reg32) value, in(reg64) addr, options(nostack));
    value
}

#[inline(always)]
pub unsafe fn store_release_global(addr: u64, value: u32) {
    asm!("st.release.gpu.global.u32 [{}], {};", in(reg64) addr, in(reg32) value, options(nostack));
}

// The grid.

#[inline(always)]
pub fn fence() {
    unsafe { asm!("fence.acq_rel.gpu;", options(nostack)) }
}

#[inline(always)]
pub fn launch_dependents() {
    #[cfg(target_feature = "sm_90")]
    unsafe {
        asm!("griddepcontrol.launch_dependents;", options(nostack))
    }
}

#[inline(always)]
pub fn wait_for_previous() {
    #[cfg(target_feature = "sm_90")]
    unsafe {
        asm!("griddepcontrol.wait;", options(nostack))
    }
}

// Clusters and bulk copies: of sm_90, so that older ones have nothing but a trap.

/// The instruction where there is one.
macro_rules! bulk {
    ($($asm:tt)*) => {{
        #[cfg(target_feature = "sm_90")]
        asm!($($asm)*);
        #[cfg(not(target_feature = "sm_90"))]
        nvptx::trap();
    }};
}

#[inline(always)]
pub fn cluster_block_rank() -> u32 {
    #[cfg(target_feature = "sm_90")]
    unsafe {
        let rank: u32;
        asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack));
        rank
    }
    #[cfg(not(target_feature = "sm_90"))]
    0
}

#[inline(always)]
pub fn cluster_num_blocks() -> u32 {
    #[cfg(target_feature = "sm_90")]
    unsafe {
        let blocks: u32;
        asm!("mov.u32 {}, %cluster_nctarank;", out(reg32) blocks, options(pure, nomem, nostack));
        blocks
    }
    #[cfg(not(target_feature = "sm_90"))]
    1
}

#[inline(always)]
pub unsafe fn cluster_sync() {
    bulk!("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", options(nostack));
}

#[inline(always)]
pub unsafe fn cluster_meet() {
    bulk!("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;", options(nostack));
}

/// The address of a place in the shared memory of block `rank`, in the window of the cluster.
#[cfg(target_feature = "sm_90")]
#[inline(always)]
unsafe fn remote_addr<T: Pod>(own: Shared<T>, rank: u32) -> u32 {
    let addr: u32;
    asm!(
        "mapa.shared::cluster.u32 {}, {}, {};",
        out(reg32) addr, in(reg32) own.addr(), in(reg32) rank, options(pure, nomem, nostack)
    );
    addr
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn load_remote<T: Pod>(own: Shared<T>, rank: u32) -> T {
    #[cfg(target_feature = "sm_90")]
    return load!("ld.shared::cluster", T, reg32 remote_addr(own, rank), pure, readonly, nostack);
    #[cfg(not(target_feature = "sm_90"))]
    nvptx::trap()
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn store_remote<T: Pod>(own: Shared<T>, rank: u32, value: T) {
    #[cfg(target_feature = "sm_90")]
    {
        store!("st.shared::cluster", reg32 remote_addr(own, rank), value)
    }
    #[cfg(not(target_feature = "sm_90"))]
    nvptx::trap();
}

// Asynchronous copies and the tensor core.

#[inline(always)]
pub unsafe fn cp_async_16<T: Pod>(dst: Shared<T>, src: u64, bytes: u32) {
    asm!(
        "cp.async.cg.shared.global [{}], [{}], 16, {};",
        in(reg32) dst.addr(), in(reg64) src, in(reg32) bytes, options(nostack)
    )
}

#[inline(always)]
pub fn cp_async_commit() {
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

#[inline(always)]
pub fn cp_async_wait<const PENDING: u32>() {
    unsafe { asm!("cp.async.wait_group {};", const PENDING, options(nostack)) }
}

// Bulk copies.

pub const BULK_COPIES: bool = cfg!(target_feature = "sm_90");

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn mbarrier_init(word: Shared<u64>, arrivals: u32) {
    bulk!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) word.addr(), in(reg32) arrivals, options(nostack))
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn mbarrier_arrive(word: Shared<u64>) {
    bulk!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) word.addr(), options(nostack))
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn mbarrier_arrive_expecting(word: Shared<u64>, bytes: u32) {
    bulk!(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
        in(reg32) word.addr(), in(reg32) bytes, options(nostack)
    )
}

/// Of sm_80, too, but nothing there waits at such barriers.
#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn mbarrier_arrive_with_copies(word: Shared<u64>) {
    bulk!("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{}];", in(reg32) word.addr(), options(nostack))
}

/// `try_wait` sleeps for a while by itself, so the loop need not.
#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn mbarrier_wait(word: Shared<u64>, parity: u32) {
    #[cfg(target_feature = "sm_90")]
    loop {
        let ended: u32;
        asm!(
            "{{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p;}}",
            out(reg32) ended, in(reg32) word.addr(), in(reg32) parity, options(nostack)
        );
        if ended != 0 {
            return;
        }
    }
    #[cfg(not(target_feature = "sm_90"))]
    nvptx::trap();
}

#[inline(always)]
pub fn publish_mbarriers() {
    unsafe { bulk!("fence.mbarrier_init.release.cluster; fence.proxy.async;", options(nostack)) }
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn copy_bulk<T: Pod>(dst: Shared<T>, src: u64, bytes: u32, arrived: Shared<u64>) {
    bulk!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
        in(reg32) dst.addr(), in(reg64) src, in(reg32) bytes, in(reg32) arrived.addr(), options(nostack)
    )
}

#[inline(always)]
pub unsafe fn ldmatrix_x4<T: Pod>(row: Shared<T>, trans: bool) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    if trans {
        asm!(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) row.addr(),
            options(readonly, nostack)
        );
    } else {
        asm!(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) row.addr(),
            options(readonly, nostack)
        );
    }
    [a, b, c, d]
}

macro_rules! mma {
    ($types:literal, $d:expr, $a:expr, $b:expr) => {
        asm!(
            concat!(
                "mma.sync.aligned.m16n8k16.row.col.", $types,
                " {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"
            ),
            inout(reg32) $d[0], inout(reg32) $d[1], inout(reg32) $d[2], inout(reg32) $d[3],
            in(reg32) $a[0], in(reg32) $a[1], in(reg32) $a[2], in(reg32) $a[3],
            in(reg32) $b[0], in(reg32) $b[1],
            options(nomem, nostack)
        )
    };
}

#[inline(always)]
pub unsafe fn mma_f16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    mma!("f32.f16.f16.f32", d, a, b)
}

#[inline(always)]
pub unsafe fn mma_bf16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    mma!("f32.bf16.bf16.f32", d, a, b)
}

// Products of warpgroups.

#[inline(always)]
pub const fn has_warpgroup_products() -> bool {
    cfg!(target_feature = "sm_90a")
}

#[inline(always)]
pub fn fence_writes_for_products() {
    unsafe { bulk!("fence.proxy.async.shared::cta;", options(nostack)) }
}

/// `$text` on compute capability 9.0 alone.
macro_rules! warpgroup {
    ($($text:tt)*) => {{
        #[cfg(target_feature = "sm_90a")]
        asm!($($text)*);
        #[cfg(not(target_feature = "sm_90a"))]
        nvptx::trap();
    }};
}

/// `$before`, the accumulators of `$N` fragments, `$after`; further operands have names.
macro_rules! with_accumulators {
    (8, $d:expr, $before:expr, $after:expr, $($operands:tt)*) => {
        with_accumulators!(
            @[0 1 2 3 4 5 6 7]
            concat!(
                $before,
                "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
                "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}",
                $after
            ),
            (*($d as *mut [[f32; 4]; N]).cast::<[[f32; 4]; 8]>()), $($operands)*
        )
    };
    (12, $d:expr, $before:expr, $after:expr, $($operands:tt)*) => {
        with_accumulators!(
            @[0 1 2 3 4 5 6 7 8 9 10 11]
            concat!(
                $before,
                "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
                "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
                "{32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}",
                $after
            ),
            (*($d as *mut [[f32; 4]; N]).cast::<[[f32; 4]; 12]>()), $($operands)*
        )
    };
    (16, $d:expr, $before:expr, $after:expr, $($operands:tt)*) => {
        with_accumulators!(
            @[0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
            concat!(
                $before,
                "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
                "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
                "{32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, ",
                "{48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}",
                $after
            ),
            (*($d as *mut [[f32; 4]; N]).cast::<[[f32; 4]; 16]>()), $($operands)*
        )
    };
    (32, $d:expr, $before:expr, $after:expr, $($operands:tt)*) => {
        with_accumulators!(
            @[0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]
            concat!(
                $before,
                "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
                "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
                "{32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, ",
                "{48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}, ",
                "{64}, {65}, {66}, {67}, {68}, {69}, {70}, {71}, {72}, {73}, {74}, {75}, {76}, {77}, {78}, {79}, ",
                "{80}, {81}, {82}, {83}, {84}, {85}, {86}, {87}, {88}, {89}, {90}, {91}, {92}, {93}, {94}, {95}, ",
                "{96}, {97}, {98}, {99}, {100}, {101}, {102}, {103}, {104}, {105}, {106}, {107}, {108}, {109}, {110}, {111}, ",
                "{112}, {113}, {114}, {115}, {116}, {117}, {118}, {119}, {120}, {121}, {122}, {123}, {124}, {125}, {126}, {127}",
                $after
            ),
            (*($d as *mut [[f32; 4]; N]).cast::<[[f32; 4]; 32]>()), $($operands)*
        )
    };
    (@[$($i:literal)*] $text:expr, $d:expr, $($operands:tt)*) => {
        warpgroup!(
            $text,
            $(
                inout(reg32) $d[$i][0],
                inout(reg32) $d[$i][1],
                inout(reg32) $d[$i][2],
                inout(reg32) $d[$i][3],
            )*
            $($operands)*
        )
    };
}

/// For any of the sizes that there are.
macro_rules! with_any_accumulators {
    ($d:ident, $before:expr, $after:expr, $($operands:tt)*) => {
        match N {
            8 => with_accumulators!(8, $d, $before, $after, $($operands)*),
            12 => with_accumulators!(12, $d, $before, $after, $($operands)*),
            16 => with_accumulators!(16, $d, $before, $after, $($operands)*),
            32 => with_accumulators!(32, $d, $before, $after, $($operands)*),
            _ => nvptx::trap(),
        }
    };
}

/// The descriptor of an operand in shared memory: address and strides in units of 16 bytes, and the swizzle.
#[cfg(target_feature = "sm_90a")]
#[inline(always)]
fn descriptor<T: Pod, const BY_ROWS: bool>(b: Columns<T>) -> u64 {
    let [start, rows, columns] = [b.start.addr(), b.row_bytes, b.column_bytes].map(sixteenths);
    match (b.is_swizzled, BY_ROWS) {
        (false, _) => start | rows << 16 | columns << 32,
        (true, false) => start | columns << 32 | 1 << 62,
        (true, true) => start | columns << 16 | rows << 32 | 1 << 62,
    }
}

/// 14 bits: addresses of shared memory, and strides, are below 2^18.
#[cfg(target_feature = "sm_90a")]
#[inline(always)]
fn sixteenths(bytes: u32) -> u64 {
    (bytes / 16) as u64
}

/// As [`descriptor`] of swizzled lines.
#[cfg(target_feature = "sm_90a")]
#[inline(always)]
fn descriptor_of_rows<T: Pod>(a: Rows<T>) -> u64 {
    let [start, rows] = [a.start.addr(), a.row_bytes].map(sixteenths);
    start | rows << 32 | 1 << 62
}

/// `$types` of D, A and B; `$a`: A, and how it lies, as text with the operands behind it.
macro_rules! warpgroup_mma {
    ($types:literal, $d:ident, $b:ident, [$a:literal, $layout:literal], $($operands:tt)*) => {
        match N {
            8 => warpgroup_mma!(@8, "m64n64k16", $types, $d, $b, [$a, $layout], $($operands)*),
            12 => warpgroup_mma!(@12, "m64n96k16", $types, $d, $b, [$a, $layout], $($operands)*),
            16 => warpgroup_mma!(@16, "m64n128k16", $types, $d, $b, [$a, $layout], $($operands)*),
            32 => warpgroup_mma!(@32, "m64n256k16", $types, $d, $b, [$a, $layout], $($operands)*),
            _ => nvptx::trap(),
        }
    };
    (@$N:tt, $shape:literal, $types:literal, $d:ident, $b:ident, [$a:literal, $layout:literal], $($operands:tt)*) => {
        with_accumulators!(
            $N,
            $d,
            concat!(
                "{{.reg .pred adds; setp.ne.b32 adds, {f}, 0; wgmma.mma_async.sync.aligned.", $shape, ".", $types,
                " {{"
            ),
            concat!("}}, ", $a, ", {e}, adds, 1, 1, ", $layout, "{g};}}"),
            $($operands)*
            e = in(reg64) descriptor::<T, BY_ROWS>($b), f = const ADDS as u32, g = const BY_ROWS as u32, options(nostack)
        )
    };
}

/// [`warpgroup_mma`] with A in registers.
macro_rules! warpgroup_mma_from_registers {
    ($types:literal, $d:ident, $a:ident, $b:ident) => {
        warpgroup_mma!(
            $types, $d, $b, ["{{{a}, {b}, {c}, {d}}}", ""],
            a = in(reg32) $a[0], b = in(reg32) $a[1], c = in(reg32) $a[2], d = in(reg32) $a[3],
        )
    };
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn warpgroup_mma_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    warpgroup_mma_from_registers!("f32.f16.f16", d, a, b)
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn warpgroup_mma_bf16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    warpgroup_mma_from_registers!("f32.bf16.bf16", d, a, b)
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn warpgroup_mma_from_shared_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    warpgroup_mma!("f32.f16.f16", d, b, ["{a}", "0, "], a = in(reg64) descriptor_of_rows(a),)
}

#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn warpgroup_mma_from_shared_bf16<
    T: Pod,
    const N: usize,
    const ADDS: bool,
    const BY_ROWS: bool,
>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    warpgroup_mma!("f32.bf16.bf16", d, b, ["{a}", "0, "], a = in(reg64) descriptor_of_rows(a),)
}

#[inline(always)]
pub unsafe fn warpgroup_fence() {
    warpgroup!("wgmma.fence.sync.aligned;", options(nostack))
}

#[inline(always)]
pub unsafe fn warpgroup_commit() {
    warpgroup!("wgmma.commit_group.sync.aligned;", options(nostack))
}

/// The accumulators are operands, so that nobody reads them before.
#[inline(always)]
#[allow(unused_variables)]
pub unsafe fn warpgroup_wait<const N: usize, const PENDING: u32>(d: &mut [[f32; 4]; N]) {
    with_any_accumulators!(
        d, "wgmma.wait_group.sync.aligned {p}; // ", "", p = const PENDING, options(nostack)
    )
}

#[inline(always)]
pub unsafe fn warpgroup_registers<const REGISTERS: u32, const TAKES: bool>() {
    if TAKES {
        warpgroup!("setmaxnreg.inc.sync.aligned.u32 {};", const REGISTERS, options(nostack))
    } else {
        warpgroup!("setmaxnreg.dec.sync.aligned.u32 {};", const REGISTERS, options(nostack))
    }
}

// Arithmetic.

#[inline(always)]
pub fn ex2(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("ex2.approx.ftz.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

#[inline(always)]
pub fn lg2(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("lg2.approx.ftz.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

#[inline(always)]
pub fn rcp(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("rcp.approx.ftz.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("sqrt.rn.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

#[inline(always)]
pub fn sqrt_f64(x: f64) -> f64 {
    let y: f64;
    unsafe { asm!("sqrt.rn.f64 {}, {};", out(reg64) y, in(reg64) x, options(pure, nomem, nostack)) };
    y
}

#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let y: f32;
    unsafe {
        asm!(
            "fma.rn.f32 {}, {}, {}, {};",
            out(reg32) y, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem, nostack)
        )
    };
    y
}

#[inline(always)]
pub fn pack_f16(lo: f32, hi: f32) -> u32 {
    let pair: u32;
    unsafe {
        asm!(
            "cvt.rn.f16x2.f32 {}, {}, {};",
            out(reg32) pair, in(reg32) hi, in(reg32) lo, options(pure, nomem, nostack)
        )
    };
    pair
}

#[inline(always)]
pub fn pack_bf16(lo: f32, hi: f32) -> u32 {
    let pair: u32;
    unsafe {
        asm!(
            "cvt.rn.bf16x2.f32 {}, {}, {};",
            out(reg32) pair, in(reg32) hi, in(reg32) lo, options(pure, nomem, nostack)
        )
    };
    pair
}

macro_rules! add_times_zero {
    ($name:ident, $instruction:literal) => {
        #[inline(always)]
        pub fn $name(sum: u32, pair: u32) -> u32 {
            let result: u32;
            unsafe {
                asm!(
                    concat!($instruction, " {}, {}, {}, {};"),
                    out(reg32) result, in(reg32) pair, in(reg32) 0u32, in(reg32) sum,
                    options(pure, nomem, nostack)
                )
            };
            result
        }
    };
}
add_times_zero!(add_times_zero_f16, "fma.rn.f16x2");
add_times_zero!(add_times_zero_bf16, "fma.rn.bf16x2");

#[inline(always)]
pub fn unpack_f16(pair: u32) -> [f32; 2] {
    let (lo, hi): (f32, f32);
    unsafe {
        asm!(
            "{{.reg .b16 l, h; mov.b32 {{l, h}}, {2}; cvt.f32.f16 {0}, l; cvt.f32.f16 {1}, h;}}",
            out(reg32) lo, out(reg32) hi, in(reg32) pair, options(pure, nomem, nostack)
        )
    };
    [lo, hi]
}
