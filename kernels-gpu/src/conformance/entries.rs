//! The table of kernels that only tests and benchmarks launch. They have a PTX file of their own, and are found by name.

use super::*;
use crate::entries::{self, ElementType, Entry, Key, List, Op, entries};
use crate::ops::read_all::ReadAllParams;

entries! {
    from entries::ENTRIES.len(), on a GPU if feature = "conformance";

    Test: conformance_indices(IndicesParams) = indices;
    Test: conformance_shuffles(ShufflesParams) = shuffles;
    Test: conformance_masked(MaskedParams) = masked;
    Test: conformance_barriers(BarriersParams) = barriers;
    Test: conformance_shared(SharedParams) = shared;
    Test: conformance_global(GlobalParams) = global;
    Test: conformance_atomics(AtomicsParams) = atomics;
    Test: conformance_last_block(LastBlockParams) = last_block;
    Test: conformance_async_copy(AsyncCopyParams) = async_copy;
    Test: conformance_bulk_copy(BulkCopyParams) = bulk_copy;
    Test: conformance_cluster(ClusterParams) = cluster;
    Test: conformance_ldmatrix(LdMatrixParams) = ldmatrix;
    Test: conformance_mma(MmaParams) = mma::<T>, for T;
    Test: conformance_warpgroup_layouts(WarpgroupLayoutsParams) = warpgroup_layouts::<T>, for T;
    Test: conformance_warpgroup_mma(WarpgroupMmaParams) = warpgroup_mma::<T>, for T;
    Test: conformance_math(MathParams) = math;
    Test: read_all(ReadAllParams) = crate::ops::read_all::kernel::read_all;
}
