//! The emulator: runs kernels on the CPU and reports what GPU programmers fear most.
//!
//! ```
//! use tokenselect_kernels::emu::{Kind, Launch, Memory, Options};
//! use tokenselect_kernels::launch::Dims;
//! use tokenselect_kernels::simt::thread;
//!
//! let mut memory = Memory::new();
//! let input = memory.input("input", &[1.0f32; 64]);
//! let out = memory.alloc::<f32>("out", 63); // one too short
//! let launch = Launch { kernel: "double", dims: Dims::linear(2, 32, 0), memory: &memory, options: Options::default() };
//! let report = launch
//!     .run(|| unsafe {
//!         let i = (thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x()) as u64;
//!         out.add(i).store(2.0 * input.add(i).load());
//!     })
//!     .unwrap_err();
//! assert_eq!(report.kind, Kind::GlobalBounds);
//! assert!(report.message.contains("warp 0 lane 31") && report.message.contains("`out`"));
//! ```
//!
//! # The idea
//! Each CUDA thread is a coroutine with a stack of its own. A collective suspends its lane until every participant has
//! arrived; the last one computes the result for all and runs on (`warp.rs`, `barrier.rs`). A cluster of blocks belongs to
//! one OS thread from start to end, which takes clusters in index order (`launch.rs`), so nothing a kernel does moves
//! between OS threads, and a cluster's schedule depends on the seed and the cluster alone (`block.rs`, `cluster.rs`).
//!
//! # What is reported
//! | [`Kind`] | found by |
//! |---|---|
//! | `Race` | vector clocks over shared memory (`race.rs`): no lucky schedule hides a missing barrier; between blocks of a cluster, the phase of its barrier (`cluster.rs`) |
//! | `Uninitialised`, `AsyncCopy` | the same shadow: bytes never written, or under way by a copy; its source overwritten meanwhile, or its block at an end (`copies.rs`) |
//! | `SharedBounds`, `Misaligned` | each pointer carries the bounds of its array (`access.rs`) |
//! | `GlobalBounds`, `ReadOnly` | device addresses name their allocation (`memory.rs`), whose numbers are not used again |
//! | `GlobalRace` | last writer and reader of each element (`global_race.rs`) |
//! | `Overlap` | launches as programmatic dependent launch lets them overlap (`overlap.rs`): the last launches that wrote and read each word, and the clocks; for launches with [`Options::overlap`], as those of a whole emulated device are |
//! | `MBarrier` | barriers in shared memory by address (`bulk.rs`): made once, and published, before they are used |
//! | `Warpgroup` | products of warpgroups without fences or commit, operands written too early (`warpgroup.rs`) |
//! | `Divergence`, `Deadlock` | collectives that do not fit together, or never complete; loops that access memory without end |
//! | `Panic` | a kernel's own assertion |
//!
//! # What is not modelled
//! Timing, caches, the order of tensor-core additions, and the last bits of approximate functions: compare floats with
//! a tolerance. Threads that have ended do not count as arrived at a barrier, though hardware is more lenient there. An
//! endless loop that neither accesses memory nor meets other lanes is not noticed. A kernel that needs more stack than
//! [`Options::stack_bytes`] hits a guard page and takes the process with it.
//!
//! Of launches that overlap only what the rules say is checked, with the launches themselves run in turn: nothing is stale
//! here, and no block waits for room. A thread that learns through global memory that another has waited counts as one that
//! has not; and a launch is as early as its earliest block. Of `bulk::publish` the other half, which makes what earlier
//! launches wrote known to the copy engine, is not asked for.
//!
//! In global memory some races are missed, as `global_race.rs` says: within a block those of a write with a read that comes
//! before it, between blocks those with any but the last of several reads. Which of them depends on the schedule, so it
//! helps to run several.

pub(crate) mod access;
pub(crate) mod atomics;
pub(crate) mod barrier;
pub(crate) mod block;
pub(crate) mod bulk;
pub(crate) mod cluster;
pub(crate) mod copies;
mod global_race;
mod launch;
mod memory;
pub(crate) mod numeric;
mod options;
pub(crate) mod overlap;
mod race;
mod report;
mod slots;
mod stack;
mod tensor;
pub(crate) mod warp;
pub(crate) mod warpgroup;

pub use launch::{Launch, Stats};
pub use memory::Memory;
pub use options::{Options, Order};
pub use report::{Kind, Report};
