//! Launches that overlap: what one does before those before it have ended.

use super::*;
use tokenselect_kernels::simt::bulk::{self, MBarrier};
use tokenselect_kernels::simt::cluster;
use tokenselect_kernels::simt::grid::{launch_dependents, wait_for_previous};

const DIMS: Dims = Dims::linear(2, 64, LAYOUT.bytes);
const NAMES: [&str; 4] = ["first", "second", "third", "fourth"];

type Kernel<'a> = &'a (dyn Fn() + Sync);

fn overlapping() -> impl Iterator<Item = Options> {
    schedules().map(|options| Options { overlap: true, ..options })
}

fn in_order(dims: Dims, memory: &Memory, options: Options, kernels: &[Kernel<'_>]) -> Result<(), Report> {
    memory.synchronize();
    for (kernel, run) in NAMES.into_iter().zip(kernels) {
        Launch { kernel, dims, memory, options }.run(run)?;
    }
    Ok(())
}

#[track_caller]
fn pass(memory: &Memory, kernels: &[Kernel<'_>]) {
    for options in overlapping() {
        in_order(DIMS, memory, options, kernels).unwrap_or_else(|report| panic!("{report}"));
    }
}

/// The last of the launches is reported, under every schedule, in the same words.
#[track_caller]
fn fail(memory: &Memory, words: &[&str], kernels: &[Kernel<'_>]) {
    for options in overlapping() {
        expect(in_order(DIMS, memory, options, kernels), NAMES[kernels.len() - 1], words);
    }
}

#[track_caller]
fn expect(outcome: Result<(), Report>, kernel: &str, words: &[&str]) {
    let report = outcome.unwrap_err();
    assert!(report.kind == Kind::Overlap && report.kernel == kernel, "{report}");
    for word in words {
        assert!(report.message.contains(word), "no `{word}` in: {report}");
    }
}

/// Waits, and lets the next launch begin.
fn begin() {
    wait_for_previous();
    launch_dependents();
}

/// The thread's place in the grid.
fn own() -> u64 {
    (block_idx_x() * block_dim_x() + thread_idx_x()) as u64
}

#[test]
fn nothing_is_read_before_the_wait_that_the_launch_before_writes() {
    let mut memory = Memory::new();
    let (x, table) = (memory.buffer("x", &[0u32; 128]), memory.buffer("table", &[0u32; 128]));
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let read = |early: bool| {
        move || unsafe {
            table.add(own()).load();
            if early {
                x.add(own()).load();
            }
            begin();
            x.add(own()).load();
        }
    };
    pass(&memory, &[&write, &read(false), &write, &read(false)]);
    let words =
        ["read of byte ", "of `x` (address 0x", "launch of `first` writes", "not behind", "overlap.rs"];
    fail(&memory, &words, &[&write, &read(true)]);
    // The reader is the launch before, too.
    fail(&memory, &["launch of `second` writes"], &[&read(false), &write, &read(true)]);
    // What the host does in between waits.
    for options in overlapping() {
        in_order(DIMS, &memory, options, &[&write]).unwrap();
        memory.read(x, 1);
        in_order(DIMS, &memory, options, &[&read(true)]).unwrap();
    }
}

#[test]
fn nothing_is_written_before_the_wait_that_the_launch_before_uses() {
    let mut memory = Memory::new();
    let (x, y) = (memory.buffer("x", &[0u32; 128]), memory.buffer("y", &[0u32; 128]));
    let read = || unsafe {
        begin();
        x.add(own()).load();
    };
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let early = |atomic: bool| {
        move || unsafe {
            y.add(own()).store(1);
            if atomic {
                _ = x.add(own()).atomic_add(1);
            } else {
                x.add(own()).store(2);
            }
            begin();
        }
    };
    fail(&memory, &["write of byte", "of `x`", "launch of `first` reads"], &[&read, &early(false)]);
    fail(&memory, &["write of byte", "of `x`", "launch of `first` writes"], &[&write, &early(false)]);
    fail(&memory, &["atomic of byte", "of `x`", "launch of `first` writes"], &[&write, &early(true)]);
    fail(&memory, &["atomic of byte", "of `x`", "launch of `first` reads"], &[&read, &early(true)]);
    // What only the launch before that used may be written, and neighbours.
    let neighbours = || unsafe {
        if own() % 2 == 1 {
            x.add(own()).store(1);
        }
        begin();
    };
    let other = || unsafe {
        begin();
        if own().is_multiple_of(2) {
            x.add(own()).store(1);
        }
    };
    pass(&memory, &[&read, &begin, &early(false)]);
    pass(&memory, &[&other, &neighbours]);
}

#[test]
fn copies_are_accesses_where_they_are_issued() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 128]);
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let tile = LAYOUT.a.get().cast::<V4<u32>>();
    let by_thread = |early: bool| {
        move || unsafe {
            if !early {
                begin();
            }
            if thread_idx_x() < 16 {
                let from = x.as_const().cast::<V4<u32>>().add(thread_idx_x() as u64);
                tensor::cp_async_16(tile.add(thread_idx_x()), from, 16);
            }
            if early {
                begin();
            }
            tensor::cp_async_commit();
            tensor::cp_async_wait::<0>();
        }
    };
    let by_engine = |early: bool| {
        move || unsafe {
            let arrived = MBarrier::at(LAYOUT.b.get().cast());
            if thread_idx_x() == 0 {
                arrived.init(1);
                bulk::publish();
            }
            if !early {
                begin();
            }
            if thread_idx_x() == 0 {
                arrived.arrive_expecting(256);
                bulk::copy_to_shared(tile, x.as_const().cast(), 256, arrived);
            }
            sync_threads();
            begin();
            arrived.wait(0);
        }
    };
    pass(&memory, &[&write, &by_thread(false), &write, &by_engine(false)]);
    fail(&memory, &["read of byte", "of `x`", "launch of `first` writes"], &[&write, &by_thread(true)]);
    fail(&memory, &["read by the copy engine of byte 0 of `x`"], &[&write, &by_engine(true)]);
}

