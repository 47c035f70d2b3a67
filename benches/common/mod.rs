//! What the benchmarks share: a layer's cache filled with noise on any device, and all that a step over it needs.

// Each benchmark uses part of this.
#![allow(dead_code)]

pub mod group;
pub mod timer;

use half::{bf16, f16};
use tokenselect::{
    Batch, BatchSlot, DType, Device, HeadShape, KvLayout, KvShape, KvStrides, KvView, KvViewMut, LayerMut,
    Limits, Operations, Over, PageTables, Plan, Positions, Result, RowAction, SelectConfig, SelectionCache,
    SelectionCacheConfig, SelectionStats, StepInput, StepOutput, Tensor, TensorView, TensorViewMut,
    TokenSelect,
};

/// Heads of Llama 3 8B.
pub const HEADS: HeadShape = HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
/// Tokens in a page.
pub const PAGE_SIZE: usize = 16;
/// Bytes of one token's keys (and of its values).
pub const TOKEN_BYTES: u64 = (HEADS.num_kv_heads * HEADS.head_dim * 2) as u64;
/// Numbers drawn on the host; longer memory repeats them.
const PERIOD: usize = (32 << 20) + 24;

/// A reproducible stream of numbers between -1 and 1 (xorshift).
pub fn noise(seed: u64) -> impl FnMut() -> bf16 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    }
}

/// `[len]` bf16 of noise where `device` works. Repeats every [`PERIOD`] elements, which is no multiple of a token, so that
/// no two tokens are the same; a GPU copies the repetitions itself.
pub fn random(device: &Device, len: usize, seed: u64) -> Result<Tensor> {
    let mut next = noise(seed);
    let block: Vec<bf16> = (0..len.min(PERIOD)).map(|_| next()).collect();
    if device.is_cpu() || block.len() == len {
        let whole =
            if block.len() == len { block } else { block.iter().copied().cycle().take(len).collect() };
        return if device.is_cpu() {
            Tensor::from_vec(whole, [len])
        } else {
            Tensor::from_slice_on(device, &whole, [len])
        };
    }
    let all = Tensor::zeros_on(device, DType::Bf16, [len])?;
    let begin = all.view().device_addr()?;
    // SAFETY: both ranges lie within `all`, of `len` elements, which nothing else uses yet; `PERIOD` keeps addresses
    // aligned to 16 bytes.
    let to = |at: usize, len: usize| unsafe {
        TensorViewMut::from_device_addr(device, begin + 2 * at as u64, DType::Bf16, [len])
    };
    to(0, block.len())?.copy_from(TensorView::new(&block, [block.len()])?)?;
    let mut filled = block.len();
    while filled < len {
        let more = filled.min(len - filled);
        // SAFETY: as above; the ranges do not overlap.
        let from = unsafe { TensorView::from_device_addr(device, begin, DType::Bf16, [more])? };
        to(filled, more)?.copy_from(from)?;
        filled += more;
    }
    Ok(all)
}

/// Keys and values of a layer, in pages of any shape.
pub struct Pools {
    k: Tensor,
    v: Tensor,
}

impl Pools {
    /// Room for `num_elements` keys and as many values, full of noise.
    pub fn new(device: &Device, num_elements: usize) -> Result<Self> {
        Ok(Pools { k: random(device, num_elements, 1)?, v: random(device, num_elements, 2)? })
    }

    fn view<'v>(&'v self, device: &'v Device, dtype: DType, shape: KvShape) -> Result<KvView<'v>> {
        let read = |tensor| reinterpret(device, tensor, dtype);
        KvView::strided(read(&self.k)?, read(&self.v)?, shape, [KvStrides::dense(shape, KvLayout::Nhd); 2])
    }

    fn view_mut<'v>(&'v mut self, device: &'v Device, dtype: DType, shape: KvShape) -> Result<KvViewMut<'v>> {
        let strides = KvStrides::dense(shape, KvLayout::Nhd);
        if dtype == DType::Bf16 {
            return KvViewMut::strided(self.k.view_mut(), self.v.view_mut(), shape, [strides; 2]);
        }
        let write = |tensor: &mut Tensor| {
            let view = tensor.view();
            // SAFETY: the same memory, borrowed for as long, with as many elements of the same size.
            unsafe { TensorViewMut::from_device_addr(device, view.device_addr()?, dtype, view.shape()) }
        };
        KvViewMut::strided(write(&mut self.k)?, write(&mut self.v)?, shape, [strides; 2])
    }
}

