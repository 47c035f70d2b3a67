//! The table of PTX entry points, one line per instance: name, parameters, kernel.
//!
//! Hosts look entries up here and nowhere else. Each takes its parameter struct by value, as its only argument.
//!
//! A host may launch them so that they overlap. Each waits for the launches before it
//! ([`grid::wait_for_previous`](crate::simt)) before it reads what a launch may have written, and before it writes or ends;
//! so when a kernel has waited, all launches before it have ended. The tables of a batch, and those of angles, are written by
//! copies alone, which end before launches after them begin: they may be read at once.
//!
//! [`score_stream`](crate::score::score_stream) and a `pool` behind `append` let the launch after them begin at once, the others when they
//! have waited: the one that follows these knows, when it begins, that all launches before them have ended.
//! [`pool`](mod@crate::pool), [`score_stream`](crate::score::score_stream),
//! [`attend_stream_merge`](crate::attend_stream::attend_stream_merge) and the last launch of [`top_k`](mod@crate::top_k), which
//! reads actions and cached selections ahead, make use of that.

use half::{bf16, f16};

use crate::append::AppendParams;
use crate::append_pool::AppendPoolParams;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use crate::attend_decode::{HALVES, NATIVE, NEIGHBOURS, attend_decode};
use crate::attention::AttendParams;
use crate::conformance::{
    AsyncCopyParams, AtomicsParams, BarriersParams, BulkCopyParams, ClusterParams, GlobalParams,
    IndicesParams, LastBlockParams, LdMatrixParams, MaskedParams, MathParams, MmaParams, SharedParams,
    ShufflesParams,
};
use crate::forget::ForgetParams;
use crate::gather::GatherParams;
use crate::merge::MergeParams;
use crate::pool::PoolParams;
use crate::read_all::ReadAllParams;
use crate::score::ScoreParams;
use crate::smooth::SmoothParams;
use crate::top_k::TopKParams;
use crate::vote::VoteParams;

/// One entry point.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Name in the PTX, `<op>_<dtype>_d<head_dim>[_g<group>]`.
    pub name: &'static str,
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
    /// The entry called `name`.
    pub fn find(name: &str) -> Option<&'static Entry> {
        ENTRIES.iter().find(|entry| entry.name == name)
    }

    /// Whether operations on this type, this head dimension and so many heads a KV head (`columns`, of
    /// [`score`](mod@crate::score)) may use the entry: whether no part of its name says otherwise.
    pub fn serves(&self, dtype: &str, head_dim: u32, columns: Option<u32>) -> bool {
        let differs = |part: &str, letter, value: Option<u32>| {
            part.strip_prefix(letter)
                .and_then(|digits| digits.parse().ok())
                .is_some_and(|it| Some(it) != value)
        };
        let mut parts = self.name.split('_');
        !matches!(parts.next(), Some("conformance" | "read"))
            && parts.all(|part| {
                let other_type = matches!(part, "f16" | "bf16") && part != dtype;
                !other_type && !differs(part, 'd', Some(head_dim)) && !differs(part, 'g', columns)
            })
    }
}

macro_rules! entries {
    ($($name:ident($params:ty) = $kernel:expr;)*) => {
        /// All entry points.
        pub const ENTRIES: &[Entry] = &[$(Entry {
            name: stringify!($name),
            param_bytes: size_of::<$params>(),
            #[cfg(feature = "emulator")]
            run: |params| {
                let kernel: unsafe fn($params) = $kernel;
                // SAFETY: the rules of `Entry::run`.
                unsafe { kernel(params.cast::<$params>().read()) }
            },
        }),*];

        #[cfg(target_arch = "nvptx64")]
        mod ptx {
            use super::*;
            $(
                #[unsafe(no_mangle)]
                unsafe extern "ptx-kernel" fn $name(params: $params) {
                    $kernel(params)
                }
            )*
        }
    };
}

