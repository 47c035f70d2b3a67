//! `translate`: an engine's page tables, which lie on the device, become those of a batch.
//!
//! ```text
//! for each row:
//!     n     = kv_lens[row], or 0 where that breaks a rule
//!     pages = ceil(n / page_size)
//!     kv_indptr[row + 1] = kv_indptr[row] + pages;  last_page_len[row] = n - (pages - 1) page_size
//!     for each page i: kv_indices[kv_indptr[row] + i] = entries[rows[row], i slots_per_page] / slots_per_page
//! ```
//! The rules: a row's block is not longer than `n`; the table has so many entries for it; the entries lie in a row of the
//! table; a number of 64 bits that has no place in 32, negative ones among them, is beyond every limit. A row that breaks one is left without tokens, and so are all where they have more pages than the batch has room
//! for. Page numbers beyond the pool become its last page, sequences beyond the limit none. What follows works on valid tables
//! whatever the engine's hold; `faults` counts what was wrong.
//!
//! **Thread mapping.** A block for [`CHUNK`] pages of a row. Each block adds up the pages of the rows before its own anew:
//! some hundred loads, and no block waits for another. **Bytes moved:** entries once, page numbers once.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
