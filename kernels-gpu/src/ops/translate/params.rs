//! Parameters and launch dimensions.

use crate::launch::Dims;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Pages that a block writes: eight a thread.
pub const CHUNK: u32 = 8 * THREADS;

/// Shared memory of a block.
pub(super) struct Layout {
    /// A word for each warp.
    pub warps: Region<u32>,
    bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    let warps = carve.array(THREADS / 32, 4);
    Layout { warps, bytes: carve.bytes() }
};

/// The sequence index of a row without one.
pub const NO_SEQUENCE: u32 = u32::MAX;

/// Parameters of [`translate`](super::kernel::translate).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TranslateParams {
    /// \[num_table_rows, num_entries\] in rows of `entry_stride`, read: pages, or slots of tokens. Integers of 32 bits, or where
    /// [`wide`](Self::wide) says so of 64, aligned to 4 bytes; so are the other tables that are read.
    pub entries: GlobalPtr<u32>,
    /// \[num_rows\], read: row of `entries` of each row. Address 0: the same.
    pub rows: GlobalPtr<u32>,
    /// \[num_rows\], read: tokens of each row, its block included.
    pub kv_lens: GlobalPtr<u32>,
    /// \[num_rows\], read: sequence of each row. Address 0: none.
    pub sequences: GlobalPtr<u32>,
    /// \[num_rows + 1\] u32, read.
    pub qo_indptr: GlobalPtr<u32>,
    /// \[num_rows + 1\] u32, written.
    pub kv_indptr: GlobalMut<u32>,
    /// \[max_pages\] u32, written.
    pub kv_indices: GlobalMut<u32>,
    /// \[num_rows\] u32, written.
    pub last_page_len: GlobalMut<u32>,
    /// \[num_rows\] u32, written where there are `sequences`.
    pub sequence_indices: GlobalMut<u32>,
    /// \[1\] u32, added to: rows left without tokens, pages and sequences replaced.
    pub faults: GlobalMut<u32>,
    /// Entries from a row of the table to the next.
    pub entry_stride: u64,
    /// Entries of a row.
    pub num_entries: u32,
    /// Rows of the table.
    pub num_table_rows: u32,
    /// Rows of the batch.
    pub num_rows: u32,
    /// Tokens in a page.
    pub page_size: u32,
    /// 1: entries are pages. `page_size`: there is an entry for each token, its slot.
    pub slots_per_page: u32,
    /// Pages of the pool.
    pub num_pages: u32,
    /// Room for page numbers.
    pub max_pages: u32,
    /// The first sequence that is too large.
    pub num_sequences: u32,
    /// Which tables are of integers of 64 bits: [`ENTRIES`], [`ROWS`], [`KV_LENS`], [`SEQUENCES`].
    pub wide: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<TranslateParams>() == 128);

/// Bit of [`TranslateParams::wide`] for `entries`.
pub const ENTRIES: u32 = 1;
/// Bit of [`TranslateParams::wide`] for `rows`.
pub const ROWS: u32 = 2;
/// Bit of [`TranslateParams::wide`] for `kv_lens`.
pub const KV_LENS: u32 = 4;
/// Bit of [`TranslateParams::wide`] for `sequences`.
pub const SEQUENCES: u32 = 8;

impl TranslateParams {
    /// Pages that a row can have.
    pub const fn max_row_pages(&self) -> u32 {
        let of_table = self.num_entries.div_ceil(self.slots_per_page);
        if of_table < self.max_pages { of_table } else { self.max_pages }
    }

    /// Blocks of [`CHUNK`] pages of a row, by rows.
    pub fn dims(&self) -> Dims {
        let chunks = self.max_row_pages().div_ceil(CHUNK).max(1);
        Dims { grid: [chunks, self.num_rows, 1], ..Dims::linear(1, THREADS, LAYOUT.bytes) }
    }
}
