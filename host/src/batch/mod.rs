//! One step's rows: which queries belong to which sequence, and where its tokens lie.

mod blocks;
mod device_tables;
mod identity;
mod slot;
mod translate;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use tokenselect_kernels::common::layout::{BatchTables, page_division};
use tokenselect_kernels::limits::COLUMNS;
use tokenselect_kernels::ops::score_blocks::blocks_of_group;
use tokenselect_kernels::simt::data::V2;
use tokenselect_kernels::simt::global::GlobalPtr;

use self::blocks::Cut;
use self::device_tables::DeviceTables;
use self::identity::Place;
pub(crate) use self::identity::{Block, Identity, Needs, Owned};
pub use self::slot::BatchSlot;
pub use self::translate::TablesOnDevice;
use crate::config::{MAX_SEQUENCE_LEN, SelectConfig};
use crate::device::Device;
use crate::driver::Driver;
use crate::error::{Error, Result};
use crate::pages::{MAX_PAGE_SIZE, PageTables};
use crate::sequence::SequenceId;

/// What the host knows of a batch whose tables a device alone has.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// The most tokens that a row can have.
    max_kv_len: usize,
    /// The most places for tokens of all rows together.
    num_places: usize,
    /// Every page is below.
    num_pages: usize,
    /// Every sequence is below.
    num_sequences: usize,
}

/// The most rows of a batch.
pub(crate) const MAX_ROWS: usize = 1 << 24;
/// The most pages of all rows.
pub(crate) const MAX_PAGES: usize = i32::MAX as usize;

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
    identity: Identity,
    /// What is known of tables that a device alone has.
    bounds: Option<Bounds>,
    /// The first page that is written and appears twice, looked for at the first append.
    shared_page: OnceLock<Option<(usize, u32)>>,
    /// What the rows were cut from, where they are blocks of longer ones.
    cut: Option<Arc<Cut>>,
}

