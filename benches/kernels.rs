//! GPU kernels of a decode step over long contexts: median device time with a cold L2, against the time that reading
//! (and writing) the bytes would take at the device's copy bandwidth.
//!
//! `cargo bench --bench kernels -- [--quick] [csv file]`

use std::io::Write;

use half::bf16;
use tokenselect::{
    Batch, DType, Device, HeadShape, KvLayout, KvView, KvViewMut, Limits, PageTables, RowAction,
    SelectConfig, Tensor, TokenSelect,
};

const HEADS: HeadShape = HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
/// Larger than any L2.
const FLUSH_BYTES: usize = 512 << 20;
const REPEATS: usize = 21;

type Error = Box<dyn std::error::Error>;

/// Times work on the device, with the L2 flushed before each run.
struct Timer<'a> {
    device: &'a Device,
    flush: (Tensor, Tensor),
}

impl<'a> Timer<'a> {
    fn new(device: &'a Device) -> Result<Self, Error> {
        let half = || Tensor::zeros_on(device, DType::U32, [FLUSH_BYTES / 8]);
        Ok(Timer { device, flush: (half()?, half()?) })
    }

    /// Median time in microseconds.
    fn median(&mut self, mut work: impl FnMut() -> tokenselect::Result<()>) -> Result<f64, Error> {
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            self.flush.0.copy_from(self.flush.1.view())?;
            let begin = self.device.record()?;
            work()?;
            let end = self.device.record()?;
            times.push(self.device.elapsed(&begin, &end)?.as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPEATS / 2])
    }

    /// Bytes per second that a large copy reads and writes.
    fn copy_bandwidth(&mut self) -> Result<f64, Error> {
        let bytes = 2usize << 30;
        let from = Tensor::zeros_on(self.device, DType::U32, [bytes / 4])?;
        let mut to = Tensor::zeros_on(self.device, DType::U32, [bytes / 4])?;
        let time = self.median(|| to.copy_from(from.view()))?;
        Ok(2.0 * bytes as f64 / (time / 1e6))
    }
}

/// Random keys for `tokens` tokens. A short period is enough: nothing depends on the values.
fn noise(len: usize) -> Vec<bf16> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let period: Vec<bf16> = (0..1 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        })
        .collect();
    let mut noise = period.repeat(len.div_ceil(period.len()));
    noise.truncate(len);
    noise
}

/// One decode row over `tokens` tokens in pages that are shuffled.
fn batch(tokens: usize, page_size: usize) -> Result<Batch, Error> {
    let num_pages = tokens.div_ceil(page_size);
    let step = 7919; // a prime, so that multiples visit every page
    let indices = (0..num_pages).map(|i| (i * step % num_pages) as u32).collect();
    let last_page_len = vec![(tokens - (num_pages - 1) * page_size) as u32];
    let tables = PageTables { indptr: vec![0, num_pages as u32], indices, last_page_len };
    Ok(Batch::new(page_size, vec![0, 1], tables)?)
}

fn main() -> Result<(), Error> {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: {error}");
            return Ok(());
        }
    };
    let mut timer = Timer::new(&device)?;
    let bandwidth = timer.copy_bandwidth()?;
    println!("{}, kernels loaded in {:.0} ms", device.name(), device.load_time().as_secs_f64() * 1e3);
    println!("copy bandwidth {:.2} TB/s (read and written)", bandwidth / 1e12);
    let mut csv =
        std::env::args().filter(|arg| arg.ends_with(".csv")).map(std::fs::File::create).next().transpose()?;
    if let Some(csv) = &mut csv {
        writeln!(csv, "kernel,tokens,page_size,us,bytes,copy_tb_per_s")?;
    }
    println!(
        "{:>8} {:>8} {:>5} {:>10} {:>10} {:>9} {:>8}",
        "kernel", "tokens", "page", "us", "floor us", "K TB/s", "of floor"
    );

    let quick = std::env::args().any(|arg| arg == "--quick");
    let lengths: &[usize] =
        if quick { &[128 << 10, 1 << 20] } else { &[32 << 10, 128 << 10, 512 << 10, 1 << 20] };
    for &tokens in lengths {
        let width = HEADS.num_kv_heads * HEADS.head_dim;
        let keys = noise(tokens * width);
        for &page_size in if quick { &[16][..] } else { &[16, 1] } {
            let config = SelectConfig { heads: HEADS, ..SelectConfig::default() };
            let limits = Limits { max_kv_tokens: tokens, ..Limits::default() };
            let mut select = TokenSelect::new(&device, config, limits)?;
            let shape = [tokens / page_size, page_size, HEADS.num_kv_heads, HEADS.head_dim];
            let mut k = Tensor::from_slice_on(&device, &keys, shape)?;
            let mut v = Tensor::zeros_on(&device, DType::Bf16, shape)?;
            let q =
                Tensor::from_slice_on(&device, &noise(HEADS.num_qo_heads * HEADS.head_dim), [1, 32, 128])?;
            let new = Tensor::from_slice_on(&device, &noise(width), [1, HEADS.num_kv_heads, HEADS.head_dim])?;
            let batch = batch(tokens, page_size)?;

            let append = timer.median(|| {
                let kv = KvViewMut::new(k.view_mut(), v.view_mut(), KvLayout::Nhd)?;
                select.append(&batch, kv, new.view(), new.view())
            })?;
            let pool = timer.median(|| select.pool(&batch, q.view(), None))?;
            assert_eq!(select.workspace().actions()?[0], RowAction::Score, "long enough to be scored");
            let kv = KvView::new(k.view(), v.view(), KvLayout::Nhd)?;
            let score = timer.median(|| select.score(&batch, kv))?;

            let candidates = batch.candidates(0, select.config()).len();
            let key_bytes = candidates * width * 2;
            let rows = [
                ("append", append, 8 * width),
                ("pool", pool, 6 * HEADS.num_qo_heads * HEADS.head_dim),
                ("score", score, key_bytes + 4 * candidates * HEADS.num_qo_heads),
            ];
            for (kernel, time, bytes) in rows {
                let floor = bytes as f64 / bandwidth * 1e6;
                let rate =
                    if kernel == "score" { key_bytes as f64 / time / 1e6 } else { bytes as f64 / time / 1e6 };
                println!(
                    "{kernel:>8} {tokens:>8} {page_size:>5} {time:>10.1} {floor:>10.1} {rate:>9.3} {:>7.0}%",
                    100.0 * floor / time
                );
                if let Some(csv) = &mut csv {
                    writeln!(csv, "{kernel},{tokens},{page_size},{time:.2},{bytes},{:.3}", bandwidth / 1e12)?;
                }
            }
        }
    }
    Ok(())
}
