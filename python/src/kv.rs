//! Keys and values of one layer, whoever owns them, and cached selections beside them.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use tokenselect::{DType, HeadShape, KvLayout, KvShape, KvStrides, KvViewMut, LayerMut, SelectionCacheLayer};

use crate::argument::{Argument, Span, pages};
use crate::cache::Cache;
use crate::errors::{Failure, Result, fence};
use crate::given::{Given, tuple};
use crate::memory::Memory;
use crate::numbers::{layout, layout_name};
use crate::selection_cache::Reuse;
use crate::uses::Uses;

/// Paged keys and values of one layer: `[num_pages, page_size, num_kv_heads, head_dim]`, or with `layout="HND"`
/// `[num_pages, num_kv_heads, page_size, head_dim]`, of the configuration's type.
///
/// Any strides but that of the last dimension, which is 1, those of keys and those of values. The two may be slices of one
/// tensor, in any order: `KvView(kv[:, 0], kv[:, 1])`, `KvView(kv[..., d:], kv[..., :d], "HND")`. Holds them, and reads where
/// they lie at every call.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct KvView {
    of: Of,
}

enum Of {
    Tensors { k: Py<PyAny>, v: Py<PyAny>, layout: KvLayout },
    Layer { cache: Py<Cache>, layer: usize, is_writable: bool },
}

impl KvView {
    /// A layer of a cache.
    pub fn of_cache(cache: &Bound<'_, Cache>, layer: usize, is_writable: bool) -> Self {
        KvView { of: Of::Layer { cache: cache.clone().unbind(), layer, is_writable } }
    }

    /// Where keys and values are now.
    pub fn look<'py>(&self, uses: &mut Uses<'_, 'py>, wanted: &Wanted) -> Result<Kv<'py>> {
        let py = uses.py();
        match &self.of {
            Of::Tensors { k, v, layout } => {
                let (k, v) = (uses.look("k pages", k.bind(py))?, uses.look("v pages", v.bind(py))?);
                Ok(Kv::Pools(Box::new(Pools::of(&k, &v, *layout, wanted)?)))
            }
            Of::Layer { cache, layer, is_writable } => {
                let cache = cache.bind(py);
                wanted.expect("kv", cache.get().layout(), cache.get().shape())?;
                uses.hold(cache, cache.get().slot());
                Ok(Kv::Layer { cache: cache.clone(), layer: *layer, is_writable: *is_writable })
            }
        }
    }

    fn part(&self, py: Python<'_>, place: usize) -> PyResult<Py<PyAny>> {
        match &self.of {
            Of::Tensors { k, v, .. } => Ok(if place == 0 { k.clone_ref(py) } else { v.clone_ref(py) }),
            Of::Layer { cache, layer, .. } => {
                let this = cache.get();
                let (addr, shape) = fence(py, || this.pool(*layer, place))?;
                let memory = Memory::of_cache(cache, py, this.device(), addr, &shape, this.dtype());
                Ok(Bound::new(py, memory)?.into_any().unbind())
            }
        }
    }
}

#[pymethods]
impl KvView {
    #[new]
    #[pyo3(signature = (k, v, layout=None), text_signature = "(k, v, layout='NHD')")]
    fn make(k: Bound<'_, PyAny>, v: Bound<'_, PyAny>, layout: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let layout = fence(k.py(), || layout.map_or(Ok(KvLayout::Nhd), self::layout))?;
        Ok(KvView { of: Of::Tensors { k: k.unbind(), v: v.unbind(), layout } })
    }

    /// The keys: what was passed, or a layer's memory.
    #[getter]
    fn k(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.part(py, 0)
    }

    /// The values, as the keys.
    #[getter]
    fn v(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.part(py, 1)
    }

