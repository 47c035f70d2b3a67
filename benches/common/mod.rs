//! What the benchmarks share: a filled cache of the shape of an 8-billion-parameter model's layer.

// Each benchmark uses part of this.
#![allow(dead_code)]

use half::bf16;
use tokenselect::{
    Batch, CacheConfig, Device, HeadShape, Limits, PagedKvCache, SelectConfig, SelectionCacheConfig,
    SequenceId, StepInput, StepOutput, TensorView, TensorViewMut, TokenSelect,
};

/// Heads of Llama 3 8B.
pub const HEADS: HeadShape = HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
/// Tokens in a page.
pub const PAGE_SIZE: usize = 16;
/// Bytes of one token's keys (and of its values).
pub const TOKEN_BYTES: u64 = (HEADS.num_kv_heads * HEADS.head_dim * 2) as u64;

/// How the selection cache takes part.
#[derive(Clone, Copy, PartialEq)]
pub enum Reuse {
    /// Every step selects anew.
    Never,
    /// Every step after the first uses the first one's selection.
    Always,
}

/// One sequence in one layer, and all that a decode step needs.
pub struct Fixture {
    pub cache: PagedKvCache,
    pub sequence: SequenceId,
    pub select: TokenSelect,
    pub q: Vec<bf16>,
    pub k: Vec<bf16>,
    pub v: Vec<bf16>,
    pub out: Vec<bf16>,
}

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

/// The configuration that is timed: 128 initial, 512 local, 2048 chosen tokens.
pub fn config(reuse: Reuse) -> SelectConfig {
    let always = SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: Some(u32::MAX) };
    SelectConfig {
        heads: HEADS,
        selection_cache: (reuse == Reuse::Always).then_some(always),
        ..SelectConfig::default()
    }
}

impl Fixture {
    /// A sequence of `tokens` random tokens.
    pub fn new(tokens: usize, reuse: Reuse) -> Self {
        let device = Device::cpu();
        let config = config(reuse);
        let num_pages = (tokens + 1).div_ceil(PAGE_SIZE);
        let cache_config = CacheConfig { num_pages, page_size: PAGE_SIZE, ..CacheConfig::default() };
        let limits =
            Limits { max_kv_tokens: num_pages * PAGE_SIZE, max_block_len: tokens, ..Limits::default() };
        let mut cache = PagedKvCache::new(&device, &config, &cache_config).expect("valid configuration");
        let select = TokenSelect::new(&device, config, limits).expect("valid configuration");
        let sequence = cache.create().expect("room for a sequence");

        let width = HEADS.num_kv_heads * HEADS.head_dim;
        let mut next = noise(tokens as u64);
        let mut draw = |len: usize| -> Vec<bf16> { (0..len).map(|_| next()).collect() };
        let (keys, values) = (draw(tokens * width), draw(tokens * width));
        let batch = cache.extend(&[(sequence, tokens)]).expect("room for the tokens");
        let shape = [tokens, HEADS.num_kv_heads, HEADS.head_dim];
        let k = TensorView::new(&keys, shape).expect("shape fits");
        let v = TensorView::new(&values, shape).expect("shape fits");
        let (kv, _) = cache.layer_mut(0).expect("layer 0");
        select.append(&batch, kv, k, v).expect("append");
        let q = draw(HEADS.num_qo_heads * HEADS.head_dim);
        let out = q.clone();
        Fixture { cache, sequence, select, q, k: draw(width), v: draw(width), out }
    }

    /// Appends one token, attends to the selected tokens or to all, and takes the token back.
    pub fn decode(&mut self, dense: bool) {
        let len = self.cache.len(self.sequence).expect("alive");
        let batch = self.cache.extend(&[(self.sequence, 1)]).expect("room for a token");
        let kv_shape = [1, HEADS.num_kv_heads, HEADS.head_dim];
        let q_shape = [1, HEADS.num_qo_heads, HEADS.head_dim];
        let input = StepInput {
            q: TensorView::new(&self.q, q_shape).expect("shape fits"),
            k: TensorView::new(&self.k, kv_shape).expect("shape fits"),
            v: TensorView::new(&self.v, kv_shape).expect("shape fits"),
        };
        let out = TensorViewMut::new(&mut self.out, q_shape).expect("shape fits");
        let output = StepOutput { out, lse: None };
        let step = if dense { TokenSelect::step_dense } else { TokenSelect::step };
        step(&mut self.select, &mut self.cache, 0, &batch, input, output).expect("step");
        self.cache.truncate(self.sequence, len).expect("the token just added");
    }

    /// A batch of one decode token over the cache as it is, for single operations.
    pub fn batch(&mut self) -> Batch {
        self.cache.extend(&[(self.sequence, 1)]).expect("room for a token")
    }
}
