//! A GPU, real or emulated: turns operations into kernel parameters and launches.
//!
//! Everything is put in the driver's stream; nothing here waits, and nothing is allocated in a step but the tables
//! of a batch, once.

pub(crate) mod driver;

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "emulator")]
pub(crate) mod emulated;
mod params;
mod scratch;

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use kernels_gpu::common::layout::{BatchTables, LOGIT_TILE, PageStrides};
use kernels_gpu::common::overlap::Overlap;
use kernels_gpu::common::rope::{HALF_SPLIT, RopeTables};
use kernels_gpu::entries::{ENTRIES, ElementType, Entry, Key, Op, Rotation};
use kernels_gpu::launch::Dims;
use kernels_gpu::limits::{MAX_COLUMNS, columns};
use kernels_gpu::ops::append::AppendParams;
use kernels_gpu::ops::append_pool::AppendPoolParams;
use kernels_gpu::ops::attend::AttendParams;
use kernels_gpu::ops::forget::ForgetParams;
use kernels_gpu::ops::merge::MergeParams;
use kernels_gpu::ops::pool::PoolParams;
use kernels_gpu::ops::score::{ScoreParams, tile_tokens};
use kernels_gpu::ops::top_k::TopKParams;
use kernels_gpu::ops::vote::{MAX_HEADS, VoteParams};

use self::driver::Driver;
use self::params::Pointers;
use self::scratch::Scratch;
use super::{
    AppendArgs, AttendArgs, Backend, CopyPagesArgs, CopySequenceArgs, ForgetArgs, MergeArgs, PoolArgs,
    ScoreArgs, SelectArgs, SmoothArgs, TopKArgs, VoteArgs,
};
use crate::batch::Batch;
use crate::cache::KvStorageMut;
use crate::config::SelectConfig;
use crate::error::{Error, Result};
use crate::plan::Limits;
use crate::rope::RopeTable;
use crate::tensor::{DType, TensorView};

/// Query rows of a KV head up to which the decode kernel, 8 of them at a time, is faster than the prefill kernel, 128.
const FEW_QUERY_ROWS: u32 = 64;

/// Stages of keys that `score_stream` prefetches while queries are pooled: about as many as arrive meanwhile. More of them
/// keep the queries waiting; and where a row may use its selection again, they are prefetched in vain.
const PREFETCHED_STAGES: u32 = 2;

/// A GPU behind a driver.
#[derive(Debug)]
pub(crate) struct GpuBackend {
    driver: Arc<dyn Driver>,
}

/// How keys are scored.
struct ScoreKernel {
    entry: &'static Entry,
    dims: Dims,
    /// Tokens of its tiles.
    tile_tokens: u32,
    /// Whether it is `score_stream`.
    streams: bool,
}

