//! Faults around products of warpgroups.

use super::*;
use half::bf16;
use tokenselect_kernels::simt::bulk::{MBarrier, publish};
use tokenselect_kernels::simt::tensor::{cp_async_16, cp_async_commit, cp_async_wait};
use tokenselect_kernels::simt::warpgroup::{self, Columns, Rows};

/// B: 16 rows of 64 columns.
const COLUMNS: Region<bf16> = Carve::new().array(16 * 64, 128);
const DIMS: Dims = Dims::linear(1, 128, COLUMNS.bytes());

/// What is wrong with two products.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plan {
    Correct,
    /// B was written by stores that tensor cores need not see.
    NoFenceOfWrites,
    /// Nothing orders the products behind the stores of other threads.
    NoBarrier,
    /// Registers are not ordered in front of the first product, or of the second.
    NoFence,
    NoSecondFence,
    NoCommit,
    /// The accumulators are read while the product is under way.
    NoWait,
    /// B is written while a product may read it.
    WrittenUnderWay,
    /// B is not where its strides say.
    Beyond,
    /// B was written by atomics behind the fence.
    AtomicsBehindFence,
    /// Three warps multiply without the first; or those of another B; or a lane has another.
    OneWarpLess,
    OtherColumns,
    OneLaneElsewhere,
    /// Accumulators are written while a product is under way.
    OverwrittenUnderWay,
    /// The wait is for other accumulators.
    OtherAccumulators,
    /// Nobody waits for the last product.
    NobodyWaits,
}

/// Twos times ones: 32, and once more.
unsafe fn products(plan: Plan) {
    let columns = COLUMNS.get();
    let mut i = thread_idx_x();
    while i < 16 * 64 {
        columns.add(i).store(bf16::ONE);
        i += 128;
    }
    if plan != Plan::NoFenceOfWrites {
        warpgroup::fence_writes();
    }
    if plan == Plan::AtomicsBehindFence {
        sync_threads();
        columns.add(2 * thread_idx_x()).cast::<u32>().atomic_add(0);
    }
    if plan != Plan::NoBarrier {
        sync_threads();
    }
    if plan == Plan::OneWarpLess && warp_id() == 0 {
        return;
    }
    let column_bytes = if plan == Plan::Beyond { 256 } else { 128 };
    let mut b = Columns { start: columns, row_bytes: 1024, column_bytes, is_swizzled: false };
    if plan == Plan::OtherColumns && warp_id() == 2 || plan == Plan::OneLaneElsewhere && lane_id() == 5 {
        b.row_bytes = 0;
    }
    let mut d = [[5.0; 4]; 8];
    for round in 1..3 {
        if plan != Plan::NoFence && (plan != Plan::NoSecondFence || round == 1) {
            warpgroup::fence();
        }
        let twos = [0x4000_4000; 4];
        if round == 1 {
            warpgroup::mma_bf16::<_, _, false, false>(&mut d, twos, b);
        } else {
            warpgroup::mma_bf16::<_, _, true, false>(&mut d, twos, b);
        }
        if plan != Plan::NoCommit {
            warpgroup::commit();
        }
        if plan == Plan::WrittenUnderWay {
            columns.add(thread_idx_x()).store(bf16::ONE);
        }
        if plan == Plan::OverwrittenUnderWay {
            d[3][1] = 0.0;
        }
        match plan {
            Plan::NoWait => {}
            Plan::OtherAccumulators => warpgroup::wait::<_, 0>(&mut [[0.0; 4]; 8]),
            Plan::NobodyWaits if round == 2 => return,
            _ => warpgroup::wait::<_, 0>(&mut d),
        }
        assert!(d.as_flattened().iter().all(|&x| x == 32.0 * round as f32), "accumulators {d:?}");
    }
}

/// Under every schedule, each plan ends in a report of one of its kinds that contains its words.
fn fails_as_planted<P: Copy + std::fmt::Debug + Sync>(
    dims: Dims,
    memory: &Memory,
    faults: &[(P, &[Kind], &str)],
    kernel: impl Fn(P) + Sync,
) {
    for &(plan, kinds, words) in faults {
        for options in schedules() {
            let report = run(dims, memory, options, || kernel(plan));
            let report = report.expect_err(&format!("{plan:?}"));
            assert!(kinds.contains(&report.kind), "{plan:?}: {report}");
            assert!(report.message.contains(words), "{plan:?}: {report}");
        }
    }
}

