//! The machine kernels are written against.
//!
//! # Execution model, on one page
//! A launch is a *grid* of *blocks*; a block is up to 1024 *threads*, taken in *warps* of 32; a thread's place in its
//! warp is its *lane*. Blocks run in any order, at the same time or one after the other, and see each other's global
//! memory only through atomics and fences ([`grid`]). Threads of a block share up to 227 KiB of *shared memory*
//! ([`shared`]) and meet at barriers ([`thread`]). Lanes of a warp exchange registers ([`warp`]) and own pieces of
//! tensor-core tiles together ([`tensor`]), on Hopper four warps larger ones ([`warpgroup`]). On Hopper, blocks of a *cluster* meet and read each other's shared memory
//! ([`cluster`]).
//!
//! **Convergence.** A *collective* is a primitive that several lanes execute together. Each one's documentation has a
//! *Convergence* line that says who must take part; the *aligned* ones must moreover be reached through the same
//! instruction by all 32 lanes. Breaking the rule is undefined on a GPU and a report in the emulator.
//!
//! **Memory order.** Only barriers (those of [`thread`], [`cluster`] and [`bulk`]) and [`warp::sync_warp`] order the shared-memory
//! accesses of different threads.
//! Shuffles, votes, [`tensor::ldmatrix_x4`] and [`tensor::mma_f16`] do not.
//!
//! # How it is built
//! Each primitive is declared once, in the files below, with its documentation and safety rules. The bodies are in
//! `nvptx.rs`, the only file with inline PTX, or in `emulated.rs`, which asks the emulator. A primitive missing on one
//! side does not compile. Without a machine (a host build without the feature `emulator`) only the types remain that
//! kernel parameters and shared-memory layouts are made of.

pub mod data;
pub mod global;
pub mod shared;

#[cfg(feature = "kernels")]
pub mod bulk;
#[cfg(feature = "kernels")]
pub mod cluster;
#[cfg(feature = "kernels")]
pub mod grid;
#[cfg(feature = "kernels")]
pub mod math;
#[cfg(feature = "kernels")]
pub mod tensor;
#[cfg(feature = "kernels")]
pub mod thread;
#[cfg(feature = "kernels")]
pub mod warp;
#[cfg(feature = "kernels")]
pub mod warpgroup;

#[cfg(all(feature = "emulator", not(target_arch = "nvptx64")))]
mod emulated;
#[cfg(target_arch = "nvptx64")]
mod nvptx;

#[cfg(all(feature = "emulator", not(target_arch = "nvptx64")))]
use emulated as imp;
#[cfg(target_arch = "nvptx64")]
use nvptx as imp;
