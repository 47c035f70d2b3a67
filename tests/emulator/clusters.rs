//! Faults among the blocks of a cluster.

use super::*;
use tokenselect_kernels::simt::cluster;

const DIMS: Dims = Dims { cluster: 3, ..Dims::linear(6, 64, LAYOUT.bytes) };

/// Where block `rank` of the cluster keeps what thread `i` reads there.
fn there(rank: u32, i: u32) -> cluster::Remote<u32> {
    LAYOUT.a.get().add(i).of_block(rank)
}

/// The block of the cluster after this one.
fn next() -> u32 {
    (cluster::block_rank() + 1) % cluster::num_blocks()
}

/// What is left out of an exchange of words with the next block, there and back.
#[derive(Clone, Copy, PartialEq)]
enum Without {
    Nothing,
    SyncBeforeRead,
    SyncBeforeWrite,
    SyncBeforeEnd,
}

unsafe fn exchange(without: Without, out: GlobalMut<u32>) {
    let (i, own) = (thread_idx_x(), LAYOUT.a.get().add(thread_idx_x()));
    cluster::meet();
    own.store(100 * block_idx_x() + i);
    if without != Without::SyncBeforeRead {
        cluster::sync();
    }
    let got = there(next(), 63 - i).load();
    if without != Without::SyncBeforeWrite {
        cluster::sync();
    }
    own.store(got);
    cluster::sync();
    out.add((64 * block_idx_x() + i) as u64).store(there(next(), 63 - i).load());
    if without != Without::SyncBeforeEnd {
        cluster::sync();
    }
}

#[test]
fn words_go_round() {
    let mut memory = Memory::new();
    let out = memory.alloc::<u32>("out", 6 * 64);
    passes(DIMS, &memory, || unsafe { exchange(Without::Nothing, out) });
    for (block, words) in memory.read(out, 6 * 64).chunks(64).enumerate() {
        let from = block / 3 * 3 + (block + 2) % 3;
        let want: Vec<u32> = (0..64).map(|i| 100 * from as u32 + i).collect();
        assert_eq!(words, want, "block {block}");
    }
}

#[test]
fn missing_barriers() {
    let mut memory = Memory::new();
    let out = memory.alloc::<u32>("out", 6 * 64);
    for options in races_alone() {
        let fault = |without| run(DIMS, &memory, options, || unsafe { exchange(without, out) }).unwrap_err();
        for without in [Without::SyncBeforeRead, Without::SyncBeforeWrite] {
            let report = fault(without);
            assert_eq!(report.kind, Kind::Race, "{report}");
            let text = report.to_string();
            assert!(text.contains("another block") && text.contains("races with"), "{text}");
        }
        let report = fault(Without::SyncBeforeEnd);
        assert_eq!(report.kind, Kind::Race, "{report}");
        assert!(report.message.contains("may end before another block of the cluster uses"), "{report}");
    }
}

#[test]
fn words_are_brought() {
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        OwnRead,
        OwnWrite,
        TwoWriters,
        End,
    }
    for options in races_alone() {
        let report = |fault| {
            run(DIMS, &Memory::new(), options, || unsafe {
                let (i, own) = (thread_idx_x(), LAYOUT.a.get().add(thread_idx_x()));
                own.store(0);
                cluster::sync();
                if fault == Fault::OwnRead {
                    own.load();
                }
                if fault == Fault::OwnWrite {
                    own.store(1);
                }
                let to = if fault == Fault::TwoWriters { i / 2 } else { 63 - i };
                there(next(), to).store(100 * cluster::block_rank() + i);
                if fault != Fault::End {
                    cluster::sync();
                    assert_eq!(
                        own.load(),
                        100 * ((cluster::block_rank() + 2) % 3)
                            + if fault == Fault::None { 63 - i } else { 0 }
                    );
                }
            })
        };
        report(Fault::None).unwrap();
        for (fault, words) in [
            (Fault::OwnRead, "read"),
            (Fault::OwnWrite, "write"),
            (Fault::TwoWriters, "a write by another block"),
            (Fault::End, "may end before another block of the cluster uses"),
        ] {
            let report = report(fault).unwrap_err();
            assert_eq!(report.kind, Kind::Race, "{report}");
            assert!(report.message.contains(words), "{report}");
        }
    }
}

