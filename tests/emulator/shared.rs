//! Faults in shared memory: races, uninitialised reads, copies under way, bounds.

use super::*;

#[test]
fn race_between_warps() {
    let exchange = |sync: bool| {
        move || unsafe {
            let a = LAYOUT.a.get();
            a.add(thread_idx_x()).store(1);
            if sync {
                sync_threads()
            } else {
                warp::sync_warp(FULL)
            }
            a.add(thread_idx_x() ^ 32).load();
        }
    };
    let (write, read) = ("races with the write by thread", "races with the read by thread");
    is_fine(64, exchange(true));
    for options in races_alone() {
        let report = run(block(64), &Memory::new(), options, exchange(false)).unwrap_err();
        let text = report.to_string();
        assert!(text.contains(write) || text.contains(read), "{text}");
        assert!(text.contains("warp ") && text.contains(" lane "), "{text}");
        // Both ends are named.
        assert_eq!((report.kind, text.matches(file!()).count()), (Kind::Race, 2), "{text}");
    }
}

#[test]
fn race_of_two_writes() {
    fails(64, Kind::Race, &["lane 7 ", "shared byte 28", "write of", "write by thread"], || unsafe {
        if lane_id() == 7 {
            LAYOUT.a.get().add(7).store(warp_id());
        }
    });
    is_fine(64, || unsafe {
        if thread_idx_x() == 7 {
            LAYOUT.a.get().add(7).store(warp_id());
        }
    });
}

#[test]
fn race_of_a_write_behind_reads() {
    let reuse = |sync: bool| {
        move || unsafe {
            let a = LAYOUT.a.get();
            a.add(lane_id()).store(1);
            warp::sync_warp(FULL);
            a.add(3).load();
            if sync {
                warp::sync_warp(FULL);
            }
            if lane_id() == 5 {
                a.add(3).store(2);
            }
        }
    };
    is_fine(32, reuse(true));
    for options in schedules() {
        let report = run(block(32), &Memory::new(), options, reuse(false)).unwrap_err();
        assert_eq!(report.kind, Kind::Race, "{report}");
        assert!(report.message.contains("shared byte 12"), "{report}");
    }
}

#[test]
fn shuffles_order_nothing() {
    fails(32, Kind::Race, &["shared byte"], || unsafe {
        LAYOUT.a.get().add(lane_id()).store(1);
        warp::shuffle_xor(FULL, 1u32, 1);
        warp::ballot(FULL, true);
        LAYOUT.a.get().add(lane_id() ^ 1).load();
    });
    is_fine(32, || unsafe {
        LAYOUT.a.get().add(lane_id()).store(1);
        warp::sync_warp(FULL);
        LAYOUT.a.get().add(lane_id() ^ 1).load();
    });
}

#[test]
fn partial_sync_warp_orders_its_lanes_alone() {
    let exchange = |distance: u32| {
        move || unsafe {
            let half = if lane_id() < 16 { 0xffff } else { 0xffff_0000 };
            LAYOUT.a.get().add(lane_id()).store(1);
            warp::sync_warp(half);
            LAYOUT.a.get().add(lane_id() ^ distance).load();
        }
    };
    is_fine(32, exchange(8));
    for options in races_alone() {
        let report = run(block(32), &Memory::new(), options, exchange(16)).unwrap_err();
        assert_eq!(report.kind, Kind::Race, "{report}");
    }
}

#[test]
fn named_barriers_order_producers_and_consumers() {
    // Warps 0 and 1 fill, warp 2 empties; warp 3 has no part in it.
    let pipeline = |reader: u32| {
        move || unsafe {
            let a = LAYOUT.a.get();
            match warp_id() {
                0 | 1 => {
                    a.add(thread_idx_x()).store(thread_idx_x());
                    arrive_named(3, 96);
                }
                2 => sync_named(3, 96),
                _ => {}
            }
            if warp_id() == reader {
                let found = a.add(2 * lane_id()).load();
                assert!(found == 2 * lane_id() || reader == 3);
            }
        }
    };
    is_fine(128, pipeline(2));
    for options in races_alone() {
        // A count of barriers per block would see one barrier passed and be content.
        let report = run(block(128), &Memory::new(), options, pipeline(3)).unwrap_err();
        assert_eq!(report.kind, Kind::Race, "{report}");
    }
}

