//! The emulated device: runs the kernels on the CPU, lane by lane, and reports races, out-of-bounds accesses and
//! divergence as [`Error::Launch`].

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use kernels_gpu::emu::{Launch, Memory, Options};
use kernels_gpu::entries::Entry;
use kernels_gpu::launch::{Dims, GpuInfo, Limits};

use super::driver::{Captured, Driver, Event, LaunchOrder, check_launch, while_capturing};
use crate::error::{Error, Result};

/// A few SMs: enough that work is spread over blocks, few enough that small cases stay fast.
const NUM_SMS: u32 = 3;

/// A device without hardware.
#[derive(Debug)]
pub(crate) struct EmulatedDriver {
    gpu: GpuInfo,
    options: Options,
    memory: Mutex<DebugMemory>,
    order: LaunchOrder,
    /// What is being recorded.
    recorded: Mutex<Option<Vec<Command>>>,
}

/// One piece of recorded work.
#[derive(Clone, Debug)]
enum Command {
    Zero { addr: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Launch { entry: &'static Entry, dims: Dims, params: Vec<u8>, overlaps: bool },
}

struct DebugMemory(Memory);

impl std::fmt::Debug for DebugMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory")
    }
}

impl EmulatedDriver {
    /// A device with empty memory; `options` say what is checked and in which order lanes run. Launches overlap, as those
    /// of the CUDA driver do.
    pub fn new(options: Options) -> Self {
        // Whatever can be streamed is: what the emulator runs is short.
        let gpu =
            GpuInfo { num_sms: NUM_SMS, limits: Limits::SM_90, bulk_copies: true, score_stream_bytes: 0 };
        EmulatedDriver {
            gpu,
            options: Options { overlap: true, ..options },
            memory: Mutex::new(DebugMemory(Memory::new())),
            order: LaunchOrder::default(),
            recorded: Mutex::default(),
        }
    }

    fn memory(&self) -> MutexGuard<'_, DebugMemory> {
        self.memory.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn recorded(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        self.recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Records the command if a capture is under way; says whether it was recorded.
    fn record_command(&self, command: impl FnOnce() -> Command) -> bool {
        let mut recorded = self.recorded();
        recorded.as_mut().map(|commands| commands.push(command())).is_some()
    }

    /// The error for `op` while a capture is under way.
    fn expect_no_capture(&self, op: &'static str) -> Result<()> {
        if self.recorded().is_some() { Err(while_capturing(op)) } else { Ok(()) }
    }
}

impl Driver for EmulatedDriver {
    fn name(&self) -> &str {
        "emulated"
    }

    fn gpu(&self) -> &GpuInfo {
        &self.gpu
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.expect_no_capture("allocating")?;
        Ok(self.memory().0.alloc_bytes("allocation", bytes))
    }

    fn free(&self, addr: u64) {
        self.memory().0.free(addr);
    }

    fn zero(&self, addr: u64, bytes: usize) -> Result<()> {
        if !self.record_command(|| Command::Zero { addr, bytes }) {
            self.memory().0.copy_in(addr, &vec![0; bytes]);
        }
        Ok(())
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<()> {
        self.expect_no_capture("copying from the host")?;
        self.memory().0.copy_in(addr, from);
        Ok(())
    }

    fn read(&self, addr: u64, to: &mut [u8]) -> Result<()> {
        self.expect_no_capture("copying to the host")?;
        self.memory().0.copy_out(addr, to);
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if self.record_command(|| Command::Copy { to, from, bytes }) {
            return Ok(());
        }
        let mut buffer = vec![0; bytes];
        let mut memory = self.memory();
        memory.0.copy_out(from, &mut buffer);
        memory.0.copy_in(to, &buffer);
        Ok(())
    }

    fn order(&self) -> &LaunchOrder {
        &self.order
    }

    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8], overlaps: bool) -> Result<()> {
        check_launch(self, entry, &dims, params)?;
        if self.record_command(|| Command::Launch { entry, dims, params: params.to_vec(), overlaps }) {
            return Ok(());
        }
        // Parameter structs are aligned to 8 bytes at most.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        for (word, bytes) in aligned.iter_mut().zip(params.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(whole);
        }
        let params = aligned.as_slice();
        let memory = self.memory();
        if !overlaps {
            memory.0.synchronize();
        }
        let launch = Launch { kernel: entry.name, dims, memory: &memory.0, options: self.options };
        // SAFETY: the bytes are the entry's parameters, aligned; the kernel's rules are the caller's promise, and
        // the emulator checks every access.
        let done = launch.run(|| unsafe { (entry.run)(params.as_ptr().cast()) });
        match done {
            Ok(_) => Ok(()),
            Err(report) => {
                let device = self.name().to_owned();
                Err(Error::Launch { device, kernel: entry.name, reason: report.to_string() })
            }
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.expect_no_capture("waiting")?;
        self.memory().0.synchronize();
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        Ok(Event(Box::new(Instant::now())))
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        match (from.0.downcast_ref::<Instant>(), to.0.downcast_ref::<Instant>()) {
            (Some(from), Some(to)) => Ok(to.duration_since(*from).as_secs_f32() * 1e3),
            _ => Err(Error::Missing { op: "elapsed", needs: "events of this device" }),
        }
    }

