//! Faults in global memory: bounds, permission, alignment, races between blocks.

use super::*;

#[test]
fn misaligned_accesses() {
    fails(32, Kind::Misaligned, &["lane 1 ", "8-byte write at shared byte 4"], || unsafe {
        if lane_id() == 1 {
            LAYOUT.a.get().add(lane_id()).cast::<u64>().store(0);
        }
    });
    is_fine(32, || unsafe { LAYOUT.a.get().cast::<u64>().add(lane_id()).store(0) });

    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 64]);
    fails_in(block(32), &memory, Kind::Misaligned, &["lane 2 ", "16-byte read at global"], || unsafe {
        if lane_id() == 2 {
            x.add(2).cast::<V4<u32>>().load();
        }
    });
    passes(block(32), &memory, || unsafe {
        x.add(lane_id() as u64 / 2 * 4).cast::<V4<u32>>().load();
    });
}

#[test]
fn global_bounds() {
    let mut memory = Memory::new();
    let before = memory.alloc::<u32>("before", 8);
    let x = memory.buffer("x", &[0u32; 8]);
    let gone = memory.alloc::<u32>("gone", 8);
    memory.free(gone.addr());
    let cases: [(GlobalMut<u32>, &str); 6] = [
        (x.add(8), "4 bytes past the end of `x` (32 bytes)"),
        (x.add(u64::MAX), "4 bytes before the start of `x`"),
        // Far enough to hit a neighbour, were they laid out one after the other.
        (x.add(4096), "16356 bytes past the end of `x`"),
        (before.add(9), "8 bytes past the end of `before`"),
        (gone, "was freed"),
        (GlobalMut::from_addr(0), "belongs to no allocation"),
    ];
    for (ptr, why) in cases {
        fails_in(
            block(32),
            &memory,
            Kind::GlobalBounds,
            &["lane 4 ", "4-byte global read", why],
            || unsafe {
                if lane_id() == 4 {
                    ptr.load();
                }
            },
        );
    }
    fails_in(
        block(32),
        &memory,
        Kind::GlobalBounds,
        &["lane 4 ", "4 bytes past the end of `x`"],
        || unsafe {
            if lane_id() == 4 {
                x.add(8).atomic_add(1);
            }
        },
    );
    passes(block(32), &memory, || unsafe {
        x.add(7).load();
    });
}

#[test]
fn inputs_are_not_written() {
    let mut memory = Memory::new();
    let input = memory.input("input", &[0f32; 32]);
    let sneaky = GlobalMut::<f32>::from_addr(input.addr());
    fails_in(block(32), &memory, Kind::ReadOnly, &["lane 6 ", "write", "`input` is an input"], || unsafe {
        if lane_id() == 6 {
            sneaky.store(1.0);
        }
    });
    fails_in(block(32), &memory, Kind::ReadOnly, &["lane 6 ", "atomic", "`input` is an input"], || unsafe {
        if lane_id() == 6 {
            sneaky.atomic_add(1.0);
        }
    });
    passes(block(32), &memory, || unsafe {
        input.add(lane_id() as u64).load_constant_once();
    });
}

#[test]
fn read_only_loads_of_what_the_launch_writes() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 64]);
    fails_in(
        Dims::linear(2, 32, 0),
        &memory,
        Kind::ReadOnly,
        &["read-only load of byte", "`x`"],
        || unsafe {
            let mine = x.add((block_idx_x() * 32 + lane_id()) as u64);
            mine.store(1);
            mine.as_const().load_constant();
        },
    );
    // Also where the write comes last, and other reads lie between.
    for block in [0, 1] {
        fails_in(Dims::linear(2, 32, 0), &memory, Kind::ReadOnly, &["write of byte", "of `x`"], || unsafe {
            let mine = x.add((block_idx_x() * 32 + lane_id()) as u64);
            mine.as_const().load_constant();
            mine.load();
            if block_idx_x() == block {
                mine.store(1);
            }
        });
    }
    passes(Dims::linear(2, 32, 0), &memory, || unsafe {
        x.add((block_idx_x() * 32 + lane_id()) as u64).as_const().load_constant();
    });
}

