//! The owned cache: keys and values of many sequences in shared pages.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use tokenselect::{CacheConfig, DType, KvLayout, PagedKvCache, SequenceId, TensorView};

use crate::argument::Span;
use crate::batch::{Batch, Pieces};
use crate::config::Config;
use crate::context::Context;
use crate::device::Device;
use crate::errors::{Failure, Kind, Result, fence};
use crate::kv::KvView;
use crate::numbers::{layout, layout_name, of_class, optional_whole, type_name, whole, whole_below};
use crate::selection_cache::{SelectionCache, SelectionStats};
use crate::slot::{Lends, Slot};
use crate::tables::push;

/// Keys and values of many sequences in shared pages, with their page tables and their Selection Cache.
///
/// `num_layers`, `num_pages` of every layer, `page_size` (1 to 256 tokens), `max_sequences` alive at once, `layout` of a page:
/// `"NHD"` or `"HND"`. `2 * num_layers * num_pages * page_size * num_kv_heads * head_dim` elements of the configuration's type, for
/// `num_pages * page_size` tokens of all sequences together: 16384 by default, where a `Context` has room for 131072.
/// Raises `OutOfMemoryError`.
///
/// Sequences are whole numbers, none of which is used twice. `create`, `fork`, `truncate` and `free` raise an `ArgumentError`
/// for a sequence that is not there; `extend` raises `OutOfPagesError`; then nothing was changed.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Cache {
    slot: Slot<PagedKvCache>,
    device: Py<Device>,
    dtype: DType,
    layout: KvLayout,
    /// Of keys, and of values, of a layer.
    shape: [usize; 4],
    page_size: usize,
    /// Bytes of keys and of values of each layer, which stay where they are.
    spans: Vec<[Span; 2]>,
}

/// Address of the first element, wherever it lies.
fn address(tensor: TensorView<'_>) -> Result<usize> {
    if let Ok(addr) = tensor.device_addr() {
        return Ok(addr as usize);
    }
    Ok(match tensor.dtype() {
        DType::F16 => tensor.as_slice::<half::f16>()?.as_ptr().expose_provenance(),
        DType::Bf16 => tensor.as_slice::<half::bf16>()?.as_ptr().expose_provenance(),
        _ => tensor.as_slice::<f32>()?.as_ptr().expose_provenance(),
    })
}

impl Cache {
    /// Where the library's cache is.
    pub fn slot(&self) -> &Slot<PagedKvCache> {
        &self.slot
    }

    /// The device.
    pub fn device(&self) -> &Py<Device> {
        &self.device
    }

    /// Type of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of the keys, and of the values, of a layer.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Order of the dimensions of a page.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Bytes of the keys and of the values of a layer.
    pub fn spans(&self, layer: usize) -> Result<[Span; 2]> {
        let limit = self.spans.len();
        let none = tokenselect::Error::Index { what: "layer", limit, got: layer };
        self.spans.get(layer).copied().ok_or_else(|| none.into())
    }

    /// Address and shape of a layer's keys, 0, or values, 1.
    pub fn pool(&self, layer: usize, place: usize) -> Result<(usize, [usize; 4])> {
        self.slot.expect_open()?;
        Ok((self.spans(layer)?[place].begin, self.shape))
    }

    /// An error of growing: where pages are short, with what there are, since their number has a default.
    fn explained(&self, error: tokenselect::Error) -> Failure {
        let (tokenselect::Error::OutOfPages { .. }, [num_pages, ..]) = (&error, self.shape) else {
            return error.into();
        };
        let page_size = self.page_size;
        let text = format!(
            "{error}: `num_pages`={num_pages} of `page_size`={page_size} hold {} tokens of all sequences together, make \
             the cache with more",
            num_pages * page_size
        );
        Failure::Rule { kind: Kind::OutOfPages, status: "TS_STATUS_OUT_OF_PAGES", text }
    }

    fn read<R>(&self, work: impl FnOnce(&PagedKvCache) -> Result<R>) -> Result<R> {
        work(self.slot.read()?.get()?)
    }

    fn write<R>(&self, work: impl FnOnce(&mut PagedKvCache) -> Result<R>) -> Result<R> {
        work(self.slot.write()?.get()?)
    }
}

fn sequence_of(sequence: &Bound<'_, PyAny>) -> Result<SequenceId> {
    Ok(SequenceId::from_bits(whole_below("sequence", sequence, u64::MAX)?))
}