    fn begin_capture(&self) -> Result<()> {
        self.expect_no_capture("capture")?;
        *self.recorded() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured> {
        Ok(Captured(Box::new(self.recorded().take().unwrap_or_default())))
    }

    unsafe fn replay(&self, captured: &Captured) -> Result<()> {
        let Some(commands) = captured.0.downcast_ref::<Vec<Command>>() else {
            return Err(Error::Missing { op: "launch", needs: "a graph of this device" });
        };
        // A graph begins when the work before it has ended, and the work behind it begins when the graph has.
        self.memory().0.synchronize();
        for command in commands {
            match command {
                Command::Zero { addr, bytes } => self.zero(*addr, *bytes)?,
                Command::Copy { to, from, bytes } => self.copy(*to, *from, *bytes)?,
                // SAFETY: the caller's promise.
                Command::Launch { entry, dims, params, overlaps } => unsafe {
                    self.launch(entry, *dims, params, *overlaps)?
                },
            }
        }
        self.memory().0.synchronize();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use kernels_gpu::ops::score::ScoreParams;

    use super::super::PREFETCHED_STAGES;
    use super::*;
    use crate::{
        CacheConfig, DType, Device, HeadShape, Limits, PagedKvCache, SelectConfig, SelectionCacheConfig,
        StepInput, StepOutput, Tensor, TokenSelect,
    };

    /// What a step over 80 tokens launches, of which one is new.
    fn launches_of_a_step(config: SelectConfig) -> Result<Vec<Command>> {
        let device = Device::emulated();
        let cache_config = CacheConfig { num_layers: 1, num_pages: 16, ..CacheConfig::default() };
        let mut cache = PagedKvCache::new(&device, &config, &cache_config)?;
        let heads = config.heads;
        let mut select = TokenSelect::new(&device, config, Limits::default())?;
        let id = cache.create()?;
        let mut commands = Vec::new();
        for block in [79, 1] {
            let numbers = vec![bf16::ONE; block * heads.num_qo_heads * heads.head_dim];
            let tensor = |num_heads: usize| {
                let numbers = &numbers[..block * num_heads * heads.head_dim];
                Tensor::from_slice_on(&device, numbers, [block, num_heads, heads.head_dim])
            };
            let (q, k, v) =
                (tensor(heads.num_qo_heads)?, tensor(heads.num_kv_heads)?, tensor(heads.num_kv_heads)?);
            let mut out = tensor(heads.num_qo_heads)?;
            let batch = cache.extend(&[(id, block)])?;
            let mut step = || {
                let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
                select.step(&mut cache, 0, &batch, input, StepOutput { out: out.view_mut(), lse: None })
            };
            step()?; // makes the tables
            let driver = device.backend().driver().expect("a GPU");
            driver.begin_capture()?;
            let done = step();
            let captured = driver.end_capture()?;
            done?;
            commands = *captured.0.downcast().expect("commands of this driver");
        }
        Ok(commands)
    }

    /// Stages of keys that a step's `score_stream` prefetches.
    fn prefetched_stages(config: SelectConfig) -> Option<u32> {
        launches_of_a_step(config).expect("a step").into_iter().find_map(|command| match command {
            Command::Launch { entry, params, .. } if entry.name.starts_with("score_stream") => {
                assert_eq!(params.len(), size_of::<ScoreParams<f16>>());
                // SAFETY: the bytes are the entry's parameters, which are the same for all element types.
                Some(
                    unsafe { params.as_ptr().cast::<ScoreParams<f16>>().read_unaligned() }
                        .overlap
                        .prefetched_stages(),
                )
            }
            _ => None,
        })
    }

    /// Prefetched where they are wanted for certain: not where a selection may be used again, and not where the
    /// launch before writes next to them.
    #[test]
    fn keys_are_prefetched_where_they_are_wanted() {
        let config = SelectConfig {
            heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 },
            dtype: DType::Bf16,
            n_init: 2,
            n_local: 20,
            top_k: 24,
            selection_cache: None,
            ..SelectConfig::default()
        };
        assert_eq!(prefetched_stages(config.clone()), Some(PREFETCHED_STAGES));
        assert_eq!(prefetched_stages(SelectConfig { n_local: 5, ..config.clone() }), Some(0));
        let selection_cache = Some(SelectionCacheConfig { similarity_threshold: 0.9, max_reuse: None });
        assert_eq!(prefetched_stages(SelectConfig { selection_cache, ..config }), Some(0));
    }
}