    /// Order of the dimensions of a page: `NHD` or `HND`.
    #[getter(layout)]
    fn order(&self) -> &'static str {
        layout_name(match &self.of {
            Of::Tensors { layout, .. } => *layout,
            Of::Layer { cache, .. } => cache.get().layout(),
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.of {
            Of::Tensors { k, v, .. } => {
                visit.call(k)?;
                visit.call(v)
            }
            Of::Layer { cache, .. } => visit.call(cache),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match &self.of {
            Of::Tensors { k, layout, .. } => {
                let shape = k.bind(py).getattr("shape").and_then(|shape| shape.extract::<Vec<usize>>());
                let shape =
                    shape.map_or_else(|_| "tensors".to_owned(), |shape| format!("pages {}", tuple(&shape)));
                format!("<tokenselect.KvView of {shape}, {}>", layout_name(*layout))
            }
            Of::Layer { layer, is_writable, .. } => {
                let access = if *is_writable { "" } else { ", read only" };
                format!("<tokenselect.KvView of layer {layer} of a cache{access}>")
            }
        }
    }
}

/// Keys and values as they lie during one call.
pub(crate) enum Kv<'py> {
    Pools(Box<Pools>),
    Layer { cache: Bound<'py, Cache>, layer: usize, is_writable: bool },
}

/// What pages must be for a configuration and a batch.
pub(crate) struct Wanted {
    pub heads: HeadShape,
    pub dtype: DType,
    pub page_size: usize,
}

impl Wanted {
    /// Checks the shape of pages, in the order in which they were given.
    fn expect(&self, what: &str, layout: KvLayout, got: [usize; 4]) -> Result<()> {
        let (num_pages, page_size) = (got[0], self.page_size);
        let HeadShape { num_kv_heads, head_dim, .. } = self.heads;
        let shape = KvShape { num_pages, page_size, num_kv_heads, head_dim }.dims(layout);
        if got == shape {
            return Ok(());
        }
        let (dims, shape, got) = (dims_text(layout), tuple(&shape), tuple(&got));
        let rule = format!(
            "must have shape {shape}, which is {dims}, for a batch of page_size {page_size}, got {got}"
        );
        Err(Failure::tensor("TS_STATUS_SHAPE", what, rule))
    }
}

/// Pages of somebody else's.
pub(crate) struct Pools {
    k: Argument,
    v: Argument,
    shape: KvShape,
    strides: [KvStrides; 2],
    is_read_only: bool,
}

impl Pools {
    fn of(k: &Given<'_>, v: &Given<'_>, layout: KvLayout, wanted: &Wanted) -> Result<Self> {
        let dtype = wanted.dtype;
        k.expect_type(&[dtype])?;
        v.expect_type(&[dtype])?;
        let (&[num_pages, first, second, head_dim], true) = (k.shape(), k.shape() == v.shape()) else {
            let rule = format!("must have the same four dimensions, {}", dims_text(layout));
            let got = format!("{} and {}", tuple(k.shape()), tuple(v.shape()));
            let rule = format!("{rule}, got {got}");
            return Err(Failure::tensor("TS_STATUS_SHAPE", "k pages` and `v pages", rule));
        };
        wanted.expect("k pages", layout, [num_pages, first, second, head_dim])?;
        let (page_size, num_kv_heads) =
            if layout == KvLayout::Nhd { (first, second) } else { (second, first) };
        let shape = KvShape { num_pages, page_size, num_kv_heads, head_dim };
        let strides = [strides_of(k, shape, layout)?, strides_of(v, shape, layout)?];
        Ok(Pools {
            k: pages("k pages", k.addr, dtype, shape, strides[0])?,
            v: pages("v pages", v.addr, dtype, shape, strides[1])?,
            shape,
            strides,
            is_read_only: k.is_read_only || v.is_read_only,
        })
    }

    /// The view, to read.
    ///
    /// # Safety
    /// - The memory is `device`'s and there during `'a`; nothing writes it while operations on the view run.
    unsafe fn view<'a>(&self, device: &'a tokenselect::Device) -> Result<tokenselect::KvView<'a>> {
        // SAFETY: the caller's promise.
        let (k, v) = unsafe { (self.k.view(device)?, self.v.view(device)?) };
        Ok(tokenselect::KvView::strided(k, v, self.shape, self.strides)?)
    }

    /// The view, to write.
    ///
    /// # Safety
    /// - As for [`view`](Self::view), and nothing reads it either.
    unsafe fn view_mut<'a>(&self, device: &'a tokenselect::Device) -> Result<KvViewMut<'a>> {
        if self.is_read_only {
            let rule = "must be memory that can be written, it is read-only";
            return Err(Failure::tensor("TS_STATUS_CONFIG", "kv", rule));
        }
        let Pools { k, v, shape, strides, .. } = *self;
        let (k_span, v_span) = (k.span()?, v.span()?);
        if k_span.expect_apart(&v_span).is_ok() {
            // SAFETY: the caller's promise, and the two are apart.
            let (k, v) = unsafe { (k.view_mut(device)?, v.view_mut(device)?) };
            return Ok(KvViewMut::strided(k, v, shape, strides)?);
        }
        // Among each other: one tensor from the first of the two on.
        let first = k.addr.min(v.addr);
        if k.addr == v.addr {
            k_span.expect_apart(&v_span)?;
        }
        let size = k.dtype.size();
        let mut offsets = [0; 2];
        for (offset, argument) in offsets.iter_mut().zip([&k, &v]) {
            if !(argument.addr - first).is_multiple_of(size) {
                let rule = format!("must be at an address divisible by {size}, got {:#x}", argument.addr);
                return Err(Failure::tensor("TS_STATUS_MISALIGNED", argument.what, rule));
            }
            *offset = (argument.addr - first) / size;
        }
        let end = k_span.end.max(v_span.end);
        let both = Argument {
            what: "kv",
            addr: first,
            dtype: k.dtype,
            shape: [(end - first) / size].into(),
            strides: None,
        };
        // SAFETY: the caller's promise; all bytes between the first and the last belong to the pools.
        let both = unsafe { both.view_mut(device)? };
        Ok(KvViewMut::combined(both, offsets, shape, strides)?)
    }
}

