//! A cache of more than 2^32 elements, past the reach of any 32-bit offset: what lies at its far end is selected and
//! attended to like anything else.
//!
//! Contents are known by construction, so that the host never holds them: `period` ordinary tokens, over and over, one of
//! which (the favourite) resembles the queries a little, and a few planted ones that resemble them much. The planted
//! tokens must all be chosen, then the first favourites, which have the same votes. Values of planted tokens are unit
//! vectors of their own: each shows in an element of the output.

mod common;

use std::ops::Range;

use common::{
    announce, assert_close, assert_lse, gpu_tolerance, is_short_run, naive, naive_config, on_devices, tensor,
    to_device, values,
};
use half::bf16;
use tokenselect::{
    Batch, CacheConfig, DType, Device, Error, HeadShape, Limits, Over, PagedKvCache, Positions, SelectConfig,
    SequenceId, StepInput, StepOutput, Tensor, TokenSelect,
};

on_devices! {
    all: planted_tokens_are_found;
    cuda: more_elements_than_32_bits_count;
}

const PAGE_SIZE: usize = 16;
/// Of the ordinary tokens, the one that resembles the queries.
const FAVOURITE: usize = 3;
/// A block so long that the prefill kernel attends: more than 64 query rows of a KV head.
const BLOCK: usize = 17;

struct Contents {
    config: SelectConfig,
    /// Tokens before the first decode step: a multiple of `chunk`.
    filled: usize,
    /// Tokens appended at once: a multiple of `period`.
    chunk: usize,
    /// Ordinary tokens that differ.
    period: usize,
    /// Ascending; as many as a head has elements at most.
    planted: Vec<usize>,
}

/// Six bits that depend on all arguments.
fn hash(token: usize, element: usize, seed: u32) -> u32 {
    let x = (token as u32).wrapping_mul(0x9E37_79B9) ^ (element as u32).wrapping_mul(0x85EB_CA6B) ^ seed;
    let x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
    let x = (x ^ (x >> 12)).wrapping_mul(0x297A_2D39);
    x >> 26
}

/// What the queries of a KV head's group and the keys that they look for have in common: 1 or -1.
fn direction(element: usize) -> f64 {
    if hash(0, element, 77) < 32 { 1.0 } else { -1.0 }
}

impl Contents {
    fn new(config: SelectConfig, filled: usize, chunk: usize, period: usize, num_planted: usize) -> Self {
        let candidates = config.n_init..filled - config.n_local;
        // Where 32-bit offsets in bytes and elements, signed and unsigned, would wrap around.
        let width = config.heads.num_kv_heads * config.heads.head_dim;
        let cuts = [30, 31, 32].map(|log2| (1 << log2) / width);
        let around = cuts.into_iter().flat_map(|cut| cut - 1..=cut + 1);
        let ends = [candidates.start, candidates.start + 1, candidates.end - 2, candidates.end - 1];
        let mut planted: Vec<usize> = around.chain(ends).filter(|token| candidates.contains(token)).collect();
        let rest = num_planted - planted.len();
        planted.extend((1..=rest).map(|i| candidates.start + i * (candidates.len() / (rest + 1))));
        planted.sort_unstable();
        planted.dedup();
        assert_eq!(planted.len(), num_planted);
        assert!(filled.is_multiple_of(chunk) && chunk.is_multiple_of(period));
        assert!(num_planted <= config.heads.head_dim);
        Contents { config, filled, chunk, period, planted }
    }

    /// Elements of the keys (and of the values) of a token.
    fn width(&self) -> usize {
        self.config.heads.num_kv_heads * self.config.heads.head_dim
    }

    /// Key of an ordinary token, `[num_kv_heads, head_dim]`.
    fn ordinary_key(&self, token: usize) -> Vec<f64> {
        let kind = token % self.period;
        let element = |i: usize| match kind {
            FAVOURITE => direction(i) / 4.0,
            _ => f64::from(hash(kind, i, 1) % 17) / 16.0 - 0.5,
        };
        (0..self.width()).map(element).collect()
    }