entries! {
    append(AppendParams) = crate::append::append;
    forget(ForgetParams) = crate::forget::forget;
    append_pool_f16(AppendPoolParams<f16>) = crate::append_pool::append_pool::<f16>;
    append_pool_bf16(AppendPoolParams<bf16>) = crate::append_pool::append_pool::<bf16>;
    pool_f16(PoolParams<f16>) = crate::pool::pool::<f16>;
    pool_bf16(PoolParams<bf16>) = crate::pool::pool::<bf16>;
    score_f16_d64_g4(ScoreParams<f16>) = crate::score::score::<f16, 2, 1, 2, true>;
    score_f16_d64_g8(ScoreParams<f16>) = crate::score::score::<f16, 2, 1, 2, false>;
    score_f16_d64_g16(ScoreParams<f16>) = crate::score::score::<f16, 2, 2, 1, false>;
    score_f16_d96_g4(ScoreParams<f16>) = crate::score::score::<f16, 3, 1, 1, true>;
    score_f16_d96_g8(ScoreParams<f16>) = crate::score::score::<f16, 3, 1, 1, false>;
    score_f16_d96_g16(ScoreParams<f16>) = crate::score::score::<f16, 3, 2, 1, false>;
    score_f16_d128_g4(ScoreParams<f16>) = crate::score::score::<f16, 4, 1, 2, true>;
    score_f16_d128_g8(ScoreParams<f16>) = crate::score::score::<f16, 4, 1, 1, false>;
    score_f16_d128_g16(ScoreParams<f16>) = crate::score::score::<f16, 4, 2, 1, false>;
    score_f16_d256_g4(ScoreParams<f16>) = crate::score::score::<f16, 8, 1, 1, true>;
    score_f16_d256_g8(ScoreParams<f16>) = crate::score::score::<f16, 8, 1, 1, false>;
    score_bf16_d64_g4(ScoreParams<bf16>) = crate::score::score::<bf16, 2, 1, 2, true>;
    score_bf16_d64_g8(ScoreParams<bf16>) = crate::score::score::<bf16, 2, 1, 2, false>;
    score_bf16_d64_g16(ScoreParams<bf16>) = crate::score::score::<bf16, 2, 2, 1, false>;
    score_bf16_d96_g4(ScoreParams<bf16>) = crate::score::score::<bf16, 3, 1, 1, true>;
    score_bf16_d96_g8(ScoreParams<bf16>) = crate::score::score::<bf16, 3, 1, 1, false>;
    score_bf16_d96_g16(ScoreParams<bf16>) = crate::score::score::<bf16, 3, 2, 1, false>;
    score_bf16_d128_g4(ScoreParams<bf16>) = crate::score::score::<bf16, 4, 1, 2, true>;
    score_bf16_d128_g8(ScoreParams<bf16>) = crate::score::score::<bf16, 4, 1, 1, false>;
    score_bf16_d128_g16(ScoreParams<bf16>) = crate::score::score::<bf16, 4, 2, 1, false>;
    score_bf16_d256_g4(ScoreParams<bf16>) = crate::score::score::<bf16, 8, 1, 1, true>;
    score_bf16_d256_g8(ScoreParams<bf16>) = crate::score::score::<bf16, 8, 1, 1, false>;
    score_stream_f16_d64_g4(ScoreParams<f16>) = crate::score::score_stream::<f16, 2, 1, true>;
    score_stream_f16_d64_g8(ScoreParams<f16>) = crate::score::score_stream::<f16, 2, 1, false>;
    score_stream_f16_d64_g16(ScoreParams<f16>) = crate::score::score_stream::<f16, 2, 2, false>;
    score_stream_f16_d96_g4(ScoreParams<f16>) = crate::score::score_stream::<f16, 3, 1, true>;
    score_stream_f16_d96_g8(ScoreParams<f16>) = crate::score::score_stream::<f16, 3, 1, false>;
    score_stream_f16_d96_g16(ScoreParams<f16>) = crate::score::score_stream::<f16, 3, 2, false>;
    score_stream_f16_d128_g4(ScoreParams<f16>) = crate::score::score_stream::<f16, 4, 1, true>;
    score_stream_f16_d128_g8(ScoreParams<f16>) = crate::score::score_stream::<f16, 4, 1, false>;
    score_stream_f16_d128_g16(ScoreParams<f16>) = crate::score::score_stream::<f16, 4, 2, false>;
    score_stream_f16_d256_g4(ScoreParams<f16>) = crate::score::score_stream::<f16, 8, 1, true>;
    score_stream_f16_d256_g8(ScoreParams<f16>) = crate::score::score_stream::<f16, 8, 1, false>;
    score_stream_bf16_d64_g4(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 2, 1, true>;
    score_stream_bf16_d64_g8(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 2, 1, false>;
    score_stream_bf16_d64_g16(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 2, 2, false>;
    score_stream_bf16_d96_g4(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 3, 1, true>;
    score_stream_bf16_d96_g8(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 3, 1, false>;
    score_stream_bf16_d96_g16(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 3, 2, false>;
    score_stream_bf16_d128_g4(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 4, 1, true>;
    score_stream_bf16_d128_g8(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 4, 1, false>;
    score_stream_bf16_d128_g16(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 4, 2, false>;
    score_stream_bf16_d256_g4(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 8, 1, true>;
    score_stream_bf16_d256_g8(ScoreParams<bf16>) = crate::score::score_stream::<bf16, 8, 1, false>;
    vote(VoteParams) = crate::vote::vote::<1>;
    vote_by_four(VoteParams) = crate::vote::vote::<4>;
    smooth(SmoothParams) = crate::smooth::smooth;
    top_k_count(TopKParams) = crate::top_k::count;
    top_k_refine(TopKParams) = crate::top_k::refine;
    top_k_choose(TopKParams) = crate::top_k::choose;
    top_k_choose_in_cluster(TopKParams) = crate::top_k::choose_in_cluster;
    gather_f16(GatherParams<f16>) = crate::gather::gather::<f16>;
    attend_decode_f16_d64(AttendParams<f16>) = attend_decode::<f16, 4, 2, 1, NATIVE>;
    attend_decode_f16_d64_halves(AttendParams<f16>) = attend_decode::<f16, 4, 2, 1, HALVES>;
    attend_decode_f16_d64_neighbours(AttendParams<f16>) = attend_decode::<f16, 4, 2, 1, NEIGHBOURS>;
    attend_decode_f16_d96(AttendParams<f16>) = attend_decode::<f16, 2, 6, 3, NATIVE>;
    attend_decode_f16_d96_halves(AttendParams<f16>) = attend_decode::<f16, 2, 6, 3, HALVES>;
    attend_decode_f16_d96_neighbours(AttendParams<f16>) = attend_decode::<f16, 2, 6, 3, NEIGHBOURS>;
    attend_decode_f16_d128(AttendParams<f16>) = attend_decode::<f16, 4, 4, 2, NATIVE>;
    attend_decode_f16_d128_halves(AttendParams<f16>) = attend_decode::<f16, 4, 4, 2, HALVES>;
    attend_decode_f16_d128_neighbours(AttendParams<f16>) = attend_decode::<f16, 4, 4, 2, NEIGHBOURS>;
    attend_decode_bf16_d64(AttendParams<bf16>) = attend_decode::<bf16, 4, 2, 1, NATIVE>;
    attend_decode_bf16_d64_halves(AttendParams<bf16>) = attend_decode::<bf16, 4, 2, 1, HALVES>;
    attend_decode_bf16_d64_neighbours(AttendParams<bf16>) = attend_decode::<bf16, 4, 2, 1, NEIGHBOURS>;
    attend_decode_bf16_d96(AttendParams<bf16>) = attend_decode::<bf16, 2, 6, 3, NATIVE>;
    attend_decode_bf16_d96_halves(AttendParams<bf16>) = attend_decode::<bf16, 2, 6, 3, HALVES>;
    attend_decode_bf16_d96_neighbours(AttendParams<bf16>) = attend_decode::<bf16, 2, 6, 3, NEIGHBOURS>;
    attend_decode_bf16_d128(AttendParams<bf16>) = attend_decode::<bf16, 4, 4, 2, NATIVE>;
    attend_decode_bf16_d128_halves(AttendParams<bf16>) = attend_decode::<bf16, 4, 4, 2, HALVES>;
    attend_decode_bf16_d128_neighbours(AttendParams<bf16>) = attend_decode::<bf16, 4, 4, 2, NEIGHBOURS>;
    attend_prefill_f16_d64(AttendParams<f16>) = crate::attend_prefill::attend_prefill::<f16, 4, 8>;
    attend_prefill_f16_d96(AttendParams<f16>) = crate::attend_prefill::attend_prefill::<f16, 6, 12>;
    attend_prefill_f16_d128(AttendParams<f16>) = crate::attend_prefill::attend_prefill::<f16, 8, 16>;
    attend_stream_f16_d64(AttendParams<f16>) = crate::attend_stream::attend_stream::<f16, 4, 2, 1>;
    attend_stream_f16_d96(AttendParams<f16>) = crate::attend_stream::attend_stream::<f16, 2, 6, 3>;
    attend_stream_f16_d128(AttendParams<f16>) = crate::attend_stream::attend_stream::<f16, 4, 4, 2>;
    attend_stream_bf16_d64(AttendParams<bf16>) = crate::attend_stream::attend_stream::<bf16, 4, 2, 1>;
    attend_stream_bf16_d96(AttendParams<bf16>) = crate::attend_stream::attend_stream::<bf16, 2, 6, 3>;
    attend_stream_bf16_d128(AttendParams<bf16>) = crate::attend_stream::attend_stream::<bf16, 4, 4, 2>;
    attend_stream_merge_f16(AttendParams<f16>) = crate::attend_stream::attend_stream_merge::<f16>;
    attend_stream_merge_bf16(AttendParams<bf16>) = crate::attend_stream::attend_stream_merge::<bf16>;
    merge_f16(MergeParams<f16>) = crate::merge::merge::<f16>;
    gather_bf16(GatherParams<bf16>) = crate::gather::gather::<bf16>;
    attend_prefill_bf16_d64(AttendParams<bf16>) = crate::attend_prefill::attend_prefill::<bf16, 4, 8>;
    attend_prefill_bf16_d96(AttendParams<bf16>) = crate::attend_prefill::attend_prefill::<bf16, 6, 12>;
    attend_prefill_bf16_d128(AttendParams<bf16>) = crate::attend_prefill::attend_prefill::<bf16, 8, 16>;
    merge_bf16(MergeParams<bf16>) = crate::merge::merge::<bf16>;
    read_all(ReadAllParams) = crate::read_all::read_all;
    conformance_indices(IndicesParams) = crate::conformance::indices;
    conformance_shuffles(ShufflesParams) = crate::conformance::shuffles;
    conformance_masked(MaskedParams) = crate::conformance::masked;
    conformance_barriers(BarriersParams) = crate::conformance::barriers;
    conformance_shared(SharedParams) = crate::conformance::shared;
    conformance_global(GlobalParams) = crate::conformance::global;
    conformance_atomics(AtomicsParams) = crate::conformance::atomics;
    conformance_last_block(LastBlockParams) = crate::conformance::last_block;
    conformance_async_copy(AsyncCopyParams) = crate::conformance::async_copy;
    conformance_bulk_copy(BulkCopyParams) = crate::conformance::bulk_copy;
    conformance_cluster(ClusterParams) = crate::conformance::cluster;
    conformance_ldmatrix(LdMatrixParams) = crate::conformance::ldmatrix;
    conformance_mma_f16(MmaParams) = crate::conformance::mma::<half::f16>;
    conformance_mma_bf16(MmaParams) = crate::conformance::mma::<half::bf16>;
    conformance_math(MathParams) = crate::conformance::math;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_serves_what_its_name_says() {
        let serves = |name: &str, columns| Entry::find(name).expect("an entry").serves("bf16", 128, columns);
        for name in ["append", "forget", "top_k_choose", "gather_bf16", "score_stream_bf16_d128_g4"] {
            assert!(serves(name, Some(4)), "{name}");
        }
        for name in
            ["gather_f16", "score_bf16_d64_g4", "score_bf16_d128_g8", "conformance_mma_bf16", "read_all"]
        {
            assert!(!serves(name, Some(4)), "{name}");
        }
        assert!(!serves("score_bf16_d128_g16", None) && serves("attend_prefill_bf16_d128", None));
    }
}
