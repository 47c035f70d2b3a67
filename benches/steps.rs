//! Each operation of a decode step on its own, on the processor and, where there is one, on a GPU (there with a cold L2,
//! by its own clock).
//!
//! Throughput counts the bytes that the operation must move: its inputs read once, its outputs written once.

mod common;

use common::group::Group;
use common::{HEADS, Layer, Pools, Spec, devices};
use criterion::{Criterion, criterion_group, criterion_main};
use tokenselect::{DType, Device, Limits, SelectConfig, StepOutput, Tensor, TokenSelect};

/// Partial outputs that are merged.
const PARTS: usize = 8;

fn steps(c: &mut Criterion) {
    for device in devices() {
        let tokens = if device.is_cpu() { 16_384 } else { 128 << 10 };
        let spec = Spec::decode(tokens);
        let bytes = spec.bytes();
        let mut pools = Pools::new(&device, spec.num_elements()).expect("memory");
        let mut layer = Layer::new(&device, &mut pools, &spec).expect("valid configuration");
        layer.select(false).expect("valid arguments");
        layer.check_lists().expect("a right selection");

        let mut group = Group::new(c, &device, "steps");
        group.bench("append", tokens, bytes.append, || layer.append());
        group.bench("pool", tokens, bytes.pool, || layer.pool());
        group.bench("score", tokens, bytes.score, || layer.score());
        group.bench("vote", tokens, bytes.vote, || layer.vote());
        group.bench("top_k", tokens, bytes.top_k, || layer.top_k());
        group.bench("select", tokens, bytes.select, || layer.select(false));
        group.bench("attend_selected", tokens, bytes.attend, || layer.attend());
        group.bench("attend_dense", tokens, bytes.dense, || layer.attend_dense());

        let mut layer =
            Layer::new(&device, &mut pools, &spec.clone().reassigned()).expect("valid configuration");
        layer.select(false).expect("valid arguments");
        group.bench("attend_selected_reassigned", tokens, bytes.attend, || layer.attend());

        let chunk = Spec::prefill(tokens, if device.is_cpu() { 64 } else { 512 });
        let mut layer = Layer::new(&device, &mut pools, &chunk).expect("valid configuration");
        layer.select(false).expect("valid arguments");
        group.bench("attend_selected_chunk", tokens, chunk.bytes().attend, || layer.attend());
        merge(&mut group, &device);
    }
}

fn merge(group: &mut Group<'_>, device: &Device) {
    let config = SelectConfig { heads: HEADS, ..SelectConfig::default() };
    let limits = Limits { max_block_len: 1, max_kv_tokens: 4096, ..Limits::default() };
    let select = TokenSelect::new(device, config, limits).expect("valid configuration");
    let (hq, d) = (HEADS.num_qo_heads, HEADS.head_dim);
    let parts: Vec<f32> = (0..PARTS * hq * d).map(|i| (i % 13) as f32).collect();
    let lses: Vec<f32> = (0..PARTS * hq).map(|i| (i % 5) as f32).collect();
    let parts = Tensor::from_slice_on(device, &parts, [PARTS, 1, hq, d]).expect("memory");
    let lses = Tensor::from_slice_on(device, &lses, [PARTS, 1, hq]).expect("memory");
    let mut merged = Tensor::zeros_on(device, DType::F32, [1, hq, d]).expect("memory");
    group.bench("merge_8_parts", 1, 4 * (PARTS * hq * (d + 1) + hq * d), || {
        let output = StepOutput { out: merged.view_mut(), lse: None };
        select.merge(parts.view(), lses.view(), output)
    });
}

criterion_group!(benches, steps);
criterion_main!(benches);
