//! Captured work.

use pyo3::prelude::*;

use crate::device::Device;
use crate::errors::{Result, fence};
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
}

impl Graph {
    /// The graph of captured work.
    pub fn new<'py>(
        device: &Bound<'py, Device>,
        graph: tokenselect::Graph,
        held: Vec<Py<PyAny>>,
    ) -> Result<Bound<'py, Self>> {
        let captured = Captured { graph, device: device.clone().unbind(), held };
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
    /// Does the work, after the device's earlier work. Does not wait for it.
    fn launch(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || {
            let mut captured = self.slot.write()?;
            // SAFETY: all that the work uses is held, and what is closed meanwhile is kept.
            unsafe { captured.get()?.graph.launch()? };
            Ok(())
        })
    }

    /// Gives the graph back, and what it holds.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
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
