//! The device that attention runs on.

use std::io::{self, Write};

use tokenselect::Device;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::options::{DeviceName, Options};
use crate::session::{Attention, Session};

/// The device that was asked for. Where none was, the processor takes over a model that the GPU has no kernels for, and
/// says why.
pub fn open(model: &Model, text: &[u8], options: &Options) -> Result<Device> {
    let device = match options.device {
        DeviceName::Cpu => return Ok(Device::cpu()),
        DeviceName::Cuda => return Ok(Device::cuda(0)?),
        DeviceName::Emulated => return Ok(Device::emulated()),
        DeviceName::Auto => Device::auto(),
    };
    if device.is_cpu() {
        return Ok(device);
    }
    match probe(model, &device, text, options) {
        Err(Error::Library(reason @ tokenselect::Error::Unsupported { .. })) => {
            // Where stderr is closed, the report still names the device.
            let _ = writeln!(io::stderr(), "attention runs on the processor: {reason}");
            Ok(Device::cpu())
        }
        other => other.map(|()| device),
    }
}

/// Reads a first block and one more byte: both ways that the text is read.
fn probe(model: &Model, device: &Device, text: &[u8], options: &Options) -> Result<()> {
    let block = options.block.min(text.len());
    let mut session = Session::new(model, device, Attention::Selected, block + 1, options)?;
    session.prefill(&text[..block], &mut |_| ())?;
    session.decode(text[0])?;
    Ok(())
}
