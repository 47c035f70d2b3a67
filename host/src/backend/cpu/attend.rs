//! `attend`: softmax attention over a list of tokens, or all, with the softmax kept online tile by tile.
//!
//! ```text
//! for each row, KV head, tile of queries, part of the list:          (parallel)
//!     for each tile of KEYS keys:
//!         s   = q k^T            keys widened, and rotated at their ranks
//!         m'  = max(m, max s)    of each query row, over the keys it sees
//!         p   = exp(s - m')
//!         acc = acc exp(m - m') + p v
//! merge the parts, divide by the sums, write out and lse
//! ```
//! Only decoding-sized tiles are cut into parts of the list, so that a single query keeps all cores busy.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use rayon::prelude::*;

use super::float::Float;
use super::simd::{self, Matrix};
use super::{Merged, merge_one, write_lse};
use crate::backend::{AttendArgs, Selection};
use crate::batch::Batch;
use crate::config::{MAX_HEAD_DIM, SelectConfig};
use crate::error::Result;
use crate::kv::KvView;
use crate::plan::Plan;
use crate::rope::RopeTable;
use crate::tensor::Heads;
use crate::workspace::Workspace;

/// Keys of a tile: with 128 query rows the logits take 32 KiB.
const KEYS: usize = 64;
/// Query rows (tokens times group) of a tile: widening and rotating a key is shared by this many.
const QUERY_ROWS: usize = 128;
/// Up to this many query rows, dot products along the head cost less than a transposed tile of keys.
const FEW_ROWS: usize = 8;
/// Tokens of one part of a list.
const PART: usize = 4096;

pub(super) fn attend<T: Float, O: Float>(
    plan: &Plan,
    batch: &Batch,
    workspace: &Workspace,
    args: AttendArgs<'_>,
) -> Result<()> {
    let config = plan.config();
    let (hq, hkv, d) = (config.heads.num_qo_heads, config.heads.num_kv_heads, config.heads.head_dim);
    let group = hq / hkv;
    let shared = Shared {
        config,
        rope: workspace.angles.as_ref(),
        batch,
        keys: args.kv.k.as_slice::<T>()?,
        values: args.kv.v.as_slice::<T>()?,
        kv: args.kv,
        q: args.q.as_heads::<T>()?,
        lists: match &args.lists {
            Some(lists) => Some(Lists::new(lists)?),
            None => None,
        },
    };

    let tile_tokens = (QUERY_ROWS / group).max(1);
    let mut tiles = Vec::new();
    for row in 0..batch.num_rows() {
        let (block, list_len) = (batch.block_len(row), shared.list_len(row));
        for first in (0..block).step_by(tile_tokens) {
            let tokens = tile_tokens.min(block - first);
            let few = tokens * group <= FEW_ROWS;
            let part = if few { PART } else { list_len.max(1) };
            for kv_head in 0..hkv {
                tiles.push(Tile { row, kv_head, first, tokens, part, num_parts: list_len.div_ceil(part) });
            }
        }
    }
    let tasks: Vec<_> = tiles.iter().flat_map(|tile| (0..tile.num_parts).map(move |i| (tile, i))).collect();
    let parts: Vec<Part> = tasks
        .par_iter()
        .map(|(tile, i)| {
            let begin = i * tile.part;
            attend_part(&shared, tile, begin..(begin + tile.part).min(shared.list_len(tile.row)))
        })
        .collect();

    let mut lses = vec![f32::NEG_INFINITY; batch.num_query_tokens() * hq];
    let out = args.out.into_slice::<O>()?;
    let mut sum = vec![0.0; d];
    let mut parts = parts.as_slice();
    for tile in &tiles {
        let (mine, rest) = parts.split_at(tile.num_parts);
        parts = rest;
        let token0 = batch.query_range(tile.row).start + tile.first;
        for i in 0..tile.tokens * group {
            let at = (token0 + i / group) * hq + tile.kv_head * group + i % group;
            lses[at] = merge_one(mine.iter().map(|part| part.row(i, d)), &mut sum);
            O::narrow(&sum, &mut out[at * d..][..d]);
        }
    }
    write_lse(args.lse, &lses)
}

/// What all tasks share.
struct Shared<'a, T> {
    config: &'a SelectConfig,
    rope: Option<&'a RopeTable>,
    batch: &'a Batch,
    keys: &'a [T],
    values: &'a [T],
    kv: KvView<'a>,
    q: Heads<'a, T>,
    lists: Option<Lists<'a>>,
}

/// The lists to attend to.
struct Lists<'a> {
    width: usize,
    tokens: &'a [u32],
    len: &'a [u32],
    ranks: Option<(&'a [u32], &'a [u32])>,
}

impl<'a> Lists<'a> {
    fn new(selection: &Selection<'a>) -> Result<Self> {
        Ok(Lists {
            width: selection.tokens.shape().dims()[1],
            tokens: selection.tokens.as_slice()?,
            len: selection.len.as_slice()?,
            ranks: match &selection.ranks {
                Some(ranks) => Some((ranks.ranks.as_slice()?, ranks.total_len.as_slice()?)),
                None => None,
            },
        })
    }
}

