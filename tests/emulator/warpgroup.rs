//! Faults around products of warpgroups.

use super::*;
use half::bf16;
use kernels_gpu::simt::warpgroup::{self, Columns};

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
    let mut b = Columns { start: columns, row_bytes: 1024, column_bytes };
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
            warpgroup::mma_bf16::<_, false>(&mut d, twos, b);
        } else {
            warpgroup::mma_bf16::<_, true>(&mut d, twos, b);
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
            Plan::OtherAccumulators => warpgroup::wait(&mut [[0.0; 4]; 8]),
            Plan::NobodyWaits if round == 2 => return,
            _ => warpgroup::wait(&mut d),
        }
        assert!(d.as_flattened().iter().all(|&x| x == 32.0 * round as f32), "accumulators {d:?}");
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
    for (plan, kinds, words) in faults {
        for options in schedules() {
            let report = run(DIMS, &memory, options, || unsafe { products(plan) });
            let report = report.expect_err(&format!("{plan:?}"));
            assert!(kinds.contains(&report.kind), "{plan:?}: {report}");
            assert!(report.message.contains(words), "{plan:?}: {report}");
        }
    }
}
