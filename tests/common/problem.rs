//! Random ragged batches: configurations, lengths, and contents rounded to the storage type.

use proptest::prelude::*;
use tokenselect::{
    DType, HeadShape, Positions, Rope, RopePairing, RopeScaling, SelectConfig, SelectionCacheConfig,
};

use super::{Random, round};

/// What keys are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Content {
    /// Independent numbers, and a few keys that resemble a query, so that votes are peaked.
    Peaked,
    /// Copies of three keys of small integers: many votes tie exactly.
    Tied,
    /// As `Peaked`, some keys with a NaN, some with an infinity.
    Wild,
}

/// One sequence: `n` tokens, the last `t` of which are the block; or no tokens, and the queries of padding. All arrays flat,
/// token outermost.
#[derive(Clone, Debug)]
pub struct Row {
    pub n: usize,
    pub t: usize,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
}

#[derive(Clone, Debug)]
pub struct Problem {
    pub config: SelectConfig,
    pub rows: Vec<Row>,
}

impl Problem {
    /// Rows of the lengths `(n, t)`.
    pub fn new(config: &SelectConfig, lengths: &[(usize, usize)], content: Content, seed: u64) -> Self {
        let mut random = Random(seed);
        let rows = lengths.iter().map(|&(n, t)| random_row(config, n, t, content, &mut random)).collect();
        Problem { config: config.clone(), rows }
    }

    pub fn num_query_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.t).sum()
    }

    /// Queries of all rows, `[num_query_tokens, hq, d]`.
    pub fn q(&self) -> Vec<f64> {
        self.rows.iter().flat_map(|row| row.q.iter().copied()).collect()
    }

    /// Keys (or values) of the blocks of all rows, `[num_query_tokens, hkv, d]`. Those of a row without tokens belong nowhere.
    pub fn blocks(&self, of: fn(&Row) -> &Vec<f64>) -> Vec<f64> {
        let width = self.config.heads.num_kv_heads * self.config.heads.head_dim;
        let block = |row: &Row| match row.n {
            0 => vec![-55.0; row.t * width],
            n => of(row)[(n - row.t) * width..].to_vec(),
        };
        self.rows.iter().flat_map(block).collect()
    }

    /// `[rows + 1]`.
    pub fn qo_indptr(&self) -> Vec<u32> {
        let mut end = 0;
        let ends = self.rows.iter().map(|row| {
            end += row.t as u32;
            end
        });
        std::iter::once(0).chain(ends).collect()
    }
}

fn random_row(config: &SelectConfig, n: usize, t: usize, content: Content, random: &mut Random) -> Row {
    let HeadShape { num_qo_heads: hq, num_kv_heads: hkv, head_dim: d } = config.heads;
    let group = hq / hkv;
    // Queries of a block resemble each other, or their mean would vanish.
    let common: Vec<f64> = (0..hq * d).map(|_| random.normal()).collect();
    let mut q: Vec<f64> =
        (0..t * hq * d).map(|i| 0.7 * common[i % (hq * d)] + 0.4 * random.normal()).collect();
    let mut k: Vec<f64> = (0..n * hkv * d).map(|_| random.normal()).collect();
    let v: Vec<f64> = (0..n * hkv * d).map(|_| round(config.dtype, random.normal())).collect();
    for _ in 0..(n / 16).min(64) {
        let (token, head) = (random.below(n), random.below(hq));
        let strength = 0.3 + random.unit();
        for i in 0..d {
            k[(token * hkv + head / group) * d + i] += strength * common[head * d + i];
        }
    }
    if content == Content::Tied {
        let kinds: Vec<f64> = (0..3 * hkv * d).map(|_| random.below(5) as f64 - 2.0).collect();
        for token in 0..n {
            let kind = [0, 0, 0, 1, 1, 2][random.below(6)];
            k[token * hkv * d..][..hkv * d].copy_from_slice(&kinds[kind * hkv * d..][..hkv * d]);
        }
        q.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
    }
    if content == Content::Wild {
        for _ in 0..n.div_ceil(20) {
            let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][random.below(3)];
            k[random.below((n * hkv * d).max(1))] = odd;
        }
    }
    q.iter_mut().chain(&mut k).for_each(|x| *x = round(config.dtype, *x));
    Row { n, t, q, k, v }
}

/// Storage types.
pub fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F16, DType::Bf16, DType::F32])
}