impl<T> Shared<'_, T> {
    /// Tokens of the list that is at hand.
    fn list_len(&self, row: usize) -> usize {
        self.lists.as_ref().map_or_else(|| self.batch.kv_len(row), |lists| lists.len[row] as usize)
    }

    /// `m`: tokens of the whole list.
    fn total_len(&self, row: usize) -> usize {
        match self.lists.as_ref().and_then(|lists| lists.ranks) {
            Some((_, total)) => total[row] as usize,
            None => self.list_len(row),
        }
    }

    fn token(&self, row: usize, place: usize) -> usize {
        self.lists.as_ref().map_or(place, |lists| lists.tokens[row * lists.width + place] as usize)
    }

    fn rank(&self, row: usize, place: usize) -> usize {
        let ranks = self.lists.as_ref().and_then(|lists| Some((lists.width, lists.ranks?.0)));
        ranks.map_or(place, |(width, ranks)| ranks[row * width + place] as usize)
    }

    /// Leading tokens of the list that query `t` of the block sees: those of rank up to `m - T + t`.
    fn visible(&self, row: usize, t: usize) -> usize {
        let below = self.total_len(row) + t + 1 - self.batch.block_len(row);
        let len = self.list_len(row);
        match self.lists.as_ref().and_then(|lists| Some((lists.width, lists.ranks?.0))) {
            None => below.min(len),
            Some((width, ranks)) => ranks[row * width..][..len].partition_point(|&r| (r as usize) < below),
        }
    }
}

/// Queries that one task handles: `tokens` of a row's block from `first` on, the group of one KV head.
struct Tile {
    row: usize,
    kv_head: usize,
    first: usize,
    tokens: usize,
    /// Tokens of a part of the list.
    part: usize,
    num_parts: usize,
}

/// Attention of a tile over one part of the list.
struct Part {
    /// `[tokens * group, head_dim]`, normalised.
    out: Vec<f32>,
    /// `[tokens * group]`.
    lse: Vec<f32>,
    /// `[tokens * group]`: sum of `exp(logit - largest logit)`.
    sum: Vec<f32>,
}

impl Part {
    fn row(&self, i: usize, d: usize) -> Merged<'_> {
        Merged { out: &self.out[i * d..][..d], lse: self.lse[i], count: self.sum[i] }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn attend_part<T: Float>(shared: &Shared<'_, T>, tile: &Tile, places: std::ops::Range<usize>) -> Part {
    const FMA: bool = target_cfg_f!(target_feature = "fma");
    const WIDE: usize = if target_cfg_f!(target_feature = "avx512f") { 32 } else { 16 };
    let d = shared.config.heads.head_dim;
    let group = shared.config.heads.group();
    let rows = tile.tokens * group;
    let few = rows <= FEW_ROWS;
    let queries = load_queries(shared, tile);
    let visible: Vec<usize> =
        (0..tile.tokens).map(|t| shared.visible(tile.row, tile.first + t).min(places.end)).collect();
    let end = visible.last().copied().unwrap_or(0);

    let mut out = vec![0.0; rows * d];
    let mut max = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0.0; rows];
    let mut logits = vec![0.0; rows * KEYS];
    let mut keys = vec![0.0; KEYS * d]; // [d, KEYS], or [KEYS, d] for few rows
    let mut values = vec![0.0; KEYS * d];
    let mut begin = places.start;
    while begin < end {
        let count = KEYS.min(end - begin);
        load_tile(shared, tile, begin, count, !few, &mut keys, &mut values);
        if few {
            for (j, key) in keys.chunks_exact(d).take(count).enumerate() {
                let mut column = [0.0; FEW_ROWS];
                simd::dot_rows::<FMA>(key, &queries, 1.0, &mut column[..rows]);
                for (i, logit) in column[..rows].iter().enumerate() {
                    logits[i * KEYS + j] = *logit;
                }
            }
        } else {
            logits.fill(0.0);
            let (a, b) = (Matrix { data: &queries, stride: d }, Matrix { data: &keys, stride: KEYS });
            simd::gemm::<WIDE, FMA>((rows, d, KEYS), a, b, &mut logits, KEYS);
        }
        if let Some(cap) = shared.config.logits_soft_cap {
            for logit in &mut logits {
                *logit = cap * (*logit / cap).tanh();
            }
        }
        let seen = |i: usize| visible[i / group].saturating_sub(begin).min(count);
        for i in 0..rows {
            let row = &mut logits[i * KEYS..][..KEYS];
            row[seen(i)..].fill(f32::NEG_INFINITY);
            fold_softmax::<FMA>(row, &mut max[i], &mut sum[i], &mut out[i * d..][..d]);
        }
        // Rows that see different numbers of keys go one by one: an unseen value must not be read.
        let mut i = 0;
        while i < rows {
            let same = (i..rows).take_while(|&other| seen(other) == seen(i)).count();
            let a = Matrix { data: &logits[i * KEYS..], stride: KEYS };
            let b = Matrix { data: &values, stride: d };
            simd::gemm::<WIDE, FMA>((same, seen(i), d), a, b, &mut out[i * d..], d);
            i += same;
        }
        begin += count;
    }

