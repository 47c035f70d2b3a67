//! The operations, a folder each: what a host passes and launches (`params.rs`), and the kernel (`kernel.rs`), which is compiled
//! for a GPU and for the emulator alone. [`attend`] is what the attention kernels share.

pub mod append;
pub mod append_pool;
pub mod attend;
pub mod attend_decode;
pub mod attend_prefill;
pub mod attend_stream;
pub mod attend_warpgroups;
pub mod compare;
pub mod decide;
pub mod forget;
pub mod gather;
pub mod merge;
pub mod pool;
#[cfg(feature = "conformance")]
pub mod read_all;
pub mod score;
pub mod score_blocks;
pub mod score_stream;
pub mod smooth;
pub mod top_k;
pub mod translate;
pub mod vote;
