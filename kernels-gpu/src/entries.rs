//! Entry points of the PTX: what the instances of the kernels are, and how a host finds one.
//!
//! An instance is data: an operation, and the values that its kernel was compiled for. [`ENTRIES`] has a line for each
//! operation and head dimension; hosts ask [`Entry::find`] and look nowhere else. Each entry takes its parameter struct by
//! value, as its only argument.
//!
//! | operations | head dimensions | heads of a group |
//! |---|---|---|
//! | `score`, `score_stream` | 64, 96, 128 | up to 4, 8, 16 |
//! | | 256 | up to 4, 8 |
//! | `score_blocks_stats`, `score_blocks_vote` | 64, 96, 128, 256 | up to 4, 8, 16 |
//! | `attend_decode`, `attend_prefill`, `attend_warpgroups`, `attend_stream` | 64, 96, 128, 256 | any |
//! | all others | any | any |
//!
//! A host may launch them so that they overlap: [`overlap`](crate::common::overlap) has the rules.

// A GPU's build of the kernels for tests has the table without its kernels.
#[cfg_attr(all(target_arch = "nvptx64", feature = "conformance"), allow(dead_code, unused_imports))]
mod table;
#[cfg(test)]
mod tests;

use core::fmt;

pub use table::{COUNT, ENTRIES};
#[cfg(feature = "conformance")]
pub(crate) use table::{List, entries};

/// What a kernel does. Names in the PTX begin with it, in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes keys and values to the cache: [`append`](mod@crate::ops::append).
    Append,
    /// Drops cached selections: [`forget`](mod@crate::ops::forget).
    Forget,
    /// [`Append`](Op::Append) and [`Pool`](Op::Pool) in one launch, for short blocks:
    /// [`append_pool`](mod@crate::ops::append_pool).
    AppendPool,
    /// Mean query of a block, and what its row is to do: [`pool`](mod@crate::ops::pool).
    Pool,
    /// Products of a mean query and the cached one, to be added over devices: [`compare`](mod@crate::ops::compare).
    Compare,
    /// What a row is to do by these: [`decide`](mod@crate::ops::decide).
    Decide,
    /// Logits of the candidates: [`score`](mod@crate::ops::score).
    Score,
    /// The same, with keys that bulk copies bring: [`score_stream`](crate::ops::score_stream::kernel::score_stream).
    ScoreStream,
    /// First launch of [`score_blocks`](mod@crate::ops::score_blocks): statistics of many blocks of one sequence.
    ScoreBlocksStats,
    /// Second launch of [`score_blocks`](mod@crate::ops::score_blocks).
    ScoreBlocksFold,
    /// Last launch of [`score_blocks`](mod@crate::ops::score_blocks): votes.
    ScoreBlocksVote,
    /// Softmax of the logits, summed over the heads: [`vote`](mod@crate::ops::vote).
    Vote,
    /// The same, four heads at a time, for groups of a multiple of four.
    VoteByFour,
    /// Maximum of the votes over a window: [`smooth`](mod@crate::ops::smooth).
    Smooth,
    /// First launch of [`top_k`](mod@crate::ops::top_k), where `vote` has not counted.
    TopKCount,
    /// Second launch of [`top_k`](mod@crate::ops::top_k), before [`TopKChoose`](Op::TopKChoose).
    TopKRefine,
    /// Last launch of [`top_k`](mod@crate::ops::top_k).
    TopKChoose,
    /// The same in clusters, where the device has them; nothing is refined before.
    TopKChooseInCluster,
    /// Copies selected keys together, rotated: [`gather`](mod@crate::ops::gather).
    Gather,
    /// Attention of few query rows: [`attend_decode`](mod@crate::ops::attend_decode).
    AttendDecode,
    /// Attention of many query rows: [`attend_prefill`](mod@crate::ops::attend_prefill).
    AttendPrefill,
    /// The same, with products of warpgroups: [`attend_warpgroups`](mod@crate::ops::attend_warpgroups).
    AttendWarpgroups,
    /// Attention over all tokens, with keys that bulk copies bring: [`attend_stream`](mod@crate::ops::attend_stream).
    AttendStream,
    /// Merges the splits of [`AttendStream`](Op::AttendStream).
    AttendStreamMerge,
    /// Merges attention over parts of a sequence: [`merge`](mod@crate::ops::merge).
    Merge,
    /// Makes tables of a batch from an engine's on the device: [`translate`](mod@crate::ops::translate).
    Translate,
    /// None that a host calls for: kernels of tests and benchmarks, found by their names.
    Test,
}

