//! One step's rows: which queries belong to which sequence, and where its tokens lie.

mod device_tables;
mod slot;

use std::ops::Range;
use std::sync::Arc;

use kernels_gpu::common::layout::{BatchTables, page_division};
use kernels_gpu::simt::global::GlobalPtr;

use self::device_tables::DeviceTables;
pub use self::slot::BatchSlot;
use crate::backend::gpu::driver::Driver;
use crate::cache::{MAX_PAGE_SIZE, PageTables, SequenceId};
use crate::config::{MAX_SEQUENCE_LEN, SelectConfig};
use crate::error::{Error, Result};

/// The sequence index of a padding row.
const NO_SEQUENCE: u32 = u32::MAX;

/// A ragged batch: every row is a sequence with `n` cached tokens, the last `T` of which are the block that
/// this step computes. Lengths and blocks differ from row to row; `T = 1` is decoding. A row of 0 query
/// tokens is padding and costs nothing, and so is one of no cached tokens, whose queries get `out = 0` and
/// `lse = -inf`.
///
/// [`PagedKvCache::extend`](crate::PagedKvCache::extend) makes the batch of an owned cache,
/// [`Batch::new`] that of another engine's tables.
#[derive(Debug, Clone)]
pub struct Batch {
    page_size: usize,
    qo_indptr: Vec<u32>,
    tables: PageTables,
    max_page: Option<u32>,
    sequence_indices: Option<Vec<u32>>,
    candidates: Option<Vec<Range<u32>>>,
    owners: Vec<(SequenceId, u64)>,
    /// The allocator that made the batch; 0 for another engine's tables.
    allocator: u64,
    on_device: DeviceTables,
}

impl Batch {
    /// A batch over page tables in the layout of FlashInfer.
    ///
    /// `qo_indptr` is `[rows + 1]`, ascending from 0: the query tokens of row `r` are rows
    /// `qo_indptr[r]..qo_indptr[r + 1]` of `q` and `out`. The tables describe the cache *after* the block
    /// was appended, so that `n = (pages - 1) * page_size + last_page_len`.
    ///
    /// # Errors
    /// [`Error::Table`] where the tables contradict each other; a row's block must not be longer than the
    /// row, unless the row is empty.
    pub fn new(page_size: usize, qo_indptr: Vec<u32>, tables: PageTables) -> Result<Self> {
        Batch::build(page_size, qo_indptr, tables, None)
    }

    /// A batch over *parts* of sequences, for sequence parallelism: every rank holds some tokens of each
    /// sequence, numbered from 0, and all the query tokens.
    ///
    /// `candidates`, `[rows]`, are the tokens of this rank that compete for the top-k, in place of
    /// `[n_init, n - T - n_local)`; what this rank holds beside them is always selected. Such rows are
    /// scored however few candidates they have and never reuse a selection; a block may be longer than the
    /// tokens that the rank holds.
    ///
    /// # Errors
    /// As [`Batch::new`], and [`Error::Table`] where the number of ranges is not the number of rows or a
    /// range is not within `[0, n]`.
    pub fn partial(
        page_size: usize,
        qo_indptr: Vec<u32>,
        tables: PageTables,
        candidates: Vec<Range<u32>>,
    ) -> Result<Self> {
        Batch::build(page_size, qo_indptr, tables, Some(candidates))
    }

    fn build(
        page_size: usize,
        qo_indptr: Vec<u32>,
        tables: PageTables,
        candidates: Option<Vec<Range<u32>>>,
    ) -> Result<Self> {
        if page_size == 0 || page_size > MAX_PAGE_SIZE {
            return Err(Error::config("page_size", format!("from 1 to {MAX_PAGE_SIZE}"), page_size));
        }
        let rows = tables.last_page_len.len();
        check_indptr("qo_indptr", &qo_indptr, rows)?;
        check_indptr("indptr", &tables.indptr, rows)?;
        let (last, got) = (tables.indptr[rows] as usize, tables.indices.len());
        if last != got {
            return Err(Error::table(rows, "indptr", format!("the number of indices, {got}"), last));
        }
        if let Some(got) = candidates.as_ref().map(Vec::len).filter(|&got| got != rows) {
            return Err(Error::table(rows, "candidates", format!("of length {rows}"), got));
        }
        let max_page = tables.indices.iter().copied().max();
        let batch = Batch {
            page_size,
            qo_indptr,
            tables,
            max_page,
            sequence_indices: None,
            candidates,
            owners: Vec::new(),
            allocator: 0,
            on_device: DeviceTables::default(),
        };
        for row in 0..rows {
            batch.check_row(row)?;
        }
        Ok(batch)
    }

