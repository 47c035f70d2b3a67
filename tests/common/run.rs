//! Whole steps on a device, and their comparison with the definitions.

use tokenselect::{
    Batch, DType, Device, KvView, Limits, Operations, Over, PagedKvCache, Plan, SelectConfig,
    SelectionCacheLayer, StepInput, StepOutput, Tensor, TokenSelect,
};

use super::paged::limits;
use super::problem::{Problem, Row};
use super::{
    assert_chosen, assert_close, assert_lse, attention_tolerance, gpu_tolerance, is_on_gpu, naive,
    naive_config, tensor, to_device, values,
};

/// What a step left behind.
#[derive(Debug)]
pub struct Outcome {
    pub selected: Vec<Vec<usize>>,
    pub out: Tensor,
    pub lse: Tensor,
}

/// The inputs of a step as tensors.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// The queries of a step alone: a part of a sequence may hold less than the block.
pub fn queries(problem: &Problem) -> Tensor {
    let heads = problem.config.heads;
    let shape = [problem.num_query_tokens(), heads.num_qo_heads, heads.head_dim];
    tensor(problem.config.dtype, &problem.q(), shape)
}

impl Inputs {
    pub fn new(problem: &Problem) -> Self {
        let (tokens, heads) = (problem.num_query_tokens(), problem.config.heads);
        let dtype = problem.config.dtype;
        let kv_shape = [tokens, heads.num_kv_heads, heads.head_dim];
        Inputs {
            q: queries(problem),
            k: tensor(dtype, &problem.blocks(|row| &row.k), kv_shape),
            v: tensor(dtype, &problem.blocks(|row| &row.v), kv_shape),
        }
    }

    /// The same inputs in the memory of a device.
    pub fn to(&self, device: &Device) -> Self {
        Inputs { q: to_device(device, &self.q), k: to_device(device, &self.k), v: to_device(device, &self.v) }
    }

    pub fn step(&self) -> StepInput<'_> {
        StepInput { q: self.q.view(), k: self.k.view(), v: self.v.view() }
    }
}

/// Output tensors, filled with a number that no operation writes.
pub fn outputs(problem: &Problem, dtype: DType) -> (Tensor, Tensor) {
    let (tokens, heads) = (problem.num_query_tokens(), problem.config.heads);
    let len = tokens * heads.num_qo_heads;
    let out = tensor(dtype, &vec![-77.0; len * heads.head_dim], [tokens, heads.num_qo_heads, heads.head_dim]);
    (out, tensor(DType::F32, &vec![-77.0; len], [tokens, heads.num_qo_heads]))
}

/// [`outputs`] in the memory of a device.
pub fn outputs_on(device: &Device, problem: &Problem, dtype: DType) -> (Tensor, Tensor) {
    let (out, lse) = outputs(problem, dtype);
    (to_device(device, &out), to_device(device, &lse))
}

pub fn token_select(device: &Device, problem: &Problem, batch: &Batch) -> TokenSelect {
    TokenSelect::new(device, problem.config.clone(), limits(batch)).unwrap()
}

/// The same for some operations, of which a GPU has more kernels than of all together.
pub fn only(device: &Device, config: &SelectConfig, limits: Limits, operations: Operations) -> TokenSelect {
    let plan = Plan::new(device, config.clone(), limits, operations).unwrap();
    TokenSelect::with_plan(plan).unwrap()
}

/// [`only`] what comes before attention.
pub fn selection(device: &Device, problem: &Problem, batch: &Batch) -> TokenSelect {
    only(device, &problem.config, limits(batch), Operations::SELECTION)
}

/// The selected lists that the last `top_k` left.
pub fn selected_lists(ts: &TokenSelect, rows: usize) -> Vec<Vec<usize>> {
    let list = |row: usize| ts.workspace().selected(row).unwrap().iter().map(|&t| t as usize).collect();
    (0..rows).map(list).collect()
}

