//! Rows of every kind in one batch: with tokens and queries, with queries alone, with tokens alone, and with neither. What
//! a row gets does not depend on the rows around it.

mod common;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{self, Content, Problem};
use common::run::{Inputs, Outcome, assert_outcome, outputs_on, selected_lists};
use common::{bits, cases, on_devices};
use proptest::prelude::*;
use tokenselect::{
    DType, Device, HeadShape, LayerMut, Over, Positions, Rope, RowAction, SelectConfig, StepOutput,
    TokenSelect,
};

on_devices! {
    all: are_independent, a_row_without_tokens_takes_its_own_keys_with_it;
}

/// `(n, t)` of up to six rows. Of those without tokens, each has as many queries as it likes.
fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let whole = (1usize..90, 1usize..6).prop_map(|(n, t)| (n, t.min(n)));
    let without_tokens = (0usize..5).prop_map(|t| (0, t));
    let without_queries = (1usize..40).prop_map(|n| (n, 0));
    prop::collection::vec(prop_oneof![2 => whole, 2 => without_tokens, 1 => without_queries], 1..=6)
}

/// Heads that every device serves.
fn config(dtype: DType, positions: Positions) -> SelectConfig {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    SelectConfig { heads, dtype, positions, ..problem::small_config() }
}

/// Appends, selects and attends; operation by operation, or the selection in one.
fn run(
    device: &Device,
    problem: &Problem,
    page_size: usize,
    storage: Storage,
    whole: bool,
) -> (Outcome, Pool) {
    let mut pool = Pool::before_block(problem, page_size, storage, 3).to(device);
    let batch = pool.batch(problem);
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let inputs = Inputs::new(problem).to(device);
    let (mut out, mut lse) = outputs_on(device, problem, DType::F32);
    if whole {
        ts.append_select(&batch, LayerMut { kv: pool.view_mut(), selections: None }, inputs.step()).unwrap();
    } else {
        ts.append(&batch, pool.view_mut(), inputs.k.view(), inputs.v.view()).unwrap();
        ts.pool(&batch, inputs.q.view(), None).unwrap();
        ts.score(&batch, pool.view()).unwrap();
        ts.vote(&batch).unwrap();
        ts.top_k(&batch, None).unwrap();
    }
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.attend(&batch, pool.view(), inputs.q.view(), Over::Selected, output).unwrap();
    for (row, action) in problem.rows.iter().zip(ts.workspace().actions().unwrap()) {
        assert_eq!(
            action == RowAction::Skip,
            row.n == 0 || row.t == 0,
            "a row (n = {}, T = {})",
            row.n,
            row.t
        );
    }
    (Outcome { selected: selected_lists(&ts, problem.rows.len()), out, lse }, pool)
}

fn check(device: &Device, problem: &Problem, page_size: usize, storage: Storage) {
    for whole in [false, true] {
        let (outcome, pool) = run(device, problem, page_size, storage, whole);
        let what = format!("{}, {}", device.name(), if whole { "in one" } else { "one by one" });
        let want = Pool::full(problem, page_size, storage, 3);
        assert!(bits(&pool.k) == bits(&want.k) && bits(&pool.v) == bits(&want.v), "{what}: keys or values");
        assert_outcome(&what, problem, &outcome);
    }
}

fn are_independent(device: &Device) {
    proptest!(cases(24), |(
        lengths in lengths(),
        page_size in prop::sample::select(vec![1usize, 7, 16]),
        storage in prop::sample::select(STORAGES.to_vec()),
        (is_bf16, rotates) in any::<(bool, bool)>(),
        seed in any::<u64>(),
    )| {
        let positions = if rotates { Positions::Reassigned(Rope::default()) } else { Positions::Native };
        let config = config(if is_bf16 { DType::Bf16 } else { DType::F16 }, positions);
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        check(device, &problem, page_size, storage);
    });
}

/// The smallest case: the second row's key is its own, not that of the row without tokens before it.
fn a_row_without_tokens_takes_its_own_keys_with_it(device: &Device) {
    let config = config(DType::F16, Positions::Native);
    let problem = Problem::new(&config, &[(0, 1), (1, 1), (0, 3), (30, 0), (20, 2)], Content::Peaked, 1);
    check(device, &problem, 16, Storage::Nhd);
}