    fn check_row(&self, row: usize) -> Result<()> {
        let (pages, last) = (self.pages(row).len(), self.tables.last_page_len[row] as usize);
        if pages == 0 && last != 0 {
            return Err(Error::table(row, "last_page_len", "0 for a row without pages", last));
        }
        if pages > 0 && (last == 0 || last > self.page_size) {
            let rule = format!("from 1 to page_size = {}", self.page_size);
            return Err(Error::table(row, "last_page_len", rule, last));
        }
        let (kv_len, block_len) = (self.kv_len(row), self.block_len(row));
        if kv_len > MAX_SEQUENCE_LEN {
            return Err(Error::table(row, "kv_len", format!("at most {MAX_SEQUENCE_LEN}"), kv_len));
        }
        if let Some(range) = self.candidates.as_ref().map(|all| &all[row]) {
            if range.start > range.end || range.end as usize > kv_len {
                let rule = format!("an ascending range within [0, {kv_len}]");
                return Err(Error::table(row, "candidates", rule, format!("{range:?}")));
            }
        } else if block_len > kv_len && kv_len > 0 {
            let rule = format!("at most the row's {kv_len} cached tokens");
            return Err(Error::table(row, "block length", rule, block_len));
        }
        Ok(())
    }

    /// Names the row of the [`SelectionCache`](crate::SelectionCache) that belongs to each row of the batch,
    /// `[rows]`. Without it no selection is reused.
    ///
    /// # Errors
    /// [`Error::Table`] where the number of entries is not the number of rows, two rows share one, or one is `u32::MAX`.
    pub fn with_sequence_indices(mut self, indices: Vec<u32>) -> Result<Self> {
        if indices.len() != self.num_rows() {
            let rule = format!("of length {}", self.num_rows());
            return Err(Error::table(0, "sequence_indices", rule, indices.len()));
        }
        if let Some(row) = indices.iter().position(|&index| index == NO_SEQUENCE) {
            return Err(Error::table(row, "sequence_indices", format!("below {NO_SEQUENCE}"), NO_SEQUENCE));
        }
        let mut sorted: Vec<(u32, usize)> = indices.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let rule = format!("unlike that of row {}", pair[0].1);
            return Err(Error::table(pair[1].1, "sequence_indices", rule, pair[1].0));
        }
        self.sequence_indices = Some(indices);
        self.on_device = DeviceTables::default();
        Ok(self)
    }

    /// The batch with rows of no cached tokens added, until it has `num_rows`: the shape that captured work expects.
    /// Each has `block_len` queries, for which `out = 0` and `lse = -inf` are written and nothing else is done.
    ///
    /// # Errors
    /// [`Error::Limit`] where the batch has more rows already.
    pub fn padded(mut self, num_rows: usize, block_len: usize) -> Result<Self> {
        let got = self.num_rows();
        let Some(missing) = num_rows.checked_sub(got) else {
            return Err(Error::Limit { what: "num_rows", limit: num_rows, got });
        };
        let (mut query, page) = (self.qo_indptr[got], self.tables.indptr[got]);
        for _ in 0..missing {
            query += block_len as u32;
            self.qo_indptr.push(query);
            self.tables.indptr.push(page);
            self.tables.last_page_len.push(0);
        }
        if let Some(indices) = &mut self.sequence_indices {
            indices.resize(num_rows, NO_SEQUENCE);
        }
        if let Some(candidates) = &mut self.candidates {
            candidates.resize(num_rows, 0..0);
        }
        self.on_device = DeviceTables::default();
        Ok(self)
    }

    /// Remembers the sequences that the rows were made for.
    pub(crate) fn owned_by(mut self, allocator: u64, owners: Vec<(SequenceId, u64)>) -> Self {
        self.allocator = allocator;
        self.sequence_indices = Some(owners.iter().map(|(id, _)| id.index() as u32).collect());
        self.owners = owners;
        self
    }

    /// The allocator that made the batch; 0 for another engine's tables.
    pub(crate) fn allocator(&self) -> u64 {
        self.allocator
    }

    /// The sequence of each row and its revision; empty for another engine's tables.
    pub(crate) fn owners(&self) -> &[(SequenceId, u64)] {
        &self.owners
    }

    /// Rows of the batch.
    pub fn num_rows(&self) -> usize {
        self.tables.last_page_len.len()
    }

    /// Query tokens of all rows: the leading dimension of `q`, `k`, `v` and `out`.
    pub fn num_query_tokens(&self) -> usize {
        self.qo_indptr[self.num_rows()] as usize
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// `[rows + 1]`, where each row's queries begin.
    pub fn qo_indptr(&self) -> &[u32] {
        &self.qo_indptr
    }

    /// The page tables.
    pub fn tables(&self) -> &PageTables {
        &self.tables
    }

    /// The query tokens of a row, as rows of `q` and `out`.
    pub fn query_range(&self, row: usize) -> Range<usize> {
        self.qo_indptr[row] as usize..self.qo_indptr[row + 1] as usize
    }

    /// `T`: query tokens of a row.
    pub fn block_len(&self, row: usize) -> usize {
        self.query_range(row).len()
    }

    /// `n`: cached tokens of a row, the block included.
    pub fn kv_len(&self, row: usize) -> usize {
        let full_pages = self.pages(row).len().saturating_sub(1);
        full_pages * self.page_size + self.tables.last_page_len[row] as usize
    }

    /// Page numbers of a row, in token order.
    pub fn pages(&self, row: usize) -> &[u32] {
        &self.tables.indices[self.tables.indptr[row] as usize..self.tables.indptr[row + 1] as usize]
    }

    /// Where a row begins in arrays with a place for every token of the batch, such as logits and votes:
    /// token `j` of the row is at `token_base(row) + j`. Rows are padded to whole pages.
    pub fn token_base(&self, row: usize) -> usize {
        self.tables.indptr[row] as usize * self.page_size
    }

    /// Places in such arrays: all pages of all rows.
    pub fn num_token_places(&self) -> usize {
        self.tables.indices.len() * self.page_size
    }

    /// The longest block.
    pub fn max_block_len(&self) -> usize {
        (0..self.num_rows()).map(|row| self.block_len(row)).max().unwrap_or(0)
    }

    /// The most tokens cached by one row.
    pub fn max_kv_len(&self) -> usize {
        (0..self.num_rows()).map(|row| self.kv_len(row)).max().unwrap_or(0)
    }

    /// The tokens of a row that compete for the top-k: `[n_init, n - T - n_local)`, or what
    /// [`Batch::partial`] was given. Empty where the windows cover everything.
    pub fn candidates(&self, row: usize, config: &SelectConfig) -> Range<usize> {
        if let Some(given) = &self.candidates {
            return given[row].start as usize..given[row].end as usize;
        }
        let before_block = self.kv_len(row).saturating_sub(self.block_len(row));
        let end = before_block.saturating_sub(config.n_local);
        config.n_init.min(end)..end
    }

    /// Whether the rows are parts of sequences, made by [`Batch::partial`].
    pub fn is_partial(&self) -> bool {
        self.candidates.is_some()
    }

    /// The row's place in per-sequence tables, where it has one.
    pub fn sequence_index(&self, row: usize) -> Option<usize> {
        let index = self.sequence_indices.as_ref()?[row];
        (index != NO_SEQUENCE).then_some(index as usize)
    }

    /// Whether the rows name their sequences.
    pub(crate) fn has_sequences(&self) -> bool {
        self.sequence_indices.is_some()
    }

    /// Page and place within it of a row's token.
    #[inline(always)]
    pub(crate) fn locate(&self, row: usize, token: usize) -> (usize, usize) {
        (self.pages(row)[token / self.page_size] as usize, token % self.page_size)
    }

    /// The tables in the memory of a GPU, copied there at the first call.
    pub(crate) fn device_tables(&self, driver: &Arc<dyn Driver>) -> Result<BatchTables> {
        let at = self.on_device.get(self, driver)?;
        let (page_magic, page_shift) = page_division(self.page_size as u32);
        Ok(BatchTables {
            qo_indptr: GlobalPtr::from_addr(at.qo_indptr),
            kv_indptr: GlobalPtr::from_addr(at.kv_indptr),
            kv_indices: GlobalPtr::from_addr(at.kv_indices),
            kv_last_page_len: GlobalPtr::from_addr(at.last_page_len),
            candidates: GlobalPtr::from_addr(at.candidates),
            num_rows: self.num_rows() as u32,
            page_size: self.page_size as u32,
            page_magic,
            page_shift,
        })
    }

    /// The sequence of each row in the memory of a GPU; address 0 where the rows have none.
    pub(crate) fn device_sequence_indices(&self, driver: &Arc<dyn Driver>) -> Result<GlobalPtr<u32>> {
        Ok(GlobalPtr::from_addr(self.on_device.get(self, driver)?.sequence_indices))
    }

    /// The largest page number in the tables.
    pub(crate) fn max_page(&self) -> Option<u32> {
        self.max_page
    }
}

fn check_indptr(what: &'static str, indptr: &[u32], rows: usize) -> Result<()> {
    if indptr.len() != rows + 1 {
        return Err(Error::table(rows, what, format!("of length rows + 1 = {}", rows + 1), indptr.len()));
    }
    if indptr[0] != 0 {
        return Err(Error::table(0, what, "0 at its start", indptr[0]));
    }
    if let Some(row) = (0..rows).find(|&row| indptr[row] > indptr[row + 1]) {
        return Err(Error::table(
            row,
            what,
            format!("at least {}, its predecessor", indptr[row]),
            indptr[row + 1],
        ));
    }
    Ok(())
}
