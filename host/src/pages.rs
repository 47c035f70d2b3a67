//! Page allocator and page tables: which sequence owns which pages. Pure host code that touches no key or
//! value, so it serves a cache on any device, and one that belongs to another engine.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::config::MAX_SEQUENCE_LEN;
use crate::error::{Error, Result};
use crate::sequence::{Revision, SequenceChange, SequenceId};

/// The largest page size.
pub const MAX_PAGE_SIZE: usize = 256;

/// A page whose tokens must be copied before new ones are written: the copy of copy-on-write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// Page to read.
    pub src: u32,
    /// Page to write.
    pub dst: u32,
    /// Leading tokens of the page to copy.
    pub num_tokens: usize,
}

/// Page tables of some sequences in the layout of FlashInfer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageTables {
    /// `[rows + 1]`: the pages of row `r` are `indices[indptr[r]..indptr[r + 1]]`.
    pub indptr: Vec<u32>,
    /// Page numbers, in token order.
    pub indices: Vec<u32>,
    /// `[rows]`: tokens in each row's last page, 1 to `page_size`; 0 for a row without pages.
    pub last_page_len: Vec<u32>,
}

/// Of all allocators, so that a sequence of one is unknown to every other. 0 is that of none.
static GENERATIONS: AtomicU32 = AtomicU32::new(1);

#[derive(Debug, Clone)]
struct Sequence {
    generation: u32,
    alive: bool,
    len: usize,
    pages: Vec<u32>,
    /// Changes when tokens that a batch may name are dropped, move to another page or are shared.
    revision: Revision,
}

impl Sequence {
    /// A place that no sequence was in.
    const NEW: Sequence =
        Sequence { generation: 0, alive: false, len: 0, pages: Vec::new(), revision: Revision::FIRST };
}

/// Hands pages to sequences, shares them between forks, and takes them back.
///
/// Every call either does all it says or, with an error, nothing.
#[derive(Debug)]
pub struct PageAllocator {
    /// Unlike that of any other allocator of the process.
    id: u64,
    page_size: usize,
    free: FreePages,
    /// Sequences that there have been at once; the others have never been alive.
    sequences: Vec<Sequence>,
    /// Indices among them of those that are not alive.
    free_indices: Vec<u32>,
    max_sequences: usize,
}

/// Which pages are free, and how many sequences hold each of the others.
#[derive(Debug)]
struct FreePages {
    /// Pages given back; the last is handed out first.
    returned: Vec<u32>,
    /// Pages that were handed out so far, by number: how many sequences hold each; 0 for one given back. So a pool costs
    /// nothing before it is used.
    ref_counts: Vec<u32>,
    num_pages: usize,
}

impl FreePages {
    fn len(&self) -> usize {
        self.num_pages - self.ref_counts.len() + self.returned.len()
    }

    /// A free page; the caller has made sure that there is one.
    fn take(&mut self) -> u32 {
        let page = self.returned.pop().unwrap_or_else(|| {
            self.ref_counts.push(0);
            self.ref_counts.len() as u32 - 1
        });
        debug_assert!((page as usize) < self.num_pages, "more pages than there are");
        debug_assert_eq!(self.ref_counts[page as usize], 0, "page {page} was handed out twice");
        self.ref_counts[page as usize] = 1;
        page
    }

    /// Drops one reference; the last one frees the page.
    fn give(&mut self, page: u32) {
        let count = &mut self.ref_counts[page as usize];
        *count -= 1;
        if *count == 0 {
            self.returned.push(page);
        }
    }
}

