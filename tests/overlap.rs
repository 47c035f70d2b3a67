//! Launches of whole steps overlap: on a GPU each begins while those before it may still run, and the emulator reports what
//! it then may not touch. With or without waiting in between, the results are the same bits; but for attention over all
//! tokens in a recorded step, which is cut into as many splits as where it was recorded.

mod common;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem, cached, small_config};
use common::run::{Inputs, outputs_on};
use common::{assert_close, gpu_tolerance, on_devices, values};
use tokenselect::{
    Batch, BatchSlot, Buffer, CacheConfig, DType, Device, Graph, HeadShape, Limits, Over, PagedKvCache,
    Positions, Result, Rope, SelectConfig, SequenceId, StepInput, StepOutput, Tensor, TensorView,
    TokenSelect,
};

on_devices! {
    gpus:
        steps_give_the_same_with_and_without_waiting, what_was_just_appended_can_be_scored,
        a_recording_does_not_hide_what_was_appended, an_output_can_be_read_by_the_next_operation;
}

const LAYERS: usize = 2;
const STEPS: u64 = 2;
const LENGTHS: [usize; 2] = [70, 9];
/// Of small pages keys are loaded by lanes, of large ones copied in bulk.
const PAGE_SIZES: [usize; 2] = [8, 16];
const MAX_TOKENS: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The host waits after each operation.
    Waits,
    Overlaps,
    /// A step is recorded once, and launched again.
    Replayed,
}

/// Everything that steps work on.
struct Run {
    device: Device,
    cache: PagedKvCache,
    ids: Vec<SequenceId>,
    select: TokenSelect,
    inputs: Inputs,
    /// Of the selected tokens, of these merged as the only part of a list, of the operations one by one, and of all tokens.
    outs: [(Tensor, Tensor); 4],
}

impl Run {
    fn new(device: &Device, config: &SelectConfig, block: usize, page_size: usize) -> Self {
        let limits = Limits { max_rows: 2, max_block_len: 128, max_kv_tokens: 2 * MAX_TOKENS };
        let cache_config = CacheConfig {
            num_layers: LAYERS,
            num_pages: 2 * MAX_TOKENS / page_size,
            page_size,
            max_sequences: 2,
            ..CacheConfig::default()
        };
        let mut cache = PagedKvCache::new(device, config, &cache_config).unwrap();
        let ids: Vec<_> = (0..2).map(|_| cache.create().unwrap()).collect();
        let mut select = TokenSelect::new(device, config.clone(), limits).unwrap();
        let prompts = Problem::new(config, &LENGTHS.map(|len| (len, len)), Content::Peaked, 3);
        let growth: Vec<_> = ids.iter().copied().zip(LENGTHS).collect();
        let batch = cache.extend(&growth).unwrap();
        let inputs = Inputs::new(&prompts).to(device);
        let (mut out, _) = outputs_on(device, &prompts, DType::F32);
        for layer in 0..LAYERS {
            let output = StepOutput { out: out.view_mut(), lse: None };
            select.step(&mut cache, layer, &batch, inputs.step(), output).unwrap();
        }
        let problem = blocks(config, block, 0);
        let outs = [(); 4].map(|()| outputs_on(device, &problem, DType::F32));
        Run { device: device.clone(), cache, ids, select, inputs: Inputs::new(&problem).to(device), outs }
    }

    /// The next step's tokens.
    fn grow(&mut self, block: usize, step: u64) -> Batch {
        let fresh = Inputs::new(&blocks(self.select.config(), block, step));
        self.inputs.q.copy_from(fresh.q.view()).unwrap();
        self.inputs.k.copy_from(fresh.k.view()).unwrap();
        self.inputs.v.copy_from(fresh.v.view()).unwrap();
        let growth: Vec<_> = self.ids.iter().map(|&id| (id, block)).collect();
        self.cache.extend(&growth).unwrap()
    }

    /// For every layer: a step, its output merged with nothing, operations one by one in an order that no step has, and the
    /// step with dense attention.
    fn step(&mut self, batch: &Batch, waits: bool) -> Result<()> {
        let Run { device, cache, select, inputs, outs, .. } = self;
        let wait = || if waits { device.synchronize() } else { Ok(()) };
        let [selected, merged, apart, dense] = outs;
        for layer in 0..LAYERS {
            let output = StepOutput { out: selected.0.view_mut(), lse: Some(selected.1.view_mut()) };
            select.step(cache, layer, batch, inputs.step(), output)?;
            wait()?;
            let output = StepOutput { out: merged.0.view_mut(), lse: Some(merged.1.view_mut()) };
            select.merge(as_part(device, &selected.0)?, as_part(device, &selected.1)?, output)?;
            wait()?;
            select.append(batch, cache.layer_mut(layer)?.kv, inputs.k.view(), inputs.v.view())?;
            wait()?;
            select.score(batch, cache.layer(layer)?)?;
            wait()?;
            let output = StepOutput { out: apart.0.view_mut(), lse: Some(apart.1.view_mut()) };
            select.attend(batch, cache.layer(layer)?, inputs.q.view(), Over::Selected, output)?;
            wait()?;
            let output = StepOutput { out: dense.0.view_mut(), lse: Some(dense.1.view_mut()) };
            select.step_dense(cache, layer, batch, inputs.step(), output)?;
            wait()?;
        }
        Ok(())
    }

