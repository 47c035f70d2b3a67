//! A GPU, real or emulated: turns operations into kernel parameters and launches.
//!
//! Everything is put in the driver's stream; nothing here waits, and nothing is allocated in a step but the tables
//! of a batch, once.

mod params;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use std::ops::Range;

use half::f16;
use tokenselect_kernels::common::layout::{BatchTables, PageStrides};
use tokenselect_kernels::common::overlap::Overlap;
use tokenselect_kernels::common::radix::NO_COUNTS;
use tokenselect_kernels::entries::{ElementType, Entry, Key, Op};
use tokenselect_kernels::launch::Dims;
use tokenselect_kernels::ops::append::AppendParams;
use tokenselect_kernels::ops::append_pool::AppendPoolParams;
use tokenselect_kernels::ops::attend::AttendParams;
use tokenselect_kernels::ops::attend_decode::QUERY_ROWS;
use tokenselect_kernels::ops::merge::MergeParams;
use tokenselect_kernels::ops::pool::PoolParams;
use tokenselect_kernels::ops::score::ScoreParams;
use tokenselect_kernels::ops::score_blocks::ScoreBlocksParams;
use tokenselect_kernels::ops::top_k::TopKParams;

use super::{AttendArgs, Backend, MergeArgs, SelectedKv};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::{KvView, KvViewMut};
use crate::plan::{FEW_QUERY_ROWS, GpuPlan, Plan, PoolKernels, ScoreKernel, VoteKernels, missing};
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;
use crate::workspace::Workspace;

/// Stages of keys that `score_stream` prefetches while queries are pooled: about as many as arrive meanwhile. More of them
/// keep the queries waiting; and where a row may use its selection again, they are prefetched in vain.
const PREFETCHED_STAGES: u32 = 2;

impl GpuPlan {
    fn unsupported(&self, op: &'static str, what: &str) -> Error {
        Error::Unsupported { device: self.driver.name().to_owned(), op, what: what.to_owned() }
    }

    /// Launches an entry.
    ///
    /// # Safety
    /// - `params` is the entry's parameter struct, and the entry's own rules hold for it.
    unsafe fn launch<P: Copy>(&self, entry: &'static Entry, dims: Dims, params: &P) -> Result<()> {
        // SAFETY: the caller's promise; parameter structs are `repr(C)` without padding.
        unsafe { self.driver.launch_with(entry, dims, params) }
    }

    fn launch_append(&self, params: &AppendParams) -> Result<()> {
        if params.num_tokens == 0 {
            return Ok(());
        }
        // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `append_params` strides and places.
        unsafe { self.launch(self.kernels.append.ok_or_else(|| missing("append"))?, params.dims(), params) }
    }

    /// One launch where blocks are short, else one for each of the two. All element types have the same parameters.
    fn launch_append_pool(&self, params: &AppendPoolParams<f16>) -> Result<()> {
        let kernels = self.kernels.pool.as_ref().ok_or_else(|| missing("pool"))?;
        if params.fits() {
            // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths, the plan's angles cover `n_local` and the
            // block; no block is longer than the longest.
            return unsafe { self.launch(kernels.append_pool, params.dims(), params) };
        }
        self.launch_append(&params.append)?;
        let follows_append = params.append.num_tokens > 0;
        let overlap = if follows_append { Overlap::NONE.waiting_last() } else { Overlap::NONE };
        let pool = PoolParams { overlap, ..params.pool };
        // SAFETY: as above.
        unsafe { self.launch(kernels.pool, pool.dims(), &pool) }
    }

    /// The kernel that scores these pages, its launch dimensions, and whether it is `score_stream`.
    fn score_kernel(&self, params: &ScoreParams<f16>, batch: &Batch) -> Result<(ScoreKernel, Dims, bool)> {
        let gpu = self.driver.gpu();
        let kernels = self.kernels.score.as_ref().ok_or_else(|| missing("score"))?;
        if params.streams(gpu, batch.num_token_places() as u64) {
            Ok((kernels.stream, params.stream_dims(gpu), true))
        } else {
            Ok((kernels.score, params.dims(gpu), false))
        }
    }

