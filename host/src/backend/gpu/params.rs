//! From checked arguments to kernel parameters.

use kernels_gpu::common::layout::{PageStrides, absent, absent_mut};
use kernels_gpu::common::overlap::Overlap;
use kernels_gpu::common::radix::{NO_COUNTS, wanted_counts};
use kernels_gpu::ops::append::{AppendParams, PIECE};
use kernels_gpu::ops::attend::{AttendParams, MAX_POSITION};
use kernels_gpu::ops::gather::GatherParams;
use kernels_gpu::ops::merge::MergeParams;
use kernels_gpu::ops::pool::PoolParams;
use kernels_gpu::ops::score::ScoreParams;
use kernels_gpu::ops::smooth::SmoothParams;
use kernels_gpu::ops::top_k::TopKParams;
use kernels_gpu::ops::vote::VoteParams;
use kernels_gpu::simt::global::{GlobalMut, GlobalPtr};

use super::GpuBackend;
use super::scratch::Scratch;
use crate::backend::{
    AppendArgs, AttendArgs, MergeArgs, PoolArgs, ScoreArgs, SmoothArgs, TopKArgs, VoteArgs,
};
use crate::cache::{KvStorageMut, KvStrides};
use crate::config::{Positions, SelectConfig};
use crate::error::{Error, Result};
use crate::rope::RopeTable;
use crate::tensor::{DType, TensorView, TensorViewMut};

/// Kernels move 16 bytes at a time.
const ALIGN: u64 = 16;

/// Strides as kernels take them.
///
/// # Errors
/// [`Error::Config`] where one is not a multiple of 8 elements.
pub(super) fn page_strides(strides: KvStrides) -> Result<PageStrides> {
    for (field, got) in
        [("strides.page", strides.page), ("strides.token", strides.token), ("strides.head", strides.head)]
    {
        if !got.is_multiple_of(PIECE as usize) {
            return Err(Error::config(field, format!("a multiple of {PIECE} elements on a GPU"), got));
        }
    }
    Ok(PageStrides { page: strides.page as u64, token: strides.token as u64, head: strides.head as u64 })
}

/// The last position that a table of angles covers.
fn last_position(rope: &RopeTable) -> u32 {
    rope.max_positions().saturating_sub(1).min(MAX_POSITION as usize) as u32
}

/// The power of two that brings every rotated pair of f16 into its range; 1 for other types.
fn rotated_scale(config: &SelectConfig) -> f32 {
    match &config.positions {
        Positions::Reassigned(rope) if config.dtype == DType::F16 => {
            // Both elements of a pair may end up in one.
            let growth = std::f64::consts::SQRT_2 * rope.attention_factor();
            2f32.powi(-(growth.log2().ceil().clamp(0.0, 60.0) as i32))
        }
        _ => 1.0,
    }
}

/// Addresses of tensors, with a check that they lie on the backend's device.
pub(super) trait Pointers {
    /// Address of a tensor.
    fn addr(&self, what: &'static str, tensor: &TensorView<'_>) -> Result<u64>;

    /// Address of a writable tensor.
    fn addr_mut(&self, what: &'static str, tensor: &TensorViewMut<'_>) -> Result<u64> {
        self.addr(what, &tensor.as_view())
    }

    /// Pointer to a tensor.
    fn pointer<T>(&self, what: &'static str, tensor: &TensorView<'_>) -> Result<GlobalPtr<T>> {
        Ok(GlobalPtr::from_addr(self.addr(what, tensor)?))
    }

    /// Pointer to a writable tensor.
    fn pointer_mut<T>(&self, what: &'static str, tensor: &TensorViewMut<'_>) -> Result<GlobalMut<T>> {
        Ok(GlobalMut::from_addr(self.addr_mut(what, tensor)?))
    }

    /// Pointer to one layer's part of a table of integers, which kernels read one at a time; address 0 where it is absent.
    fn part<T>(&self, what: &'static str, tensor: Option<&TensorViewMut<'_>>) -> Result<GlobalMut<T>>;

    /// Pointer to a tensor that may be absent: address 0.
    fn optional<T>(&self, what: &'static str, tensor: Option<&TensorViewMut<'_>>) -> Result<GlobalMut<T>> {
        tensor.map_or(Ok(absent_mut()), |tensor| self.pointer_mut(what, tensor))
    }
}

