//! The object that runs steps and single operations.
//!
//! This file has the class and its docs; what the methods do is in `operations` (one at a time, over anybody's cache) and `steps`
//! (whole ones).

mod inputs;
mod operations;
mod steps;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;
use tokenselect::{Buffer, HeadShape, Limits, Plan, PrefillConfig, TokenSelect};

use self::operations::Over;
use self::steps::Kind;
use crate::argument::Span;
use crate::batch::Batch;
use crate::config::{Config, plan_limits};
use crate::device::Device;
use crate::errors::{Result, fence};
use crate::memory::{Memory, address};
use crate::numbers::{choose, of_class, optional_whole, whole};
use crate::selection_cache::Reuse;
use crate::slot::Slot;
use crate::uses::Uses;

/// Runs steps and single operations: configuration, limits and workspace. One serves all layers and sequences of a model in turn.
///
/// - `max_rows`, `max_block_len`, `max_kv_tokens`: the largest batch: rows, query tokens of one row, and tokens cached by all
///   rows together, each rounded up to whole pages.
/// - `operations`: those that are asked for, some of `append`, `pool`, `score`, `vote` and `attend`; None for all. A GPU scores
///   and attends for some head dimensions, and votes for any.
///
/// Raises `OutOfMemoryError`, and `UnsupportedError` where the device cannot run the configuration (`Device.supports`).
///
/// Tensors of a step are `q`, `[num_query_tokens, num_qo_heads, head_dim]`, and `k` and `v`, `[num_query_tokens, num_kv_heads,
/// head_dim]`, of the configuration's type, where the device works. They may be slices of a fused projection's output: any
/// strides above 0 but that of the last dimension, which is 1. `out` is dense, of the configuration's type or f32, and `lse`,
/// `[num_query_tokens, num_qo_heads]`, dense f32: the natural log of the sum of exponentials. A tensor may be a temporary.
///
/// `selection_cache` and `layer` say where selections are used again from, and kept; without them tokens are selected anew.
///
/// A call that raises has changed nothing (but see `prefill`). Nothing waits for a GPU but `selected`.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Context {
    slot: Slot<TokenSelect>,
    device: Py<Device>,
    config: Py<Config>,
    heads: HeadShape,
    dtype: tokenselect::DType,
    limits: Limits,
    /// Of one that reads prompts: the most tokens of a sequence.
    max_kv_len: Option<usize>,
    /// Bytes of the workspace, which stays where it is.
    workspace: Vec<Span>,
}

const BUFFERS: [(&str, Buffer); 11] = [
    ("queries", Buffer::Queries),
    ("similarities", Buffer::Similarities),
    ("actions", Buffer::Actions),
    ("logits", Buffer::Logits),
    ("stats", Buffer::Stats),
    ("votes", Buffer::Votes),
    ("pooled_votes", Buffer::PooledVotes),
    ("top_k", Buffer::TopK),
    ("selected", Buffer::Selected),
    ("selected_len", Buffer::SelectedLen),
    ("products", Buffer::Products),
];

impl Context {
    fn new(
        device: &Bound<'_, Device>,
        config: &Bound<'_, Config>,
        mut select: TokenSelect,
        max_kv_len: Option<usize>,
    ) -> Result<Self> {
        let mut workspace = Vec::new();
        for buffer in Buffer::ALL {
            let tensor = select.buffer_mut(buffer);
            let bytes = tensor.shape().dims().iter().product::<usize>() * tensor.dtype().size();
            if bytes > 0 {
                let begin = address(tensor)?;
                workspace.push(Span { what: "the context's workspace", begin, end: begin + bytes });
            }
        }
        let (heads, dtype, limits) = (select.config().heads, select.config().dtype, *select.plan().limits());
        let (device, config) = (device.clone().unbind(), config.clone().unbind());
        let slot = Slot::new("context", select);
        Ok(Context { slot, device, config, heads, dtype, limits, max_kv_len, workspace })
    }

    /// The largest batch.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Where the library's object is.
    pub fn slot(&self) -> &Slot<TokenSelect> {
        &self.slot
    }

    /// What a call of a batch uses.
    fn uses<'a, 'py>(slf: &'a Bound<'py, Self>, work: usize) -> Uses<'a, 'py> {
        let uses = Uses::of_work(slf.py(), slf.get().device.get(), work);
        uses.hold(slf, &slf.get().slot);
        uses
    }

