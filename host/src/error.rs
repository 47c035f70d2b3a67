//! What can go wrong, with the argument, the rule and the numbers.

use crate::dtype::{DType, Shape};
use crate::sequence::{SequenceChange, SequenceId};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error of this crate. Each names the argument, the rule it broke and the numbers involved.
///
/// A call that returns an error has changed nothing, except for [`TokenSelect::prefill`](crate::TokenSelect::prefill) where the device
/// fails behind its first piece.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration field breaks its rule.
    #[error("configuration field `{field}` must be {rule}, got {got}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// What the field must be.
        rule: String,
        /// What it is.
        got: String,
    },
    /// An argument that is no field of a configuration breaks its rule.
    #[error("argument `{what}` must be {rule}, got {got}")]
    Argument {
        /// Name of the argument.
        what: &'static str,
        /// What the argument must be.
        rule: String,
        /// What it is.
        got: String,
    },
    /// A tensor has the wrong shape.
    #[error("`{what}` must have shape {expected}, got {got}")]
    Shape {
        /// Name of the argument.
        what: &'static str,
        /// The shape it must have.
        expected: Shape,
        /// The shape it has.
        got: Shape,
    },
    /// A slice holds another number of elements than its shape says.
    #[error("`{what}` of shape {shape} needs {needed} elements, the slice has {got}")]
    Length {
        /// Name of the argument.
        what: &'static str,
        /// The shape asked for.
        shape: Shape,
        /// Elements that the shape needs.
        needed: usize,
        /// Elements in the slice.
        got: usize,
    },
    /// Strides lead beyond the end of the memory.
    #[error(
        "`{what}` of shape {shape} in strides {strides:?} from element {offset} on needs {needed} elements, the memory \
         has {got}"
    )]
    Extent {
        /// Name of the argument.
        what: &'static str,
        /// The shape asked for; of paged keys or values `[num_pages, page_size, num_kv_heads, head_dim]`.
        shape: Shape,
        /// Elements from an entry of each dimension to the next, but for the last dimension, where it is 1.
        strides: Vec<usize>,
        /// The first element.
        offset: usize,
        /// Elements of the memory up to the last that the strides reach; `usize::MAX` for more than can be counted.
        needed: usize,
        /// Elements in the memory.
        got: usize,
    },
    /// A tensor has the wrong element type.
    #[error("`{what}` must be {expected}, got {got}")]
    DType {
        /// Name of the argument.
        what: &'static str,
        /// The types allowed.
        expected: String,
        /// The type it has.
        got: DType,
    },
    /// An index is not below its limit.
    #[error("`{what}` must be below {limit}, got {got}")]
    Index {
        /// Name of the index.
        what: &'static str,
        /// The first index that is too large.
        limit: usize,
        /// The index given.
        got: usize,
    },
    /// A batch is larger than the [`Limits`](crate::Limits) that its workspace was made for, than its slot, or than any batch can be.
    ///
    /// Beyond `Limits`, a batch of an owned cache is not lost: a [`TokenSelect`](crate::TokenSelect) with larger limits takes it; or
    /// [`truncate`](crate::PagedKvCache::truncate) each of its sequences to the length before, and extend by less.
    /// [`extend_within`](crate::PagedKvCache::extend_within) refuses such a batch before anything grows.
    #[error("`{what}` is limited to {limit}, the batch needs {got}{}", way_back(what))]
    Limit {
        /// Name of the limit.
        what: &'static str,
        /// The maximum.
        limit: usize,
        /// What the batch needs.
        got: usize,
    },
    /// The page tables or lengths of a batch contradict each other.
    #[error("batch{}: `{what}` must be {rule}, got {got}", of_row(*row))]
    Table {
        /// Row of the batch; `None` where the rule is one for the whole table.
        row: Option<usize>,
        /// Name of the table.
        what: &'static str,
        /// What its entry must be.
        rule: String,
        /// What it is.
        got: String,
    },
    /// Not enough free pages; nothing was allocated.
    #[error("out of pages: {needed} needed, {free} free")]
    OutOfPages {
        /// Pages the whole call needs.
        needed: usize,
        /// Pages that are free.
        free: usize,
    },
    /// No sequence can be added.
    #[error("the cache holds at most {limit} sequences")]
    TooManySequences {
        /// Maximum number of sequences.
        limit: usize,
    },
    /// The sequence was never created by this cache or was freed.
    #[error("{0} is not in this cache")]
    UnknownSequence(SequenceId),
    /// A sequence appears twice in one batch.
    #[error("{id} appears in rows {first} and {second} of one batch")]
    DuplicateSequence {
        /// The sequence.
        id: SequenceId,
        /// Its first row.
        first: usize,
        /// Its second row.
        second: usize,
    },
    /// A sequence would grow beyond the largest length the tables can hold.
    #[error("{id} cannot grow to {got} tokens, the limit is {limit}")]
    SequenceTooLong {
        /// The sequence.
        id: SequenceId,
        /// The largest length.
        limit: usize,
        /// The length asked for.
        got: usize,
    },
    /// A sequence can be truncated only to a length it has reached.
    #[error("{id} holds {len} tokens and cannot be truncated to {to}")]
    TruncateBeyondEnd {
        /// The sequence.
        id: SequenceId,
        /// Tokens it holds.
        len: usize,
        /// The length asked for.
        to: usize,
    },
    /// The batch was made before the cache changed under it.
    ///
    /// Layers that lack its block get it by a new batch: [`truncate`](crate::PagedKvCache::truncate) the sequence to what all layers
    /// [have](crate::PagedKvCache::written_len), and extend it again.
    #[error(
        "batch row {row} is stale: {id} was {change} after the batch was made; its length was {expected} then and is {got} now"
    )]
    StaleBatch {
        /// Row of the batch.
        row: usize,
        /// The row's sequence.
        id: SequenceId,
        /// Tokens at the time the batch was made.
        expected: usize,
        /// Tokens now.
        got: usize,
        /// What was done to the sequence since; the last of several changes.
        change: SequenceChange,
    },
    /// A tensor lies elsewhere than the operation works.
    #[error("`{what}` must be on {expected}, it is on {got}")]
    WrongDevice {
        /// Name of the argument.
        what: &'static str,
        /// Where it must be.
        expected: String,
        /// Where it is.
        got: String,
    },
    /// The device has no kernel for this operation and configuration.
    #[error("{device} has no `{op}` for {what}")]
    Unsupported {
        /// Name of the device.
        device: String,
        /// Name of the operation.
        op: &'static str,
        /// Types and sizes asked for.
        what: String,
    },
    /// A driver call failed. It may stem from earlier asynchronous work.
    #[error("{device}: {call}: {reason}")]
    Driver {
        /// Name of the device.
        device: String,
        /// What was asked of the driver.
        call: String,
        /// Its answer.
        reason: String,
    },
    /// A kernel could not be launched, or (in the emulator) broke a rule.
    #[error("{device}: kernel `{kernel}`: {reason}")]
    Launch {
        /// Name of the device.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// An operation came before another one whose results it works on, or after that was done for another batch.
    #[error("`{op}` needs `{needs}` of the same batch before it, the workspace holds {holds}")]
    Order {
        /// Name of the operation.
        op: &'static str,
        /// The operation that must come before it.
        needs: &'static str,
        /// What the workspace holds instead.
        holds: &'static str,
    },
    /// A layer lacks tokens that an operation builds on: it was left out of an earlier step, or that failed.
    #[error(
        "layer {layer} holds the keys and values of {written} tokens of {id}, {needed} are needed: step it with the \
         batch that it missed, or truncate the sequence to {written} tokens"
    )]
    Unwritten {
        /// Index of the layer.
        layer: usize,
        /// The sequence.
        id: SequenceId,
        /// Tokens whose keys and values were written.
        written: usize,
        /// Tokens that the operation builds on: those before the block, or with it where it only reads.
        needed: usize,
    },
    /// Memory cannot be had.
    #[error("{device}: no memory for {what} of {bytes} bytes")]
    OutOfMemory {
        /// Where the memory was asked for.
        device: String,
        /// What was to lie in it.
        what: &'static str,
        /// Bytes asked for; `usize::MAX` for more than can be counted.
        bytes: usize,
    },
    /// An operation needs something that the configuration turned off, or that was not given.
    #[error("`{op}` needs {needs}")]
    Missing {
        /// Name of the operation.
        op: &'static str,
        /// What it needs.
        needs: &'static str,
    },
}

