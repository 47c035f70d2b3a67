//! `pool`: mean of each block's (rotated) queries, its cosine with the cached one, and the row's action.

use rayon::prelude::*;

use super::float::Float;
use super::reuse::{Cached, action, cosine, products};
use crate::batch::Batch;
use crate::error::Result;
use crate::plan::Plan;
use crate::rope::RopeTable;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;
use crate::workspace::Workspace;

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
    let cached = cached.as_ref().map(Cached::new).transpose()?;
    for row in 0..rows {
        let query = &queries[row * hq * d..][..hq * d];
        let entry = cached.as_ref().and_then(|cached| cached.entry(config, batch, row));
        similarities[row] = entry.as_ref().map_or(-1.0, |entry| cosine(products(query, entry.query)));
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