#[test]
fn arriving_orders_nothing_behind_it() {
    // Warp 0 writes once more after its arrival: warp 1 must not read that.
    fails(64, Kind::Race, &["shared byte", "by thread"], || unsafe {
        let a = LAYOUT.a.get().add(lane_id());
        if warp_id() == 0 {
            a.store(1);
            arrive_named(1, 64);
            a.store(2);
        } else {
            sync_named(1, 64);
            a.load();
        }
    });
}

#[test]
fn atomics_race_with_plain_accesses_only() {
    is_fine(64, || unsafe {
        let a = LAYOUT.a.get();
        if thread_idx_x() == 0 {
            a.store(0);
        }
        sync_threads();
        a.atomic_add(1);
        sync_threads();
        assert_eq!(a.load(), 64);
    });
    // Warp 1 reads behind its own atomic, which orders nothing; the other end of the race is the atomic of warp 0.
    let read_behind_atomics = |sync: bool| {
        move || unsafe {
            let a = LAYOUT.a.get();
            if thread_idx_x() == 0 {
                a.store(0);
            }
            sync_threads();
            if thread_idx_x() == 7 || thread_idx_x() == 32 {
                a.atomic_max(1);
            }
            if sync {
                sync_threads();
            }
            if warp_id() == 1 {
                warp::sync_warp(FULL);
                a.load();
            }
        }
    };
    is_fine(64, read_behind_atomics(true));
    for options in schedules() {
        let report = run(block(64), &Memory::new(), options, read_behind_atomics(false)).unwrap_err();
        assert_eq!(report.kind, Kind::Race, "{report}");
        let text = &report.message;
        assert!(
            text.contains("atomic by thread 7 ") || text.contains("thread [7, 0, 0]): atomic of"),
            "{text}"
        );
    }
}

#[test]
fn neighbours_in_one_word_are_no_race() {
    is_fine(64, || unsafe {
        let halves = LAYOUT.a.get().cast::<u16>();
        halves.add(thread_idx_x()).store(thread_idx_x() as u16);
        sync_threads();
        assert_eq!(halves.add(thread_idx_x() ^ 33).load(), thread_idx_x() as u16 ^ 33);
    });
}

#[test]
fn uninitialised_shared_memory() {
    fails(32, Kind::Uninitialised, &["lane 12 ", "read of shared byte 48"], || unsafe {
        let a = LAYOUT.a.get().add(lane_id());
        if lane_id() != 12 {
            a.store(0);
        }
        a.load();
    });
    fails(32, Kind::Uninitialised, &["atomic of shared byte 0"], || unsafe {
        LAYOUT.a.get().atomic_add(1);
    });
    is_fine(32, || unsafe {
        LAYOUT.a.get().add(lane_id()).store(0);
        LAYOUT.a.get().add(lane_id()).load();
    });
}

#[test]
fn uninitialised_means_in_this_block() {
    // Block 1 runs in the memory that block 0 has written.
    let memory = Memory::new();
    let options = Options { threads: 1, ..Options::default() };
    let report = run(Dims::linear(2, 32, LAYOUT.bytes), &memory, options, || unsafe {
        let a = LAYOUT.a.get().add(lane_id());
        if block_idx_x() == 0 {
            a.store(0);
        }
        a.load();
    });
    let report = report.unwrap_err();
    assert_eq!((report.kind, report.block), (Kind::Uninitialised, [1, 0, 0]));
}

#[test]
fn async_copies() {
    let mut memory = Memory::new();
    let input = memory.input("input", &[V4([1u32, 2, 3, 4]); 16]);
    let copy = move |wait: bool, sync: bool, source: u32| unsafe {
        let a = LAYOUT.a.get().cast::<V4<u32>>();
        if lane_id() < 16 {
            tensor::cp_async_16(a.add(lane_id()), input.add(lane_id() as u64), 16);
        }
        tensor::cp_async_commit();
        if wait {
            tensor::cp_async_wait::<0>();
        }
        if sync {
            warp::sync_warp(FULL);
        }
        if lane_id() < 16 {
            assert_eq!(a.add(lane_id() ^ source).load(), V4([1, 2, 3, 4]));
        }
    };
    passes(block(32), &memory, || copy(true, true, 1));
    passes(block(32), &memory, || copy(true, false, 0));
    for options in schedules() {
        let report = run(block(32), &memory, options, || copy(false, true, 0)).unwrap_err();
        assert_eq!(report.kind, Kind::AsyncCopy, "{report}");
        assert!(report.message.contains("no wait yet") && report.message.contains("lane"), "{report}");
        // Waiting makes the bytes visible to the thread that waits, not to its neighbour.
        let report = run(block(32), &memory, options, || copy(true, false, 1)).unwrap_err();
        assert!(matches!(report.kind, Kind::Race | Kind::AsyncCopy | Kind::Uninitialised), "{report}");
    }
    let forward = run(block(32), &memory, Options::default(), || copy(true, false, 8)).unwrap_err();
    assert!(matches!(forward.kind, Kind::Uninitialised | Kind::Race), "{forward}");
}