impl Pointers for GpuBackend {
    fn addr(&self, what: &'static str, tensor: &TensorView<'_>) -> Result<u64> {
        self.aligned_addr(what, tensor, ALIGN)
    }

    fn part<T>(&self, what: &'static str, tensor: Option<&TensorViewMut<'_>>) -> Result<GlobalMut<T>> {
        let Some(tensor) = tensor else { return Ok(absent_mut()) };
        Ok(GlobalMut::from_addr(self.aligned_addr(what, &tensor.as_view(), size_of::<T>() as u64)?))
    }
}

impl GpuBackend {
    /// Address of a tensor on this device, a multiple of `align`.
    fn aligned_addr(&self, what: &'static str, tensor: &TensorView<'_>, align: u64) -> Result<u64> {
        let slice = tensor.device_slice(what)?;
        slice.expect_on(&self.driver, what)?;
        if !slice.addr().is_multiple_of(align) {
            return Err(Error::config(what, format!("at an address divisible by {align}"), slice.addr()));
        }
        Ok(slice.addr())
    }

    pub(super) fn append_params(&self, args: &AppendArgs<'_>) -> Result<AppendParams> {
        let (shape, dtype_size) = (args.kv.shape, args.kv.dtype().size() as u64);
        let (k_pages, v_pages) = match &args.kv.storage {
            KvStorageMut::Separate { k, v } => (self.addr_mut("k pages", k)?, self.addr_mut("v pages", v)?),
            KvStorageMut::Combined { kv, v_offset } => {
                if !v_offset.is_multiple_of(PIECE as usize) {
                    let rule = format!("a multiple of {PIECE} elements on a GPU");
                    return Err(Error::config("v_offset", rule, v_offset));
                }
                let base = self.addr_mut("kv pages", kv)?;
                (base, base + *v_offset as u64 * dtype_size)
            }
        };
        Ok(AppendParams {
            k: self.pointer("k", &args.k)?,
            v: self.pointer("v", &args.v)?,
            k_pages: GlobalMut::from_addr(k_pages),
            v_pages: GlobalMut::from_addr(v_pages),
            batch: self.tables(args.batch)?,
            stride: page_strides(args.kv.strides)?,
            num_tokens: args.batch.num_query_tokens() as u32,
            num_kv_heads: shape.num_kv_heads as u32,
            head_dim: shape.head_dim as u32,
            reserved: 0,
        })
    }

    pub(super) fn pool_params<T>(&self, args: &PoolArgs<'_>) -> Result<PoolParams<T>> {
        let config = args.config;
        let scratch = Scratch::of(&args.scratch.as_view(), self.driver.gpu(), config, args.limits)?;
        let cached = args.cached.as_ref();
        Ok(PoolParams {
            q: self.pointer("q", &args.q)?,
            cached_queries: self.optional("cached.queries", cached.map(|c| &c.queries))?.as_const(),
            cached_ages: self.part("cached.ages", cached.map(|c| &c.ages))?.as_const(),
            cached_made_at: self.part("cached.made_at", cached.map(|c| &c.made_at))?.as_const(),
            cached_selections: self.part("cached.selections", cached.map(|c| &c.selections))?.as_const(),
            sequence_indices: args.batch.device_sequence_indices(&self.driver)?,
            queries: self.pointer_mut("queries", &args.queries)?,
            similarities: self.pointer_mut("similarities", &args.similarities)?,
            actions: self.pointer_mut("actions", &args.actions)?,
            partial: GlobalMut::from_addr(scratch.pool_partial),
            counters: GlobalMut::from_addr(scratch.counters),
            batch: self.tables(args.batch)?,
            rope: self.rope(args.rope)?,
            num_qo_heads: config.heads.num_qo_heads as u32,
            head_dim: config.heads.head_dim as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            top_k: config.top_k as u32,
            max_reuse: config.max_reuse(),
            similarity_threshold: config.selection_cache.map_or(f32::INFINITY, |c| c.similarity_threshold),
            overlap: Overlap::NONE,
        })
    }

