//! How large a step may be, and what that makes of its buffers: a pure function of configuration and limits.

use kernels_gpu::common::layout::{LOGIT_TILE, max_logit_tiles};

use crate::batch::Batch;
use crate::config::{MAX_SEQUENCE_LEN, Positions, SelectConfig};
use crate::error::{Error, Result};
use crate::rope::RopeTable;
use crate::tensor::Shape;

/// The largest batch that a [`TokenSelect`](crate::TokenSelect) will be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch. Default 1.
    pub max_rows: usize,
    /// Query tokens of one row. Default 512.
    pub max_block_len: usize,
    /// Tokens cached by all rows of a batch together, every row rounded up to whole pages. Default 131072.
    pub max_kv_tokens: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_rows: 1, max_block_len: 512, max_kv_tokens: 131_072 }
    }
}

/// A validated configuration with the sizes of every buffer of a step.
#[derive(Debug, Clone)]
pub struct Plan {
    config: SelectConfig,
    limits: Limits,
    rope: Option<RopeTable>,
}

impl Plan {
    /// Validates the configuration and sizes the buffers.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field that breaks its rule.
    pub fn new(config: SelectConfig, limits: Limits) -> Result<Self> {
        config.validate()?;
        let given = [
            ("max_rows", limits.max_rows),
            ("max_block_len", limits.max_block_len),
            ("max_kv_tokens", limits.max_kv_tokens),
        ];
        for (field, got) in given {
            if got == 0 || got > MAX_SEQUENCE_LEN {
                return Err(Error::config(field, format!("from 1 to {MAX_SEQUENCE_LEN}"), got));
            }
        }
        let rope = match &config.positions {
            Positions::Native => None,
            Positions::Reassigned(rope) => {
                let scoring = config.n_local + limits.max_block_len;
                // A whole list may be longer than what one rank of several holds.
                let selected = config.max_selected(limits.max_block_len);
                let positions = limits.max_kv_tokens.max(scoring).max(selected);
                Some(RopeTable::new(rope, config.heads.head_dim, positions))
            }
        };
        Ok(Plan { config, limits, rope })
    }

    /// Whether tokens are chosen by their votes as they are: not by a max-pool of these.
    pub(crate) fn votes_are_chosen_from(&self) -> bool {
        self.config.vote_pool_window <= 1
    }

    /// The configuration.
    pub fn config(&self) -> &SelectConfig {
        &self.config
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Angles of the position mode `Reassigned`.
    pub(crate) fn rope(&self) -> Option<&RopeTable> {
        self.rope.as_ref()
    }

    /// Shape of the scoring queries: `[max_rows, num_qo_heads, head_dim]`.
    pub fn query_shape(&self) -> Shape {
        let heads = self.config.heads;
        [self.limits.max_rows, heads.num_qo_heads, heads.head_dim].into()
    }

    /// Shape of an entry per row: `[max_rows]`.
    pub fn row_shape(&self) -> Shape {
        [self.limits.max_rows].into()
    }

    /// Shape of the logits: `[places, num_qo_heads]`, somewhat more places than `max_kv_tokens`. How they are ordered is a
    /// device's own: see [`TokenSelect::logit_index`](crate::TokenSelect::logit_index).
    pub fn logits_shape(&self) -> Shape {
        let tiles = max_logit_tiles(self.limits.max_kv_tokens as u64, self.limits.max_rows as u64);
        [(tiles * u64::from(LOGIT_TILE)) as usize, self.config.heads.num_qo_heads].into()
    }

    /// Shape of the softmax statistics: `[max_rows, num_qo_heads, 2]`.
    pub fn stats_shape(&self) -> Shape {
        [self.limits.max_rows, self.config.heads.num_qo_heads, 2].into()
    }

    /// Shape of the votes: `[max_kv_tokens]`.
    pub fn votes_shape(&self) -> Shape {
        [self.limits.max_kv_tokens].into()
    }

    /// Shape of the max-pooled votes: `[max_kv_tokens]`, `[0]` without a max-pool.
    pub fn pooled_votes_shape(&self) -> Shape {
        if self.config.vote_pool_window > 1 { self.votes_shape() } else { [0].into() }
    }

    /// Shape of the chosen tokens: `[max_rows, top_k]`.
    pub fn top_k_shape(&self) -> Shape {
        [self.limits.max_rows, self.config.top_k].into()
    }

    /// Shape of the selected lists: `[max_rows, n_init + top_k + n_local + max_block_len]`, no wider than
    /// `max_kv_tokens`.
    pub fn selected_shape(&self) -> Shape {
        let width = self.config.max_selected(self.limits.max_block_len).min(self.limits.max_kv_tokens);
        [self.limits.max_rows, width].into()
    }

    /// Checks that a batch is within the limits.
    ///
    /// # Errors
    /// [`Error::Limit`], naming the limit.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let needs = [
            ("max_rows", self.limits.max_rows, batch.num_rows()),
            ("max_block_len", self.limits.max_block_len, batch.max_block_len()),
            ("max_kv_tokens", self.limits.max_kv_tokens, batch.num_token_places()),
        ];
        for (what, limit, got) in needs {
            if got > limit {
                return Err(Error::Limit { what, limit, got });
            }
        }
        if batch.is_partial() {
            // Everything outside a partial row's candidates is selected, so its windows need checking.
            let limit = self.config.max_selected(self.limits.max_block_len);
            for row in 0..batch.num_rows() {
                let candidates = batch.candidates(row, &self.config).len();
                let got = batch.kv_len(row) - candidates + candidates.min(self.config.top_k);
                if got > limit {
                    return Err(Error::Limit { what: "selected tokens of a row", limit, got });
                }
            }
        }
        Ok(())
    }
}
