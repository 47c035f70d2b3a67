//! Collectives that do not fit together or never complete.

use super::*;

#[test]
fn masks_that_do_not_fit() {
    fails(32, Kind::Divergence, &["mask 0x0000ffff does not name the calling lane"], || unsafe {
        warp::sync_warp(0xffff)
    });
    fails(32, Kind::Divergence, &["reads lane 20, which is not in the mask 0x0000ffff"], || unsafe {
        if lane_id() < 16 {
            warp::shuffle_idx(0xffff, 1u32, 20);
        }
    });
    is_fine(32, || unsafe {
        if lane_id() < 16 {
            warp::shuffle_idx(0xffff, 1u32, 15);
            warp::sync_warp(0xffff);
        }
    });
}

#[test]
fn barriers_that_do_not_fit() {
    fails(96, Kind::Divergence, &["barrier 1 is in use with", "this call says"], || unsafe {
        if warp_id() < 2 { sync_named(1, 96) } else { sync_named(1, 64) }
    });
    fails(64, Kind::Divergence, &["warp 0 lane", "second arrival at barrier 1"], || unsafe {
        if warp_id() == 0 {
            arrive_named(1, 64);
            arrive_named(1, 64);
        }
    });
    fails(32, Kind::Divergence, &["asked to wait for 40 threads"], || unsafe { sync_named(1, 40) });
    fails(32, Kind::Divergence, &["barriers 0 to 15", "says 16"], || unsafe { sync_named(16, 32) });
    fails(64, Kind::Divergence, &["the other of bar.sync and bar.red"], || unsafe {
        if warp_id() == 0 {
            sync_threads()
        } else {
            sync_threads_or(true);
        }
    });
    is_fine(96, || unsafe {
        sync_named(1, 96);
        if warp_id() < 2 {
            sync_named(1, 64);
        }
        sync_threads_or(true);
        sync_threads();
    });
}

#[test]
#[allow(clippy::if_same_then_else)] // the point: two instructions, not one
fn aligned_instructions_from_two_places() {
    fails(32, Kind::Divergence, &["barriers are aligned", "arrived at barrier 0 at"], || unsafe {
        if lane_id() < 8 { sync_threads() } else { sync_threads() }
    });
    fails(32, Kind::Divergence, &["MmaBf16 is aligned, but lanes"], || unsafe {
        let mut d = [0.0; 4];
        if lane_id() < 8 {
            tensor::mma_bf16(&mut d, [0; 4], [0; 2])
        } else {
            tensor::mma_bf16(&mut d, [0; 4], [0; 2])
        }
    });
    // Different warps may be in different places.
    is_fine(64, || unsafe {
        let mut d = [0.0; 4];
        if warp_id() == 0 {
            tensor::mma_bf16(&mut d, [0; 4], [0; 2]);
            sync_threads()
        } else {
            tensor::mma_bf16(&mut d, [0; 4], [0; 2]);
            sync_threads()
        }
    });
}

#[test]
fn deadlocks() {
    fails(
        64,
        Kind::Deadlock,
        &["warps [1] lanes 8-31: ended", "wait at barrier 0 (40 of 64 arrived)"],
        || unsafe {
            if thread_idx_x() < 40 {
                sync_threads()
            }
        },
    );
    fails(64, Kind::Deadlock, &["warps [0, 1] lanes", "wait in SyncWarp with mask 0xffffffff"], || unsafe {
        if thread_idx_x() & 1 == 0 {
            warp::sync_warp(0x5555_5555);
            sync_threads()
        } else {
            warp::sync_warp(FULL)
        }
    });
    fails(
        32,
        Kind::Deadlock,
        &["lanes 0-15: wait in ShuffleXor", "lanes 16-31: wait in Ballot"],
        || unsafe {
            if lane_id() < 16 {
                warp::shuffle_xor(FULL, 1u32, 1);
            } else {
                warp::ballot(FULL, true);
            }
        },
    );
    fails(96, Kind::Deadlock, &["warps [0, 1]", "warps [2]", "barrier 2 (32 of 96 arrived)"], || unsafe {
        if warp_id() < 2 { sync_named(1, 96) } else { sync_named(2, 96) }
    });
    fails(32, Kind::Deadlock, &["lanes 0: ended", "lanes 1-31: wait in SyncWarp"], || unsafe {
        loop {
            if lane_id() == 0 {
                return;
            }
            warp::sync_warp(FULL)
        }
    });
}

#[test]
fn spinning_ends_or_is_reported() {
    let mut memory = Memory::new();
    let flag = memory.buffer("flag", &[0u32]);
    let spin = |set: bool| {
        move || unsafe {
            if thread_idx_x() == 40 {
                while flag.load_acquire() == 0 {}
                flag.store_release(0);
            }
            if thread_idx_x() == 3 && set {
                flag.store_release(1);
            }
        }
    };
    passes(block(64), &memory, spin(true));
    for options in schedules() {
        let options = Options { budget: 10_000, ..options };
        let report = run(block(64), &memory, options, spin(false)).unwrap_err();
        assert_eq!(report.kind, Kind::Deadlock);
        assert!(report.message.contains("still running after 10000 switches"), "{report}");
    }
}
