//! Rows that are cut into blocks, which read the keys of their sequence together.

use std::ops::Range;
use std::sync::Arc;

use tokenselect_kernels::limits::COLUMNS;
use tokenselect_kernels::ops::score_blocks::blocks_of_group;

use super::{Batch, Identity, MAX_PAGES, MAX_ROWS};
use crate::error::{Error, Result};
use crate::pages::PageTables;

/// Where the blocks come from.
#[derive(Debug)]
pub(super) struct Cut {
    /// The batch of whole rows.
    pub whole: Batch,
    /// First block of each of its rows, and their number.
    blocks: Vec<[u32; 2]>,
}

impl Batch {
    /// The same tokens with every row cut into blocks of `block_len` tokens, the last of which may be shorter: for a piece of a
    /// prompt, longer than the blocks that it is processed in.
    ///
    /// A block is a row of the new batch. It selects for itself, from the tokens before it, with its own windows: what it
    /// computes is what it would compute alone, the blocks one after the other. The order of query tokens stays as it was, and
    /// all operations take the batch as any other. Blocks of one row select together
    /// ([`TokenSelect::select`](crate::TokenSelect::select)), which reads the row's keys once for many of them. Their selections
    /// are neither taken from a [Selection Cache](crate::SelectionCache) nor put there, and what it holds for their sequences is
    /// dropped: it knows nothing of the tokens that the blocks add. (All rows of the batch are blocks then, a decoding one too.)
    ///
    /// `block_len` is a dial between speed and fidelity: all queries of a block share one list of tokens, chosen by their
    /// mean, so shorter blocks find more of what single queries look for, and cost more. The paper has blocks of 512.
    ///
    /// Blocks share the reading of their keys on a GPU; the processor takes them one by one. An owned cache makes such a batch with
    /// [`PagedKvCache::extend_in_blocks`](crate::PagedKvCache::extend_in_blocks), once for all layers:
    ///
    /// ```
    /// # use tokenselect::*;
    /// # let device = Device::cpu();
    /// # let config = SelectConfig { top_k: 64, n_local: 32, dtype: DType::F32, ..SelectConfig::default() };
    /// # let pages = CacheConfig { num_pages: 64, num_layers: 1, ..CacheConfig::default() };
    /// # let mut cache = PagedKvCache::new(&device, &config, &pages)?;
    /// # let sequence = cache.create()?;
    /// # let heads = config.heads;
    /// # let q = Tensor::zeros(DType::F32, [300, heads.num_qo_heads, heads.head_dim])?;
    /// # let k = Tensor::zeros(DType::F32, [300, heads.num_kv_heads, heads.head_dim])?;
    /// # let mut out = Tensor::zeros(DType::F32, q.shape())?;
    /// # let input = StepInput { q: q.view(), k: k.view(), v: k.view() };
    /// # let output = StepOutput { out: out.view_mut(), lse: None };
    /// // A prompt of 300 tokens in blocks of 64: five rows, of 64, 128, 192, 256 and 300 cached tokens.
    /// let limits = Limits { max_rows: 5, max_block_len: 64, max_kv_tokens: 5 * 304 };
    /// let mut prefill = TokenSelect::with_plan(Plan::new(&device, config, limits, Operations::PREFILL)?)?;
    /// let batch = cache.extend_in_blocks(&limits, &[(sequence, 300)], 64)?;
    /// prefill.step(&mut cache, 0, &batch, input, output)?; // of all 300 tokens
    /// # Ok::<(), tokenselect::Error>(())
    /// ```
    ///
    /// Every block counts in [`Limits::max_rows`](crate::Limits::max_rows), and with all its tokens in
    /// [`Limits::max_kv_tokens`](crate::Limits::max_kv_tokens).
    ///
    /// # Errors
    /// [`Error::Argument`] for blocks of no tokens, [`Error::Limit`] for more than 2^24 blocks or 2^31 pages of all blocks,
    /// [`Error::OutOfMemory`], [`Error::Missing`] where the rows are parts of sequences, blocks already, or known to a device alone.
    pub fn in_blocks(&self, block_len: usize) -> Result<Batch> {
        self.expect_uncut("in_blocks", block_len)?;
        let blocks_of = |row: usize| self.block_len(row).div_ceil(block_len).max(1);
        let num_blocks = (0..self.num_rows()).map(blocks_of).sum();
        if num_blocks > MAX_ROWS {
            return Err(Error::Limit { what: "rows of a batch", limit: MAX_ROWS, got: num_blocks });
        }
        // Tokens of a row that are cached when its block `block` ends. A row of no tokens has queries nevertheless, for which zeros
        // are written.
        let kv_end = |row: usize, block: usize| match self.kv_len(row) {
            0 => 0,
            n => n - self.block_len(row) + (block_len.saturating_mul(block + 1)).min(self.block_len(row)),
        };
        let pages_of = |row, block| kv_end(row, block).div_ceil(self.page_size);
        let num_pages = (0..self.num_rows())
            .flat_map(|row| (0..blocks_of(row)).map(move |block| (row, block)))
            .fold(0usize, |sum, (row, block)| sum.saturating_add(pages_of(row, block)));
        if num_pages > MAX_PAGES {
            return Err(Error::Limit { what: "pages of a batch", limit: MAX_PAGES, got: num_pages });
        }
        let mut tables = PageTables { indptr: vec![0], ..PageTables::default() };
        if tables.indices.try_reserve_exact(num_pages).is_err() {
            let (device, what, bytes) = ("cpu".to_owned(), "the page tables of a batch", 4 * num_pages);
            return Err(Error::OutOfMemory { device, what, bytes });
        }
        let (mut qo_indptr, mut blocks) = (vec![0], Vec::with_capacity(self.num_rows()));
        for row in 0..self.num_rows() {
            let queries = self.query_range(row);
            blocks.push([tables.last_page_len.len() as u32, blocks_of(row) as u32]);
            for block in 0..blocks_of(row) {
                let end = block_len.saturating_mul(block + 1).min(queries.len());
                let (kv_end, pages) = (kv_end(row, block), pages_of(row, block));
                tables.indices.extend_from_slice(&self.pages(row)[..pages]);
                tables.indptr.push(tables.indices.len() as u32);
                tables.last_page_len.push((kv_end - pages.saturating_sub(1) * self.page_size) as u32);
                qo_indptr.push((queries.start + end) as u32);
            }
        }
        let mut batch = Batch::new(self.page_size, qo_indptr, tables)?;
        batch.allocator = self.allocator;
        batch.identity = Identity::new();
        batch.cut = Some(Arc::new(Cut { whole: self.clone(), blocks }));
        Ok(batch)
    }

