//! What a configuration needs on a GPU: its kernels, and the scratch memory that they use among themselves.

use std::sync::Arc;

use tokenselect_kernels::common::layout::LOGIT_TILE;
use tokenselect_kernels::common::radix::{BINS, RadixTables};
use tokenselect_kernels::entries::{ElementType, Entry, Key, Op, Rotation};
use tokenselect_kernels::launch::GpuInfo;
use tokenselect_kernels::limits::{MAX_COLUMNS, columns};
use tokenselect_kernels::ops::attend_decode::{QUERY_ROWS, max_parts};
use tokenselect_kernels::ops::score::{max_chunks, tile_tokens};
use tokenselect_kernels::ops::score_blocks::{num_entries, operand_bytes, shared_bytes};
use tokenselect_kernels::ops::top_k::max_shares;
use tokenselect_kernels::ops::vote::MAX_HEADS;
use tokenselect_kernels::ops::{attend_decode, attend_prefill, attend_stream, attend_warpgroups};
use tokenselect_kernels::simt::global::GlobalMut;

use super::{Limits, Operations};
use crate::config::{Positions, SelectConfig};
use crate::driver::Driver;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::rope::RopePairing;

/// Query rows of a KV head up to which the decode kernel, 8 of them at a time, is faster than the prefill kernel, 128. (On Hopper that
/// holds while SMs are idle.)
pub(crate) const FEW_QUERY_ROWS: u32 = 64;

/// A GPU with the kernels of one configuration.
#[derive(Debug, Clone)]
pub(crate) struct GpuPlan {
    pub driver: Arc<dyn Driver>,
    pub kernels: Kernels,
    pub scratch: Scratch,
}

/// A kernel that scores, and the tokens of its tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScoreKernel {
    pub entry: &'static Entry,
    pub tile_tokens: u32,
}

/// The kernels of a configuration; absent are those of operations that the plan leaves out.
#[derive(Debug, Clone)]
pub(crate) struct Kernels {
    pub append: Option<&'static Entry>,
    pub pool: Option<PoolKernels>,
    pub score: Option<ScoreKernels>,
    pub score_blocks: Option<ScoreBlocksKernels>,
    pub vote: Option<VoteKernels>,
    pub attend: Option<AttendKernels>,
}

/// The kernels that pool.
#[derive(Debug, Clone)]
pub(crate) struct PoolKernels {
    pub pool: &'static Entry,
    pub append_pool: &'static Entry,
    pub compare: &'static Entry,
    pub decide: &'static Entry,
}

/// The kernels that score.
#[derive(Debug, Clone)]
pub(crate) struct ScoreKernels {
    pub score: ScoreKernel,
    pub stream: ScoreKernel,
}

/// The kernels that score blocks.
#[derive(Debug, Clone)]
pub(crate) struct ScoreBlocksKernels {
    /// Heads of a group that they have room for.
    pub columns: u32,
    pub stats: &'static Entry,
    pub fold: &'static Entry,
    pub vote: &'static Entry,
}

/// The kernels that vote and choose.
#[derive(Debug, Clone)]
pub(crate) struct VoteKernels {
    pub vote: &'static Entry,
    pub smooth: &'static Entry,
    pub count: &'static Entry,
    pub refine: &'static Entry,
    pub choose: &'static Entry,
    pub choose_in_cluster: &'static Entry,
}

/// The kernels of attention.
#[derive(Debug, Clone)]
pub(crate) struct AttendKernels {
    /// Rotates its keys itself.
    pub decode: &'static Entry,
    /// Absent where a block of it has more shared memory than the device: `decode` does all, then.
    pub prefill: Option<&'static Entry>,
    pub gather: &'static Entry,
    pub stream: &'static Entry,
    pub stream_merge: &'static Entry,
    pub merge: &'static Entry,
}