/// The dimensions of pages, for errors.
fn dims_text(layout: KvLayout) -> &'static str {
    match layout {
        KvLayout::Nhd => "[num_pages, page_size, num_kv_heads, head_dim] with layout=\"NHD\"",
        KvLayout::Hnd => "[num_pages, num_kv_heads, page_size, head_dim] with layout=\"HND\"",
    }
}

/// Strides of pages, tokens and heads. That of a dimension of one place means nothing, and becomes that of dense pages.
fn strides_of(given: &Given<'_>, shape: KvShape, layout: KvLayout) -> Result<KvStrides> {
    let dense = KvStrides::dense(shape, layout);
    let (&[page, first, second, element], false) = (given.strides(), given.shape().contains(&0)) else {
        return Ok(dense); // those of no elements mean nothing
    };
    let all = tuple(given.strides());
    if shape.head_dim > 1 && element != 1 {
        let rule = format!("must have adjacent elements in the last dimension, its strides are {all}");
        return Err(Failure::tensor("TS_STATUS_CONFIG", given.what, rule));
    }
    let of = |stride: isize, size: usize, dense: usize| {
        if size <= 1 {
            return Ok(dense);
        }
        usize::try_from(stride).map_err(|_| {
            Failure::tensor(
                "TS_STATUS_CONFIG",
                given.what,
                format!("must have strides of 0 or more, its strides are {all}"),
            )
        })
    };
    let (token, head) = if layout == KvLayout::Nhd { (first, second) } else { (second, first) };
    Ok(KvStrides {
        page: of(page, shape.num_pages, dense.page)?,
        token: of(token, shape.page_size, dense.token)?,
        head: of(head, shape.num_kv_heads, dense.head)?,
    })
}

impl<'py> Kv<'py> {
    /// Bytes of keys and of values, gaps included.
    pub fn spans(&self) -> Result<[Span; 2]> {
        match self {
            Kv::Pools(pools) => Ok([pools.k.span()?, pools.v.span()?]),
            Kv::Layer { cache, layer, .. } => cache.get().spans(*layer),
        }
    }

    /// Runs `work` on the layer, to read, and cached selections.
    ///
    /// # Safety
    /// - The memory is `device`'s, and nothing else writes it meanwhile.
    pub unsafe fn read<R>(
        &self,
        device: &tokenselect::Device,
        reuse: &Reuse<'py>,
        work: impl FnOnce(tokenselect::KvView<'_>, Option<SelectionCacheLayer<'_>>) -> Result<R>,
    ) -> Result<R> {
        match self {
            Kv::Pools(pools) => {
                // SAFETY: the caller's promise.
                let kv = unsafe { pools.view(device)? };
                reuse.with(|cached| work(kv, cached))
            }
            Kv::Layer { cache, layer, .. } => {
                let mut guard = cache.get().slot().write()?;
                let inner = guard.get()?;
                if reuse.is_of(cache) {
                    reuse.expect_layer(*layer)?;
                    let LayerMut { kv, selections } = inner.layer_mut(*layer)?;
                    return work(kv.as_view()?, Some(reuse.found(selections)?));
                }
                let kv = inner.layer(*layer)?;
                reuse.with(|cached| work(kv, cached))
            }
        }
    }

    /// Runs `work` on the layer, to write, and cached selections.
    ///
    /// # Safety
    /// - As for [`read`](Self::read), and nothing else reads it either.
    pub unsafe fn write<R>(
        &self,
        device: &tokenselect::Device,
        reuse: &Reuse<'py>,
        work: impl FnOnce(LayerMut<'_>) -> Result<R>,
    ) -> Result<R> {
        match self {
            Kv::Pools(pools) => {
                // SAFETY: the caller's promise.
                let kv = unsafe { pools.view_mut(device)? };
                reuse.with(|selections| work(LayerMut { kv, selections }))
            }
            Kv::Layer { is_writable: false, .. } => {
                let rule = "must be memory that can be written: take `Cache.layer_mut`, or pass `(cache, layer)` to `append`";
                Err(Failure::tensor("TS_STATUS_CONFIG", "kv", rule))
            }
            Kv::Layer { cache, layer, .. } => {
                let mut guard = cache.get().slot().write()?;
                let LayerMut { kv, selections } = guard.get()?.layer_mut(*layer)?;
                if reuse.is_of(cache) {
                    reuse.expect_layer(*layer)?;
                    let selections = Some(reuse.found(selections)?);
                    return work(LayerMut { kv, selections });
                }
                reuse.with(|selections| work(LayerMut { kv, selections }))
            }
        }
    }
}