#[test]
fn products_of_a_warpgroup() {
    let memory = Memory::new();
    passes(DIMS, &memory, || unsafe { products(Plan::Correct) });
    let faults: [(Plan, &[Kind], &str); 15] = [
        (Plan::NoFenceOfWrites, &[Kind::Warpgroup], "without fence_writes behind it"),
        (Plan::NoBarrier, &[Kind::Race, Kind::Uninitialised], "shared byte"),
        (Plan::NoFence, &[Kind::Warpgroup], "without warpgroup::fence"),
        (Plan::NoSecondFence, &[Kind::Warpgroup], "without warpgroup::fence"),
        (Plan::NoCommit, &[Kind::Warpgroup], "no commit has closed"),
        (Plan::NoWait, &[Kind::Panic], "accumulators [[NaN"),
        (Plan::WrittenUnderWay, &[Kind::Warpgroup, Kind::Race], "shared byte"),
        (Plan::Beyond, &[Kind::SharedBounds], "leaves its array"),
        (Plan::AtomicsBehindFence, &[Kind::Warpgroup], "without fence_writes behind it"),
        (Plan::OneWarpLess, &[Kind::Warpgroup], "not those of the first warp"),
        (Plan::OtherColumns, &[Kind::Warpgroup], "not those of the first warp"),
        (Plan::OneLaneElsewhere, &[Kind::Warpgroup], "lane 5 (thread"),
        (Plan::OverwrittenUnderWay, &[Kind::Warpgroup], "written meanwhile"),
        (Plan::OtherAccumulators, &[Kind::Warpgroup], "not under way"),
        (Plan::NobodyWaits, &[Kind::Warpgroup], "ends with products under way"),
    ];
    fails_as_planted(DIMS, &memory, &faults, |plan| unsafe { products(plan) });
}

/// What is wrong with two products that are under way at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
enum TwoPlan {
    Correct,
    /// The wait leaves under way what it is for.
    WaitsTooShort,
    /// Accumulators of both in one product.
    Mixed,
    /// A part of those under way.
    Part,
    /// A lane has not fenced what others have written.
    OneLaneUnfenced,
    /// Threads fence before the barrier, and not behind it.
    FencedTooEarly,
    /// B is swizzled and leaves its array.
    SwizzledBeyond,
    /// Written while the second product may read it, behind the first's wait.
    WrittenBehindFirst,
}

/// Ones times twos in swizzled lines, by rows: 32 in each of two accumulators.
unsafe fn two_products(plan: TwoPlan) {
    let columns = LINES.get();
    if plan == TwoPlan::FencedTooEarly {
        warpgroup::fence_writes();
    }
    let mut i = thread_idx_x();
    while i < 16 * 64 {
        columns.add(i).store(bf16::from_f32(2.0));
        i += 128;
    }
    sync_threads();
    if plan != TwoPlan::FencedTooEarly && !(plan == TwoPlan::OneLaneUnfenced && thread_idx_x() == 37) {
        warpgroup::fence_writes();
    }
    warp::sync_warp(warp::FULL);
    let row_bytes = if plan == TwoPlan::SwizzledBeyond { 2048 } else { 1024 };
    let b = Columns { start: columns, row_bytes, column_bytes: 2048, is_swizzled: true };
    let (mut first, mut second) = ([[0.0; 4]; 8], [[0.0; 4]; 8]);
    let ones = [0x3f80_3f80; 4];
    warpgroup::fence();
    warpgroup::mma_bf16::<_, _, false, true>(&mut first, ones, b);
    if plan == TwoPlan::Part {
        let mut more = [[first[0][0]; 4]; 12];
        warpgroup::mma_bf16::<_, _, true, true>(&mut more, ones, Columns { column_bytes: 0, ..b });
    }
    warpgroup::commit();
    warpgroup::mma_bf16::<_, _, false, true>(&mut second, ones, b);
    if plan == TwoPlan::Mixed {
        second[3] = first[3];
        warpgroup::mma_bf16::<_, _, true, true>(&mut second, ones, b);
    }
    warpgroup::commit();
    if plan == TwoPlan::WaitsTooShort {
        warpgroup::wait::<_, 1>(&mut second);
    }
    warpgroup::wait::<_, 1>(&mut first);
    if plan == TwoPlan::WrittenBehindFirst {
        columns.add(thread_idx_x()).store(bf16::ONE);
    }
    assert!(first.as_flattened().iter().all(|&x| x == 32.0), "accumulators {first:?}");
    warpgroup::wait::<_, 0>(&mut second);
    assert!(second.as_flattened().iter().all(|&x| x == 32.0), "accumulators {second:?}");
}

