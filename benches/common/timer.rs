//! Time by the device's own clock, with a cold L2.

use std::time::Duration;

use tokenselect::{DType, Device, Event, Result, Tensor};
use tokenselect_kernels::ops::read_all::ReadAllParams;
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};

/// Many times larger than any L2.
const FLUSH_BYTES: usize = 512 << 20;

/// Times work on a device between two events of its stream, the L2 flushed before: by reading, since lines that a flush has
/// written would be written back while the work is timed.
pub struct Timer {
    device: Device,
    /// Leave the L2 as it is: what a kernel costs whose code, tables and lists are there.
    pub warm: bool,
    /// What is read to flush the L2, and a word. The emulator has no L2.
    flush: Option<(Tensor, Tensor)>,
}

impl Timer {
    /// For a GPU, or for the emulated one.
    pub fn new(device: &Device) -> Result<Self> {
        let words = |bytes: usize| Tensor::zeros_on(device, DType::U32, [bytes / 4]);
        let has_l2 = device.name().starts_with("cuda");
        let flush = if has_l2 { Some((words(FLUSH_BYTES)?, words(4)?)) } else { None };
        Ok(Timer { device: device.clone(), warm: false, flush })
    }

    /// The time of one run of `work`.
    pub fn once(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        if let (false, Some((flush, out))) = (self.warm, &self.flush) {
            read_all(&self.device, flush, out)?;
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
        let bytes = num_bytes(from);
        let out = Tensor::zeros_on(&self.device, DType::U32, [1])?;
        let device = self.device.clone();
        let time = self.median(11, |timer| timer.once(&mut || read_all(&device, from, &out)))?;
        Ok(bytes as f64 / time.as_secs_f64())
    }

    /// Bytes per second that a copy of `from` reads and writes.
    pub fn copy_bandwidth(&mut self, from: &Tensor) -> Result<f64> {
        let mut to = Tensor::zeros_on(&self.device, from.dtype(), from.shape())?;
        let time = self.median(11, |timer| timer.once(&mut || to.copy_from(from.view())))?;
        let bytes = num_bytes(from);
        Ok(2.0 * bytes as f64 / time.as_secs_f64())
    }
}

fn num_bytes(tensor: &Tensor) -> usize {
    tensor.shape().checked_len().unwrap_or(0) * tensor.dtype().size()
}

/// Reads all of a tensor; `out` is a word.
fn read_all(device: &Device, from: &Tensor, out: &Tensor) -> Result<()> {
    let params = ReadAllParams {
        from: GlobalPtr::from_addr(from.view().device_addr()?),
        out: GlobalMut::from_addr(out.view().device_addr()?),
        num_quads: (num_bytes(from) / 16) as u64,
    };
    // SAFETY: the kernel's parameters, over two tensors that callers keep until the work is timed.
    unsafe { device.launch("read_all", params.dims(), &params) }
}
