//! The device that attention runs on.

use tokenselect::Device;
use tokenselect_examples::error::Result;
use tokenselect_examples::model::Model;

use crate::options::Options;
use crate::session::{Attention, Session};

/// The device that was asked for.
pub fn open(model: &Model, text: &[u8], options: &Options) -> Result<Device> {
    options.device.open(|device| probe(model, device, text, options))
}

/// Reads a first block and one more byte: both ways that the text is read.
fn probe(model: &Model, device: &Device, text: &[u8], options: &Options) -> Result<()> {
    let block = options.block.min(text.len());
    let mut session = Session::new(model, device, Attention::Selected, block + 1, options)?;
    session.prefill(&text[..block], &mut |_| ())?;
    session.decode(text[0])?;
    Ok(())
}