/// Of one word in block 0: who reads it, and who writes it, in one phase.
#[test]
fn a_reader_and_a_writer_of_a_third_block() {
    for options in races_alone() {
        let report = |readers: &[u32], writer: u32, sync: bool| {
            let memory = Memory::new();
            let readers = readers.to_vec();
            run(DIMS, &memory, options, move || unsafe {
                LAYOUT.a.get().add(thread_idx_x()).store(0);
                cluster::sync();
                let rank = cluster::block_rank();
                if thread_idx_x() == 7 && readers.contains(&rank) {
                    there(0, 7).load();
                }
                if sync {
                    cluster::sync();
                }
                if thread_idx_x() == 7 && rank == writer {
                    there(0, 7).store(1);
                }
                cluster::sync();
            })
        };
        for (readers, writer) in
            [(&[1][..], 2), (&[2], 1), (&[1, 2], 1), (&[1, 2], 2), (&[1, 2], 0), (&[0], 1)]
        {
            report(readers, writer, true).unwrap();
            let report = report(readers, writer, false).unwrap_err();
            assert_eq!(report.kind, Kind::Race, "{report}");
        }
        // A thread may write what it alone reads.
        report(&[1], 1, false).unwrap();
    }
}

#[test]
fn meetings_order_nothing() {
    for options in races_alone() {
        let report = |orders: bool, begins: bool| {
            run(DIMS, &Memory::new(), options, || unsafe {
                if begins {
                    cluster::meet();
                }
                there(next(), thread_idx_x()).store(1);
                if orders {
                    cluster::sync()
                } else {
                    cluster::meet()
                }
                LAYOUT.a.get().add(thread_idx_x()).load();
            })
        };
        report(true, true).unwrap();
        for (fault, words) in
            [(report(false, true), "a write by another block"), (report(true, false), "may not have begun")]
        {
            let report = fault.unwrap_err();
            assert_eq!(report.kind, Kind::Race, "{report}");
            assert!(report.message.contains(words), "{report}");
        }
    }
}

#[test]
fn words_that_nothing_has_written() {
    fails_in(DIMS, &Memory::new(), Kind::Uninitialised, &["that nothing has written"], || unsafe {
        LAYOUT.a.get().add(thread_idx_x() / 2).atomic_add(1);
        cluster::sync();
        there(next(), thread_idx_x()).load();
        cluster::sync();
    });
}

#[test]
fn places_that_are_not_there() {
    fails_in(DIMS, &Memory::new(), Kind::SharedBounds, &["leaves its array"], || unsafe {
        there(next(), 64).load();
    });
    fails_in(DIMS, &Memory::new(), Kind::SharedBounds, &["block 3 of a cluster of 3"], || unsafe {
        there(3, 0).load();
    });
}

#[test]
fn a_block_that_does_not_come() {
    fails_in(DIMS, &Memory::new(), Kind::Deadlock, &["wait at the barrier of the cluster"], || unsafe {
        if cluster::block_rank() != 1 {
            cluster::sync();
        }
    });
}

/// The barrier of the cluster is one of each block, and orders global memory among its blocks, but no others.
#[test]
fn what_the_barrier_orders() {
    let mut memory = Memory::new();
    let words = memory.alloc::<u32>("words", 6 * 64);
    passes(DIMS, &memory, || unsafe {
        LAYOUT.b.get().add(thread_idx_x()).store(thread_idx_x());
        words.add((64 * block_idx_x() + thread_idx_x()) as u64).store(1);
        cluster::sync();
        LAYOUT.b.get().add(63 - thread_idx_x()).load();
        let neighbour = block_idx_x() / 3 * 3 + next();
        words.add((64 * neighbour + 63 - thread_idx_x()) as u64).load();
    });
    fails_in(DIMS, &memory, Kind::GlobalRace, &["races with a"], || unsafe {
        words.add((64 * block_idx_x() + thread_idx_x()) as u64).store(1);
        cluster::sync();
        words.add((64 * ((block_idx_x() + 3) % 6) + thread_idx_x()) as u64).load();
    });
}
