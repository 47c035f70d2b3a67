//! Batches: which queries belong to which sequence, and in which pages its tokens lie.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use tokenselect::{PageTables, TablesOnDevice};

use crate::argument::Argument;
use crate::context::Context;
use crate::device::Device;
use crate::errors::{Failure, Result, fence};
use crate::given::{Given, tuple};
use crate::numbers::{of_class, switch, whole};
use crate::slot::Slot;
use crate::tables::table;
use crate::uses::Uses;
use tokenselect::DType;

/// One step's rows, from FlashInfer's tables: lists, arrays or tensors of whole numbers, copied.
///
/// They describe the cache *after* the block was appended. All have as many rows as `last_page_len`.
///
/// - `page_size`: tokens in a page, 1 to 256.
/// - `qo_indptr`, `[rows + 1]`: the query tokens of row `r` are rows `qo_indptr[r]` to `qo_indptr[r + 1]` of `q`, `k`, `v`
///   and `out`.
/// - `indptr`, `[rows + 1]`, and `indices`: the pages of row `r` are `indices[indptr[r]]` to `indices[indptr[r + 1]]`.
/// - `last_page_len`, `[rows]`: tokens in each row's last page.
/// - `sequence_indices`, `[rows]`: the row of the Selection Cache of each row, all different.
/// - `candidates`, `[rows, 2]`: for parts of sequences, begin and end of the tokens that compete for the top-k.
///
/// A table that breaks a rule is an `ArgumentError` that names table, entry and number; entries are from 0 to 2^31 - 1.
/// Batches never change, and may be shared by threads.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Batch {
    slot: Slot<tokenselect::Batch>,
    /// Query tokens of all rows.
    pub(crate) num_tokens: usize,
    info: BatchInfo,
}

/// Sizes of a batch.
///
/// `max_kv_len` and `num_token_places`, the places for tokens in logits and votes, are upper bounds where the tables are the
/// device's alone.
#[pyclass(frozen, eq, get_all, module = "tokenselect")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchInfo {
    /// Rows.
    num_rows: usize,
    /// Query tokens of all rows: the leading dimension of `q`, `k`, `v` and `out`.
    num_query_tokens: usize,
    /// Tokens in a page.
    page_size: usize,
    /// The longest block.
    max_block_len: usize,
    /// The most tokens cached by one row.
    max_kv_len: usize,
    /// Places for tokens in logits and votes.
    num_token_places: usize,
}

/// Sizes and places of a row.
#[pyclass(frozen, eq, get_all, module = "tokenselect")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchRow {
    /// First query token.
    query_begin: usize,
    /// Query tokens of the row.
    block_len: usize,
    /// Tokens cached, the block included.
    kv_len: usize,
    /// Where the row begins in logits and votes.
    token_base: usize,
}

#[pymethods]
impl BatchInfo {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("BatchInfo", "`Batch.info`")))
    }

    fn __repr__(&self) -> String {
        format!(
            "BatchInfo(num_rows={}, num_query_tokens={}, page_size={}, max_block_len={}, max_kv_len={}, num_token_places={})",
            self.num_rows,
            self.num_query_tokens,
            self.page_size,
            self.max_block_len,
            self.max_kv_len,
            self.num_token_places
        )
    }
}

#[pymethods]
impl BatchRow {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("BatchRow", "`Batch.row`")))
    }

    fn __repr__(&self) -> String {
        format!(
            "BatchRow(query_begin={}, block_len={}, kv_len={}, token_base={})",
            self.query_begin, self.block_len, self.kv_len, self.token_base
        )
    }
}

impl Batch {
    /// A batch of the library's.
    pub fn new(batch: tokenselect::Batch) -> Self {
        let info = BatchInfo {
            num_rows: batch.num_rows(),
            num_query_tokens: batch.num_query_tokens(),
            page_size: batch.page_size(),
            max_block_len: batch.max_block_len(),
            max_kv_len: batch.max_kv_len(),
            num_token_places: batch.num_token_places(),
        };
        Batch { num_tokens: info.num_query_tokens, info, slot: Slot::new("batch", batch) }
    }