impl GpuPlan {
    /// Finds the kernels and sizes the scratch memory.
    pub fn new(
        driver: &Arc<dyn Driver>,
        config: &SelectConfig,
        limits: &Limits,
        operations: Operations,
    ) -> Result<Self> {
        let kernels = Kernels {
            append: match operations.append {
                false => None,
                true => {
                    element_type(driver, "append", config.dtype)?;
                    Some(driver.find("append", Op::Append, Key::NONE)?)
                }
            },
            pool: operations.pool.then(|| PoolKernels::new(driver, config)).transpose()?,
            score: operations.score.then(|| ScoreKernels::new(driver, config)).transpose()?,
            score_blocks: match operations.score_blocks.then(|| ScoreBlocksKernels::new(driver, config)) {
                // A plan for all operations is one for rows by themselves where blocks have no room.
                Some(Err(Error::Unsupported { .. })) if operations.score => None,
                kernels => kernels.transpose()?,
            },
            vote: operations.vote.then(|| VoteKernels::new(driver, config)).transpose()?,
            attend: operations.attend.then(|| AttendKernels::new(driver, config)).transpose()?,
        };
        let scratch = Scratch::carve(driver.gpu(), config, limits, operations);
        Ok(GpuPlan { driver: Arc::clone(driver), kernels, scratch })
    }

    /// Loads the kernels, so that no step waits for it.
    pub fn prepare(&self) -> Result<()> {
        let Kernels { append, pool, score, score_blocks, vote, attend } = &self.kernels;
        let mut all: Vec<_> = append.iter().copied().collect();
        if let Some(k) = pool {
            all.extend([k.pool, k.append_pool, k.compare, k.decide]);
        }
        if let Some(k) = score {
            all.extend([k.score.entry, k.stream.entry]);
        }
        if let Some(k) = score_blocks {
            all.extend([k.stats, k.fold, k.vote]);
        }
        if let Some(k) = vote {
            all.extend([k.vote, k.smooth, k.count, k.refine, k.choose, k.choose_in_cluster]);
        }
        if let Some(k) = attend {
            all.extend(k.prefill);
            all.extend([k.decode, k.gather, k.stream, k.stream_merge, k.merge]);
        }
        all.push(self.driver.find("forget", Op::Forget, Key::NONE)?); // recorded work may drop cached selections
        self.driver.prepare(&all)
    }
}

/// A type that kernels are compiled for.
fn element_type(driver: &Arc<dyn Driver>, op: &'static str, dtype: DType) -> Result<ElementType> {
    match dtype {
        DType::F16 => Ok(ElementType::F16),
        DType::Bf16 => Ok(ElementType::Bf16),
        other => Err(unsupported(driver, op, format!("{other}, only for f16 and bf16"))),
    }
}

fn unsupported(driver: &Arc<dyn Driver>, op: &'static str, what: String) -> Error {
    Error::Unsupported { device: driver.name().to_owned(), op, what }
}

