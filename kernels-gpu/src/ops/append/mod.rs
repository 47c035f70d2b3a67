//! `append`: writes the keys and values of each row's block into its pages.
//!
//! ```text
//! for each query token i of the batch (row r, index t in its block), KV head h:
//!     token = n_r - T_r + t
//!     pages[page of token, token % page_size, h] = new[i, h]          for keys and for values
//! ```
//! **Thread mapping.** One block per query token; its threads copy the token's heads, 16 bytes of keys and of values at
//! a time. The copy does not look into the elements, so one entry serves f16 and bf16 and every head dimension.
//!
//! **Bytes.** Keys and values once each way: `num_tokens * num_kv_heads * head_dim * 8`.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