    /// Runs an operation on the workspace and cached selections.
    fn on_selections(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        selection_cache: Option<&Bound<'_, PyAny>>,
        layer: Option<&Bound<'_, PyAny>>,
        operation: fn(
            &mut TokenSelect,
            &tokenselect::Batch,
            Option<tokenselect::SelectionCacheLayer<'_>>,
        ) -> tokenselect::Result<()>,
    ) -> PyResult<()> {
        fence(slf.py(), || {
            let reuse = Reuse::new(selection_cache, layer)?;
            Context::with_batch(slf, batch, |select, batch, uses| {
                reuse.hold(uses);
                reuse.with(|cached| uses.run(|| operation(select, batch, cached)))
            })
        })
    }
}

#[pymethods]
impl Context {
    #[new]
    #[pyo3(
        signature = (device, config, *, max_rows=None, max_block_len=None, max_kv_tokens=None, operations=None),
        text_signature = "(device, config, *, max_rows=1, max_block_len=512, max_kv_tokens=131072, operations=None)"
    )]
    fn make(
        device: &Bound<'_, PyAny>,
        config: &Bound<'_, PyAny>,
        max_rows: Option<&Bound<'_, PyAny>>,
        max_block_len: Option<&Bound<'_, PyAny>>,
        max_kv_tokens: Option<&Bound<'_, PyAny>>,
        operations: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = device.py();
        fence(py, || {
            let (device, config) =
                (of_class::<Device>("device", device)?, of_class::<Config>("config", config)?);
            let (limits, operations) = plan_limits([max_rows, max_block_len, max_kv_tokens], operations)?;
            let (on, of) = (device.get().get()?, config.get().inner().clone());
            // Loading kernels takes seconds.
            let select = py.detach(|| TokenSelect::with_plan(Plan::new(on, of, limits, operations)?))?;
            Context::new(device, config, select, None)
        })
    }

    /// One that reads prompts, with a workspace of at most `max_workspace_bytes`: blocks of up to `block_len` tokens, sequences of
    /// up to `max_kv_len`, pieces of up to `max_piece_len`, which is the work of one step and of one call of `progress`.
    ///
    /// Short blocks are nearer to dense attention and cost more passes over the keys; long blocks pool many queries into one and
    /// are fastest. It selects for blocks alone: decoding has a context of its own, over the same cache.
    #[staticmethod]
    #[pyo3(
        signature = (device, config, *, block_len=None, max_kv_len=None, max_piece_len=None, max_workspace_bytes=None),
        text_signature = "(device, config, *, block_len=512, max_kv_len=131072, max_piece_len=8192, max_workspace_bytes=1073741824)"
    )]
    fn for_prefill(
        device: &Bound<'_, PyAny>,
        config: &Bound<'_, PyAny>,
        block_len: Option<&Bound<'_, PyAny>>,
        max_kv_len: Option<&Bound<'_, PyAny>>,
        max_piece_len: Option<&Bound<'_, PyAny>>,
        max_workspace_bytes: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = device.py();
        fence(py, || {
            let (device, config) =
                (of_class::<Device>("device", device)?, of_class::<Config>("config", config)?);
            let mut prefill = PrefillConfig::default();
            for (field, what, value) in [
                (&mut prefill.block_len, "block_len", block_len),
                (&mut prefill.max_kv_len, "max_kv_len", max_kv_len),
                (&mut prefill.max_piece_len, "max_piece_len", max_piece_len),
                (&mut prefill.max_workspace_bytes, "max_workspace_bytes", max_workspace_bytes),
            ] {
                if let Some(number) = optional_whole(what, value)? {
                    *field = number;
                }
            }
            let (on, of) = (device.get().get()?, config.get().inner().clone());
            let select = py.detach(|| TokenSelect::for_prefill(on, of, &prefill))?;
            Context::new(device, config, select, Some(prefill.max_kv_len))
        })
    }

    /// The device.
    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    /// The configuration.
    #[getter]
    fn config(&self, py: Python<'_>) -> Py<Config> {
        self.config.clone_ref(py)
    }

    /// Rows of the largest batch.
    #[getter]
    fn max_rows(&self) -> usize {
        self.limits.max_rows
    }

    /// Query tokens of the longest row.
    #[getter]
    fn max_block_len(&self) -> usize {
        self.limits.max_block_len
    }

    /// The most tokens of a sequence that one `for_prefill` reads; None for others.
    #[getter(max_kv_len)]
    fn longest(&self) -> Option<usize> {
        self.max_kv_len
    }

    /// Tokens cached by all rows of the largest batch together.
    #[getter]
    fn max_kv_tokens(&self) -> usize {
        self.limits.max_kv_tokens
    }

    /// Writes `k` and `v` into the pages of the batch. `kv` is a `KvView`, or `(cache, layer)`.
    #[pyo3(text_signature = "($self, batch, kv, k, v)")]
    fn append<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        fence(slf.py(), || Context::run_append(slf, batch, kv, k, v))
    }

    /// `pool`, `score`, `vote` and `top_k` in one: the tokens to attend to, left in the workspace.
    #[pyo3(
        signature = (batch, kv, q, selection_cache=None, layer=None),
        text_signature = "($self, batch, kv, q, selection_cache=None, layer=0)"
    )]
    fn select<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        selection_cache: Option<&Bound<'py, PyAny>>,
        layer: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        fence(slf.py(), || Context::run_select(slf, batch, kv, q, Reuse::new(selection_cache, layer)?))
    }

    /// `append`, then `select`, in fewer launches where blocks are short; with `attend` after it, a step over a borrowed cache.
    #[pyo3(
        signature = (batch, kv, q, k, v, selection_cache=None, layer=None),
        text_signature = "($self, batch, kv, q, k, v, selection_cache=None, layer=0)"
    )]
    #[allow(clippy::too_many_arguments)] // those of `select`, and what is appended
    fn append_select<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        selection_cache: Option<&Bound<'py, PyAny>>,
        layer: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        fence(slf.py(), || {
            Context::run_append_select(slf, batch, kv, [q, k, v], Reuse::new(selection_cache, layer)?)
        })
    }

    /// Scoring queries, similarities and actions from `q`. Changes nothing in `selection_cache`.
    #[pyo3(
        signature = (batch, q, selection_cache=None, layer=None),
        text_signature = "($self, batch, q, selection_cache=None, layer=0)"
    )]
    fn pool<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        selection_cache: Option<&Bound<'py, PyAny>>,
        layer: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        fence(slf.py(), || Context::run_pool(slf, batch, q, Reuse::new(selection_cache, layer)?))
    }

    /// Where ranks share the heads of a layer: the buffer `products`, f64, to be added over all ranks between `pool` without a
    /// Selection Cache and `decide`:
    ///
    ///     pool(batch, q);    compare(batch, reuse);  sum `products` over ranks;  decide(batch, reuse)
    ///     score(batch, kv);  vote(batch);            sum `votes` over ranks;     top_k(batch, reuse)
    #[pyo3(
        signature = (batch, selection_cache=None, layer=None),
        text_signature = "($self, batch, selection_cache=None, layer=0)"
    )]
    fn compare(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        selection_cache: Option<&Bound<'_, PyAny>>,
        layer: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Context::on_selections(slf, batch, selection_cache, layer, TokenSelect::compare)
    }

    /// Similarities and actions by the sums of `products`; pass what was passed to `compare`.
    #[pyo3(
        signature = (batch, selection_cache=None, layer=None),
        text_signature = "($self, batch, selection_cache=None, layer=0)"
    )]
    fn decide(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        selection_cache: Option<&Bound<'_, PyAny>>,
        layer: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Context::on_selections(slf, batch, selection_cache, layer, TokenSelect::decide)
    }

    /// Logits and softmax statistics of the candidates.
    #[pyo3(text_signature = "($self, batch, kv)")]
    fn score<'py>(slf: &Bound<'py, Self>, batch: &Bound<'py, PyAny>, kv: &Bound<'py, PyAny>) -> PyResult<()> {
        fence(slf.py(), || Context::run_score(slf, batch, kv))
    }

    /// Votes of the candidates.
    #[pyo3(text_signature = "($self, batch)")]
    fn vote(slf: &Bound<'_, Self>, batch: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(slf.py(), || {
            Context::with_batch(slf, batch, |select, batch, uses| uses.run(|| select.vote(batch)))
        })
    }

    /// The selected lists; pass what was passed to `pool`, or `decide`.
    #[pyo3(
        signature = (batch, selection_cache=None, layer=None),
        text_signature = "($self, batch, selection_cache=None, layer=0)"
    )]
    fn top_k(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        selection_cache: Option<&Bound<'_, PyAny>>,
        layer: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Context::on_selections(slf, batch, selection_cache, layer, TokenSelect::top_k)
    }

    /// `vote`, then `top_k` of these votes, which takes less than the two.
    #[pyo3(
        signature = (batch, selection_cache=None, layer=None),
        text_signature = "($self, batch, selection_cache=None, layer=0)"
    )]
    fn vote_top_k(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        selection_cache: Option<&Bound<'_, PyAny>>,
        layer: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Context::on_selections(slf, batch, selection_cache, layer, TokenSelect::vote_top_k)
    }

    /// Attention over the selected lists: `out`, or `(out, lse)` where `lse` is a tensor or True. What is not given is made like
    /// `q`, with f32 for `lse`.
    #[pyo3(signature = (batch, kv, q, out=None, lse=None))]
    fn attend<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_attend(slf, batch, kv, q, Over::Selected, (out, lse)))
    }

    /// As `attend`, over all tokens: ordinary paged attention.
    #[pyo3(signature = (batch, kv, q, out=None, lse=None))]
    fn attend_dense<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_attend(slf, batch, kv, q, Over::All, (out, lse)))
    }

    /// As `attend`, over lists of one's own, int32 on the device: `tokens` (and `ranks`) `[rows, width]`, `length` (and
    /// `total_len`) `[rows]`. Lists ascend and name tokens of their row only. With `ranks`, these are parts of longer lists.
    #[pyo3(signature = (batch, kv, q, tokens, length, ranks=None, total_len=None, out=None, lse=None))]
    #[allow(clippy::too_many_arguments)] // those of `attend`, and the lists
    fn attend_to<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        tokens: &Bound<'py, PyAny>,
        length: &Bound<'py, PyAny>,
        ranks: Option<&Bound<'py, PyAny>>,
        total_len: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let over = Over::Lists { tokens, length, ranks, total_len };
        fence(slf.py(), || Context::run_attend(slf, batch, kv, q, over, (out, lse)))
    }

    /// Combines attention over disjoint parts of a list: f32, `[parts, tokens, heads, head_dim]` and `[parts, tokens, heads]`.
    /// Writes `out`, and answers as `attend`.
    #[pyo3(signature = (parts, part_lses, out, lse=None))]
    fn merge<'py>(
        slf: &Bound<'py, Self>,
        parts: &Bound<'py, PyAny>,
        part_lses: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_merge(slf, parts, part_lses, out, lse))
    }

    /// Append, select and attend for one layer of an owned cache; `batch` comes from `Cache.extend`. Answers as `attend`.
    #[pyo3(signature = (cache, layer, batch, q, k, v, out=None, lse=None))]
    #[allow(clippy::too_many_arguments)] // a whole step
    fn step<'py>(
        slf: &Bound<'py, Self>,
        cache: &Bound<'py, PyAny>,
        layer: &Bound<'py, PyAny>,
        batch: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_step(slf, (cache, layer), batch, [q, k, v], (out, lse), Kind::Select))
    }

    /// As `step`, attending to all tokens.
    #[pyo3(signature = (cache, layer, batch, q, k, v, out=None, lse=None))]
    #[allow(clippy::too_many_arguments)] // a whole step
    fn step_dense<'py>(
        slf: &Bound<'py, Self>,
        cache: &Bound<'py, PyAny>,
        layer: &Bound<'py, PyAny>,
        batch: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_step(slf, (cache, layer), batch, [q, k, v], (out, lse), Kind::Dense))
    }

    /// Reads prompts in one layer of an owned cache, piece by piece. `pieces` come from `Cache.extend_in_pieces`; `q`, `k` and `v`
    /// have the query tokens of all of them.
    ///
    /// `progress(done, total)` is called after each piece; where it answers False or raises, reading stops. The layer and the
    /// outputs then have what was read, as where the device fails. It must not use or close this context nor the cache. Other
    /// threads run meanwhile. Answers as `attend`.
    #[pyo3(signature = (cache, layer, pieces, q, k, v, out=None, lse=None, progress=None))]
    #[allow(clippy::too_many_arguments)] // those of `step`, and progress
    fn prefill<'py>(
        slf: &Bound<'py, Self>,
        cache: &Bound<'py, PyAny>,
        layer: &Bound<'py, PyAny>,
        pieces: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || Context::run_prefill(slf, (cache, layer), pieces, [q, k, v], (out, lse), progress))
    }

    /// As `prefill`, over another engine's memory: `pieces` come from `Batch.in_pieces`. What `selection_cache` holds in `layer`
    /// for the sequences that grow is dropped.
    #[pyo3(
        signature = (pieces, kv, q, k, v, selection_cache=None, layer=None, out=None, lse=None, progress=None),
        text_signature = "($self, pieces, kv, q, k, v, selection_cache=None, layer=0, out=None, lse=None, progress=None)"
    )]
    #[allow(clippy::too_many_arguments)] // those of `append_select` and `attend`, and progress
    fn prefill_kv<'py>(
        slf: &Bound<'py, Self>,
        pieces: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        selection_cache: Option<&Bound<'py, PyAny>>,
        layer: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        fence(slf.py(), || {
            let reuse = Reuse::new(selection_cache, layer)?;
            Context::run_prefill_kv(slf, pieces, (kv, reuse), [q, k, v], (out, lse), progress)
        })
    }

    /// A buffer between operations, by name: `queries`, `similarities`, `actions`, `logits`, `stats`, `votes`, `pooled_votes`,
    /// `top_k`, `selected`, `selected_len`, `products`. The same memory; `.torch()`, or `.numpy()` for a copy. Token numbers are
    /// int32.
    #[pyo3(text_signature = "($self, name)")]
    fn workspace<'py>(slf: &Bound<'py, Self>, name: &Bound<'py, PyAny>) -> PyResult<Memory> {
        fence(slf.py(), || {
            let (this, buffer) = (slf.get(), choose("name", name, &BUFFERS)?);
            let mut select = this.slot.write()?;
            let tensor = select.get()?.buffer_mut(buffer);
            let (shape, dtype) = (tensor.shape(), tensor.dtype());
            let addr = address(tensor)?;
            Ok(Memory::of_context(slf, &this.device, addr, shape.dims(), dtype))
        })
    }

    /// Says that a buffer of the workspace holds results of one's own for a batch: votes for `top_k`, or lists for `attend`.
    #[pyo3(text_signature = "($self, name, batch)")]
    fn provide(slf: &Bound<'_, Self>, name: &Bound<'_, PyAny>, batch: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(slf.py(), || {
            let buffer = choose("name", name, &BUFFERS)?;
            Context::with_batch(slf, batch, |select, batch, _| Ok(select.provide(buffer, batch)?))
        })
    }

    /// Index into the elements of the buffer `logits` of a query head's logit for a token of a row.
    #[pyo3(text_signature = "($self, batch, row, token, qo_head)")]
    fn logit_index(
        slf: &Bound<'_, Self>,
        batch: &Bound<'_, PyAny>,
        row: &Bound<'_, PyAny>,
        token: &Bound<'_, PyAny>,
        qo_head: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        fence(slf.py(), || {
            let (row, token, head) = (whole("row", row)?, whole("token", token)?, whole("qo_head", qo_head)?);
            let select = slf.get().slot.read()?;
            let batch = of_class::<Batch>("batch", batch)?.get().slot().read()?;
            Ok(select.get()?.logit_index(batch.get()?, row, token, head)?)
        })
    }

    /// The selected tokens of a row, as a list. Waits for the device.
    #[pyo3(signature = (row=None), text_signature = "($self, row=0)")]
    fn selected<'py>(
        slf: &Bound<'py, Self>,
        row: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        fence(py, || {
            let row = row.map_or(Ok(0), |row| whole("row", row))?;
            let select = slf.get().slot.read()?;
            let select = select.get()?;
            let tokens = if select.device().is_cpu() {
                select.workspace().selected(row)?
            } else {
                py.detach(|| select.workspace().selected(row))?
            };
            Ok(PyList::new(py, tokens)?)
        })
    }

    /// Gives the workspace back now instead of when the object is dropped; where an array or a graph uses it, when these are gone.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    /// Panics while this context is at work: for the test of what becomes of a panic.
    fn _panic(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || {
            let _at_work = self.slot.write()?;
            std::panic::resume_unwind(Box::new("a test's own"))
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.device)
    }

    fn __repr__(&self) -> String {
        let Limits { max_rows, max_block_len, max_kv_tokens } = self.limits;
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = self.heads;
        format!(
            "<tokenselect.Context on {} for {num_qo_heads} query heads and {num_kv_heads} KV heads of {head_dim} {}, up to \
             {max_rows} rows, blocks of {max_block_len}, {max_kv_tokens} tokens>",
            self.device.get().name(),
            self.dtype
        )
    }
}
