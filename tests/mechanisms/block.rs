//! Loops, prefix sums, searches, values gathered from a cluster.

use tokenselect_kernels::common::block::{Gathered, bin_from_top, search_from_top, strided, sums_before};
use tokenselect_kernels::simt::shared::{Carve, Region};
use tokenselect_kernels::simt::thread::thread_idx_x;
use tokenselect_kernels::simt::{cluster, warp};

use super::*;

struct Layout {
    warps: Region<u32>,
    word: Region<u32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { warps: carve.array(32, 4), word: carve.array(1, 4), bytes: carve.bytes() }
};

#[test]
fn strides() {
    for (first, end, step) in [(0, 0, 1), (3, 3, 2), (5, 3, 1), (0, 10, 3), (7, 8, 100), (1, 10, 9)] {
        let naive: Vec<u32> = (first..end).step_by(step as usize).collect();
        assert_eq!(strided(first, end, step).collect::<Vec<_>>(), naive, "{first}, {end}, {step}");
    }
}

#[test]
fn prefix_sums() {
    for threads in [32, 64, 96, 256, 1024] {
        let values: Vec<u32> = (0..threads).map(|i| i * i % 37).collect();
        let mut memory = Memory::new();
        let input = memory.input("values", &values);
        let out = memory.buffer("out", &vec![[0u32; 2]; threads as usize].concat());
        let kernel = || unsafe {
            let own = thread_idx_x() as u64;
            // Twice: the words are free again once the block has met.
            for _ in 0..2 {
                let (before, all) = sums_before(LAYOUT.warps.get(), input.add(own).load());
                out.add(2 * own).store(before);
                out.add(2 * own + 1).store(all);
            }
        };
        let all: u32 = values.iter().sum();
        passes(Dims::linear(1, threads, LAYOUT.bytes), &mut memory, kernel, |memory| {
            let mut before = 0;
            for (pair, value) in memory.read(out, 2 * threads as usize).chunks(2).zip(&values) {
                assert_eq!(pair, [before, all], "{threads} threads");
                before += value;
            }
        });
    }
}

#[test]
fn searches_from_the_top() {
    const BINS: u32 = 256;
    const OWN: usize = 4;
    let mut random = Random(5);
    let counts: Vec<u32> = (0..BINS).map(|_| random.below(4) * random.below(3)).collect();
    let all: u32 = counts.iter().sum();
    for rank in [1, 2, all / 2, all - 1, all] {
        let mut memory = Memory::new();
        let input = memory.input("counts", &counts);
        let out = memory.buffer("out", &[0u32; 3]);
        let kernel = || unsafe {
            let own = [0, 1, 2, 3].map(|i| input.add(bin_from_top::<OWN>(BINS, i) as u64).load());
            search_from_top(LAYOUT.warps.get(), own, rank, |i, rank, count| {
                for (at, value) in [bin_from_top::<OWN>(BINS, i), rank, count].into_iter().enumerate() {
                    out.add(at as u64).store(value);
                }
            });
        };
        let (mut bin, mut left) = (BINS - 1, rank);
        while left > counts[bin as usize] {
            left -= counts[bin as usize];
            bin -= 1;
        }
        passes(Dims::linear(1, BINS / OWN as u32, LAYOUT.bytes), &mut memory, kernel, |memory| {
            assert_eq!(memory.read(out, 3), [bin, left, counts[bin as usize]], "rank {rank} of {all}");
        });
    }
}

#[test]
fn words_of_a_cluster() {
    for blocks in [1, 2, 8] {
        let mut memory = Memory::new();
        let out = memory.buffer("out", &vec![0u32; 2 * blocks as usize]);
        let kernel = || unsafe {
            let rank = cluster::block_rank();
            if thread_idx_x() == 0 {
                LAYOUT.word.get().store(10 + rank * rank);
            }
            cluster::sync();
            let gathered = Gathered::load(LAYOUT.word.get(), blocks);
            let (before, of_last) = (gathered.before(rank), gathered.of(blocks - 1));
            if warp::lane_id() == 0 {
                out.add(2 * rank as u64).store(before);
                out.add(2 * rank as u64 + 1).store(of_last);
            }
            cluster::meet(); // no block ends while others read from it
        };
        let dims = Dims { cluster: blocks, ..Dims::linear(blocks, 32, LAYOUT.bytes) };
        passes(dims, &mut memory, kernel, |memory| {
            for (rank, pair) in memory.read(out, 2 * blocks as usize).chunks(2).enumerate() {
                let before: usize = (0..rank).map(|other| 10 + other * other).sum();
                assert_eq!(
                    pair,
                    [before as u32, 10 + (blocks - 1) * (blocks - 1)],
                    "block {rank} of {blocks}"
                );
            }
        });
    }
}
