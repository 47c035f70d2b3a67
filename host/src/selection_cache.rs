//! Reuse of selections between steps (TokenSelect, section 3.4): per layer and sequence, the scoring query
//! and the top-k of the last real selection.

use std::sync::Arc;

use tokenselect_kernels::entries::{Key, Op};
use tokenselect_kernels::ops::forget::ForgetParams;
use tokenselect_kernels::simt::global::GlobalMut;

use crate::config::SelectConfig;
use crate::device::Device;
use crate::driver::Driver;
use crate::dtype::{DType, Shape};
use crate::error::{Error, Result};
use crate::tensor::{Tensor, TensorViewMut};

/// The most layers of a cache.
pub(crate) const MAX_LAYERS: usize = 1 << 16;

/// Marks a cached selection that cannot be used.
pub(crate) const EMPTY: u32 = u32::MAX;

/// What was done for the rows of past steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SelectionStats {
    /// Rows that used a cached selection again.
    pub reused: u64,
    /// Rows that were scored and selected anew.
    pub scored: u64,
    /// Rows so short that every token was selected without scoring.
    pub complete: u64,
}

/// Cached selections of every layer and sequence.
///
/// Belongs to a [`PagedKvCache`](crate::PagedKvCache), or stands alone for an engine with a cache of its
/// own; then the engine calls [`clear`](Self::clear), [`fork`](Self::fork) and
/// [`truncate`](Self::truncate) whenever it does the same to a sequence. Memory: `num_layers *
/// num_sequences * (num_qo_heads * head_dim + top_k) * 4` bytes.
#[derive(Debug)]
pub struct SelectionCache {
    device: Device,
    num_layers: usize,
    num_sequences: usize,
    /// `[num_layers, num_sequences, query_len]` f32: the scoring queries.
    queries: Tensor,
    /// `[num_layers, num_sequences, top_k]` u32: tokens, ascending.
    selections: Tensor,
    /// `[num_layers, num_sequences]` u32: how often each selection was used again.
    ages: Tensor,
    /// `[num_layers, num_sequences]` u32: tokens before the block when the selection was made, or [`EMPTY`].
    made_at: Tensor,
    /// `[num_layers, 3]` u64: reused, scored, complete.
    counters: Tensor,
}

/// The part of a [`SelectionCache`] that one layer's step reads and writes.
#[derive(Debug)]
pub struct SelectionCacheLayer<'a> {
    /// `[num_sequences, num_qo_heads * head_dim]` f32: scoring queries.
    pub queries: TensorViewMut<'a>,
    /// `[num_sequences, top_k]` u32: selected tokens, ascending.
    pub selections: TensorViewMut<'a>,
    /// `[num_sequences]` u32: how often each selection was used again.
    pub ages: TensorViewMut<'a>,
    /// `[num_sequences]` u32: `n - T` when the selection was made; `u32::MAX` where there is none.
    pub made_at: TensorViewMut<'a>,
    /// `[3]` u64: rows reused, scored, complete.
    pub counters: TensorViewMut<'a>,
}