#[test]
fn async_copy_into_a_buffer_still_read() {
    let mut memory = Memory::new();
    let input = memory.input("input", &[V4([1u32; 4]); 4]);
    let reuse = move |sync: bool| unsafe {
        let a = LAYOUT.a.get();
        a.add(lane_id()).store(0);
        warp::sync_warp(FULL);
        a.add(lane_id() / 4 * 4).load();
        if sync {
            warp::sync_warp(FULL);
        }
        if lane_id() % 4 == 1 && lane_id() < 16 {
            tensor::cp_async_16(a.add(lane_id() / 4 * 4).cast(), input.add(lane_id() as u64 / 4), 16);
        }
        tensor::cp_async_commit();
        tensor::cp_async_wait::<0>();
    };
    passes(block(32), &memory, || reuse(true));
    for options in schedules() {
        let report = run(block(32), &memory, options, || reuse(false)).unwrap_err();
        assert!(matches!(report.kind, Kind::Race | Kind::AsyncCopy), "{report}");
    }
}

#[test]
fn async_copy_checks_its_source() {
    let mut memory = Memory::new();
    let input = memory.input("input", &[V4([1u32; 4]); 4]);
    let a = LAYOUT.a;
    fails_in(
        block(32),
        &memory,
        Kind::GlobalBounds,
        &["lane 3 ", "16 bytes past the end of `input`"],
        || unsafe {
            if lane_id() == 3 {
                tensor::cp_async_16(a.get().cast(), input.add(4), 16);
            }
        },
    );
    fails_in(
        block(32),
        &memory,
        Kind::Misaligned,
        &["lane 3 ", "8-byte read", "no multiple of 16"],
        || unsafe {
            if lane_id() == 3 {
                tensor::cp_async_16(a.get(), input.cast::<u32>().add(1), 8);
            }
        },
    );
    passes(block(32), &memory, || unsafe {
        if lane_id() == 3 {
            tensor::cp_async_16(a.get().cast(), input.add(3), 16);
            // With no byte to copy the source is not looked at.
            tensor::cp_async_16(a.get().add(4).cast(), input.add(1 << 30), 0);
            tensor::cp_async_commit();
            tensor::cp_async_wait::<0>();
        }
    });
}

#[test]
fn async_copies_are_waited_for_before_the_end() {
    let mut memory = Memory::new();
    let input = memory.input("input", &[V4([1u32; 4]); 4]);
    let copy = |commit: bool, pending: u32, bytes: u32| {
        move || unsafe {
            let a = LAYOUT.a.get().cast::<V4<u32>>();
            if thread_idx_x() == 37 {
                tensor::cp_async_16(a, input, 16);
                tensor::cp_async_commit();
                tensor::cp_async_16(a.add(1), input.add(1), bytes);
                if commit {
                    tensor::cp_async_commit();
                }
                if pending == 0 {
                    tensor::cp_async_wait::<0>();
                } else {
                    tensor::cp_async_wait::<1>();
                }
            }
        }
    };
    passes(block(64), &memory, copy(true, 0, 16));
    let words = ["warp 1 lane 5 ", "ended with a cp.async under way"];
    fails_in(block(64), &memory, Kind::AsyncCopy, &words, || unsafe {
        let a = LAYOUT.a.get().cast::<V4<u32>>();
        if thread_idx_x() == 37 {
            tensor::cp_async_16(a, input, 16);
            tensor::cp_async_commit();
        }
    });
    for (commit, pending, bytes) in [(true, 1, 16), (false, 0, 16), (true, 1, 0)] {
        for options in schedules() {
            let report = run(block(64), &memory, options, copy(commit, pending, bytes)).unwrap_err();
            assert_eq!(report.kind, Kind::AsyncCopy, "{report}");
        }
    }
}