    /// Value of an ordinary token: small, so that those of planted tokens stand out.
    fn ordinary_value(&self, token: usize) -> Vec<f64> {
        let element = |i: usize| (f64::from(hash(token % self.period, i, 2) % 17) - 8.0) / 512.0;
        (0..self.width()).map(element).collect()
    }

    fn planted_key(&self, place: usize) -> Vec<f64> {
        let strength = 1.0 + (place % 8) as f64 / 64.0;
        (0..self.width()).map(|i| strength * direction(i)).collect()
    }

    /// In every KV head, 1 in an element of its own.
    fn planted_value(&self, place: usize) -> Vec<f64> {
        let d = self.config.heads.head_dim;
        let element = |i: usize| if i % d == (place + 5 * (i / d)) % d { 1.0 } else { 0.0 };
        (0..self.width()).map(element).collect()
    }

    fn key(&self, token: usize) -> Vec<f64> {
        let ordinary = |_| self.ordinary_key(token);
        self.planted.binary_search(&token).map_or_else(ordinary, |place| self.planted_key(place))
    }

    fn value(&self, token: usize) -> Vec<f64> {
        let ordinary = |_| self.ordinary_value(token);
        self.planted.binary_search(&token).map_or_else(ordinary, |place| self.planted_value(place))
    }

    /// `[block, num_qo_heads, head_dim]`: a group looks in one direction, with a strength for each of its heads.
    fn queries(&self, block: usize) -> Vec<f64> {
        let HeadShape { num_qo_heads: hq, head_dim: d, .. } = self.config.heads;
        let group = hq / self.config.heads.num_kv_heads;
        let element = |i: usize| {
            let (head, i) = (i / d % hq, i % d);
            (0.75 + (head % group) as f64 / 4.0) * direction(head / group * d + i)
        };
        (0..block * hq * d).map(element).collect()
    }

    /// The list that a step of `block` tokens must select when the cache holds `n`, the block included.
    fn selected(&self, n: usize, block: usize) -> Vec<usize> {
        let config = &self.config;
        let candidates = config.n_init..n - block - config.n_local;
        let first = candidates.start.next_multiple_of(self.period) + FAVOURITE;
        let before = first - self.period;
        let favourites = [before].into_iter().filter(|token| candidates.contains(token));
        let favourites = favourites.chain((first..candidates.end).step_by(self.period));
        let favourites = favourites.filter(|token| self.planted.binary_search(token).is_err());
        let mut chosen = self.planted.clone();
        chosen.extend(favourites.take(config.top_k - self.planted.len()));
        assert_eq!(chosen.len(), config.top_k, "enough favourites");
        chosen.sort_unstable();
        (0..candidates.start).chain(chosen).chain(candidates.end..n).collect()
    }

    /// Fills a cache by appending; only chunks with planted tokens come from the host.
    fn fill(&self, select: &TokenSelect, cache: &mut PagedKvCache, id: SequenceId) {
        let repeated = |row: &dyn Fn(usize) -> Vec<f64>| -> Vec<bf16> {
            let one: Vec<bf16> = (0..self.period).flat_map(row).map(|x| bf16::from_f32(x as f32)).collect();
            one.repeat(self.chunk / self.period)
        };
        let heads = self.config.heads;
        let shape = [self.chunk, heads.num_kv_heads, heads.head_dim];
        let on_device = |data: &[bf16]| Tensor::from_slice_on(select.device(), data, shape).unwrap();
        let k = repeated(&|token| self.ordinary_key(token));
        let v = repeated(&|token| self.ordinary_value(token));
        let ordinary = (on_device(&k), on_device(&v));
        for start in (0..self.filled).step_by(self.chunk) {
            let batch = cache.extend(&[(id, self.chunk)]).unwrap();
            let patched = self.patched(start..start + self.chunk, &k, &v);
            let patched = patched.map(|(k, v)| (on_device(&k), on_device(&v)));
            let (k, v) = patched.as_ref().unwrap_or(&ordinary);
            select.append(&batch, cache.layer_mut(0).unwrap().kv, k.view(), v.view()).unwrap();
        }
    }

