//! Captured work: a step recorded once and launched again while sequences grow gives what eager steps give.

mod common;

use common::problem::{Content, Problem, Row, cached, small_config};
use common::run::{Inputs, outputs_on};
use common::{bits, on_devices, tensor, to_device};
use tokenselect::{
    Batch, BatchSlot, CacheConfig, DType, Device, Error, Graph, HeadShape, Limits, PagedKvCache, Positions,
    Rope, SelectConfig, SequenceId, StepInput, StepOutput, Tensor, TokenSelect,
};

on_devices! {
    gpus:
        replays_equal_eager_steps, several_layers_in_one_graph, padding_gets_zero_and_minus_infinity,
        what_cannot_be_recorded_is_refused, launches_repeat_what_was_recorded,
        a_slot_takes_what_it_was_made_for;
}

const STEPS: usize = 64;
/// Sequences that decode together; the last ends half-way and is padding from then on.
const ROWS: usize = 3;
const PAGE_SIZE: usize = 4;
const MAX_TOKENS: usize = 512;

fn config(positions: Positions) -> SelectConfig {
    let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 6,
        top_k: 24,
        positions,
        ..small_config()
    };
    cached(config, 0.7, Some(3))
}

/// A cache with its sequences, and all that a step works on, at fixed places.
struct Run {
    cache: PagedKvCache,
    ids: Vec<SequenceId>,
    select: TokenSelect,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
}

