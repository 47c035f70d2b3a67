//! Each operation of a decode step on its own, on the CPU, over 16384 cached tokens.
//!
//! Throughput counts the bytes that the operation must read or write.

mod common;

use std::hint::black_box;
use std::time::Duration;

use common::{Fixture, HEADS, Reuse, TOKEN_BYTES, config};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokenselect::{KvView, StepOutput, TensorView, TensorViewMut};

const TOKENS: usize = 16_384;

fn steps(c: &mut Criterion) {
    let mut fixture = Fixture::new(TOKENS, Reuse::Never);
    let batch = fixture.batch();
    let Fixture { mut cache, mut select, q, k, v, mut out, .. } = fixture;
    let (hq, d) = (HEADS.num_qo_heads, HEADS.head_dim);
    let q = TensorView::new(&q, [1, hq, d]).expect("shape fits");
    let k = TensorView::new(&k, [1, HEADS.num_kv_heads, d]).expect("shape fits");
    let v = TensorView::new(&v, [1, HEADS.num_kv_heads, d]).expect("shape fits");
    let n = TOKENS as u64 + 1;
    let candidates = batch.candidates(0, &config(Reuse::Never)).len() as u64;
    let selected = config(Reuse::Never).max_selected(1) as u64;

    let mut group = c.benchmark_group("steps_16384");
    group.sample_size(30).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Bytes(2 * TOKEN_BYTES));
    group.bench_function("append", |b| {
        b.iter(|| {
            let (kv, _) = cache.layer_mut(0).expect("layer 0");
            select.append(&batch, kv, k, v).expect("append")
        })
    });
    group.throughput(Throughput::Bytes((hq * d * 2) as u64));
    group.bench_function("pool", |b| b.iter(|| select.pool(&batch, q, None).expect("pool")));

    let kv: KvView<'_> = cache.layer(0).expect("layer 0");
    group.throughput(Throughput::Bytes(candidates * TOKEN_BYTES));
    group.bench_function("score", |b| b.iter(|| select.score(&batch, kv).expect("score")));
    group.throughput(Throughput::Bytes(candidates * hq as u64 * 4));
    group.bench_function("vote", |b| b.iter(|| select.vote(&batch).expect("vote")));
    group.throughput(Throughput::Bytes(candidates * 4));
    group.bench_function("top_k", |b| b.iter(|| select.top_k(&batch, None).expect("top_k")));
    let list = select.workspace().selected(0).expect("row 0");
    assert_eq!(list.len() as u64, selected, "the windows and the top-k");

    let mut attend = |group: &mut criterion::BenchmarkGroup<'_, _>, name: &str, dense: bool, bytes: u64| {
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(name, |b| {
            b.iter(|| {
                let out = TensorViewMut::new(&mut out, [1, hq, d]).expect("shape fits");
                let output = StepOutput { out, lse: None };
                let done = if dense {
                    select.attend_dense(&batch, kv, q, output)
                } else {
                    select.attend(&batch, kv, q, output)
                };
                black_box(done).expect("attend")
            })
        });
    };
    attend(&mut group, "attend_selected", false, 2 * selected * TOKEN_BYTES);
    attend(&mut group, "attend_dense", true, 2 * n * TOKEN_BYTES);

    let parts: Vec<f32> = (0..8 * hq * d).map(|i| (i % 13) as f32).collect();
    let lses: Vec<f32> = (0..8 * hq).map(|i| (i % 5) as f32).collect();
    let mut merged = vec![0.0f32; hq * d];
    group.throughput(Throughput::Bytes((8 * hq * d * 4) as u64));
    group.bench_function("merge_8_parts", |b| {
        b.iter(|| {
            let parts = TensorView::new(&parts, [8, 1, hq, d]).expect("shape fits");
            let lses = TensorView::new(&lses, [8, 1, hq]).expect("shape fits");
            let out = TensorViewMut::new(&mut merged, [1, hq, d]).expect("shape fits");
            select.merge(parts, lses, StepOutput { out, lse: None }).expect("merge")
        })
    });
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
