//! The paged KV cache: memory for keys and values, page tables, the sequences in them, and how much of each was written.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::batch::{Batch, MAX_PAGES, MAX_ROWS};
use crate::config::{MAX_SEQUENCE_LEN, SelectConfig};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::{KvLayout, KvShape, KvView, KvViewMut};
use crate::ledger::{Ledger, OwnedLayer, Owner};
use crate::pages::PageAllocator;
use crate::pieces::Pieces;
use crate::plan::Limits;
use crate::selection_cache::{MAX_LAYERS, SelectionCache, SelectionCacheLayer, SelectionStats};
use crate::sequence::SequenceId;
use crate::tensor::Tensor;

/// Size and layout of a [`PagedKvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheConfig {
    /// Layers of the model, each with keys and values of its own. Default 1.
    pub num_layers: usize,
    /// Pages of every layer. Default 1024.
    pub num_pages: usize,
    /// Tokens in a page, 1 to 256. Default 16.
    pub page_size: usize,
    /// Sequences that may be alive at once. Default 16.
    pub max_sequences: usize,
    /// Order of the dimensions of a page. Default [`KvLayout::Nhd`].
    pub layout: KvLayout,
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig {
            num_layers: 1,
            num_pages: 1024,
            page_size: 16,
            max_sequences: 16,
            layout: KvLayout::Nhd,
        }
    }
}

/// Keys and values of many sequences in shared pages, with the page tables, and the Selection Cache of
/// every sequence and layer.
///
/// A step first grows the sequences ([`extend`](Self::extend)), once for all layers, and then writes and
/// reads each layer through the batch that this returned. Memory: `2 * num_layers * num_pages * page_size *
/// num_kv_heads * head_dim` elements.
///
/// Engines with a cache of their own use [`KvView`], [`KvViewMut`] and [`Batch::new`] instead, and may
/// still use [`PageAllocator`].
#[derive(Debug)]
pub struct PagedKvCache {
    pages: PageAllocator,
    shape: KvShape,
    layout: KvLayout,
    dtype: DType,
    layers: Vec<LayerKv>,
    selections: Option<SelectionCache>,
    owner: Owner,
    device: Device,
}

/// Keys and values of one layer, and its cached selections: [`PagedKvCache::layer_mut`], or an engine's own.
#[derive(Debug)]
pub struct LayerMut<'a> {
    /// Keys and values.
    pub kv: KvViewMut<'a>,
    /// Cached selections, with batches that name their sequences ([`Batch::with_sequence_indices`]; an owned cache's do); `None` to
    /// select anew at every step.
    pub selections: Option<SelectionCacheLayer<'a>>,
}

#[derive(Debug)]
struct LayerKv {
    k: Tensor,
    v: Tensor,
}

impl LayerKv {
    fn view_mut(&mut self, layout: KvLayout) -> Result<KvViewMut<'_>> {
        KvViewMut::new(self.k.view_mut(), self.v.view_mut(), layout)
    }
}

impl PagedKvCache {
    /// Allocates an empty cache on `device`, with a [`SelectionCache`] if `config` asks for one.
    ///
    /// # Errors
    /// [`Error::Config`] where a field of either configuration breaks its rule.
    pub fn new(device: &Device, config: &SelectConfig, cache: &CacheConfig) -> Result<Self> {
        config.validate()?;
        if cache.num_layers == 0 || cache.num_layers > MAX_LAYERS {
            return Err(Error::config("num_layers", format!("from 1 to {MAX_LAYERS}"), cache.num_layers));
        }
        let pages = PageAllocator::new(cache.num_pages, cache.page_size, cache.max_sequences)
            .map_err(Error::of_field)?;
        let shape = KvShape {
            num_pages: cache.num_pages,
            page_size: cache.page_size,
            num_kv_heads: config.heads.num_kv_heads,
            head_dim: config.heads.head_dim,
        };
        let pool = || Tensor::zeros_on(device, config.dtype, shape.dims(cache.layout));
        let mut layers = Vec::new();
        for _ in 0..cache.num_layers {
            layers.push(LayerKv { k: pool()?, v: pool()? });
        }
        let selections = match config.selection_cache {
            Some(_) => Some(SelectionCache::new(device, config, cache.num_layers, cache.max_sequences)?),
            None => None,
        };
        let owner = Owner {
            ledger: Arc::new(Mutex::new(Ledger {
                written: vec![Vec::new(); cache.num_layers],
                sequences: Vec::new(),
            })),
            allocator: pages.id(),
            num_layers: cache.num_layers,
            positions_are_reassigned: config.positions.are_reassigned(),
        };
        Ok(PagedKvCache {
            pages,
            shape,
            layout: cache.layout,
            dtype: config.dtype,
            layers,
            selections,
            owner,
            device: device.clone(),
        })
    }