    let mut lse = vec![f32::NEG_INFINITY; rows];
    for i in 0..rows {
        if sum[i] != 0.0 {
            let largest = if max[i] == LARGEST { f32::INFINITY } else { max[i] };
            lse[i] = largest + sum[i].ln();
            let inverse = 1.0 / sum[i];
            out[i * d..][..d].iter_mut().for_each(|x| *x *= inverse);
        }
    }
    Part { out, lse, sum }
}

/// What a logit of +inf counts as: its differences are numbers, so that tokens that reach it weigh 1 each, and others nothing.
const LARGEST: f32 = f32::MAX;

/// Turns a row of logits into `exp(logit - max)`, with the maximum and sum so far brought up to date and the
/// accumulator rescaled. NaN passes into the sum; -inf counts nothing, +inf as [`LARGEST`].
#[inline(always)]
fn fold_softmax<const FMA: bool>(row: &mut [f32], max: &mut f32, sum: &mut f32, out: &mut [f32]) {
    let mut new_max = simd::max(row).max(*max);
    if new_max == f32::INFINITY {
        row.iter_mut().filter(|logit| **logit == f32::INFINITY).for_each(|logit| *logit = LARGEST);
        new_max = LARGEST;
    }
    if new_max != *max {
        let factor = simd::exp::<FMA>(*max - new_max);
        *sum *= factor;
        out.iter_mut().for_each(|x| *x *= factor);
        *max = new_max;
    }
    let finite = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
    *sum += simd::exp_sum::<FMA>(row, finite);
}

/// The tile's queries, `[tokens * group, head_dim]`, rotated and scaled.
#[inline(always)]
fn load_queries<T: Float>(shared: &Shared<'_, T>, tile: &Tile) -> Vec<f32> {
    let heads = shared.config.heads;
    let (d, group) = (heads.head_dim, heads.group());
    let scale = shared.config.sm_scale();
    let pairs = shared.rope.map_or(0, RopeTable::pairs);
    let (mut cos, mut sin) = ([0.0; MAX_HEAD_DIM / 2], [0.0; MAX_HEAD_DIM / 2]);
    let mut queries = vec![0.0; tile.tokens * group * d];
    let token0 = shared.batch.query_range(tile.row).start + tile.first;
    for (t, token) in queries.chunks_exact_mut(group * d).enumerate() {
        for (member, head) in token.chunks_exact_mut(d).enumerate() {
            T::widen(shared.q.at(token0 + t, tile.kv_head * group + member), head);
        }
        if let Some(rope) = shared.rope {
            let before_block = shared.total_len(tile.row) - shared.batch.block_len(tile.row);
            rope.fill(before_block + tile.first + t, &mut cos[..pairs], &mut sin[..pairs]);
            for head in token.chunks_exact_mut(d) {
                rope.apply(head, &cos[..pairs], &sin[..pairs]);
            }
        }
        token.iter_mut().for_each(|x| *x *= scale);
    }
    queries
}

/// Gathers `count` tokens of the list from place `begin` on: keys rotated at their ranks, transposed to
/// `[head_dim, KEYS]` or as they are, and values.
#[inline(always)]
fn load_tile<T: Float>(
    shared: &Shared<'_, T>,
    tile: &Tile,
    begin: usize,
    count: usize,
    transpose: bool,
    keys: &mut [f32],
    values: &mut [f32],
) {
    let d = shared.config.heads.head_dim;
    let pairs = shared.rope.map_or(0, RopeTable::pairs);
    let (mut cos, mut sin) = ([0.0; MAX_HEAD_DIM / 2], [0.0; MAX_HEAD_DIM / 2]);
    let mut key = [0.0; MAX_HEAD_DIM];
    let key = &mut key[..d];
    for (j, value) in values.chunks_exact_mut(d).take(count).enumerate() {
        let token = shared.token(tile.row, begin + j);
        let (page, token_in_page) = shared.batch.locate(tile.row, token);
        let at = shared.kv.v_strides.offset(page, token_in_page, tile.kv_head);
        T::widen(&shared.values[at..at + d], value);
        let at = shared.kv.k_strides.offset(page, token_in_page, tile.kv_head);
        T::widen(&shared.keys[at..at + d], key);
        if let Some(rope) = shared.rope {
            rope.fill(shared.rank(tile.row, begin + j), &mut cos[..pairs], &mut sin[..pairs]);
            rope.apply(key, &cos[..pairs], &sin[..pairs]);
        }
        if transpose {
            for (column, x) in keys.chunks_exact_mut(KEYS).zip(key.iter()) {
                column[j] = *x;
            }
        } else {
            keys[j * d..][..d].copy_from_slice(key);
        }
    }
}