impl PageAllocator {
    /// `num_pages` free pages of `page_size` tokens (1 to 256), for at most `max_sequences` sequences.
    ///
    /// # Errors
    /// [`Error::Argument`] where a number is 0 or too large.
    pub fn new(num_pages: usize, page_size: usize, max_sequences: usize) -> Result<Self> {
        if page_size == 0 || page_size > MAX_PAGE_SIZE {
            return Err(Error::argument("page_size", format!("from 1 to {MAX_PAGE_SIZE}"), page_size));
        }
        for (what, got) in [("num_pages", num_pages), ("max_sequences", max_sequences)] {
            if got == 0 || got > MAX_SEQUENCE_LEN {
                return Err(Error::argument(what, format!("from 1 to {MAX_SEQUENCE_LEN}"), got));
            }
        }
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Ok(PageAllocator {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            page_size,
            free: FreePages { returned: Vec::new(), ref_counts: Vec::new(), num_pages },
            sequences: Vec::new(),
            free_indices: Vec::new(),
            max_sequences,
        })
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages in all.
    pub fn num_pages(&self) -> usize {
        self.free.num_pages
    }

    /// Pages that no sequence holds.
    pub fn num_free_pages(&self) -> usize {
        self.free.len()
    }

    /// Sequences that may be alive at once.
    pub fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    /// Sequences alive.
    pub fn num_sequences(&self) -> usize {
        self.sequences.len() - self.free_indices.len()
    }

    /// How many sequences hold `page`.
    ///
    /// # Errors
    /// [`Error::Index`] where there is no such page.
    pub fn ref_count(&self, page: u32) -> Result<usize> {
        let (got, limit) = (page as usize, self.free.num_pages);
        if got >= limit {
            return Err(Error::Index { what: "page", limit, got });
        }
        Ok(self.free.ref_counts.get(got).map_or(0, |&count| count as usize))
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        Ok(self.get(id)?.len)
    }

    /// Tokens of each sequence by its index; 0 where there is none.
    pub(crate) fn lens(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.len).collect()
    }

    /// Whether no sequence is alive.
    pub fn is_empty(&self) -> bool {
        self.num_sequences() == 0
    }

