//! A whole decode step of one layer, dense against selected, on the CPU.
//!
//! Throughput counts the bytes of keys and values that the step must read.

mod common;

use std::time::Duration;

use common::{Fixture, Reuse, TOKEN_BYTES, config};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;

/// Selection of everything must equal dense attention, or the timings below compare nothing.
fn verify() {
    let mut fixture = Fixture::new(2000, Reuse::Never);
    fixture.decode(true);
    let dense = fixture.out.clone();
    fixture.out.fill(bf16::ZERO);
    fixture.decode(false);
    assert_eq!(dense, fixture.out, "2001 tokens are all selected");
}

fn decode(c: &mut Criterion) {
    verify();
    let selected = config(Reuse::Never).max_selected(1) as u64;
    let mut group = c.benchmark_group("decode_step");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for tokens in [4096usize, 16_384, 65_536] {
        let n = tokens as u64 + 1;
        let mut fixture = Fixture::new(tokens, Reuse::Never);
        group.throughput(Throughput::Bytes(2 * n * TOKEN_BYTES));
        group.bench_function(BenchmarkId::new("dense", tokens), |b| b.iter(|| fixture.decode(true)));
        group.throughput(Throughput::Bytes((n + 2 * selected) * TOKEN_BYTES));
        group.bench_function(BenchmarkId::new("selected_anew", tokens), |b| b.iter(|| fixture.decode(false)));
        let mut fixture = Fixture::new(tokens, Reuse::Always);
        fixture.decode(false);
        group.throughput(Throughput::Bytes(2 * selected * TOKEN_BYTES));
        group.bench_function(BenchmarkId::new("selected_reused", tokens), |b| {
            b.iter(|| fixture.decode(false))
        });
        let stats = fixture.cache.selection_stats().expect("counters");
        assert_eq!(stats.scored, 1, "all but the first step reuse");
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