    /// Where the library's batch is.
    pub fn slot(&self) -> &Slot<tokenselect::Batch> {
        &self.slot
    }

    /// Keys that are read, at most, times the queries that read them: how long an operation may take.
    pub fn work(&self) -> usize {
        self.num_tokens.saturating_mul(self.info.max_kv_len)
    }
}

/// Checks the length of a table.
fn expect_len(what: &str, got: usize, needed: usize, rows: usize) -> Result<()> {
    if got == needed {
        return Ok(());
    }
    let rule = format!("must have {needed} entries for {rows} rows, got {got}");
    Err(Failure::tensor("TS_STATUS_TABLE", what, rule))
}

#[pymethods]
impl Batch {
    #[new]
    #[pyo3(signature = (page_size, qo_indptr, indptr, indices, last_page_len, sequence_indices=None, candidates=None))]
    #[allow(clippy::too_many_arguments)] // the tables of FlashInfer
    fn make(
        page_size: &Bound<'_, PyAny>,
        qo_indptr: &Bound<'_, PyAny>,
        indptr: &Bound<'_, PyAny>,
        indices: &Bound<'_, PyAny>,
        last_page_len: &Bound<'_, PyAny>,
        sequence_indices: Option<&Bound<'_, PyAny>>,
        candidates: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        fence(page_size.py(), || {
            let page_size = whole("page_size", page_size)?;
            let last_page_len = table("last_page_len", last_page_len, false)?;
            let rows = last_page_len.len();
            let qo_indptr = table("qo_indptr", qo_indptr, false)?;
            expect_len("qo_indptr", qo_indptr.len(), rows + 1, rows)?;
            let indptr = table("indptr", indptr, false)?;
            expect_len("indptr", indptr.len(), rows + 1, rows)?;
            let indices = table("indices", indices, false)?;
            let end = indptr.last().copied().unwrap_or(0);
            if end as usize != indices.len() {
                let rule = format!("must end with the number of indices, {}, got {end}", indices.len());
                return Err(Failure::tensor("TS_STATUS_TABLE", "indptr", rule));
            }
            let pages = PageTables { indptr, indices, last_page_len };
            let mut batch = match candidates {
                None => tokenselect::Batch::new(page_size, qo_indptr, pages)?,
                Some(candidates) => {
                    let bounds = table("candidates", candidates, true)?;
                    expect_len("candidates", bounds.len(), 2 * rows, rows)?;
                    let ranges = bounds.chunks_exact(2).map(|bounds| bounds[0]..bounds[1]).collect();
                    tokenselect::Batch::partial(page_size, qo_indptr, pages, ranges)?
                }
            };
            if let Some(indices) = sequence_indices {
                let indices = table("sequence_indices", indices, false)?;
                expect_len("sequence_indices", indices.len(), rows, rows)?;
                batch = batch.with_sequence_indices(indices)?;
            }
            Ok(Batch::new(batch))
        })
    }

    /// Sizes.
    #[getter]
    fn info(&self) -> BatchInfo {
        self.info
    }

    /// Rows.
    #[getter]
    fn num_rows(&self) -> usize {
        self.info.num_rows
    }

    /// Query tokens of all rows: the leading dimension of `q`, `k`, `v` and `out`.
    #[getter]
    fn num_query_tokens(&self) -> usize {
        self.num_tokens
    }

    /// `query_begin`, `block_len`, `kv_len` and `token_base` (its place in votes and logits) of a row.
    #[pyo3(text_signature = "($self, row)")]
    fn row(&self, row: &Bound<'_, PyAny>) -> PyResult<BatchRow> {
        fence(row.py(), || {
            let batch = self.slot.read()?;
            let row = batch.get()?.row(whole("row", row)?)?;
            Ok(BatchRow {
                query_begin: row.queries.start,
                block_len: row.block_len(),
                kv_len: row.kv_len,
                token_base: row.token_base,
            })
        })
    }

