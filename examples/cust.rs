//! Streams and buffers of `cust`, lent to the library: its work is in the order of the stream, and both are the caller's again
//! afterwards. Needs an NVIDIA GPU.

use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use tokenselect::half::bf16;
use tokenselect::*;

const HEADS: HeadShape = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    if let Err(error) = Device::cuda(0) {
        println!("skipped: {error}");
        return Ok(());
    }
    let _context = cust::quick_init()?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    // The bits of bf16 numbers: `cust` copies integers and floats alone.
    let buffer = |heads: usize, value| {
        DeviceBuffer::from_slice(&vec![bf16::from_f32(value).to_bits(); heads * HEADS.head_dim])
    };
    let (q, k, v, out) = (buffer(8, 0.5)?, buffer(2, 0.5)?, buffer(2, 0.25)?, buffer(8, 0.0)?);
    {
        // SAFETY: the stream outlives the device, the cache and the workspace, which end with this block.
        let device = unsafe { Device::cuda_on_stream(0, stream.as_inner().cast())? };
        let config = SelectConfig { heads: HEADS, dtype: DType::Bf16, ..SelectConfig::default() };
        let mut cache = PagedKvCache::new(&device, &config, &CacheConfig::default())?;
        let mut select = TokenSelect::new(&device, config, Limits::default())?;
        let sequence = cache.create()?;
        let batch = cache.extend(&[(sequence, 1)])?;
        let shape = |heads: usize| [1, heads, HEADS.head_dim];
        let view = |buffer: &DeviceBuffer<u16>, heads| {
            // SAFETY: the buffer has that many elements and outlives the work, which the stream has done before it is read below.
            unsafe {
                TensorView::from_device_addr(
                    &device,
                    buffer.as_device_ptr().as_raw(),
                    DType::Bf16,
                    shape(heads),
                )
            }
        };
        // SAFETY: as above, and nothing else has `out`.
        let written = unsafe {
            TensorViewMut::from_device_addr(&device, out.as_device_ptr().as_raw(), DType::Bf16, shape(8))?
        };
        let input = StepInput { q: view(&q, 8)?, k: view(&k, 2)?, v: view(&v, 2)? };
        select.step(&mut cache, 0, &batch, input, StepOutput { out: written, lse: None })?;
        stream.synchronize()?;
    }
    let mut host = vec![0; out.len()];
    out.copy_to(&mut host)?;
    assert!(host.iter().all(|&value: &u16| bf16::from_bits(value).to_f32() == 0.25)); // one token: its value is the result
    println!("a step in a stream of cust's, in and out of its buffers");
    Ok(())
}
