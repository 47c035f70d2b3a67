//! How large a step may be, what that makes of its buffers, and which kernels run it. Allocates nothing.

mod gpu;

use tokenselect_kernels::common::layout::{LOGIT_TILE, max_logit_tiles};

pub(crate) use self::gpu::{FEW_QUERY_ROWS, GpuPlan, PoolKernels, ScoreKernel, Scratch, VoteKernels};
use crate::batch::Batch;
use crate::config::{MAX_SEQUENCE_LEN, Positions, SelectConfig};
use crate::device::Device;
use crate::dtype::Shape;
use crate::error::{Error, Result};

/// The largest batch that a [`TokenSelect`](crate::TokenSelect) will be given: its buffers are made for it. A larger one is
/// [`Error::Limit`], which names the field to raise; [`PagedKvCache::extend_within`](crate::PagedKvCache::extend_within) finds that before the
/// sequences grow.
///
/// Of a batch in blocks ([`Batch::in_blocks`]) every block is a row, with all tokens before it: 16 blocks at the end of a million
/// tokens have 16 million. Their plan is best made with [`Operations::PREFILL`], which on a GPU has no place for as many logits.
/// ([`PrefillConfig::limits`](crate::PrefillConfig::limits) makes limits of the memory that there is.)
///
/// By default batches have one row: to serve several sequences at once, say how many.
/// ```
/// # use tokenselect::Limits;
/// let limits = Limits { max_rows: 16, max_kv_tokens: 16 * 32_768, ..Limits::default() };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch: sequences of a step, and padding. Default 1.
    pub max_rows: usize,
    /// Query tokens of one row: the longest block of a chunked prefill. Default 512.
    pub max_block_len: usize,
    /// Tokens cached by all rows of a batch together, every row rounded up to whole pages. Default 131072.
    pub max_kv_tokens: usize,
}

impl Limits {
    /// Checks the numbers of a batch.
    ///
    /// # Errors
    /// [`Error::Limit`], naming the limit.
    pub(crate) fn check(&self, rows: usize, block_len: usize, kv_tokens: usize) -> Result<()> {
        let needs = [
            ("max_rows", self.max_rows, rows),
            ("max_block_len", self.max_block_len, block_len),
            ("max_kv_tokens", self.max_kv_tokens, kv_tokens),
        ];
        match needs.into_iter().find(|&(_, limit, got)| got > limit) {
            None => Ok(()),
            Some((what, limit, got)) => Err(Error::Limit { what, limit, got }),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_rows: 1, max_block_len: 512, max_kv_tokens: 131_072 }
    }
}

/// The operations that a [`TokenSelect`](crate::TokenSelect) is made for. A GPU has more kernels for some than for others: it
/// scores and attends for some head dimensions, and votes for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operations {
    /// `append`.
    pub append: bool,
    /// `pool`, `compare` and `decide`.
    pub pool: bool,
    /// `score`, and selections of rows that are not blocks, such as those of decoding. The workspace has a place for the logit of
    /// every token and query head.
    pub score: bool,
    /// Selections of blocks ([`Batch::in_blocks`]), which keep no logits.
    pub score_blocks: bool,
    /// `vote` and `top_k`.
    pub vote: bool,
    /// `attend`.
    pub attend: bool,
}

impl Operations {
    /// All of them.
    pub const ALL: Operations =
        Operations { append: true, pool: true, score: true, score_blocks: true, vote: true, attend: true };
    /// All but attention, for engines that attend with kernels of their own.
    pub const SELECTION: Operations = Operations { attend: false, ..Operations::ALL };
    /// Whole steps of blocks ([`Batch::in_blocks`]) alone. On a GPU the workspace has no place for logits then, which are most of it.
    /// Decoding needs [`Operations::score`], so a plan of its own.
    pub const PREFILL: Operations = Operations { score: false, ..Operations::ALL };
    /// None; `merge`, which needs no plan, is always there.
    pub const NONE: Operations = Operations {
        append: false,
        pool: false,
        score: false,
        score_blocks: false,
        vote: false,
        attend: false,
    };

    /// Those of a selection of a batch.
    pub(crate) fn selecting(batch: &Batch) -> Operations {
        let blocks = batch.is_in_blocks();
        Operations { pool: true, score: !blocks, score_blocks: blocks, vote: true, ..Operations::NONE }
    }

    /// Whether there is a place for logits: not where a GPU votes for blocks alone.
    fn keeps_logits(&self, device: &Device) -> bool {
        self.score || if self.score_blocks { device.is_cpu() } else { self.vote }
    }

    pub(crate) const APPEND: Operations = Operations { append: true, ..Operations::NONE };
    pub(crate) const POOL: Operations = Operations { pool: true, ..Operations::NONE };
    pub(crate) const SCORE: Operations = Operations { score: true, ..Operations::NONE };
    pub(crate) const VOTE: Operations = Operations { vote: true, ..Operations::NONE };
    pub(crate) const ATTEND: Operations = Operations { attend: true, ..Operations::NONE };
}

impl Default for Operations {
    fn default() -> Self {
        Operations::ALL
    }
}

/// A configuration that was checked, for a device that can run it, with the sizes of every buffer of a step.
#[derive(Debug, Clone)]
pub struct Plan {
    device: Device,
    config: SelectConfig,
    limits: Limits,
    operations: Operations,
    /// Positions that tokens may be rotated at.
    num_positions: usize,
    gpu: Option<GpuPlan>,
}