impl PoolKernels {
    fn new(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<Self> {
        let key = Key::of(element_type(driver, "pool", config.dtype)?);
        Ok(PoolKernels {
            pool: driver.find("pool", Op::Pool, key)?,
            append_pool: driver.find("pool", Op::AppendPool, key)?,
            compare: driver.find("compare", Op::Compare, Key::NONE)?,
            decide: driver.find("decide", Op::Decide, Key::NONE)?,
        })
    }
}

/// What kernels that score are compiled for.
fn score_key(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<(Key, u32)> {
    let (group, head_dim) = (config.heads.group(), config.heads.head_dim as u32);
    let dtype = element_type(driver, "score", config.dtype)?;
    let Some(columns) = columns(group as u32) else {
        let what = format!("groups of {group} heads, only up to {MAX_COLUMNS}");
        return Err(unsupported(driver, "score", what));
    };
    Ok((Key::of(dtype).with_head_dim(head_dim).with_columns(columns), columns))
}

impl ScoreBlocksKernels {
    fn new(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<Self> {
        let (key, columns) = score_key(driver, config)?;
        let gpu = driver.gpu();
        let (head_dim, room) = (config.heads.head_dim, gpu.limits.shared_bytes);
        let needed = shared_bytes(head_dim as u32, gpu.bulk_copies);
        if needed > room {
            let what = format!(
                "blocks with a head dimension of {head_dim}: {needed} bytes of shared memory, it has {room}"
            );
            return Err(unsupported(driver, "score", what));
        }
        let fold = Key { dtype: key.dtype, ..Key::NONE };
        Ok(ScoreBlocksKernels {
            columns,
            stats: driver.find("score", Op::ScoreBlocksStats, key)?,
            fold: driver.find("score", Op::ScoreBlocksFold, fold)?,
            vote: driver.find("score", Op::ScoreBlocksVote, key)?,
        })
    }
}

impl ScoreKernels {
    fn new(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<Self> {
        let (key, columns) = score_key(driver, config)?;
        let head_dim = config.heads.head_dim as u32;
        let kernel = |op, tile_tokens| Ok(ScoreKernel { entry: driver.find("score", op, key)?, tile_tokens });
        Ok(ScoreKernels {
            score: kernel(Op::Score, tile_tokens(head_dim, columns))?,
            stream: kernel(Op::ScoreStream, LOGIT_TILE)?,
        })
    }
}

impl VoteKernels {
    fn new(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<Self> {
        let heads = config.heads;
        if heads.num_qo_heads > MAX_HEADS as usize {
            let what = format!("{} query heads, only up to {MAX_HEADS}", heads.num_qo_heads);
            return Err(unsupported(driver, "vote", what));
        }
        let vote = if heads.group().is_multiple_of(4) { Op::VoteByFour } else { Op::Vote };
        let find = |op, kernel| driver.find(op, kernel, Key::NONE);
        Ok(VoteKernels {
            vote: find("vote", vote)?,
            smooth: find("smooth", Op::Smooth)?,
            count: find("top_k", Op::TopKCount)?,
            refine: find("top_k", Op::TopKRefine)?,
            choose: find("top_k", Op::TopKChoose)?,
            choose_in_cluster: find("top_k", Op::TopKChooseInCluster)?,
        })
    }
}

impl AttendKernels {
    fn new(driver: &Arc<dyn Driver>, config: &SelectConfig) -> Result<Self> {
        let head_dim = config.heads.head_dim;
        let dtype = element_type(driver, "attend", config.dtype)?;
        let key = Key::of(dtype).with_head_dim(head_dim as u32);
        let rotation = match &config.positions {
            Positions::Native => Rotation::Native,
            Positions::Reassigned(rope) => {
                let dim = rope.rotary_dim(head_dim);
                match rope.pairing {
                    _ if !dim.is_multiple_of(4) => Rotation::AnyPairs,
                    RopePairing::HalfSplit if dim < head_dim => Rotation::AnyPairs,
                    RopePairing::HalfSplit => Rotation::HalfSplit,
                    RopePairing::Interleaved => Rotation::Interleaved,
                }
            }
        };
        let (gpu, dim) = (driver.gpu(), head_dim as u32);
        let room = gpu.limits.shared_bytes;
        let needed = attend_decode::shared_bytes(dim, rotation != Rotation::Native);
        if needed > room {
            let what =
                format!("a head dimension of {head_dim}: {needed} bytes of shared memory, it has {room}");
            return Err(unsupported(driver, "attend", what));
        }
        let (prefill, needed) = match gpu.bulk_copies {
            true => (Op::AttendWarpgroups, attend_warpgroups::shared_bytes(dim)),
            false => (Op::AttendPrefill, attend_prefill::shared_bytes(dim)),
        };
        Ok(AttendKernels {
            decode: driver.find("attend", Op::AttendDecode, key.with_rotation(rotation))?,
            prefill: (needed <= room).then(|| driver.find("attend", prefill, key)).transpose()?,
            gather: driver.find("attend", Op::Gather, Key::of(dtype))?,
            stream: driver.find("attend", Op::AttendStream, key)?,
            stream_merge: driver.find("attend", Op::AttendStreamMerge, Key::of(dtype))?,
            merge: driver.find("merge", Op::Merge, Key::of(dtype))?,
        })
    }
}

/// Where each kernel's scratch memory lies, in bytes from the beginning of one tensor of words that are zero at first.
/// Counters are zero between launches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scratch {
    /// `[max_rows]` u32.
    pub counters: u64,
    /// `[max_rows, num_qo_heads, 3]` f32.
    pub pool_partial: u64,
    /// `[max_rows, max_chunks(num_kv_heads), num_qo_heads, 2]` f32.
    pub score_partial: u64,
    /// `[num_entries]` pairs of f32.
    pub blocks_partial: u64,
    /// `[max_rows, operand_bytes]`.
    pub blocks_operands: u64,
    /// `[max_rows, num_kv_heads]` u32, zero between launches.
    pub blocks_counters: u64,
    /// `[max_rows, BINS]` u32, zero between launches.
    histogram: u64,
    /// `[max_rows, 4]` u32.
    radix_state: u64,
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
    /// One past the last byte. Saturates: no device has so much memory.
    end: u64,
}

impl Scratch {
    fn carve(gpu: &GpuInfo, config: &SelectConfig, limits: &Limits, operations: Operations) -> Self {
        let heads = config.heads;
        let (max_rows, max_kv_tokens) = (limits.max_rows as u64, limits.max_kv_tokens as u64);
        let (hq, hkv, head_dim) =
            (heads.num_qo_heads as u64, heads.num_kv_heads as u64, heads.head_dim as u64);
        let chunks = u64::from(max_chunks(heads.num_kv_heads as u32));
        let mut end = 0u64;
        let mut words = |dims: &[u64]| {
            let begin = end;
            let count = dims.iter().fold(1u64, |product, &dim| product.saturating_mul(dim));
            let bytes = count.saturating_mul(4).checked_next_multiple_of(256).unwrap_or(u64::MAX);
            end = end.saturating_add(bytes);
            begin
        };
        let counters = words(&[max_rows]);
        let pool_partial = words(&[max_rows, hq, 3]);
        let score_partial = words(&[max_rows, chunks, hq, 2]);
        let blocks = u64::from(operations.score_blocks);
        let blocks_partial = words(&[2, blocks, num_entries(max_kv_tokens, max_rows, hq)]);
        let blocks_operands = words(&[blocks, max_rows, operand_bytes(head_dim as u32, hkv) / 4]);
        let blocks_counters = words(&[blocks, max_rows, hkv]);
        let histogram = words(&[max_rows, u64::from(BINS)]);
        let radix_state = words(&[max_rows, 4]);
        let share_counts = words(&[max_shares(max_kv_tokens, max_rows)]);
        let contenders = words(&[2, max_kv_tokens]);
        let attend_counters = words(&[u64::from(max_parts(gpu))]);
        let streams = gpu.bulk_copies && config.positions == Positions::Native;
        let stream_parts = if streams { attend_stream::max_parts(gpu) } else { 0 };
        let parts = u64::from(max_parts(gpu).max(stream_parts));
        let attend_partial = words(&[parts, QUERY_ROWS.into(), head_dim]);
        let attend_stats = words(&[2, parts, QUERY_ROWS.into()]);
        let max_places = match &config.positions {
            Positions::Native => 0,
            Positions::Reassigned(_) => config.max_selected(limits.max_block_len),
        };
        let gathered = words(&[max_rows, hkv, max_places as u64, head_dim / 2]);
        Scratch {
            counters,
            pool_partial,
            score_partial,
            blocks_partial,
            blocks_operands,
            blocks_counters,
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

    /// 32-bit words of it.
    pub fn words(&self) -> usize {
        (self.end / 4) as usize
    }

    /// The same places in memory that begins at `base`.
    pub fn at(self, base: u64) -> Self {
        Scratch {
            counters: base + self.counters,
            pool_partial: base + self.pool_partial,
            score_partial: base + self.score_partial,
            blocks_partial: base + self.blocks_partial,
            blocks_operands: base + self.blocks_operands,
            blocks_counters: base + self.blocks_counters,
            histogram: base + self.histogram,
            radix_state: base + self.radix_state,
            share_counts: base + self.share_counts,
            contenders: base + self.contenders,
            attend_counters: base + self.attend_counters,
            attend_partial: base + self.attend_partial,
            attend_stats: base + self.attend_stats,
            gathered: base + self.gathered,
            max_places: self.max_places,
            end: base + self.end,
        }
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
