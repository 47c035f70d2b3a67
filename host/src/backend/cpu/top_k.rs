//! `top_k`: exact selection in a total order, windows added, cached selections kept.

use rayon::prelude::*;

use super::{scored, split_parts};
use crate::batch::Batch;
use crate::error::Result;
use crate::plan::Plan;
use crate::selection_cache::SelectionCacheLayer;
use crate::workspace::{RowAction, Workspace};

pub(super) fn top_k(
    plan: &Plan,
    batch: &Batch,
    workspace: &mut Workspace,
    cached: Option<SelectionCacheLayer<'_>>,
) -> Result<()> {
    let config = plan.config();
    let (k, rows) = (config.top_k, batch.num_rows());
    let actions = &workspace.actions.as_slice::<u32>()?[..rows];
    let votes = if plan.votes_are_chosen_from() { &workspace.votes } else { &workspace.pooled_votes };
    let votes = votes.as_slice::<f32>()?;
    let top_k = workspace.top_k.as_mut_slice::<u32>()?;
    let width = plan.list_width();
    let selected = workspace.selected.as_mut_slice::<u32>()?;
    let lens = workspace.selected_len.as_mut_slice::<u32>()?;
    let is = |row: usize, action: RowAction| actions[row] == action as u32;

    let scored = || scored(batch, actions);
    let targets = split_parts(top_k, scored().map(|row| (row * k, k)));
    let tasks: Vec<_> = scored().zip(targets).collect();
    tasks.into_par_iter().for_each(|(row, target)| {
        let candidates = batch.candidates(row, config);
        let votes = &votes[batch.token_base(row) + candidates.start..][..candidates.len()];
        largest(votes, candidates.start as u32, target);
    });

    if let Some(cached) = cached {
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        let fresh = workspace.queries.as_slice::<f32>()?;
        let queries = cached.queries.into_slice::<f32>()?;
        let selections = cached.selections.into_slice::<u32>()?;
        let ages = cached.ages.into_slice::<u32>()?;
        let made_at = cached.made_at.into_slice::<u32>()?;
        let counters = cached.counters.into_slice::<u64>()?;
        for (row, &action) in actions.iter().enumerate() {
            let Some(index) = batch.sequence_index(row) else { continue };
            let kept = &mut selections[index * k..][..k];
            let chosen = &mut top_k[row * k..][..k];
            match RowAction::from_code(action) {
                Some(RowAction::Reuse) => {
                    chosen.copy_from_slice(kept);
                    ages[index] = ages[index].saturating_add(1);
                    counters[0] = counters[0].wrapping_add(1);
                }
                Some(RowAction::Score) => {
                    kept.copy_from_slice(chosen);
                    queries[index * query_len..][..query_len]
                        .copy_from_slice(&fresh[row * query_len..][..query_len]);
                    ages[index] = 0;
                    made_at[index] = (batch.kv_len(row) - batch.block_len(row)) as u32;
                    counters[1] = counters[1].wrapping_add(1);
                }
                Some(RowAction::Complete) => counters[2] = counters[2].wrapping_add(1),
                Some(RowAction::Skip) | None => {}
            }
        }
    }

    for row in 0..rows {
        let list = &mut selected[row * width..][..width];
        let candidates = batch.candidates(row, config);
        let kv_len = batch.kv_len(row) as u32;
        lens[row] = if is(row, RowAction::Skip) {
            0
        } else if is(row, RowAction::Complete) {
            write_list(list, 0..kv_len)
        } else {
            let chosen = top_k[row * k..][..k.min(candidates.len())].iter().copied();
            let before = 0..candidates.start as u32;
            write_list(list, before.chain(chosen).chain(candidates.end as u32..kv_len))
        };
    }
    Ok(())
}

fn write_list(list: &mut [u32], tokens: impl Iterator<Item = u32>) -> u32 {
    let mut len = 0;
    for (place, token) in list.iter_mut().zip(tokens) {
        *place = token;
        len += 1;
    }
    len
}

/// The places of the `chosen.len()` largest votes (fewer if there are fewer votes), plus `first`, ascending:
/// larger vote first, equal votes by smaller place, NaN last.
fn largest(votes: &[f32], first: u32, chosen: &mut [u32]) {
    let k = chosen.len().min(votes.len());
    let mut keys: Vec<u64> =
        votes.iter().zip(0u64..).map(|(&vote, place)| u64::from(rank_bits(vote)) << 32 | place).collect();
    if k < keys.len() {
        keys.select_nth_unstable(k);
    }
    for (place, key) in chosen.iter_mut().zip(&keys[..k]) {
        *place = first + *key as u32;
    }
    chosen[..k].sort_unstable();
}

/// Bits that ascend as votes descend; equal for -0 and 0, largest for NaN.
fn rank_bits(vote: f32) -> u32 {
    if vote.is_nan() {
        return u32::MAX;
    }
    let bits = (vote + 0.0).to_bits(); // -0 becomes 0
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    !ascending
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_order() {
        let order = [f32::INFINITY, f32::MAX, 1.0, 1e-40, 0.0, -1e-40, -1.0, f32::NEG_INFINITY, f32::NAN];
        for pair in order.windows(2) {
            assert!(rank_bits(pair[0]) < rank_bits(pair[1]), "{} before {}", pair[0], pair[1]);
        }
        assert_eq!(rank_bits(-0.0), rank_bits(0.0));
        assert_eq!(rank_bits(-f32::NAN), rank_bits(f32::NAN));
    }

    #[test]
    fn ties_go_to_the_smaller_place() {
        let mut chosen = [0; 3];
        largest(&[0.5, 1.0, 0.5, f32::NAN, 0.5, 0.0], 10, &mut chosen);
        assert_eq!(chosen, [10, 11, 12]);
    }
}