impl Op {
    /// How it is ordered among launches that overlap.
    pub const fn ordering(self) -> Ordering {
        let nothing = Ordering {
            writes_pages: false,
            writes_tables: false,
            reads_constant_pages: false,
            begins_next_early: false,
        };
        match self {
            Op::Append | Op::AppendPool => Ordering { writes_pages: true, ..nothing },
            Op::Score | Op::AttendDecode | Op::Gather => Ordering { reads_constant_pages: true, ..nothing },
            Op::Pool | Op::ScoreStream => Ordering { begins_next_early: true, ..nothing },
            Op::Translate => Ordering { writes_tables: true, ..nothing },
            Op::Forget
            | Op::Compare
            | Op::Decide
            | Op::ScoreBlocksStats
            | Op::ScoreBlocksFold
            | Op::ScoreBlocksVote
            | Op::Vote
            | Op::VoteByFour
            | Op::Smooth
            | Op::TopKCount
            | Op::TopKRefine
            | Op::TopKChoose
            | Op::TopKChooseInCluster
            | Op::AttendPrefill
            | Op::AttendWarpgroups
            | Op::AttendStream
            | Op::AttendStreamMerge
            | Op::Merge
            | Op::Test => nothing,
        }
    }
}

/// What a kernel does that matters for launches that overlap: the rules are in [`overlap`](crate::common::overlap).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ordering {
    /// It writes pages of keys and values.
    pub writes_pages: bool,
    /// It writes tables of a batch: the next launch must not begin before it has ended.
    pub writes_tables: bool,
    /// It reads pages through the non-coherent path: it must not begin before a launch that writes what it reads has ended.
    pub reads_constant_pages: bool,
    /// It may let the next launch begin before it has waited for those before it.
    pub begins_next_early: bool,
}

/// The storage type of keys, values and queries: see [`Element`](crate::common::element::Element).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// `half::f16`.
    F16,
    /// `half::bf16`.
    Bf16,
}

impl ElementType {
    /// As in the names of entries.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::F16 => "f16",
            ElementType::Bf16 => "bf16",
        }
    }
}

/// How attention rotates keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Rotation {
    /// Not at all: the model has, before they entered the cache.
    Native = crate::common::rope::NATIVE,
    /// In pairs of one half of the head with the other, an even number.
    HalfSplit = crate::common::rope::HALF_SPLIT,
    /// In pairs of neighbours, an even number, over the head or a part of it.
    Interleaved = crate::common::rope::INTERLEAVED,
    /// In pairs of either kind, any number of them, over the head or a part of it. As fast as [`HalfSplit`](Self::HalfSplit) where
    /// these are half-split and a multiple of 8 (of 4 where the head dimension is no multiple of 64), slower elsewhere.
    AnyPairs = crate::common::rope::ANY_PAIRS,
}

/// The values that a kernel is compiled for; `None` for those that it does not depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Storage type of what it reads or writes.
    pub dtype: Option<ElementType>,
    /// Elements of a head.
    pub head_dim: Option<u32>,
    /// Heads of a group that it has room for, one of [`limits::COLUMNS`](crate::limits::COLUMNS).
    pub columns: Option<u32>,
    /// What it does to keys.
    pub rotation: Option<Rotation>,
}

impl Key {
    /// Of a kernel that depends on nothing.
    pub const NONE: Key = Key { dtype: None, head_dim: None, columns: None, rotation: None };

    /// Of a kernel that depends on the storage type.
    pub const fn of(dtype: ElementType) -> Key {
        Key { dtype: Some(dtype), ..Key::NONE }
    }

    /// The same, and on the head dimension.
    pub const fn with_head_dim(self, head_dim: u32) -> Key {
        Key { head_dim: Some(head_dim), ..self }
    }

    /// The same, and on the heads of a group.
    pub const fn with_columns(self, columns: u32) -> Key {
        Key { columns: Some(columns), ..self }
    }

    /// The same, and on what is done to keys.
    pub const fn with_rotation(self, rotation: Rotation) -> Key {
        Key { rotation: Some(rotation), ..self }
    }
}