/// 16 lines.
const LINES: Region<bf16> = Carve::new().array(16 * 64, 1024);

#[test]
fn two_products_of_a_warpgroup_at_a_time() {
    let (memory, dims) = (Memory::new(), Dims::linear(1, 128, LINES.bytes()));
    passes(dims, &memory, || unsafe { two_products(TwoPlan::Correct) });
    let faults: [(TwoPlan, &[Kind], &str); 7] = [
        (TwoPlan::WaitsTooShort, &[Kind::Warpgroup], "may be among the 1 groups under way"),
        (TwoPlan::Mixed, &[Kind::Warpgroup], "some are under way for others"),
        (TwoPlan::Part, &[Kind::Warpgroup], "a part of the accumulators"),
        (TwoPlan::OneLaneUnfenced, &[Kind::Warpgroup], "without fence_writes behind it"),
        (TwoPlan::FencedTooEarly, &[Kind::Warpgroup], "without fence_writes behind it"),
        (TwoPlan::SwizzledBeyond, &[Kind::SharedBounds], "leaves its array"),
        (TwoPlan::WrittenBehindFirst, &[Kind::Warpgroup, Kind::Race], "shared byte"),
    ];
    fails_as_planted(dims, &memory, &faults, |plan| unsafe { two_products(plan) });
}

/// What is wrong with a product whose operands both lie in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum SharedPlan {
    Correct,
    /// A was written by stores that tensor cores need not see.
    RowsUnfenced,
    /// Each warp writes its own rows of A, and no barrier orders them before the others' products.
    RowsOfOneWarp,
    /// A leaves its array.
    RowsBeyond,
    /// A lane, or a warp, has another A.
    OneLaneElsewhere,
    OtherRows,
    /// A is written while a product may read it.
    WrittenUnderWay,
}

/// Four lines of eight for A, of which a product takes a quarter each, and B behind them.
const A_LINES: Region<bf16> = Carve::new().array(64 * 64, 1024);
const B_LINES: Region<bf16> = Carve::after(A_LINES.bytes()).array(64 * 64, 1024);

/// Row numbers, as A, times ones: 16 times the row.
unsafe fn product_from_shared(plan: SharedPlan) {
    let (rows, columns) = (A_LINES.get(), B_LINES.get());
    let own = thread_idx_x();
    for i in 0..32 {
        columns.add(32 * own + i).store(bf16::ONE);
    }
    warpgroup::fence_writes();
    sync_threads();
    for i in 0..32 {
        // Half of a line, of a row of the thread's own warp.
        rows.add(32 * own + i).store(bf16::from_f32((own / 2) as f32));
    }
    if plan == SharedPlan::RowsOfOneWarp {
        warpgroup::fence_writes();
        warp::sync_warp(warp::FULL);
    } else {
        sync_threads();
    }
    if plan != SharedPlan::RowsUnfenced {
        warpgroup::fence_writes();
    }
    warp::sync_warp(warp::FULL);
    let b = Columns { start: columns, row_bytes: 0, column_bytes: 1024, is_swizzled: true };
    let row_bytes = if plan == SharedPlan::RowsBeyond { 2048 } else { 1024 };
    let mut a = Rows { start: rows, row_bytes };
    if plan == SharedPlan::OneLaneElsewhere && lane_id() == 5
        || plan == SharedPlan::OtherRows && warp_id() == 2
    {
        a.row_bytes = 0;
    }
    let mut d = [[0.0; 4]; 8];
    warpgroup::fence();
    warpgroup::mma_from_shared_bf16::<_, _, false, false>(&mut d, a, b);
    warpgroup::commit();
    if plan == SharedPlan::WrittenUnderWay {
        rows.add(own).store(bf16::ONE);
    }
    warpgroup::wait::<_, 0>(&mut d);
    if plan == SharedPlan::OtherRows {
        return;
    }
    let row = 16 * warp_id() + lane_id() / 4;
    for [a, b, c, e] in d {
        assert_eq!([a, b, c, e], [row, row, row + 8, row + 8].map(|row| 16.0 * row as f32));
    }
}