    /// Pages of a sequence, in token order.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn pages(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.get(id)?.pages)
    }

    /// Adds an empty sequence.
    ///
    /// # Errors
    /// [`Error::TooManySequences`].
    pub fn create(&mut self) -> Result<SequenceId> {
        let limit = self.max_sequences;
        let index = match self.free_indices.pop() {
            Some(index) => index,
            None if self.sequences.len() < limit => {
                self.sequences.push(Sequence::NEW);
                self.sequences.len() as u32 - 1
            }
            None => return Err(Error::TooManySequences { limit }),
        };
        let sequence = &mut self.sequences[index as usize];
        sequence.alive = true;
        sequence.generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(SequenceId { index, generation: sequence.generation })
    }

    /// Adds a sequence with the same tokens. Pages are shared until one of the two writes into them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TooManySequences`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let parent = self.get(id)?;
        let (len, pages) = (parent.len, parent.pages.clone());
        let child = self.create()?;
        for &page in &pages {
            self.free.ref_counts[page as usize] += 1;
        }
        // Batches made before would write into pages that are now shared.
        self.sequences[id.index()].revision.changed(SequenceChange::Forked);
        let sequence = &mut self.sequences[child.index()];
        (sequence.len, sequence.pages) = (len, pages);
        Ok(child)
    }

    /// Appends room for `num_tokens` tokens to each sequence named, all or nothing.
    ///
    /// Returns the pages whose contents must be copied before the new tokens are written: last pages that
    /// are partly filled and shared with a fork.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::UnknownSequence`], [`Error::DuplicateSequence`],
    /// [`Error::SequenceTooLong`].
    pub fn extend(&mut self, growth: &[(SequenceId, usize)]) -> Result<Vec<PageCopy>> {
        let mut first_row: HashMap<SequenceId, usize> = HashMap::with_capacity(growth.len());
        let mut released: HashMap<u32, u32> = HashMap::new();
        let mut needed = 0;
        let mut copies = Vec::with_capacity(growth.len());
        for (row, &(id, num_tokens)) in growth.iter().enumerate() {
            let sequence = self.get(id)?;
            if let Some(first) = first_row.insert(id, row) {
                return Err(Error::DuplicateSequence { id, first, second: row });
            }
            let len = sequence.len.saturating_add(num_tokens);
            if len > MAX_SEQUENCE_LEN {
                return Err(Error::SequenceTooLong { id, limit: MAX_SEQUENCE_LEN, got: len });
            }
            needed += len.div_ceil(self.page_size) - sequence.pages.len();
            let copy = (num_tokens > 0).then(|| self.shared_tail(sequence, &mut released)).flatten();
            needed += usize::from(copy.is_some());
            copies.push(copy);
        }
        if needed > self.free.len() {
            return Err(Error::OutOfPages { needed, free: self.free.len() });
        }

        let mut done = Vec::new();
        for (&(id, num_tokens), copy) in growth.iter().zip(copies) {
            let sequence = &mut self.sequences[id.index()];
            if let Some(src) = copy {
                let dst = self.free.take();
                self.free.ref_counts[src as usize] -= 1;
                if let Some(last) = sequence.pages.last_mut() {
                    *last = dst;
                }
                sequence.revision.changed(SequenceChange::PageCopied);
                done.push(PageCopy { src, dst, num_tokens: sequence.len % self.page_size });
            }
            sequence.len += num_tokens;
            while sequence.pages.len() < sequence.len.div_ceil(self.page_size) {
                sequence.pages.push(self.free.take());
            }
        }
        Ok(done)
    }

    /// The sequence's last page where it is partly filled and, counting what earlier rows `released`, still
    /// held by another sequence; noted as released by this one.
    fn shared_tail(&self, sequence: &Sequence, released: &mut HashMap<u32, u32>) -> Option<u32> {
        let &page = sequence.pages.last().filter(|_| !sequence.len.is_multiple_of(self.page_size))?;
        let gone = released.entry(page).or_default();
        let shared = self.free.ref_counts[page as usize] - *gone > 1;
        *gone += u32::from(shared);
        shared.then_some(page)
    }

    /// Drops the tokens of a sequence from `len` on, for example rejected speculative ones.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::TruncateBeyondEnd`].
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let sequence = self.get(id)?;
        if len > sequence.len {
            return Err(Error::TruncateBeyondEnd { id, len: sequence.len, to: len });
        }
        if len < sequence.len {
            self.sequences[id.index()].revision.changed(SequenceChange::Truncated { to: len });
        }
        self.give_back(id, len);
        Ok(())
    }

    /// Takes back the growth of a sequence that is alive from `len` tokens on, of which no batch was made: older ones stay valid.
    pub(crate) fn give_back(&mut self, id: SequenceId, len: usize) {
        let sequence = &mut self.sequences[id.index()];
        sequence.len = len;
        for page in sequence.pages.drain(len.div_ceil(self.page_size)..).rev() {
            self.free.give(page);
        }
    }

    /// Ends a sequence; pages that no fork holds become free.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.truncate(id, 0)?;
        let sequence = &mut self.sequences[id.index()];
        sequence.alive = false;
        self.free_indices.push(id.index);
        Ok(())
    }

    /// The page tables of some sequences, a row each, in the order given.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn tables(&self, ids: &[SequenceId]) -> Result<PageTables> {
        let mut tables = PageTables { indptr: vec![0], ..PageTables::default() };
        for &id in ids {
            let sequence = self.get(id)?;
            tables.indices.extend_from_slice(&sequence.pages);
            tables.indptr.push(tables.indices.len() as u32);
            let full_pages = sequence.pages.len().saturating_sub(1);
            tables.last_page_len.push((sequence.len - full_pages * self.page_size) as u32);
        }
        Ok(tables)
    }

    /// Tells this allocator's batches from those of others.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Another one after tokens of the sequence were dropped, moved or shared.
    pub(crate) fn revision(&self, id: SequenceId) -> Result<Revision> {
        Ok(self.get(id)?.revision)
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let found = self.sequences.get(id.index()).filter(|s| s.alive && s.generation == id.generation);
        found.ok_or(Error::UnknownSequence(id))
    }
}
