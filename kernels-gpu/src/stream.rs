//! What the kernels share that stream pages through shared memory: tiles of 16 tokens and all KV heads, brought by bulk
//! copies to the warps of one block, each of which serves one head.
//!
//! With fewer heads than warps a block works on several tiles at a time, one for each of its *streams*.

use crate::layout::PageStrides;

/// Warps that work on what is streamed.
pub(crate) const WARPS: u32 = 8;
/// Tokens of a tile.
pub(crate) const TILE: u32 = 16;
/// Tokens of a copy at most, a power of two up to [`TILE`].
const COPY_TOKENS: u32 = TILE;
/// Smaller copies are slower than loads to registers: 2 KiB took 606 µs for the keys of a million tokens, where those took
/// 591.
pub(crate) const MIN_COPY_BYTES: u64 = 4 << 10;

/// Tiles that a block works on at a time: a warp for each of their heads. A power of two for up to 8 heads.
pub(crate) const fn streams(num_kv_heads: u32) -> u32 {
    WARPS / num_kv_heads
}

/// Keys or values in pages, as copies see them.
pub(crate) struct Pages {
    pub page_size: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub stride: PageStrides,
}

impl Pages {
    /// Tokens of a copy: those of a page, up to [`COPY_TOKENS`].
    pub const fn copy_tokens(&self) -> u32 {
        if self.page_size < COPY_TOKENS { self.page_size } else { COPY_TOKENS }
    }

    /// Whether all heads of such tokens lie behind one another.
    pub const fn heads_are_adjacent(&self) -> bool {
        let (dim, heads) = (self.head_dim as u64, self.num_kv_heads as u64);
        (heads == 1 || self.stride.head == dim)
            && (self.copy_tokens() == 1 || self.stride.token == heads * dim)
    }

    /// Whether they can be streamed, and it is worth it: copies of at least 4 KiB, of all heads or of one.
    pub const fn can_stream(&self) -> bool {
        let (heads, dim) = (self.num_kv_heads, self.head_dim as u64);
        if heads == 0 || heads > WARPS || !self.page_size.is_power_of_two() {
            return false;
        }
        let tokens = self.copy_tokens();
        let adjacent = self.heads_are_adjacent();
        let rows = if adjacent { tokens * heads } else { tokens };
        let dense = adjacent || tokens == 1 || self.stride.token == dim;
        dense && rows as u64 * dim * 2 >= MIN_COPY_BYTES && streams(heads) * TILE / tokens <= 32
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) use place::Place;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod place {
    /// A stage, and the parity of the phases of its barriers in this round.
    #[derive(Clone, Copy)]
    pub(crate) struct Place {
        pub stage: u32,
        pub parity: u32,
    }

    impl Place {
        pub const FIRST: Place = Place { stage: 0, parity: 0 };

        #[inline(always)]
        pub fn next(self, num_stages: u32) -> Place {
            if self.stage + 1 < num_stages {
                Place { stage: self.stage + 1, ..self }
            } else {
                Place { stage: 0, parity: self.parity ^ 1 }
            }
        }
    }
}
