//! Where operations run.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use tokenselect::{Event, Plan, Workspace};

use crate::config::{Config, plan_limits};
use crate::errors::{Failure, Result, fence};
use crate::fork::{Once, Process};
use crate::graph::Graph;
use crate::memory::{Buffer, Memory};
use crate::numbers::{of_class, whole_below};
use crate::slot::Slot;
use crate::uses::Uses;

/// Where tensors of a device lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    Cpu,
    Cuda(u32),
    Emulated,
}

impl Where {
    /// What PyTorch calls it, if it knows it.
    pub fn torch_name(self) -> Option<String> {
        match self {
            Where::Cpu => Some("cpu".to_owned()),
            Where::Cuda(ordinal) => Some(format!("cuda:{ordinal}")),
            Where::Emulated => None,
        }
    }
}

/// Where operations run: `Device.cpu()`, `Device.cuda(0)`, `Device.emulated()`.
///
/// Devices may be shared by threads, and live as long as anything that was made on them. They do not live on in a process that was
/// forked, nor does anything that was made on them: `multiprocessing` must start processes with `spawn`.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Device {
    inner: tokenselect::Device,
    place: Where,
    /// The raw stream, where it is the caller's.
    stream: Option<usize>,
    /// The caller's stream, which must live as long as the device.
    stream_object: Option<Py<PyAny>>,
    open: Slot<()>,
    /// What the device may still read, by the moment when it has done so; none where that cannot be told.
    kept: Mutex<Vec<Kept>>,
    process: Process,
}

/// Objects, and the moment when the device has read them.
type Kept = (Moment, Vec<Py<PyAny>>);

/// The processor's threads, of which this library has one pool.
static THREADS: Once = Once::new();
/// CUDA.
static CUDA: Once = Once::new();

/// A moment in a device's order of work.
pub(crate) struct Moment {
    /// None where it cannot be told whether it has passed.
    event: Option<Event>,
    /// What has passed stays so, even where the device fails later: the garbage collector asks twice, and must hear the same.
    has_passed: AtomicBool,
}

impl Moment {
    /// Whether the device's work before it is done. Does not wait.
    pub fn has_passed(&self, device: &Device) -> bool {
        if !self.has_passed.load(Ordering::Relaxed) {
            let ask = |event: &Event| device.inner.has_passed(event).unwrap_or(false);
            let is_over = device.process.is_gone() || self.event.as_ref().is_some_and(ask);
            self.has_passed.store(is_over, Ordering::Relaxed);
        }
        self.has_passed.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.inner)
    }
}

impl Device {
    fn new(
        inner: tokenselect::Device,
        place: Where,
        stream: Option<usize>,
        stream_object: Option<Py<PyAny>>,
    ) -> Self {
        let (open, kept, process) = (Slot::new("device", ()), Mutex::default(), Process::current());
        Device { inner, place, stream, stream_object, open, kept, process }
    }

    /// The library's device, for something new on it.
    pub fn get(&self) -> Result<&tokenselect::Device> {
        self.open.read()?.get()?;
        Ok(&self.inner)
    }

    /// The library's device, for something that is there already.
    pub fn inner(&self) -> &tokenselect::Device {
        &self.inner
    }

    /// Where its tensors lie.
    pub fn place(&self) -> Where {
        self.place
    }

    /// The caller's stream.
    pub fn stream(&self) -> Option<usize> {
        self.stream
    }

    /// Short name.
    pub fn name(&self) -> &str {
        self.inner.name()
    }

    /// Whether operations return before their work is done.
    pub fn is_asynchronous(&self) -> bool {
        self.place != Where::Cpu
    }

    /// Keeps objects until the work that was given to the device so far is done, and drops those whose work is.
    pub fn keep(&self, objects: Vec<Py<PyAny>>) {
        let now = self.now();
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push((now, objects));
        drop(self.take_done()); // which may run code of the objects' own
    }

