//! The device that attention runs on.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;
use tokenselect::Device;

use crate::error::{Error, Result};

/// A choice of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceName {
    /// The processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
    /// The GPU's kernels, in an emulator: a thousand times slower
    Emulated,
    /// The first NVIDIA GPU where there is one that runs the model, else the processor
    Auto,
}

impl DeviceName {
    /// The device that was asked for. Where none was, the processor takes over what the GPU has no kernels for, and says why;
    /// `probe` tells.
    ///
    /// # Errors
    /// [`Error::Library`] where there is no such device; those of `probe`.
    pub fn open(self, probe: impl FnOnce(&Device) -> Result<()>) -> Result<Device> {
        let device = match self {
            DeviceName::Cpu => return Ok(Device::cpu()),
            DeviceName::Cuda => return Ok(Device::cuda(0)?),
            DeviceName::Emulated => return Ok(Device::emulated()),
            DeviceName::Auto => Device::auto(),
        };
        if device.is_cpu() {
            return Ok(device);
        }
        match probe(&device) {
            Err(Error::Library(reason @ tokenselect::Error::Unsupported { .. })) => {
                // Where stderr is closed, the report still names the device.
                let _ = writeln!(io::stderr(), "attention runs on the processor: {reason}");
                Ok(Device::cpu())
            }
            other => other.map(|()| device),
        }
    }
}