impl SelectionCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Config`] where `config` breaks a rule, [`Error::Argument`] for too many layers, [`Error::OutOfMemory`].
    pub fn new(
        device: &Device,
        config: &SelectConfig,
        num_layers: usize,
        num_sequences: usize,
    ) -> Result<Self> {
        config.validate()?;
        if num_layers > MAX_LAYERS {
            return Err(Error::argument("num_layers", format!("at most {MAX_LAYERS}"), num_layers));
        }
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        let per_sequence = [num_layers, num_sequences];
        let zeros = |dtype, shape: Shape| Tensor::zeros_on(device, dtype, shape);
        Ok(SelectionCache {
            num_layers,
            num_sequences,
            queries: zeros(DType::F32, [num_layers, num_sequences, query_len].into())?,
            selections: zeros(DType::U32, [num_layers, num_sequences, config.top_k].into())?,
            ages: zeros(DType::U32, per_sequence.into())?,
            made_at: Tensor::filled_on(device, EMPTY, per_sequence)?,
            counters: zeros(DType::U64, [num_layers, 3].into())?,
            device: device.clone(),
        })
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Sequences.
    pub fn num_sequences(&self) -> usize {
        self.num_sequences
    }

    /// Forgets the selections of one sequence, in all layers.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such sequence.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        self.forget(sequence, 0)
    }

    /// Copies the selections of sequence `src` to `dst`, in all layers.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such sequence.
    pub fn fork(&mut self, src: usize, dst: usize) -> Result<()> {
        self.check_index(src)?;
        self.check_index(dst)?;
        let (layers, sequences) = (self.num_layers, self.num_sequences);
        for tensor in [&mut self.queries, &mut self.selections, &mut self.ages, &mut self.made_at] {
            let width: usize = tensor.shape().dims()[2..].iter().product();
            let at = |layer: usize, sequence: usize| (layer * sequences + sequence) * width;
            for layer in 0..layers {
                tensor.view_mut().copy_within(at(layer, src), at(layer, dst), width)?;
            }
        }
        Ok(())
    }

    /// Forgets those selections of one sequence that could name a token at or after `len`, or that would
    /// reach into the local window of a sequence cut to `len`: all that were made with more than `len`
    /// tokens before the block.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.forget(sequence, len.saturating_add(1).min(EMPTY as usize))
    }

    /// Drops the selections of one sequence that were made with at least `from` tokens before the block.
    fn forget(&mut self, sequence: usize, from: usize) -> Result<()> {
        self.check_index(sequence)?;
        if let Some(driver) = self.device.driver() {
            let made_at = self.made_at.view().device_addr()?;
            return forget_on_device(driver, made_at, (self.num_layers, self.num_sequences), sequence, from);
        }
        let made_at = self.made_at.as_mut_slice::<u32>()?;
        for entry in made_at.iter_mut().skip(sequence).step_by(self.num_sequences) {
            if *entry as usize >= from {
                *entry = EMPTY;
            }
        }
        Ok(())
    }

    /// What was done so far, summed over layers. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device fails.
    pub fn stats(&self) -> Result<SelectionStats> {
        let mut sum = SelectionStats::default();
        for layer in self.counters.to_vec::<u64>()?.chunks_exact(3) {
            sum.reused += layer[0];
            sum.scored += layer[1];
            sum.complete += layer[2];
        }
        Ok(sum)
    }

    /// What was done so far in one layer. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_stats(&self, layer: usize) -> Result<SelectionStats> {
        self.check_layer(layer)?;
        let c = self.counters.outer(layer).to_vec::<u64>()?;
        Ok(SelectionStats { reused: c[0], scored: c[1], complete: c[2] })
    }

    /// Sets all counters to 0; cached selections stay.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device fails.
    pub fn reset_stats(&mut self) -> Result<()> {
        let zeros = Tensor::zeros(DType::U64, self.counters.shape())?;
        self.counters.copy_from(zeros.view())
    }

    /// The part that belongs to `layer`.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<SelectionCacheLayer<'_>> {
        self.check_layer(layer)?;
        Ok(SelectionCacheLayer {
            queries: self.queries.view_mut().outer(layer),
            selections: self.selections.view_mut().outer(layer),
            ages: self.ages.view_mut().outer(layer),
            made_at: self.made_at.view_mut().outer(layer),
            counters: self.counters.view_mut().outer(layer),
        })
    }

    fn check_index(&self, got: usize) -> Result<()> {
        let limit = self.num_sequences;
        if got < limit { Ok(()) } else { Err(Error::Index { what: "sequence index", limit, got }) }
    }

    fn check_layer(&self, got: usize) -> Result<()> {
        let limit = self.num_layers;
        if got < limit { Ok(()) } else { Err(Error::Index { what: "layer", limit, got }) }
    }
}

/// Drops selections in `made_at`, `[num_layers, num_sequences]` on the driver's device.
fn forget_on_device(
    driver: &Arc<dyn Driver>,
    made_at: u64,
    (num_layers, num_sequences): (usize, usize),
    sequence: usize,
    from: usize,
) -> Result<()> {
    if num_layers == 0 {
        return Ok(());
    }
    let params = ForgetParams {
        made_at: GlobalMut::from_addr(made_at),
        num_layers: num_layers as u32,
        num_sequences: num_sequences as u32,
        sequence: sequence as u32,
        from: from as u32,
    };
    let entry = driver.find("forget", Op::Forget, Key::NONE)?;
    // SAFETY: `made_at` has these dimensions, and the caller has checked `sequence`.
    unsafe { driver.launch_with(entry, params.dims(), &params) }
}

impl SelectionCacheLayer<'_> {
    /// Where it lies: tells layers from each other.
    pub(crate) fn place(&self) -> usize {
        let view = self.made_at.as_view();
        let on_host = || view.as_slice::<u32>().map_or(0, |entries| entries.as_ptr() as usize);
        view.device_addr().map_or_else(|_| on_host(), |addr| addr as usize)
    }

    /// Forgets the selection of one sequence; nothing where there is no such sequence.
    pub(crate) fn forget(&mut self, device: &Device, sequence: usize) -> Result<()> {
        let num_sequences = self.made_at.shape().dims().first().copied().unwrap_or(0);
        if sequence >= num_sequences {
            return Ok(());
        }
        if let Some(driver) = device.driver() {
            let made_at = self.made_at.as_view().device_addr()?;
            return forget_on_device(driver, made_at, (1, num_sequences), sequence, 0);
        }
        if let Some(entry) = self.made_at.reborrow().into_slice::<u32>()?.get_mut(sequence) {
            *entry = EMPTY;
        }
        Ok(())
    }

    /// A shorter borrow of the same memory.
    pub fn reborrow(&mut self) -> SelectionCacheLayer<'_> {
        SelectionCacheLayer {
            queries: self.queries.reborrow(),
            selections: self.selections.reborrow(),
            ages: self.ages.reborrow(),
            made_at: self.made_at.reborrow(),
            counters: self.counters.reborrow(),
        }
    }
}
