//! Criterion measurements that run on the processor and on a GPU.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use tokenselect::Device;

use super::short_name;
use super::timer::Timer;

/// A group of measurements on one device: by the wall on the processor, by the device's events and with a cold L2 on a GPU.
pub struct Group<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    timer: Option<Timer>,
}

impl<'a> Group<'a> {
    /// A group called after the device.
    pub fn new(c: &'a mut Criterion, device: &Device, name: &str) -> Self {
        let mut group = c.benchmark_group(format!("{}_{name}", short_name(device)));
        let timer = (!device.is_cpu()).then(|| Timer::new(device).expect("memory to flush the L2 with"));
        // Flushing takes longer than most of what is timed and does not count.
        let (warm_up, measurement) = if timer.is_some() { (20, 100) } else { (400, 2500) };
        group
            .sample_size(20)
            .sampling_mode(SamplingMode::Flat)
            .warm_up_time(Duration::from_millis(warm_up))
            .measurement_time(Duration::from_millis(measurement));
        Group { group, timer }
    }

    /// Measures `work`, which moves `bytes`.
    pub fn bench(
        &mut self,
        name: &str,
        tokens: usize,
        bytes: usize,
        mut work: impl FnMut() -> tokenselect::Result<()>,
    ) {
        self.group.throughput(Throughput::Bytes(bytes as u64));
        let timer = &mut self.timer;
        self.group.bench_function(BenchmarkId::new(name, tokens), |bencher| match timer {
            None => bencher.iter(|| work().expect("valid arguments")),
            Some(timer) => bencher.iter_custom(|iterations| {
                (0..iterations).map(|_| timer.once(&mut work).expect("valid arguments")).sum()
            }),
        });
    }
}