#[test]
fn races_between_blocks() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u16; 128]);
    let two = Dims::linear(2, 32, 0);
    fails_in(
        two,
        &memory,
        Kind::GlobalRace,
        &["lane 8 ", "write of byte 16 of `x`", "by block"],
        || unsafe {
            if lane_id() == 8 {
                x.add(8).store(1);
            }
        },
    );
    fails_in(two, &memory, Kind::GlobalRace, &["of byte 16 of `x`", "by block"], || unsafe {
        if lane_id() == 8 {
            match block_idx_x() {
                0 => x.add(8).store(1),
                _ => _ = x.add(8).load(),
            }
        }
    });
    // Block 0 comes first here, so it is its read that the write is too early for.
    for order in [Order::Forward, Order::Random(1)] {
        let options = Options { threads: 1, order, ..Options::default() };
        let report = run(two, &memory, options, || unsafe {
            match block_idx_x() {
                0 => _ = x.add(5).load(),
                _ if lane_id() == 8 => x.add(5).store(1),
                _ => {}
            }
        });
        let report = report.unwrap_err();
        assert_eq!((report.kind, report.block), (Kind::GlobalRace, [1, 0, 0]));
        let text = report.message;
        assert!(
            text.contains("lane 8 ") && text.contains("write of byte 10 of `x` races with a read by block 0")
        );
    }
    // Neighbours in one word, and reads by all.
    passes(two, &memory, || unsafe {
        x.add((2 * lane_id() + block_idx_x()) as u64).store(1);
        x.add(100 + lane_id() as u64 % 8).load();
    });
}

#[test]
fn plain_and_atomic_accesses_of_two_blocks_race() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 4]);
    fails_in(Dims::linear(2, 32, 0), &memory, Kind::GlobalRace, &["of byte 0 of `x`"], || unsafe {
        if lane_id() == 0 && block_idx_x() == 0 {
            x.atomic_add(1);
        } else if lane_id() == 0 {
            x.load();
        }
    });
    passes(Dims::linear(2, 32, 0), &memory, || unsafe {
        x.atomic_add(1);
    });
}

/// Each block leaves a number; the last to finish, by an atomic counter, adds them up.
unsafe fn sum_by_last_block(partial: GlobalMut<u32>, counter: GlobalMut<u32>, release: bool, acquire: bool) {
    let thread = thread_idx_x();
    partial.add((block_idx_x() * 32 + thread) as u64).store(thread);
    sync_threads();
    let mut last = false;
    if thread == 0 {
        if release {
            grid::fence();
        }
        last = counter.atomic_inc(grid_dim_x() - 1) == grid_dim_x() - 1;
        if acquire {
            grid::fence();
        }
    }
    if sync_threads_or(last) {
        let sum = (0..grid_dim_x()).map(|b| partial.add((b * 32 + thread) as u64).load()).sum::<u32>();
        assert_eq!(sum, grid_dim_x() * thread);
    }
}

#[test]
fn last_block_needs_its_fences() {
    let mut memory = Memory::new();
    let partial = memory.alloc("partial", 7 * 32);
    let counter = memory.buffer("counter", &[0u32]);
    let dims = Dims::linear(7, 32, 0);
    passes(dims, &memory, || unsafe { sum_by_last_block(partial, counter, true, true) });
    for (release, acquire) in [(false, true), (true, false), (false, false)] {
        for options in schedules() {
            let report = run(dims, &memory, options, || unsafe {
                sum_by_last_block(partial, counter, release, acquire)
            });
            let report = report.unwrap_err();
            assert_eq!(report.kind, Kind::GlobalRace, "{report}");
            assert!(report.message.contains("of `partial` races with a write by block"), "{report}");
            memory.write(counter, &[0]);
        }
    }
}

