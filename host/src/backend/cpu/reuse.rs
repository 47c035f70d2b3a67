//! `compare` and `decide`, and what `pool` shares with them: whether a cached selection may serve again.

use rayon::prelude::*;

use crate::batch::Batch;
use crate::config::SelectConfig;
use crate::error::Result;
use crate::plan::Plan;
use crate::selection_cache::{EMPTY, SelectionCacheLayer};
use crate::workspace::{RowAction, Workspace};

pub(super) fn compare(
    plan: &Plan,
    batch: &Batch,
    workspace: &mut Workspace,
    cached: Option<SelectionCacheLayer<'_>>,
) -> Result<()> {
    let config = plan.config();
    let query_len = config.heads.num_qo_heads * config.heads.head_dim;
    let queries = workspace.queries.as_slice::<f32>()?;
    let out = workspace.products.as_mut_slice::<f64>()?;
    let cached = cached.as_ref().map(Cached::new).transpose()?;
    out[..3 * batch.num_rows()].par_chunks_mut(3).enumerate().for_each(|(row, out)| {
        let query = &queries[row * query_len..][..query_len];
        let entry = cached.as_ref().and_then(|cached| cached.entry(config, batch, row));
        out.copy_from_slice(&entry.map_or([0.0; 3], |entry| products(query, entry.query)));
    });
    Ok(())
}

pub(super) fn decide(
    plan: &Plan,
    batch: &Batch,
    workspace: &mut Workspace,
    cached: Option<SelectionCacheLayer<'_>>,
) -> Result<()> {
    let config = plan.config();
    let products = workspace.products.as_slice::<f64>()?;
    let similarities = workspace.similarities.as_mut_slice::<f32>()?;
    let actions = workspace.actions.as_mut_slice::<u32>()?;
    let cached = cached.as_ref().map(Cached::new).transpose()?;
    for row in 0..batch.num_rows() {
        let sums = [0, 1, 2].map(|i| products[3 * row + i]);
        let entry = cached.as_ref().and_then(|cached| cached.entry(config, batch, row));
        similarities[row] = entry.as_ref().map_or(-1.0, |_| cosine(sums));
        actions[row] = action(config, batch, row, entry.map(|entry| (entry.age, similarities[row]))) as u32;
    }
    Ok(())
}

/// The layer's cached selections.
pub(super) struct Cached<'a> {
    queries: &'a [f32],
    ages: &'a [u32],
    made_at: &'a [u32],
    selections: &'a [u32],
}

/// A usable cached selection.
pub(super) struct Entry<'a> {
    pub query: &'a [f32],
    pub age: u32,
}

impl<'a> Cached<'a> {
    pub fn new(layer: &'a SelectionCacheLayer<'_>) -> Result<Self> {
        Ok(Cached {
            queries: layer.queries.as_view().as_slice()?,
            ages: layer.ages.as_view().as_slice()?,
            made_at: layer.made_at.as_view().as_slice()?,
            selections: layer.selections.as_view().as_slice()?,
        })
    }

    /// The row's, if it is usable.
    pub fn entry(&self, config: &SelectConfig, batch: &Batch, row: usize) -> Option<Entry<'a>> {
        let index = batch.sequence_index(row).filter(|_| batch.kv_len(row) > 0)?;
        let (before_block, made_at) = (batch.kv_len(row) - batch.block_len(row), self.made_at[index]);
        if made_at == EMPTY || made_at as usize > before_block {
            return None;
        }
        // Its tokens ascend. Where a configuration with other windows made it, some may be in this one's windows.
        let tokens = &self.selections[index * config.top_k..][..config.top_k];
        let candidates = batch.candidates(row, config);
        let is_candidate = |token: &u32| candidates.contains(&(*token as usize));
        if !(tokens.first().is_some_and(is_candidate) && tokens.last().is_some_and(is_candidate)) {
            return None;
        }
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        Some(Entry { query: &self.queries[index * query_len..][..query_len], age: self.ages[index] })
    }
}

/// Sums over all heads of query times cached, query squared and cached squared.
pub(super) fn products(query: &[f32], cached: &[f32]) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for (&x, &y) in query.iter().zip(cached) {
        let (x, y) = (f64::from(x), f64::from(y));
        sums[0] += x * y;
        sums[1] += x * x;
        sums[2] += y * y;
    }
    sums
}

/// The cosine that such sums make; NaN for a zero vector, which is never similar enough.
pub(super) fn cosine([dot, own, other]: [f64; 3]) -> f32 {
    (dot / (own.sqrt() * other.sqrt())) as f32
}

/// What to do for a row, given age and similarity of its cached selection if there is one.
pub(super) fn action(
    config: &SelectConfig,
    batch: &Batch,
    row: usize,
    entry: Option<(u32, f32)>,
) -> RowAction {
    let candidates = batch.candidates(row, config).len();
    if batch.block_len(row) == 0 || (batch.kv_len(row) == 0 && !batch.is_partial()) {
        return RowAction::Skip;
    }
    if candidates == 0 || (candidates <= config.top_k && !batch.is_partial()) {
        return RowAction::Complete;
    }
    match (config.selection_cache, entry) {
        (Some(cache), Some((age, similarity)))
            if similarity >= cache.similarity_threshold && age < config.max_reuse() =>
        {
            RowAction::Reuse
        }
        _ => RowAction::Score,
    }
}
