//! Token-level KV-cache selection and sparse attention for long-context LLM inference.
pub mod backend;
mod batch;
mod cache;
mod config;
mod device;
mod error;
mod plan;
mod rope;
mod selection_cache;
mod tensor;
mod token_select;
mod workspace;

pub use backend::{Ranks, Selection};
pub use batch::Batch;
pub use cache::{
    CacheConfig, KvLayout, KvShape, KvStrides, KvView, KvViewMut, MAX_PAGE_SIZE, PageAllocator, PageCopy,
    PageTables, PagedKvCache, SequenceId,
};
pub use config::{HeadShape, MAX_HEAD_DIM, MAX_SEQUENCE_LEN, Positions, SelectConfig, SelectionCacheConfig};
pub use device::Device;
pub use error::{Error, Result};
pub use plan::{Limits, Plan};
pub use rope::{Rope, RopePairing, RopeScaling, RopeTable};
pub use selection_cache::{SelectionCache, SelectionCacheLayer, SelectionStats};
pub use tensor::{DType, Element, Shape, Tensor, TensorView, TensorViewMut};
pub use token_select::{StepInput, StepOutput, TokenSelect};
pub use workspace::{RowAction, Workspace};
