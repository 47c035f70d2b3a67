//! Prompts cut into pieces, each a batch of blocks that is one step.

use std::borrow::Cow;
use std::ops::Range;

use crate::batch::{Batch, MAX_ROWS};
use crate::error::{Error, Result};
use crate::plan::Limits;

/// Bytes of page tables that are kept for all layers. A block names all pages before it: tables of a long prompt in short blocks are
/// larger than its keys.
const KEPT_TABLES: usize = 64 << 20;
/// The most pieces: a list of them has 640 MiB.
const MAX_PIECES: usize = 1 << 24;

/// A batch of prompts, of any number of tokens each, as pieces that one step has room for: what
/// [`TokenSelect::prefill`](crate::TokenSelect::prefill) takes. Made once for all layers, by
/// [`PagedKvCache::extend_in_pieces`](crate::PagedKvCache::extend_in_pieces) or [`Batch::in_pieces`].
///
/// Pieces are parts of the query tokens, in their order: prompts are read one after the other, and where one ends within a piece, the
/// next begins in it. Each is a batch in blocks ([`Batch::in_blocks`]) within the limits that it was made for.
///
/// Tables of the first pieces, up to 64 MiB, are kept here and on the device; those of others are made whenever a layer comes to them.
#[derive(Debug, Clone)]
pub struct Pieces {
    whole: Batch,
    block_len: usize,
    pieces: Vec<Piece>,
    /// Batches of the first pieces.
    kept: Vec<Batch>,
}

/// Blocks of one step.
#[derive(Debug, Clone)]
struct Piece {
    /// Query tokens of the whole batch.
    tokens: Range<usize>,
    num_blocks: usize,
    longest_block: usize,
    /// Places for tokens, of all blocks.
    num_places: usize,
}

impl Piece {
    /// This piece and the block behind it, where limits have room for the two.
    fn with(&self, block: &Piece, limits: &Limits) -> Option<Piece> {
        let both = Piece {
            tokens: self.tokens.start..block.tokens.end,
            num_blocks: self.num_blocks + block.num_blocks,
            longest_block: self.longest_block.max(block.longest_block),
            num_places: self.num_places.saturating_add(block.num_places),
        };
        (both.num_blocks <= MAX_ROWS && both.check(limits).is_ok()).then_some(both)
    }

    fn check(&self, limits: &Limits) -> Result<()> {
        limits.check(self.num_blocks, self.longest_block, self.num_places)
    }
}

impl Batch {
    /// The same tokens cut into blocks of `block_len` ([`in_blocks`](Self::in_blocks)), and these into [`Pieces`] that are within
    /// `limits`, those of a [`TokenSelect`](crate::TokenSelect). The batch has all tokens of each prompt in one row; an owned cache makes
    /// it and its pieces with [`PagedKvCache::extend_in_pieces`](crate::PagedKvCache::extend_in_pieces).
    ///
    /// # Errors
    /// [`Error::Limit`] where a block alone is beyond `limits`, and for more than 2^24 pieces; [`Error::Argument`] for blocks of no tokens, [`Error::Missing`] where the
    /// rows are parts of sequences, blocks already, or known to a device alone; [`Error::OutOfMemory`].
    pub fn in_pieces(&self, limits: &Limits, block_len: usize) -> Result<Pieces> {
        self.expect_uncut("in_pieces", block_len)?;
        let num_blocks: usize = (0..self.num_rows()).map(|row| self.block_len(row).div_ceil(block_len)).sum();
        let mut pieces: Vec<Piece> = Vec::new();
        let refuse = |got| Err(Error::Limit { what: "pieces of a batch", limit: MAX_PIECES, got });
        let least = num_blocks.div_ceil(limits.max_rows.clamp(1, MAX_ROWS));
        if least > MAX_PIECES {
            return refuse(least);
        }
        for row in 0..self.num_rows() {
            let queries = self.query_range(row);
            for begin in queries.clone().step_by(block_len) {
                let tokens = begin..begin.saturating_add(block_len).min(queries.end);
                let kv_len = self.kv_len(row).saturating_sub(queries.end - tokens.end);
                let num_places = kv_len.next_multiple_of(self.page_size());
                let block = Piece { num_blocks: 1, longest_block: tokens.len(), num_places, tokens };
                block.check(limits)?;
                if let Some(last) = pieces.last_mut()
                    && let Some(both) = last.with(&block, limits)
                {
                    *last = both;
                    continue;
                }
                if pieces.len() == MAX_PIECES {
                    return refuse(MAX_PIECES + 1);
                }
                if pieces.try_reserve(1).is_err() {
                    let bytes = (pieces.len() + 1) * size_of::<Piece>();
                    let (device, what) = ("cpu".to_owned(), "the pieces of a batch");
                    return Err(Error::OutOfMemory { device, what, bytes });
                }
                pieces.push(block);
            }
        }
        let mut made = Pieces { whole: self.clone(), block_len, pieces, kept: Vec::new() };
        let mut bytes = 0usize;
        for index in 0..made.len() {
            bytes = bytes.saturating_add(4 * made.pieces[index].num_places / self.page_size());
            if bytes > KEPT_TABLES {
                break;
            }
            let batch = made.make(index)?;
            made.kept.push(batch);
        }
        Ok(made)
    }
}

impl Pieces {
    /// The batch that was cut, with all tokens of each prompt in one row: its queries, keys, values and outputs are those of a prefill
    /// ([`TokenSelect::input`](crate::TokenSelect::input), [`output`](crate::TokenSelect::output)).
    pub fn whole(&self) -> &Batch {
        &self.whole
    }

    /// Tokens of a block; the last one of a prompt may have fewer.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Number of blocks of all pieces.
    pub fn num_blocks(&self) -> usize {
        self.pieces.iter().map(|piece| piece.num_blocks).sum()
    }

    /// The query tokens of a piece.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such piece.
    pub fn tokens(&self, piece: usize) -> Result<Range<usize>> {
        Ok(self.get(piece)?.tokens.clone())
    }

    /// The batch of a piece, in blocks: for operations one by one over the piece's [`tokens`](Self::tokens).
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such piece, [`Error::OutOfMemory`] where there is no memory for its tables.
    pub fn batch(&self, piece: usize) -> Result<Cow<'_, Batch>> {
        self.get(piece)?;
        match self.kept.get(piece) {
            Some(kept) => Ok(Cow::Borrowed(kept)),
            None => Ok(Cow::Owned(self.make(piece)?)),
        }
    }

    /// Checks that each piece is within `limits`.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub(crate) fn check(&self, limits: &Limits) -> Result<()> {
        self.pieces.iter().try_for_each(|piece| piece.check(limits))
    }

    fn get(&self, piece: usize) -> Result<&Piece> {
        let limit = self.len();
        self.pieces.get(piece).ok_or(Error::Index { what: "piece", limit, got: piece })
    }

    /// The batch of a piece, which there is.
    fn make(&self, piece: usize) -> Result<Batch> {
        self.whole.part(self.pieces[piece].tokens.clone())?.in_blocks(self.block_len)
    }
}
