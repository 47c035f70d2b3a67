//! *Paged tiles*: keys or values that lie in pages, brought to shared memory by bulk copies, a stage of a
//! [`ring`](crate::common::ring) at a time.
//!
//! A *tile* is [`TILE`] tokens of all KV heads. A block has [`WARPS`] consumer warps, one KV head each; with fewer heads than warps
//! a stage holds several tiles ([`stage_tiles`]), and each has warps of its own.
//!
//! ```text
//! producer warp:  look up the pages of the first two batches of stages
//!                 for each stage: acquire;  the lanes whose turn it is copy;  after a batch, look up the one after the next
//! ```
//! A *piece* is what one copy brings: up to [`TILE`] adjacent tokens of a page, of all heads where these lie behind one another,
//! else one copy a head. A stage has few pieces, so the 32 lanes look up those of a *batch* of stages at a time, a piece each,
//! while the copies of the batch before are started: a look-up is a trip to memory.
//!
//! In shared memory a tile is made of *segments* of 4 tokens, each of which may be followed by unused bytes ([`TileLayout`]):
//! ```text
//! heads adjacent:   token 0 [head 0 .. H)  token 1 ..  token 2 ..  token 3 ..  pad  token 4 ..
//! heads apart:      head 0 [token 0 .. 16)  head 1 ..
//! ```

use super::layout::PageStrides;
use crate::limits::TILE_TOKENS;

/// Consumer warps.
pub const WARPS: u32 = 8;
/// Tokens of a tile.
pub const TILE: u32 = TILE_TOKENS;
/// Tokens of a segment.
pub const SEGMENT: u32 = 4;
/// Smaller copies are slower than loads to registers: 2 KiB took 606 µs for the keys of a million tokens, where those took
/// 591.
pub const MIN_COPY_BYTES: u64 = 4 << 10;

/// Tiles of a stage: one for each time that the heads fit the consumer warps. A power of two for up to 8 heads.
pub const fn stage_tiles(num_kv_heads: u32) -> u32 {
    WARPS / num_kv_heads
}

/// Keys or values in pages, as copies see them.
#[derive(Clone, Copy)]
pub struct Pages {
    /// Tokens in a page.
    pub page_size: u32,
    /// KV heads of a token.
    pub num_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Strides of the pages, in elements of 2 bytes.
    pub stride: PageStrides,
}

impl Pages {
    /// Tokens of a copy at most: those of a page, up to a tile.
    pub const fn copy_tokens(&self) -> u32 {
        if self.page_size < TILE { self.page_size } else { TILE }
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
        dense && rows as u64 * dim * 2 >= MIN_COPY_BYTES && stage_tiles(heads) * TILE / tokens <= 32
    }
}

/// Where the rows of a tile lie in shared memory, in bytes.
#[derive(Clone, Copy)]
pub struct TileLayout {
    /// Tokens of a copy.
    pub copy_tokens: u32,
    /// Whether a copy is of all heads.
    pub heads_are_adjacent: bool,
    /// From a token to the next of its segment.
    pub token: u32,
    /// From a segment to the next.
    pub segment: u32,
    /// From a head to the next of its token.
    pub head: u32,
    /// From a tile to the next of its stage.
    pub tile: u32,
}

impl TileLayout {
    /// `pad` unused bytes behind each segment, where copies of a segment are large enough.
    pub const fn new(pages: &Pages, pad: u32) -> TileLayout {
        let (heads, row, tokens) = (pages.num_kv_heads, pages.head_dim * 2, pages.copy_tokens());
        if !pages.heads_are_adjacent() {
            let head = TILE * row;
            return TileLayout {
                copy_tokens: tokens,
                heads_are_adjacent: false,
                token: row,
                segment: SEGMENT * row,
                head,
                tile: heads * head,
            };
        }
        let token = heads * row;
        let pads = pad > 0 && SEGMENT as u64 * token as u64 >= MIN_COPY_BYTES;
        let segment = SEGMENT * token + if pads { pad } else { 0 };
        TileLayout {
            copy_tokens: if pads && tokens > SEGMENT { SEGMENT } else { tokens },
            heads_are_adjacent: true,
            token,
            segment,
            head: row,
            tile: TILE / SEGMENT * segment,
        }
    }

    /// Offset of a token of the tile.
    pub const fn of_token(&self, token: u32) -> u32 {
        token / SEGMENT * self.segment + token % SEGMENT * self.token
    }
}

#[cfg(feature = "kernels")]
pub use producer::{PagedProducer, Schedule};

#[cfg(feature = "kernels")]
mod producer {
    use super::{Pages, TILE, TileLayout};
    use crate::common::layout::BatchTables;
    use crate::simt::bulk::{self, MBarrier};
    use crate::simt::data::V4;
    use crate::simt::global::GlobalPtr;
    use crate::simt::shared::Shared;
    use crate::simt::warp;

    /// Which tokens a block streams, stage by stage.
    pub trait Schedule {
        /// First token of tile `tile` of the block's stage `stage`; `None` if there is no such tile.
        fn first_token(&self, stage: u32, tile: u32) -> Option<u32>;

