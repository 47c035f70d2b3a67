//! The table.

use super::{ElementType, Entry, Key, Op, Rotation};
use crate::limits::{COLUMNS as ALL_COLUMNS, FRAGMENT_COLUMNS, TILE_TOKENS};
use crate::ops::append::AppendParams;
use crate::ops::append_pool::AppendPoolParams;
use crate::ops::attend::AttendParams;
use crate::ops::compare::CompareParams;
use crate::ops::decide::DecideParams;
use crate::ops::forget::ForgetParams;
use crate::ops::gather::GatherParams;
use crate::ops::merge::MergeParams;
use crate::ops::pool::PoolParams;
use crate::ops::score::{ScoreParams, tile_tokens};
use crate::ops::score_blocks::ScoreBlocksParams;
use crate::ops::smooth::SmoothParams;
use crate::ops::top_k::TopKParams;
use crate::ops::translate::TranslateParams;
use crate::ops::vote::VoteParams;
#[cfg(feature = "kernels")]
use {
    crate::ops::attend_decode::kernel::attend_decode,
    crate::ops::attend_prefill::{kernel::attend_prefill, tile_fragments as prefill_fragments},
    crate::ops::attend_stream::kernel::{attend_stream, attend_stream_merge},
    crate::ops::attend_warpgroups::{kernel::attend_warpgroups, tile_fragments as warpgroups_fragments},
    crate::ops::score::kernel::score,
    crate::ops::score_stream::kernel::score_stream,
    crate::ops::{
        append, append_pool, compare, decide, forget, gather, merge, pool, score_blocks, smooth, top_k,
        translate, vote,
    },
};