    fn launch_attend(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &Workspace,
        args: AttendArgs<'_>,
    ) -> Result<()> {
        let (gpu, head_dim) = (self.driver.gpu(), plan.config().heads.head_dim as u32);
        let kernels = self.kernels.attend.as_ref().ok_or_else(|| missing("attend"))?;
        let mut params: AttendParams<f16> = self.attend_params(plan, batch, workspace, &args)?;
        if params.can_stream(gpu, head_dim) {
            params.num_splits = params.stream_splits(gpu);
            // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `attend_params` strides and places.
            return unsafe {
                self.launch(kernels.stream, params.stream_dims(gpu, head_dim), &params)?;
                self.launch(kernels.stream_merge, params.stream_merge_dims(head_dim), &params)
            };
        }
        let rotates = workspace.angles.is_some();
        let gathers = if rotates { self.gather_params(workspace, params, head_dim)? } else { None };
        // `attend_decode` finds values where it finds keys.
        let alike = params.k_stride == params.v_stride;
        let rows = params.max_block_len * params.group;
        // A unit of 8 query rows takes the decode kernel about as long as 128 take the one for blocks, but a list is cut for idle SMs.
        let is_fast = kernels.prefill.is_some_and(|prefill| prefill.op == Op::AttendWarpgroups);
        let fills = is_fast && params.decode_units() > gpu.num_sms;
        let few = rows <= if fills { QUERY_ROWS } else { FEW_QUERY_ROWS };
        if alike && (few || kernels.prefill.is_none() || (rotates && gathers.is_none())) {
            // SAFETY: as above.
            return unsafe { self.launch(kernels.decode, params.decode_dims(gpu, head_dim), &params) };
        }
        if rotates && gathers.is_none() {
            let what =
                "rotated keys in other strides than the values', but over lists within the plan's limits";
            return Err(self.unsupported("attend", what));
        }
        let Some(prefill) = kernels.prefill else {
            let what = "keys in other strides than the values': it has too little shared memory";
            return Err(self.unsupported("attend", what));
        };
        if let Some(gather) = gathers {
            // SAFETY: as above; the scratch memory has room for all places of all lists.
            unsafe { self.launch(kernels.gather, gather.dims(), &gather)? };
            let head = gather.max_places as u64 * u64::from(head_dim);
            params.k_pages = gather.gathered.as_const();
            params.k_stride =
                PageStrides { page: head * params.num_kv_heads as u64, token: head_dim.into(), head };
            params.k_is_gathered = 1;
        }
        let dims = match prefill.op {
            Op::AttendWarpgroups => params.warpgroups_dims(gpu, head_dim),
            _ => params.prefill_dims(head_dim),
        };
        // SAFETY: as above.
        unsafe { self.launch(prefill, dims, &params) }
    }

    fn launch_top_k(&self, params: &TopKParams, votes_are_counted: bool) -> Result<()> {
        let (gpu, kernels) = (self.driver.gpu(), self.vote_kernels()?);
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        let launch = |kernel, dims| unsafe { self.launch(kernel, dims, params) };
        if let Some(dims) = params.cluster_dims(gpu) {
            let wanted = if votes_are_counted { params.wanted } else { NO_COUNTS };
            let params = TopKParams { wanted, ..*params };
            // SAFETY: as above.
            return unsafe { self.launch(kernels.choose_in_cluster, dims, &params) };
        }
        if !votes_are_counted {
            launch(kernels.count, params.count_dims(gpu))?;
        }
        launch(kernels.refine, params.count_dims(gpu))?;
        launch(kernels.choose, params.choose_dims())
    }

