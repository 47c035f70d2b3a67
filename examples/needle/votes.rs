//! Votes of policies that are not the library's, made of what its operations leave in the workspace.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;
use tokenselect::{Batch, Buffer, DType, Element, HeadShape, KvView, TensorView, TokenSelect};

use tokenselect_examples::error::Result;

/// Logits of the candidates: a row for each query head.
pub struct Logits {
    heads: Vec<Vec<f32>>,
}

impl Logits {
    /// What `score` left for the tokens `candidates` of a batch of one row.
    pub fn read(select: &TokenSelect, batch: &Batch, candidates: &Range<usize>) -> Result<Self> {
        let all = elements::<f32>(select.workspace().buffer(Buffer::Logits).view())?;
        let head = |head| {
            let index = |token| Ok(all[select.logit_index(batch, 0, token, head)?]);
            candidates.clone().map(index).collect::<Result<Vec<f32>>>()
        };
        let heads =
            (0..select.config().heads.num_qo_heads).into_par_iter().map(head).collect::<Result<_>>()?;
        Ok(Logits { heads })
    }

    /// The sum over heads.
    pub fn raw_sum(&self) -> Vec<f32> {
        sum_over(&self.heads)
    }

    /// How many heads have a candidate among their `top_k` largest logits.
    pub fn hard_vote(&self, top_k: usize) -> Vec<f32> {
        let ballots: Vec<Vec<f32>> = self.heads.par_iter().map(|logits| ballot(logits, top_k)).collect();
        sum_over(&ballots)
    }

    /// The softmax of each head.
    pub fn probabilities(mut self) -> Vec<Vec<f32>> {
        self.heads.par_iter_mut().for_each(|logits| {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits.iter_mut().for_each(|x| *x = (*x - largest).exp());
            let scale = logits.iter().sum::<f32>().recip();
            logits.iter_mut().for_each(|x| *x *= scale);
        });
        self.heads
    }
}

/// Sum of the rows.
pub fn sum_over(heads: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; heads.first().map_or(0, Vec::len)];
    for head in heads {
        sum.iter_mut().zip(head).for_each(|(sum, x)| *sum += x);
    }
    sum
}

/// 1 for the `top_k` largest, of which equal ones are the first, and 0 for the rest.
fn ballot(logits: &[f32], top_k: usize) -> Vec<f32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let mut ballot = vec![0.0; logits.len()];
    if top_k < order.len() {
        order.select_nth_unstable_by(top_k, |&a, &b| {
            logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
        });
    }
    order.iter().take(top_k).for_each(|&at| ballot[at as usize] = 1.0);
    ballot
}

/// Quest's bound of each candidate's page: `Σ_h Σ_d max(q_d · min k_d, q_d · max k_d)` over the tokens of the page, with the scoring
/// queries that `pool` left.
pub fn quest_bounds(
    select: &TokenSelect,
    batch: &Batch,
    kv: KvView<'_>,
    candidates: &Range<usize>,
) -> Result<Vec<f32>> {
    let queries = elements::<f32>(select.workspace().buffer(Buffer::Queries).view())?;
    let heads = select.config().heads;
    let bounds = match kv.dtype() {
        DType::Bf16 => page_bounds(&elements::<bf16>(kv.k())?, bf16::to_f32, &queries, heads, batch)?,
        DType::F16 => page_bounds(&elements::<f16>(kv.k())?, f16::to_f32, &queries, heads, batch)?,
        _ => page_bounds(&elements::<f32>(kv.k())?, |x| x, &queries, heads, batch)?,
    };
    Ok(candidates.clone().map(|token| bounds[token / batch.page_size()]).collect())
}

/// The bound of every page of the row, whose keys are `[num_pages, page_size, num_kv_heads, head_dim]`.
fn page_bounds<T: Element + Sync>(
    keys: &[T],
    to_f32: impl Fn(T) -> f32 + Sync,
    queries: &[f32],
    heads: HeadShape,
    batch: &Batch,
) -> Result<Vec<f32>> {
    let (row, page_size) = (batch.row(0)?, batch.page_size());
    let width = heads.num_kv_heads * heads.head_dim;
    let bound = |(index, &page): (usize, &u32)| {
        let tokens = page_size.min(row.kv_len - index * page_size);
        let first = page as usize * page_size * width;
        let (mut low, mut high) = (vec![f32::INFINITY; width], vec![f32::NEG_INFINITY; width]);
        for key in keys[first..first + tokens * width].chunks_exact(width) {
            for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(key) {
                let x = to_f32(x);
                (*low, *high) = (low.min(x), high.max(x));
            }
        }
        let of_head = |(head, q): (usize, &[f32])| {
            let at = heads.kv_head_of(head) * heads.head_dim;
            let ends = low[at..].iter().zip(&high[at..]);
            q.iter().zip(ends).map(|(q, (low, high))| (q * low).max(q * high)).sum::<f32>()
        };
        queries.chunks_exact(heads.head_dim).take(heads.num_qo_heads).enumerate().map(of_head).sum()
    };
    Ok(row.pages.par_iter().enumerate().map(bound).collect())
}

/// Elements of a tensor, copied only where they lie on a device.
pub fn elements<T: Element>(tensor: TensorView<'_>) -> Result<Cow<'_, [T]>> {
    match tensor.as_slice::<T>() {
        Ok(slice) => Ok(Cow::Borrowed(slice)),
        Err(_) => Ok(Cow::Owned(tensor.to_vec::<T>()?)),
    }
}