    /// The page tables: lengths, pages, free pages, reference counts.
    pub fn pages(&self) -> &PageAllocator {
        &self.pages
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        self.pages.len(id)
    }

    /// Whether no sequence is alive.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Adds an empty sequence.
    ///
    /// # Errors
    /// [`Error::TooManySequences`].
    pub fn create(&mut self) -> Result<SequenceId> {
        self.device.expect_no_recording("create")?;
        let id = self.pages.create()?;
        self.ledger().written.iter_mut().for_each(|layer| *Ledger::entry(layer, id.index()) = 0);
        if let Some(Err(error)) = self.selections.as_mut().map(|selections| selections.clear(id.index())) {
            self.pages.free(id)?;
            return Err(error);
        }
        self.enter(id);
        Ok(id)
    }

    /// Adds a sequence with the same tokens and cached selections. Pages are shared until one of the two
    /// writes into them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TooManySequences`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        self.device.expect_no_recording("fork")?;
        let child = self.pages.fork(id)?;
        for layer in &mut self.ledger().written {
            let of_parent = *Ledger::entry(layer, id.index());
            *Ledger::entry(layer, child.index()) = of_parent;
        }
        let (parent, index) = (id.index(), child.index());
        if let Some(Err(error)) = self.selections.as_mut().map(|selections| selections.fork(parent, index)) {
            self.pages.free(child)?;
            return Err(error);
        }
        self.enter(id);
        self.enter(child);
        Ok(child)
    }

    /// Drops the tokens of a sequence from `len` on, for example rejected speculative ones, and every
    /// cached selection that could name one of them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TruncateBeyondEnd`].
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.device.expect_no_recording("truncate")?;
        self.pages.truncate(id, len)?;
        for layer in &mut self.ledger().written {
            let written = Ledger::entry(layer, id.index());
            *written = len.min(*written);
        }
        self.enter(id);
        match &mut self.selections {
            Some(selections) => selections.truncate(id.index(), len),
            None => Ok(()),
        }
    }

    /// Ends a sequence; pages that no fork holds become free.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.device.expect_no_recording("free")?;
        self.pages.free(id)?;
        self.ledger().sequences[id.index()] = None;
        Ok(())
    }

    /// Brings the ledger up to date.
    fn enter(&self, id: SequenceId) {
        let now = self.pages.revision(id).and_then(|revision| Ok((id, revision, self.pages.len(id)?)));
        let sequences = &mut self.ledger().sequences;
        if sequences.len() <= id.index() {
            sequences.resize(id.index() + 1, None);
        }
        sequences[id.index()] = now.ok();
    }

    /// Makes room for a block of new tokens of each sequence named, all or nothing, and returns the batch
    /// whose rows are these sequences in this order.
    ///
    /// How long a block and how many rows a step takes, its [`Limits`] say: see [`extend_within`](Self::extend_within).
    ///
    /// The new tokens' keys and values are undefined until every layer was appended to. A length of 0 is a
    /// padding row.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::UnknownSequence`], [`Error::DuplicateSequence`],
    /// [`Error::SequenceTooLong`]; [`Error::Limit`] for more than 2^24 rows or 2^31 - 1 new tokens in all.
    pub fn extend(&mut self, growth: &[(SequenceId, usize)]) -> Result<Batch> {
        self.device.expect_no_recording("extend")?;
        let tokens = growth.iter().fold(0usize, |sum, &(_, tokens)| sum.saturating_add(tokens));
        let mut limits = vec![("rows of a batch", MAX_ROWS, growth.len())];
        // A sequence that is unknown or grows too long by itself is the allocator's to refuse.
        let may_grow = |&(id, tokens): &(SequenceId, usize)| {
            self.pages.len(id).is_ok_and(|len| len.saturating_add(tokens) <= MAX_SEQUENCE_LEN)
        };
        if growth.iter().all(may_grow) {
            limits.push(("query tokens of a batch", MAX_SEQUENCE_LEN, tokens));
        }
        for (what, limit, got) in limits {
            if got > limit {
                return Err(Error::Limit { what, limit, got });
            }
        }
        let copies = self.pages.extend(growth)?;
        if !copies.is_empty() {
            for layer in &mut self.layers {
                layer.view_mut(self.layout)?.copy_pages(&copies)?;
            }
        }
        let ids: Vec<SequenceId> = growth.iter().map(|&(id, _)| id).collect();
        let mut qo_indptr = vec![0u32];
        let mut end = 0;
        for &(_, num_tokens) in growth {
            end += num_tokens as u32;
            qo_indptr.push(end);
        }
        let batch = Batch::new(self.pages.page_size(), qo_indptr, self.pages.tables(&ids)?)?;
        let owners =
            ids.iter().map(|&id| Ok((id, self.pages.revision(id)?.number))).collect::<Result<_>>()?;
        ids.iter().for_each(|&id| self.enter(id));
        Ok(batch.owned_by(self.pages.id(), owners))
    }

    /// [`extend`](Self::extend) for steps within `limits`, those of [`TokenSelect::new`](crate::TokenSelect::new): a batch that these steps
    /// would refuse is refused before anything grows.
    ///
    /// # Errors
    /// [`Error::Limit`], naming the limit; those of `extend`.
    pub fn extend_within(&mut self, limits: &Limits, growth: &[(SequenceId, usize)]) -> Result<Batch> {
        self.check_growth(limits, growth, usize::MAX)?;
        self.extend(growth)
    }

    /// [`extend_within`](Self::extend_within) for steps of blocks: the batch is cut into blocks of `block_len` tokens
    /// ([`Batch::in_blocks`]), and it is these that must be within `limits`.
    ///
    /// # Errors
    /// As `extend_within`, and [`Error::Argument`] for blocks of no tokens; then nothing grew.
    pub fn extend_in_blocks(
        &mut self,
        limits: &Limits,
        growth: &[(SequenceId, usize)],
        block_len: usize,
    ) -> Result<Batch> {
        if block_len == 0 {
            return Err(Error::argument("block_len", "at least 1", block_len));
        }
        self.check_growth(limits, growth, block_len)?;
        self.extend_and_cut(growth, |batch| batch.in_blocks(block_len))
    }

    /// Makes room for whole prompts: [`extend`](Self::extend) by any number of new tokens of each sequence, cut into blocks of
    /// `block_len` tokens and these into pieces within `limits`, for [`TokenSelect::prefill`](crate::TokenSelect::prefill) of each layer.
    ///
    /// # Errors
    /// [`Error::Limit`] where a block alone is beyond `limits`, [`Error::Argument`] for blocks of no tokens, and those of `extend`; then
    /// nothing grew.
    pub fn extend_in_pieces(
        &mut self,
        limits: &Limits,
        growth: &[(SequenceId, usize)],
        block_len: usize,
    ) -> Result<Pieces> {
        if block_len == 0 {
            return Err(Error::argument("block_len", "at least 1", block_len));
        }
        for &(id, tokens) in growth.iter().filter(|&&(_, tokens)| tokens > 0) {
            let len = self.pages.len(id)?.saturating_add(tokens);
            if len <= MAX_SEQUENCE_LEN {
                // The last block has the most tokens before it; a longer sequence is the allocator's to refuse.
                limits.check(1, tokens.min(block_len), len.next_multiple_of(self.shape.page_size))?;
            }
        }
        self.extend_and_cut(growth, |batch| batch.in_pieces(limits, block_len))
    }

    /// Checks what a batch of rows that are cut into blocks of `block_len` tokens would be.
    fn check_growth(&self, limits: &Limits, growth: &[(SequenceId, usize)], block_len: usize) -> Result<()> {
        let blocks_of = |tokens: usize| tokens.div_ceil(block_len).max(1);
        let (mut rows, mut longest, mut is_too_long) = (0usize, 0, false);
        for &(id, tokens) in growth {
            is_too_long |= self.pages.len(id)?.saturating_add(tokens) > MAX_SEQUENCE_LEN;
            longest = tokens.min(block_len).max(longest);
            rows = rows.saturating_add(blocks_of(tokens));
        }
        limits.check(rows, longest, 0)?;
        if is_too_long {
            return Ok(()); // the allocator's to refuse
        }
        if rows > MAX_ROWS {
            return Err(Error::Limit { what: "rows of a batch", limit: MAX_ROWS, got: rows });
        }
        let mut pages = 0usize;
        for &(id, tokens) in growth {
            let before = self.pages.len(id)?;
            for block in 0..blocks_of(tokens) {
                let end = tokens.min(block_len.saturating_mul(block + 1));
                pages = pages.saturating_add((before + end).div_ceil(self.shape.page_size));
            }
        }
        limits.check(rows, longest, pages.saturating_mul(self.shape.page_size))?;
        if pages > MAX_PAGES {
            return Err(Error::Limit { what: "pages of a batch", limit: MAX_PAGES, got: pages });
        }
        Ok(())
    }

    /// [`extend`](Self::extend), and what `cut` makes of the batch; where it fails, sequences are as long as they were.
    fn extend_and_cut<T>(
        &mut self,
        growth: &[(SequenceId, usize)],
        cut: impl FnOnce(&Batch) -> Result<T>,
    ) -> Result<T> {
        let cut = cut(&self.extend(growth)?);
        if cut.is_err() {
            for &(id, tokens) in growth {
                self.pages.give_back(id, self.pages.len(id)? - tokens);
                self.enter(id);
            }
        }
        cut
    }

    /// Checks that this cache made the batch, and that no sequence of it was freed, truncated or forked and no page of
    /// it moved since then.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::UnknownSequence`], [`Error::StaleBatch`].
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let owned = self.owner.own("check", batch)?;
        self.ledger().check_rows(&owned)
    }

    /// Keys and values of a layer. Operations that read them through a batch that a cache made ask for this cache's, as it is now,
    /// and for a layer that has all its tokens.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<KvView<'_>> {
        let owner = self.owned_layer(layer)?;
        let kv = &self.layers[layer];
        Ok(KvView::new(kv.k.view(), kv.v.view(), self.layout)?.owned_by(owner))
    }

    /// Keys and values of a layer for writing, and its cached selections: what
    /// [`TokenSelect::append_select`](crate::TokenSelect::append_select) takes. It asks for a batch of this cache, as a
    /// [`step`](crate::TokenSelect::step) does, and counts what it has written.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<LayerMut<'_>> {
        let owner = self.owner.layer(layer)?;
        let selections =
            self.selections.as_mut().map(|selections| selections.layer_mut(layer)).transpose()?;
        Ok(LayerMut { kv: self.layers[layer].view_mut(self.layout)?.owned_by(owner), selections })
    }

    /// All tokens that the sequences have now count as written in this layer: for keys and values that were written by other
    /// means than this crate's, to the memory of [`layer`](Self::layer).
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn mark_written(&mut self, layer: usize) -> Result<()> {
        self.device.expect_no_recording("mark_written")?;
        self.owned_layer(layer)?;
        let lens = self.pages.lens();
        self.ledger().written[layer] = lens;
        Ok(())
    }

    /// What is known of a layer.
    pub(crate) fn owned_layer(&self, layer: usize) -> Result<OwnedLayer<'_>> {
        self.owner.layer(layer)
    }

    /// Leading tokens of a sequence whose keys and values a layer has: those that a step of the layer,
    /// [`TokenSelect::fill`](crate::TokenSelect::fill) or an append to [`layer_mut`](Self::layer_mut) has written. Less than [`len`](Self::len) after
    /// [`extend`](Self::extend), until the layer's turn.
    ///
    /// A layer that was left out of a step, or whose step failed, stays behind; its next step is [`Error::Unwritten`]. Two
    /// ways lead back, and neither loses anything: the layer's step with the batch that it missed, which stays valid
    /// until its sequences are truncated or forked; or [`truncate`](Self::truncate) to the shortest of the layers, and the
    /// block anew.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::Index`] where there is no such layer.
    pub fn written_len(&self, layer: usize, id: SequenceId) -> Result<usize> {
        self.pages.len(id)?;
        self.owned_layer(layer)?;
        Ok(self.ledger().get(layer, id.index()))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        Ledger::lock(&self.owner.ledger)
    }

    /// Extent of one layer's keys (and of its values).
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The cached selections, where the configuration asked for them.
    pub fn selections(&self) -> Option<&SelectionCache> {
        self.selections.as_ref()
    }

    /// The cached selections, to change them: to read and set statistics, or for the layers of an engine's own steps.
    pub fn selections_mut(&mut self) -> Option<&mut SelectionCache> {
        self.selections.as_mut()
    }

    /// How often selections were reused and made, summed over layers. Zeros without a Selection Cache. Waits for
    /// earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device fails.
    pub fn selection_stats(&self) -> Result<SelectionStats> {
        self.selections.as_ref().map_or(Ok(SelectionStats::default()), SelectionCache::stats)
    }
}