/// Writes a table of entries as `static ENTRIES`, and for a GPU the kernels themselves, if the condition holds.
///
/// A line is an operation, the name that its entries begin with, their parameters, and the kernel, with a `;` at its end.
/// `for T` makes an instance for each storage type, `T` in parameters and kernel. Braces behind it hold a line for each
/// head dimension, which the kernel sees as `HEAD_DIM`:
///
/// - `64;` is one instance;
/// - `64 columns 4 8;` is one for each number of heads in a group, which the kernel sees as `COLUMNS`;
/// - `64 rotations;` is one for each [`Rotation`], which the kernel sees as `ROTATION`.
macro_rules! entries {
    (from $first:expr, on a GPU if $condition:meta;
     $($op:ident: $name:ident($params:ty) = $kernel:expr $(, for $T:ident $({ $($head_dims:tt)* })?)?;)*) => {
        const LIST: List = {
            let mut list = List::new($first);
            $(entries!(@op list [$condition, $op, $name, $params, $kernel] $($T $({ $($head_dims)* })?)?);)*
            list
        };

        /// The entries of the table.
        pub static ENTRIES: [Entry; LIST.len] = LIST.entries();
    };

    (@op $list:ident $line:tt) => { entries!(@one $list $line, Key::NONE, {}) };
    (@op $list:ident $line:tt T) => {
        entries!(@type $list $line, F16, f16);
        entries!(@type $list $line, Bf16, bf16);
    };
    (@op $list:ident $line:tt T $head_dims:tt) => {
        entries!(@head_dims $list $line, F16, f16 $head_dims);
        entries!(@head_dims $list $line, Bf16, bf16 $head_dims);
    };

    (@type $list:ident $line:tt, $dtype:ident, $type:ident) => {
        entries!(@one $list $line, Key::of(ElementType::$dtype), { type T = half::$type; } "_", stringify!($type))
    };

    (@head_dims $list:ident $line:tt, $dtype:ident, $type:ident {
        $($head_dim:literal $($over:ident $($columns:literal)*)?;)*
    }) => {
        $(entries!(@head_dim $list $line, $dtype, $type, $head_dim $($over $($columns)*)?);)*
    };
    (@head_dim $list:ident $line:tt, $dtype:ident, $type:ident, $head_dim:literal) => {
        entries!(
            @one $list $line, Key::of(ElementType::$dtype).with_head_dim($head_dim),
            { type T = half::$type; const HEAD_DIM: u32 = $head_dim; }
            "_", stringify!($type), "_d", $head_dim
        )
    };
    (@head_dim $list:ident $line:tt, $dtype:ident, $type:ident, $head_dim:literal columns $($columns:literal)*) => {
        $(entries!(
            @one $list $line, Key::of(ElementType::$dtype).with_head_dim($head_dim).with_columns($columns),
            { type T = half::$type; const HEAD_DIM: u32 = $head_dim; const COLUMNS: u32 = $columns; }
            "_", stringify!($type), "_d", $head_dim, "_g", $columns
        );)*
    };
    (@head_dim $list:ident $line:tt, $dtype:ident, $type:ident, $head_dim:literal rotations) => {
        entries!(@rotation $list $line, $dtype, $type, $head_dim, Native, "");
        entries!(@rotation $list $line, $dtype, $type, $head_dim, HalfSplit, "_half_split");
        entries!(@rotation $list $line, $dtype, $type, $head_dim, Interleaved, "_interleaved");
        entries!(@rotation $list $line, $dtype, $type, $head_dim, AnyPairs, "_any_pairs");
    };
    (@rotation $list:ident $line:tt, $dtype:ident, $type:ident, $head_dim:literal, $rotation:ident, $suffix:literal) => {
        entries!(
            @one $list $line, Key::of(ElementType::$dtype).with_head_dim($head_dim).with_rotation(Rotation::$rotation),
            { type T = half::$type; const HEAD_DIM: u32 = $head_dim; const ROTATION: u32 = Rotation::$rotation as u32; }
            "_", stringify!($type), "_d", $head_dim, $suffix
        )
    };

    (@one $list:ident [$condition:meta, $op:ident, $name:ident, $params:ty, $kernel:expr], $key:expr,
     { $($values:item)* } $($suffix:expr),*) => {
        $list.push({
            $(#[allow(dead_code)] $values)*

            #[cfg(all(target_arch = "nvptx64", $condition))]
            #[unsafe(export_name = concat!(stringify!($name) $(, $suffix)*))]
            unsafe extern "ptx-kernel" fn kernel(params: $params) {
                $kernel(params)
            }

            Entry {
                op: Op::$op,
                key: $key,
                name: concat!(stringify!($name) $(, $suffix)*),
                index: 0,
                param_bytes: size_of::<$params>(),
                #[cfg(feature = "emulator")]
                run: |params| {
                    let kernel: unsafe fn($params) = $kernel;
                    // SAFETY: the rules of `Entry::run`.
                    unsafe { kernel(params.cast::<$params>().read()) }
                },
            }
        })
    };
}
#[cfg(feature = "conformance")]
pub(crate) use entries;

/// Entries while they are collected, which constants cannot do in a vector.
pub(crate) struct List {
    entries: [Option<Entry>; 256],
    pub(crate) len: usize,
    /// Index of the first.
    first: usize,
}

impl List {
    pub(crate) const fn new(first: usize) -> List {
        List { entries: [None; 256], len: 0, first }
    }

    pub(crate) const fn push(&mut self, entry: Entry) {
        if let Some(columns) = entry.key.columns {
            assert!(is_one_of(columns, &ALL_COLUMNS), "columns that no group asks for");
        }
        self.entries[self.len] = Some(Entry { index: self.first + self.len, ..entry });
        self.len += 1;
    }

    /// As an array of their number.
    pub(crate) const fn entries<const N: usize>(&self) -> [Entry; N] {
        assert!(N == self.len);
        let mut all = [self.entry(0); N];
        let mut i = 0;
        while i < N {
            all[i] = self.entry(i);
            i += 1;
        }
        all
    }

    const fn entry(&self, i: usize) -> Entry {
        match self.entries[i] {
            Some(entry) => entry,
            None => panic!("beyond the end"),
        }
    }
}

const fn is_one_of(value: u32, values: &[u32]) -> bool {
    let mut i = 0;
    while i < values.len() {
        if values[i] == value {
            return true;
        }
        i += 1;
    }
    false
}

/// Pieces of `size` elements that a head has, a whole number.
const fn pieces(head_dim: u32, size: u32) -> usize {
    assert!(head_dim.is_multiple_of(size), "a head dimension that the kernel cannot cut into its pieces");
    (head_dim / size) as usize
}

/// Matrix fragments that hold so many columns.
const fn fragments(columns: u32) -> usize {
    columns.div_ceil(FRAGMENT_COLUMNS) as usize
}

/// Rows of matrix fragments in a tile of [`score`].
const fn rows_of_fragments(head_dim: u32, columns: u32) -> usize {
    (tile_tokens(head_dim, columns) / TILE_TOKENS) as usize
}

/// Words of a key or value that a lane of [`attend_decode`] and [`attend_stream`] loads at a time: 16 bytes, or 8 where a
/// head is no whole number of those.
const fn words(head_dim: u32) -> usize {
    if head_dim.is_multiple_of(64) { 4 } else { 2 }
}

/// Such loads that four lanes need for a key.
const fn key_loads(head_dim: u32) -> usize {
    pieces(head_dim, 8 * words(head_dim) as u32)
}

/// Such loads that eight lanes need for a value.
const fn value_loads(head_dim: u32) -> usize {
    pieces(head_dim, 16 * words(head_dim) as u32)
}

entries! {
    from 0, on a GPU if not(feature = "conformance");

    Append: append(AppendParams) = append::kernel::append;
    Forget: forget(ForgetParams) = forget::kernel::forget;
    AppendPool: append_pool(AppendPoolParams<T>) = append_pool::kernel::append_pool::<T>, for T;
    Pool: pool(PoolParams<T>) = pool::kernel::pool::<T>, for T;
    Compare: compare(CompareParams) = compare::kernel::compare;
    Decide: decide(DecideParams) = decide::kernel::decide;
    Score: score(ScoreParams<T>) = score::<
        T,
        { pieces(HEAD_DIM, 32) },
        { fragments(COLUMNS) },
        { rows_of_fragments(HEAD_DIM, COLUMNS) },
        { COLUMNS == 4 },
    >, for T {
        64 columns 4 8 16;
        96 columns 4 8 16;
        128 columns 4 8 16;
        256 columns 4 8;
    };
    ScoreStream: score_stream(ScoreParams<T>) = score_stream::<
        T,
        { pieces(HEAD_DIM, 32) },
        { fragments(COLUMNS) },
        { COLUMNS == 4 },
    >, for T {
        64 columns 4 8 16;
        96 columns 4 8 16;
        128 columns 4 8 16;
        256 columns 4 8;
    };
    ScoreBlocksStats: score_blocks_stats(ScoreBlocksParams<T>) = score_blocks::kernel::stats::<
        T,
        { pieces(HEAD_DIM, 32) },
        { COLUMNS as usize },
    >, for T {
        64 columns 4 8 16;
        96 columns 4 8 16;
        128 columns 4 8 16;
        256 columns 4 8 16;
    };
    ScoreBlocksFold: score_blocks_fold(ScoreBlocksParams<T>) = score_blocks::kernel::fold::<T>, for T;
    ScoreBlocksVote: score_blocks_vote(ScoreBlocksParams<T>) = score_blocks::kernel::vote::<
        T,
        { pieces(HEAD_DIM, 32) },
        { COLUMNS as usize },
    >, for T {
        64 columns 4 8 16;
        96 columns 4 8 16;
        128 columns 4 8 16;
        256 columns 4 8 16;
    };
    Vote: vote(VoteParams) = vote::kernel::vote::<1>;
    VoteByFour: vote_by_four(VoteParams) = vote::kernel::vote::<4>;
    Smooth: smooth(SmoothParams) = smooth::kernel::smooth;
    TopKCount: top_k_count(TopKParams) = top_k::kernel::count;
    TopKRefine: top_k_refine(TopKParams) = top_k::kernel::refine;
    TopKChoose: top_k_choose(TopKParams) = top_k::kernel::choose;
    TopKChooseInCluster: top_k_choose_in_cluster(TopKParams) = top_k::kernel::choose_in_cluster;
    Gather: gather(GatherParams<T>) = gather::kernel::gather::<T>, for T;
    AttendDecode: attend_decode(AttendParams<T>) = attend_decode::<
        T,
        { words(HEAD_DIM) },
        { key_loads(HEAD_DIM) },
        { value_loads(HEAD_DIM) },
        ROTATION,
    >, for T {
        64 rotations;
        96 rotations;
        128 rotations;
        256 rotations;
    };
    AttendPrefill: attend_prefill(AttendParams<T>) = attend_prefill::<
        T,
        { pieces(HEAD_DIM, 16) },
        { pieces(HEAD_DIM, 8) },
        { prefill_fragments(HEAD_DIM) },
    >, for T {
        64;
        96;
        128;
        256;
    };
    AttendWarpgroups: attend_warpgroups(AttendParams<T>) = attend_warpgroups::<
        T,
        { pieces(HEAD_DIM, 16) },
        { pieces(HEAD_DIM, 8) },
        { warpgroups_fragments(HEAD_DIM) },
    >, for T {
        64;
        96;
        128;
        256;
    };
    AttendStream: attend_stream(AttendParams<T>) = attend_stream::<
        T,
        { words(HEAD_DIM) },
        { key_loads(HEAD_DIM) },
        { value_loads(HEAD_DIM) },
    >, for T {
        64;
        96;
        128;
        256;
    };
    AttendStreamMerge: attend_stream_merge(AttendParams<T>) = attend_stream_merge::<T>, for T;
    Merge: merge(MergeParams<T>) = merge::kernel::merge::<T>, for T;
    Translate: translate(TranslateParams) = translate::kernel::translate;
}

/// Entries of this table and, with the feature `conformance`, of the one for tests: all have an [`index`](Entry::index)
/// below.
#[cfg(not(feature = "conformance"))]
pub const COUNT: usize = ENTRIES.len();
/// Entries of this table and of the one for tests: all have an [`index`](Entry::index) below.
#[cfg(feature = "conformance")]
pub const COUNT: usize = ENTRIES.len() + crate::conformance::entries::ENTRIES.len();
