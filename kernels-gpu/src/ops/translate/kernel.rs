//! The kernel.

use super::params::*;
use crate::common::block::{strided, sums_before};
use crate::simt::global::GlobalPtr;
use crate::simt::{grid, thread};

/// See the module.
///
/// # Safety
/// - The buffers are as [`TranslateParams`] says; `slots_per_page` and `page_size` are not 0.
/// - Launched with [`TranslateParams::dims`].
pub unsafe fn translate(params: TranslateParams) {
    // The next launch begins when this one has ended: what it may read before it has waited is written here.
    grid::wait_for_previous();
    core::hint::assert_unchecked(params.slots_per_page != 0 && params.page_size != 0);
    let (row, chunk) = (thread::block_idx_y(), thread::block_idx_x());
    let (first_page, total) = params.pages_before(row);
    let fits = total <= params.max_pages;
    let (kv_len, rule_is_kept) = params.kv_len(row);
    let kv_len = if fits { kv_len } else { 0 };
    let (first_page, pages) = if fits { (first_page, kv_len.div_ceil(params.page_size)) } else { (0, 0) };
    if chunk == 0 && thread::thread_idx_x() == 0 {
        params.write_row(row, first_page, pages, kv_len);
        if !(fits && rule_is_kept) {
            params.count_fault();
        }
    }
    if pages == 0 {
        return;
    }
    let table_row = params.table_row(row);
    let end = pages.min((chunk + 1) * CHUNK);
    for page in strided(chunk * CHUNK + thread::thread_idx_x(), end, THREADS) {
        let at = table_row as u64 * params.entry_stride + page as u64 * params.slots_per_page as u64;
        let (entry, high) = params.load(params.entries, ENTRIES, at);
        let number = if high == 0 { entry / params.slots_per_page } else { u32::MAX };
        if number >= params.num_pages {
            params.count_fault();
        }
        params.kv_indices.add((first_page + page) as u64).store(number.min(params.num_pages - 1));
    }
}

impl TranslateParams {
    /// The lower and the upper half of a number of a table, whose bit in `wide` is `bit`.
    unsafe fn load(&self, table: GlobalPtr<u32>, bit: u32, at: u64) -> (u32, u32) {
        if self.wide & bit == 0 {
            return (table.add(at).load(), 0);
        }
        let number = table.add(2 * at);
        (number.load(), number.add(1).load())
    }

    /// A number of a table of one dimension. One that has no place in 32 bits is beyond every limit, and only -1 is [`NO_SEQUENCE`].
    unsafe fn number(&self, table: GlobalPtr<u32>, bit: u32, at: u32) -> u32 {
        let (low, high) = self.load(table, bit, at as u64);
        if high == 0 || (low & high) == u32::MAX { low } else { u32::MAX - 1 }
    }

    /// The row of the table; beyond its end for none.
    unsafe fn table_row(&self, row: u32) -> u32 {
        if self.rows.addr() == 0 { row } else { self.number(self.rows, ROWS, row) }
    }

    /// Tokens of a row, and whether it keeps the rules; 0 if not.
    unsafe fn kv_len(&self, row: u32) -> (u32, bool) {
        let kv_len = self.number(self.kv_lens, KV_LENS, row);
        let queries = self.qo_indptr.add(row as u64);
        let block_len = queries.add(1).load() - queries.load();
        let longest = self.max_row_pages() as u64 * self.page_size as u64;
        let has_entries = kv_len as u64 <= longest && self.table_row(row) < self.num_table_rows;
        let is_kept = kv_len == 0 || (has_entries && kv_len >= block_len);
        (if is_kept { kv_len } else { 0 }, is_kept)
    }

    /// Pages of the rows before `row`, and of all rows. The sums saturate, far above any number of pages that there is room for.
    ///
    /// *Convergence:* aligned; every thread of the block.
    unsafe fn pages_before(&self, row: u32) -> (u32, u32) {
        /// So that those of a block's threads fit a word.
        const MOST: u32 = u32::MAX / THREADS;
        let warps = LAYOUT.warps.get();
        let (mut before, mut all) = (0u32, 0u32);
        let mut first = 0;
        while first < self.num_rows {
            let other = first + thread::thread_idx_x();
            let pages = if other < self.num_rows { self.kv_len(other).0.div_ceil(self.page_size) } else { 0 };
            let pages = pages.min(MOST);
            let (_, of_before) = sums_before(warps, if other < row { pages } else { 0 });
            let (_, of_all) = sums_before(warps, pages);
            before = before.saturating_add(of_before);
            all = all.saturating_add(of_all);
            first += THREADS;
        }
        (before, all)
    }

    unsafe fn write_row(&self, row: u32, first_page: u32, pages: u32, kv_len: u32) {
        if row == 0 {
            self.kv_indptr.store(0);
        }
        self.kv_indptr.add(row as u64 + 1).store(first_page + pages);
        let last = if pages == 0 { 0 } else { kv_len - (pages - 1) * self.page_size };
        self.last_page_len.add(row as u64).store(last);
        if self.sequences.addr() != 0 {
            let sequence = self.number(self.sequences, SEQUENCES, row);
            if sequence >= self.num_sequences && sequence != NO_SEQUENCE {
                self.count_fault();
            }
            let known = if sequence < self.num_sequences { sequence } else { NO_SEQUENCE };
            self.sequence_indices.add(row as u64).store(known);
        }
    }

    unsafe fn count_fault(&self) {
        self.faults.atomic_add(1);
    }
}