impl Error {
    /// Shorthand for [`Error::Config`].
    pub(crate) fn config(field: &'static str, rule: impl Into<String>, got: impl ToString) -> Self {
        Error::Config { field, rule: rule.into(), got: got.to_string() }
    }

    /// Shorthand for [`Error::Argument`].
    pub(crate) fn argument(what: &'static str, rule: impl Into<String>, got: impl ToString) -> Self {
        Error::Argument { what, rule: rule.into(), got: got.to_string() }
    }

    /// The error of an argument that is a field of the caller's configuration.
    pub(crate) fn of_field(self) -> Self {
        match self {
            Error::Argument { what: field, rule, got } => Error::Config { field, rule, got },
            other => other,
        }
    }

    /// Shorthand for [`Error::Table`] of a row.
    pub(crate) fn row(row: usize, what: &'static str, rule: impl Into<String>, got: impl ToString) -> Self {
        Error::Table { row: Some(row), what, rule: rule.into(), got: got.to_string() }
    }

    /// Shorthand for [`Error::Table`] of a whole table.
    pub(crate) fn table(what: &'static str, rule: impl Into<String>, got: impl ToString) -> Self {
        Error::Table { row: None, what, rule: rule.into(), got: got.to_string() }
    }
}

fn of_row(row: Option<usize>) -> String {
    row.map_or(String::new(), |row| format!(" row {row}"))
}

/// What to do about a batch beyond a field of [`Limits`](crate::Limits).
fn way_back(limit: &str) -> &'static str {
    match limit {
        "max_rows" | "max_block_len" | "max_kv_tokens" => {
            ": make the limit larger, or the batch smaller (after an `extend`, `truncate` takes it back)"
        }
        _ => "",
    }
}