#[test]
fn the_read_only_path_is_for_what_no_unfinished_launch_writes() {
    let mut memory = Memory::new();
    let (x, y) = (memory.buffer("x", &[0u32; 128]), memory.buffer("y", &[0u32; 128]));
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let read = || unsafe {
        begin();
        y.add(own()).as_const().load_constant();
        x.add(own()).as_const().load_constant();
    };
    for options in overlapping() {
        let words =
            ["read-only load of byte", "of `x`", "launch of `first` writes", "the read-only path may show"];
        expect(in_order(DIMS, &memory, options, &[&write, &read]), "second", &words);
        in_order(DIMS, &memory, options, &[&write, &begin, &read]).unwrap();
        in_order(DIMS, &memory, options, &[&read, &write]).unwrap();
    }
}

#[test]
fn a_launch_that_lets_the_next_begin_early_leaves_more_unfinished() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 128]);
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let early = || {
        launch_dependents();
        wait_for_previous();
    };
    // One block, and one lane of it, are enough.
    let early_in_one_lane = || {
        if own() == 70 {
            launch_dependents();
        }
        begin();
    };
    let read = || unsafe {
        x.add(own()).load();
        begin();
    };
    pass(&memory, &[&write, &begin, &read]);
    fail(&memory, &["launch of `first` writes"], &[&write, &early, &read]);
    fail(&memory, &["launch of `first` writes"], &[&write, &early_in_one_lane, &read]);
    fail(&memory, &["launch of `first` writes"], &[&write, &early, &early, &read]);
    pass(&memory, &[&write, &begin, &early, &read]);
    pass(&memory, &[&write, &early, &begin, &read]);
    // With nothing before it there is nothing to be early for.
    pass(&memory, &[&early, &read]);
}

#[test]
fn every_block_waits() {
    let memory = Memory::new();
    let no_wait = launch_dependents;
    let one_block = || {
        if block_idx_x() == 0 {
            begin();
        }
    };
    // A block ends with the last of its threads.
    let one_thread = || {
        if thread_idx_x() == 40 {
            begin();
        }
    };
    pass(&memory, &[&begin, &one_thread, &begin]);
    pass(&memory, &[&no_wait]);
    let words = ["ended without grid::wait_for_previous", "launch of `first` may be unfinished"];
    fail(&memory, &words, &[&begin, &no_wait]);
    fail(&memory, &words, &[&begin, &one_block]);
}

/// How threads learn that one of them has waited.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Meeting {
    Nothing,
    BeforeTheWait,
    Warp,
    Block,
    Counted,
    Cluster,
    /// At the barrier of the cluster that orders nothing.
    ClusterRelaxed,
}

#[test]
fn the_wait_of_one_thread_is_passed_on() {
    let mut memory = Memory::new();
    let x = memory.buffer("x", &[0u32; 128]);
    let write = || unsafe {
        begin();
        x.add(own()).store(1);
    };
    let read = |meeting: Meeting, reader: u32| {
        move || unsafe {
            let barrier = MBarrier::at(LAYOUT.b.get().cast());
            if thread_idx_x() == 0 {
                barrier.init(1);
                bulk::publish();
            }
            sync_threads();
            // With a cluster the thread that waits is in the other block.
            let in_cluster = matches!(meeting, Meeting::Cluster | Meeting::ClusterRelaxed);
            let waits = thread_idx_x() == 0 && (block_idx_x() == 1 || !in_cluster);
            if meeting == Meeting::BeforeTheWait {
                sync_threads();
            }
            if waits {
                wait_for_previous();
            }
            match meeting {
                Meeting::Nothing | Meeting::BeforeTheWait => {}
                Meeting::Warp => warp::sync_warp(FULL),
                Meeting::Block => sync_threads(),
                Meeting::Counted if waits => barrier.arrive(),
                Meeting::Counted => barrier.wait(0),
                Meeting::Cluster => cluster::sync(),
                Meeting::ClusterRelaxed => cluster::meet(),
            }
            if block_idx_x() == 0 && thread_idx_x() == reader {
                x.load();
            }
            wait_for_previous();
        }
    };
    let dims = Dims { cluster: 2, ..DIMS };
    use Meeting::*;
    let fine = [(Nothing, 0), (Warp, 5), (Block, 5), (Block, 40), (Counted, 5), (Counted, 40), (Cluster, 40)];
    let faults = [(Nothing, 5), (BeforeTheWait, 40), (Warp, 40), (ClusterRelaxed, 5)];
    for options in overlapping() {
        for (meeting, reader) in fine {
            let outcome = in_order(dims, &memory, options, &[&write, &read(meeting, reader)]);
            outcome.unwrap_or_else(|report| panic!("{meeting:?}, thread {reader}: {report}"));
        }
        for (meeting, reader) in faults {
            let outcome = in_order(dims, &memory, options, &[&write, &read(meeting, reader)]);
            expect(outcome, "second", &["read of byte 0 of `x`", "not behind grid::wait_for_previous"]);
        }
    }
}
