//! A ring: one warp fills its stages by bulk copies, the others read them.

use tokenselect_kernels::common::ring::{Ring, Stage};
use tokenselect_kernels::emu::Kind;
use tokenselect_kernels::simt::data::V4;
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};
use tokenselect_kernels::simt::shared::{Carve, Region};
use tokenselect_kernels::simt::{bulk, thread, warp};

use super::*;

const STAGES: u32 = 2;
const ROUNDS: u32 = 3;
const CONSUMERS: u32 = 2;
/// Pieces of 16 bytes of a stage: one for each lane.
const STAGE: u32 = 32;

struct Layout {
    stages: Region<V4<u32>>,
    ring: Ring,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    let stages = carve.array(STAGES * STAGE, 128);
    Layout { stages, ring: Ring::carve(&mut carve, STAGES), bytes: carve.bytes() }
};

const DIMS: Dims = Dims::linear(1, 32 * (1 + CONSUMERS), LAYOUT.bytes);

/// What a side does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Plan {
    Correct,
    /// A consumer says that it has read a stage before it has.
    ReleasesEarly,
    /// A consumer reads a stage that it has not waited for.
    DoesNotWait,
    /// The producer fills a stage that is not known to be empty.
    DoesNotAcquire,
    /// The producer announces more than it copies.
    AnnouncesTooMuch,
    /// The barriers are not made known.
    DoesNotPublish,
}

unsafe fn stream(input: GlobalPtr<V4<u32>>, out: GlobalMut<u32>, plan: Plan) {
    let ring = &LAYOUT.ring;
    let is_producer = warp::warp_id() == CONSUMERS;
    if is_producer && warp::lane_id() == 0 {
        ring.init(CONSUMERS);
        if plan != Plan::DoesNotPublish {
            bulk::publish();
        }
    }
    thread::sync_threads();
    let mut stage = Stage::FIRST;
    for step in 0..ROUNDS * STAGES {
        let at = LAYOUT.stages.get().add(stage.index * STAGE);
        if is_producer {
            let bytes = 16 * STAGE + if plan == Plan::AnnouncesTooMuch { 16 } else { 0 };
            if plan == Plan::DoesNotAcquire {
                if warp::lane_id() == 0 {
                    ring.arrived(stage).arrive_expecting(bytes);
                }
            } else {
                ring.acquire(stage, bytes);
            }
            if warp::lane_id() == 0 {
                let from = input.add((step * STAGE) as u64);
                bulk::copy_to_shared(at, from, 16 * STAGE, ring.arrived(stage));
            }
        } else {
            if plan != Plan::DoesNotWait {
                ring.wait(stage);
            }
            if plan == Plan::ReleasesEarly {
                ring.release(stage);
            }
            let lane = warp::lane_id();
            let value = at.add(lane).load().0[0];
            if plan != Plan::ReleasesEarly {
                ring.release(stage);
            }
            out.add(((step * CONSUMERS + warp::warp_id()) * STAGE + lane) as u64).store(value);
        }
        stage = stage.next(STAGES);
    }
}

fn memory() -> (Memory, GlobalPtr<V4<u32>>, GlobalMut<u32>) {
    let mut memory = Memory::new();
    let quads: Vec<V4<u32>> = (0..ROUNDS * STAGES * STAGE).map(|i| V4([i; 4])).collect();
    let input = memory.input("input", &quads);
    let out = memory.buffer("out", &vec![0u32; (ROUNDS * STAGES * CONSUMERS * STAGE) as usize]);
    (memory, input, out)
}

#[test]
fn every_consumer_reads_every_stage() {
    let (mut memory, input, out) = memory();
    let kernel = || unsafe { stream(input, out, Plan::Correct) };
    passes(DIMS, &mut memory, kernel, |memory| {
        let len = (ROUNDS * STAGES * CONSUMERS * STAGE) as usize;
        for (step, values) in memory.read(out, len).chunks((CONSUMERS * STAGE) as usize).enumerate() {
            let of_stage: Vec<u32> = (0..STAGE).map(|i| step as u32 * STAGE + i).collect();
            assert_eq!(values, of_stage.repeat(CONSUMERS as usize), "step {step}");
        }
    });
}

#[track_caller]
fn fails(plan: Plan, kinds: &[Kind]) {
    for options in schedules() {
        let (memory, input, out) = memory();
        let options = Options { budget: 100_000, ..options };
        let report = run(DIMS, &memory, options, || unsafe { stream(input, out, plan) }).unwrap_err();
        assert!(kinds.contains(&report.kind), "{report}");
    }
}

/// The copy of the next round may arrive while the stage is still read.
#[test]
fn a_stage_released_too_early_is_reported() {
    fails(Plan::ReleasesEarly, &[Kind::Race]);
}

#[test]
fn other_faults_are_reported() {
    fails(Plan::DoesNotWait, &[Kind::AsyncCopy, Kind::Race, Kind::Uninitialised]);
    fails(Plan::DoesNotAcquire, &[Kind::AsyncCopy, Kind::Race, Kind::MBarrier]);
    fails(Plan::AnnouncesTooMuch, &[Kind::Deadlock]);
    fails(Plan::DoesNotPublish, &[Kind::AsyncCopy, Kind::MBarrier, Kind::Race]);
}

/// A producer that learns that nobody wants its stages waits for them before the block ends.
#[test]
fn stages_that_nobody_reads_are_drained() {
    for (filled, drains) in [(0, true), (1, true), (STAGES, true), (1, false)] {
        let (mut memory, input, _) = memory();
        let kernel = || unsafe {
            let ring = &LAYOUT.ring;
            if thread::thread_idx_x() == 0 {
                ring.init(1);
                bulk::publish();
            }
            thread::sync_threads();
            let mut stage = Stage::FIRST;
            for _ in 0..filled {
                ring.acquire(stage, 16 * STAGE);
                if warp::lane_id() == 0 {
                    let to = LAYOUT.stages.get().add(stage.index * STAGE);
                    bulk::copy_to_shared(to, input, 16 * STAGE, ring.arrived(stage));
                }
                stage = stage.next(STAGES);
            }
            if drains {
                ring.drain(stage);
            }
        };
        let dims = Dims::linear(1, 32, LAYOUT.bytes);
        if drains {
            passes(dims, &mut memory, kernel, |_| ());
        } else {
            run(dims, &memory, Options::default(), kernel).unwrap_err();
        }
    }
}
