//! Sizes that a tile or a device gives to every kernel, each in one place.
//!
//! Head dimensions are no constants: a kernel serves those that have a line in [`entries`](crate::entries).

/// Rows of a matrix fragment, so tokens of a tile: `mma.m16n8k16` multiplies 16 rows at a time.
pub const TILE_TOKENS: u32 = 16;

/// Columns of a matrix fragment: query heads that one `mma.m16n8k16` multiplies with.
pub const FRAGMENT_COLUMNS: u32 = 8;

/// Heads of a group that scoring has instances for, ascending. A group takes the smallest that holds it.
pub const COLUMNS: [u32; 3] = [4, 8, 16];

/// Heads of a group at most.
pub const MAX_COLUMNS: u32 = 16;

/// Rows that a warpgroup multiplies at a time: `wgmma.m64nNk16`.
pub const WARPGROUP_ROWS: u32 = 64;

/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;

/// Bytes of a core matrix, of which operands in shared memory are made: eight rows of 16 bytes.
pub const CORE_BYTES: u32 = 128;

/// Shared memory of a block at most, on compute capability 8.0.
pub const SHARED_BYTES_SM_80: u32 = 163 << 10;

/// Shared memory of a block at most, on compute capability 8.6 and 8.9, which has the least.
pub const SHARED_BYTES_SM_86: u32 = 99 << 10;

/// Shared memory of a block at most, on compute capability 9.0.
pub const SHARED_BYTES_SM_90: u32 = 227 << 10;

/// Blocks of a cluster that every device with clusters has.
pub const PORTABLE_CLUSTER: u32 = 8;

/// Blocks of a cluster at most, where kernel and device allow more than [`PORTABLE_CLUSTER`].
pub const MAX_CLUSTER: u32 = 16;

/// The smallest of [`COLUMNS`] that holds so many heads; `None` above [`MAX_COLUMNS`].
pub const fn columns(heads: u32) -> Option<u32> {
    let mut i = 0;
    while i < COLUMNS.len() {
        if heads <= COLUMNS[i] {
            return Some(COLUMNS[i]);
        }
        i += 1;
    }
    None
}

const _: () = assert!(MAX_COLUMNS == COLUMNS[COLUMNS.len() - 1]);
const _: () = assert!(SHARED_BYTES_SM_80 <= SHARED_BYTES_SM_90 && PORTABLE_CLUSTER <= MAX_CLUSTER);