        /// The last token that may be read.
        fn last_token(&self) -> u32;

        /// The tables of the batch.
        fn tables(&self) -> &BatchTables;

        /// The row's page table.
        fn page_table(&self) -> GlobalPtr<u32>;
    }

    /// Where a piece lies.
    #[derive(Clone, Copy)]
    struct Source {
        /// [`NOWHERE`] if there is nothing to copy.
        page: u32,
        token_in_page: u32,
    }

    const NOWHERE: u32 = u32::MAX;

    /// A lane of the producer warp: the piece that is its own in the stages whose turn it is.
    #[derive(Clone, Copy)]
    pub struct PagedProducer {
        /// The lane's stages are those with this number in each batch.
        own_turn: u32,
        /// Tile of the stage, and first token in it.
        tile: u32,
        token: u32,
        /// Stages for which the lanes look up pages together, and the number of the next one in its batch.
        batch: u32,
        turn: u32,
        /// The piece in this batch's stage and in the next's, and that stage.
        source: Source,
        next_source: Source,
        next_stage: u32,
    }

    impl PagedProducer {
        /// Of other warps, which copy nothing.
        pub const NONE: PagedProducer = {
            let source = Source { page: NOWHERE, token_in_page: 0 };
            let (own_turn, tile, token, batch, turn, next_stage) = (0, 0, 0, 1, 0, 0);
            PagedProducer { own_turn, tile, token, batch, turn, source, next_source: source, next_stage }
        };

        /// Before stage `first_stage`. Looks up the first pages.
        ///
        /// # Safety
        /// - The tables are as described; the layout has at least a token a copy.
        pub unsafe fn new(
            schedule: &impl Schedule,
            layout: &TileLayout,
            stage_tiles: u32,
            first_stage: u32,
        ) -> Self {
            core::hint::assert_unchecked(layout.copy_tokens != 0 && layout.copy_tokens <= TILE);
            let tile_pieces = TILE / layout.copy_tokens;
            let pieces = stage_tiles * tile_pieces;
            core::hint::assert_unchecked(tile_pieces != 0 && pieces != 0);
            let lane = warp::lane_id();
            let batch = warp::SIZE / pieces;
            let mut producer = PagedProducer {
                own_turn: lane / pieces,
                tile: lane % pieces / tile_pieces,
                token: lane % tile_pieces * layout.copy_tokens,
                batch,
                ..PagedProducer::NONE
            };
            producer.next_stage = first_stage + producer.own_turn;
            producer.source = producer.look_up(schedule, layout);
            producer.next_stage += batch;
            producer.next_source = producer.look_up(schedule, layout);
            producer
        }

        /// Where the lane's piece of its next stage lies. A piece that reaches beyond the last token begins with one before it.
        unsafe fn look_up(&self, schedule: &impl Schedule, layout: &TileLayout) -> Source {
            let Some(first) = schedule.first_token(self.next_stage, self.tile) else {
                return Source { page: NOWHERE, token_in_page: 0 };
            };
            let token = (first + self.token).min(schedule.last_token());
            let (page, token_in_page) = schedule.tables().split_token(token);
            // The last token may lie within a piece.
            let token_in_page = token_in_page & !(layout.copy_tokens - 1);
            Source { page: schedule.page_table().add(page as u64).load(), token_in_page }
        }

        /// Starts the lane's copies to the stage at `to`, if it is its turn: one if the heads are adjacent, else one a head.
        ///
        /// # Safety
        /// - The stage is [acquired](crate::common::ring::Ring::acquire), and `arrived` is its barrier.
        /// - `from` has pages as described, of 2-byte elements.
        #[track_caller]
        pub unsafe fn copy<T>(
            &self,
            from: GlobalPtr<T>,
            pages: &Pages,
            layout: &TileLayout,
            to: Shared<V4<u32>>,
            arrived: MBarrier,
        ) {
            if self.turn != self.own_turn || self.source.page == NOWHERE {
                return;
            }
            let offset = pages.stride.offset(self.source.page, self.source.token_in_page, 0);
            let from = from.add(offset).cast::<V4<u32>>();
            let to = to.byte_add(self.tile * layout.tile + layout.of_token(self.token));
            let bytes = layout.copy_tokens * pages.head_dim * 2;
            if layout.heads_are_adjacent {
                return bulk::copy_to_shared(to, from, bytes * pages.num_kv_heads, arrived);
            }
            for head in 0..pages.num_kv_heads {
                let from = from.add(head as u64 * (pages.stride.head / 8));
                bulk::copy_to_shared(to.byte_add(head * layout.head), from, bytes, arrived);
            }
        }

        /// Goes on to the next stage; looks up pages after a batch.
        ///
        /// # Safety
        /// - As for [`new`](Self::new).
        pub unsafe fn advance(&mut self, schedule: &impl Schedule, layout: &TileLayout) {
            self.turn += 1;
            if self.turn == self.batch {
                self.turn = 0;
                self.source = self.next_source;
                self.next_stage += self.batch;
                self.next_source = self.look_up(schedule, layout);
            }
        }
    }
}