#[test]
fn a_product_from_shared_memory() {
    let bytes = B_LINES.offset() + B_LINES.bytes();
    let (memory, dims) = (Memory::new(), Dims::linear(1, 128, bytes));
    passes(dims, &memory, || unsafe { product_from_shared(SharedPlan::Correct) });
    let faults: [(SharedPlan, &[Kind], &str); 6] = [
        (SharedPlan::RowsUnfenced, &[Kind::Warpgroup], "without fence_writes behind it"),
        (SharedPlan::RowsOfOneWarp, &[Kind::Race, Kind::Uninitialised], "shared byte"),
        (SharedPlan::RowsBeyond, &[Kind::SharedBounds], "leaves its array"),
        (SharedPlan::OneLaneElsewhere, &[Kind::Warpgroup], "another A than lane 0"),
        (SharedPlan::OtherRows, &[Kind::Warpgroup], "not those of the first warp"),
        (SharedPlan::WrittenUnderWay, &[Kind::Warpgroup, Kind::Race], "shared byte"),
    ];
    fails_as_planted(dims, &memory, &faults, |plan| unsafe { product_from_shared(plan) });
}

#[test]
fn registers_of_warpgroups() {
    let (memory, dims) = (Memory::new(), Dims::linear(1, 384, 0));
    passes(dims, &memory, || unsafe {
        if thread_idx_x() < 128 {
            warpgroup::give_registers::<40>();
        } else {
            warpgroup::take_registers::<232>();
        }
    });
    type Kernel = (&'static str, fn());
    let faults: [Kernel; 4] = [
        ("66560 registers, it has 64512", || unsafe {
            if thread_idx_x() < 128 {
                warpgroup::give_registers::<40>();
            } else {
                warpgroup::take_registers::<240>();
            }
        }),
        ("no multiple of 8", || unsafe { warpgroup::give_registers::<44>() }),
        ("has asked for 40 before", || unsafe {
            warpgroup::give_registers::<40>();
            warpgroup::give_registers::<32>();
        }),
        ("not those of the first warp", || unsafe {
            if thread_idx_x() < 96 {
                warpgroup::give_registers::<40>();
            } else {
                warpgroup::give_registers::<48>();
            }
        }),
    ];
    for (words, kernel) in faults {
        let report = run(dims, &memory, Options::default(), kernel).expect_err(words);
        assert!(report.kind == Kind::Warpgroup && report.message.contains(words), "{words}: {report}");
    }
}

/// Copies by one warp that another waits for at a barrier in memory, which `arrive` tells.
fn copies_for_another_warp(arrives_with_copies: bool, waits: bool) -> Result<Stats, Report> {
    const SOURCE: [u32; 32 * 4] = [7; 32 * 4];
    let mut carve = Carve::new();
    let (copied, word) = (carve.array::<u32>(32 * 4, 16), carve.array::<u64>(1, 8));
    let mut memory = Memory::new();
    let source: GlobalPtr<u32> = memory.input("source", &SOURCE);
    run(Dims::linear(1, 64, carve.bytes()), &memory, Options::default(), || unsafe {
        let (arrived, own) = (MBarrier::at(word.get()), copied.get().add(4 * lane_id()));
        if thread_idx_x() == 0 {
            arrived.init(32);
            publish();
        }
        sync_threads();
        if warp_id() == 0 {
            cp_async_16(own, source.add(4 * lane_id() as u64), 16);
            if arrives_with_copies {
                arrived.arrive_with_copies();
            } else {
                arrived.arrive();
            }
        } else {
            if waits {
                arrived.wait(0);
            }
            assert_eq!(own.add(3).load(), 7);
        }
        sync_threads();
        if warp_id() == 0 {
            cp_async_commit();
            cp_async_wait::<0>();
        }
    })
}

#[test]
fn copies_that_arrive_at_a_barrier_in_memory() {
    copies_for_another_warp(true, true).unwrap();
    let report = copies_for_another_warp(false, true).expect_err("not landed");
    assert!(report.kind == Kind::AsyncCopy, "{report}");
    let report = copies_for_another_warp(true, false).expect_err("not waited for");
    assert!([Kind::Race, Kind::AsyncCopy, Kind::Uninitialised].contains(&report.kind), "{report}");
}
