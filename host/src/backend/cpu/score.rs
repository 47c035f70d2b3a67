//! `score`: scaled dot products of scoring queries with candidate keys, and softmax statistics.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use rayon::prelude::*;

use super::float::Float;
use super::{scored, simd, split_parts};
use crate::batch::Batch;
use crate::config::{HeadShape, MAX_HEAD_DIM};
use crate::error::Result;
use crate::kv::KvView;
use crate::plan::Plan;
use crate::workspace::{RowAction, Workspace};

/// Tokens of one task: some 100 µs of work, and few enough partial statistics.
const CHUNK: usize = 512;

pub(super) fn score<T: Float>(
    plan: &Plan,
    batch: &Batch,
    workspace: &mut Workspace,
    kv: KvView<'_>,
) -> Result<()> {
    let config = plan.config();
    let heads = config.heads;
    let (hq, d) = (heads.num_qo_heads, heads.head_dim);
    let queries = workspace.queries.as_slice::<f32>()?;
    let keys = kv.k.as_slice::<T>()?;
    let actions = workspace.actions.as_slice::<u32>()?;
    let scored = || scored(batch, actions);
    let parts = scored().map(|row| {
        let candidates = batch.candidates(row, config);
        ((batch.token_base(row) + candidates.start) * hq, candidates.len() * hq)
    });
    let logits = split_parts(workspace.logits.as_mut_slice::<f32>()?, parts);
    let all_stats = workspace.stats.as_mut_slice::<f32>()?;
    if batch.is_partial() {
        // A rank without candidates takes part in the other ranks' reduction: it has nothing to add.
        for row in (0..batch.num_rows()).filter(|&row| actions[row] == RowAction::Complete as u32) {
            for entry in all_stats[row * hq * 2..][..hq * 2].chunks_exact_mut(2) {
                (entry[0], entry[1]) = (f32::NEG_INFINITY, 0.0);
            }
        }
    }
    let stats = split_parts(all_stats, scored().map(|row| (row * hq * 2, hq * 2)));

    let rows: Vec<_> = scored().zip(logits).zip(stats).collect();
    rows.into_par_iter().for_each(|((row, logits), stats)| {
        let first = batch.candidates(row, config).start;
        let task = Task {
            keys,
            kv: &kv,
            batch,
            row,
            heads,
            queries: &queries[row * hq * d..][..hq * d],
            scale: config.score_scale(),
        };
        let partial: Vec<Vec<f32>> = logits
            .par_chunks_mut(CHUNK * hq)
            .enumerate()
            .map(|(i, logits)| {
                let mut stats = vec![0.0; 2 * hq];
                score_chunk(&task, first + i * CHUNK, logits, &mut stats);
                stats
            })
            .collect();
        combine(&partial, stats);
    });
    Ok(())
}

/// What all chunks of a row share.
struct Task<'a, T> {
    keys: &'a [T],
    kv: &'a KvView<'a>,
    batch: &'a Batch,
    row: usize,
    heads: HeadShape,
    /// `[num_qo_heads, head_dim]`.
    queries: &'a [f32],
    scale: f32,
}

/// Logits (`[tokens, num_qo_heads]`) of the tokens from `first` on, and their statistics.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn score_chunk<T: Float>(task: &Task<'_, T>, first: usize, logits: &mut [f32], stats: &mut [f32]) {
    const FMA: bool = target_cfg_f!(target_feature = "fma");
    let HeadShape { num_qo_heads, num_kv_heads, head_dim } = task.heads;
    let group = num_qo_heads / num_kv_heads;
    let mut key = [0.0; MAX_HEAD_DIM];
    let key = &mut key[..head_dim];
    for (i, logits) in logits.chunks_exact_mut(num_qo_heads).enumerate() {
        let (page, token_in_page) = task.batch.locate(task.row, first + i);
        let heads = logits.chunks_exact_mut(group).zip(task.queries.chunks_exact(group * head_dim));
        for (kv_head, (logits, queries)) in heads.enumerate() {
            let at = task.kv.k_strides.offset(page, token_in_page, kv_head);
            T::widen(&task.keys[at..at + head_dim], key);
            simd::dot_rows::<FMA>(key, queries, task.scale, logits);
        }
    }
    let (max, sum) = stats.split_at_mut(num_qo_heads);
    max.fill(f32::NEG_INFINITY);
    for logits in logits.chunks_exact(num_qo_heads) {
        for (max, &logit) in max.iter_mut().zip(logits) {
            *max = if logit > *max { logit } else { *max };
        }
    }
    for logits in logits.chunks_exact(num_qo_heads) {
        for ((sum, &max), &logit) in sum.iter_mut().zip(max.iter()).zip(logits) {
            *sum += term::<FMA>(logit, max);
        }
    }
}

/// `exp(logit - max)` as it counts in a sum over candidates: NaN as absent, an infinite maximum as the limit
/// of a large one.
#[inline(always)]
fn term<const FMA: bool>(logit: f32, max: f32) -> f32 {
    let e = simd::exp::<FMA>(logit - max);
    let e = if e.is_nan() { 0.0 } else { e };
    if logit == max { 1.0 } else { e }
}

/// Folds the chunks' `[max of every head, sum of every head]`, in order, into `[head, (max, sum)]`.
fn combine(partial: &[Vec<f32>], stats: &mut [f32]) {
    let hq = stats.len() / 2;
    for (head, stats) in stats.chunks_exact_mut(2).enumerate() {
        let max = partial.iter().map(|p| p[head]).fold(f32::NEG_INFINITY, f32::max);
        let sum = partial.iter().map(|p| p[hq + head] * term::<false>(p[head], max)).sum();
        (stats[0], stats[1]) = (max, sum);
    }
}