impl GpuBackend {
    /// Launches kernels through `driver`.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        GpuBackend { driver }
    }

    fn unsupported(&self, op: &'static str, what: impl std::fmt::Display) -> Error {
        Error::Unsupported { device: self.driver.name().to_owned(), op, what: what.to_string() }
    }

    /// The kernel for what `op` needs done, compiled for these values.
    fn entry(&self, op: &'static str, kernel: Op, key: Key) -> Result<&'static Entry> {
        Entry::find(kernel, key).map_err(|missing| self.unsupported(op, missing))
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
        unsafe { self.launch(self.entry("append", Op::Append, Key::NONE)?, params.dims(), params) }
    }

    /// One launch where blocks are short, else one for each of the two. All element types have the same parameters.
    fn launch_append_pool(
        &self,
        op: &'static str,
        dtype: ElementType,
        params: &AppendPoolParams<f16>,
    ) -> Result<()> {
        if params.fits() {
            let entry = self.entry(op, Op::AppendPool, Key::of(dtype))?;
            // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths, the plan's angles cover `n_local` and the
            // block; no block is longer than the longest.
            return unsafe { self.launch(entry, params.dims(), params) };
        }
        let entry = self.entry(op, Op::Pool, Key::of(dtype))?;
        self.launch_append(&params.append)?;
        let follows_append = params.append.num_tokens > 0;
        let overlap = if follows_append { Overlap::NONE.waiting_last() } else { Overlap::NONE };
        let pool = PoolParams { overlap, ..params.pool };
        // SAFETY: as above.
        unsafe { self.launch(entry, pool.dims(), &pool) }
    }

    /// The kernel that scores these pages.
    fn score_kernel(
        &self,
        dtype: ElementType,
        params: &ScoreParams<f16>,
        batch: &Batch,
    ) -> Result<ScoreKernel> {
        let (gpu, head_dim) = (self.driver.gpu(), params.head_dim);
        let Some(columns) = columns(params.group) else {
            let what = format!("groups of {} heads, only up to {MAX_COLUMNS}", params.group);
            return Err(self.unsupported("score", what));
        };
        let streams = params.streams(gpu, batch.num_token_places() as u64);
        let (kernel, dims, tile_tokens) = if streams {
            (Op::ScoreStream, params.stream_dims(gpu), LOGIT_TILE)
        } else {
            (Op::Score, params.dims(gpu), tile_tokens(head_dim, columns))
        };
        let key = Key::of(dtype).with_head_dim(head_dim).with_columns(columns);
        let entry = self.entry("score", kernel, key)?;
        Ok(ScoreKernel { entry, dims, tile_tokens, streams })
    }

    fn launch_attend(&self, args: AttendArgs<'_>) -> Result<()> {
        let (dtype, head_dim) = (self.element_type("attend", args.q.dtype())?, args.config.heads.head_dim);
        let key = Key::of(dtype).with_head_dim(head_dim as u32);
        // The two element types have the same parameters.
        let gpu = self.driver.gpu();
        let scratch = Scratch::of(&args.scratch, gpu, args.config, args.limits)?;
        let mut params: AttendParams<f16> = self.attend_params(&args, &scratch)?;
        if params.can_stream(gpu, head_dim as u32) {
            params.num_splits = params.stream_splits(gpu);
            let entry = self.entry("attend", Op::AttendStream, key)?;
            let merge = self.entry("attend", Op::AttendStreamMerge, Key::of(dtype))?;
            // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `attend_params` strides and places.
            return unsafe {
                self.launch(entry, params.stream_dims(gpu, head_dim as u32), &params)?;
                self.launch(merge, params.stream_merge_dims(head_dim as u32), &params)
            };
        }
        let in_lane = params.rope.pairs_in_lane(head_dim as u32);
        let gathers = args.rope.and_then(|_| Self::gather_params(params, &scratch, head_dim));
        let few = params.max_block_len * params.group <= FEW_QUERY_ROWS;
        if in_lane && (few || (args.rope.is_some() && gathers.is_none())) {
            let rotation = match args.rope.map(|_| params.rope.pairing) {
                None => Rotation::Native,
                Some(HALF_SPLIT) => Rotation::HalfSplit,
                Some(_) => Rotation::Interleaved,
            };
            let entry = self.entry("attend", Op::AttendDecode, key.with_rotation(rotation))?;
            let dims = params.decode_dims(gpu, head_dim as u32);
            // SAFETY: as above.
            return unsafe { self.launch(entry, dims, &params) };
        }
        let entry = self.entry("attend", Op::AttendPrefill, key)?;
        if args.rope.is_some() {
            let Some(gather) = gathers else {
                let what =
                    "half-split pairs over a part of the head, but over lists within the plan's limits";
                return Err(self.unsupported("attend", what));
            };
            let entry = self.entry("attend", Op::Gather, Key::of(dtype))?;
            // SAFETY: as above; the scratch memory has room for all places of all lists.
            unsafe { self.launch(entry, gather.dims(), &gather)? };
            let head = gather.max_places as u64 * head_dim as u64;
            params.k_pages = gather.gathered.as_const();
            params.k_stride =
                PageStrides { page: head * params.num_kv_heads as u64, token: head_dim as u64, head };
            params.k_is_gathered = 1;
        }
        // SAFETY: as above.
        unsafe { self.launch(entry, params.prefill_dims(head_dim as u32), &params) }
    }

    fn vote_kernel(&self, config: &SelectConfig) -> Result<&'static Entry> {
        let heads = config.heads;
        if heads.num_qo_heads > MAX_HEADS as usize {
            let what = format!("{} query heads, only up to {MAX_HEADS}", heads.num_qo_heads);
            return Err(self.unsupported("vote", what));
        }
        let kernel = if heads.group().is_multiple_of(4) { Op::VoteByFour } else { Op::Vote };
        self.entry("vote", kernel, Key::NONE)
    }

    fn launch_vote(&self, entry: &'static Entry, params: &VoteParams) -> Result<()> {
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        unsafe { self.launch(entry, params.dims(self.driver.gpu()), params) }
    }

    fn launch_top_k(&self, params: &TopKParams, votes_are_counted: bool) -> Result<()> {
        let gpu = self.driver.gpu();
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        let launch =
            |kernel, dims| unsafe { self.launch(self.entry("top_k", kernel, Key::NONE)?, dims, params) };
        if !votes_are_counted {
            launch(Op::TopKCount, params.count_dims(gpu))?;
        }
        if let Some(dims) = params.cluster_dims(gpu) {
            return launch(Op::TopKChooseInCluster, dims);
        }
        launch(Op::TopKRefine, params.count_dims(gpu))?;
        launch(Op::TopKChoose, params.choose_dims())
    }

    fn tables(&self, batch: &Batch) -> Result<BatchTables> {
        batch.device_tables(&self.driver)
    }

    fn rope(&self, rope: Option<&RopeTable>) -> Result<RopeTables> {
        rope.map_or(Ok(RopeTables::none()), |rope| rope.device_tables(&self.driver))
    }

    /// A type that kernels are compiled for.
    fn element_type(&self, op: &'static str, dtype: DType) -> Result<ElementType> {
        match dtype {
            DType::F16 => Ok(ElementType::F16),
            DType::Bf16 => Ok(ElementType::Bf16),
            other => Err(self.unsupported(op, format!("{other}, only for f16 and bf16"))),
        }
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> &str {
        self.driver.name()
    }

    fn driver(&self) -> Option<&Arc<dyn Driver>> {
        Some(&self.driver)
    }

    fn scratch_words(&self, config: &SelectConfig, limits: &Limits) -> usize {
        Scratch::words(self.driver.gpu(), config, limits)
    }

    fn prepare(&self, config: &SelectConfig) -> Result<()> {
        let Ok(dtype) = self.element_type("prepare", config.dtype) else { return Ok(()) };
        let (head_dim, columns) = (config.heads.head_dim as u32, columns(config.heads.group() as u32));
        let serves = |entry: &&Entry| entry.serves(dtype, head_dim, columns);
        self.driver.prepare(&ENTRIES.iter().filter(serves).collect::<Vec<_>>())
    }

    fn copy_pages(&self, args: CopyPagesArgs<'_>) -> Result<()> {
        let (shape, strides) = (args.kv.shape, args.kv.strides);
        self.element_type("copy_pages", args.kv.dtype())?;
        let (k, v) = match &args.kv.storage {
            KvStorageMut::Separate { k, v } => (self.addr_mut("k", k)?, self.addr_mut("v", v)?),
            KvStorageMut::Combined { kv, v_offset } => {
                let base = self.addr_mut("kv", kv)?;
                (base, base + 2 * *v_offset as u64)
            }
        };
        // Copies on write are rare, so a copy for each run of adjacent elements will do.
        let token_is_dense =
            strides.token == shape.num_kv_heads * shape.head_dim && strides.head == shape.head_dim;
        for copy in args.copies {
            let at = |base: u64, page: u32, token: usize, head: usize| {
                base + 2 * strides.offset(page as usize, token, head) as u64
            };
            for base in [k, v] {
                if token_is_dense {
                    let bytes = 2 * copy.num_tokens * strides.token;
                    self.driver.copy(at(base, copy.dst, 0, 0), at(base, copy.src, 0, 0), bytes)?;
                    continue;
                }
                for token in 0..copy.num_tokens {
                    for head in 0..shape.num_kv_heads {
                        let (to, from) = (at(base, copy.dst, token, head), at(base, copy.src, token, head));
                        self.driver.copy(to, from, 2 * shape.head_dim)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn copy_sequence(&self, args: CopySequenceArgs<'_>) -> Result<()> {
        for tensor in [&args.queries, &args.selections, &args.ages, &args.made_at] {
            let (base, dims) = (self.addr_mut("selection cache", tensor)?, tensor.shape());
            let &[layers, sequences, ref width @ ..] = dims.dims() else { continue };
            let bytes = width.iter().product::<usize>() * tensor.dtype().size();
            for layer in 0..layers {
                let at = |sequence: usize| base + ((layer * sequences + sequence) * bytes) as u64;
                self.driver.copy(at(args.dst), at(args.src), bytes)?;
            }
        }
        Ok(())
    }

    fn forget(&self, args: ForgetArgs<'_>) -> Result<()> {
        let dims = args.made_at.shape();
        let &[num_layers, num_sequences] = dims.dims() else { return Ok(()) };
        let params = ForgetParams {
            made_at: self.pointer_mut("made_at", &args.made_at)?,
            num_layers: num_layers as u32,
            num_sequences: num_sequences as u32,
            sequence: args.sequence as u32,
            from: args.from as u32,
        };
        if num_layers == 0 {
            return Ok(());
        }
        // SAFETY: `made_at` is `[num_layers, num_sequences]`, and the caller has checked `sequence`.
        unsafe { self.launch(self.entry("forget", Op::Forget, Key::NONE)?, params.dims(), &params) }
    }

    fn append(&self, args: AppendArgs<'_>) -> Result<()> {
        self.element_type("append", args.kv.dtype())?;
        let params = self.append_params(&args)?;
        self.driver.order().reads(&[range(&args.k)?, range(&args.v)?]);
        self.launch_append(&params)
    }

    fn pool(&self, args: PoolArgs<'_>) -> Result<()> {
        if args.batch.num_rows() == 0 {
            return Ok(());
        }
        let dtype = self.element_type("pool", args.q.dtype())?;
        let params = AppendPoolParams {
            append: AppendParams::none(self.tables(args.batch)?),
            pool: self.pool_params(&args)?,
            max_block_len: args.batch.max_block_len() as u32,
            reserved: 0,
        };
        self.driver.order().reads(&[range(&args.q)?]);
        self.launch_append_pool("pool", dtype, &params)
    }

    fn score(&self, args: ScoreArgs<'_>) -> Result<()> {
        if args.batch.num_rows() == 0 {
            return Ok(());
        }
        let dtype = self.element_type("score", args.kv.dtype())?;
        let params = self.score_params(&args)?;
        let kernel = self.score_kernel(dtype, &params, args.batch)?;
        // SAFETY: `TokenSelect` has checked shapes, page numbers and lengths; `score_params` strides and places.
        unsafe { self.launch(kernel.entry, kernel.dims, &params) }
    }

    fn vote(&self, args: VoteArgs<'_>) -> Result<()> {
        if args.batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.vote_params(&args)?;
        self.launch_vote(self.vote_kernel(args.config)?, &params)
    }

    fn smooth(&self, args: SmoothArgs<'_>) -> Result<()> {
        if args.batch.num_rows() == 0 {
            return Ok(());
        }
        let params = self.smooth_params(&args)?;
        let entry = self.entry("smooth", Op::Smooth, Key::NONE)?;
        // SAFETY: `TokenSelect` has checked shapes and lengths.
        unsafe { self.launch(entry, params.dims(self.driver.gpu()), &params) }
    }

    fn top_k(&self, args: TopKArgs<'_>) -> Result<()> {
        if args.batch.num_rows() == 0 {
            return Ok(());
        }
        self.launch_top_k(&self.top_k_params(&args)?, args.votes_are_counted)
    }

    /// A launch for appending and pooling, where blocks are short, and one for each of `score`, `vote` and `top_k`. The
    /// second asks for keys while the first is at work; the third folds its statistics.
    fn select(&self, mut args: SelectArgs<'_>) -> Result<()> {
        let batch = args.batch;
        if batch.num_rows() == 0 {
            return Ok(());
        }
        // Kernels and parameters first, so that nothing is half done where one is missing.
        let first = if args.append().is_some() { "append" } else { "pool" };
        let dtype = self.element_type(first, args.q.dtype())?;
        let mut read = [range(&args.q)?, 0..0, 0..0];
        let pooled = AppendPoolParams {
            append: match args.append() {
                Some(append) => {
                    (read[1], read[2]) = (range(&append.k)?, range(&append.v)?);
                    self.append_params(&append)?
                }
                None => AppendParams::none(self.tables(batch)?),
            },
            pool: self.pool_params(&args.pool())?,
            max_block_len: batch.max_block_len() as u32,
            reserved: 0,
        };
        let mut score = self.score_params(&args.score()?)?;
        let score_kernel = self.score_kernel(dtype, &score, batch)?;
        let folding = Overlap::NONE.folding_in_vote(score_kernel.tile_tokens);
        // `append_pool` writes no candidate's key, and has waited for the launches before it; so has `append` before `pool`.
        let prefetches = score_kernel.streams && score.spares_block() && args.cached.is_none();
        score.overlap = if prefetches { folding.prefetching(PREFETCHED_STAGES) } else { folding };
        let mut vote = self.vote_params(&args.vote())?;
        let vote_kernel = self.vote_kernel(args.plan.config())?;
        (vote.partial, vote.overlap) = (score.partial, folding);
        let top_k = self.top_k_params(&args.top_k())?;

        self.driver.order().reads(&read);
        self.launch_append_pool(first, dtype, &pooled)?;
        // SAFETY: as for `score` alone. The tokens appended above are no candidates.
        unsafe { self.driver.launch_on_older_pages(score_kernel.entry, score_kernel.dims, &score)? };
        self.launch_vote(vote_kernel, &vote)?;
        if let Some(smooth) = args.smooth() {
            self.smooth(smooth)?;
        }
        self.launch_top_k(&top_k, args.plan.votes_are_chosen_from())
    }

    fn attend(&self, args: AttendArgs<'_>) -> Result<()> {
        if args.batch.num_query_tokens() == 0 {
            return Ok(());
        }
        let (read, written) = (range(&args.q)?, range(&args.out.as_view())?);
        self.driver.order().reads(&[read]);
        self.launch_attend(args)?;
        self.driver.order().writes(written);
        Ok(())
    }

    fn merge(&self, args: MergeArgs<'_>) -> Result<()> {
        let params: MergeParams<f16> = self.merge_params(&args)?;
        if params.num_heads == 0 {
            return Ok(());
        }
        let dtype = match args.out.dtype() {
            DType::F32 => ElementType::Bf16, // `out_is_f32`, which every instance knows
            dtype => self.element_type("merge", dtype)?,
        };
        let entry = self.entry("merge", Op::Merge, Key::of(dtype))?;
        let written = range(&args.out.as_view())?;
        // SAFETY: `TokenSelect` has checked the shapes.
        unsafe { self.launch(entry, params.dims(), &params)? };
        self.driver.order().writes(written);
        Ok(())
    }
}

/// Addresses of a tensor.
fn range(tensor: &TensorView<'_>) -> Result<Range<u64>> {
    let begin = tensor.device_addr()?;
    let bytes = tensor.shape().checked_len().unwrap_or(usize::MAX).saturating_mul(tensor.dtype().size());
    Ok(begin..begin.saturating_add(bytes as u64))
}
