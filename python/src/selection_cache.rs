//! Reuse of selections between steps.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use tokenselect::{PagedKvCache, SelectionCacheLayer};

use crate::cache::Cache;
use crate::config::Config;
use crate::device::Device;
use crate::errors::{Failure, Result, fence};
use crate::numbers::{of_class, optional_whole, whole};
use crate::slot::Slot;

/// Cached selections of every layer and sequence, for an engine with a cache of its own, which calls `clear`, `fork` and
/// `truncate` whenever it does the same to a sequence; or those of a `Cache`, from `Cache.selections`.
///
/// `num_layers * num_sequences * (num_qo_heads * head_dim + top_k) * 4` bytes on the device.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct SelectionCache {
    of: Of,
}

enum Of {
    Own(Box<Slot<tokenselect::SelectionCache>>),
    Cache(Py<Cache>),
}

/// What was done for the rows of past steps.
#[pyclass(frozen, eq, get_all, module = "tokenselect")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SelectionStats {
    /// Rows that used a cached selection again.
    reused: u64,
    /// Rows that were scored and selected anew.
    scored: u64,
    /// Rows so short that every token was selected without scoring.
    complete: u64,
}

impl From<tokenselect::SelectionStats> for SelectionStats {
    fn from(stats: tokenselect::SelectionStats) -> Self {
        let tokenselect::SelectionStats { reused, scored, complete } = stats;
        SelectionStats { reused, scored, complete }
    }
}

#[pymethods]
impl SelectionStats {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("SelectionStats", "`stats` of a `SelectionCache` or a `Cache`")))
    }

    fn __repr__(&self) -> String {
        let SelectionStats { reused, scored, complete } = self;
        format!("SelectionStats(reused={reused}, scored={scored}, complete={complete})")
    }
}

/// The error for a cache made from a configuration without Selection Cache.
fn no_selections() -> Failure {
    let (op, needs) = ("selections", "a cache whose configuration has `selection_cache=True`");
    tokenselect::Error::Missing { op, needs }.into()
}

fn of_cache(cache: &mut PagedKvCache) -> Result<&mut tokenselect::SelectionCache> {
    cache.selections_mut().ok_or_else(no_selections)
}

impl SelectionCache {
    /// The selections of a cache.
    pub fn of_cache(cache: &Bound<'_, Cache>) -> Result<Self> {
        let mut guard = cache.get().slot().write()?;
        of_cache(guard.get()?)?;
        Ok(SelectionCache { of: Of::Cache(cache.clone().unbind()) })
    }

    /// Runs `work` on the selections.
    fn with<R>(&self, work: impl FnOnce(&mut tokenselect::SelectionCache) -> Result<R>) -> Result<R> {
        match &self.of {
            Of::Own(slot) => work(slot.write()?.get()?),
            Of::Cache(cache) => work(of_cache(cache.get().slot().write()?.get()?)?),
        }
    }
}

/// The cached selections that one call was given, and their layer.
pub(crate) struct Reuse<'py> {
    given: Option<Bound<'py, SelectionCache>>,
    layer: usize,
}

impl<'py> Reuse<'py> {
    /// None.
    pub const NONE: Reuse<'static> = Reuse { given: None, layer: 0 };

    /// What was passed as `selection_cache` and `layer`.
    pub fn new(
        selection_cache: Option<&Bound<'py, PyAny>>,
        layer: Option<&Bound<'py, PyAny>>,
    ) -> Result<Self> {
        let given = selection_cache.filter(|given| !given.is_none());
        let given = given.map(|given| of_class::<SelectionCache>("selection_cache", given)).transpose()?;
        Ok(Reuse { given: given.cloned(), layer: optional_whole("layer", layer)?.unwrap_or(0) })
    }

    /// What is held by a recording: the object, and where its selections are.
    pub fn hold(&self, uses: &crate::uses::Uses<'_, 'py>) {
        let Some(given) = &self.given else { return };
        match &given.get().of {
            Of::Own(slot) => uses.hold(given, slot),
            Of::Cache(cache) => uses.hold(given, cache.get().slot()),
        }
    }

    /// Whether these are the selections of a cache.
    pub fn is_of(&self, cache: &Bound<'py, Cache>) -> bool {
        let of = self.given.as_ref().map(|given| &given.get().of);
        matches!(of, Some(Of::Cache(own)) if own.is(cache))
    }

