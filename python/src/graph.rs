//! Captured work.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::device::{Device, Moment};
use crate::errors::{Failure, Result, fence};
use crate::slot::Slot;

/// Work recorded by `Device.capture`: a CUDA graph. Holds what the work was given.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Graph {
    slot: Slot<Captured>,
}

struct Captured {
    graph: tokenselect::Graph,
    device: Py<Device>,
    /// Contexts, batches, caches and tensors that the work uses.
    held: Vec<Py<PyAny>>,
    /// The end of the last launch.
    launched: Option<Moment>,
}

impl Graph {
    /// The graph of captured work.
    pub fn new<'py>(
        device: &Bound<'py, Device>,
        graph: tokenselect::Graph,
        held: Vec<Py<PyAny>>,
    ) -> Result<Bound<'py, Self>> {
        let captured = Captured { graph, device: device.clone().unbind(), held, launched: None };
        Ok(Bound::new(device.py(), Graph { slot: Slot::new("graph", captured) })?)
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // What was launched may still be at work on what is held.
        self.device.get().keep(std::mem::take(&mut self.held));
    }
}

#[pymethods]
impl Graph {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("Graph", "`Device.capture`")))
    }

    /// Does the work, after the device's earlier work. Does not wait for it.
    fn launch(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || {
            let mut captured = self.slot.write()?;
            let captured = captured.get()?;
            // SAFETY: all that the work uses is held, and what is closed meanwhile is kept.
            unsafe { captured.graph.launch()? };
            captured.launched = Some(captured.device.get().now());
            Ok(())
        })
    }

    /// Gives the graph back, and what it holds.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    /// As long as the work may be running, what it uses counts as held by somebody else: were it cleared, its memory would be gone.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(captured) = self.slot.try_get() else { return Ok(()) };
        let Ok(Captured { device, held, launched, .. }) = captured.get() else { return Ok(()) };
        visit.call(device)?;
        if launched.as_ref().is_none_or(|end| end.has_passed(device.get())) {
            held.iter().try_for_each(|object| visit.call(object))?;
        }
        Ok(())
    }

    fn __repr__(&self) -> String {
        let found = self.slot.read().and_then(|captured| {
            let captured = captured.get()?;
            Ok((captured.device.get().name().to_owned(), captured.held.len()))
        });
        match found {
            Ok((device, held)) => format!("<tokenselect.Graph on {device}, holds {held} objects>"),
            Err(_) => "<tokenselect.Graph, closed or at work>".to_owned(),
        }
    }
}