/// Groups 1 to 8 (7 among them), few or many KV heads, every kind of head dimension; at most `max_elements`
/// elements in all query heads, since the reference is slow.
pub fn heads(max_elements: usize) -> impl Strategy<Value = HeadShape> {
    let dims = prop::sample::select(vec![8usize, 24, 64, 80, 128, 256]);
    let fits = move |(kv, group, head_dim): &(usize, usize, usize)| kv * group * head_dim <= max_elements;
    (1usize..=4, 1usize..=8, dims)
        .prop_filter("too large", fits)
        .prop_map(|(kv, group, head_dim)| HeadShape { num_qo_heads: kv * group, num_kv_heads: kv, head_dim })
}

/// Sizes around edges: 0 is not among them unless an edge is 1.
pub fn around(edges: &[usize]) -> impl Strategy<Value = usize> + use<> {
    let near = edges.iter().flat_map(|&edge| [edge - 1, edge, edge + 1]);
    prop::sample::select(near.chain([2, 7, 13, 31, 61]).collect::<Vec<_>>())
}

/// Rotary embeddings of every kind for heads of `head_dim`.
pub fn rope(head_dim: usize) -> impl Strategy<Value = Rope> {
    let scaling = prop_oneof![
        Just(RopeScaling::None),
        (1.5..8.0).prop_map(|factor| RopeScaling::Linear { factor }),
        (2.0..9.0).prop_map(|factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 512.0
        }),
        (2.0..9.0, prop::option::of(0.5..1.5)).prop_map(|(factor, attention_factor)| RopeScaling::Yarn {
            factor,
            original_max_position: 512.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor
        }),
    ];
    let pairing = prop::sample::select(vec![RopePairing::HalfSplit, RopePairing::Interleaved]);
    let theta = prop::sample::select(vec![10_000.0, 500_000.0]);
    let rotary_dim = prop::sample::select(vec![None, Some(2), Some(head_dim / 2), Some(head_dim)]);
    (theta, rotary_dim, pairing, scaling).prop_map(|(theta, rotary_dim, pairing, scaling)| Rope {
        theta,
        rotary_dim,
        pairing,
        scaling,
    })
}

/// Native positions or any rotary embedding.
pub fn positions(head_dim: usize) -> impl Strategy<Value = Positions> {
    prop_oneof![Just(Positions::Native), rope(head_dim).prop_map(Positions::Reassigned)]
}

/// A configuration of every feature; windows small enough that short sequences are really selected from.
pub fn config(max_elements: usize) -> impl Strategy<Value = SelectConfig> {
    (heads(max_elements), dtype()).prop_flat_map(|(heads, dtype)| {
        let windows = (0usize..20, 0usize..40, prop::sample::select(vec![1usize, 2, 7, 16, 33]));
        let pool = prop::sample::select(vec![1usize, 1, 1, 3, 5, 101]);
        let scales = (prop::option::of(0.05f32..0.5), prop::option::of(0.05f32..0.3));
        let soft_cap = prop::option::of(2.0f32..40.0);
        (windows, pool, scales, soft_cap, positions(heads.head_dim)).prop_map(
            move |((n_init, n_local, top_k), pool, (score_scale, sm_scale), soft_cap, positions)| {
                SelectConfig {
                    heads,
                    dtype,
                    n_init,
                    n_local,
                    top_k,
                    score_scale,
                    sm_scale,
                    logits_soft_cap: soft_cap,
                    vote_pool_window: pool,
                    positions,
                    selection_cache: None,
                }
            },
        )
    })
}

/// Up to three rows `(n, t)` with `t <= n <= max`: decoding, blocks, padding, and sequences that are all
/// block.
pub fn lengths(max: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    let n = prop_oneof![Just(0usize), Just(1), around(&[16, 64, 128]), 1..=max];
    let row = (n, prop_oneof![Just(1usize), 0usize..12, Just(usize::MAX)], any::<bool>()).prop_map(
        move |(n, t, short)| {
            let n = n.min(max);
            // A sequence that is all block is slow in the reference.
            let n = if t == usize::MAX && short { n.min(20) } else { n };
            (n, t.min(n).min(20))
        },
    );
    prop::collection::vec(row, 1..=3)
}

pub fn content() -> impl Strategy<Value = Content> {
    prop::sample::select(vec![Content::Peaked, Content::Tied, Content::Wild])
}

/// A configuration with four query heads over two KV heads, f32, small windows: what tests of rules use.
pub fn small_config() -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 16 },
        dtype: DType::F32,
        n_init: 3,
        n_local: 4,
        top_k: 5,
        selection_cache: None,
        ..SelectConfig::default()
    }
}

/// Turns the Selection Cache on.
pub fn cached(config: SelectConfig, similarity_threshold: f32, max_reuse: Option<u32>) -> SelectConfig {
    let selection_cache = Some(SelectionCacheConfig { similarity_threshold, max_reuse });
    SelectConfig { selection_cache, ..config }
}