    /// The batch with padding rows of `block_len` queries added, until it has `num_rows`: the shape that captured work expects.
    #[pyo3(text_signature = "($self, num_rows, block_len)")]
    fn padded(&self, num_rows: &Bound<'_, PyAny>, block_len: &Bound<'_, PyAny>) -> PyResult<Batch> {
        fence(num_rows.py(), || {
            let (num_rows, block_len) = (whole("num_rows", num_rows)?, whole("block_len", block_len)?);
            let batch = self.slot.read()?;
            Ok(Batch::new(batch.get()?.clone().padded(num_rows, block_len)?))
        })
    }

    /// The same tokens with every row cut into blocks of `block_len` tokens, each a row that selects for itself: for a piece of
    /// a prompt. Shorter blocks find more of what single queries look for, and cost more.
    #[pyo3(text_signature = "($self, block_len)")]
    fn in_blocks(&self, block_len: &Bound<'_, PyAny>) -> PyResult<Batch> {
        fence(block_len.py(), || {
            let block_len = whole("block_len", block_len)?;
            let batch = self.slot.read()?;
            Ok(Batch::new(batch.get()?.in_blocks(block_len)?))
        })
    }

    /// Another engine's prompts, each with all its tokens in one row, as pieces for `prefill_kv` of `context`.
    #[pyo3(text_signature = "($self, context, block_len)")]
    fn in_pieces(&self, context: &Bound<'_, PyAny>, block_len: &Bound<'_, PyAny>) -> PyResult<Pieces> {
        fence(context.py(), || {
            let context = of_class::<Context>("context", context)?.get();
            let (limits, block_len) = (context.limits(), whole("block_len", block_len)?);
            let batch = self.slot.read()?;
            context.expect_kv_len(self.info.max_kv_len)?;
            Ok(Pieces::new(batch.get()?.in_pieces(&limits, block_len)?))
        })
    }

    /// Gives the batch back now instead of when the object is dropped.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    fn __repr__(&self) -> String {
        let BatchInfo { num_rows, num_query_tokens, max_kv_len, page_size, .. } = self.info;
        format!(
            "<tokenselect.Batch of {num_rows} rows, {num_query_tokens} query tokens, up to {max_kv_len} tokens in pages of {page_size}>"
        )
    }
}

/// Prompts cut into pieces that one step of a context has room for, for all layers: `num_pieces`, `num_blocks`,
/// `num_query_tokens`, `block_len`. From `Cache.extend_in_pieces` or `Batch.in_pieces`.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct Pieces {
    slot: Slot<tokenselect::Pieces>,
    /// Pieces.
    #[pyo3(get)]
    num_pieces: usize,
    /// Blocks of all pieces.
    #[pyo3(get)]
    num_blocks: usize,
    /// Query tokens of all pieces: the leading dimension of `q`, `k`, `v` and `out`.
    #[pyo3(get)]
    pub(crate) num_query_tokens: usize,
    /// Tokens of a block; the last one of a prompt may have fewer.
    #[pyo3(get)]
    block_len: usize,
}

impl Pieces {
    /// Pieces of the library's.
    pub fn new(pieces: tokenselect::Pieces) -> Self {
        Pieces {
            num_pieces: pieces.len(),
            num_blocks: pieces.num_blocks(),
            num_query_tokens: pieces.whole().num_query_tokens(),
            block_len: pieces.block_len(),
            slot: Slot::new("pieces", pieces),
        }
    }

    /// Where the library's pieces are.
    pub fn slot(&self) -> &Slot<tokenselect::Pieces> {
        &self.slot
    }
}

