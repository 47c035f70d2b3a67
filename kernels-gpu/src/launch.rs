//! Launch dimensions and the checks that every launch passes, on a GPU and in the emulator alike.

use core::fmt;

use crate::limits::{MAX_CLUSTER, SHARED_BYTES_SM_80, SHARED_BYTES_SM_86, SHARED_BYTES_SM_90};

/// Blocks, threads of a block and bytes of dynamic shared memory of one launch. Computed beside each kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Blocks along each axis.
    pub grid: [u32; 3],
    /// Threads of a block along each axis; their product is a multiple of 32.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks of a cluster, adjacent along the first axis; 1 for none. See [`cluster`](crate::simt::cluster).
    pub cluster: u32,
}

/// What a device can launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Blocks along each axis.
    pub grid: [u32; 3],
    /// Threads of a block along each axis.
    pub block: [u32; 3],
    /// Threads of a block in all.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes, once the kernel has been allowed its maximum.
    pub shared_bytes: u32,
    /// Blocks of a cluster; 1: the device has no clusters.
    pub cluster: u32,
}

impl Limits {
    /// Compute capability 8.0 (A100).
    pub const SM_80: Limits = Limits {
        grid: [i32::MAX as u32, 65535, 65535],
        block: [1024, 1024, 64],
        threads: 1024,
        shared_bytes: SHARED_BYTES_SM_80,
        cluster: 1,
    };
    /// Compute capability 8.6 and 8.9, which have the least shared memory.
    pub const SM_86: Limits = Limits { shared_bytes: SHARED_BYTES_SM_86, ..Limits::SM_80 };
    /// Compute capability 9.0 (H100, H200). Clusters of more than 8 blocks need the kernel's consent, and a device that
    /// has so many SMs side by side.
    pub const SM_90: Limits =
        Limits { shared_bytes: SHARED_BYTES_SM_90, cluster: MAX_CLUSTER, ..Limits::SM_80 };
}

/// What launch shapes depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// What the device can launch.
    pub limits: Limits,
    /// Whether it has bulk copies to shared memory, and its PTX uses them.
    pub bulk_copies: bool,
    /// Bytes of keys, of all rows of a batch, from which on [`score`](mod@crate::ops::score) streams them by such copies.
    pub score_stream_bytes: u64,
}

/// Why a launch cannot be: the kernel, the rule and both numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchError<'a> {
    /// Name of the kernel.
    pub kernel: &'a str,
    /// The rule that was broken.
    pub fault: DimsFault,
}

/// A rule of launch dimensions that was broken, with both numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DimsFault {
    /// The grid has no block along `axis`.
    EmptyGrid {
        /// 0, 1 or 2.
        axis: usize,
    },
    /// More blocks along `axis` than the device launches.
    GridTooLarge {
        /// 0, 1 or 2.
        axis: usize,
        /// Blocks asked for.
        asked: u32,
        /// Blocks the device allows.
        limit: u32,
    },
    /// No threads, or more along `axis` than the device launches.
    BlockTooLarge {
        /// 0, 1 or 2.
        axis: usize,
        /// Threads asked for.
        asked: u32,
        /// Threads the device allows.
        limit: u32,
    },
    /// More threads in a block than the device launches.
    TooManyThreads {
        /// Threads asked for.
        asked: u64,
        /// Threads the device allows.
        limit: u32,
    },
    /// The threads of a block are no whole number of warps: kernels here use full-warp collectives everywhere.
    PartialWarp {
        /// Threads asked for.
        threads: u64,
    },
    /// No cluster, or one of more blocks than the device has.
    ClusterTooLarge {
        /// Blocks asked for.
        asked: u32,
        /// Blocks the device allows.
        limit: u32,
    },
    /// The blocks along the first axis are no whole number of clusters.
    PartialCluster {
        /// Blocks along the first axis.
        blocks: u32,
        /// Blocks of a cluster.
        cluster: u32,
    },
    /// More dynamic shared memory than the device gives a block.
    SharedMemory {
        /// Bytes asked for.
        asked: u32,
        /// Bytes the device allows.
        limit: u32,
    },
}