/// bf16 read as another type of 2 bytes, which a device can: noise below 1 is noise below 2 as f16.
fn reinterpret<'t>(device: &'t Device, tensor: &'t Tensor, dtype: DType) -> Result<TensorView<'t>> {
    let view = tensor.view();
    if dtype == DType::Bf16 {
        return Ok(view);
    }
    // SAFETY: the same memory, borrowed for as long, with as many elements of the same size.
    unsafe { TensorView::from_device_addr(device, view.device_addr()?, dtype, view.shape()) }
}

/// What is measured: rows of equal length over shuffled pages.
#[derive(Clone)]
pub struct Spec {
    /// Configuration; `n_local` as in the paper, so that it holds the block: [`Spec::decode`], [`Spec::prefill`].
    pub config: SelectConfig,
    /// Tokens of each row, the block included.
    pub tokens: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// Rows.
    pub rows: usize,
    /// Query tokens of each row.
    pub block_len: usize,
    /// Query tokens of the blocks that rows are cut into.
    pub cut: Option<usize>,
}

impl Spec {
    /// One decode row: 128 initial, 2048 chosen and 512 local tokens with the block, 2688 in all.
    pub fn decode(tokens: usize) -> Self {
        let config = SelectConfig { heads: HEADS, n_local: 511, ..SelectConfig::default() };
        Spec { config, tokens, page_size: PAGE_SIZE, rows: 1, block_len: 1, cut: None }
    }

    /// A block of prefill, which is the local window, over the same number of tokens.
    pub fn prefill(tokens: usize, block_len: usize) -> Self {
        let mut spec = Spec::decode(tokens);
        spec.config.n_local = 512usize.saturating_sub(block_len);
        Spec { block_len, ..spec }
    }

    /// A piece of a prompt in blocks, over as many tokens as a block of [`Spec::prefill`].
    pub fn piece(tokens: usize, piece_len: usize, cut: usize) -> Self {
        let mut spec = Spec::prefill(tokens, piece_len);
        spec.config.n_local = 512usize.saturating_sub(cut);
        Spec { cut: Some(cut), ..spec }
    }

    /// Blocks of all rows.
    pub fn num_blocks(&self) -> usize {
        self.rows * self.cut.map_or(1, |len| self.block_len.div_ceil(len))
    }

    /// With positions reassigned.
    pub fn reassigned(mut self) -> Self {
        self.config.positions = Positions::Reassigned(tokenselect::Rope { theta: 5e5, ..Default::default() });
        self
    }

    /// Elements of the keys of all rows, and of the values.
    pub fn num_elements(&self) -> usize {
        self.rows * self.tokens.next_multiple_of(self.page_size) * self.width()
    }

    /// Elements of the keys of a token.
    pub fn width(&self) -> usize {
        self.config.heads.num_kv_heads * self.config.heads.head_dim
    }

    /// Tokens of a selected list.
    pub fn selected(&self) -> usize {
        self.config.max_selected(self.cut.unwrap_or(self.block_len))
    }

    /// Tokens of a row that compete.
    pub fn candidates(&self) -> usize {
        self.tokens - self.block_len - self.config.n_local - self.config.n_init
    }