impl Run {
    /// Sequences of different lengths, filled by a first, eager step.
    fn new(device: &Device, config: &SelectConfig) -> Self {
        let limits = Limits { max_rows: ROWS, max_block_len: 64, max_kv_tokens: ROWS * MAX_TOKENS };
        let cache_config = CacheConfig {
            num_layers: 1,
            num_pages: ROWS * MAX_TOKENS / PAGE_SIZE,
            page_size: PAGE_SIZE,
            max_sequences: ROWS,
            ..CacheConfig::default()
        };
        let mut cache = PagedKvCache::new(device, config, &cache_config).unwrap();
        let ids: Vec<SequenceId> = (0..ROWS).map(|_| cache.create().unwrap()).collect();
        let mut select = TokenSelect::new(device, config.clone(), limits).unwrap();
        let prompts = Problem::new(config, &[(60, 60), (5, 5), (33, 33)], Content::Peaked, 3);
        let growth: Vec<_> = ids.iter().copied().zip(prompts.rows.iter().map(|row| row.t)).collect();
        let batch = cache.extend(&growth).unwrap();
        let inputs = Inputs::new(&prompts).to(device);
        let (mut out, mut lse) = outputs_on(device, &prompts, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        select.step(&mut cache, 0, &batch, inputs.step(), output).unwrap();
        let decode = step_problem(config, 0);
        let (out, lse) = outputs_on(device, &decode, DType::F32);
        Run { cache, ids, select, inputs: Inputs::new(&decode).to(device), out, lse }
    }

    /// Grows the sequences that are still there by a token, and puts the step's inputs in place.
    fn grow(&mut self, step: usize) -> Batch {
        let growth: Vec<_> = self.ids[..rows_left(step)].iter().map(|&id| (id, 1)).collect();
        let fresh = Inputs::new(&step_problem(self.select.config(), step));
        self.inputs.q.copy_from(fresh.q.view()).unwrap();
        self.inputs.k.copy_from(fresh.k.view()).unwrap();
        self.inputs.v.copy_from(fresh.v.view()).unwrap();
        self.cache.extend(&growth).unwrap().padded(ROWS, 1).unwrap()
    }

    fn step(&mut self, batch: &Batch) -> tokenselect::Result<()> {
        let input = StepInput { q: self.inputs.q.view(), k: self.inputs.k.view(), v: self.inputs.v.view() };
        let output = StepOutput { out: self.out.view_mut(), lse: Some(self.lse.view_mut()) };
        self.select.step(&mut self.cache, 0, batch, input, output)
    }

    /// Everything the step has written, bit by bit.
    fn results(&self) -> (Vec<u64>, Vec<u64>, Vec<Vec<u32>>, Vec<tokenselect::RowAction>) {
        let lists = (0..ROWS).map(|row| self.select.workspace().selected(row).unwrap()).collect();
        let actions = self.select.workspace().actions().unwrap();
        (bits(&self.out), bits(&self.lse), lists, actions[..ROWS].to_vec())
    }
}

fn rows_left(step: usize) -> usize {
    if step < STEPS / 2 { ROWS } else { ROWS - 1 }
}

/// The queries, keys and values of one step: each row's block of one token.
fn step_problem(config: &SelectConfig, step: usize) -> Problem {
    let lengths = [(1, 1); ROWS];
    let mut problem = Problem::new(config, &lengths, Content::Peaked, 100 + step as u64 / 4);
    // Steps in a group of four resemble each other, so that selections are reused.
    for Row { q, .. } in &mut problem.rows {
        q.iter_mut().skip(step % 4).step_by(97).for_each(|x| *x = 0.5);
    }
    problem
}

fn replays_equal_eager_steps(device: &Device) {
    for positions in [Positions::Native, Positions::Reassigned(Rope::default())] {
        let config = config(positions);
        let (mut eager, mut captured) = (Run::new(device, &config), Run::new(device, &config));
        let mut slot_and_graph = None;
        for step in 0..STEPS {
            let batch = eager.grow(step);
            eager.step(&batch).unwrap();

            let batch = captured.grow(step);
            let (slot, graph) = match &mut slot_and_graph {
                Some((slot, graph)) => (slot, graph),
                none => {
                    let max_pages = ROWS * MAX_TOKENS / PAGE_SIZE;
                    let mut slot = BatchSlot::new(device, &batch, max_pages).unwrap();
                    let batch = slot.put(batch.clone()).unwrap();
                    let graph = device.capture(|| captured.step(&batch)).unwrap();
                    let (slot, graph) = none.insert((slot, graph));
                    (slot, graph)
                }
            };
            slot.put(batch).unwrap();
            // SAFETY: `captured` and the slot are alive, and none of their tensors was replaced.
            unsafe { graph.launch().unwrap() };
            assert!(eager.results() == captured.results(), "{}, step {step}", device.name());
            if step + 1 == STEPS / 2 {
                for run in [&mut eager, &mut captured] {
                    run.cache.free(run.ids[ROWS - 1]).unwrap();
                }
            }
        }
        let stats = captured.cache.selection_stats().unwrap();
        assert_eq!(stats, eager.cache.selection_stats().unwrap());
        assert!(stats.reused > 0 && stats.scored > 0, "the run is to reuse and to score: {stats:?}");
    }
}

/// The loop of the README, over several layers: the first step eager, the others from its recording.
fn several_layers_in_one_graph(device: &Device) {
    const LAYERS: usize = 2;
    let config = config(Positions::Reassigned(Rope::default()));
    let cache_config =
        CacheConfig { num_layers: LAYERS, page_size: PAGE_SIZE, max_sequences: 1, ..CacheConfig::default() };
    let problem = |step: u64| Problem::new(&config, &[(1, 1)], Content::Peaked, 7 + step / 3);
    let run = |captures: bool| {
        let mut cache = PagedKvCache::new(device, &config, &cache_config).unwrap();
        let mut select = TokenSelect::new(device, config.clone(), Limits::default()).unwrap();
        let id = cache.create().unwrap();
        let mut inputs = Inputs::new(&problem(0)).to(device);
        let (mut out, _) = outputs_on(device, &problem(0), DType::F32);
        let mut slot_and_graph: Option<(BatchSlot, Graph)> = None;
        let mut outs = Vec::new();
        for step in 0..40 {
            let fresh = Inputs::new(&problem(step));
            inputs.q.copy_from(fresh.q.view()).unwrap();
            inputs.k.copy_from(fresh.k.view()).unwrap();
            inputs.v.copy_from(fresh.v.view()).unwrap();
            let batch = cache.extend(&[(id, 1)]).unwrap();
            if let Some((slot, graph)) = &mut slot_and_graph {
                slot.put(batch).unwrap();
                // SAFETY: all that was recorded is alive, and none of its tensors was replaced.
                unsafe { graph.launch().unwrap() };
            } else {
                let mut slot = BatchSlot::new(device, &batch, MAX_TOKENS / PAGE_SIZE).unwrap();
                let batch = slot.put(batch).unwrap();
                let mut all_layers = || {
                    (0..LAYERS).try_for_each(|layer| {
                        let output = StepOutput { out: out.view_mut(), lse: None };
                        select.step(&mut cache, layer, &batch, inputs.step(), output)
                    })
                };
                all_layers().unwrap();
                slot_and_graph = captures.then(|| (slot, device.capture(all_layers).unwrap()));
            }
            outs.push(bits(&out));
        }
        (outs, cache.selection_stats().unwrap())
    };
    let ((eager, stats), captured) = (run(false), run(true));
    assert!((&eager, stats) == (&captured.0, captured.1), "on {}", device.name());
    assert!(stats.reused > 0 && stats.scored > 0, "{stats:?}");
}

/// Padding rows have queries of their own, and nothing to attend to.
fn padding_gets_zero_and_minus_infinity(device: &Device) {
    let config = config(Positions::Native);
    let mut run = Run::new(device, &config);
    let batch = run.grow(STEPS); // two rows and padding
    run.step(&batch).unwrap();
    let width = config.heads.num_qo_heads * config.heads.head_dim;
    let (out, lse) = (common::values(&run.out), common::values(&run.lse));
    assert!(out[..2 * width].iter().all(|x| *x != -77.0));
    assert!(out[2 * width..].iter().all(|&x| x == 0.0));
    assert!(lse[2 * config.heads.num_qo_heads..].iter().all(|&x| x == f64::NEG_INFINITY));
    assert_eq!(run.select.workspace().selected(2).unwrap(), [0u32; 0]);
}

fn what_cannot_be_recorded_is_refused(device: &Device) {
    let numbers = to_device(device, &tensor(DType::U32, &[1.0, 2.0], [2]));
    let allocate = device.capture(|| Tensor::zeros_on(device, DType::U32, [8]).map(drop));
    let read = device.capture(|| numbers.to_vec::<u32>().map(drop));
    let wait = device.capture(|| device.synchronize());
    for (result, op) in [(allocate, "allocating"), (read, "copying to the host"), (wait, "waiting")] {
        let text = result.unwrap_err().to_string();
        assert_eq!(text, format!("`{op}` needs to happen before the capture: run the work once first"));
    }
    // The device works on as before.
    assert_eq!(numbers.to_vec::<u32>().unwrap(), [1, 2]);
}

#[test]
fn the_processor_records_nothing() {
    let text = Device::cpu().capture(|| Ok(())).unwrap_err().to_string();
    assert_eq!(text, "cpu has no `capture` for any work");
}

/// Copies and zeroing are recorded in order, and done at each launch.
fn launches_repeat_what_was_recorded(device: &Device) {
    let numbers = to_device(device, &tensor(DType::U32, &[1.0, 2.0], [2]));
    let mut copy = Tensor::zeros_on(device, DType::U32, [2]).unwrap();
    let graph = device.capture(|| copy.copy_from(numbers.view())).unwrap();
    assert_eq!(copy.to_vec::<u32>().unwrap(), [0, 0], "recorded, not done");
    // SAFETY: both tensors are alive.
    unsafe { graph.launch().unwrap() };
    assert_eq!(copy.to_vec::<u32>().unwrap(), [1, 2]);
}

fn a_slot_takes_what_it_was_made_for(device: &Device) {
    let config = config(Positions::Native);
    let problem = |lengths: &[(usize, usize)]| Problem::new(&config, lengths, Content::Peaked, 1);
    let batch = |lengths: &[(usize, usize)], page_size: usize| {
        let problem = problem(lengths);
        let pool = common::paged::Pool::full(&problem, page_size, common::paged::Storage::Nhd, 1);
        pool.batch(&problem)
    };
    let mut slot = BatchSlot::new(device, &batch(&[(20, 1), (9, 1)], 4), 10).unwrap();
    slot.put(batch(&[(8, 1), (24, 1)], 4)).unwrap();
    slot.put(batch(&[(8, 1), (32, 1)], 4)).unwrap(); // all of the 10 pages
    let refused = [
        (
            batch(&[(8, 2), (24, 1)], 4),
            "batch: `qo_indptr` must be that of the slot, [0, 1, 2], got [0, 2, 3]",
        ),
        (batch(&[(8, 1), (24, 1)], 8), "batch: `page_size` must be that of the slot, 4, got 8"),
        (batch(&[(8, 1), (36, 1)], 4), "`pages of a slot` is limited to 10, the batch needs 11"),
    ];
    for (batch, want) in refused {
        assert_eq!(slot.put(batch).unwrap_err().to_string(), want);
    }
}

#[test]
fn tables_of_no_rows_need_one_entry() {
    let batch = Batch::new(4, vec![0], Default::default());
    assert!(matches!(batch, Err(Error::Table { .. })), "tables of no rows need one entry");
}