    /// A chunk with its planted tokens, where it has any.
    fn patched(&self, chunk: Range<usize>, k: &[bf16], v: &[bf16]) -> Option<(Vec<bf16>, Vec<bf16>)> {
        let planted: Vec<usize> = self.planted.iter().copied().filter(|t| chunk.contains(t)).collect();
        if planted.is_empty() {
            return None;
        }
        let (mut k, mut v) = (k.to_vec(), v.to_vec());
        for token in planted {
            let at = (token - chunk.start) * self.width();
            for (to, from) in [(&mut k, self.key(token)), (&mut v, self.value(token))] {
                to[at..][..from.len()]
                    .copy_from_slice(&from.iter().map(|&x| bf16::from_f32(x as f32)).collect::<Vec<_>>());
            }
        }
        Some((k, v))
    }

    /// Dense attention of one query token to `n` tokens, in f64, a term for each kind of token.
    fn attend_dense(&self, n: usize) -> (Vec<f64>, Vec<f64>) {
        let config = naive_config(&self.config);
        let q = self.queries(1);
        let planted_of =
            |kind: usize| self.planted.iter().filter(|&token| token % self.period == kind).count();
        let ordinary = (0..self.period).map(|kind| {
            let count = (n - kind).div_ceil(self.period) - planted_of(kind);
            (count as f64, self.ordinary_key(kind), self.ordinary_value(kind))
        });
        let planted =
            (0..self.planted.len()).map(|place| (1.0, self.planted_key(place), self.planted_value(place)));
        let kinds: Vec<(f64, Vec<f64>, Vec<f64>)> = ordinary.chain(planted).collect();
        assert_eq!(kinds.iter().map(|kind| kind.0).sum::<f64>(), n as f64);
        let (mut out, mut lse) = (vec![0.0; q.len()], Vec::new());
        for head in 0..config.hq {
            let at = head / (config.hq / config.hkv) * config.d..;
            let query = &q[head * config.d..][..config.d];
            let weight = |(count, k, _): &(f64, Vec<f64>, Vec<f64>)| {
                let dot: f64 = query.iter().zip(&k[at.clone()]).map(|(q, k)| q * k).sum();
                count * (dot * config.sm_scale).exp()
            };
            let weights: Vec<f64> = kinds.iter().map(weight).collect();
            let sum: f64 = weights.iter().sum();
            for (weight, (_, _, v)) in weights.iter().zip(&kinds) {
                let out = &mut out[head * config.d..][..config.d];
                out.iter_mut().zip(&v[at.clone()]).for_each(|(out, v)| *out += weight / sum * v);
            }
            lse.push(sum.ln());
        }
        (out, lse)
    }

    /// One decode step, dense attention, and a step of a block.
    fn check(&self, device: &Device) {
        let num_pages = self.filled / PAGE_SIZE + (1 + BLOCK).div_ceil(PAGE_SIZE);
        let cache_config =
            CacheConfig { num_pages, page_size: PAGE_SIZE, max_sequences: 1, ..CacheConfig::default() };
        let mut cache = match PagedKvCache::new(device, &self.config, &cache_config) {
            Err(Error::Driver { reason, .. }) if reason.contains("OUT_OF_MEMORY") => {
                return announce(&format!("SKIPPED: {} is too small: {reason}", device.name()));
            }
            cache => cache.unwrap(),
        };
        let limits = Limits {
            max_rows: 1,
            max_block_len: self.chunk.max(BLOCK),
            max_kv_tokens: num_pages * PAGE_SIZE,
        };
        let mut select = TokenSelect::new(device, self.config.clone(), limits).unwrap();
        let id = cache.create().unwrap();
        self.fill(&select, &mut cache, id);
        for block in [1, BLOCK] {
            self.check_step(&mut select, &mut cache, id, block);
        }
    }

