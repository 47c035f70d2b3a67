//! What is computed: head geometry, windows, scales, positions, Selection Cache.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::rope::Rope;

/// The largest head dimension any backend supports.
pub const MAX_HEAD_DIM: usize = 256;

/// The most heads of either kind.
pub const MAX_HEADS: usize = 1 << 16;

/// Tokens are indexed with 32 bits; no sequence may be longer than this.
pub const MAX_SEQUENCE_LEN: usize = u32::MAX as usize / 2;

/// Number and size of the attention heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query (and output) heads, `Hq`.
    pub num_qo_heads: usize,
    /// Key/value heads, `Hkv`; divides `num_qo_heads`. Query head `h` reads KV head `h / (Hq / Hkv)`.
    pub num_kv_heads: usize,
    /// Elements of one head, `D`: a multiple of 8, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

impl HeadShape {
    /// Query heads that share one KV head, `G = Hq / Hkv`; 0 without KV heads.
    pub fn group(&self) -> usize {
        self.num_qo_heads.checked_div(self.num_kv_heads).unwrap_or(0)
    }

    /// The KV head that query head `qo_head` reads.
    pub fn kv_head_of(&self, qo_head: usize) -> usize {
        qo_head.checked_div(self.group()).unwrap_or(0)
    }

    fn validate(&self) -> Result<()> {
        for (field, got) in [("num_kv_heads", self.num_kv_heads), ("num_qo_heads", self.num_qo_heads)] {
            if got > MAX_HEADS {
                return Err(Error::config(field, format!("at most {MAX_HEADS}"), got));
            }
        }
        if self.num_kv_heads == 0 {
            return Err(Error::config("num_kv_heads", "at least 1", self.num_kv_heads));
        }
        if self.num_qo_heads == 0 || !self.num_qo_heads.is_multiple_of(self.num_kv_heads) {
            let rule = format!("a positive multiple of num_kv_heads = {}", self.num_kv_heads);
            return Err(Error::config("num_qo_heads", rule, self.num_qo_heads));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) || self.head_dim > MAX_HEAD_DIM {
            let rule = format!("a multiple of 8 from 8 to {MAX_HEAD_DIM}");
            return Err(Error::config("head_dim", rule, self.head_dim));
        }
        Ok(())
    }
}

/// Where tokens stand when they are compared.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Positions {
    /// Keys enter the cache already rotated by the model; queries and keys are used as given.
    #[default]
    Native,
    /// Keys enter the cache before RoPE and are rotated at their rank in the selected list, so that no
    /// distance exceeds the list's length: the length extrapolation of TokenSelect, section 3.3.
    ///
    /// For scoring, query `t` of a block is rotated at position `n_local + t` and keys are not rotated.
    /// For attention over a list of `m` tokens, the key of rank `r` is rotated at position `r` and
    /// query `t` of a block of `T` at `m - T + t`.
    Reassigned(Rope),
}

impl Positions {
    /// Whether keys enter the cache before RoPE.
    pub(crate) fn are_reassigned(&self) -> bool {
        matches!(self, Positions::Reassigned(_))
    }
}

/// When a selection may serve again (TokenSelect, section 3.4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectionCacheConfig {
    /// The cached selection is used again while the cosine between its scoring query and the new one,
    /// over all heads at once, is at least this. From -1 to 1; the paper uses 0.9.
    pub similarity_threshold: f32,
    /// How often one selection may be used again; `None` stands for `max(n_local, 1)`, so that no token
    /// can leave the local window and stay unseen for long.
    pub max_reuse: Option<u32>,
}

impl Default for SelectionCacheConfig {
    fn default() -> Self {
        SelectionCacheConfig { similarity_threshold: 0.9, max_reuse: None }
    }
}

/// Everything that decides what is selected and attended to.
///
/// Fields are public and may be set freely; whatever takes a configuration calls
/// [`validate`](Self::validate) first.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectConfig {
    /// Head geometry. Default: 32 query heads, 8 KV heads of 128.
    pub heads: HeadShape,
    /// Type of queries, keys and values: `F16`, `Bf16` or `F32`. Accumulation is always f32. Default `Bf16`.
    pub dtype: DType,
    /// The first `n_init` tokens of a sequence are always selected. Default 128.
    pub n_init: usize,
    /// The last `n_local` tokens before the current block are always selected. Default 512.
    pub n_local: usize,
    /// Tokens chosen by vote among the rest, at least 1. Default 2048.
    pub top_k: usize,
    /// Factor on the scoring dot products; `None` stands for `1 / sqrt(head_dim)`.
    pub score_scale: Option<f32>,
    /// Factor on the attention logits; `None` stands for `1 / sqrt(head_dim)`.
    pub sm_scale: Option<f32>,
    /// `c` of the logit soft cap `c * tanh(logit / c)` in attention; `None` for no cap.
    pub logits_soft_cap: Option<f32>,
    /// Odd width of the max-pool over votes before the top-k; 1 for none. Default 1.
    pub vote_pool_window: usize,
    /// Position mode. Default [`Positions::Native`].
    pub positions: Positions,
    /// Reuse of selections between steps; `None` selects anew at every step. Default: on.
    pub selection_cache: Option<SelectionCacheConfig>,
}

