//! Faults around barriers in shared memory and bulk copies.

use super::*;
use tokenselect_kernels::simt::bulk::{self, MBarrier};

/// Shared memory of the kernels below: a tile of 16 quads, one more array, and two barriers.
struct Ring {
    tile: Region<V4<u32>>,
    barriers: Region<u64>,
    other: Region<u32>,
    bytes: u32,
}

const RING: Ring = {
    let mut carve = Carve::new();
    Ring {
        tile: carve.array(16, 128),
        barriers: carve.array(2, 8),
        other: carve.array(64, 4),
        bytes: carve.bytes(),
    }
};

const DIMS: Dims = Dims::linear(1, 64, RING.bytes);

fn full() -> MBarrier {
    MBarrier::at(RING.barriers.get())
}

fn empty() -> MBarrier {
    MBarrier::at(RING.barriers.get().add(1))
}

/// Makes both barriers, for one arrival each.
unsafe fn make() {
    if thread_idx_x() == 0 {
        full().init(1);
        empty().init(1);
        bulk::publish();
    }
    sync_threads();
}

fn input(memory: &mut Memory) -> GlobalPtr<V4<u32>> {
    let quads: Vec<V4<u32>> = (0..32).map(|i| V4([i; 4])).collect();
    memory.input("input", &quads)
}

/// What is wrong with a pipeline of two rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plan {
    Correct,
    /// A consumer reads before it has waited.
    NoWait,
    /// One lane waits for its warp, and nothing tells the others.
    OneLaneWaits,
    /// The buffer is filled again while it is read.
    NoEmpty,
    /// Lanes may still read when the first says that the buffer is empty.
    NoSyncBeforeEmpty,
    TooFewBytes,
    TooManyBytes,
    /// Nobody waits for the last copy.
    NobodyWaits,
}

/// Warp 0 copies 16 quads to the tile, twice; warp 1 reads them.
unsafe fn pipeline(input: GlobalPtr<V4<u32>>, plan: Plan) {
    make();
    let tile = RING.tile.get();
    let mut round = 0;
    while round < 2 {
        if thread_idx_x() == 0 {
            if plan != Plan::NoEmpty {
                empty().wait((round % 2) ^ 1);
            }
            let expected = match plan {
                Plan::TooFewBytes => 128,
                Plan::TooManyBytes => 512,
                _ => 256,
            };
            full().arrive_expecting(expected);
            bulk::copy_to_shared(tile, input.add(16 * round as u64), 256, full());
        } else if warp_id() == 1 && (plan != Plan::NobodyWaits || round == 0) {
            match plan {
                Plan::NoWait => {}
                Plan::OneLaneWaits if lane_id() != 0 => {}
                _ => full().wait(round % 2),
            }
            let quad = tile.add(lane_id() % 16).load();
            assert_eq!(quad, V4([16 * round + lane_id() % 16; 4]));
            if plan != Plan::NoSyncBeforeEmpty {
                warp::sync_warp(FULL);
            }
            if lane_id() == 0 {
                empty().arrive();
            }
        }
        round += 1;
    }
}

#[test]
fn pipelines() {
    let mut memory = Memory::new();
    let input = input(&mut memory);
    passes(DIMS, &memory, || unsafe { pipeline(input, Plan::Correct) });
    let faults: [(Plan, &[Kind], &str); 7] = [
        (Plan::NoWait, &[Kind::AsyncCopy, Kind::Race, Kind::Uninitialised], "shared byte"),
        (Plan::OneLaneWaits, &[Kind::AsyncCopy, Kind::Race, Kind::Uninitialised], "shared byte"),
        (Plan::NoEmpty, &[Kind::AsyncCopy, Kind::Race], "shared byte"),
        (Plan::NoSyncBeforeEmpty, &[Kind::AsyncCopy, Kind::Race], "shared byte"),
        (Plan::TooFewBytes, &[Kind::Deadlock], "-128 bytes outstanding"),
        (
            Plan::TooManyBytes,
            &[Kind::Deadlock],
            "for parity 0 (phase 0: 1 of 1 arrived, 256 bytes outstanding)",
        ),
        (Plan::NobodyWaits, &[Kind::AsyncCopy], "nobody has waited for"),
    ];
    for (plan, kinds, words) in faults {
        for options in schedules() {
            let report = run(DIMS, &memory, options, || unsafe { pipeline(input, plan) }).unwrap_err();
            assert!(kinds.contains(&report.kind), "{plan:?}: {report}");
            assert!(report.message.contains(words), "{plan:?}: {report}");
        }
    }
}