    /// The bytes that each operation and step must move at least: its inputs read once, its outputs written once.
    ///
    /// Of blocks, the keys twice for each group of those that share a pass, and the votes; attention by itself.
    pub fn bytes(&self) -> Bytes {
        let heads = self.config.heads;
        let (queries, rows) = (self.rows * self.block_len, self.rows);
        let q = queries * heads.num_qo_heads * heads.head_dim;
        let pooled = 4 * rows * heads.num_qo_heads * heads.head_dim;
        let (candidates, selected) = (rows * self.candidates(), rows * self.selected());
        let token = 2 * self.width();
        let (append, q_and_out) = (4 * queries * token, 4 * q);
        let attend = 2 * self.num_blocks() / rows * selected * token + q_and_out;
        let dense = 2 * rows * self.tokens * token + q_and_out;
        if self.cut.is_some() {
            let most = 64 / heads.group().next_power_of_two().max(4);
            let blocks = self.num_blocks() / rows;
            let select = 2 * blocks.div_ceil(most) * candidates * token + 8 * blocks * candidates;
            let step_anew = append + select + attend;
            return Bytes { append, select, attend, step_anew, ..Bytes::default() };
        }
        Bytes {
            append,
            pool: 2 * q + pooled,
            score: candidates * (token + 4 * heads.num_qo_heads) + pooled,
            vote: candidates * 4 * (heads.num_qo_heads + 1),
            top_k: 4 * (candidates + selected),
            vote_top_k: 4 * (candidates * heads.num_qo_heads + selected),
            select: candidates * token + 2 * q + 4 * selected,
            attend,
            dense,
            // The keys of the candidates, those of the windows, the values of the list.
            step_anew: append
                + (candidates + selected - rows * self.config.top_k) * token
                + selected * token
                + q_and_out,
            step_reused: append + attend,
            step_dense: append + dense,
        }
    }
}

/// Bytes of [`Spec::bytes`].
#[derive(Clone, Copy, Default)]
pub struct Bytes {
    pub append: usize,
    pub pool: usize,
    pub score: usize,
    pub vote: usize,
    pub top_k: usize,
    pub vote_top_k: usize,
    pub select: usize,
    pub attend: usize,
    pub dense: usize,
    pub step_anew: usize,
    pub step_reused: usize,
    pub step_dense: usize,
}

/// Which step of a layer.
#[derive(Clone, Copy, PartialEq)]
pub enum Step {
    /// Append, select, attend.
    Anew,
    /// Append, use the cached selection again, attend.
    Reused,
    /// Append, attend to all tokens.
    Dense,
}

/// A layer with a batch over it. Operations may be repeated: appending writes the same tokens again.
pub struct Layer<'a> {
    pub spec: Spec,
    pub select: TokenSelect,
    pools: &'a mut Pools,
    shape: KvShape,
    batch: Batch,
    /// Where the tables of `batch` lie, for captured steps. The processor has none.
    _slot: Option<BatchSlot>,
    cache: SelectionCache,
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    out: Tensor,
    lse: Tensor,
}

impl<'a> Layer<'a> {
    /// A layer within `pools`, which hold at least [`Spec::num_elements`].
    pub fn new(device: &Device, pools: &'a mut Pools, spec: &Spec) -> Result<Self> {
        let mut spec = spec.clone();
        // Whatever the queries: reuse is chosen by passing the cache or not.
        spec.config.selection_cache =
            Some(SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: Some(u32::MAX) });
        let heads = spec.config.heads;
        let pages_per_row = spec.tokens.div_ceil(spec.page_size);
        let num_pages = spec.rows * pages_per_row;
        let limits = Limits {
            max_rows: spec.num_blocks(),
            max_block_len: spec.cut.unwrap_or(spec.block_len),
            max_kv_tokens: spec.num_blocks() / spec.rows * num_pages * spec.page_size,
        };
        let operations = if spec.cut.is_some() { Operations::PREFILL } else { Operations::ALL };
        let select = TokenSelect::with_plan(Plan::new(device, spec.config.clone(), limits, operations)?)?;
        let cache = SelectionCache::new(device, &spec.config, 1, spec.rows)?;
        let queries = spec.rows * spec.block_len;
        let draw = |shape: [usize; 3], scale: f32, seed: u64| {
            let mut next = noise(seed);
            let mut numbers = (0..shape.iter().product()).map(|_| next().to_f32() * scale);
            if spec.config.dtype == DType::F16 {
                return Tensor::from_slice_on(device, &numbers.map(f16::from_f32).collect::<Vec<_>>(), shape);
            }
            Tensor::from_slice_on(device, &numbers.by_ref().map(bf16::from_f32).collect::<Vec<_>>(), shape)
        };
        let q_shape = [queries, heads.num_qo_heads, heads.head_dim];
        let kv_shape = [queries, heads.num_kv_heads, heads.head_dim];