/// Selection and attention over borrowed memory that holds all tokens.
pub fn select_and_attend(
    ts: &mut TokenSelect,
    problem: &Problem,
    batch: &Batch,
    kv: KvView<'_>,
    cached: Option<SelectionCacheLayer<'_>>,
) -> Outcome {
    let inputs = Inputs::new(problem).to(ts.device());
    let (mut out, mut lse) = outputs_on(ts.device(), problem, DType::F32);
    ts.select(batch, kv, inputs.q.view(), cached).unwrap();
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.attend(batch, kv, inputs.q.view(), Over::Selected, output).unwrap();
    Outcome { selected: selected_lists(ts, problem.rows.len()), out, lse }
}

/// A step of one layer of an owned cache.
pub fn step(
    ts: &mut TokenSelect,
    cache: &mut PagedKvCache,
    layer: usize,
    batch: &Batch,
    problem: &Problem,
) -> Outcome {
    let inputs = Inputs::new(problem).to(ts.device());
    let (mut out, mut lse) = outputs_on(ts.device(), problem, DType::F32);
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.step(cache, layer, batch, inputs.step(), output).unwrap();
    Outcome { selected: selected_lists(ts, problem.rows.len()), out, lse }
}

/// Checks a row's selected list: exact windows, the choice up to votes too close to call, exact ties.
pub fn assert_selected(what: &str, config: &naive::Config, row: &Row, selected: &[usize]) {
    let want = naive::select(config, &row.q, &row.k, &mut None);
    let Some(votes) = want.votes else {
        assert_eq!(selected, want.list, "{what}: everything is selected");
        return;
    };
    let range = naive::candidates(config, row.n, row.t);
    let chosen: Vec<usize> = selected.iter().copied().filter(|token| range.contains(token)).collect();
    let whole = naive::selected_list(config, row.n, row.t, &chosen);
    assert_eq!(selected, whole, "{what}: windows around the chosen tokens");
    let places: Vec<usize> = chosen.iter().map(|token| token - range.start).collect();
    assert_chosen(what, &places, &votes, config.top_k);
    if config.pool_window == 1 {
        assert_ties(what, config, row, &range, &chosen);
    }
}

/// Tokens with the same keys have the same votes: the first of them are chosen, however close the cut.
fn assert_ties(
    what: &str,
    config: &naive::Config,
    row: &Row,
    range: &std::ops::Range<usize>,
    chosen: &[usize],
) {
    let width = config.hkv * config.d;
    let mut left_out: Vec<&[f64]> = Vec::new();
    for token in range.clone() {
        let key = &row.k[token * width..][..width];
        if !chosen.contains(&token) {
            if left_out.len() < 8 {
                left_out.push(key);
            }
        } else {
            assert!(!left_out.contains(&key), "{what}: token {token} was chosen before an earlier equal");
        }
    }
}

/// Checks a whole outcome against the definitions: the lists, and attention over the lists found, so that a
/// vote too close to call does not count as an error of attention.
pub fn assert_outcome(what: &str, problem: &Problem, outcome: &Outcome) {
    let config = naive_config(&problem.config);
    let width = config.hq * config.d;
    let on_gpu = is_on_gpu(&outcome.out);
    let (out, lse) = (values(&outcome.out), values(&outcome.lse));
    let mut token = 0;
    for (r, row) in problem.rows.iter().enumerate() {
        let what = format!("{what}, row {r} (n = {}, T = {})", row.n, row.t);
        let list = &outcome.selected[r];
        if row.t == 0 || row.n == 0 {
            assert!(list.is_empty(), "{what}: padding selects nothing");
        }
        if row.t == 0 {
            continue;
        }
        assert_selected(&what, &config, row, list);
        let (want, want_lse) =
            naive::attend(&config, &row.q, &row.k, &row.v, &naive::ranked(list), list.len());
        let exact = attention_tolerance(outcome.out.dtype(), &config, &row.q, &row.k, list.len());
        let allowed = if on_gpu { exact.max(gpu_tolerance(problem.config.dtype)) } else { exact };
        assert_close(&what, &out[token * width..][..row.t * width], &want, config.d, allowed);
        assert_lse(&what, &lse[token * config.hq..][..row.t * config.hq], &want_lse, allowed);
        token += row.t;
    }
}
