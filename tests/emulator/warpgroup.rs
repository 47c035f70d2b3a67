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
    if plan != Plan::NoBarrier {
        sync_threads();
    }
    let column_bytes = if plan == Plan::Beyond { 256 } else { 128 };
    let b = Columns { start: columns, row_bytes: 1024, column_bytes };
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
        if plan != Plan::NoWait {
            warpgroup::wait(&mut d);
        }
        assert!(d.as_flattened().iter().all(|&x| x == 32.0 * round as f32), "accumulators {d:?}");
    }
}

#[test]
fn products_of_a_warpgroup() {
    let memory = Memory::new();
    passes(DIMS, &memory, || unsafe { products(Plan::Correct) });
    let faults: [(Plan, &[Kind], &str); 8] = [
        (Plan::NoFenceOfWrites, &[Kind::Warpgroup], "without fence_writes behind it"),
        (Plan::NoBarrier, &[Kind::Race, Kind::Uninitialised], "shared byte"),
        (Plan::NoFence, &[Kind::Warpgroup], "without warpgroup::fence"),
        (Plan::NoSecondFence, &[Kind::Warpgroup], "without warpgroup::fence"),
        (Plan::NoCommit, &[Kind::Warpgroup], "no commit has closed"),
        (Plan::NoWait, &[Kind::Panic], "accumulators [[NaN"),
        (Plan::WrittenUnderWay, &[Kind::Warpgroup, Kind::Race], "shared byte"),
        (Plan::Beyond, &[Kind::SharedBounds], "leaves its array"),
    ];
    for (plan, kinds, words) in faults {
        for options in schedules() {
            let report = run(DIMS, &memory, options, || unsafe { products(plan) }).unwrap_err();
            assert!(kinds.contains(&report.kind), "{plan:?}: {report}");
            assert!(report.message.contains(words), "{plan:?}: {report}");
        }
    }
}