/// Sequences and their new tokens.
fn growth_of(growth: &Bound<'_, PyAny>) -> Result<Vec<(SequenceId, usize)>> {
    let wrong = |got: &Bound<'_, PyAny>| {
        Failure::of_type("growth", "a list of pairs of a sequence and its new tokens", type_name(got))
    };
    let mut rows = Vec::new();
    for row in growth.try_iter().map_err(|_| wrong(growth))? {
        let row = row?;
        let (sequence, tokens) =
            row.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>().map_err(|_| wrong(&row))?;
        let row = (sequence_of(&sequence)?, whole("num_tokens", &tokens)?);
        push("growth", &mut rows, row)?;
    }
    Ok(rows)
}

#[pymethods]
impl Cache {
    #[new]
    #[pyo3(
        signature = (device, config, *, num_layers=None, num_pages=None, page_size=None, max_sequences=None, layout=None),
        text_signature = "(device, config, *, num_layers=1, num_pages=1024, page_size=16, max_sequences=16, layout='NHD')"
    )]
    fn make(
        device: &Bound<'_, PyAny>,
        config: &Bound<'_, PyAny>,
        num_layers: Option<&Bound<'_, PyAny>>,
        num_pages: Option<&Bound<'_, PyAny>>,
        page_size: Option<&Bound<'_, PyAny>>,
        max_sequences: Option<&Bound<'_, PyAny>>,
        layout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        fence(device.py(), || {
            let device = of_class::<Device>("device", device)?;
            let config = of_class::<Config>("config", config)?.get().inner();
            let mut size = CacheConfig::default();
            for (field, what, value) in [
                (&mut size.num_layers, "num_layers", num_layers),
                (&mut size.num_pages, "num_pages", num_pages),
                (&mut size.page_size, "page_size", page_size),
                (&mut size.max_sequences, "max_sequences", max_sequences),
            ] {
                if let Some(number) = optional_whole(what, value)? {
                    *field = number;
                }
            }
            if let Some(layout) = layout {
                size.layout = self::layout(layout)?;
            }
            let cache = PagedKvCache::new(device.get().get()?, config, &size)?;
            let bytes = cache.shape().dims(size.layout).iter().product::<usize>() * config.dtype.size();
            let spans = (0..cache.num_layers()).map(|layer| {
                let kv = cache.layer(layer)?;
                let span = |what, tensor| -> Result<Span> {
                    let begin = address(tensor)?;
                    Ok(Span { what, begin, end: begin.saturating_add(bytes) })
                };
                Ok([span("keys of the cache", kv.k())?, span("values of the cache", kv.v())?])
            });
            Ok(Cache {
                device: device.clone().unbind(),
                dtype: config.dtype,
                layout: size.layout,
                shape: cache.shape().dims(size.layout),
                page_size: size.page_size,
                spans: spans.collect::<Result<_>>()?,
                slot: Slot::new("cache", cache),
            })
        })
    }

    /// A new, empty sequence.
    fn create(&self, py: Python<'_>) -> PyResult<u64> {
        fence(py, || self.write(|cache| Ok(cache.create()?.to_bits())))
    }

    /// A new sequence with the same tokens and cached selections. Pages are shared until one of the two writes into them.
    #[pyo3(text_signature = "($self, sequence)")]
    fn fork(&self, sequence: &Bound<'_, PyAny>) -> PyResult<u64> {
        fence(sequence.py(), || {
            let sequence = sequence_of(sequence)?;
            self.write(|cache| Ok(cache.fork(sequence)?.to_bits()))
        })
    }

    /// Drops the tokens of a sequence from `length` on, and every cached selection that could name one of them.
    #[pyo3(text_signature = "($self, sequence, length)")]
    fn truncate(&self, sequence: &Bound<'_, PyAny>, length: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(sequence.py(), || {
            let (sequence, length) = (sequence_of(sequence)?, whole("length", length)?);
            self.write(|cache| Ok(cache.truncate(sequence, length)?))
        })
    }

    /// Ends a sequence; pages that no fork holds become free.
    #[pyo3(text_signature = "($self, sequence)")]
    fn free(&self, sequence: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(sequence.py(), || {
            let sequence = sequence_of(sequence)?;
            self.write(|cache| Ok(cache.free(sequence)?))
        })
    }

    /// Tokens of a sequence.
    #[pyo3(text_signature = "($self, sequence)")]
    fn len(&self, sequence: &Bound<'_, PyAny>) -> PyResult<usize> {
        fence(sequence.py(), || {
            let sequence = sequence_of(sequence)?;
            self.read(|cache| Ok(cache.len(sequence)?))
        })
    }

    /// Pages that no sequence holds.
    #[getter]
    fn num_free_pages(&self, py: Python<'_>) -> PyResult<usize> {
        fence(py, || self.read(|cache| Ok(cache.pages().num_free_pages())))
    }

    /// Layers.
    #[getter]
    fn num_layers(&self) -> usize {
        self.spans.len()
    }

    /// Makes room for new tokens, `[(sequence, num_tokens)]`, all or nothing; answers the batch of these rows, for all layers. A
    /// length of 0 is a padding row.
    #[pyo3(text_signature = "($self, growth)")]
    fn extend(&self, growth: &Bound<'_, PyAny>) -> PyResult<Batch> {
        fence(growth.py(), || {
            let growth = growth_of(growth)?;
            self.write(|cache| {
                let batch = cache.extend(&growth).map_err(|error| self.explained(error))?;
                Ok(Batch::new(batch))
            })
        })
    }

    /// Makes room for whole prompts, `[(sequence, num_tokens)]` of any length, cut into blocks of `block_len` tokens and these
    /// into pieces within the limits of `context`; answers the pieces, for `prefill` of all layers.
    #[pyo3(text_signature = "($self, context, growth, block_len)")]
    fn extend_in_pieces(
        &self,
        context: &Bound<'_, PyAny>,
        growth: &Bound<'_, PyAny>,
        block_len: &Bound<'_, PyAny>,
    ) -> PyResult<Pieces> {
        fence(context.py(), || {
            let context = of_class::<Context>("context", context)?.get();
            let (limits, growth, block_len) =
                (context.limits(), growth_of(growth)?, whole("block_len", block_len)?);
            self.write(|cache| {
                for &(sequence, tokens) in growth.iter().filter(|&&(_, tokens)| tokens > 0) {
                    context.expect_kv_len(cache.len(sequence)?.saturating_add(tokens))?;
                }
                let pieces = cache.extend_in_pieces(&limits, &growth, block_len);
                Ok(Pieces::new(pieces.map_err(|error| self.explained(error))?))
            })
        })
    }

    /// Leading tokens of a sequence whose keys and values a layer has: less than `len` until the layer's step.
    ///
    /// A layer that was left out of a step stays behind, and its next step raises. Two ways lead back: the layer's step with the
    /// batch that it missed, or `truncate` to the shortest of the layers.
    #[pyo3(text_signature = "($self, layer, sequence)")]
    fn written_len(&self, layer: &Bound<'_, PyAny>, sequence: &Bound<'_, PyAny>) -> PyResult<usize> {
        fence(layer.py(), || {
            let (layer, sequence) = (whole("layer", layer)?, sequence_of(sequence)?);
            self.read(|cache| Ok(cache.written_len(layer, sequence)?))
        })
    }

    /// Keys and values of a layer, to read.
    #[pyo3(text_signature = "($self, layer)")]
    fn layer(slf: &Bound<'_, Self>, layer: &Bound<'_, PyAny>) -> PyResult<KvView> {
        fence(slf.py(), || {
            let (this, layer) = (slf.get(), whole("layer", layer)?);
            this.slot.expect_open()?;
            this.spans(layer)?;
            Ok(KvView::of_cache(slf, layer, false))
        })
    }

    /// Keys and values of a layer for kernels of one's own that write them (`KvView.k`, `KvView.v`): all tokens that the
    /// sequences have now count as written.
    #[pyo3(text_signature = "($self, layer)")]
    fn layer_mut(slf: &Bound<'_, Self>, layer: &Bound<'_, PyAny>) -> PyResult<KvView> {
        fence(slf.py(), || {
            let layer = whole("layer", layer)?;
            slf.get().write(|cache| Ok(cache.mark_written(layer)?))?;
            Ok(KvView::of_cache(slf, layer, true))
        })
    }

    /// The Selection Cache, for `Context.select` and the like.
    fn selections(slf: &Bound<'_, Self>) -> PyResult<SelectionCache> {
        fence(slf.py(), || SelectionCache::of_cache(slf))
    }

    /// `reused`, `scored` and `complete` rows so far, of all layers. Waits for the device.
    fn stats(&self, py: Python<'_>) -> PyResult<SelectionStats> {
        fence(py, || self.read(|cache| Ok(py.detach(|| cache.selection_stats())?.into())))
    }

    /// Gives the memory back now instead of when the object is dropped; where an array or a graph uses it, when these are gone.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.device)
    }

    fn __repr__(&self) -> String {
        format!(
            "<tokenselect.Cache of {} layers, pages {} of {}, {}, on {}>",
            self.spans.len(),
            crate::given::tuple(&self.shape),
            self.dtype,
            layout_name(self.layout),
            self.device.get().name()
        )
    }
}
