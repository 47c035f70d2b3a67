//! Where operations run.

use std::fmt;
use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;

/// A place where operations run and memory lies. Cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// The processor: plain Rust, in parallel on the current rayon thread pool.
    pub fn cpu() -> Self {
        Device(Arc::new(CpuBackend))
    }

    /// The fastest device present. This version knows only the processor.
    pub fn auto() -> Self {
        Device::cpu()
    }

    /// Wraps a backend of one's own.
    pub fn from_backend(backend: Arc<dyn Backend>) -> Self {
        Device(backend)
    }

    /// Short name: `cpu`.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        self.0.as_ref()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