    pub(super) fn score_params<T>(&self, args: &ScoreArgs<'_>) -> Result<ScoreParams<T>> {
        let config = args.config;
        let scratch = Scratch::of(&args.scratch.as_view(), self.driver.gpu(), config, args.limits)?;
        let rotated_scale = rotated_scale(config);
        Ok(ScoreParams {
            k_pages: self.pointer("k pages", &args.kv.k)?,
            queries: self.pointer("queries", &args.queries)?,
            actions: self.pointer("actions", &args.actions)?,
            logits: self.pointer_mut("logits", &args.logits)?,
            stats: self.pointer_mut("stats", &args.stats)?,
            partial: GlobalMut::from_addr(scratch.score_partial),
            counters: GlobalMut::from_addr(scratch.counters),
            batch: self.tables(args.batch)?,
            stride: page_strides(args.kv.strides)?,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            rotated_scale,
            score_scale: config.score_scale() / rotated_scale,
            head_dim: config.heads.head_dim as u32,
            overlap: Overlap::NONE,
            top_k: config.top_k as u32,
            reserved: 0,
        })
    }

    pub(super) fn vote_params(&self, args: &VoteArgs<'_>) -> Result<VoteParams> {
        let config = args.config;
        let gpu = self.driver.gpu();
        let scratch = Scratch::of(&args.scratch.as_view(), gpu, config, args.limits)?;
        let (num_rows, max_tokens) = (args.batch.num_rows() as u32, args.votes.shape().dims()[0] as u32);
        Ok(VoteParams {
            actions: self.pointer("actions", &args.actions)?,
            logits: self.pointer("logits", &args.logits)?,
            stats: GlobalMut::from_addr(self.addr("stats", &args.stats)?),
            partial: absent_mut(),
            votes: self.pointer_mut("votes", &args.votes)?,
            radix: scratch.radix(),
            batch: self.tables(args.batch)?,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            top_k: config.top_k as u32,
            max_tokens,
            wanted: if args.counts { wanted_counts(gpu, num_rows, max_tokens) } else { NO_COUNTS },
            overlap: Overlap::NONE,
        })
    }

    pub(super) fn smooth_params(&self, args: &SmoothArgs<'_>) -> Result<SmoothParams> {
        let config = args.config;
        Ok(SmoothParams {
            actions: self.pointer("actions", &args.actions)?,
            votes: self.pointer("votes", &args.votes)?,
            pooled: self.pointer_mut("pooled", &args.pooled)?,
            batch: self.tables(args.batch)?,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            window: config.vote_pool_window as u32,
            max_tokens: args.votes.shape().dims()[0] as u32,
        })
    }

    pub(super) fn top_k_params(&self, args: &TopKArgs<'_>) -> Result<TopKParams> {
        let config = args.config;
        let gpu = self.driver.gpu();
        let scratch = Scratch::of(&args.scratch.as_view(), gpu, config, args.limits)?;
        let (num_rows, max_tokens) = (args.batch.num_rows() as u32, args.votes.shape().dims()[0] as u32);
        let cached = args.cached.as_ref();
        let sequence_indices = match cached {
            Some(_) => args.batch.device_sequence_indices(&self.driver)?,
            None => absent(),
        };
        Ok(TopKParams {
            actions: self.pointer("actions", &args.actions)?,
            votes: self.pointer("votes", &args.votes)?,
            queries: self.pointer("queries", &args.queries)?,
            sequence_indices,
            top_k: self.pointer_mut("top_k", &args.top_k)?,
            selected: self.pointer_mut("selected", &args.selected)?,
            selected_len: self.pointer_mut("selected_len", &args.selected_len)?,
            cached_queries: self.optional("cached.queries", cached.map(|c| &c.queries))?,
            cached_selections: self.part("cached.selections", cached.map(|c| &c.selections))?,
            cached_ages: self.part("cached.ages", cached.map(|c| &c.ages))?,
            cached_made_at: self.part("cached.made_at", cached.map(|c| &c.made_at))?,
            cached_counters: self.part("cached.counters", cached.map(|c| &c.counters))?,
            counts: GlobalMut::from_addr(scratch.share_counts),
            contenders: GlobalMut::from_addr(scratch.contenders),
            radix: scratch.radix(),
            batch: self.tables(args.batch)?,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            k: config.top_k as u32,
            max_selected: args.selected.shape().dims()[1] as u32,
            query_len: (config.heads.num_qo_heads * config.heads.head_dim) as u32,
            max_tokens,
            wanted: wanted_counts(gpu, num_rows, max_tokens),
            reserved: 0,
        })
    }