        let step = 7919; // a prime that divides none of the numbers of pages used, so that multiples visit every page
        let place = |i: usize| if num_pages.is_multiple_of(step) { i } else { i * step % num_pages };
        let tables = PageTables {
            indptr: (0..=spec.rows).map(|row| (row * pages_per_row) as u32).collect(),
            indices: (0..num_pages).map(|i| place(i) as u32).collect(),
            last_page_len: vec![(spec.tokens - (pages_per_row - 1) * spec.page_size) as u32; spec.rows],
        };
        let qo_indptr = (0..=spec.rows).map(|row| (row * spec.block_len) as u32).collect();
        let batch = Batch::new(spec.page_size, qo_indptr, tables)?
            .with_sequence_indices((0..spec.rows as u32).collect())?;
        let (batch, slot) = if let Some(len) = spec.cut {
            (batch.in_blocks(len)?, None)
        } else if device.is_cpu() {
            (batch, None)
        } else {
            let mut slot = BatchSlot::new(device, &batch, num_pages)?;
            (slot.put(batch)?, Some(slot))
        };
        Ok(Layer {
            shape: KvShape {
                num_pages,
                page_size: spec.page_size,
                num_kv_heads: heads.num_kv_heads,
                head_dim: heads.head_dim,
            },
            select,
            pools,
            batch,
            _slot: slot,
            cache,
            q: draw(q_shape, 3.0, 3)?, // logits of standard deviation 1
            new_k: draw(kv_shape, 1.0, 4)?,
            new_v: draw(kv_shape, 1.0, 5)?,
            out: Tensor::zeros_on(device, spec.config.dtype, q_shape)?,
            lse: Tensor::zeros_on(device, DType::F32, [queries, heads.num_qo_heads])?,
            spec,
        })
    }

    pub fn append(&mut self) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view_mut(&device, self.spec.config.dtype, self.shape)?;
        self.select.append(&self.batch, kv, self.new_k.view(), self.new_v.view())
    }

    pub fn pool(&mut self) -> Result<()> {
        self.select.pool(&self.batch, self.q.view(), None)
    }

    pub fn score(&mut self) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        self.select.score(&self.batch, kv)
    }

    pub fn vote(&mut self) -> Result<()> {
        self.select.vote(&self.batch)
    }

    pub fn vote_top_k(&mut self) -> Result<()> {
        self.select.vote_top_k(&self.batch, None)
    }

    pub fn top_k(&mut self) -> Result<()> {
        self.select.top_k(&self.batch, None)
    }

    /// Selects anew, or with `reuse` through the cached selections.
    pub fn select(&mut self, reuse: bool) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        let cached = if reuse { Some(self.cache.layer_mut(0)?) } else { None };
        self.select.select(&self.batch, kv, self.q.view(), cached)
    }

    /// Appends, and selects as [`select`](Self::select) does.
    pub fn append_select(&mut self, reuse: bool) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view_mut(&device, self.spec.config.dtype, self.shape)?;
        let cached = if reuse { Some(self.cache.layer_mut(0)?) } else { None };
        let input = StepInput { q: self.q.view(), k: self.new_k.view(), v: self.new_v.view() };
        self.select.append_select(&self.batch, LayerMut { kv, selections: cached }, input)
    }

    /// Attention over the selected lists.
    pub fn attend(&mut self) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        let output = StepOutput { out: self.out.view_mut(), lse: None };
        self.select.attend(&self.batch, kv, self.q.view(), Over::Selected, output)
    }

    /// Attention over all tokens.
    pub fn attend_dense(&mut self) -> Result<()> {
        let device = self.select.device().clone();
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        let output = StepOutput { out: self.out.view_mut(), lse: None };
        self.select.attend(&self.batch, kv, self.q.view(), Over::All, output)
    }

    pub fn step(&mut self, step: Step) -> Result<()> {
        if step == Step::Dense {
            self.append()?;
            return self.attend_dense();
        }
        self.append_select(step == Step::Reused)?;
        self.attend()
    }

    /// The output. Waits for the device.
    pub fn output(&self) -> Result<Vec<bf16>> {
        self.out.to_vec()
    }

    /// The output, where the device works.
    pub fn out(&self) -> &Tensor {
        &self.out
    }

    /// The log-sum-exps of the output that [`merge`](Self::merge) has written.
    pub fn lse(&self) -> &Tensor {
        &self.lse
    }

    /// Forgets the output, so that the next one is known to have been written.
    pub fn clear_output(&mut self) -> Result<()> {
        self.lse.copy_from(Tensor::zeros(DType::F32, self.lse.shape())?.view())?;
        self.out.copy_from(Tensor::zeros(self.out.dtype(), self.out.shape())?.view())
    }

    /// Attention over the selected lists in f32, and over all tokens; both merged as if they were parts of one list.
    pub fn merge(&mut self) -> Result<()> {
        let [queries, heads, head_dim] =
            [self.out.shape().dims()[0], self.out.shape().dims()[1], self.out.shape().dims()[2]];
        let device = self.select.device().clone();
        let parts = Tensor::zeros_on(&device, DType::F32, [2, queries, heads, head_dim])?;
        let lses = Tensor::zeros_on(&device, DType::F32, [2, queries, heads])?;
        let len = queries * heads;
        let part = |i: usize| {
            let (out, lse) = (parts.view().device_addr()?, lses.view().device_addr()?);
            // SAFETY: the parts lie within the two tensors, which live until they are merged, and do not overlap.
            unsafe {
                Ok(StepOutput {
                    out: TensorViewMut::from_device_addr(
                        &device,
                        out + (4 * i * len * head_dim) as u64,
                        DType::F32,
                        [queries, heads, head_dim],
                    )?,
                    lse: Some(TensorViewMut::from_device_addr(
                        &device,
                        lse + (4 * i * len) as u64,
                        DType::F32,
                        [queries, heads],
                    )?),
                })
            }
        };
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        self.select.attend(&self.batch, kv, self.q.view(), Over::Selected, part(0)?)?;
        let kv = self.pools.view(&device, self.spec.config.dtype, self.shape)?;
        self.select.attend(&self.batch, kv, self.q.view(), Over::All, part(1)?)?;
        let output = StepOutput { out: self.out.view_mut(), lse: Some(self.lse.view_mut()) };
        self.select.merge(parts.view(), lses.view(), output)
    }

    /// How often selections were reused and made through the cache. Waits for the device.
    pub fn stats(&self) -> Result<SelectionStats> {
        self.cache.stats()
    }

    /// Why the lists of the last selection cannot be right, if so: lengths, order, windows. Waits for the device.
    pub fn check_lists(&self) -> std::result::Result<(), String> {
        let actions = self.select.workspace().actions().map_err(|error| error.to_string())?;
        let rows = self.batch.num_rows();
        if let Some(action) = actions[..rows].iter().find(|&&action| action != RowAction::Score) {
            return Err(format!("a row's action is {action:?}"));
        }
        for row in 0..rows {
            let len = self.batch.row(row).map_err(|error| error.to_string())?.kv_len;
            let list = self.select.workspace().selected(row).map_err(|error| error.to_string())?;
            if list.len() != self.spec.selected() {
                return Err(format!(
                    "row {row} has {} tokens, expected {}",
                    list.len(),
                    self.spec.selected()
                ));
            }
            if list.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(format!("the list of row {row} does not ascend"));
            }
            if list[0] != 0 || list[list.len() - 1] as usize != len - 1 {
                return Err(format!("the list of row {row} lacks its ends"));
            }
        }
        Ok(())
    }
}

/// The emulated GPU, or the first one; says so where there is none.
pub fn gpu(emulated: bool) -> Option<Device> {
    if emulated {
        return Some(Device::emulated());
    }
    Device::cuda(0).inspect_err(|error| println!("SKIPPED on CUDA: {error}")).ok()
}

/// The processor, and the first GPU where there is one.
pub fn devices() -> Vec<Device> {
    [Some(Device::cpu()), gpu(false)].into_iter().flatten().collect()
}

/// `cpu` or `cuda`, for names of measurements.
pub fn short_name(device: &Device) -> &'static str {
    if device.is_cpu() { "cpu" } else { "cuda" }
}
