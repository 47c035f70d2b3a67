//! Launches as a whole: panics, dimensions, schedules, and what a fault leaves behind.

use super::*;

#[test]
fn panics_name_their_lane() {
    for options in schedules() {
        let report =
            run(block(64), &Memory::new(), options, || assert!(thread_idx_x() != 45, "lane {}", lane_id()));
        let report = report.unwrap_err();
        assert_eq!(report.kind, Kind::Panic);
        assert!(report.message.contains("warp 1 lane 13 (thread [45, 0, 0]): panicked: lane 13"), "{report}");
    }
}

#[test]
fn launches_after_a_fault_are_unharmed() {
    let memory = Memory::new();
    for _ in 0..50 {
        let report = run(block(64), &memory, Options::default(), || unsafe {
            LAYOUT.a.get().store(1);
            sync_threads();
            unreachable!("the stores race");
        });
        assert_eq!(report.unwrap_err().kind, Kind::Race);
        is_fine(96, || unsafe {
            sync_threads();
            if warp_id() == 2 {
                LAYOUT.a.get().add(lane_id()).store(1);
            }
        });
    }
}

#[test]
fn loops_that_wait_for_plain_memory_end() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 2]);
    // Nobody will write it.
    for options in schedules() {
        let options = Options { budget: 1_000_000, ..options };
        let report =
            run(block(64), &memory, options, || unsafe { while thread_idx_x() == 3 && x.load() == 0 {} });
        let report = report.unwrap_err();
        assert_eq!(report.kind, Kind::Deadlock, "{report}");
        assert!(report.message.contains("still running after 1000000 switches and accesses"), "{report}");
        let report = run(block(64), &memory, options, || unsafe {
            LAYOUT.a.get().add(thread_idx_x()).store(0);
            while thread_idx_x() == 3 && LAYOUT.a.get().add(3).load() == 0 {}
        });
        assert_eq!(report.unwrap_err().kind, Kind::Deadlock);
    }
    // Somebody will, who has its turn: nothing orders the two.
    for options in schedules() {
        let report = run(block(64), &memory, options, || unsafe {
            match thread_idx_x() {
                3 => while x.load() == 0 {},
                40 => x.store(1),
                _ => {}
            }
        });
        assert_eq!(report.unwrap_err().kind, Kind::GlobalRace);
        memory.write(x, &[0]);
    }
    // Many accesses are no fault.
    passes(block(32), &memory, || unsafe {
        let mut i = 0;
        while i < 2000 * (lane_id() % 2) {
            x.load();
            LAYOUT.a.get().add(lane_id()).store(i);
            i += 1;
        }
    });
}

#[test]
fn dimensions_are_checked() {
    let fault = |dims| {
        let report = run(dims, &Memory::new(), Options::default(), || {}).unwrap_err();
        assert_eq!(report.kind, Kind::Dims);
        report.to_string()
    };
    assert!(fault(Dims::linear(0, 32, 0)).contains("kernel `planted`"));
    assert!(fault(Dims::linear(0, 32, 0)).contains("no block along x"));
    assert!(fault(Dims { grid: [1, 70_000, 1], ..Dims::linear(1, 32, 0) }).contains("70000 blocks along y"));
    assert!(fault(Dims::linear(1, 0, 0)).contains("0 threads along x"));
    assert!(fault(Dims { block: [1, 1, 96], ..Dims::linear(1, 1, 0) }).contains("96 threads along z"));
    assert!(fault(Dims { block: [64, 32, 1], ..Dims::linear(1, 1, 0) }).contains("2048 threads a block"));
    assert!(fault(Dims::linear(1, 40, 0)).contains("40 threads a block are no multiple of the 32"));
    let clusters = |blocks, cluster| Dims { cluster, ..Dims::linear(blocks, 32, 0) };
    assert!(fault(clusters(6, 4)).contains("6 blocks along x are no multiple of the 4 of a cluster"));
    assert!(fault(clusters(34, 17)).contains("17 blocks a cluster, the device has 1 to 16"));
    assert!(
        fault(Dims::linear(1, 32, 300_000))
            .contains("300000 bytes of shared memory a block, the device has 232448")
    );
}

#[test]
fn a_seed_fixes_the_schedule() {
    let record = |seed: u64, threads: usize| {
        let mut memory = Memory::new();
        let next = memory.buffer("next", &[0u32; 3]);
        let order = memory.alloc::<u32>("order", 3 * 64);
        let options = Options { threads, ..Options::random(seed) };
        run(Dims::linear(3, 64, LAYOUT.bytes), &memory, options, || unsafe {
            let block = block_idx_x() as u64;
            LAYOUT.a.get().add(thread_idx_x()).store(0);
            let place = next.add(block).atomic_add(1);
            order.add(block * 64 + place as u64).store(thread_idx_x());
            sync_threads();
        })
        .unwrap();
        memory.read(order, 3 * 64)
    };
    let first = record(1, 1);
    assert_eq!(first, record(1, 1));
    assert_eq!(first, record(1, 3), "the number of OS threads must not matter");
    assert_ne!(first, record(2, 1), "another seed is another schedule");
    assert_ne!(first[..64], first[64..128], "each block has a schedule of its own");
}
