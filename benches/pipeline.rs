//! A whole decode step of one layer, dense against selected, on the processor and, where there is one, on a GPU (there
//! with a cold L2, by its own clock).
//!
//! Throughput counts the bytes that the step must move: its inputs read once, its outputs written once.

mod common;

use common::group::Group;
use common::{Layer, Pools, Spec, Step, devices};
use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use tokenselect::Device;

/// Selection of everything must equal dense attention, or the timings below compare nothing.
fn verify(device: &Device) {
    let spec = Spec::decode(2001);
    let mut pools = Pools::new(device, spec.num_elements()).expect("memory");
    let mut layer = Layer::new(device, &mut pools, &spec).expect("valid configuration");
    let mut run = |step| -> Vec<f32> {
        layer.clear_output().expect("a copy");
        layer.step(step).expect("valid arguments");
        layer.output().expect("a copy").into_iter().map(bf16::to_f32).collect()
    };
    let (dense, selected) = (run(Step::Dense), run(Step::Anew));
    let differ = dense.iter().zip(&selected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(differ < 2e-3, "2001 tokens are all selected, and outputs differ by {differ}");
}

fn decode(c: &mut Criterion) {
    for device in devices() {
        verify(&device);
        let contexts: &[usize] =
            if device.is_cpu() { &[4096, 16_384, 65_536] } else { &[32 << 10, 128 << 10, 1 << 20] };
        let largest = Spec::decode(contexts[contexts.len() - 1]).num_elements();
        let mut pools = Pools::new(&device, largest).expect("memory");
        let mut group = Group::new(c, &device, "decode_step");
        for &tokens in contexts {
            let spec = Spec::decode(tokens);
            let bytes = spec.bytes();
            let mut layer = Layer::new(&device, &mut pools, &spec).expect("valid configuration");
            group.bench("dense", tokens, bytes.step_dense, || layer.step(Step::Dense));
            group.bench("selected_anew", tokens, bytes.step_anew, || layer.step(Step::Anew));
            layer.check_lists().expect("a right selection");
            layer.step(Step::Reused).expect("valid arguments");
            group.bench("selected_reused", tokens, bytes.step_reused, || layer.step(Step::Reused));
            let stats = layer.stats().expect("counters");
            assert_eq!(stats.scored, 1, "all but the first step reuse");
        }
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
