//! What a step of one layer costs the host: checks, parameters and records of launches, without the driver's part.
//!
//! Measured on the emulated device while it records: a launch is then put into a list and nothing runs. On a GPU each
//! launch adds a call of the driver, about 2 µs. The row has a million tokens, most of them in one page, since no key is
//! read.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use tokenselect::{
    Batch, BatchSlot, CacheConfig, DType, Device, HeadShape, KvLayout, KvView, KvViewMut, LayerMut, Limits,
    Over, PageTables, PagedKvCache, Result, SelectConfig, SelectionCache, StepInput, StepOutput, Tensor,
    TokenSelect,
};

const HEADS: HeadShape = HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
const PAGE_SIZE: usize = 16;
const NUM_PAGES: usize = 1 << 16;

/// The time of `work`, as often as asked, recorded 64 at a time.
fn recorded(device: &Device, iterations: u64, mut work: impl FnMut() -> Result<()>) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = iterations;
    while left > 0 {
        let now = left.min(64);
        let graph = device.capture(|| {
            let begin = Instant::now();
            (0..now).try_for_each(|_| work())?;
            total += begin.elapsed();
            Ok(())
        });
        graph.expect("valid arguments");
        left -= now;
    }
    total
}

fn host(c: &mut Criterion) {
    let device = Device::emulated();
    let config = SelectConfig { heads: HEADS, ..SelectConfig::default() };
    let limits = Limits { max_rows: 1, max_block_len: 1, max_kv_tokens: NUM_PAGES * PAGE_SIZE };
    let mut ts = TokenSelect::new(&device, config.clone(), limits).expect("valid configuration");
    let zeros = |shape: [usize; 3]| Tensor::zeros_on(&device, DType::Bf16, shape).expect("memory");
    let (q, k, v) = (zeros([1, 32, 128]), zeros([1, 8, 128]), zeros([1, 8, 128]));
    let mut out = zeros([1, 32, 128]);
    let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
    let pool = || Tensor::zeros_on(&device, DType::Bf16, [2, PAGE_SIZE, 8, 128]).expect("memory");
    let (mut k_pages, mut v_pages) = (pool(), pool());
    let mut indices = vec![0; NUM_PAGES];
    indices[NUM_PAGES - 1] = 1;
    let tables = || PageTables {
        indptr: vec![0, NUM_PAGES as u32],
        indices: indices.clone(),
        last_page_len: vec![PAGE_SIZE as u32],
    };
    let batch = || Batch::new(PAGE_SIZE, vec![0, 1], tables()).and_then(|b| b.with_sequence_indices(vec![0]));
    let batch = batch().expect("valid tables");
    let mut slot = BatchSlot::new(&device, &batch, NUM_PAGES).expect("a GPU");
    let batch = slot.put(batch).expect("the slot's own");
    let mut selections = SelectionCache::new(&device, &config, 1, 1).expect("memory");

    let mut group = c.benchmark_group("host");
    group.bench_function("select_attend", |bencher| {
        bencher.iter_custom(|iterations| {
            recorded(&device, iterations, || {
                let kv = KvView::new(k_pages.view(), v_pages.view(), KvLayout::Nhd)?;
                ts.select(&batch, kv, q.view(), Some(selections.layer_mut(0)?))?;
                ts.attend(&batch, kv, q.view(), Over::Selected, StepOutput { out: out.view_mut(), lse: None })
            })
        });
    });
    group.bench_function("append_select_attend", |bencher| {
        bencher.iter_custom(|iterations| {
            recorded(&device, iterations, || {
                let pages = KvViewMut::new(k_pages.view_mut(), v_pages.view_mut(), KvLayout::Nhd)?;
                ts.append_select(
                    &batch,
                    LayerMut { kv: pages, selections: Some(selections.layer_mut(0)?) },
                    input,
                )?;
                let kv = KvView::new(k_pages.view(), v_pages.view(), KvLayout::Nhd)?;
                ts.attend(&batch, kv, q.view(), Over::Selected, StepOutput { out: out.view_mut(), lse: None })
            })
        });
    });
    group.finish();
    owned(c);
}

/// An owned cache, whose page tables grow.
fn owned(c: &mut Criterion) {
    let device = Device::cpu();
    let heads = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 8 };
    let config = SelectConfig { heads, selection_cache: None, ..SelectConfig::default() };
    let pages = CacheConfig { num_pages: NUM_PAGES + 4096, ..CacheConfig::default() };
    let mut cache = PagedKvCache::new(&device, &config, &pages).expect("memory");
    let id = cache.create().expect("a sequence");
    cache.extend(&[(id, NUM_PAGES * PAGE_SIZE)]).expect("pages");
    let mut group = c.benchmark_group("host");
    // Once a step, for all layers.
    group.bench_function("extend", |bencher| {
        bencher.iter_custom(|iterations| {
            let begin = Instant::now();
            for _ in 0..iterations {
                cache.extend(&[(id, 1)]).expect("a page");
                cache.truncate(id, NUM_PAGES * PAGE_SIZE).expect("shorter");
            }
            begin.elapsed()
        });
    });
    group.finish();
}

criterion_group!(benches, host);
criterion_main!(benches);
