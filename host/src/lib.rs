//! Token-level KV-cache selection and sparse attention for long-context LLM inference.
//!
//! At every step and layer, the tokens of a sequence's KV cache vote: each query head's softmax over query-key dot
//! products, summed over heads. The `top_k` with most votes, the first `n_init` and the last `n_local` tokens and the
//! current block are attended to, and nothing else is. (TokenSelect, EMNLP 2025, arXiv 2411.02886.)
//!
//! # What to use
//! - [`TokenSelect`] runs steps: [`step`](TokenSelect::step) for all of it, or one operation at a time.
//! - [`TokenSelect::prefill`] reads prompts of any length, cut into [`Pieces`].
//! - [`PagedKvCache`] owns keys and values; [`KvView`], [`KvViewMut`] and [`Batch::new`] serve the cache of another engine
//!   ([example](KvViewMut#example)).
//! - [`SelectConfig`] says what is computed, [`Limits`] how large a step may be (one sequence, unless it says more), [`Device`] where
//!   it runs.
//!
//! # Features
//! None is on by default: the crate then builds on any machine and computes on its processor.
//! - `cuda`: NVIDIA GPUs of compute capability 8.0 and newer, with a driver found at run time (`Device::cuda`). Kernels are embedded
//!   as PTX; nothing of a CUDA toolkit is used. But the build script of `cust_raw` asks for one: where none is installed, set the
//!   environment variable `CUDA_LIBRARY_PATH=/` when building (on AArch64, to any folder with a folder `lib64` in it).
//! - `emulator`: `Device::emulated`, the same kernels on the processor with every access checked, for tests.
//!
//! # Shapes
//! | name | meaning |
//! |---|---|
//! | `num_qo_heads`, `num_kv_heads`, `head_dim` | heads of queries, heads of keys and values, elements of a head |
//! | row | a sequence's part of a batch: a block of `T` query tokens over `n` cached tokens, the block included |
//! | `num_query_tokens` | query tokens of all rows, concatenated |
//! | candidates | tokens that compete for the top-k: `[n_init, n - T - n_local)` |
//! | selected list | initial, chosen and local tokens and the block, ascending; a token's place in it is its rank |
//!
//! The definitions, to the letter, are in `docs/definitions.md` of the repository.
//!
//! # Example
//! ```
//! use tokenselect::*;
//!
//! # fn main() -> Result<()> {
//! let device = Device::cpu();
//! let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
//! let config = SelectConfig { heads, dtype: DType::F32, top_k: 256, ..SelectConfig::default() };
//! let mut cache = PagedKvCache::new(&device, &config, &CacheConfig::default())?;
//! let mut select = TokenSelect::new(&device, config, Limits::default())?;
//!
//! let sequence = cache.create()?;
//! let batch = cache.extend(&[(sequence, 3)])?; // three new tokens
//! let (q, kv) = (vec![0.5f32; 3 * 8 * 64], vec![0.25f32; 3 * 2 * 64]);
//! let mut out = vec![0.0f32; q.len()];
//! let (input, output) = (select.input(&batch, &q, &kv, &kv)?, select.output(&batch, &mut out, None)?);
//! select.step(&mut cache, 0, &batch, input, output)?; // layer 0
//! assert_eq!(select.workspace().selected(0)?, [0, 1, 2]);
//! # Ok(())
//! # }
//! ```
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

// In this order: each module uses those above it.
mod dtype;
mod sequence;

mod error;

mod driver;

mod device;
mod memory;
mod tensor;

mod rope;

mod config;
mod pages;

mod batch;
mod ledger;

mod kv;
mod selection_cache;

mod plan;

mod pieces;
mod workspace;

mod backend;
mod cache;

mod token_select;

pub use backend::{Ranks, Selection};
pub use batch::{Batch, BatchRow, BatchSlot, TablesOnDevice};
pub use cache::{CacheConfig, LayerMut, PagedKvCache};
pub use config::{
    HeadShape, MAX_HEAD_DIM, MAX_HEADS, MAX_SEQUENCE_LEN, Positions, SelectConfig, SelectionCacheConfig,
};
pub use device::{Device, Graph};
pub use driver::Event;
pub use dtype::{DType, Shape};
pub use error::{Error, Result};
/// The crate of the types `half::f16` and `half::bf16`, which are [`Element`]s.
pub use half;
pub use kv::{KvLayout, KvShape, KvStrides, KvView, KvViewMut};
pub use pages::{MAX_PAGE_SIZE, PageAllocator, PageCopy, PageTables};
pub use pieces::Pieces;
pub use plan::{Limits, Operations, Plan};
pub use rope::{Rope, RopePairing, RopeScaling, RopeTable};
pub use selection_cache::{SelectionCache, SelectionCacheLayer, SelectionStats};
pub use sequence::{SequenceChange, SequenceId};
pub use tensor::{Element, Tensor, TensorView, TensorViewMut};
pub use token_select::{Over, PrefillConfig, PrefillProgress, StepInput, StepOutput, TokenSelect};
pub use tokenselect_kernels::launch::Dims;
pub use workspace::{Buffer, RowAction, Workspace};

/// The examples of the documents are compiled and run. (One of them is for GPUs.) That of the project's README is in this crate's, too.
#[cfg(all(doctest, feature = "cuda"))]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../guide.md")]
    struct Guide;
}
