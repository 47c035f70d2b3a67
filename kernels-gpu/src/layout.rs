//! What a batch and a paged cache look like in device memory, and where a token lies.
//!
//! All offsets into keys, values and logits are 64-bit: a million tokens of 8 heads of 128 are already 2^30 elements.

use crate::simt::global::{GlobalMut, GlobalPtr};

/// A ragged batch: page tables in FlashInfer's layout and the queries of each row.
///
/// Row `r` has `T = qo_indptr[r + 1] - qo_indptr[r]` queries and `n = (pages - 1) * page_size + last_page_len` cached
/// tokens, the block of the `T` queries being the last of them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BatchTables {
    /// \[num_rows + 1\] u32, ascending from 0.
    pub qo_indptr: GlobalPtr<u32>,
    /// \[num_rows + 1\] u32, ascending from 0.
    pub kv_indptr: GlobalPtr<u32>,
    /// \[kv_indptr\[num_rows\]\] u32, page numbers.
    pub kv_indices: GlobalPtr<u32>,
    /// \[num_rows\] u32, 1 to `page_size`; 0 for a row without pages.
    pub kv_last_page_len: GlobalPtr<u32>,
    /// \[num_rows, 2\] u32, first and end of each row's candidates; address 0: `[n_init, n - T - n_local)`.
    pub candidates: GlobalPtr<u32>,
    /// Rows.
    pub num_rows: u32,
    /// Tokens in a page.
    pub page_size: u32,
    /// With `page_shift`, [`page_division`] of `page_size`.
    pub page_magic: u32,
    /// See `page_magic`.
    pub page_shift: u32,
}
const _: () = assert!(size_of::<BatchTables>() == 56);

/// `(magic, shift)` such that `token / page_size = token * magic >> shift` for every token below 2^31: a division
/// costs a GPU some twenty instructions, and every key needs one.
///
/// # Panics
/// If `page_size` is 0.
pub const fn page_division(page_size: u32) -> (u32, u32) {
    let shift = 31 + page_size.next_power_of_two().trailing_zeros();
    ((1u64 << shift).div_ceil(page_size as u64) as u32, shift)
}

/// Keys or values of one layer: `[num_pages, page_size, num_kv_heads, head_dim]` by strides, in elements of 2 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PageStrides {
    /// From a page to the next.
    pub page: u64,
    /// From a token to the next of its page.
    pub token: u64,
    /// From a head to the next of its token.
    pub head: u64,
}
const _: () = assert!(size_of::<PageStrides>() == 24);

impl PageStrides {
    /// Offset in elements of one head of one token.
    #[inline(always)]
    pub fn offset(&self, page: u32, token_in_page: u32, head: u32) -> u64 {
        page as u64 * self.page + token_in_page as u64 * self.token + head as u64 * self.head
    }
}

/// Tokens of a tile of logits. A tile is `[num_kv_heads, LOGIT_TILE, group]`, so that a warp that scores 16 tokens for one
/// KV head writes whole lines of memory.
pub const LOGIT_TILE: u32 = 16;

/// First tile of the logits of row `row`, whose token 0 has place `token_base`.
pub const fn logit_tile(token_base: u64, row: u32) -> u64 {
    token_base.div_ceil(LOGIT_TILE as u64) + row as u64
}

/// Tiles that the logits of `num_rows` rows with `num_places` places for tokens need.
pub const fn max_logit_tiles(num_places: u64, num_rows: u64) -> u64 {
    num_places.div_ceil(LOGIT_TILE as u64) + num_rows + 1
}

/// Half-open range of tokens of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// First token.
    pub begin: u32,
    /// One past the last.
    pub end: u32,
}

impl Tokens {
    /// Number of tokens.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.end - self.begin
    }

    /// Whether there is none.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.begin == self.end
    }
}

