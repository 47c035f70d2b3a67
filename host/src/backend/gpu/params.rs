//! From checked arguments to kernel parameters.

use tokenselect_kernels::common::layout::{HeadStrides, PageStrides, absent, absent_mut};
use tokenselect_kernels::common::overlap::Overlap;
use tokenselect_kernels::common::radix::{NO_COUNTS, wanted_counts};
use tokenselect_kernels::ops::append::AppendParams;
use tokenselect_kernels::ops::attend::{AttendParams, MAX_POSITION};
use tokenselect_kernels::ops::compare::CompareParams;
use tokenselect_kernels::ops::decide::DecideParams;
use tokenselect_kernels::ops::gather::GatherParams;
use tokenselect_kernels::ops::merge::MergeParams;
use tokenselect_kernels::ops::pool::{CachedTables, PoolParams, ReuseRules};
use tokenselect_kernels::ops::score::ScoreParams;
use tokenselect_kernels::ops::score_blocks::ScoreBlocksParams;
use tokenselect_kernels::ops::smooth::SmoothParams;
use tokenselect_kernels::ops::top_k::TopKParams;
use tokenselect_kernels::ops::vote::VoteParams;
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};

use tokenselect_kernels::common::rope::RopeTables;

use crate::backend::{AttendArgs, MergeArgs};
use crate::batch::Batch;
use crate::config::{Positions, SelectConfig};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::{KvStorageMut, KvStrides, KvView, KvViewMut};
use crate::plan::{GpuPlan, Plan, Scratch};
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::{Tensor, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Strides as kernels take them.
fn page_strides(strides: KvStrides) -> PageStrides {
    PageStrides { page: strides.page as u64, token: strides.token as u64, head: strides.head as u64 }
}

/// Strides of queries, keys or values as kernels take them.
fn head_strides(tensor: &TensorView<'_>) -> HeadStrides {
    let [token, head] = tensor.head_strides().map(|stride| stride as u32); // checked
    HeadStrides { token, head }
}

/// The last position that a table of angles covers.
fn last_position(num_positions: usize) -> u32 {
    num_positions.saturating_sub(1).min(MAX_POSITION as usize) as u32
}

/// No row of the batch, nor of another that recorded work may see in its place, has more tokens: `vote` counts for the `top_k` that
/// this asks for. Blocks, of which each has the pages of its sequence, are many together, and recorded work sees no others.
fn max_tokens(plan: &Plan, batch: &Batch) -> u32 {
    let most = plan.limits().max_kv_tokens;
    if batch.is_in_blocks() { batch.max_kv_len().min(most) as u32 } else { most as u32 }
}

/// When a cached selection is used again.
fn reuse_rules(config: &SelectConfig) -> ReuseRules {
    ReuseRules {
        n_init: config.n_init as u32,
        n_local: config.n_local as u32,
        top_k: config.top_k as u32,
        max_reuse: config.max_reuse(),
        similarity_threshold: config.selection_cache.map_or(f32::INFINITY, |c| c.similarity_threshold),
    }
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

/// A factor that may have left its range, brought back: times a product of 0 it is 0.
fn finite(factor: f32) -> f32 {
    factor.clamp(-f32::MAX, f32::MAX)
}

impl GpuPlan {
    /// Places in the workspace's scratch memory.
    fn scratch(&self, workspace: &Workspace) -> Result<Scratch> {
        Ok(self.scratch.at(workspace.scratch.view().device_addr()?))
    }

    /// Angles of reassigned positions, if there are any.
    fn angles(&self, workspace: &Workspace) -> Result<RopeTables> {
        let angles = workspace.angles.as_ref();
        angles.map_or(Ok(RopeTables::none()), |angles| angles.device_tables(&self.driver))
    }

    pub(super) fn append_params(
        &self,
        batch: &Batch,
        kv: &KvViewMut<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<AppendParams> {
        let (shape, dtype_size) = (kv.shape, kv.dtype().size() as u64);
        let (k_pages, v_pages) = match &kv.storage {
            KvStorageMut::Separate { k, v } => (pointer_mut(k)?, pointer_mut(v)?),
            KvStorageMut::Combined { kv, offsets } => {
                let base = kv.as_view().device_addr()?;
                let at = |offset: usize| GlobalMut::from_addr(base + offset as u64 * dtype_size);
                (at(offsets[0]), at(offsets[1]))
            }
        };
        Ok(AppendParams {
            k: pointer(k)?,
            v: pointer(v)?,
            k_pages,
            v_pages,
            batch: self.tables(batch)?,
            new_k_stride: head_strides(k),
            new_v_stride: head_strides(v),
            k_stride: page_strides(kv.k_strides),
            v_stride: page_strides(kv.v_strides),
            num_tokens: batch.num_query_tokens() as u32,
            num_kv_heads: shape.num_kv_heads as u32,
            head_dim: shape.head_dim as u32,
            reserved: 0,
        })
    }

    pub(super) fn pool_params<T>(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        q: &TensorView<'_>,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<PoolParams<T>> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        Ok(PoolParams {
            q: pointer(q)?,
            cached_queries: optional(cached.map(|c| &c.queries))?.as_const(),
            cached_ages: optional(cached.map(|c| &c.ages))?.as_const(),
            cached_made_at: optional(cached.map(|c| &c.made_at))?.as_const(),
            cached_selections: optional(cached.map(|c| &c.selections))?.as_const(),
            sequence_indices: batch.device_sequence_indices(&self.driver)?,
            queries: own_mut(&workspace.queries)?,
            similarities: own_mut(&workspace.similarities)?,
            actions: own_mut(&workspace.actions)?,
            partial: GlobalMut::from_addr(scratch.pool_partial),
            counters: GlobalMut::from_addr(scratch.counters),
            batch: self.tables(batch)?,
            q_stride: head_strides(q),
            rope: self.angles(workspace)?,
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

    pub(super) fn score_params<T>(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        kv: &KvView<'_>,
    ) -> Result<ScoreParams<T>> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        let rotated_scale = rotated_scale(config);
        Ok(ScoreParams {
            k_pages: pointer(&kv.k)?,
            queries: own(&workspace.queries)?,
            actions: own(&workspace.actions)?,
            logits: own_mut(&workspace.logits)?,
            stats: own_mut(&workspace.stats)?,
            partial: GlobalMut::from_addr(scratch.score_partial),
            counters: GlobalMut::from_addr(scratch.counters),
            batch: self.tables(batch)?,
            stride: page_strides(kv.k_strides),
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            rotated_scale,
            score_scale: finite(config.score_scale() / rotated_scale),
            head_dim: config.heads.head_dim as u32,
            overlap: Overlap::NONE,
            top_k: config.top_k as u32,
            reserved: 0,
        })
    }

    /// Parameters of all launches of `score_blocks`.
    pub(super) fn score_blocks_params<T>(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        kv: &KvView<'_>,
        columns: u32,
    ) -> Result<ScoreBlocksParams<T>> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        let rotated_scale = rotated_scale(config);
        let (groups, num_groups) = batch.device_groups(&self.driver, columns)?;
        Ok(ScoreBlocksParams {
            k_pages: pointer(&kv.k)?,
            queries: own(&workspace.queries)?,
            actions: own(&workspace.actions)?,
            groups,
            partial: GlobalMut::from_addr(scratch.blocks_partial),
            operands: GlobalMut::from_addr(scratch.blocks_operands),
            counters: GlobalMut::from_addr(scratch.blocks_counters),
            votes: own_mut(&workspace.votes)?,
            batch: self.tables(batch)?,
            stride: page_strides(kv.k_strides),
            num_groups: num_groups as u32,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            scale_log2: finite(config.score_scale() * std::f32::consts::LOG2_E / rotated_scale),
            rotated_scale,
            head_dim: config.heads.head_dim as u32,
        })
    }

    pub(super) fn vote_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        counts: bool,
    ) -> Result<VoteParams> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        let (num_rows, max_tokens) = (batch.num_rows() as u32, max_tokens(plan, batch));
        Ok(VoteParams {
            actions: own(&workspace.actions)?,
            logits: own(&workspace.logits)?,
            stats: own_mut(&workspace.stats)?,
            partial: absent_mut(),
            votes: own_mut(&workspace.votes)?,
            radix: scratch.radix(),
            batch: self.tables(batch)?,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            top_k: config.top_k as u32,
            max_tokens,
            wanted: if counts { wanted_counts(self.driver.gpu(), num_rows, max_tokens) } else { NO_COUNTS },
            overlap: Overlap::NONE,
        })
    }

    pub(super) fn compare_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<CompareParams> {
        let heads = plan.config().heads;
        Ok(CompareParams {
            queries: own(&workspace.queries)?,
            products: own_mut(&workspace.products)?,
            cached: self.cached_tables(batch, cached)?,
            batch: self.tables(batch)?,
            rules: reuse_rules(plan.config()),
            query_len: (heads.num_qo_heads * heads.head_dim) as u32,
        })
    }

    pub(super) fn decide_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<DecideParams> {
        Ok(DecideParams {
            products: own(&workspace.products)?,
            similarities: own_mut(&workspace.similarities)?,
            actions: own_mut(&workspace.actions)?,
            cached: self.cached_tables(batch, cached)?,
            batch: self.tables(batch)?,
            rules: reuse_rules(plan.config()),
            reserved: 0,
        })
    }

    /// A layer's cached selections, and which rows they are of.
    fn cached_tables(&self, batch: &Batch, cached: Option<&SelectionCacheLayer<'_>>) -> Result<CachedTables> {
        Ok(CachedTables {
            queries: optional(cached.map(|c| &c.queries))?.as_const(),
            ages: optional(cached.map(|c| &c.ages))?.as_const(),
            made_at: optional(cached.map(|c| &c.made_at))?.as_const(),
            selections: optional(cached.map(|c| &c.selections))?.as_const(),
            sequence_indices: batch.device_sequence_indices(&self.driver)?,
        })
    }

    pub(super) fn smooth_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
    ) -> Result<SmoothParams> {
        let config = plan.config();
        Ok(SmoothParams {
            actions: own(&workspace.actions)?,
            votes: own(&workspace.votes)?,
            pooled: own_mut(&workspace.pooled_votes)?,
            batch: self.tables(batch)?,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            window: config.vote_pool_window as u32,
            max_tokens: plan.limits().max_kv_tokens as u32,
        })
    }

    pub(super) fn top_k_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<TopKParams> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        let num_rows = batch.num_rows() as u32;
        let max_tokens = max_tokens(plan, batch);
        let votes = if plan.votes_are_chosen_from() { &workspace.votes } else { &workspace.pooled_votes };
        let sequence_indices = match cached {
            Some(_) => batch.device_sequence_indices(&self.driver)?,
            None => absent(),
        };
        Ok(TopKParams {
            actions: own(&workspace.actions)?,
            votes: own(votes)?,
            queries: own(&workspace.queries)?,
            sequence_indices,
            top_k: own_mut(&workspace.top_k)?,
            selected: own_mut(&workspace.selected)?,
            selected_len: own_mut(&workspace.selected_len)?,
            cached_queries: optional(cached.map(|c| &c.queries))?,
            cached_selections: optional(cached.map(|c| &c.selections))?,
            cached_ages: optional(cached.map(|c| &c.ages))?,
            cached_made_at: optional(cached.map(|c| &c.made_at))?,
            cached_counters: optional(cached.map(|c| &c.counters))?,
            counts: GlobalMut::from_addr(scratch.share_counts),
            contenders: GlobalMut::from_addr(scratch.contenders),
            radix: scratch.radix(),
            batch: self.tables(batch)?,
            n_init: config.n_init as u32,
            n_local: config.n_local as u32,
            k: config.top_k as u32,
            max_selected: plan.list_width() as u32,
            query_len: (config.heads.num_qo_heads * config.heads.head_dim) as u32,
            max_tokens,
            wanted: wanted_counts(self.driver.gpu(), num_rows, max_tokens),
            reserved: 0,
        })
    }

    pub(super) fn attend_params<T>(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        args: &AttendArgs<'_>,
    ) -> Result<AttendParams<T>> {
        let (config, scratch) = (plan.config(), self.scratch(workspace)?);
        let lists = args.lists.as_ref();
        let ranks = lists.and_then(|lists| lists.ranks.as_ref());
        let list = |tensor: Option<&TensorView<'_>>| tensor.map_or(Ok(absent()), pointer);
        let width = lists.map_or(0, |lists| lists.tokens.shape().dims()[1]);
        let rotated_scale = rotated_scale(config);
        let soft_cap_log2 = (config.logits_soft_cap.unwrap_or(0.0) * std::f32::consts::LOG2_E).min(f32::MAX);
        Ok(AttendParams {
            q: pointer(&args.q)?,
            k_pages: pointer(&args.kv.k)?,
            v_pages: pointer(&args.kv.v)?,
            selected: list(lists.map(|lists| &lists.tokens))?,
            selected_len: list(lists.map(|lists| &lists.len))?,
            ranks: list(ranks.map(|ranks| &ranks.ranks))?,
            total_len: list(ranks.map(|ranks| &ranks.total_len))?,
            out: pointer_mut(&args.out)?,
            lse: optional(args.lse.as_ref())?,
            partial: GlobalMut::from_addr(scratch.attend_partial),
            partial_stats: GlobalMut::from_addr(scratch.attend_stats),
            counters: GlobalMut::from_addr(scratch.attend_counters),
            batch: self.tables(batch)?,
            q_stride: head_strides(&args.q),
            k_stride: page_strides(args.kv.k_strides),
            v_stride: page_strides(args.kv.v_strides),
            rope: self.angles(workspace)?,
            num_kv_heads: config.heads.num_kv_heads as u32,
            group: config.heads.group() as u32,
            max_selected: width as u32,
            max_block_len: batch.max_block_len() as u32,
            last_position: match &config.positions {
                Positions::Native => MAX_POSITION,
                Positions::Reassigned(_) => last_position(plan.num_positions()),
            },
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

    /// What [`gather`](tokenselect_kernels::ops::gather) needs for these lists; `None` where there are none, or the workspace has no
    /// room for lists so long.
    pub(super) fn gather_params<T>(
        &self,
        workspace: &Workspace,
        attend: AttendParams<T>,
        head_dim: u32,
    ) -> Result<Option<GatherParams<T>>> {
        let scratch = self.scratch(workspace)?;
        let max_places = scratch.max_places as u32;
        let gathered = GlobalMut::from_addr(scratch.gathered);
        let fits = attend.selected.addr() != 0 && attend.max_selected <= max_places;
        Ok(fits.then_some(GatherParams { attend, gathered, head_dim, max_places }))
    }

    pub(super) fn merge_params<T>(&self, args: &MergeArgs<'_>) -> Result<MergeParams<T>> {
        let dims = args.parts.shape();
        let &[num_parts, tokens, heads, head_dim] = dims.dims() else {
            return Err(Error::argument("parts", "four-dimensional", dims));
        };
        Ok(MergeParams {
            parts: pointer(&args.parts)?,
            part_lses: pointer(&args.part_lses)?,
            out: pointer_mut(&args.out)?,
            lse: optional(args.lse.as_ref())?,
            num_parts: num_parts as u32,
            num_heads: (tokens * heads) as u32,
            head_dim: head_dim as u32,
            out_is_f32: u32::from(args.out.dtype() == DType::F32),
        })
    }
}

/// Pointer to a tensor on the device.
fn pointer<T>(tensor: &TensorView<'_>) -> Result<GlobalPtr<T>> {
    Ok(GlobalPtr::from_addr(tensor.device_addr()?))
}

/// Pointer to a writable tensor on the device.
fn pointer_mut<T>(tensor: &TensorViewMut<'_>) -> Result<GlobalMut<T>> {
    Ok(GlobalMut::from_addr(tensor.as_view().device_addr()?))
}

/// Pointer to a tensor that may be absent: address 0.
fn optional<T>(tensor: Option<&TensorViewMut<'_>>) -> Result<GlobalMut<T>> {
    tensor.map_or(Ok(absent_mut()), pointer_mut)
}

/// Pointer to a tensor of the workspace.
fn own<T>(tensor: &Tensor) -> Result<GlobalPtr<T>> {
    pointer(&tensor.view())
}

/// Pointer to a tensor of the workspace, to write.
fn own_mut<T>(tensor: &Tensor) -> Result<GlobalMut<T>> {
    Ok(GlobalMut::from_addr(tensor.view().device_addr()?))
}