    pub(super) fn attend_params<T>(
        &self,
        args: &AttendArgs<'_>,
        scratch: &Scratch,
    ) -> Result<AttendParams<T>> {
        let (config, batch) = (args.config, args.batch);
        let lists = args.selection.as_ref();
        let ranks = lists.and_then(|lists| lists.ranks.as_ref());
        let pointer =
            |what, tensor: Option<&TensorView<'_>>| tensor.map_or(Ok(absent()), |t| self.pointer(what, t));
        let width = lists.map_or(0, |lists| lists.tokens.shape().dims()[1]);
        let stride = page_strides(args.kv.strides)?;
        let rotated_scale = args.rope.map_or(1.0, |_| rotated_scale(config));
        let soft_cap_log2 = (config.logits_soft_cap.unwrap_or(0.0) * std::f32::consts::LOG2_E).min(f32::MAX);
        Ok(AttendParams {
            q: self.pointer("q", &args.q)?,
            k_pages: self.pointer("k pages", &args.kv.k)?,
            v_pages: self.pointer("v pages", &args.kv.v)?,
            selected: pointer("selection.tokens", lists.map(|lists| &lists.tokens))?,
            selected_len: pointer("selection.len", lists.map(|lists| &lists.len))?,
            ranks: pointer("selection.ranks", ranks.map(|ranks| &ranks.ranks))?,
            total_len: pointer("selection.total_len", ranks.map(|ranks| &ranks.total_len))?,
            out: self.pointer_mut("out", &args.out)?,
            lse: self.optional("lse", args.lse.as_ref())?,
            partial: GlobalMut::from_addr(scratch.attend_partial),
            partial_stats: GlobalMut::from_addr(scratch.attend_stats),
            counters: GlobalMut::from_addr(scratch.attend_counters),
            batch: self.tables(batch)?,
            k_stride: stride,
            v_stride: stride,
            rope: self.rope(args.rope)?,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            max_selected: width as u32,
            max_block_len: batch.max_block_len() as u32,
            last_position: args.rope.map_or(MAX_POSITION, last_position),
            max_len: lists.map_or(batch.max_kv_len(), |_| width) as u32,
            k_is_gathered: 0,
            out_is_f32: u32::from(args.out.dtype() == DType::F32),
            rotated_scale,
            inverse_scale: 1.0 / rotated_scale,
            sm_scale_log2: config.sm_scale() * std::f32::consts::LOG2_E / (rotated_scale * rotated_scale),
            soft_cap_log2,
            num_splits: 0,
            reserved: 0,
        })
    }

    /// What [`gather`](kernels_gpu::ops::gather) needs for these lists; `None` where there are none, or the workspace has no
    /// room for lists so long.
    pub(super) fn gather_params<T>(
        attend: AttendParams<T>,
        scratch: &Scratch,
        head_dim: usize,
    ) -> Option<GatherParams<T>> {
        let (head_dim, max_places) = (head_dim as u32, scratch.max_places as u32);
        let gathered = GlobalMut::from_addr(scratch.gathered);
        let fits = attend.selected.addr() != 0 && attend.max_selected <= max_places;
        fits.then_some(GatherParams { attend, gathered, head_dim, max_places })
    }

    pub(super) fn merge_params<T>(&self, args: &MergeArgs<'_>) -> Result<MergeParams<T>> {
        let dims = args.parts.shape();
        let &[num_parts, tokens, heads, head_dim] = dims.dims() else {
            return Err(Error::config("parts", "four-dimensional", dims));
        };
        Ok(MergeParams {
            parts: self.pointer("parts", &args.parts)?,
            part_lses: self.pointer("part_lses", &args.part_lses)?,
            out: self.pointer_mut("out", &args.out)?,
            lse: self.optional("lse", args.lse.as_ref())?,
            num_parts: num_parts as u32,
            num_heads: (tokens * heads) as u32,
            head_dim: head_dim as u32,
            out_is_f32: u32::from(args.out.dtype() == DType::F32),
        })
    }
}
