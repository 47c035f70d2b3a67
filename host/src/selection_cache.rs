//! Reuse of selections between steps (TokenSelect, section 3.4): per layer and sequence, the scoring query
//! and the top-k of the last real selection.

use crate::config::SelectConfig;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, TensorViewMut};

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
    num_layers: usize,
    num_sequences: usize,
    query_len: usize,
    top_k: usize,
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
    /// [`Error::Config`] where `config` breaks a rule or the size does not fit the address space.
    pub fn new(config: &SelectConfig, num_layers: usize, num_sequences: usize) -> Result<Self> {
        config.validate()?;
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        let top_k = config.top_k;
        let mut made_at = Tensor::zeros(DType::U32, [num_layers, num_sequences])?;
        made_at.as_mut_slice::<u32>()?.fill(EMPTY);
        Ok(SelectionCache {
            num_layers,
            num_sequences,
            query_len,
            top_k,
            queries: Tensor::zeros(DType::F32, [num_layers, num_sequences, query_len])?,
            selections: Tensor::zeros(DType::U32, [num_layers, num_sequences, top_k])?,
            ages: Tensor::zeros(DType::U32, [num_layers, num_sequences])?,
            made_at,
            counters: Tensor::zeros(DType::U64, [num_layers, 3])?,
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
        self.check_index(sequence)?;
        let count = self.num_sequences;
        for entry in self.made_at.as_mut_slice::<u32>()?.iter_mut().skip(sequence).step_by(count) {
            *entry = EMPTY;
        }
        Ok(())
    }

    /// Copies the selections of sequence `src` to `dst`, in all layers.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such sequence.
    pub fn fork(&mut self, src: usize, dst: usize) -> Result<()> {
        self.check_index(src)?;
        self.check_index(dst)?;
        for layer in 0..self.num_layers {
            let base = layer * self.num_sequences;
            copy_row(self.queries.as_mut_slice::<f32>()?, self.query_len, base + src, base + dst);
            copy_row(self.selections.as_mut_slice::<u32>()?, self.top_k, base + src, base + dst);
            copy_row(self.ages.as_mut_slice::<u32>()?, 1, base + src, base + dst);
            copy_row(self.made_at.as_mut_slice::<u32>()?, 1, base + src, base + dst);
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
        self.check_index(sequence)?;
        let count = self.num_sequences;
        for entry in self.made_at.as_mut_slice::<u32>()?.iter_mut().skip(sequence).step_by(count) {
            if *entry as usize > len {
                *entry = EMPTY;
            }
        }
        Ok(())
    }

    /// What was done so far, summed over layers.
    pub fn stats(&self) -> SelectionStats {
        let mut sum = SelectionStats::default();
        for layer in self.counters.as_slice::<u64>().unwrap_or_default().chunks_exact(3) {
            sum.reused += layer[0];
            sum.scored += layer[1];
            sum.complete += layer[2];
        }
        sum
    }

    /// What was done so far in one layer.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_stats(&self, layer: usize) -> Result<SelectionStats> {
        self.check_layer(layer)?;
        let c = &self.counters.as_slice::<u64>()?[3 * layer..][..3];
        Ok(SelectionStats { reused: c[0], scored: c[1], complete: c[2] })
    }

    /// Sets all counters to 0; cached selections stay.
    pub fn reset_stats(&mut self) {
        if let Ok(counters) = self.counters.as_mut_slice::<u64>() {
            counters.fill(0);
        }
    }

    /// The part that belongs to `layer`.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<SelectionCacheLayer<'_>> {
        self.check_layer(layer)?;
        let (n, q, k) = (self.num_sequences, self.query_len, self.top_k);
        Ok(SelectionCacheLayer {
            queries: TensorViewMut::new(row_mut::<f32>(&mut self.queries, n * q, layer)?, [n, q])?,
            selections: TensorViewMut::new(row_mut::<u32>(&mut self.selections, n * k, layer)?, [n, k])?,
            ages: TensorViewMut::new(row_mut::<u32>(&mut self.ages, n, layer)?, [n])?,
            made_at: TensorViewMut::new(row_mut::<u32>(&mut self.made_at, n, layer)?, [n])?,
            counters: TensorViewMut::new(row_mut::<u64>(&mut self.counters, 3, layer)?, [3])?,
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

impl SelectionCacheLayer<'_> {
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

fn copy_row<T: Copy>(data: &mut [T], width: usize, src: usize, dst: usize) {
    data.copy_within(src * width..(src + 1) * width, dst * width);
}

fn row_mut<T: crate::tensor::Element>(tensor: &mut Tensor, width: usize, row: usize) -> Result<&mut [T]> {
    Ok(&mut tensor.as_mut_slice::<T>()?[row * width..(row + 1) * width])
}
