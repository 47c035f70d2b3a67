//! Objects that must live longer than a call: until the device has done its work, or as long as a recorded graph.

use std::cell::RefCell;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::device::{Device, Where};
use crate::errors::{Failure, Result};
use crate::fork::Process;
use crate::given::{Given, Source, expect_untraced};
use crate::memory::{InCall, Memory, is_on};
use crate::slot::{Lends, Slot};

thread_local! {
    /// What this thread passes to the library while it records, the innermost recording last.
    static RECORDS: RefCell<Vec<Vec<Py<PyAny>>>> = const { RefCell::new(Vec::new()) };
}

/// Where PyTorch's tensors lay when a call looked at them.
///
/// `set_` gives a tensor another storage, `resize_` a storage another place, whoever holds it: code of a later argument's, or who is told
/// of progress, may have called these.
#[derive(Default)]
pub(crate) struct Places(Vec<(&'static str, Py<PyAny>, usize)>);

impl Places {
    /// Refuses a tensor that lies elsewhere now.
    pub fn expect_unchanged(&self, py: Python<'_>) -> Result<()> {
        for (what, tensor, addr) in &self.0 {
            let now = tensor.bind(py).call_method0(intern!(py, "data_ptr"))?.extract::<usize>();
            if !now.is_ok_and(|now| now == *addr) {
                let rule = "must keep its memory until the call returns, its address has changed meanwhile";
                return Err(Failure::tensor("TS_STATUS_BUSY", what, rule));
            }
        }
        Ok(())
    }
}

/// What one call uses.
pub(crate) struct Uses<'a, 'py> {
    py: Python<'py>,
    device: &'a Device,
    records: bool,
    process: Process,
    /// Whether PyTorch works in the device's stream now; none before that is asked for.
    shares_stream: Option<bool>,
    /// Whether it is known that PyTorch differentiates and traces nothing now.
    is_plain: bool,
    /// Whether other threads run while this call works.
    is_long: bool,
    kept: Vec<Py<PyAny>>,
    /// What tells of arrays, which may own their memory, as long as the call.
    interfaces: Vec<Bound<'py, PyAny>>,
    /// This package's memory: code of a later argument's, or of another thread's, must not close it meanwhile.
    in_call: Vec<InCall<'py>>,
    places: Places,
}

/// Queries times keys from which on other threads run meanwhile. Below, giving the interpreter up and getting it back costs more
/// than it is worth.
const LONG: usize = 1 << 16;

impl<'a, 'py> Uses<'a, 'py> {
    /// Those of a call on a device that takes no time.
    pub fn new(py: Python<'py>, device: &'a Device) -> Self {
        Uses::of_work(py, device, 0)
    }

    /// Those of a call on a device: so many queries times keys.
    pub fn of_work(py: Python<'py>, device: &'a Device, work: usize) -> Self {
        let records = RECORDS.with_borrow(|records| !records.is_empty());
        // A CUDA device works by itself.
        let is_long = work == usize::MAX || (work >= LONG && !matches!(device.place(), Where::Cuda(_)));
        let (kept, interfaces, in_call) = (Vec::new(), Vec::new(), Vec::new());
        let process = Process::current();
        Uses {
            py,
            device,
            records,
            process,
            shares_stream: None,
            is_plain: false,
            is_long,
            kept,
            interfaces,
            in_call,
            places: Places::default(),
        }
    }

    /// Does the work: if it is long, without the interpreter, so that other threads run.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> tokenselect::Result<T> + Send) -> Result<T> {
        // Code of an argument's own may have forked.
        self.process.expect_current("context")?;
        self.places.expect_unchanged(self.py)?;
        Ok(if self.is_long { self.py.detach(work) } else { work() }?)
    }

    /// The interpreter.
    pub fn py(&self) -> Python<'py> {
        self.py
    }

    /// The device.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Looks at a tensor, which is kept as long as it must be.
    pub fn look(&mut self, what: &'static str, object: &Bound<'py, PyAny>) -> Result<Given<'py>> {
        let given = Given::look(what, object, self.device)?;
        if given.source == Source::Torch && !self.is_plain {
            self.is_plain = expect_untraced(what, object)?;
        }
        if given.source == Source::Own
            && let Ok(memory) = object.cast::<Memory>()
        {
            self.in_call.push(InCall::begin(memory));
            if self.records {
                memory.get().lend(); // closed later, it is kept
            }
        }
        let mut held = None;
        if self.records {
            self.record(owner(&given)?);
        } else if self.is_long || (self.device.is_asynchronous() && self.must_be_kept(&given)?) {
            let owner = owner(&given)?;
            held = Some(owner.clone_ref(self.py));
            self.kept.push(owner);
        }
        if given.source == Source::Torch {
            // What is held keeps the storage that was looked at, whatever the tensor is given.
            let tensor = held.unwrap_or_else(|| object.clone().unbind());
            self.places.0.push((what, tensor, given.addr));
        }
        self.interfaces.extend(given.interface.clone());
        Ok(given)
    }

    /// Where its tensors lie, for work that calls back.
    pub fn take_places(&mut self) -> Places {
        std::mem::take(&mut self.places)
    }

    /// An object of this package, which a recording holds.
    pub fn hold<T, S>(&self, object: &Bound<'py, T>, slot: &Slot<S>) {
        if self.records {
            slot.lend();
            self.record(object.clone().into_any().unbind());
        }
    }

    fn record(&self, object: Py<PyAny>) {
        RECORDS.with_borrow_mut(|records| {
            if let Some(record) = records.last_mut() {
                record.push(object);
            }
        });
    }

    /// Whether memory may be gone before the device has read it. This package's own is freed in the order of the device's work,
    /// and so is that of PyTorch's allocator, if PyTorch works in the same stream.
    fn must_be_kept(&mut self, given: &Given<'py>) -> Result<bool> {
        match given.source {
            Source::Own => Ok(!is_on(&given.object, self.device)),
            Source::Interface | Source::Struct | Source::Masked | Source::LikeTorch => Ok(true),
            Source::Torch => {
                if self.shares_stream.is_none() {
                    self.shares_stream = Some(shares_stream(self.py, self.device)?);
                }
                Ok(self.shares_stream != Some(true))
            }
        }
    }

    /// Runs `work`; answers also what this thread passed to the library meanwhile.
    pub fn recorded<T>(work: impl FnOnce() -> T) -> (T, Vec<Py<PyAny>>) {
        /// Ends the record, also where `work` panics.
        struct Record;
        impl Record {
            fn end() -> Vec<Py<PyAny>> {
                RECORDS.with_borrow_mut(Vec::pop).unwrap_or_default()
            }
        }
        impl Drop for Record {
            fn drop(&mut self) {
                drop(Record::end());
            }
        }
        RECORDS.with_borrow_mut(|records| records.push(Vec::new()));
        let record = Record;
        let done = work();
        std::mem::forget(record);
        (done, Record::end())
    }
}