/// Who has the phase from somebody that has waited may read too; who met only the producer may not, whenever the first
/// waits.
#[test]
fn knowledge_of_a_phase_is_passed_on() {
    let mut memory = Memory::new();
    let input = input(&mut memory);
    let kernel = |waits: bool| unsafe {
        make();
        if thread_idx_x() == 0 {
            full().arrive_expecting(256);
            bulk::copy_to_shared(RING.tile.get(), input, 256, full());
        }
        if waits && warp_id() == 1 {
            full().wait(0);
        }
        sync_threads();
        if !waits && thread_idx_x() == 33 {
            full().wait(0);
        }
        RING.tile.get().add(lane_id() % 16).load();
    };
    passes(DIMS, &memory, || kernel(true));
    for options in schedules() {
        let report = run(DIMS, &memory, options, || kernel(false)).unwrap_err();
        assert!(matches!(report.kind, Kind::AsyncCopy | Kind::Race), "{report}");
        assert!(report.message.contains("the bulk copy started at"), "{report}");
    }
}

#[test]
fn rules_of_the_barriers() {
    let memory = Memory::new();
    fails_in(
        DIMS,
        &memory,
        Kind::MBarrier,
        &["lane 3 ", "no mbarrier was made at shared byte 256"],
        || unsafe {
            if thread_idx_x() == 3 {
                full().arrive();
            }
        },
    );
    fails_in(
        DIMS,
        &memory,
        Kind::MBarrier,
        &["lane 0 ", "there is an mbarrier at shared byte 264"],
        || unsafe {
            if thread_idx_x() == 0 {
                empty().init(1);
                empty().init(1);
            }
        },
    );
    fails_in(DIMS, &memory, Kind::MBarrier, &["an mbarrier of 0 arrivals"], || unsafe {
        full().init(0);
    });
    fails_in(DIMS, &memory, Kind::MBarrier, &["where all 1 of the phase have arrived"], || unsafe {
        make();
        if thread_idx_x() == 0 {
            full().arrive_expecting(16);
            full().arrive();
        }
    });
    fails_in(DIMS, &memory, Kind::SharedBounds, &["bytes 256 to 272"], || unsafe {
        MBarrier::at(RING.barriers.get().add(2)).init(1);
    });
    fails_in(DIMS, &memory, Kind::Misaligned, &["no multiple of 8"], || unsafe {
        MBarrier::at(RING.barriers.get().byte_add(4)).init(1);
    });
    fails_in(DIMS, &memory, Kind::Deadlock, &["for parity 0 (phase 0: 0 of 1 arrived, 0 bytes"], || unsafe {
        make();
        full().wait(0);
    });
    // The thread that uses it is not the one that has made it, and has not met it since.
    for options in schedules() {
        let report = run(DIMS, &memory, options, || unsafe {
            if thread_idx_x() == 0 {
                full().init(1);
            } else if thread_idx_x() == 32 {
                full().arrive();
            }
        });
        let report = report.unwrap_err();
        assert!(matches!(report.kind, Kind::MBarrier | Kind::Race), "{report}");
    }
}

/// What is wrong with how barriers are made known.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Making {
    Correct,
    NotPublished,
    PublishedByAnother,
    PublishedBehindTheBarrier,
    /// Published in time, but a second barrier is made behind that.
    OneTooEarly,
}

#[test]
fn barriers_are_published_before_they_are_used() {
    let mut memory = Memory::new();
    let input = input(&mut memory);
    let kernel = |making: Making, by_maker: bool| {
        move || unsafe {
            if thread_idx_x() == 0 {
                empty().init(1);
                if making == Making::OneTooEarly {
                    bulk::publish();
                }
                full().init(1);
                if making == Making::Correct {
                    bulk::publish();
                }
            }
            if making == Making::PublishedByAnother && thread_idx_x() == 1 {
                bulk::publish();
            }
            sync_threads();
            if making == Making::PublishedBehindTheBarrier && thread_idx_x() == 0 {
                bulk::publish();
            }
            if thread_idx_x() == if by_maker { 0 } else { 40 } {
                full().arrive_expecting(64);
                bulk::copy_to_shared(RING.tile.get(), input, 64, full());
            }
            full().wait(0);
        }
    };
    for by_maker in [true, false] {
        passes(DIMS, &memory, kernel(Making::Correct, by_maker));
        for making in [Making::NotPublished, Making::PublishedByAnother, Making::OneTooEarly] {
            for options in schedules() {
                let report = run(DIMS, &memory, options, kernel(making, by_maker)).unwrap_err();
                assert_eq!(report.kind, Kind::MBarrier, "{making:?}: {report}");
                let words = "the mbarrier at shared byte 256, made at tests/emulator/bulk.rs";
                assert!(report.message.contains(words), "{making:?}: {report}");
            }
        }
        for options in schedules() {
            let report = run(DIMS, &memory, options, kernel(Making::PublishedBehindTheBarrier, by_maker));
            let report = report.unwrap_err();
            assert!(matches!(report.kind, Kind::MBarrier | Kind::Race), "{report}");
        }
    }
}