/// One entry point.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What the kernel does.
    pub op: Op,
    /// What it is compiled for.
    pub key: Key,
    /// Name in the PTX, `<op>_<dtype>_d<head_dim>[_g<columns>]`.
    pub name: &'static str,
    /// Its place among all entries, below [`COUNT`].
    pub index: usize,
    /// Size of the parameter struct.
    pub param_bytes: usize,
    /// The kernel, for the emulator.
    ///
    /// # Safety
    /// - `params` points to the entry's parameter struct, aligned.
    /// - The kernel's own rules hold for them.
    #[cfg(feature = "emulator")]
    pub run: unsafe fn(params: *const u8),
}

impl Entry {
    /// The entry for an operation and exactly these values.
    ///
    /// # Errors
    /// [`Missing`] says which of the values has no entry, and which ones have.
    pub fn find(op: Op, key: Key) -> Result<&'static Entry, Missing> {
        ENTRIES.iter().find(|entry| entry.op == op && entry.key == key).ok_or(Missing { op, key })
    }

    /// The entry called `name`, kernels of tests among them: for tests and measurements, not for a step.
    pub fn named(name: &str) -> Option<&'static Entry> {
        #[cfg(feature = "conformance")]
        let of_tests = crate::conformance::entries::ENTRIES.iter();
        #[cfg(not(feature = "conformance"))]
        let of_tests = [].iter();
        ENTRIES.iter().chain(of_tests).find(|entry| entry.name == name)
    }

    /// The head dimensions that an operation has entries for with this storage type, each once, in the order of the table.
    pub fn head_dims(op: Op, dtype: ElementType) -> impl Iterator<Item = u32> {
        let of_op =
            move || ENTRIES.iter().filter(move |entry| entry.op == op && entry.key.dtype == Some(dtype));
        distinct(move || of_op().filter_map(|entry| entry.key.head_dim))
    }

    /// Whether an operation has entries for a head dimension, with some storage type.
    pub fn has_head_dim(op: Op, head_dim: u32) -> bool {
        ENTRIES.iter().any(|entry| entry.op == op && entry.key.head_dim == Some(head_dim))
    }

    /// Whether operations on this type, this head dimension and so many heads of a group (`columns`) may use the entry:
    /// none of its own values is another one. It may rotate keys or not: both may be wanted.
    pub fn serves(&self, dtype: ElementType, head_dim: u32, columns: Option<u32>) -> bool {
        let key = &self.key;
        self.op != Op::Test
            && key.dtype.is_none_or(|own| own == dtype)
            && key.head_dim.is_none_or(|own| own == head_dim)
            && key.columns.is_none_or(|own| Some(own) == columns)
    }
}

/// The values, each once.
fn distinct<I: Iterator<Item = u32>>(values: impl Fn() -> I) -> impl Iterator<Item = u32> {
    let all = values();
    all.enumerate()
        .filter(move |(i, value)| !values().take(*i).any(|earlier| earlier == *value))
        .map(|(_, it)| it)
}

/// There is no such entry: what was asked for, and what there is instead. Written as what an operation lacks, `bf16, head
/// dimension 80; there are 64, 96, 128, 256`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The operation.
    pub op: Op,
    /// The values asked for.
    pub key: Key,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { dtype, head_dim, columns, rotation } = self.key;
        let of_type =
            move || ENTRIES.iter().filter(move |entry| entry.op == self.op && entry.key.dtype == dtype);
        let of_head = move || of_type().filter(move |entry| entry.key.head_dim == head_dim);
        f.write_str(dtype.map_or("any type", ElementType::name))?;
        if let Some(head_dim) = head_dim {
            write!(f, ", head dimension {head_dim}")?;
            if of_head().next().is_none() {
                return there_are(f, distinct(move || of_type().filter_map(|entry| entry.key.head_dim)));
            }
        }
        if let Some(columns) = columns {
            write!(f, ", groups of up to {columns} heads")?;
            return there_are(f, distinct(move || of_head().filter_map(|entry| entry.key.columns)));
        }
        match rotation {
            Some(rotation) => write!(f, ", rotation {rotation:?}"),
            None => Ok(()),
        }
    }
}

/// `; there are 64, 96, 128`, or nothing.
fn there_are(f: &mut fmt::Formatter<'_>, values: impl Iterator<Item = u32>) -> fmt::Result {
    for (i, value) in values.enumerate() {
        write!(f, "{}{value}", if i == 0 { "; there are " } else { ", " })?;
    }
    Ok(())
}

impl core::error::Error for Missing {}
