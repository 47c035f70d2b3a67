//! One layer of one step under each policy, on top of the library's operations.

use std::ops::Range;

use tokenselect::{
    Batch, Buffer, KvLayout, KvView, Over, PagedKvCache, StepInput, StepOutput, TensorView, TokenSelect,
};
use tokenselect_examples::error::Result;

use crate::policy::Policy;
use crate::votes::{Logits, elements, quest_bounds, sum_over};

/// Votes of one layer's candidates, and the tokens that these are.
pub struct Votes {
    /// The tokens.
    pub candidates: Range<usize>,
    /// A vote for each.
    pub votes: Vec<f32>,
}

/// Appends the block's keys and values, selects by `policy` and attends. Returns the votes where the policy had some to make.
///
/// This is `TokenSelect::step` taken apart: a policy of one's own puts its votes between `pool` and `top_k`.
pub fn step(
    policy: Policy,
    select: &mut TokenSelect,
    cache: &mut PagedKvCache,
    layer: usize,
    batch: &Batch,
    input: StepInput<'_>,
    output: StepOutput<'_>,
) -> Result<Option<Votes>> {
    select.append(batch, cache.layer_mut(layer)?.kv, input.k, input.v)?;
    let kv = cache.layer(layer)?;
    if policy == Policy::Windows {
        choose_windows(select, batch)?;
        select.attend(batch, kv, input.q, Over::Selected, output)?;
        return Ok(None);
    }
    let candidates = batch.row(0)?.candidates(select.config());
    let votes = if candidates.len() <= select.config().top_k {
        select.pool(batch, input.q, None)?; // which finds that every token is to be selected
        None
    } else {
        Some(votes_of(policy, select, batch, kv, input.q, &candidates)?)
    };
    if let Some(votes) = &votes {
        put_votes(select, batch, &candidates, votes)?;
    }
    select.provide(Buffer::Votes, batch)?;
    select.top_k(batch, None)?;
    select.attend(batch, kv, input.q, Over::Selected, output)?;
    Ok(votes.map(|votes| Votes { candidates, votes }))
}

/// A policy's votes; queries are pooled when this returns.
fn votes_of(
    policy: Policy,
    select: &mut TokenSelect,
    batch: &Batch,
    kv: KvView<'_>,
    q: TensorView<'_>,
    candidates: &Range<usize>,
) -> Result<Vec<f32>> {
    if let Policy::Parts { len } = policy {
        let votes = votes_of_parts(select, batch, kv, q, candidates, len)?;
        select.pool(batch, q, None)?;
        return Ok(votes);
    }
    select.pool(batch, q, None)?;
    if policy == Policy::Quest {
        return quest_bounds(select, batch, kv, candidates);
    }
    select.score(batch, kv)?;
    match policy {
        Policy::Raw => Ok(Logits::read(select, batch, candidates)?.raw_sum()),
        Policy::Hard => Ok(Logits::read(select, batch, candidates)?.hard_vote(select.config().top_k)),
        _ => {
            select.vote(batch)?;
            let base = batch.row(0)?.token_base;
            let votes = elements::<f32>(select.workspace().buffer(Buffer::Votes).view())?;
            Ok(votes[base + candidates.start..base + candidates.end].to_vec())
        }
    }
}

/// Soft votes of parts of `len` queries: `Σ_h max over parts of softmax`.
fn votes_of_parts(
    select: &mut TokenSelect,
    batch: &Batch,
    kv: KvView<'_>,
    q: TensorView<'_>,
    candidates: &Range<usize>,
    len: usize,
) -> Result<Vec<f32>> {
    // A part is a batch of its own over the same keys, which as another engine's memory go with any batch.
    let kv = KvView::new(kv.k(), kv.v(), KvLayout::Nhd)?;
    let queries = batch.num_query_tokens();
    let mut largest: Option<Vec<Vec<f32>>> = None;
    for begin in (0..queries).step_by(len) {
        let tokens = begin..queries.min(begin + len);
        let part = Batch::new(batch.page_size(), vec![0, tokens.len() as u32], batch.tables().clone())?;
        select.pool(&part, q.tokens(tokens)?, None)?;
        select.score(&part, kv)?;
        let own = Logits::read(select, &part, candidates)?.probabilities();
        match &mut largest {
            None => largest = Some(own),
            Some(largest) => {
                for (largest, own) in largest.iter_mut().flatten().zip(own.iter().flatten()) {
                    *largest = largest.max(*own);
                }
            }
        }
    }
    Ok(sum_over(&largest.unwrap_or_default()))
}

/// Writes the candidates' votes into the workspace.
fn put_votes(
    select: &mut TokenSelect,
    batch: &Batch,
    candidates: &Range<usize>,
    votes: &[f32],
) -> Result<()> {
    let shape = select.workspace().buffer(Buffer::Votes).shape();
    let base = batch.row(0)?.token_base;
    let mut all = vec![0.0; shape.dims().iter().product()];
    all[base + candidates.start..base + candidates.end].copy_from_slice(votes);
    select.buffer_mut(Buffer::Votes).copy_from(TensorView::new(&all, shape)?)?;
    Ok(())
}

/// Writes a list of the first `n_init` and the last `n_local + top_k` tokens and the block.
fn choose_windows(select: &mut TokenSelect, batch: &Batch) -> Result<()> {
    let config = select.config();
    let (row, n_init) = (batch.row(0)?, config.n_init);
    let local = row.kv_len.saturating_sub(row.block_len() + config.n_local + config.top_k);
    let list: Vec<u32> = (0..n_init.min(local)).chain(local..row.kv_len).map(|token| token as u32).collect();
    let shape = select.workspace().buffer(Buffer::Selected).shape();
    let mut all = vec![0; shape.dims().iter().product()];
    all[..list.len()].copy_from_slice(&list);
    select.buffer_mut(Buffer::Selected).copy_from(TensorView::new(&all, shape)?)?;
    let lens = [list.len() as u32];
    select.buffer_mut(Buffer::SelectedLen).copy_from(TensorView::new(&lens, [1])?)?;
    select.provide(Buffer::Selected, batch)?;
    Ok(())
}
