//! What a batch and a paged cache look like in device memory, and where a token lies.
//!
//! All offsets into keys, values and logits are 64-bit: a million tokens of 8 heads of 128 are already 2^30 elements.

use crate::limits::TILE_TOKENS;
use crate::simt::global::{GlobalMut, GlobalPtr};

#[cfg(feature = "kernels")]
mod rows;
#[cfg(feature = "kernels")]
pub use rows::*;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    pub fn offset(&self, page: u32, token_in_page: u32, head: u32) -> u64 {
        page as u64 * self.page + token_in_page as u64 * self.token + head as u64 * self.head
    }
}

/// Queries, keys or values of a block: `[num_tokens, num_heads, head_dim]` by strides, in elements; those of a head are adjacent.
/// (32 bits: a product with a token's number is one instruction.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HeadStrides {
    /// From a token to the next.
    pub token: u32,
    /// From a head to the next of its token.
    pub head: u32,
}
const _: () = assert!(size_of::<HeadStrides>() == 8);

impl HeadStrides {
    /// Those of tokens that lie one behind the other.
    pub const fn dense(num_heads: u32, head_dim: u32) -> HeadStrides {
        HeadStrides { token: num_heads * head_dim, head: head_dim }
    }

    /// Offset in elements of one head of one token.
    pub fn offset(&self, token: u32, head: u32) -> u64 {
        token as u64 * self.token as u64 + head as u64 * self.head as u64
    }
}

/// Tokens of a tile of logits. A tile is `[num_kv_heads, LOGIT_TILE, group]`, so that a warp that scores 16 tokens for one
/// KV head writes whole lines of memory.
pub const LOGIT_TILE: u32 = TILE_TOKENS;

/// First tile of the logits of row `row`, whose token 0 has index `token_base`.
pub const fn logit_tile(token_base: u64, row: u32) -> u64 {
    token_base.div_ceil(LOGIT_TILE as u64) + row as u64
}

/// Tiles that the logits of `num_rows` rows need, whose pages have `num_slots` slots for tokens.
pub const fn max_logit_tiles(num_slots: u64, num_rows: u64) -> u64 {
    num_slots.div_ceil(LOGIT_TILE as u64) + num_rows + 1
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
    pub fn len(&self) -> u32 {
        self.end - self.begin
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.begin == self.end
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
impl BatchTables {
    /// One row, and no tables: enough for what depends on shapes alone.
    pub(crate) fn of_one_row(page_size: u32) -> BatchTables {
        BatchTables {
            qo_indptr: absent(),
            kv_indptr: absent(),
            kv_indices: absent(),
            kv_last_page_len: absent(),
            candidates: absent(),
            num_rows: 1,
            page_size,
            page_magic: 0,
            page_shift: 0,
        }
    }
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
