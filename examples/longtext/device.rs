//! The device that attention runs on.

use tokenselect::Device;
use tokenselect_examples::error::Result;
use tokenselect_examples::model::Model;
use tokenselect_examples::session::{Attention, Session};

use crate::options::Options;

/// The device that was asked for.
pub fn open(model: &Model, tokens: &[u32], options: &Options) -> Result<Device> {
    options.device.open(|device| probe(model, device, tokens, options))
}

/// Reads a first block and one more token: both ways that the text is read.
fn probe(model: &Model, device: &Device, tokens: &[u32], options: &Options) -> Result<()> {
    let block = options.block.min(tokens.len());
    let mut session = Session::new(model, device, Attention::Selected, block + 1, &options.settings())?;
    session.prefill(&tokens[..block], &mut |_| ())?;
    session.decode(tokens[0])
}
