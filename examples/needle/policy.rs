//! Which tokens of the cache a step attends to.

use std::fmt;

use serde::Serialize;
use tokenselect::{Positions, SelectConfig, SelectionCacheConfig};
use tokenselect_examples::model::Model;

/// A policy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// All tokens.
    Dense,
    /// The first and the last tokens alone, as many as the other policies select (StreamingLLM).
    Windows,
    /// Pages of the cache, by the upper bound of their logits (Quest), summed over heads.
    Quest,
    /// Tokens by the sum of their logits over heads.
    Raw,
    /// Tokens by how many heads have them among their `top_k`.
    Hard,
    /// Tokens by the softmax of each head, summed over heads: what the library does.
    Soft,
    /// The same, each selection used again while the cosine with its query is at least this.
    Cached {
        /// `similarity_threshold`.
        threshold: f32,
    },
    /// Soft votes of parts of a block, of which the largest counts, head by head.
    Parts {
        /// Queries of a part, which are pooled into one; 1 lets every query vote.
        len: usize,
    },
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Dense => f.write_str("dense"),
            Policy::Windows => f.write_str("windows alone"),
            Policy::Quest => f.write_str("Quest's pages"),
            Policy::Raw => f.write_str("raw sum of logits"),
            Policy::Hard => f.write_str("hard vote"),
            Policy::Soft => f.write_str("soft vote"),
            Policy::Cached { threshold } => write!(f, "soft vote, cached at {threshold}"),
            Policy::Parts { len } => write!(f, "soft vote, maximum over parts of {len}"),
        }
    }
}

/// A policy and what it is run with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Settings {
    /// Which tokens are attended to.
    pub policy: Policy,
    /// Tokens of a block, which share one list.
    pub block: usize,
    /// The first tokens, always selected.
    pub n_init: usize,
    /// The last tokens before a block, always selected.
    pub n_local: usize,
    /// Tokens selected among the rest.
    pub top_k: usize,
    /// Factor on the dot products that vote.
    pub score_scale: f32,
    /// Window of the max-pool over votes.
    pub vote_pool_window: usize,
}

impl Settings {
    /// The library's configuration for sequences of up to `capacity` tokens.
    pub fn config(&self, model: &Model, capacity: usize) -> SelectConfig {
        SelectConfig {
            heads: model.config.heads,
            dtype: model.config.dtype,
            // Windows longer than the text change nothing, and need not be paid for.
            n_init: self.n_init.min(capacity),
            n_local: self.n_local.min(capacity),
            top_k: self.top_k.min(capacity),
            score_scale: Some(self.score_scale),
            vote_pool_window: self.vote_pool_window,
            positions: Positions::Reassigned(model.config.rope),
            selection_cache: match self.policy {
                Policy::Cached { threshold } => Some(SelectionCacheConfig {
                    similarity_threshold: threshold,
                    ..SelectionCacheConfig::default()
                }),
                _ => None,
            },
            ..SelectConfig::default()
        }
    }
}
