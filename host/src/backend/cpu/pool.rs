//! `pool`: mean of each block's (rotated) queries, its cosine with the cached one, and the row's action.

use rayon::prelude::*;

use super::float::Float;
use crate::batch::Batch;
use crate::config::SelectConfig;
use crate::error::Result;
use crate::plan::Plan;
use crate::rope::RopeTable;
use crate::selection_cache::{EMPTY, SelectionCacheLayer};
use crate::tensor::TensorView;
use crate::workspace::{RowAction, Workspace};

pub(super) fn pool<T: Float>(
    plan: &Plan,
    batch: &Batch,
    workspace: &mut Workspace,
    q: TensorView<'_>,
    cached: Option<SelectionCacheLayer<'_>>,
) -> Result<()> {
    let config = plan.config();
    let (hq, d) = (config.heads.num_qo_heads, config.heads.head_dim);
    let q = q.as_heads::<T>()?;
    let angles = workspace.angles.as_ref();
    let queries = workspace.queries.as_mut_slice::<f32>()?;
    let rows = batch.num_rows();

    queries[..rows * hq * d].par_chunks_mut(d).enumerate().for_each(|(i, mean)| {
        let (row, head) = (i / hq, i % hq);
        let heads = batch.query_range(row).map(|token| q.at(token, head));
        mean_query(heads, config.n_local, angles, mean);
    });

    let similarities = workspace.similarities.as_mut_slice::<f32>()?;
    let actions = workspace.actions.as_mut_slice::<u32>()?;
    let cached = match &cached {
        Some(layer) => Some(Cached {
            queries: layer.queries.as_view().as_slice()?,
            ages: layer.ages.as_view().as_slice()?,
            made_at: layer.made_at.as_view().as_slice()?,
            selections: layer.selections.as_view().as_slice()?,
        }),
        None => None,
    };
    for row in 0..rows {
        let query = &queries[row * hq * d..][..hq * d];
        let entry = cached.as_ref().and_then(|cached| cached.entry(config, batch, row));
        similarities[row] = entry.as_ref().map_or(-1.0, |entry| cosine(entry.query, query));
        actions[row] = action(config, batch, row, entry.map(|entry| (entry.age, similarities[row]))) as u32;
    }
    Ok(())
}

/// Mean over the block; query `t` is rotated at `n_local + t`.
fn mean_query<'a, T: Float>(
    block: impl ExactSizeIterator<Item = &'a [T]>,
    n_local: usize,
    rope: Option<&RopeTable>,
    mean: &mut [f32],
) {
    let pairs = rope.map_or(0, RopeTable::pairs);
    let (mut cos, mut sin, mut query) = (vec![0.0; pairs], vec![0.0; pairs], vec![0.0; mean.len()]);
    let len = block.len();
    mean.fill(0.0);
    for (t, head) in block.enumerate() {
        T::widen(head, &mut query);
        if let Some(rope) = rope {
            rope.fill(n_local + t, &mut cos, &mut sin);
            rope.apply(&mut query, &cos, &sin);
        }
        for (sum, x) in mean.iter_mut().zip(&query) {
            *sum += x;
        }
    }
    for sum in mean.iter_mut() {
        *sum /= len.max(1) as f32;
    }
}

/// The layer's cached selections.
struct Cached<'a> {
    queries: &'a [f32],
    ages: &'a [u32],
    made_at: &'a [u32],
    selections: &'a [u32],
}

/// A usable cached selection.
struct Entry<'a> {
    query: &'a [f32],
    age: u32,
}

impl<'a> Cached<'a> {
    fn entry(&self, config: &SelectConfig, batch: &Batch, row: usize) -> Option<Entry<'a>> {
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

/// Cosine over all heads at once; NaN for a zero vector, which is never similar enough.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let (mut dot, mut aa, mut bb) = (0.0f64, 0.0f64, 0.0f64);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        dot += a * b;
        aa += a * a;
        bb += b * b;
    }
    (dot / (aa.sqrt() * bb.sqrt())) as f32
}

/// What to do for a row, given age and similarity of its cached selection if there is one.
fn action(config: &SelectConfig, batch: &Batch, row: usize, entry: Option<(u32, f32)>) -> RowAction {
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