/// Who waits for a phase knows what those did that arrived in it, and the bytes; not what the thread did that asked for them.
#[test]
fn arrivals_release_and_copies_do_not() {
    let mut memory = Memory::new();
    let input = input(&mut memory);
    let kernel = |writer: u32| {
        move || unsafe {
            make();
            if thread_idx_x() == writer {
                RING.other.get().store(1);
            }
            match thread_idx_x() {
                0 => full().arrive_expecting(64),
                32 => bulk::copy_to_shared(RING.tile.get(), input, 64, full()),
                _ => {}
            }
            full().wait(0);
            if thread_idx_x() == 50 {
                RING.tile.get().load();
                RING.other.get().load();
            }
        }
    };
    passes(DIMS, &memory, kernel(0));
    for options in races_alone() {
        let report = run(DIMS, &memory, options, kernel(32)).unwrap_err();
        assert_eq!(report.kind, Kind::Race, "{report}");
    }
}

#[test]
fn sources_of_copies_stay_as_they_are() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[V4([1u32; 4]); 8]);
    let kernel = |early: bool, writer: u32| {
        move || unsafe {
            make();
            if thread_idx_x() == 0 {
                full().arrive_expecting(64);
                bulk::copy_to_shared(RING.tile.get(), x.add(2).as_const(), 64, full());
            }
            if !early {
                full().wait(0);
            }
            sync_threads();
            if thread_idx_x() == writer {
                x.add(1).store(V4([2; 4]));
                x.add(6).store(V4([2; 4]));
                x.add(5).store(V4([2; 4]));
            }
            sync_threads();
            full().wait(0);
        }
    };
    for writer in [0, 33] {
        passes(DIMS, &memory, kernel(false, writer));
        for options in schedules() {
            let report = run(DIMS, &memory, options, kernel(true, writer)).unwrap_err();
            assert_eq!(report.kind, Kind::AsyncCopy, "{report}");
            assert!(
                report.message.contains("write of byte 80 of `x`, from where the copy started at"),
                "{report}"
            );
        }
    }
}

#[test]
fn rules_of_the_copies() {
    let mut memory = Memory::new();
    let (input, written) = (input(&mut memory), memory.buffer("written", &[V4([0u32; 4]); 4]));
    let copy = |dst: u32, src: GlobalPtr<V4<u32>>, bytes: u32| unsafe {
        make();
        if thread_idx_x() == 0 {
            full().arrive_expecting(bytes);
            bulk::copy_to_shared(RING.tile.get().byte_add(dst), src, bytes, full());
        }
        full().wait(0);
    };
    passes(DIMS, &memory, || copy(32, input, 224));
    let byte = |count: u64| GlobalPtr::from_addr(input.addr().wrapping_add(count));
    let faults = [
        (Kind::Misaligned, "bulk copy of 24 bytes", 0, input, 24),
        (Kind::Misaligned, "bulk copy of 0 bytes", 0, input, 0),
        (Kind::Misaligned, "no multiple of 16", 8, input, 64),
        (Kind::Misaligned, "no multiple of 16", 0, byte(8), 64),
        (Kind::SharedBounds, "bytes 0 to 256", 16, input, 256),
        (Kind::GlobalBounds, "16 bytes past the end of `input`", 0, input.add(29), 64),
        (Kind::GlobalBounds, "16 bytes before the start of `input`", 0, byte(0u64.wrapping_sub(16)), 64),
    ];
    for (kind, words, dst, src, bytes) in faults {
        let report = run(DIMS, &memory, Options::default(), || copy(dst, src, bytes)).unwrap_err();
        assert!(report.kind == kind && report.message.contains(words), "{report}");
    }
    // The copy engine does not see what this launch writes.
    let report = run(DIMS, &memory, Options::default(), || unsafe {
        if thread_idx_x() == 0 {
            written.store(V4([1; 4]));
        }
        copy(0, written.as_const(), 64);
    });
    assert_eq!(report.unwrap_err().kind, Kind::ReadOnly);
    // A plain store to a barrier, or beside the copy under way.
    for (fault, kinds) in [(false, [Kind::Race, Kind::Race]), (true, [Kind::AsyncCopy, Kind::Race])] {
        let report = run(DIMS, &memory, Options::default(), || unsafe {
            make();
            match thread_idx_x() {
                0 => {
                    full().arrive_expecting(64);
                    bulk::copy_to_shared(RING.tile.get(), input, 64, full());
                    full().wait(0);
                }
                32 if fault => RING.tile.get().add(3).store(V4([0; 4])),
                33 if !fault => RING.barriers.get().store(0),
                34 => RING.other.get().store(0),
                _ => {}
            }
        });
        let report = report.unwrap_err();
        assert!(kinds.contains(&report.kind), "{report}");
    }
}