impl Default for SelectConfig {
    fn default() -> Self {
        SelectConfig {
            heads: HeadShape { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 },
            dtype: DType::Bf16,
            n_init: 128,
            n_local: 512,
            top_k: 2048,
            score_scale: None,
            sm_scale: None,
            logits_soft_cap: None,
            vote_pool_window: 1,
            positions: Positions::Native,
            selection_cache: Some(SelectionCacheConfig::default()),
        }
    }
}

impl SelectConfig {
    /// The settings of the TokenSelect paper for blocks of `block_len` tokens: 128 initial tokens, the
    /// 2048 highest votes, 512 local tokens, reassigned positions, unscaled scores, threshold 0.9.
    ///
    /// The paper counts the block into its 512 local tokens; `n_local` here counts the tokens before the
    /// block, so it is `512 - block_len` (0 for the paper's prefill chunks of 512, 511 for decoding).
    pub fn paper(heads: HeadShape, rope: Rope, block_len: usize) -> Self {
        SelectConfig {
            heads,
            n_local: 512usize.saturating_sub(block_len),
            score_scale: Some(1.0),
            positions: Positions::Reassigned(rope),
            ..SelectConfig::default()
        }
    }

    /// The same configuration for finding single passages in long contexts: dot products vote unscaled (`score_scale` 1), and a token has the
    /// largest vote of the five around it (`vote_pool_window` 5), both as in the paper's released code.
    ///
    /// A head's vote is a softmax over all candidates. With the default scale, `1 / sqrt(head_dim)`, that of a head which looks for
    /// nothing spreads over most of them, and the sum of many such votes hides what one head looks for; the more, the longer the
    /// context. And what is looked for is a passage, whose tokens are found together or not at all. `docs/retrieval.md` of the repository has
    /// the figures. Attention keeps its own scale.
    /// ```
    /// # use tokenselect::SelectConfig;
    /// let config = SelectConfig::default().for_retrieval();
    /// assert_eq!((config.score_scale(), config.vote_pool_window), (1.0, 5));
    /// ```
    pub fn for_retrieval(self) -> Self {
        SelectConfig { score_scale: Some(1.0), vote_pool_window: 5, ..self }
    }

    /// The factor on scoring dot products.
    pub fn score_scale(&self) -> f32 {
        self.score_scale.unwrap_or_else(|| self.default_scale())
    }

    /// The factor on attention logits.
    pub fn sm_scale(&self) -> f32 {
        self.sm_scale.unwrap_or_else(|| self.default_scale())
    }

    /// How often a cached selection may be used again. 0 without a Selection Cache.
    pub fn max_reuse(&self) -> u32 {
        let Some(cache) = self.selection_cache else { return 0 };
        cache.max_reuse.unwrap_or(u32::try_from(self.n_local.max(1)).unwrap_or(u32::MAX))
    }

    /// The longest selected list for blocks of at most `max_block` tokens.
    pub fn max_selected(&self, max_block: usize) -> usize {
        [self.n_init, self.top_k, self.n_local].into_iter().fold(max_block, usize::saturating_add)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Config`], naming the first field that breaks its rule.
    pub fn validate(&self) -> Result<()> {
        self.heads.validate()?;
        if !self.dtype.is_float() {
            return Err(Error::config("dtype", "f16, bf16 or f32", self.dtype));
        }
        for (field, got) in [("n_init", self.n_init), ("n_local", self.n_local), ("top_k", self.top_k)] {
            if got > MAX_SEQUENCE_LEN {
                return Err(Error::config(field, format!("at most {MAX_SEQUENCE_LEN}"), got));
            }
        }
        if self.top_k == 0 {
            return Err(Error::config("top_k", "at least 1", self.top_k));
        }
        for (field, scale) in [("score_scale", self.score_scale), ("sm_scale", self.sm_scale)] {
            if let Some(scale) = scale.filter(|s| !s.is_finite()) {
                return Err(Error::config(field, "finite", scale));
            }
        }
        if let Some(cap) = self.logits_soft_cap.filter(|c| !(c.is_finite() && *c > 0.0)) {
            return Err(Error::config("logits_soft_cap", "finite and above 0", cap));
        }
        if self.vote_pool_window.is_multiple_of(2) || self.vote_pool_window > MAX_SEQUENCE_LEN {
            let rule = format!("odd and at most {MAX_SEQUENCE_LEN}");
            return Err(Error::config("vote_pool_window", rule, self.vote_pool_window));
        }
        if let Some(cache) = self.selection_cache
            && !(-1.0..=1.0).contains(&cache.similarity_threshold)
        {
            return Err(Error::config("similarity_threshold", "from -1 to 1", cache.similarity_threshold));
        }
        match &self.positions {
            Positions::Native => Ok(()),
            Positions::Reassigned(rope) => rope.validate(self.heads.head_dim),
        }
    }

    fn default_scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }
}