/// What is missing where short blocks are asked of what reads prompts.
const SCORES_BLOCKS_ALONE: &str =
    "the operation `score`, which this was made without: what reads prompts selects for long blocks alone";

impl Plan {
    /// Checks configuration and limits, finds the device's kernels and sizes the buffers.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field that breaks its rule; [`Error::Unsupported`] where the device has no kernel for
    /// the configuration.
    pub fn new(
        device: &Device,
        config: SelectConfig,
        limits: Limits,
        operations: Operations,
    ) -> Result<Self> {
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
        let num_positions = match &config.positions {
            Positions::Native => 0,
            Positions::Reassigned(_) => {
                let scoring = config.n_local + limits.max_block_len;
                // A whole list may be longer than what one rank of several holds.
                let selected = config.max_selected(limits.max_block_len);
                limits.max_kv_tokens.max(scoring).max(selected)
            }
        };
        let gpu = match device.driver() {
            None => None,
            Some(driver) => Some(GpuPlan::new(driver, &config, &limits, operations)?),
        };
        Ok(Plan { device: device.clone(), config, limits, operations, num_positions, gpu })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The configuration.
    pub fn config(&self) -> &SelectConfig {
        &self.config
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What can be done.
    pub fn operations(&self) -> Operations {
        self.operations
    }

    /// Checks that the plan has all that `op` needs.
    ///
    /// # Errors
    /// [`Error::Missing`], naming the first operation that the plan leaves out.
    pub(crate) fn expect(&self, op: &'static str, needed: Operations) -> Result<()> {
        let has = self.operations;
        let left_out = [
            (needed.append && !has.append, "the operation `append`, which this was made without"),
            (needed.pool && !has.pool, "the operation `pool`, which this was made without"),
            (needed.score && !has.score && has.score_blocks, SCORES_BLOCKS_ALONE),
            (needed.score && !has.score, "the operation `score`, which this was made without"),
            (
                needed.score_blocks && !has.score_blocks,
                "the operation `score_blocks`, which this was made without",
            ),
            (needed.vote && !has.vote, "the operation `vote`, which this was made without"),
            (needed.attend && !has.attend, "the operation `attend`, which this was made without"),
        ];
        match left_out.into_iter().find(|&(is_left_out, _)| is_left_out) {
            None => Ok(()),
            Some((_, needs)) => Err(Error::Missing { op, needs }),
        }
    }

    /// Checks that there is a place for logits.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub(crate) fn expect_logits(&self, op: &'static str) -> Result<()> {
        if self.operations.keeps_logits(&self.device) {
            Ok(())
        } else {
            Err(Error::Missing { op, needs: "the operation `score`, which this was made without" })
        }
    }

    /// Kernels and scratch memory of a GPU; `None` for the processor.
    pub(crate) fn gpu(&self) -> Option<&GpuPlan> {
        self.gpu.as_ref()
    }

    /// The first position that no token is rotated at; 0 for native positions.
    pub(crate) fn num_positions(&self) -> usize {
        self.num_positions
    }

    /// 32-bit words that the kernels use among themselves.
    pub(crate) fn scratch_words(&self) -> usize {
        self.gpu.as_ref().map_or(0, |gpu| gpu.scratch.words())
    }

    /// Whether tokens are chosen by their votes as they are: not by a max-pool of these.
    pub(crate) fn votes_are_chosen_from(&self) -> bool {
        self.config.vote_pool_window <= 1
    }

    /// Places for logits, somewhat more than `max_kv_tokens`.
    pub(crate) fn num_logit_places(&self) -> usize {
        if !self.operations.keeps_logits(&self.device) {
            return 0;
        }
        let tiles = max_logit_tiles(self.limits.max_kv_tokens as u64, self.limits.max_rows as u64);
        (tiles * u64::from(LOGIT_TILE)) as usize
    }

    /// Places of a selected list: `n_init + top_k + n_local + max_block_len`, no more than `max_kv_tokens`.
    pub(crate) fn list_width(&self) -> usize {
        self.config.max_selected(self.limits.max_block_len).min(self.limits.max_kv_tokens)
    }

    /// Shape of the selected lists: `[max_rows, width]`, `n_init + top_k + n_local + max_block_len` wide, no wider than
    /// `max_kv_tokens`.
    pub fn selected_shape(&self) -> Shape {
        [self.limits.max_rows, self.list_width()].into()
    }

    /// Checks that a batch is within the limits.
    ///
    /// # Errors
    /// [`Error::Limit`], naming the limit.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        self.limits.check(batch.num_rows(), batch.max_block_len(), batch.num_token_places())?;
        batch.check_selected(self.config.max_selected(self.limits.max_block_len), self.config.top_k)
    }
}

impl Device {
    /// Whether this device can run steps of a configuration: what [`TokenSelect::new`](crate::TokenSelect::new) would say,
    /// without its allocations.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that breaks a rule, [`Error::Unsupported`] for one that the device has no kernels
    /// for, naming what it lacks.
    pub fn supports(&self, config: &SelectConfig) -> Result<()> {
        Plan::new(self, config.clone(), Limits::default(), Operations::ALL).map(drop)
    }
}

/// The error for an operation that a plan leaves out.
pub(crate) fn missing(op: &'static str) -> Error {
    Error::Missing { op, needs: "the operation of that name, which this was made without" }
}