    /// What was kept and the device has read.
    fn take_done(&self) -> Vec<Kept> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Moments are in the order of the device's work.
        let num_done = kept.iter().take_while(|(moment, _)| moment.has_passed(self)).count();
        kept.drain(..num_done).collect()
    }

    /// The end of the work that was given to the device so far.
    pub fn now(&self) -> Moment {
        let event = if self.process.is_gone() { None } else { self.inner.record().ok() };
        Moment { event, has_passed: AtomicBool::new(false) }
    }

    /// How many objects are kept.
    fn num_kept(&self) -> usize {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().map(|(_, objects)| objects.len()).sum()
    }

    /// Waits for the device's work; nothing is kept after it.
    fn wait(&self, py: Python<'_>) -> Result<()> {
        let inner = &self.inner;
        py.detach(|| inner.synchronize())?;
        let done = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        drop(done);
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !kept.is_empty() && !self.process.is_gone() {
            // A device that fails works no more.
            let _ = self.inner.synchronize();
        }
    }
}

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let from =
            "`Device.cpu()`, `Device.cuda(0, stream=torch.cuda.current_stream())` or `Device.emulated()`";
        fence(py, || Err(Failure::not_called("Device", from)))
    }

    /// The processor. Operations run on all its cores, and are done when they return.
    #[staticmethod]
    fn cpu(py: Python<'_>) -> PyResult<Self> {
        fence(py, || {
            THREADS.begin("device")?;
            Ok(Device::new(tokenselect::Device::cpu(), Where::Cpu, None, None))
        })
    }

    /// A CUDA device of compute capability 8.0 or newer.
    ///
    /// `stream` is a raw stream (0 for the default one) or an object with a `cuda_stream`, such as `torch.cuda.Stream`: all
    /// work is put there, in the order of the calls. None makes one, which is not ordered with anything else.
    #[staticmethod]
    #[pyo3(signature = (ordinal=None, stream=None), text_signature = "(ordinal=0, stream=None)")]
    fn cuda(
        py: Python<'_>,
        ordinal: Option<&Bound<'_, PyAny>>,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        fence(py, || {
            CUDA.begin("device")?;
            let most = u64::from(i32::MAX.unsigned_abs());
            let ordinal = ordinal.map_or(Ok(0), |ordinal| whole_below("ordinal", ordinal, most))? as u32;
            let Some(given) = stream.filter(|stream| !stream.is_none()) else {
                let inner = py.detach(|| tokenselect::Device::cuda(ordinal as usize))?;
                return Ok(Device::new(inner, Where::Cuda(ordinal), None, None));
            };
            let raw = given.getattr_opt(intern!(py, "cuda_stream"))?;
            let raw = whole_below("stream", raw.as_ref().unwrap_or(given), usize::MAX as u64)? as usize;
            let address: *mut c_void = std::ptr::without_provenance_mut(raw);
            // SAFETY: a stream of that device, by the caller's word; an object that owns it lives as long as this device.
            let inner = unsafe { tokenselect::Device::cuda_on_stream(ordinal as usize, address)? };
            Ok(Device::new(inner, Where::Cuda(ordinal), Some(raw), Some(given.clone().unbind())))
        })
    }

    /// The GPU kernels on the processor, every access checked, for tests: about a thousand times slower than the processor's
    /// own code. Tensors come from `to_device`.
    ///
    /// `seed` draws the schedule of lanes; 0 is the plain one.
    #[staticmethod]
    #[pyo3(signature = (seed=None), text_signature = "(seed=0)")]
    fn emulated(py: Python<'_>, seed: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        fence(py, || {
            let seed = seed.map_or(Ok(0), |seed| whole_below("seed", seed, u64::MAX))?;
            let inner = match seed {
                0 => tokenselect::Device::emulated(),
                seed => tokenselect::Device::emulated_random(seed),
            };
            Ok(Device::new(inner, Where::Emulated, None, None))
        })
    }

    /// `cpu`, `cuda` or `emulated`.
    #[getter]
    fn kind(&self) -> &'static str {
        match self.place {
            Where::Cpu => "cpu",
            Where::Cuda(_) => "cuda",
            Where::Emulated => "emulated",
        }
    }

    /// The number of a CUDA device, else 0.
    #[getter]
    fn ordinal(&self) -> u32 {
        if let Where::Cuda(ordinal) = self.place { ordinal } else { 0 }
    }

    /// Short name: `cpu`, `emulated`, `cuda:0 (NVIDIA H200)`.
    #[getter(name)]
    fn short_name(&self) -> &str {
        self.inner.name()
    }

    /// Waits until everything put on the device is done.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || {
            self.get()?;
            self.wait(py)
        })
    }

    /// The next kernel of this package begins when all work before it in the stream has ended.
    ///
    /// Without it, it may begin while the kernel in front ends, if that lets the next begin early (programmatic dependent launch), and reads
    /// what is written by then. Call it before the calls that follow a kernel of somebody else's that lets others begin before it has
    /// written `q`, `k` or `v`: SGLang's that write keys, Triton's where `torch._inductor.config.triton.enable_pdl` is set.
    fn separate(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || {
            self.get()?.separate();
            Ok(())
        })
    }

    /// A copy of an array or tensor of the host in memory of the device: a `Buffer` of the same shape and type.
    #[pyo3(text_signature = "($self, host)")]
    fn to_device<'py>(slf: &Bound<'py, Self>, host: &Bound<'py, PyAny>) -> PyResult<Bound<'py, Buffer>> {
        fence(slf.py(), || {
            slf.get().get()?;
            Memory::copied(slf, host)
        })
    }

    /// Whether steps of a configuration can be run here. Of one that cannot, `Context` says what is missing.
    #[pyo3(text_signature = "($self, config)")]
    fn supports(&self, py: Python<'_>, config: &Bound<'_, PyAny>) -> PyResult<bool> {
        fence(py, || {
            let config = of_class::<Config>("config", config)?.get();
            match self.get()?.supports(config.inner()) {
                Ok(()) => Ok(true),
                Err(tokenselect::Error::Unsupported { .. }) => Ok(false),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Bytes of the workspace of a `Context` with these arguments. Allocates nothing.
    #[pyo3(
        signature = (config, *, max_rows=None, max_block_len=None, max_kv_tokens=None, operations=None),
        text_signature = "($self, config, *, max_rows=1, max_block_len=512, max_kv_tokens=131072, operations=None)"
    )]
    fn workspace_bytes(
        &self,
        py: Python<'_>,
        config: &Bound<'_, PyAny>,
        max_rows: Option<&Bound<'_, PyAny>>,
        max_block_len: Option<&Bound<'_, PyAny>>,
        max_kv_tokens: Option<&Bound<'_, PyAny>>,
        operations: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        fence(py, || {
            let config = of_class::<Config>("config", config)?.get().inner().clone();
            let (limits, operations) = plan_limits([max_rows, max_block_len, max_kv_tokens], operations)?;
            Ok(Workspace::num_bytes(&Plan::new(self.get()?, config, limits, operations)?)?)
        })
    }

    /// Records what `work()` puts on the device, instead of doing it: a `Graph`.
    ///
    /// Run the work once before: what it allocates at its first run cannot be recorded. Batches come from a `BatchSlot`. The
    /// graph holds what `work` passes to this package. What `work` raises comes out, and nothing was recorded.
    #[pyo3(text_signature = "($self, work)")]
    fn capture<'py>(slf: &Bound<'py, Self>, work: &Bound<'py, PyAny>) -> PyResult<Bound<'py, Graph>> {
        fence(slf.py(), || {
            let device = slf.get().get()?;
            let mut raised = None;
            let (captured, held) = Uses::recorded(|| {
                device.capture(|| match work.call0() {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        raised = Some(error);
                        // Stops the recording; what is told is the exception.
                        Err(tokenselect::Error::Missing { op: "capture", needs: "work that does not raise" })
                    }
                })
            });
            match raised {
                Some(error) => Err(Failure::Python(error)),
                None => Graph::new(slf, captured?, held),
            }
        })
    }

    /// Nothing new can be made on the device any more; what is there stays as it is.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.open.close())
    }

    /// How many objects are kept until the device has read them.
    #[getter]
    fn _num_kept(&self) -> usize {
        self.num_kept()
    }

    /// Two devices can hold each other by what they have read, with nobody else's object in the ring.
    fn __clear__(&self) {
        drop(self.take_done());
    }

    /// What the device may still be reading is left out, so that it counts as held by somebody else and is not cleared.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.stream_object)?;
        // Nobody changes the list while the collector runs: both need the interpreter.
        if let Ok(kept) = self.kept.try_lock() {
            for (_, objects) in kept.iter().take_while(|(moment, _)| moment.has_passed(self)) {
                objects.iter().try_for_each(|object| visit.call(object))?;
            }
        }
        Ok(())
    }

    fn __repr__(&self) -> String {
        match (self.place, self.stream) {
            (Where::Cpu, _) => "Device.cpu()".to_owned(),
            (Where::Emulated, _) => "Device.emulated()".to_owned(),
            (Where::Cuda(ordinal), None) => format!("Device.cuda({ordinal})"),
            (Where::Cuda(ordinal), Some(stream)) => format!("Device.cuda({ordinal}, stream={stream:#x})"),
        }
    }
}