#[test]
fn a_fence_covers_what_comes_before_it() {
    let mut memory = Memory::new();
    let flag = memory.buffer("flag", &[0u32]);
    let data = memory.buffer("data", &[0u32; 2]);
    let announce = |late: bool| {
        move || unsafe {
            match block_idx_x() {
                0 if thread_idx_x() == 0 => {
                    data.store(1);
                    flag.store_release(1);
                    data.add(late as u64).store(2);
                }
                1 if thread_idx_x() == 0 => {
                    while flag.load_acquire() == 0 {}
                    data.add(1).load();
                }
                _ => {}
            }
        }
    };
    let two = Dims::linear(2, 32, 0);
    for options in schedules() {
        run(two, &memory, options, announce(false)).unwrap();
        memory.write(flag, &[0]);
        let report = run(two, &memory, options, announce(true)).unwrap_err();
        assert_eq!(report.kind, Kind::GlobalRace, "{report}");
        assert!(report.message.contains("of byte 4 of `data`"), "{report}");
        memory.write(flag, &[0]);
    }
}

#[test]
fn views_of_one_allocation() {
    let mut memory = Memory::new();
    let workspace = memory.alloc::<u32>("workspace", 96);
    let a = memory.view("a", workspace, 32);
    let b = memory.view("b", workspace.add(32), 64);
    let again = memory.view("again", workspace, 32);
    let lane = || lane_id() as u64;
    fails_in(
        block(32),
        &memory,
        Kind::GlobalBounds,
        &["lane 31 ", "4 bytes past the end of `a`"],
        || unsafe {
            a.add(lane() + 1).store(0);
        },
    );
    passes(Dims::linear(2, 32, 0), &memory, || unsafe {
        if block_idx_x() == 0 { a.add(lane()).store(0) } else { b.add(lane()).store(0) }
    });
    // The same bytes under two names.
    fails_in(Dims::linear(2, 32, 0), &memory, Kind::GlobalRace, &["write of byte 12 of `a"], || unsafe {
        if lane() == 3 {
            if block_idx_x() == 0 { a.add(3).store(0) } else { again.add(3).store(0) }
        }
    });
}

#[test]
fn races_within_a_block() {
    let mut memory = Memory::new();
    let x = memory.alloc::<u32>("x", 64);
    let exchange = |sync: bool| {
        move || unsafe {
            let thread = thread_idx_x() as u64;
            x.add(thread).store(1);
            if sync {
                sync_threads();
            } else {
                warp::sync_warp(FULL);
            }
            if warp_id() == 1 {
                x.add(thread ^ 33).load();
            }
        }
    };
    passes(block(64), &memory, exchange(true));
    // What a thread wrote itself needs no barrier.
    passes(block(64), &memory, || unsafe {
        let own = x.add(thread_idx_x() as u64);
        own.store(1);
        assert_eq!(own.load(), 1);
        own.store(2);
    });
    // Found in every order that lets a write of warp 0 come first.
    for options in schedules().filter(|options| options.order != Order::Reverse) {
        let report = run(block(64), &memory, options, exchange(false)).unwrap_err();
        assert_eq!(report.kind, Kind::GlobalRace, "{report}");
        assert!(report.message.contains("of `x` races with a write by thread"), "{report}");
        assert!(report.message.contains("of the same block: no barrier between them"), "{report}");
    }
    fails_in(block(64), &memory, Kind::GlobalRace, &["lane 2 ", "write of byte 8 of `x`"], || unsafe {
        if lane_id() == 2 {
            x.add(2).store(1);
        }
    });
    // Threads that meet through a flag are left alone.
    let flag = memory.buffer("flag", &[0u32]);
    passes(block(64), &memory, || unsafe {
        if thread_idx_x() == 0 {
            x.store(1);
            flag.store_release(1);
        } else if thread_idx_x() == 40 {
            while flag.load_acquire() == 0 {}
            x.load();
        }
    });
}
