//! The emulated device: runs the kernels on the CPU, lane by lane, and reports races, out-of-bounds accesses and
//! divergence as [`Error::Launch`].

use std::sync::{Mutex, MutexGuard};
use std::thread::{self, ThreadId};
use std::time::Instant;

use tokenselect_kernels::emu::{Launch, Memory, Options};
use tokenselect_kernels::entries::Entry;
use tokenselect_kernels::launch::{Dims, GpuInfo, Limits};

use super::{
    Captured, Driver, Event, LaunchOrder, check_launch, out_of_memory, recorded_by_another, while_capturing,
};
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
    recorded: Mutex<Option<Recorded>>,
}

/// Work that a thread records.
#[derive(Debug)]
struct Recorded {
    by: ThreadId,
    commands: Vec<Command>,
}

/// Bytes of the largest allocation.
const MAX_ALLOCATION: usize = 8 << 30;

/// One piece of recorded work.
#[derive(Clone, Debug)]
pub(crate) enum Command {
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
        let limits = if options.warpgroups { Limits::SM_90 } else { Limits::SM_80 };
        EmulatedDriver::with_limits(options, limits)
    }

    /// [`new`](Self::new) with other limits.
    pub fn with_limits(options: Options, limits: Limits) -> Self {
        // Whatever can be streamed is: what the emulator runs is short.
        let gpu =
            GpuInfo { num_sms: NUM_SMS, limits, bulk_copies: options.warpgroups, score_stream_bytes: 0 };
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

    fn recorded(&self) -> MutexGuard<'_, Option<Recorded>> {
        self.recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Records the command if a capture is under way; says whether it was recorded.
    fn record_command(&self, op: &'static str, command: impl FnOnce() -> Command) -> Result<bool> {
        match self.recorded().as_mut() {
            None => Ok(false),
            Some(recorded) if recorded.by == thread::current().id() => {
                recorded.commands.push(command());
                Ok(true)
            }
            Some(_) => Err(recorded_by_another(op)),
        }
    }

    /// The error for `op` while a capture is under way.
    fn expect_no_capture(&self, op: &'static str) -> Result<()> {
        match self.recorded().as_ref() {
            None => Ok(()),
            Some(recorded) if recorded.by == thread::current().id() => Err(while_capturing(op)),
            Some(_) => Err(recorded_by_another(op)),
        }
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
        if bytes > MAX_ALLOCATION || Vec::<u8>::new().try_reserve_exact(2 * bytes).is_err() {
            return Err(out_of_memory(self.name(), bytes));
        }
        Ok(self.memory().0.alloc_bytes("allocation", bytes))
    }

    fn free(&self, addr: u64) {
        self.memory().0.free(addr);
    }

    fn zero(&self, addr: u64, bytes: usize) -> Result<()> {
        if !self.record_command("zeroing", || Command::Zero { addr, bytes })? {
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
        if self.record_command("copying", || Command::Copy { to, from, bytes })? {
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
        let command = || Command::Launch { entry, dims, params: params.to_vec(), overlaps };
        if self.record_command("launching", command)? {
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

    fn has_passed(&self, _: &Event) -> Result<bool> {
        Ok(true) // work is done when the call that asks for it returns
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        match (from.0.downcast_ref::<Instant>(), to.0.downcast_ref::<Instant>()) {
            (Some(from), Some(to)) => Ok(to.duration_since(*from).as_secs_f32() * 1e3),
            _ => Err(Error::Missing { op: "elapsed", needs: "events of this device" }),
        }
    }

    fn begin_capture(&self) -> Result<()> {
        self.expect_no_capture("capture")?;
        *self.recorded() = Some(Recorded { by: thread::current().id(), commands: Vec::new() });
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured> {
        let recorded = self.recorded().take();
        Ok(Captured(Box::new(recorded.map(|recorded| recorded.commands).unwrap_or_default())))
    }

    unsafe fn replay(&self, captured: &Captured) -> Result<()> {
        let Some(commands) = captured.0.downcast_ref::<Vec<Command>>() else {
            return Err(Error::Missing { op: "launch", needs: "a graph of this device" });
        };
        self.expect_no_capture("replaying")?;
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