    /// The parameters of a selection's first launch, and the memory of `q`, `k` and `v` that it reads.
    fn append_pool_params(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        kv: &SelectedKv<'_>,
        q: &TensorView<'_>,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<(AppendPoolParams<f16>, [Range<u64>; 3])> {
        let mut read = [range(q)?, 0..0, 0..0];
        let pooled = AppendPoolParams {
            append: match kv {
                SelectedKv::Read(_) => AppendParams::none(self.tables(batch)?),
                SelectedKv::Append { kv, k, v } => {
                    (read[1], read[2]) = (range(k)?, range(v)?);
                    self.append_params(batch, kv, k, v)?
                }
            },
            pool: self.pool_params(plan, batch, workspace, q, cached)?,
            max_block_len: batch.max_block_len() as u32,
            reserved: 0,
        };
        Ok((pooled, read))
    }

    /// A selection of blocks: their keys are read twice, and no logit is kept.
    fn select_blocks(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        kv: SelectedKv<'_>,
        q: TensorView<'_>,
    ) -> Result<()> {
        let (gpu, kernels) = (self.driver.gpu(), self.kernels.score_blocks.as_ref());
        let kernels = kernels.ok_or_else(|| {
            self.unsupported("score", "blocks with this head dimension: it has too little shared memory")
        })?;
        let (pooled, read) = self.append_pool_params(plan, batch, workspace, &kv, &q, None)?;
        let score: ScoreBlocksParams<f16> =
            self.score_blocks_params(plan, batch, workspace, &kv.view()?, kernels.columns)?;
        let top_k = self.top_k_params(plan, batch, workspace, None)?;

        self.driver.order().reads(&read);
        self.launch_append_pool(&pooled)?;
        // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `score_blocks_params` strides and places; the groups are
        // rows of one sequence each.
        unsafe {
            self.launch(kernels.stats, score.stats_dims(gpu), &score)?;
            self.launch(kernels.fold, score.fold_dims(), &score)?;
            self.launch(kernels.vote, score.vote_dims(gpu), &score)?;
        }
        if !plan.votes_are_chosen_from() {
            self.smooth(plan, batch, workspace)?;
        }
        self.launch_top_k(&top_k, false)
    }

    fn pool_kernels(&self, op: &'static str) -> Result<&PoolKernels> {
        self.kernels.pool.as_ref().ok_or_else(|| missing(op))
    }

    fn vote_kernels(&self) -> Result<&VoteKernels> {
        self.kernels.vote.as_ref().ok_or_else(|| missing("vote"))
    }

    fn tables(&self, batch: &Batch) -> Result<BatchTables> {
        batch.device_tables(&self.driver)
    }
}

impl Backend for GpuPlan {
    fn append(&self, batch: &Batch, kv: KvViewMut<'_>, k: TensorView<'_>, v: TensorView<'_>) -> Result<()> {
        let params = self.append_params(batch, &kv, &k, &v)?;
        self.driver.order().reads(&[range(&k)?, range(&v)?]);
        self.launch_append(&params)
    }

    fn pool(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = AppendPoolParams {
            append: AppendParams::none(self.tables(batch)?),
            pool: self.pool_params(plan, batch, workspace, &q, cached.as_ref())?,
            max_block_len: batch.max_block_len() as u32,
            reserved: 0,
        };
        self.driver.order().reads(&[range(&q)?]);
        self.launch_append_pool(&params)
    }

    fn compare(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.compare_params(plan, batch, workspace, cached.as_ref())?;
        // SAFETY: `TokenSelect` has checked shapes, lengths and places.
        unsafe { self.launch(self.pool_kernels("compare")?.compare, params.dims(), &params) }
    }

    fn decide(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.decide_params(plan, batch, workspace, cached.as_ref())?;
        // SAFETY: as for `compare`.
        unsafe { self.launch(self.pool_kernels("decide")?.decide, params.dims(), &params) }
    }

    fn score(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, kv: KvView<'_>) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.score_params(plan, batch, workspace, &kv)?;
        let (kernel, dims, _) = self.score_kernel(&params, batch)?;
        // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `score_params` strides and places.
        unsafe { self.launch(kernel.entry, dims, &params) }
    }