impl Dims {
    /// A one-dimensional launch.
    pub const fn linear(blocks: u32, threads: u32, shared_bytes: u32) -> Dims {
        Dims { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes, cluster: 1 }
    }

    /// Blocks of the grid.
    pub const fn num_blocks(&self) -> u64 {
        self.grid[0] as u64 * self.grid[1] as u64 * self.grid[2] as u64
    }

    /// Threads of a block.
    pub const fn num_threads(&self) -> u64 {
        self.block[0] as u64 * self.block[1] as u64 * self.block[2] as u64
    }

    /// Whether a device of these `limits` can launch `kernel` so.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check<'a>(&self, kernel: &'a str, limits: &Limits) -> Result<(), LaunchError<'a>> {
        let fail = |fault| Err(LaunchError { kernel, fault });
        for axis in 0..3 {
            let (asked, limit) = (self.grid[axis], limits.grid[axis]);
            if asked == 0 {
                return fail(DimsFault::EmptyGrid { axis });
            }
            if asked > limit {
                return fail(DimsFault::GridTooLarge { axis, asked, limit });
            }
        }
        for axis in 0..3 {
            let (asked, limit) = (self.block[axis], limits.block[axis]);
            if asked == 0 || asked > limit {
                return fail(DimsFault::BlockTooLarge { axis, asked, limit });
            }
        }
        let threads = self.num_threads();
        if threads > limits.threads as u64 {
            return fail(DimsFault::TooManyThreads { asked: threads, limit: limits.threads });
        }
        if !threads.is_multiple_of(32) {
            return fail(DimsFault::PartialWarp { threads });
        }
        if self.cluster == 0 || self.cluster > limits.cluster {
            return fail(DimsFault::ClusterTooLarge { asked: self.cluster, limit: limits.cluster });
        }
        if !self.grid[0].is_multiple_of(self.cluster) {
            return fail(DimsFault::PartialCluster { blocks: self.grid[0], cluster: self.cluster });
        }
        if self.shared_bytes > limits.shared_bytes {
            return fail(DimsFault::SharedMemory { asked: self.shared_bytes, limit: limits.shared_bytes });
        }
        Ok(())
    }
}

impl fmt::Display for LaunchError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel `{}`: {}", self.kernel, self.fault)
    }
}

impl fmt::Display for DimsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axis = |axis: usize| ["x", "y", "z"][axis];
        match *self {
            DimsFault::EmptyGrid { axis: a } => {
                write!(f, "the grid has no block along {}", axis(a))
            }
            DimsFault::GridTooLarge { axis: a, asked, limit } => {
                write!(f, "{asked} blocks along {}, the device launches {limit}", axis(a))
            }
            DimsFault::BlockTooLarge { axis: a, asked, limit } => {
                write!(f, "{asked} threads along {}, the device launches 1 to {limit}", axis(a))
            }
            DimsFault::TooManyThreads { asked, limit } => {
                write!(f, "{asked} threads a block, the device launches {limit}")
            }
            DimsFault::PartialWarp { threads } => {
                write!(f, "{threads} threads a block are no multiple of the 32 of a warp")
            }
            DimsFault::ClusterTooLarge { asked, limit } => {
                write!(f, "{asked} blocks a cluster, the device has 1 to {limit}")
            }
            DimsFault::PartialCluster { blocks, cluster } => {
                write!(f, "{blocks} blocks along x are no multiple of the {cluster} of a cluster")
            }
            DimsFault::SharedMemory { asked, limit } => {
                write!(f, "{asked} bytes of shared memory a block, the device has {limit}")
            }
        }
    }
}

impl core::error::Error for LaunchError<'_> {}
