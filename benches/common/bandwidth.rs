//! How fast the GPU's memory can be read, by a kernel that does nothing else.

use cust::context::Context;
use cust::device::{Device, DeviceAttribute};
use cust::event::{Event, EventFlags};
use cust::launch;
use cust::memory::DeviceBuffer;
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};

const PTX: &str = include_str!("read_all.ptx");
const THREADS: u32 = 256;
const BLOCKS_PER_SM: u32 = 8;
const REPEATS: usize = 11;

/// Bytes per second at which memory of device 0, many times the size of its L2, is read. Median of 11 runs. Zeros would be
/// read faster than noise.
///
/// # Safety
/// - `from` is the address of `bytes` bytes of device 0, which a living [`tokenselect::Device`] allocated; nothing writes
///   them, and what wrote them has ended.
pub unsafe fn read_bandwidth(from: u64, bytes: usize) -> cust::error::CudaResult<f64> {
    cust::init(cust::CudaFlags::empty())?;
    let device = Device::get_device(0)?;
    let sms = device.get_attribute(DeviceAttribute::MultiprocessorCount)? as u32;
    let _context = Context::new(device)?;
    let module = Module::from_ptx(PTX, &[])?;
    let read_all = module.get_function("read_all")?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    let blocks = BLOCKS_PER_SM * sms;
    let turn = 4 * u64::from(blocks * THREADS);
    let count = bytes as u64 / 16 / turn * turn;
    let sink: DeviceBuffer<u64> = DeviceBuffer::zeroed(1)?;
    let (begin, end) = (Event::new(EventFlags::DEFAULT)?, Event::new(EventFlags::DEFAULT)?);
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let sink = sink.as_device_ptr();
        begin.record(&stream)?;
        // SAFETY: `count` pieces of 16 bytes, a multiple of four times the number of threads, lie within `bytes`; `sink`
        // has room for a word.
        unsafe { launch!(read_all<<<blocks, THREADS, 0, stream>>>(from, sink, count))? };
        end.record(&stream)?;
        end.synchronize()?;
        times.push(end.elapsed_time_f32(&begin)?);
    }
    times.sort_by(f32::total_cmp);
    Ok(16.0 * count as f64 / (f64::from(times[REPEATS / 2]) / 1e3))
}