    fn vote(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, counts: bool) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.vote_params(plan, batch, workspace, counts)?;
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        unsafe { self.launch(self.vote_kernels()?.vote, params.dims(self.driver.gpu()), &params) }
    }

    fn smooth(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.smooth_params(plan, batch, workspace)?;
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        unsafe { self.launch(self.vote_kernels()?.smooth, params.dims(self.driver.gpu()), &params) }
    }

    fn top_k(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
        votes_are_counted: bool,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.top_k_params(plan, batch, workspace, cached.as_ref())?;
        if !votes_are_counted {
            // It reads actions before it waits. `pool` may be the launch before.
            self.driver.order().separates();
        }
        self.launch_top_k(&params, votes_are_counted)
    }

    /// A launch for appending and pooling, where blocks are short, and one for each of `score`, `vote` and `top_k`. The
    /// second asks for keys while the first is at work; the third folds its statistics.
    fn select(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        kv: SelectedKv<'_>,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        if batch.is_in_blocks() {
            return self.select_blocks(plan, batch, workspace, kv, q);
        }
        // Parameters first, so that nothing is half done where an argument is refused.
        let (pooled, read) = self.append_pool_params(plan, batch, workspace, &kv, &q, cached.as_ref())?;
        let mut score = self.score_params(plan, batch, workspace, &kv.view()?)?;
        let (score_kernel, score_dims, streams) = self.score_kernel(&score, batch)?;
        let folding = Overlap::NONE.folding_in_vote(score_kernel.tile_tokens);
        // `append_pool` writes no candidate's key, and has waited for the launches before it; so has `append` before `pool`.
        let prefetches = streams && score.spares_block() && cached.is_none();
        score.overlap = if prefetches { folding.prefetching(PREFETCHED_STAGES) } else { folding };
        let counts = plan.votes_are_chosen_from();
        let mut vote = self.vote_params(plan, batch, workspace, counts)?;
        (vote.partial, vote.overlap) = (score.partial, folding);
        let top_k = self.top_k_params(plan, batch, workspace, cached.as_ref())?;

        self.driver.order().reads(&read);
        self.launch_append_pool(&pooled)?;
        // SAFETY: as for `score` alone. The tokens appended above are no candidates.
        unsafe { self.driver.launch_on_older_pages(score_kernel.entry, score_dims, &score)? };
        // SAFETY: as for `vote` alone.
        unsafe { self.launch(self.vote_kernels()?.vote, vote.dims(self.driver.gpu()), &vote)? };
        if !counts {
            self.smooth(plan, batch, workspace)?;
        }
        self.launch_top_k(&top_k, counts)
    }

    fn attend(&self, plan: &Plan, batch: &Batch, workspace: &Workspace, args: AttendArgs<'_>) -> Result<()> {
        if batch.num_query_tokens() == 0 {
            return Ok(());
        }
        let (read, written) = (range(&args.q)?, range(&args.out.as_view())?);
        self.driver.order().reads(&[read]);
        self.launch_attend(plan, batch, workspace, args)?;
        self.driver.order().writes(written);
        Ok(())
    }

    fn merge(&self, args: MergeArgs<'_>) -> Result<()> {
        let params: MergeParams<f16> = self.merge_params(&args)?;
        if params.num_heads == 0 {
            return Ok(());
        }
        let dtype = match args.out.dtype() {
            DType::F16 => ElementType::F16,
            _ => ElementType::Bf16, // f32, too: `out_is_f32`, which every instance knows
        };
        let entry = self.driver.find("merge", Op::Merge, Key::of(dtype))?;
        let written = range(&args.out.as_view())?;
        // SAFETY: `TokenSelect` has checked the shapes.
        unsafe { self.launch(entry, params.dims(), &params)? };
        self.driver.order().writes(written);
        Ok(())
    }
}

/// Addresses of a tensor, gaps included.
fn range(tensor: &TensorView<'_>) -> Result<Range<u64>> {
    let begin = tensor.device_addr()?;
    let bytes = tensor.extent().saturating_mul(tensor.dtype().size());
    Ok(begin..begin.saturating_add(bytes as u64))
}