#[pymethods]
impl Pieces {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("Pieces", "`Cache.extend_in_pieces` and `Batch.in_pieces`")))
    }

    /// Gives the pieces back now instead of when the object is dropped.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    fn __repr__(&self) -> String {
        format!(
            "<tokenselect.Pieces: {} pieces of {} blocks of {}, {} query tokens>",
            self.num_pieces, self.num_blocks, self.block_len, self.num_query_tokens
        )
    }
}

/// A fixed place on a GPU for the tables of batches with the rows and blocks of `like`, and up to `max_pages` pages in all rows
/// together, so that captured work reads whatever batch was put there last.
#[pyclass(frozen, weakref, module = "tokenselect")]
pub(crate) struct BatchSlot {
    slot: Slot<tokenselect::BatchSlot>,
    device: Py<Device>,
    num_rows: usize,
}

/// Types of tables on the device.
const INTEGERS: [DType; 2] = [DType::U32, DType::U64];

/// A table on the device: rows of adjacent entries, in any stride.
fn table_of(given: &Given<'_>) -> Result<Argument> {
    let &[rows, width] = given.shape() else {
        let rule = format!("must have two dimensions, got {}", tuple(given.shape()));
        return Err(Failure::tensor("TS_STATUS_SHAPE", given.what, rule));
    };
    let dtype = given.expect_type(&INTEGERS)?;
    let whole =
        Argument { what: given.what, addr: given.addr, dtype, shape: [rows, width].into(), strides: None };
    let (&[row, entry], false) = (given.strides(), rows == 0 || width == 0) else { return Ok(whole) };
    let steps = tuple(given.strides());
    if width > 1 && entry != 1 {
        let rule = format!("must have adjacent entries in its rows, its strides are {steps}");
        return Err(Failure::tensor("TS_STATUS_CONFIG", given.what, rule));
    }
    // The stride of a dimension of one place means nothing.
    let row = if rows > 1 { row } else { width as isize };
    let Ok(row) = usize::try_from(row) else {
        let rule = format!("must have strides of 0 or more, its strides are {steps}");
        return Err(Failure::tensor("TS_STATUS_CONFIG", given.what, rule));
    };
    if row == width {
        return Ok(whole);
    }
    Ok(Argument { shape: [rows, 1, width].into(), strides: Some([row, width]), ..whole })
}

#[pymethods]
impl BatchSlot {
    #[new]
    #[pyo3(signature = (device, like, max_pages))]
    fn make(
        device: &Bound<'_, PyAny>,
        like: &Bound<'_, PyAny>,
        max_pages: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        fence(device.py(), || {
            let device = of_class::<Device>("device", device)?;
            let like = of_class::<Batch>("like", like)?.get().slot.read()?;
            let (like, max_pages) = (like.get()?, whole("max_pages", max_pages)?);
            let slot = tokenselect::BatchSlot::new(device.get().get()?, like, max_pages)?;
            let (num_rows, device) = (like.num_rows(), device.clone().unbind());
            Ok(BatchSlot { slot: Slot::new("slot", slot), device, num_rows })
        })
    }

    /// The device.
    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    /// Rows of its batches.
    #[getter]
    fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Puts a copy of a batch there; the batch that is answered is to be captured with.
    #[pyo3(text_signature = "($self, batch)")]
    fn put(&self, batch: &Bound<'_, PyAny>) -> PyResult<Batch> {
        fence(batch.py(), || {
            let batch = of_class::<Batch>("batch", batch)?.get().slot.read()?;
            let mut slot = self.slot.write()?;
            Ok(Batch::new(slot.get()?.put(batch.get()?.clone())?))
        })
    }