    fn results(&self) -> Results {
        self.outs.each_ref().map(|(out, lse)| [values(out), values(lse)])
    }
}

/// Each of the outputs and its log-sum-exps.
type Results = [[Vec<f64>; 2]; 4];

/// The tensor as the only one of some parts.
fn as_part<'a>(device: &'a Device, tensor: &'a Tensor) -> Result<TensorView<'a>> {
    let view = tensor.view();
    let shape = view.shape();
    let addr = view.device_addr()?;
    // SAFETY: the tensor is alive, and has as many elements.
    match shape.dims() {
        &[tokens, heads] => unsafe {
            TensorView::from_device_addr(device, addr, DType::F32, [1, tokens, heads])
        },
        &[tokens, heads, dim] => unsafe {
            TensorView::from_device_addr(device, addr, DType::F32, [1, tokens, heads, dim])
        },
        other => panic!("an output of shape {other:?}"),
    }
}

/// A step's queries, keys and values; two steps resemble each other, so that selections are reused.
fn blocks(config: &SelectConfig, block: usize, step: u64) -> Problem {
    Problem::new(config, &[(block, block); 2], Content::Peaked, 100 + step / 2)
}

fn run(device: &Device, config: &SelectConfig, block: usize, page_size: usize, way: Way) -> Vec<Results> {
    let mut run = Run::new(device, config, block, page_size);
    let mut slot_and_graph: Option<(BatchSlot, Graph)> = None;
    let mut all = Vec::new();
    for step in 0..STEPS {
        let batch = run.grow(block, step);
        if way != Way::Replayed {
            run.step(&batch, way == Way::Waits).unwrap();
        } else if let Some((slot, graph)) = &mut slot_and_graph {
            slot.put(batch).unwrap();
            // SAFETY: all that was recorded is alive, and none of its tensors was replaced.
            unsafe { graph.launch().unwrap() };
        } else {
            let mut slot = BatchSlot::new(device, &batch, 2 * MAX_TOKENS / page_size).unwrap();
            let batch = slot.put(batch).unwrap();
            run.step(&batch, false).unwrap();
            let graph = device.capture(|| run.step(&batch, false)).unwrap();
            slot_and_graph = Some((slot, graph));
        }
        all.push(run.results());
    }
    all
}

fn steps_give_the_same_with_and_without_waiting(device: &Device) {
    let base = SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 },
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 20,
        top_k: 24,
        ..small_config()
    };
    let reassigned = || Positions::Reassigned(Rope::default());
    let other = HeadShape { head_dim: 96, ..base.heads };
    let cases = [
        (1, base.clone()),
        (1, cached(SelectConfig { heads: other, ..base.clone() }, 0.7, Some(3))),
        (1, SelectConfig { n_local: 5, positions: reassigned(), vote_pool_window: 3, ..base.clone() }),
        (33, cached(SelectConfig { positions: reassigned(), ..base.clone() }, 0.7, None)),
        (7, base),
    ];
    let cases = cases.iter().enumerate().flat_map(|case| PAGE_SIZES.map(|page_size| (case, page_size)));
    for ((case, (block, config)), page_size) in cases {
        let want = run(device, config, *block, page_size, Way::Waits);
        for way in [Way::Overlaps, Way::Replayed] {
            let got = run(device, config, *block, page_size, way);
            let what = format!("case {case}, pages of {page_size}, {way:?}, on {}", device.name());
            for (got, want) in got.iter().zip(&want) {
                let ([.., dense], [.., want_dense]) = (got, want);
                assert!(got[..3] == want[..3], "{what}");
                if way == Way::Replayed {
                    let width = config.heads.head_dim;
                    let tolerance = gpu_tolerance(config.dtype);
                    assert_close(&what, &dense[0], &want_dense[0], width, tolerance);
                    assert_close(&what, &dense[1], &want_dense[1], 1, 1e-5);
                } else {
                    assert!(dense == want_dense, "{what}");
                }
            }
        }
    }
}