impl Drop for Uses<'_, '_> {
    fn drop(&mut self) {
        if !self.kept.is_empty() && self.device.is_asynchronous() {
            self.device.keep(std::mem::take(&mut self.kept));
        }
    }
}

/// What owns the memory of a tensor as it is now. A tensor of PyTorch's may be given other memory; one that shares its
/// elements keeps what it has.
fn owner(given: &Given<'_>) -> Result<Py<PyAny>> {
    let object = &given.object;
    if let Some(interface) = &given.interface {
        return Ok(PyTuple::new(object.py(), [object, interface])?.into_any().unbind());
    }
    if given.source == Source::Torch
        && let Some(detach) = object.getattr_opt(intern!(object.py(), "detach"))?
    {
        return Ok(detach.call0()?.unbind());
    }
    Ok(object.clone().unbind())
}

/// Whether PyTorch's current stream is the device's.
fn shares_stream(py: Python<'_>, device: &Device) -> Result<bool> {
    let (Where::Cuda(ordinal), Some(stream)) = (device.place(), device.stream()) else { return Ok(false) };
    let torch = py.import(intern!(py, "torch"))?;
    // The call that PyTorch's own compiled code makes: it costs a hundredth of the public one.
    let quick = torch.getattr(intern!(py, "_C"))?.getattr_opt(intern!(py, "_cuda_getCurrentRawStream"))?;
    let current = match quick {
        Some(quick) => quick.call1((ordinal,))?,
        None => {
            let cuda = torch.getattr(intern!(py, "cuda"))?;
            let stream = cuda.call_method1(intern!(py, "current_stream"), (ordinal,))?;
            stream.getattr(intern!(py, "cuda_stream"))?
        }
    };
    Ok(current.extract::<usize>()? == stream)
}