    fn check_step(&self, select: &mut TokenSelect, cache: &mut PagedKvCache, id: SequenceId, block: usize) {
        let batch = cache.extend(&[(id, block)]).unwrap();
        let (config, device) = (naive_config(&self.config), select.device().clone());
        let n = batch.row(0).unwrap().kv_len;
        let rows = |row: &dyn Fn(usize) -> Vec<f64>, tokens: &[usize]| -> Vec<f64> {
            tokens.iter().flat_map(|&token| row(token)).collect()
        };
        let new: Vec<usize> = (n - block..n).collect();
        let put = |data: &[f64], num_heads| {
            to_device(&device, &tensor(DType::Bf16, data, [block, num_heads, config.d]))
        };
        let q = put(&self.queries(block), config.hq);
        let k = put(&rows(&|token| self.key(token), &new), config.hkv);
        let v = put(&rows(&|token| self.value(token), &new), config.hkv);
        let mut out = Tensor::zeros_on(&device, DType::F32, q.shape()).unwrap();
        let mut lse = Tensor::zeros_on(&device, DType::F32, [block, config.hq]).unwrap();
        let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        select.step(cache, 0, &batch, input, output).unwrap();

        let what = format!("{}, block of {block} at {n}", device.name());
        let list = select.workspace().selected(0).unwrap();
        let want: Vec<u32> = self.selected(n, block).iter().map(|&token| token as u32).collect();
        assert!(list == want, "{what}: the list");
        let list: Vec<usize> = list.iter().map(|&token| token as usize).collect();
        let (k, v) = (rows(&|token| self.key(token), &list), rows(&|token| self.value(token), &list));
        let places: Vec<usize> = (0..list.len()).collect();
        let want = naive::attend(&config, &self.queries(block), &k, &v, &naive::ranked(&places), list.len());
        self.assert_attended(&what, (&out, &lse), want);
        if block == 1 {
            self.check_dense(select, cache, &batch, &q);
        }
    }

    fn check_dense(&self, select: &TokenSelect, cache: &PagedKvCache, batch: &Batch, q: &Tensor) {
        let device = select.device();
        let mut out = Tensor::zeros_on(device, DType::F32, q.shape()).unwrap();
        let mut lse = Tensor::zeros_on(device, DType::F32, [1, self.config.heads.num_qo_heads]).unwrap();
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        select.attend(batch, cache.layer(0).unwrap(), q.view(), Over::All, output).unwrap();
        let what = format!("{}, dense", device.name());
        self.assert_attended(&what, (&out, &lse), self.attend_dense(batch.row(0).unwrap().kv_len));
    }

    fn assert_attended(&self, what: &str, (out, lse): (&Tensor, &Tensor), want: (Vec<f64>, Vec<f64>)) {
        let tolerance = gpu_tolerance(DType::Bf16);
        assert_close(what, &values(out), &want.0, self.config.heads.head_dim, tolerance);
        assert_lse(what, &values(lse), &want.1, tolerance);
    }
}

fn config(heads: HeadShape, n_init: usize, top_k: usize, n_local: usize) -> SelectConfig {
    SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_init,
        top_k,
        n_local,
        positions: Positions::Native,
        selection_cache: None,
        ..SelectConfig::default()
    }
}

/// The same contents in small, on every device.
fn planted_tokens_are_found(device: &Device) {
    let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let contents = Contents::new(config(heads, 5, 40, 9), 1280, 64, 32, 24);
    contents.check(device);
}

/// 4.3 M tokens: 2^32 elements are passed by 131072 tokens. 18 GB of keys and values.
fn more_than_32_bits_count() -> Contents {
    let heads = HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let chunk = 1 << 14;
    Contents::new(config(heads, 128, 2048, 512), 264 * chunk, chunk, 1 << 10, 64)
}

#[test]
fn planted_tokens_lie_behind_2_to_the_32_elements() {
    let contents = more_than_32_bits_count();
    let last = *contents.planted.last().unwrap();
    assert!(last * contents.width() > u32::MAX as usize, "token {last}");
    assert_eq!(contents.selected(contents.filled + 1, 1).len(), 128 + 2048 + 512 + 1);
}

fn more_elements_than_32_bits_count(device: &Device) {
    if is_short_run() {
        return announce("SKIPPED: a cache of 2^32 elements, in a run of few cases");
    }
    more_than_32_bits_count().check(device);
}