    /// Checks that the layer is the one whose keys and values are used.
    pub fn expect_layer(&self, layer: usize) -> Result<()> {
        if self.layer == layer {
            return Ok(());
        }
        Err(Failure::argument("layer", format!("be that of `kv`, {layer}"), self.layer))
    }

    /// A layer's selections, where the cache has any.
    pub fn found<'a>(&self, selections: Option<SelectionCacheLayer<'a>>) -> Result<SelectionCacheLayer<'a>> {
        selections.ok_or_else(no_selections)
    }

    /// Runs `work` on the layer's selections.
    pub fn with<R>(&self, work: impl FnOnce(Option<SelectionCacheLayer<'_>>) -> Result<R>) -> Result<R> {
        match &self.given {
            None => work(None),
            Some(given) => given.get().with(|selections| work(Some(selections.layer_mut(self.layer)?))),
        }
    }
}

#[pymethods]
impl SelectionCache {
    #[new]
    #[pyo3(signature = (device, config, num_layers, num_sequences))]
    fn make(
        device: &Bound<'_, PyAny>,
        config: &Bound<'_, PyAny>,
        num_layers: &Bound<'_, PyAny>,
        num_sequences: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        fence(device.py(), || {
            let device = of_class::<Device>("device", device)?.get().get()?;
            let config = of_class::<Config>("config", config)?.get().inner();
            let (layers, sequences) =
                (whole("num_layers", num_layers)?, whole("num_sequences", num_sequences)?);
            let made = tokenselect::SelectionCache::new(device, config, layers, sequences)?;
            Ok(SelectionCache { of: Of::Own(Box::new(Slot::new("selection_cache", made))) })
        })
    }

    /// Forgets the selections of a sequence, in all layers.
    #[pyo3(text_signature = "($self, sequence)")]
    fn clear(&self, sequence: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(sequence.py(), || {
            let sequence = whole("sequence", sequence)?;
            self.with(|selections| Ok(selections.clear(sequence)?))
        })
    }

    /// Copies the selections of sequence `src` to `dst`, in all layers.
    #[pyo3(text_signature = "($self, src, dst)")]
    fn fork(&self, src: &Bound<'_, PyAny>, dst: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(src.py(), || {
            let (src, dst) = (whole("src", src)?, whole("dst", dst)?);
            self.with(|selections| Ok(selections.fork(src, dst)?))
        })
    }

    /// Forgets the selections that a sequence cut to `length` tokens cannot use.
    #[pyo3(text_signature = "($self, sequence, length)")]
    fn truncate(&self, sequence: &Bound<'_, PyAny>, length: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(sequence.py(), || {
            let (sequence, length) = (whole("sequence", sequence)?, whole("length", length)?);
            self.with(|selections| Ok(selections.truncate(sequence, length)?))
        })
    }

    /// `reused`, `scored` and `complete` rows so far, of a layer or of all. Waits for the device.
    #[pyo3(signature = (layer=None))]
    fn stats(&self, py: Python<'_>, layer: Option<&Bound<'_, PyAny>>) -> PyResult<SelectionStats> {
        fence(py, || {
            let layer = optional_whole("layer", layer)?;
            self.with(|selections| {
                let stats = match layer {
                    None => py.detach(|| selections.stats())?,
                    Some(layer) => py.detach(|| selections.layer_stats(layer))?,
                };
                Ok(stats.into())
            })
        })
    }

    /// Sets the counters to 0; cached selections stay.
    fn reset_stats(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.with(|selections| Ok(selections.reset_stats()?)))
    }

    /// Gives the selections back; those of a `Cache` stay in it.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || match &self.of {
            Of::Own(slot) => slot.close(),
            Of::Cache(_) => Ok(()),
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.of {
            Of::Own(_) => Ok(()),
            Of::Cache(cache) => visit.call(cache),
        }
    }

    fn __repr__(&self) -> String {
        match &self.of {
            Of::Cache(_) => "<tokenselect.SelectionCache of a cache>".to_owned(),
            Of::Own(_) => {
                let sizes = self.with(|own| Ok((own.num_layers(), own.num_sequences())));
                sizes.map_or_else(
                    |_| "<tokenselect.SelectionCache, closed or at work>".to_owned(),
                    |(layers, sequences)| {
                        format!("<tokenselect.SelectionCache of {layers} layers and {sequences} sequences>")
                    },
                )
            }
        }
    }
}
