//! Cached selections and the rules by which one is used again, as `pool`, [`compare`](mod@crate::ops::compare) and
//! [`decide`](mod@crate::ops::decide) have them.

use super::params::PoolParams;
use crate::simt::global::GlobalPtr;

/// The cached selections of a layer.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CachedTables {
    /// \[num_sequences, num_qo_heads * head_dim\] f32, read: scoring queries. Address 0: nothing is cached.
    pub queries: GlobalPtr<f32>,
    /// \[num_sequences\] u32, read: how often each selection was used again.
    pub ages: GlobalPtr<u32>,
    /// \[num_sequences\] u32, read: `n - T` when it was made, or [`EMPTY`](super::EMPTY).
    pub made_at: GlobalPtr<u32>,
    /// \[num_sequences, top_k\] u32, read: selections, ascending.
    pub selections: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
}

const _: () = assert!(size_of::<CachedTables>() == 40);

/// What decides on a row.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ReuseRules {
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// How often a selection may be used again.
    pub max_reuse: u32,
    /// Cosine from which on a selection is used again.
    pub similarity_threshold: f32,
}

const _: () = assert!(size_of::<ReuseRules>() == 20);

impl<T> PoolParams<T> {
    /// The cached selections.
    pub const fn cached(&self) -> CachedTables {
        CachedTables {
            queries: self.cached_queries,
            ages: self.cached_ages,
            made_at: self.cached_made_at,
            selections: self.cached_selections,
            sequence_indices: self.sequence_indices,
        }
    }

    /// The rules.
    pub const fn rules(&self) -> ReuseRules {
        ReuseRules {
            n_init: self.n_init,
            n_local: self.n_local,
            top_k: self.top_k,
            max_reuse: self.max_reuse,
            similarity_threshold: self.similarity_threshold,
        }
    }
}
