//! The paged KV cache: memory for keys and values, page tables, and the sequences in them.

mod pages;
mod view;

pub use pages::{MAX_PAGE_SIZE, PageAllocator, PageCopy, PageTables, SequenceId};
pub(crate) use view::KvStorageMut;
pub use view::{KvLayout, KvShape, KvStrides, KvView, KvViewMut};

use crate::backend::CopyPagesArgs;
use crate::batch::Batch;
use crate::config::SelectConfig;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::selection_cache::{SelectionCache, SelectionStats};
use crate::tensor::{DType, Tensor};

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
    device: Device,
    pages: PageAllocator,
    shape: KvShape,
    layout: KvLayout,
    dtype: DType,
    layers: Vec<LayerKv>,
    selections: Option<SelectionCache>,
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
        if cache.num_layers == 0 {
            return Err(Error::config("num_layers", "at least 1", cache.num_layers));
        }
        let pages = PageAllocator::new(cache.num_pages, cache.page_size, cache.max_sequences)?;
        let shape = KvShape {
            num_pages: cache.num_pages,
            page_size: cache.page_size,
            num_kv_heads: config.heads.num_kv_heads,
            head_dim: config.heads.head_dim,
        };
        let pool = || Tensor::zeros_on(device, config.dtype, shape.dims(cache.layout));
        let mut layers = Vec::with_capacity(cache.num_layers);
        for _ in 0..cache.num_layers {
            layers.push(LayerKv { k: pool()?, v: pool()? });
        }
        let selections = match config.selection_cache {
            Some(_) => Some(SelectionCache::new(device, config, cache.num_layers, cache.max_sequences)?),
            None => None,
        };
        let device = device.clone();
        Ok(PagedKvCache {
            device,
            pages,
            shape,
            layout: cache.layout,
            dtype: config.dtype,
            layers,
            selections,
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
        let id = self.pages.create()?;
        if let Some(selections) = &mut self.selections {
            selections.clear(id.index())?;
        }
        Ok(id)
    }

    /// Adds a sequence with the same tokens and cached selections. Pages are shared until one of the two
    /// writes into them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TooManySequences`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let child = self.pages.fork(id)?;
        if let Some(selections) = &mut self.selections {
            selections.fork(id.index(), child.index())?;
        }
        Ok(child)
    }

    /// Drops the tokens of a sequence from `len` on, for example rejected speculative ones, and every
    /// cached selection that could name one of them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TruncateBeyondEnd`].
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.pages.truncate(id, len)?;
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
        self.pages.free(id)
    }

    /// Makes room for a block of new tokens of each sequence named, all or nothing, and returns the batch
    /// whose rows are these sequences in this order.
    ///
    /// The new tokens' keys and values are undefined until every layer was appended to. A length of 0 is a
    /// padding row.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::UnknownSequence`], [`Error::DuplicateSequence`],
    /// [`Error::SequenceTooLong`].
    pub fn extend(&mut self, growth: &[(SequenceId, usize)]) -> Result<Batch> {
        let copies = self.pages.extend(growth)?;
        if !copies.is_empty() {
            for layer in &mut self.layers {
                let kv = layer.view_mut(self.layout)?;
                self.device.backend().copy_pages(CopyPagesArgs { copies: &copies, kv })?;
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
        let owners = ids.iter().map(|&id| Ok((id, self.pages.revision(id)?))).collect::<Result<_>>()?;
        Ok(batch.owned_by(self.pages.id(), owners))
    }

    /// Checks that this cache made the batch, and that no sequence of it was freed, truncated or forked and no page of
    /// it moved since then.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::StaleBatch`].
    pub fn check(&self, batch: &Batch) -> Result<()> {
        if batch.allocator() != self.pages.id() {
            return Err(Error::Missing { op: "step", needs: "a batch made by this cache's `extend`" });
        }
        for (row, &(id, revision)) in batch.owners().iter().enumerate() {
            let (expected, got) = (batch.kv_len(row), self.pages.len(id)?);
            if got < expected || self.pages.revision(id)? != revision {
                return Err(Error::StaleBatch { row, id, expected, got });
            }
        }
        Ok(())
    }

    /// Keys and values of a layer.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<KvView<'_>> {
        let limit = self.layers.len();
        let kv = self.layers.get(layer).ok_or(Error::Index { what: "layer", limit, got: layer })?;
        KvView::new(kv.k.view(), kv.v.view(), self.layout)
    }

    /// Keys and values of a layer for writing, and its cached selections.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<(KvViewMut<'_>, Option<&mut SelectionCache>)> {
        let limit = self.layers.len();
        let kv = self.layers.get_mut(layer).ok_or(Error::Index { what: "layer", limit, got: layer })?;
        Ok((kv.view_mut(self.layout)?, self.selections.as_mut()))
    }

    /// Extent of one layer's keys (and of its values).
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The cached selections, where the configuration asked for them.
    pub fn selections(&self) -> Option<&SelectionCache> {
        self.selections.as_ref()
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
