//! Device memory that kernels use among themselves: one tensor of words, counted and carved by the same code.

use kernels_gpu::common::radix::{BINS, RadixTables};
use kernels_gpu::launch::GpuInfo;
use kernels_gpu::ops::attend_decode::{QUERY_ROWS, max_parts};
use kernels_gpu::ops::attend_stream;
use kernels_gpu::ops::score::max_chunks;
use kernels_gpu::ops::top_k::max_shares;
use kernels_gpu::simt::global::GlobalMut;

use crate::config::{Positions, SelectConfig};
use crate::error::Result;
use crate::plan::Limits;
use crate::tensor::TensorView;

/// Where each kernel's workspace lies, in device addresses. Counters are zero between launches.
pub(super) struct Scratch {
    /// `[max_rows]` u32.
    pub counters: u64,
    /// `[max_rows, num_qo_heads, 3]` f32.
    pub pool_partial: u64,
    /// `[max_rows, max_chunks(num_kv_heads), num_qo_heads, 2]` f32.
    pub score_partial: u64,
    /// `[max_rows, BINS]` u32, zero between launches.
    pub histogram: u64,
    /// `[max_rows, 4]` u32.
    pub radix_state: u64,
    /// `[max_shares]` u32: contenders of each share.
    pub share_counts: u64,
    /// `[max_kv_tokens]` pairs of u32: contenders.
    pub contenders: u64,
    /// `[max_parts]` u32, zero between launches.
    pub attend_counters: u64,
    /// `[parts, QUERY_ROWS, head_dim]` f32; parts are those of the decode kernel that has more.
    pub attend_partial: u64,
    /// `[parts, QUERY_ROWS]` pairs of f32.
    pub attend_stats: u64,
    /// `[max_rows, num_kv_heads, max_places, head_dim]` of 2 bytes: rotated keys.
    pub gathered: u64,
    /// Places of a list in `gathered`; 0 where nothing need be gathered.
    pub max_places: usize,
    /// One past the last byte.
    end: u64,
}

impl Scratch {
    /// The places in scratch memory that begins at `base`.
    fn carve(base: u64, gpu: &GpuInfo, config: &SelectConfig, limits: &Limits) -> Self {
        let (heads, max_rows) = (config.heads, limits.max_rows);
        let chunks = max_chunks(heads.num_kv_heads as u32) as usize;
        let mut end = base;
        let mut words = |count: usize| {
            let begin = end;
            end += (4 * count as u64).next_multiple_of(256);
            begin
        };
        let counters = words(max_rows);
        let pool_partial = words(max_rows * heads.num_qo_heads * 3);
        let score_partial = words(max_rows * chunks * heads.num_qo_heads * 2);
        let histogram = words(max_rows * BINS as usize);
        let radix_state = words(max_rows * 4);
        let share_counts = words(max_shares(limits.max_kv_tokens as u64, max_rows as u64) as usize);
        let contenders = words(2 * limits.max_kv_tokens);
        let attend_counters = words(max_parts(gpu) as usize);
        let streams = gpu.bulk_copies && config.positions == Positions::Native;
        let stream_parts = if streams { attend_stream::max_parts(gpu) } else { 0 };
        let parts = max_parts(gpu).max(stream_parts) as usize;
        let attend_partial = words(parts * QUERY_ROWS as usize * heads.head_dim);
        let attend_stats = words(2 * parts * QUERY_ROWS as usize);
        let max_places = match &config.positions {
            Positions::Native => 0,
            Positions::Reassigned(_) => config.max_selected(limits.max_block_len),
        };
        let gathered = words(max_rows * heads.num_kv_heads * max_places * heads.head_dim / 2);
        Scratch {
            counters,
            pool_partial,
            score_partial,
            histogram,
            radix_state,
            share_counts,
            contenders,
            attend_counters,
            attend_partial,
            attend_stats,
            gathered,
            max_places,
            end,
        }
    }

    /// Words of scratch that batches within `limits` need.
    pub fn words(gpu: &GpuInfo, config: &SelectConfig, limits: &Limits) -> usize {
        Scratch::carve(0, gpu, config, limits).end as usize / 4
    }

    /// The places in the workspace's scratch tensor, made for the same configuration and limits.
    pub fn of(
        scratch: &TensorView<'_>,
        gpu: &GpuInfo,
        config: &SelectConfig,
        limits: &Limits,
    ) -> Result<Self> {
        Ok(Scratch::carve(scratch.device_slice("scratch")?.addr(), gpu, config, limits))
    }

    /// The workspace of radix selects.
    pub fn radix(&self) -> RadixTables {
        RadixTables {
            histogram: GlobalMut::from_addr(self.histogram),
            state: GlobalMut::from_addr(self.radix_state),
            counters: GlobalMut::from_addr(self.counters),
        }
    }
}
