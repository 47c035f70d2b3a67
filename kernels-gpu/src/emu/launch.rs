//! Launches: blocks over OS threads.

use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::block::{self, Block, Launched};
use super::global_race::GlobalRaces;
use super::memory::Memory;
use super::options::Options;
use super::report::{Kind, Report};
use super::stack::LaneStack;
use crate::launch::{Dims, Limits};

/// A launch of one kernel.
pub struct Launch<'a> {
    /// The name in reports.
    pub kernel: &'a str,
    /// Grid, block and shared memory.
    pub dims: Dims,
    /// The device memory that the kernel may touch.
    pub memory: &'a Memory,
    /// Checks and schedule.
    pub options: Options,
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Times a lane was resumed.
    pub switches: u64,
    /// Warp collectives completed.
    pub collectives: u64,
    /// Barrier phases completed.
    pub barriers: u64,
}

/// What an OS thread needs to run clusters. Fresh stacks cost 2 ms a block of 256 threads, used ones nothing.
struct Worker {
    blocks: Vec<Box<Block>>,
    stacks: Vec<LaneStack>,
    stack_bytes: usize,
}

// SAFETY: the pointers in a block (yielders, memory) are dead between launches, and set anew by the OS thread that runs
// the next one.
unsafe impl Send for Worker {}

/// Workers of launches that have ended. Global, since the OS threads of a launch end with it.
static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());

impl Worker {
    /// One for clusters of `cluster` blocks of `threads` threads.
    fn take(cluster: usize, threads: usize, stack_bytes: usize) -> Worker {
        let idle = IDLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
        let mut worker =
            idle.unwrap_or_else(|| Worker { blocks: Vec::new(), stacks: Vec::new(), stack_bytes });
        if worker.stack_bytes != stack_bytes {
            worker.stacks.clear();
            worker.stack_bytes = stack_bytes;
        }
        for lane in worker.stacks.len()..cluster * threads {
            worker.stacks.push(LaneStack::new(stack_bytes, lane));
        }
        worker.blocks.resize_with(worker.blocks.len().max(cluster), || Box::new(Block::new()));
        worker.blocks.iter_mut().for_each(|block| block.stats = Stats::default());
        worker
    }

    fn put_back(self) {
        IDLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self);
    }
}

/// What all workers of a launch share.
struct Progress {
    next: AtomicU64,
    stop: AtomicBool,
    outcome: Mutex<(Stats, Option<(u64, Report)>)>,
}

impl Launch<'_> {
    /// Runs `kernel` once per thread of the launch.
    ///
    /// # Errors
    /// The fault of the lowest faulting block. Memory then holds whatever had been written.
    pub fn run(&self, kernel: impl Fn() + Sync) -> Result<Stats, Report> {
        self.run_dyn(&kernel)
    }

    fn run_dyn(&self, kernel: &(dyn Fn() + Sync)) -> Result<Stats, Report> {
        if let Err(error) = self.dims.check(self.kernel, &Limits::SM_90) {
            return Err(Report {
                kernel: self.kernel.into(),
                block: [0; 3],
                kind: Kind::Dims,
                message: error.fault.to_string(),
            });
        }
        let clusters = self.dims.num_blocks() / self.dims.cluster as u64;
        let races = self.options.global_races.then(|| GlobalRaces::new(self.memory));
        let progress =
            Progress { next: AtomicU64::new(0), stop: AtomicBool::new(false), outcome: Mutex::default() };
        let overlaps = self.options.overlap && self.options.races;
        if !overlaps {
            self.memory.synchronize();
        }
        let stream = &self.memory.stream;
        let running = overlaps.then(|| stream.begin(self.kernel));
        let work = || {
            let launched = Launched {
                memory: self.memory,
                global_races: races.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
                running: running.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
            };
            self.work(kernel, launched, &progress)
        };
        let threads = match self.options.threads {
            0 => std::thread::available_parallelism().map_or(1, NonZero::get),
            threads => threads,
        };
        let helpers = (threads as u64).min(clusters) - 1;
        if helpers == 0 {
            work();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..helpers {
                    scope.spawn(work);
                }
                work();
            });
        }
        match progress.outcome.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            (stats, None) => {
                if let Some(running) = &running {
                    stream.end(running);
                }
                Ok(stats)
            }
            (_, Some((_, report))) => {
                stream.synchronize();
                Err(report)
            }
        }
    }

    /// Takes clusters in index order until none is left or one has failed. Those already taken are finished, so all
    /// below a failed one have been seen, and which report is returned does not depend on the OS threads.
    fn work(&self, kernel: &(dyn Fn() + Sync), launched: Launched, progress: &Progress) {
        let (cluster, threads) = (self.dims.cluster as usize, self.dims.num_threads() as usize);
        let mut worker = Worker::take(cluster, threads, self.options.stack_bytes);
        let blocks = &mut worker.blocks[..cluster];
        while !progress.stop.load(Ordering::Relaxed) {
            let first = progress.next.fetch_add(1, Ordering::Relaxed) * cluster as u64;
            if first >= self.dims.num_blocks() {
                break;
            }
            let members: Vec<*mut Block> =
                blocks.iter_mut().map(|block| std::ptr::from_mut(&mut **block)).collect();
            for (linear, block) in (first..).zip(blocks.iter_mut()) {
                // SAFETY: the memory is borrowed by `self`, the others by our caller, for longer than the run.
                unsafe { block.begin(self.dims, self.options, launched, linear, &members) };
            }
            let Err((rank, fault)) = block::run(blocks, &mut worker.stacks, kernel) else {
                continue;
            };
            let linear = first + rank as u64;
            progress.stop.store(true, Ordering::Relaxed);
            let report = Report {
                kernel: self.kernel.into(),
                block: blocks[rank].index,
                kind: fault.kind,
                message: fault.message,
            };
            let mut outcome = progress.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if outcome.1.as_ref().is_none_or(|(earlier, _)| linear < *earlier) {
                outcome.1 = Some((linear, report));
            }
        }
        let mut outcome = progress.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for Stats { switches, collectives, barriers } in blocks.iter().map(|block| block.stats) {
            outcome.0.switches += switches;
            outcome.0.collectives += collectives;
            outcome.0.barriers += barriers;
        }
        drop(outcome);
        worker.put_back();
    }
}