/// What the tables say of a row.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As [`BatchTables::queries`].
    pub queries: Tokens,
    /// As [`BatchTables::first_page`].
    pub first_page: u32,
    /// As [`BatchTables::kv_len`].
    pub kv_len: u32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl Row {
    /// As [`BatchTables::candidates`] of a whole sequence.
    #[inline(always)]
    pub fn candidates(&self, n_init: u32, n_local: u32) -> Tokens {
        let end = self.kv_len.saturating_sub(self.queries.len()).saturating_sub(n_local);
        Tokens { begin: n_init.min(end), end }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl BatchTables {
    /// All of a row at once. The loads are plain ones: the assembler would move `ld.global.nc` behind each other's uses.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn row(&self, row: u32) -> Row {
        let (queries, pages) = (self.qo_indptr.add(row as u64), self.kv_indptr.add(row as u64));
        let queries = Tokens { begin: queries.load(), end: queries.add(1).load() };
        let (first_page, end) = (pages.load(), pages.add(1).load());
        let last_page_len = self.kv_last_page_len.add(row as u64).load();
        let kv_len = (end - first_page).saturating_sub(1) * self.page_size + last_page_len;
        Row { queries, first_page, kv_len }
    }

    /// The queries of a row, as rows of `q` and `out`.
    ///
    /// # Safety
    /// - `row < num_rows`, and the tables are as described.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn queries(&self, row: u32) -> Tokens {
        let entry = self.qo_indptr.add(row as u64);
        Tokens { begin: entry.load_cached(), end: entry.add(1).load_cached() }
    }

    /// The row that query `query` belongs to, by bisection.
    ///
    /// # Safety
    /// - `query < qo_indptr[num_rows]`, and the tables are as described.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn row_of_query(&self, query: u32) -> u32 {
        let (mut low, mut high) = (0, self.num_rows);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if self.qo_indptr.add(middle as u64).load_cached() <= query {
                low = middle
            } else {
                high = middle
            }
        }
        low
    }

    /// First entry of a row in `kv_indices`.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn first_page(&self, row: u32) -> u32 {
        self.kv_indptr.add(row as u64).load_cached()
    }

    /// `n`: cached tokens of a row.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn kv_len(&self, row: u32) -> u32 {
        let pages = self.kv_indptr.add(row as u64 + 1).load_cached() - self.first_page(row);
        pages.saturating_sub(1) * self.page_size + self.kv_last_page_len.add(row as u64).load_cached()
    }

    /// Whether rows are parts of sequences, with candidates of their own.
    #[inline(always)]
    pub fn is_partial(&self) -> bool {
        self.candidates.addr() != 0
    }

    /// Place of the row's token 0 in arrays with a place for every slot of the batch's pages, such as logits.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn token_base(&self, row: u32) -> u64 {
        self.first_page(row) as u64 * self.page_size as u64
    }

    /// First tile of the row's logits: they lie in tiles of [`LOGIT_TILE`] tokens, the first of which begins with token 0.
    /// (One tile more than the tokens need parts a row from the next, since a row need not begin with a tile.)
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn logit_tile(&self, row: u32) -> u64 {
        logit_tile(self.token_base(row), row)
    }

    /// Page (as a place in the row's page table) and place within it of a token.
    #[inline(always)]
    pub fn split_token(&self, token: u32) -> (u32, u32) {
        let page = ((token as u64 * self.page_magic as u64) >> self.page_shift) as u32;
        (page, token - page * self.page_size)
    }

    /// The tokens of a row that compete for the top-k.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn candidates(&self, row: u32, n_init: u32, n_local: u32) -> Tokens {
        if self.is_partial() { self.own_candidates(row) } else { self.row(row).candidates(n_init, n_local) }
    }

    /// [`candidates`](Self::candidates) of a row whose tables have been read.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries); `tables` are those of the row.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn candidates_of(&self, row: u32, tables: &Row, n_init: u32, n_local: u32) -> Tokens {
        if self.is_partial() { self.own_candidates(row) } else { tables.candidates(n_init, n_local) }
    }

    /// The candidates of a row that is a part of a sequence.
    #[inline(always)]
    #[track_caller]
    unsafe fn own_candidates(&self, row: u32) -> Tokens {
        let entry = self.candidates.add(2 * row as u64);
        Tokens { begin: entry.load(), end: entry.add(1).load() }
    }
}

/// A pointer that a kernel treats as absent.
pub const fn absent<T>() -> GlobalPtr<T> {
    GlobalPtr::from_addr(0)
}

/// As [`absent`], writable.
pub const fn absent_mut<T>() -> GlobalMut<T> {
    GlobalMut::from_addr(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_division_is_exact() {
        for page_size in 1..=256 {
            let (magic, shift) = page_division(page_size);
            let divide = |token: u32| ((token as u64 * magic as u64) >> shift) as u32;
            for multiple in
                (0..1 << 31).step_by(page_size as usize * 40_009).chain([(1 << 31) - 2 * page_size])
            {
                let multiple = multiple / page_size * page_size;
                for token in [multiple.saturating_sub(1), multiple, multiple + 1, multiple + page_size - 1] {
                    assert_eq!(divide(token), token / page_size, "{token} / {page_size}");
                }
            }
            assert_eq!(divide(i32::MAX as u32), i32::MAX as u32 / page_size);
        }
    }
}