/// Operations one by one may score what was appended a moment ago, which no step does: here all tokens, as a part of
/// sequences of which the block is another part.
fn what_was_just_appended_can_be_scored(device: &Device) {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 2, n_local: 3, ..small_config() };
    let lengths = [(40, 1), (75, 9)];
    let problem = Problem::new(&config, &lengths, Content::Peaked, 3);
    for page_size in PAGE_SIZES {
        let [want, got] = [true, false].map(|waits| {
            let wait = || {
                if waits {
                    device.synchronize().unwrap()
                }
            };
            let mut pool = Pool::before_block(&problem, page_size, Storage::Nhd, 4).to(device);
            let inputs = Inputs::new(&problem).to(device);
            let whole = pool.batch(&problem);
            let candidates = lengths.map(|(len, _)| 0..len as u32).into();
            let part = Batch::partial(page_size, problem.qo_indptr(), pool.tables.clone(), candidates);
            let part = part.unwrap();
            let mut select = TokenSelect::new(device, config.clone(), limits(&whole)).unwrap();
            select.pool(&part, inputs.q.view(), None).unwrap();
            wait();
            select.append(&whole, pool.view_mut(), inputs.k.view(), inputs.v.view()).unwrap();
            wait();
            select.score(&part, pool.view()).unwrap();
            values(select.workspace().buffer(Buffer::Logits))
        });
        assert!(got == want, "pages of {page_size} on {}", device.name());
    }
}

/// What is recorded is not launched, and so says nothing of what runs before the next launch.
fn a_recording_does_not_hide_what_was_appended(device: &Device) {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 2, n_local: 20, ..small_config() };
    let mut run = Run::new(device, &config, 1, PAGE_SIZES[0]);
    let batch = run.grow(1, 0);
    run.step(&batch, false).unwrap();
    let Run { cache, select, inputs, outs: [selected, ..], .. } = &mut run;
    let mut attend = |select: &mut TokenSelect, between: &mut dyn FnMut(&mut TokenSelect)| {
        select.append(&batch, cache.layer_mut(0).unwrap().kv, inputs.k.view(), inputs.v.view()).unwrap();
        between(select);
        let output = StepOutput { out: selected.0.view_mut(), lse: None };
        select.attend(&batch, cache.layer(0).unwrap(), inputs.q.view(), Over::Selected, output).unwrap();
        values(&selected.0)
    };
    let want = attend(select, &mut |_| device.synchronize().unwrap());
    for fails in [false, true] {
        let got = attend(select, &mut |select| {
            let recorded = device.capture(|| {
                select.vote(&batch)?;
                if fails { device.synchronize() } else { Ok(()) }
            });
            assert_eq!(recorded.is_err(), fails);
        });
        assert!(got == want, "on {}", device.name());
    }
}

/// An output may be the queries, keys or values of the next operation.
fn an_output_can_be_read_by_the_next_operation(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 2, n_local: 20, ..small_config() };
    let [want, got] = [true, false].map(|waits| {
        let wait = || {
            if waits {
                device.synchronize().unwrap()
            }
        };
        let mut run = Run::new(device, &config, 1, PAGE_SIZES[0]);
        let batch = run.grow(1, 0);
        run.step(&batch, false).unwrap();
        let Run { cache, select, inputs, outs: [(out, lse), ..], .. } = &mut run;
        let [mut first, mut second] =
            [(); 2].map(|()| Tensor::zeros_on(device, config.dtype, inputs.q.view().shape()).unwrap());
        let mut results = Vec::new();
        for reader in 0..4 {
            let part = as_part(device, out).unwrap();
            let lses = as_part(device, lse).unwrap();
            select.merge(part, lses, StepOutput { out: first.view_mut(), lse: None }).unwrap();
            wait();
            let kv = cache.layer_mut(0).unwrap().kv;
            match reader {
                0 => select.pool(&batch, first.view(), None).unwrap(),
                1 => select.append(&batch, kv, first.view(), inputs.v.view()).unwrap(),
                2 => select.append(&batch, kv, inputs.k.view(), first.view()).unwrap(),
                _ => {}
            }
            wait();
            let output = StepOutput { out: second.view_mut(), lse: None };
            select.attend(&batch, cache.layer(0).unwrap(), first.view(), Over::Selected, output).unwrap();
            wait();
            // Attention's own output is the next step's queries.
            let input = StepInput { q: second.view(), k: second.view(), v: second.view() };
            let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
            select.step(cache, 0, &batch, input, output).unwrap();
            results.push((values(&second), values(out)));
        }
        results
    });
    assert!(got == want, "on {}", device.name());
}