#[test]
fn sources_of_async_copies_stay_as_they_are() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[V4([1u32; 4]); 4]);
    // `writer` overwrites what thread 0 copies, as soon as the copy is issued or when it is there.
    let copy = |early: bool, writer: u32, atomic: bool| {
        move || unsafe {
            if thread_idx_x() == 0 {
                tensor::cp_async_16(LAYOUT.a.get().cast(), x.add(1).as_const(), 16);
                tensor::cp_async_commit();
                if !early {
                    tensor::cp_async_wait::<0>();
                }
            }
            sync_threads();
            if thread_idx_x() == writer {
                x.store(V4([2; 4]));
                x.add(2).store(V4([2; 4]));
                let word = x.add(1).cast::<u32>().add(3);
                if atomic {
                    _ = word.atomic_add(1);
                } else {
                    word.store(2);
                }
            }
            sync_threads();
            tensor::cp_async_wait::<0>();
        }
    };
    for writer in [0, 1, 40] {
        passes(block(64), &memory, copy(false, writer, false));
        for (atomic, word) in [(false, "write"), (true, "atomic")] {
            for options in schedules() {
                let report = run(block(64), &memory, options, copy(true, writer, atomic)).unwrap_err();
                assert_eq!(report.kind, Kind::AsyncCopy, "{report}");
                assert!(
                    report.message.contains(&format!("{word} of byte 28 of `x`, from where")),
                    "{report}"
                );
            }
        }
    }
    fails_in(block(32), &memory, Kind::AsyncCopy, &["lane 0 ", "write of byte 16 of `x`"], || unsafe {
        if thread_idx_x() == 0 {
            tensor::cp_async_16(LAYOUT.a.get().cast(), x.add(1).as_const(), 16);
            x.add(1).store(V4([2; 4]));
        }
    });
}

#[test]
fn shared_bounds() {
    // One word past array `a` begins array `b`.
    fails(32, Kind::SharedBounds, &["lane 31 ", "shared byte 256", "bytes 0 to 256"], || unsafe {
        LAYOUT.a.get().add(lane_id() + 33).store(0);
    });
    fails(32, Kind::SharedBounds, &["lane 0 ", "shared byte 252", "bytes 256 to 512"], || unsafe {
        if lane_id() == 0 {
            LAYOUT.b.get().add(0u32.wrapping_sub(1)).store(0);
        }
    });
    fails_in(
        Dims::linear(1, 32, 300),
        &Memory::new(),
        Kind::SharedBounds,
        &["the 300 of the launch"],
        || unsafe {
            LAYOUT.b.get().add(lane_id()).store(0);
        },
    );
    is_fine(32, || unsafe {
        LAYOUT.a.get().add(lane_id() + 32).store(0);
        LAYOUT.b.get().add(lane_id()).store(0);
    });
}

/// A tree reduction of 128 words in shared memory; `skip`: the round whose barrier is left out.
unsafe fn tree(x: GlobalPtr<u32>, out: GlobalMut<u32>, skip: u32) {
    let thread = thread_idx_x();
    let sums = Region::<u32>::get({
        const SUMS: Region<u32> = Carve::new().array(128, 4);
        SUMS
    });
    sums.add(thread).store(x.add((block_idx_x() * 128 + thread) as u64).load());
    let (mut half, mut round) = (64, 0);
    while half > 0 {
        if round != skip {
            sync_threads();
        }
        if thread < half {
            sums.add(thread).store(sums.add(thread).load() + sums.add(thread + half).load());
        }
        half /= 2;
        round += 1;
    }
    if thread == 0 {
        out.add(block_idx_x() as u64).store(sums.load());
    }
}

#[test]
fn a_missing_barrier_in_any_round_is_found_in_any_order() {
    let mut memory = Memory::new();
    let values: Vec<u32> = (0..4 * 128).map(|i| i * i).collect();
    let x = memory.input("x", &values);
    let out = memory.alloc("out", 4);
    let dims = Dims::linear(4, 128, 512);
    passes(dims, &memory, || unsafe { tree(x, out, u32::MAX) });
    let want: Vec<u32> = values.chunks(128).map(|chunk| chunk.iter().sum()).collect();
    assert_eq!(memory.read(out, 4), want);
    for skip in 0..7 {
        for options in schedules() {
            let report = run(dims, &memory, options, || unsafe { tree(x, out, skip) }).unwrap_err();
            assert!(matches!(report.kind, Kind::Race | Kind::Uninitialised), "round {skip}: {report}");
            assert_eq!(report.block, [0, 0, 0], "the lowest faulting block is reported");
        }
    }
}
