//! `vote`: softmax probabilities of the candidates, summed over heads; and `smooth`, their max-pool.

use std::collections::VecDeque;

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use rayon::prelude::*;

use super::{scored, simd, split_parts};
use crate::batch::Batch;
use crate::error::Result;
use crate::plan::Plan;
use crate::workspace::Workspace;

/// Tokens of one task.
const CHUNK: usize = 1024;

pub(super) fn vote(plan: &Plan, batch: &Batch, workspace: &mut Workspace) -> Result<()> {
    let config = plan.config();
    let hq = config.heads.num_qo_heads;
    let logits = workspace.logits.as_slice::<f32>()?;
    let stats = workspace.stats.as_slice::<f32>()?;
    let actions = workspace.actions.as_slice::<u32>()?;
    let scored = || scored(batch, actions);
    let place = |row: usize| {
        let candidates = batch.candidates(row, config);
        (batch.token_base(row) + candidates.start, candidates.len())
    };

    let votes = split_parts(workspace.votes.as_mut_slice::<f32>()?, scored().map(place));
    let rows: Vec<_> = scored().zip(votes).collect();
    rows.into_par_iter().for_each(|(row, votes)| {
        let logits = &logits[place(row).0 * hq..][..votes.len() * hq];
        let stats = &stats[row * hq * 2..][..hq * 2];
        let max: Vec<f32> = stats.iter().copied().step_by(2).collect();
        let inverse: Vec<f32> = stats.iter().skip(1).step_by(2).map(|sum| 1.0 / sum).collect();
        votes
            .par_chunks_mut(CHUNK)
            .zip(logits.par_chunks(CHUNK * hq))
            .for_each(|(votes, logits)| vote_chunk(logits, &max, &inverse, votes));
    });
    Ok(())
}

pub(super) fn smooth(plan: &Plan, batch: &Batch, workspace: &mut Workspace) -> Result<()> {
    let config = plan.config();
    let votes = workspace.votes.as_slice::<f32>()?;
    let actions = workspace.actions.as_slice::<u32>()?;
    let scored = || scored(batch, actions);
    let place = |row: usize| {
        let candidates = batch.candidates(row, config);
        (batch.token_base(row) + candidates.start, candidates.len())
    };
    let pooled = split_parts(workspace.pooled_votes.as_mut_slice::<f32>()?, scored().map(place));
    let rows: Vec<_> = scored().zip(pooled).collect();
    rows.into_par_iter().for_each(|(row, pooled)| {
        max_pool(&votes[place(row).0..][..pooled.len()], config.vote_pool_window, pooled);
    });
    Ok(())
}

/// `votes[j] = sum over heads of exp(logit - max) / sum`, heads in order.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn vote_chunk(logits: &[f32], max: &[f32], inverse: &[f32], votes: &mut [f32]) {
    const FMA: bool = target_cfg_f!(target_feature = "fma");
    let mut shares = vec![0.0; max.len()];
    for (vote, logits) in votes.iter_mut().zip(logits.chunks_exact(max.len())) {
        for (((share, &logit), &max), inverse) in shares.iter_mut().zip(logits).zip(max).zip(inverse) {
            let e = simd::exp::<FMA>(logit - max);
            *share = if logit == max { *inverse } else { e * inverse };
        }
        *vote = shares.iter().sum();
    }
}

/// Largest vote within `window / 2` places, over the numbers; a NaN stays NaN.
fn max_pool(raw: &[f32], window: usize, votes: &mut [f32]) {
    let reach = window / 2;
    let mut falling: VecDeque<usize> = VecDeque::new(); // places with ever smaller votes
    let mut next = 0;
    for (j, vote) in votes.iter_mut().enumerate() {
        while next < raw.len() && next <= j + reach {
            if !raw[next].is_nan() {
                while falling.back().is_some_and(|&last| raw[last] <= raw[next]) {
                    falling.pop_back();
                }
                falling.push_back(next);
            }
            next += 1;
        }
        while falling.front().is_some_and(|&first| first + reach < j) {
            falling.pop_front();
        }
        *vote = match falling.front() {
            Some(&first) if !raw[j].is_nan() => raw[first],
            _ => f32::NAN,
        };
    }
}
