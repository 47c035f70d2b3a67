//! The race detector against an oracle that compares all pairs of accesses, on random programs.

use tokenselect_kernels::emu::{Kind, Launch, Memory, Options, Order};
use tokenselect_kernels::launch::Dims;
use tokenselect_kernels::simt::shared::{Carve, Region};
use tokenselect_kernels::simt::thread::*;
use tokenselect_kernels::simt::warp::{self, FULL, lane_id, warp_id};

const THREADS: usize = 96;
const WORDS: u32 = 8;
const SHARED: Region<u32> = Carve::new().array(WORDS, 4);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Access {
    Read,
    Write,
    Atomic,
}

/// One step of a program that all threads walk through.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// One thread touches one word.
    Touch { thread: u32, word: u32, access: Access },
    /// Some lanes of a warp synchronise.
    Warp { warp: u32, mask: u32 },
    /// All threads synchronise.
    Block,
    /// Two warps synchronise at a barrier of their own.
    Pair { first: u32, second: u32 },
    /// A warp arrives, another waits. A fresh barrier each time: nothing holds the first back.
    Arrive { from: u32, to: u32, id: u32 },
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0 >> 32) * n) >> 32) as u32
    }
}

/// Words mostly stay with one thread; one touch in `hot` goes astray, so that both verdicts occur.
fn random_program(rng: &mut Rng, hot: u64) -> Vec<Step> {
    let mut owner = [THREADS as u32; WORDS as usize];
    let mut next_id = 4;
    let steps = 4 + rng.below(40);
    (0..steps)
        .map(|_| {
            let warp = rng.below(3);
            match rng.below(12) {
                0 => Step::Block,
                1 => Step::Warp { warp, mask: FULL },
                2 => {
                    let mask = [0xffff, 0xffff_0000, 0x0f0f_0f0f, 0xff][rng.below(4) as usize];
                    Step::Warp { warp, mask }
                }
                3 => Step::Pair { first: warp, second: (warp + 1) % 3 },
                4 if next_id < 16 => {
                    next_id += 1;
                    Step::Arrive { from: warp, to: (warp + 1) % 3, id: next_id - 1 }
                }
                _ => {
                    let word = rng.below(WORDS as u64);
                    let thread = &mut owner[word as usize];
                    if *thread == THREADS as u32 || rng.below(hot) == 0 {
                        *thread = rng.below(THREADS as u64);
                    }
                    let access =
                        [Access::Read, Access::Write, Access::Write, Access::Atomic][rng.below(4) as usize];
                    Step::Touch { thread: *thread, word, access }
                }
            }
        })
        .collect()
}

/// Whether any two accesses conflict and are unordered: full vector clocks, all pairs.
fn oracle(program: &[Step]) -> bool {
    let mut clocks = vec![[0u32; THREADS]; THREADS];
    (0..THREADS).for_each(|t| clocks[t][t] = 1);
    let mut touched: Vec<(u32, usize, u32, Access)> = Vec::new();
    let threads_of =
        |a: u32, b: u32| (0..THREADS).filter(move |t| [a, b].contains(&(*t as u32 / 32))).collect();
    for &step in program {
        let (from, to): (Vec<usize>, Vec<usize>) = match step {
            Step::Touch { thread, word, access } => {
                let thread = thread as usize;
                let harmless = |other| access == other && access != Access::Write;
                if touched.iter().any(|&(w, t, count, other)| {
                    w == word && t != thread && !harmless(other) && clocks[thread][t] < count
                }) {
                    return true;
                }
                touched.push((word, thread, clocks[thread][thread], access));
                continue;
            }
            Step::Warp { warp, mask } => {
                let lanes: Vec<_> =
                    (0..32).filter(|i| mask >> i & 1 == 1).map(|i| (warp * 32 + i) as usize).collect();
                (lanes.clone(), lanes)
            }
            Step::Block => ((0..THREADS).collect(), (0..THREADS).collect()),
            Step::Pair { first, second } => (threads_of(first, second), threads_of(first, second)),
            Step::Arrive { from, to, .. } => (threads_of(from, to), threads_of(to, to)),
        };
        let mut met = [0; THREADS];
        for &t in &from {
            (0..THREADS).for_each(|u| met[u] = met[u].max(clocks[t][u]));
        }
        for &t in &to {
            let own = clocks[t][t];
            clocks[t] = met;
            clocks[t][t] = own;
        }
        from.iter().for_each(|&t| clocks[t][t] += 1);
    }
    false
}

unsafe fn walk(program: &[Step]) {
    let (thread, warp) = (thread_idx_x(), warp_id());
    for &step in program {
        match step {
            Step::Touch { thread: t, .. } if t != thread => {}
            Step::Touch { word, access, .. } => {
                let word = SHARED.get().add(word);
                unsafe {
                    match access {
                        Access::Read => _ = word.load(),
                        Access::Write => word.store(thread),
                        Access::Atomic => _ = word.atomic_add(1),
                    }
                }
            }
            Step::Warp { warp: w, mask } => {
                if w == warp && mask >> lane_id() & 1 == 1 {
                    unsafe { warp::sync_warp(mask) }
                }
            }
            Step::Block => unsafe { sync_threads() },
            Step::Pair { first, second } => {
                if [first, second].contains(&warp) {
                    unsafe { sync_named(1 + first, 64) }
                }
            }
            Step::Arrive { from, to, id } => unsafe {
                if warp == from {
                    arrive_named(id, 64)
                } else if warp == to {
                    sync_named(id, 64)
                }
            },
        }
    }
}

#[test]
fn detector_agrees_with_the_oracle() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let (mut racy, mut clean) = (0, 0);
    for case in 0..1500 {
        let program = random_program(&mut rng, [3, 10, 40, 200][case % 4]);
        let expected = oracle(&program);
        for (order, preempt) in [(Order::Forward, 0), (Order::Reverse, 0), (Order::Random(case as u64), 3)] {
            let options = Options { order, preempt, uninitialised: false, threads: 1, ..Options::default() };
            let memory = Memory::new();
            let launch = Launch {
                kernel: "walk",
                dims: Dims::linear(1, THREADS as u32, 32),
                memory: &memory,
                options,
            };
            let outcome = launch.run(|| unsafe { walk(&program) });
            let found = match &outcome {
                Ok(_) => false,
                Err(report) if report.kind == Kind::Race => true,
                Err(report) => panic!("case {case}: {report}"),
            };
            assert_eq!(found, expected, "case {case} {order:?}: {outcome:?}\n{program:#?}");
        }
        if expected { racy += 1 } else { clean += 1 }
    }
    assert!(racy > 300 && clean > 300, "one-sided: {racy} racy, {clean} clean programs");
}