impl Batch {
    /// A batch over page tables in the layout of FlashInfer.
    ///
    /// There are as many rows as entries of `last_page_len`. `qo_indptr` is `[rows + 1]`, ascending from 0: the query tokens of row `r` are rows
    /// `qo_indptr[r]..qo_indptr[r + 1]` of `q` and `out`. The tables describe the cache *after* the block
    /// was appended, so that `n = (pages - 1) * page_size + last_page_len`.
    ///
    /// # Errors
    /// [`Error::Table`] where the tables contradict each other; a row's block must not be longer than the
    /// row, unless the row is empty. [`Error::Argument`] for the page size, [`Error::Limit`] for too many rows.
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
            return Err(Error::argument("page_size", format!("from 1 to {MAX_PAGE_SIZE}"), page_size));
        }
        let rows = tables.last_page_len.len();
        if rows > MAX_ROWS {
            return Err(Error::Limit { what: "rows of a batch", limit: MAX_ROWS, got: rows });
        }
        check_indptr("qo_indptr", &qo_indptr, rows)?;
        check_indptr("indptr", &tables.indptr, rows)?;
        let (last, got) = (tables.indptr[rows] as usize, tables.indices.len());
        if last != got {
            return Err(Error::table("indptr", format!("{got} at its end, the length of `indices`"), last));
        }
        if let Some(got) = candidates.as_ref().map(Vec::len).filter(|&got| got != rows) {
            return Err(Error::table(
                "candidates",
                format!("of length {rows}, that of `last_page_len`"),
                got,
            ));
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
            identity: Identity::new(),
            bounds: None,
            shared_page: OnceLock::new(),
            cut: None,
        };
        for row in 0..rows {
            batch.check_row(row)?;
        }
        Ok(batch)
    }

    fn check_row(&self, row: usize) -> Result<()> {
        let (pages, last) = (self.pages(row).len(), self.tables.last_page_len[row] as usize);
        if pages == 0 && last != 0 {
            return Err(Error::row(row, "last_page_len", "0 for a row without pages", last));
        }
        if pages > 0 && (last == 0 || last > self.page_size) {
            let rule = format!("from 1 to page_size = {}", self.page_size);
            return Err(Error::row(row, "last_page_len", rule, last));
        }
        let (kv_len, block_len) = (self.kv_len(row), self.block_len(row));
        if kv_len > MAX_SEQUENCE_LEN {
            return Err(Error::row(row, "kv_len", format!("at most {MAX_SEQUENCE_LEN}"), kv_len));
        }
        if let Some(range) = self.candidates.as_ref().map(|all| &all[row]) {
            if range.start > range.end || range.end as usize > kv_len {
                let rule = format!("an ascending range within [0, {kv_len}]");
                return Err(Error::row(row, "candidates", rule, format!("{range:?}")));
            }
        } else if block_len > kv_len && kv_len > 0 {
            let rule = format!("at most the row's {kv_len} cached tokens");
            return Err(Error::row(row, "block length", rule, block_len));
        }
        Ok(())
    }

    /// Names the row of the [`SelectionCache`](crate::SelectionCache) that belongs to each row of the batch,
    /// `[rows]`. Operations that are given cached selections ask for it; rows of [`partial`](Self::partial) batches never reuse any.
    ///
    /// # Errors
    /// [`Error::Table`] where the number of entries is not the number of rows, two rows share one, or one is `u32::MAX`.
    pub fn with_sequence_indices(mut self, indices: Vec<u32>) -> Result<Self> {
        self.expect_on_host("with_sequence_indices")?;
        self.expect_whole("with_sequence_indices")?;
        if indices.len() != self.num_rows() {
            let rule = format!("of length {}, one for each row", self.num_rows());
            return Err(Error::table("sequence_indices", rule, indices.len()));
        }
        if let Some(row) = indices.iter().position(|&index| index == NO_SEQUENCE) {
            return Err(Error::row(row, "sequence_indices", format!("below {NO_SEQUENCE}"), NO_SEQUENCE));
        }
        let mut sorted: Vec<(u32, usize)> = indices.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let rule = format!("unlike that of row {}", pair[0].1);
            return Err(Error::row(pair[1].1, "sequence_indices", rule, pair[1].0));
        }
        self.sequence_indices = Some(indices);
        // The rows are no longer those that a cache has made.
        (self.owners, self.allocator) = (Vec::new(), 0);
        self.changed();
        Ok(self)
    }

    /// The batch with rows of no cached tokens added, until it has `num_rows`: the shape that captured work expects.
    /// Each has `block_len` queries, for which `out = 0` and `lse = -inf` are written and nothing else is done.
    ///
    /// # Errors
    /// [`Error::Limit`] where the batch has more rows already, [`Error::Argument`] for more than any batch can have.
    pub fn padded(mut self, num_rows: usize, block_len: usize) -> Result<Self> {
        self.expect_on_host("padded")?;
        self.expect_whole("padded")?;
        let got = self.num_rows();
        let Some(missing) = num_rows.checked_sub(got) else {
            return Err(Error::Limit { what: "num_rows", limit: num_rows, got });
        };
        let queries =
            missing.checked_mul(block_len).and_then(|more| more.checked_add(self.num_query_tokens()));
        if num_rows > MAX_ROWS || queries.is_none_or(|queries| queries > MAX_SEQUENCE_LEN) {
            let rule = format!("of at most {MAX_ROWS} rows and {MAX_SEQUENCE_LEN} queries");
            return Err(Error::argument("num_rows", rule, format!("{num_rows} rows, blocks of {block_len}")));
        }
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
        self.changed();
        Ok(self)
    }

    /// The tables are others than those of the batch that this one was made from.
    fn changed(&mut self) {
        self.on_device = DeviceTables::default();
        self.identity = Identity::new();
        self.shared_page = OnceLock::new();
    }

    /// Rows and blocks alone.
    fn without_pages(&self) -> Batch {
        let rows = self.num_rows();
        let mut batch = self.clone();
        batch.tables =
            PageTables { indptr: vec![0; rows + 1], indices: Vec::new(), last_page_len: vec![0; rows] };
        batch.sequence_indices = self.sequence_indices.as_ref().map(|_| vec![NO_SEQUENCE; rows]);
        batch.candidates = self.candidates.as_ref().map(|_| vec![0..0; rows]);
        (batch.max_page, batch.owners, batch.allocator) = (None, Vec::new(), 0);
        batch.bounds = None;
        batch.changed();
        batch
    }

    /// The same rows and blocks, with tables that a device alone has.
    fn on_device(&self, bounds: Bounds) -> Batch {
        let mut batch = self.clone();
        batch.changed();
        batch.bounds = Some(bounds);
        batch
    }

    /// Checks that the host has the tables.
    fn expect_on_host(&self, op: &'static str) -> Result<()> {
        match self.bounds {
            None => Ok(()),
            Some(_) => Err(Error::Missing { op, needs: "tables on the host" }),
        }
    }

    /// Which batch this is.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A number that clones share and no other batch has.
    pub(crate) fn number(&self) -> u64 {
        self.identity.number()
    }

    /// Checks that no other batch was put in the slot of this one.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub(crate) fn expect_latest(&self) -> Result<()> {
        self.identity.expect_latest()
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

    /// The page tables; without pages where a device alone has them.
    pub fn tables(&self) -> &PageTables {
        &self.tables
    }

    /// One row.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such row, [`Error::Missing`] where a device alone has the tables.
    pub fn row(&self, row: usize) -> Result<BatchRow<'_>> {
        self.expect_on_host("row")?;
        let limit = self.num_rows();
        if row >= limit {
            return Err(Error::Index { what: "row", limit, got: row });
        }
        Ok(BatchRow {
            queries: self.query_range(row),
            kv_len: self.kv_len(row),
            token_base: self.token_base(row),
            pages: self.pages(row),
            sequence_index: self.sequence_index(row),
            candidates: self.candidates.as_ref().map(|given| given[row].clone()),
        })
    }

    /// The query tokens of a row, as rows of `q` and `out`.
    pub(crate) fn query_range(&self, row: usize) -> Range<usize> {
        self.qo_indptr[row] as usize..self.qo_indptr[row + 1] as usize
    }

    /// `T`: query tokens of a row.
    pub(crate) fn block_len(&self, row: usize) -> usize {
        self.query_range(row).len()
    }

    /// `n`: cached tokens of a row, the block included.
    pub(crate) fn kv_len(&self, row: usize) -> usize {
        let full_pages = self.pages(row).len().saturating_sub(1);
        full_pages * self.page_size + self.tables.last_page_len[row] as usize
    }

    /// Page numbers of a row, in token order.
    pub(crate) fn pages(&self, row: usize) -> &[u32] {
        &self.tables.indices[self.tables.indptr[row] as usize..self.tables.indptr[row + 1] as usize]
    }

    /// Where a row begins in arrays with a place for every token of the batch, such as logits and votes:
    /// token `j` of the row is at `token_base(row) + j`. Rows are padded to whole pages.
    pub(crate) fn token_base(&self, row: usize) -> usize {
        self.tables.indptr[row] as usize * self.page_size
    }

    /// Places in buffers with one for every token: all pages of all rows. At most so many where a device alone has the tables.
    pub fn num_token_places(&self) -> usize {
        if let Some(bounds) = self.bounds {
            return bounds.num_places;
        }
        self.tables.indices.len() * self.page_size
    }

    /// The longest block.
    pub fn max_block_len(&self) -> usize {
        (0..self.num_rows()).map(|row| self.block_len(row)).max().unwrap_or(0)
    }

    /// The most tokens cached by one row. At most so many where a device alone has the tables.
    pub fn max_kv_len(&self) -> usize {
        if let Some(bounds) = self.bounds {
            return bounds.max_kv_len;
        }
        (0..self.num_rows()).map(|row| self.kv_len(row)).max().unwrap_or(0)
    }

    /// The tokens of a row that compete for the top-k: `[n_init, n - T - n_local)`, or what
    /// [`Batch::partial`] was given. Empty where the windows cover everything.
    pub(crate) fn candidates(&self, row: usize, config: &SelectConfig) -> Range<usize> {
        let given = self.candidates.as_ref().map(|given| &given[row]);
        candidates(given, self.kv_len(row), self.block_len(row), config)
    }

    /// Whether the rows are parts of sequences, made by [`Batch::partial`].
    pub fn is_partial(&self) -> bool {
        self.candidates.is_some()
    }

    /// The row's place in per-sequence tables, where it has one.
    pub(crate) fn sequence_index(&self, row: usize) -> Option<usize> {
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

    /// Groups of blocks in the memory of a GPU, for groups of up to `columns` query heads, one of [`COLUMNS`]; and their number.
    pub(crate) fn device_groups(
        &self,
        driver: &Arc<dyn Driver>,
        columns: u32,
    ) -> Result<(GlobalPtr<V2<u32>>, usize)> {
        let place = COLUMNS.iter().position(|&of_kernel| of_kernel == columns).unwrap_or(COLUMNS.len() - 1);
        let most = blocks_of_group(columns).unwrap_or(1);
        let at = self.on_device.get(self, driver)?.groups[place];
        Ok((GlobalPtr::from_addr(at), self.groups(most).count()))
    }

    /// The sequence of each row in the memory of a GPU; address 0 where the rows have none.
    pub(crate) fn device_sequence_indices(&self, driver: &Arc<dyn Driver>) -> Result<GlobalPtr<u32>> {
        Ok(GlobalPtr::from_addr(self.on_device.get(self, driver)?.sequence_indices))
    }

    /// The rows of the batch of an owned cache.
    pub(crate) fn owned(&self) -> Owned {
        if let Some(cut) = &self.cut {
            return cut.whole.owned();
        }
        let row = |(row, &(id, revision)): (usize, &(SequenceId, u64))| (id, revision, self.kv_len(row));
        let rows = self.owners.iter().enumerate().map(row).collect();
        Owned { allocator: self.allocator, rows, blocks: self.blocks() }
    }

    /// Checks how many tokens the rows of parts of sequences select: everything outside a row's candidates, and `top_k` of
    /// these.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub(crate) fn check_selected(&self, limit: usize, top_k: usize) -> Result<()> {
        for (row, candidates) in self.candidates.iter().flatten().enumerate() {
            let got = self.kv_len(row) - candidates.len() + candidates.len().min(top_k);
            if got > limit {
                return Err(Error::Limit { what: "selected tokens of a row", limit, got });
            }
        }
        Ok(())
    }

    /// Checks that the tables are where `device` can read them.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::Missing`].
    pub(crate) fn check_device(&self, device: &Device) -> Result<()> {
        match device.driver() {
            None => self.expect_on_host("the processor"),
            Some(driver) => self.on_device.expect_on(driver),
        }
    }

    /// The memory of the tables on a device, if there is any.
    pub(crate) fn device_memory(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        self.on_device.memory()
    }

    /// The blocks of the batch of an owned cache.
    fn blocks(&self) -> Vec<Block> {
        let block = |(row, &(id, _)): (usize, &(SequenceId, u64))| {
            let end = self.kv_len(row);
            Block { id, begin: end - self.block_len(row).min(end), end }
        };
        self.owners.iter().enumerate().map(block).filter(|block| block.begin < block.end).collect()
    }

    /// Checks page numbers against the pool.
    ///
    /// # Errors
    /// [`Error::Index`].
    pub(crate) fn check_pages(&self, limit: usize) -> Result<()> {
        let of_bounds = self.bounds.map(|bounds| saturating_last(bounds.num_pages));
        match of_bounds.or(self.max_page) {
            Some(page) if page as usize >= limit => {
                Err(Error::Index { what: "page", limit, got: page as usize })
            }
            _ => Ok(()),
        }
    }

    /// Checks sequence indices against the number of entries.
    ///
    /// # Errors
    /// [`Error::Index`].
    pub(crate) fn check_sequences(&self, limit: usize) -> Result<()> {
        let indices = (0..self.num_rows()).filter_map(|row| self.sequence_index(row));
        let of_bounds = self.bounds.filter(|bounds| self.has_sequences() && bounds.num_sequences > 0);
        match of_bounds.map(|bounds| bounds.num_sequences - 1).or_else(|| indices.max()) {
            Some(got) if got >= limit => Err(Error::Index { what: "sequence index", limit, got }),
            _ => Ok(()),
        }
    }

    /// Checks that no page which a block is written into appears twice: two writers would race, and the tokens of one row
    /// would become those of another. A cache's own batches pass by construction.
    ///
    /// # Errors
    /// [`Error::Table`].
    pub(crate) fn check_written_pages(&self) -> Result<()> {
        if let Some(cut) = &self.cut {
            return cut.whole.check_written_pages();
        }
        if self.allocator != 0 || self.bounds.is_some() {
            return Ok(());
        }
        match self.shared_page.get_or_init(|| self.find_shared_page()) {
            None => Ok(()),
            &Some((row, page)) => {
                let rule = "of pages that are in no other place, where the block is written";
                Err(Error::row(row, "indices", rule, page))
            }
        }
    }

    /// A page that is written and appears twice, and the row that writes it.
    fn find_shared_page(&self) -> Option<(usize, u32)> {
        let mut written: Vec<(u32, usize)> = Vec::new();
        for row in (0..self.num_rows()).filter(|&row| self.kv_len(row) > 0) {
            let first = (self.kv_len(row) - self.block_len(row)) / self.page_size;
            let pages = if self.block_len(row) > 0 { &self.pages(row)[first..] } else { &[] };
            written.extend(pages.iter().map(|&page| (page, row)));
        }
        written.sort_unstable();
        if let Some(pair) = written.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Some((pair[1].1, pair[1].0));
        }
        // Each is in the tables once; whatever is found beyond that is a second place.
        let (&(low, _), &(high, _)) = (written.first()?, written.last()?);
        let mut seen = vec![false; written.len()];
        for &page in self.tables.indices.iter().filter(|&page| (low..=high).contains(page)) {
            if let Ok(at) = written.binary_search_by_key(&page, |&(page, _)| page)
                && std::mem::replace(&mut seen[at], true)
            {
                return Some((written[at].1, page));
            }
        }
        None
    }
}