    /// Puts the batch there that an engine's tables on the device describe, in the device's order of work; this can be captured.
    /// Each is of integers of 32 or of 64 bits, read when the device comes to them: a number that does not fit 32 bits, or is negative,
    /// is no page, row or length, as one beyond the limits is none (`faults`).
    ///
    /// - `entries`, `[table_rows, entries]`: pages in token order; with `slots`, the slot of each token, its page times the page
    ///   size and its place in the page. Rows may have any stride; entries of a row are adjacent.
    /// - `kv_lens`, `[num_rows]`: tokens of each row, its block included.
    /// - `num_pages`: pages of the pool.
    /// - `rows`, `[num_rows]`: the row of `entries` of each row; None for the row of the same number.
    /// - `sequence_indices`, `[num_rows]`, and `num_sequences`: rows of the Selection Cache, -1 for none; exactly if the slot's batches
    ///   have them.
    ///
    /// The batch that is answered has rows that only the device knows.
    #[pyo3(
        signature = (entries, kv_lens, num_pages, slots=None, rows=None, sequence_indices=None, num_sequences=None),
        text_signature = "($self, entries, kv_lens, num_pages, slots=False, rows=None, sequence_indices=None, num_sequences=0)"
    )]
    #[allow(clippy::too_many_arguments)] // the tables of engines
    fn translate<'py>(
        slf: &Bound<'py, Self>,
        entries: &Bound<'py, PyAny>,
        kv_lens: &Bound<'py, PyAny>,
        num_pages: &Bound<'py, PyAny>,
        slots: Option<&Bound<'py, PyAny>>,
        rows: Option<&Bound<'py, PyAny>>,
        sequence_indices: Option<&Bound<'py, PyAny>>,
        num_sequences: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Batch> {
        fence(slf.py(), || {
            let this = slf.get();
            let mut uses = Uses::new(slf.py(), this.device.get());
            uses.hold(slf, &this.slot);
            let entries = table_of(&uses.look("entries", entries)?)?;
            let mut per_row = |what, object: Option<&Bound<'py, PyAny>>| -> Result<Option<Argument>> {
                let Some(object) = object else { return Ok(None) };
                let given = uses.look(what, object)?;
                given.expect_shape(&[this.num_rows])?;
                given.expect_dense()?;
                let dtype = given.expect_type(&INTEGERS)?;
                Ok(Some(Argument {
                    what,
                    addr: given.addr,
                    dtype,
                    shape: [this.num_rows].into(),
                    strides: None,
                }))
            };
            let kv_lens = per_row("kv_lens", Some(kv_lens))?;
            let (rows, sequences) = (per_row("rows", rows)?, per_row("sequence_indices", sequence_indices)?);
            let Some(kv_lens) = kv_lens else { return Err(Failure::of_type("kv_lens", "a tensor", "none")) };
            let device = this.device.get().inner();
            // SAFETY: tensors of the device of the checked shapes, which live until it has read them.
            let view = |argument: Argument| unsafe { argument.view(device) };
            let tables = TablesOnDevice {
                entries: view(entries)?,
                slots: slots.map_or(Ok(false), |slots| switch("slots", slots))?,
                rows: rows.map(view).transpose()?,
                kv_lens: view(kv_lens)?,
                sequences: sequences.map(view).transpose()?,
                num_pages: whole("num_pages", num_pages)?,
                num_sequences: num_sequences.map_or(Ok(0), |number| whole("num_sequences", number))?,
            };
            let mut slot = this.slot.write()?;
            Ok(Batch::new(slot.get()?.translate(&tables)?))
        })
    }

    /// How many rows `translate` left without tokens, pages it replaced and sequences it left out so far. Waits for the device.
    fn faults(&self, py: Python<'_>) -> PyResult<u32> {
        fence(py, || {
            let slot = self.slot.read()?;
            let slot = slot.get()?;
            Ok(py.detach(|| slot.faults())?)
        })
    }

    /// Gives the place back; where a graph uses it, when that is gone.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        fence(py, || self.slot.close())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.device)
    }

    fn __repr__(&self) -> String {
        format!("<tokenselect.BatchSlot for {} rows on {}>", self.num_rows, self.device.get().name())
    }
}
