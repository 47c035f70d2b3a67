//! Time by the device's own clock, with a cold L2.

use std::time::Duration;

use kernels_gpu::read_all::ReadAllParams;
use kernels_gpu::simt::global::{GlobalMut, GlobalPtr};
use tokenselect::{DType, Device, Event, Result, Tensor};

/// Larger than any L2.
const FLUSH_BYTES: usize = 512 << 20;

/// Times work on a device between two events of its stream, the L2 flushed before.
pub struct Timer {
    device: Device,
    /// Leave the L2 as it is: what a kernel costs whose code, tables and lists are there.
    pub warm: bool,
    flush: (Tensor, Tensor),
}

impl Timer {
    /// For a GPU, or for the emulated one, whose L2 is not flushed.
    pub fn new(device: &Device) -> Result<Self> {
        let bytes = if device.name().starts_with("cuda") { FLUSH_BYTES } else { 64 };
        let half = || Tensor::zeros_on(device, DType::U32, [bytes / 8]);
        Ok(Timer { device: device.clone(), warm: false, flush: (half()?, half()?) })
    }

    /// The time of one run of `work`.
    pub fn once(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        if !self.warm {
            self.flush.0.copy_from(self.flush.1.view())?;
        }
        let begin: Event = self.device.record()?;
        work()?;
        let end = self.device.record()?;
        self.device.elapsed(&begin, &end)
    }

    /// Median of `repeats` samples.
    pub fn median(
        &mut self,
        repeats: usize,
        mut sample: impl FnMut(&mut Timer) -> Result<Duration>,
    ) -> Result<Duration> {
        let mut times = (0..repeats).map(|_| sample(self)).collect::<Result<Vec<_>>>()?;
        times.sort_unstable();
        Ok(times[repeats / 2])
    }

    /// Bytes per second at which a tensor, many times the size of the L2, is read. Zeros would be read faster than noise.
    pub fn read_bandwidth(&mut self, from: &Tensor) -> Result<f64> {
        let bytes = from.shape().checked_len().unwrap_or(0) * from.dtype().size();
        let out = Tensor::zeros_on(&self.device, DType::U32, [1])?;
        let params = ReadAllParams {
            from: GlobalPtr::from_addr(from.view().device_addr()?),
            out: GlobalMut::from_addr(out.view().device_addr()?),
            num_quads: (bytes / 16) as u64,
        };
        let device = self.device.clone();
        // SAFETY: the kernel's parameters, over two tensors that live until the work is timed.
        let mut read = || unsafe { device.launch("read_all", params.dims(), &params) };
        let time = self.median(11, |timer| timer.once(&mut read))?;
        Ok(bytes as f64 / time.as_secs_f64())
    }

    /// Bytes per second that a copy of `from` reads and writes.
    pub fn copy_bandwidth(&mut self, from: &Tensor) -> Result<f64> {
        let mut to = Tensor::zeros_on(&self.device, from.dtype(), from.shape())?;
        let time = self.median(11, |timer| timer.once(&mut || to.copy_from(from.view())))?;
        let bytes = from.shape().checked_len().unwrap_or(0) * from.dtype().size();
        Ok(2.0 * bytes as f64 / time.as_secs_f64())
    }
}