/// What one row of a [`Batch`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchRow<'a> {
    /// Its query tokens, as rows of `q` and `out`.
    pub queries: Range<usize>,
    /// `n`: cached tokens, the block included.
    pub kv_len: usize,
    /// Where the row begins in buffers with a place for every token of the batch, such as logits and votes: its token `j`
    /// is at `token_base + j`. Rows are padded to whole pages.
    pub token_base: usize,
    /// Page numbers, in token order.
    pub pages: &'a [u32],
    /// The row's place in per-sequence tables, where it has one.
    pub sequence_index: Option<usize>,
    candidates: Option<Range<u32>>,
}

impl BatchRow<'_> {
    /// `T`: query tokens.
    pub fn block_len(&self) -> usize {
        self.queries.len()
    }

    /// The tokens that compete for the top-k: `[n_init, n - T - n_local)`, or what [`Batch::partial`] was given. Empty
    /// where the windows cover everything.
    pub fn candidates(&self, config: &SelectConfig) -> Range<usize> {
        candidates(self.candidates.as_ref(), self.kv_len, self.block_len(), config)
    }
}

/// The last of so many pages.
fn saturating_last(num_pages: usize) -> u32 {
    u32::try_from(num_pages.saturating_sub(1)).unwrap_or(u32::MAX)
}

fn candidates(
    given: Option<&Range<u32>>,
    kv_len: usize,
    block_len: usize,
    config: &SelectConfig,
) -> Range<usize> {
    if let Some(given) = given {
        return given.start as usize..given.end as usize;
    }
    let before_block = kv_len.saturating_sub(block_len);
    let end = before_block.saturating_sub(config.n_local);
    config.n_init.min(end)..end
}

fn check_indptr(what: &'static str, indptr: &[u32], rows: usize) -> Result<()> {
    if indptr.len() != rows + 1 {
        let rule = format!("of length {}, that of `last_page_len` ({rows}) plus 1", rows + 1);
        return Err(Error::table(what, rule, indptr.len()));
    }
    if indptr[0] != 0 {
        return Err(Error::table(what, "0 at its start", indptr[0]));
    }
    if let Some(row) = (0..rows).find(|&row| indptr[row] > indptr[row + 1]) {
        return Err(Error::row(
            row,
            what,
            format!("at least {}, its predecessor", indptr[row]),
            indptr[row + 1],
        ));
    }
    Ok(())
}
