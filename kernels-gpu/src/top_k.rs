//! `top_k`: the exact choice by vote, and the selected list around it.
//!
//! ```text
//! for each scored row:
//!     threshold, ties = the k-th largest vote, and how many of its equals are chosen
//!     chosen = { j : vote[j] > threshold } ∪ the first `ties` j with vote[j] = threshold      larger, then earlier; NaN last
//! for each row: selected = [0, candidates.begin) ∪ chosen ∪ [candidates.end, n)                    ascending
//! ```
//! Votes are counted in bins ([`radix`]) by [`vote`](mod@crate::vote) as it writes them, or by [`count`].
//!
//! On Hopper a cluster of blocks then does everything for a row, [`choose_in_cluster`]: it finds the bin in which the
//! threshold lies, marks the tokens above and in that bin, brings the keys in the bin together, finds the threshold among
//! them, and gives each token chosen its place. The blocks tell each other counts and keys through shared memory.
//!
//! Elsewhere, and for more tokens than a cluster has marks for, two launches, neither of which waits for another's blocks:
//! 1. [`refine`]: where the bin has many keys, the part of it that the threshold lies in.
//! 2. [`choose`]: each block writes down the *contenders* of its share, in order: the tokens in that bin, or part, or above.
//!    The last block of a row finds the threshold among those in the bin, and gives each token chosen its place.
//!    Contenders are `k` and a few more, and fit in shared memory; where votes tie by the thousands they pass through it
//!    window by window, as often as it takes.
//!
//! All blocks of a row together fill the windows, copy lists that are used again, and keep the cached selections.
//!
//! **Bytes.** The votes, once or twice, which an L2 holds: `n * 4`.

mod cluster;
pub(crate) use cluster::cluster_dims;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod blocks;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod lists;

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix::{self, RadixTables};
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Parameters of [`count`], [`refine`], [`choose`] and [`choose_in_cluster`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TopKParams {
    /// \[num_rows\] u32, read: an action of [`pool`](mod@crate::pool).
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens\] f32, read for candidates of scored rows.
    pub votes: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads * head_dim\] f32, read: scoring queries, to be cached.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
    /// \[num_rows, top_k\] u32, written for scored and reused rows: chosen tokens, ascending.
    pub top_k: GlobalMut<u32>,
    /// \[num_rows, max_selected\] u32, written: the lists.
    pub selected: GlobalMut<u32>,
    /// \[num_rows\] u32, written: their lengths.
    pub selected_len: GlobalMut<u32>,
    /// \[num_sequences, num_qo_heads * head_dim\] f32, written for scored rows. Address 0: nothing is cached.
    pub cached_queries: GlobalMut<f32>,
    /// \[num_sequences, top_k\] u32, written for scored rows, read for reused ones.
    pub cached_selections: GlobalMut<u32>,
    /// \[num_sequences\] u32, read and written.
    pub cached_ages: GlobalMut<u32>,
    /// \[num_sequences\] u32, written for scored rows: `n - T`.
    pub cached_made_at: GlobalMut<u32>,
    /// \[3\] u64, read and written: rows reused, scored, complete.
    pub cached_counters: GlobalMut<u64>,
    /// \[shares of all rows\] u32, workspace: contenders of each share; see [`max_shares`].
    pub counts: GlobalMut<u32>,
    /// \[max_tokens\] pairs of u32, workspace: key and token of each share's contenders, ascending.
    pub contenders: GlobalMut<V2<u32>>,
    /// Workspace: [`vote`](mod@crate::vote) or [`count`] has counted the votes.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub k: u32,
    /// Width of `selected`.
    pub max_selected: u32,
    /// `num_qo_heads * head_dim`.
    pub query_len: u32,
    /// Places for tokens of all rows: no row has more.
    pub max_tokens: u32,
    /// How far [`count`] goes: [`COUNTS`](radix::COUNTS) or [`BIN`](radix::BIN).
    pub wanted: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<TopKParams>() == 224);

/// Threads of a block of [`choose`].
const THREADS: u32 = 512;
/// Tokens of a share: eight a thread.
const SHARE: u32 = 8 * THREADS;
/// Contenders in shared memory at a time; no fewer than a share may have.
const WINDOW: u32 = 2 * SHARE;

/// Keys of a bin from which on it is refined: with fewer, its contenders fit in a window beside any usual `k`.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
const MANY: u32 = SHARE;

/// Shares that `num_rows` rows with `num_places` places for tokens may have.
pub const fn max_shares(num_places: u64, num_rows: u64) -> u64 {
    num_places / SHARE as u64 + 2 * num_rows + 1
}

/// Shared memory of a block of [`choose`].
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Contenders of the window.
    keys: Region<u32>,
    tokens: Region<u32>,
    /// Where the contenders of each share of a round begin.
    begins: Region<u32>,
    histogram: Region<u32>,
    warps: Region<u32>,
    /// What one thread has found for all.
    found: Region<u32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout {
        keys: carve.array(WINDOW, 16),
        tokens: carve.array(WINDOW, 16),
        begins: carve.array(THREADS + 1, 16),
        histogram: carve.array(radix::BINS, 16),
        warps: carve.array(THREADS / 32, 16),
        found: carve.array(2, 16),
        bytes: carve.bytes(),
    }
};

impl TopKParams {
    /// Launch dimensions of [`choose`]: a block for each share that the longest row may have.
    pub const fn choose_dims(&self) -> Dims {
        let blocks = self.max_tokens.div_ceil(SHARE) + 1;
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }

    /// Launch dimensions of [`count`] and [`refine`]: shares of the candidates of each row.
    pub const fn count_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: radix::LAYOUT.bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use blocks::{choose, count, refine};
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use cluster::choose_in_cluster;