    /// Some query tokens of the batch, which has them: its rows up to the last of these, without those that have none of them.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Result<Batch> {
        let first = self.qo_indptr.partition_point(|&at| at as usize <= tokens.start).saturating_sub(1);
        let rows =
            first..self.qo_indptr.partition_point(|&at| (at as usize) < tokens.end).min(self.num_rows());
        let rows: Vec<usize> = rows.filter(|&row| self.block_len(row) > 0).collect();
        let (mut qo_indptr, mut tables) = (vec![0], PageTables { indptr: vec![0], ..PageTables::default() });
        for &row in &rows {
            let queries = self.query_range(row);
            let end = queries.end.min(tokens.end);
            let kv_len = self.kv_len(row).saturating_sub(queries.end - end);
            let pages = kv_len.div_ceil(self.page_size);
            qo_indptr.push((end - tokens.start) as u32);
            tables.indices.extend_from_slice(&self.pages(row)[..pages]);
            tables.indptr.push(tables.indices.len() as u32);
            tables.last_page_len.push((kv_len - pages.saturating_sub(1) * self.page_size) as u32);
        }
        let mut part = Batch::new(self.page_size, qo_indptr, tables)?;
        part.allocator = self.allocator;
        // Rows of padding, which have no owners, are the last ones.
        part.owners = rows.iter().filter_map(|&row| self.owners.get(row).copied()).collect();
        part.sequence_indices =
            self.sequence_indices.as_ref().map(|all| rows.iter().map(|&row| all[row]).collect());
        Ok(part)
    }

    /// Whether the rows are blocks, made by [`in_blocks`](Self::in_blocks).
    pub fn is_in_blocks(&self) -> bool {
        self.cut.is_some()
    }

    /// The place in per-sequence tables of each row that adds more than one token; of the rows that blocks were cut from.
    pub(crate) fn growing_sequences(&self) -> impl Iterator<Item = usize> {
        let whole = self.cut.as_ref().map_or(self, |cut| &cut.whole);
        let grows = |&row: &usize| self.is_in_blocks() || whole.block_len(row) > 1;
        (0..whole.num_rows()).filter(grows).filter_map(|row| whole.sequence_index(row))
    }

    /// Checks that the rows can be cut into blocks.
    pub(crate) fn expect_uncut(&self, op: &'static str, block_len: usize) -> Result<()> {
        self.expect_on_host(op)?;
        self.expect_whole(op)?;
        if self.is_partial() {
            return Err(Error::Missing { op, needs: "rows that are whole sequences" });
        }
        if block_len == 0 {
            return Err(Error::argument("block_len", "at least 1", block_len));
        }
        Ok(())
    }

    /// Checks that the rows are no blocks.
    pub(super) fn expect_whole(&self, op: &'static str) -> Result<()> {
        if self.is_in_blocks() {
            Err(Error::Missing { op, needs: "rows that are not cut into blocks" })
        } else {
            Ok(())
        }
    }

    /// Groups of up to `most` adjacent blocks of one row: first row and number of rows of each.
    pub(crate) fn groups(&self, most: u32) -> impl Iterator<Item = [u32; 2]> {
        let blocks = self.cut.iter().flat_map(|cut| &cut.blocks);
        blocks.flat_map(move |&[first, number]| {
            (0..number).step_by(most as usize).map(move |i| [first + i, most.min(number - i)])
        })
    }

    /// The groups for each of the sizes that kernels have.
    pub(super) fn group_tables(&self) -> [Vec<u32>; COLUMNS.len()] {
        COLUMNS.map(|columns| {
            blocks_of_group(columns).into_iter().flat_map(|most| self.groups(most)).flatten().collect()
        })
    }
}
