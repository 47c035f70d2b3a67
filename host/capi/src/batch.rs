//! Batches: page tables of one step in the layout of FlashInfer.

use tokenselect::{Batch, BatchSlot, DType, Device, PageTables, TablesOnDevice};

use crate::config::{choose, expect_zero};
use crate::device::ts_device;
use crate::pointers::{Argument, answer, hand_out, reference, reference_mut, slice, take_back};
use crate::sized;
use crate::status::{Failure, Result, fence, ts_status};

/// One step's rows: which queries belong to which sequence, and in which pages its tokens lie. Never changes.
///
/// May be used by several threads at once, by contexts of one device. The first operation on a GPU copies the tables
/// there.
#[derive(Debug)]
pub struct ts_batch {
    pub(crate) batch: Batch,
}

/// Page tables, in the host's memory, copied by `ts_batch_create`. They describe the cache *after* the block was
/// appended: a row has `n = (pages - 1) * page_size + last_page_len` tokens, the last of which are its block. Fields
/// that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_batch_tables {
    /// `sizeof(ts_batch_tables)`.
    pub struct_size: usize,
    /// Tokens in a page, 1 to 256.
    pub page_size: usize,
    /// Rows of the batch.
    pub num_rows: usize,
    /// `[num_rows + 1]`, ascending from 0: the query tokens of row `r` are rows `qo_indptr[r]` to `qo_indptr[r + 1]` of
    /// `q`, `k`, `v` and `out`. A row of 0 query tokens is padding.
    pub qo_indptr: *const i32,
    /// `[num_rows + 1]`, ascending from 0: the pages of row `r` are `indices[indptr[r]]` to `indices[indptr[r + 1]]`.
    pub indptr: *const i32,
    /// `[indptr[num_rows]]`: page numbers, in token order.
    pub indices: *const i32,
    /// `[num_rows]`: tokens in each row's last page, 1 to `page_size`; 0 for a row without pages.
    pub last_page_len: *const i32,
    /// `[num_rows]`, or null: the row of the Selection Cache that belongs to each row, all different. Operations
    /// that are given a Selection Cache need it.
    pub sequence_indices: *const i32,
    /// `[num_rows, 2]`, or null: for parts of sequences (sequence parallelism), begin and end of the tokens that
    /// compete for the top-k. What the row holds beside them is always selected; such rows never reuse a selection.
    pub candidates: *const i32,
}

/// Sizes of a batch.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_batch_info {
    /// Rows.
    pub num_rows: usize,
    /// Query tokens of all rows: the leading dimension of `q`, `k`, `v` and `out`.
    pub num_query_tokens: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// The longest block.
    pub max_block_len: usize,
    /// The most tokens cached by one row.
    pub max_kv_len: usize,
    /// Places for tokens in logits and votes: all pages of all rows. What `ts_limits.max_kv_tokens` limits.
    pub num_token_places: usize,
}

/// Sizes and places of a row.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_batch_row {
    /// First query token.
    pub query_begin: usize,
    /// Query tokens of the row.
    pub block_len: usize,
    /// Tokens cached, the block included.
    pub kv_len: usize,
    /// Where the row begins in logits and votes: its token `j` is at `token_base + j`.
    pub token_base: usize,
}

/// A batch over page tables of another engine.
///
/// Errors: `TS_STATUS_TABLE`, naming table, row, rule and entry, `TS_STATUS_CONFIG` for the page size,
/// `TS_STATUS_LIMIT` for too many rows, `TS_STATUS_STRUCT_SIZE`.
///
/// # Safety
/// - `tables` is null or a structure of `tables->struct_size` bytes whose pointers are null or name arrays of the
///   stated lengths in the host's memory. They are not used after this returns.
/// - `batch` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_create(
    tables: *const ts_batch_tables,
    batch: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let make = || unsafe { Ok(ts_batch { batch: read(&sized::read(tables)?)? }) };
        // SAFETY: as above.
        unsafe { hand_out("batch", batch, make) }
    })
}

/// # Safety
/// - As for [`ts_batch_create`].
unsafe fn read(tables: &ts_batch_tables) -> Result<Batch> {
    let &ts_batch_tables { page_size, num_rows, .. } = tables;
    // SAFETY: the caller's promise.
    let (qo_indptr, indptr, last_page_len) = unsafe {
        (
            table("qo_indptr", tables.qo_indptr, num_rows.saturating_add(1))?,
            table("indptr", tables.indptr, num_rows.saturating_add(1))?,
            table("last_page_len", tables.last_page_len, num_rows)?,
        )
    };
    let num_indices = indptr.last().map_or(0, |&end| end as usize);
    // SAFETY: the caller's promise.
    let indices = unsafe { table("indices", tables.indices, num_indices)? };
    let pages = PageTables { indptr, indices, last_page_len };
    let mut batch = if tables.candidates.is_null() {
        Batch::new(page_size, qo_indptr, pages)?
    } else {
        // SAFETY: the caller's promise.
        let bounds = unsafe { table("candidates", tables.candidates, num_rows.saturating_mul(2))? };
        let ranges = bounds.chunks_exact(2).map(|bounds| bounds[0]..bounds[1]).collect();
        Batch::partial(page_size, qo_indptr, pages, ranges)?
    };
    if !tables.sequence_indices.is_null() {
        // SAFETY: the caller's promise.
        let indices = unsafe { table("sequence_indices", tables.sequence_indices, num_rows)? };
        batch = batch.with_sequence_indices(indices)?;
    }
    Ok(batch)
}

/// A copy of a table, none of whose entries is negative.
///
/// # Safety
/// - Null, or `len` numbers.
unsafe fn table(what: &'static str, pointer: *const i32, len: usize) -> Result<Vec<u32>> {
    // SAFETY: the caller's promise.
    let entries = unsafe { slice(what, pointer, len)? };
    let one =
        |(entry, &got): (usize, &i32)| u32::try_from(got).map_err(|_| Failure::Negative { what, entry, got });
    entries.iter().enumerate().map(one).collect()
}

/// A copy of a batch with rows of no cached tokens added, until it has `num_rows`: the shape that captured work
/// expects. Each has `block_len` queries, for which `out = 0` and `lse = -inf` are written and nothing else is done.
///
/// Errors: `TS_STATUS_LIMIT` where the batch has more rows already, `TS_STATUS_CONFIG` for more than can be counted,
/// `TS_STATUS_MISSING` where the tables are the device's alone.
///
/// # Safety
/// - `batch` is null or a handle.
/// - `padded` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_padded(
    batch: *const ts_batch,
    num_rows: usize,
    block_len: usize,
    padded: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let batch = unsafe { &reference("batch", batch)?.batch };
        let make = || Ok(ts_batch { batch: batch.clone().padded(num_rows, block_len)? });
        // SAFETY: as above.
        unsafe { hand_out("padded", padded, make) }
    })
}

/// The same tokens with every row cut into blocks of `block_len` tokens, the last of which may be shorter: for a piece of a prompt that
/// is longer than the blocks that it is processed in. A block is a row that selects for itself; blocks of one row read its keys
/// together. The order of query tokens stays. Their selections are neither taken from a Selection Cache nor put there, and what it
/// holds for their sequences is dropped.
///
/// `block_len` is a dial between speed and fidelity: all queries of a block share one list, chosen by their mean. Every block counts in
/// the limits `max_rows` and, with all tokens before it, `max_kv_tokens`.
///
/// Errors: `TS_STATUS_CONFIG` for blocks of no tokens, `TS_STATUS_LIMIT` for too many of them, `TS_STATUS_MISSING` where the rows are
/// parts of sequences, blocks already, or the device's alone.
///
/// # Safety
/// - `batch` is null or a handle.
/// - `blocks` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_in_blocks(
    batch: *const ts_batch,
    block_len: usize,
    blocks: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let batch = unsafe { &reference("batch", batch)?.batch };
        // SAFETY: as above.
        unsafe { hand_out("blocks", blocks, || Ok(ts_batch { batch: batch.in_blocks(block_len)? })) }
    })
}

/// Sizes of a batch. `max_kv_len` and `num_token_places` are upper bounds where the tables are the device's alone.
///
/// # Safety
/// - `batch` is null or a handle; `info` is null or has room for the structure, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_get_info(batch: *const ts_batch, info: *mut ts_batch_info) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let batch = unsafe { &reference("batch", batch)?.batch };
        let make = || {
            Ok(ts_batch_info {
                num_rows: batch.num_rows(),
                num_query_tokens: batch.num_query_tokens(),
                page_size: batch.page_size(),
                max_block_len: batch.max_block_len(),
                max_kv_len: batch.max_kv_len(),
                num_token_places: batch.num_token_places(),
            })
        };
        // SAFETY: as above.
        unsafe { answer("info", info, make) }
    })
}

/// Sizes and places of one row. Errors: `TS_STATUS_INDEX` where there is no such row, `TS_STATUS_MISSING` where the
/// tables are the device's alone.
///
/// # Safety
/// - `batch` is null or a handle; `info` is null or has room for the structure, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_get_row(
    batch: *const ts_batch,
    row: usize,
    info: *mut ts_batch_row,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let batch = unsafe { &reference("batch", batch)?.batch };
        let make = || {
            let row = batch.row(row)?;
            Ok(ts_batch_row {
                query_begin: row.queries.start,
                block_len: row.block_len(),
                kv_len: row.kv_len,
                token_base: row.token_base,
            })
        };
        // SAFETY: as above.
        unsafe { answer("info", info, make) }
    })
}

/// Gives a batch back. Null is nothing. On a GPU, its tables are freed after the device's earlier work.
///
/// # Safety
/// - `batch` is null or a handle, used for the last time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_destroy(batch: *mut ts_batch) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("batch", batch) })
}

/// A fixed place in a GPU's memory for the tables of one batch after another, so that captured work reads lengths and
/// pages of the batch that was put there last. One thread at a time.
#[derive(Debug)]
pub struct ts_batch_slot {
    slot: BatchSlot,
    device: Device,
    num_rows: usize,
}

/// Page tables of another engine in memory of the device: vLLM's block tables, SGLang's slots of tokens. Fields that
/// are not set are 0.
///
/// All entries are 32-bit integers; a negative one is beyond every limit. They are read when the device comes to it,
/// and the host never looks at them: a row that breaks a rule is left without tokens, and `ts_batch_slot_faults` counts
/// it. Two rows whose blocks lie in one page, or that name one sequence, are not found: what is written there is then
/// one's or the other's.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_device_tables {
    /// `sizeof(ts_device_tables)`.
    pub struct_size: usize,
    /// Rows of `entries`.
    pub num_table_rows: usize,
    /// Entries of each row of `entries`.
    pub num_entries: usize,
    /// `[num_table_rows, num_entries]`: pages in token order, or the slot of each token.
    pub entries: *const i32,
    /// Whether the entries are slots of tokens (a token's page times the page size and its place in the page): 0 or 1.
    pub entries_are_slots: i32,
    /// 0.
    pub reserved: i32,
    /// `[num_rows]`, or null: the row of `entries` of each row of the batch. Null: the row with the same number.
    pub rows: *const i32,
    /// `[num_rows]`: tokens of each row, its block included; at least its block, or 0.
    pub kv_lens: *const i32,
    /// `[num_rows]`, or null: the row of the Selection Cache of each row, all different, -1 for none. Given exactly if
    /// the slot's batches have sequence indices.
    pub sequence_indices: *const i32,
    /// Pages of the pool, at least 1. A page number beyond it is a fault, and becomes the last page.
    pub num_pages: usize,
    /// Sequences of the Selection Cache. A sequence beyond it is a fault, and becomes none.
    pub num_sequences: usize,
}

/// A place for batches with the rows, blocks and page size of `like` and up to `max_pages` pages in all rows together.
///
/// Errors: `TS_STATUS_WRONG_DEVICE` for the processor, `TS_STATUS_LIMIT` for more pages than can be counted,
/// `TS_STATUS_OUT_OF_MEMORY`.
///
/// # Safety
/// - `device` and `like` are null or handles.
/// - `slot` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_slot_create(
    device: *const ts_device,
    like: *const ts_batch,
    max_pages: usize,
    slot: *mut *mut ts_batch_slot,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, like) = unsafe { (reference("device", device)?, reference("like", like)?) };
        let make = || {
            let (device, num_rows) = (device.device.clone(), like.batch.num_rows());
            Ok(ts_batch_slot { slot: BatchSlot::new(&device, &like.batch, max_pages)?, device, num_rows })
        };
        // SAFETY: as above.
        unsafe { hand_out("slot", slot, make) }
    })
}

/// Puts a copy of a batch in the slot, after the device's earlier work: work captured with `bound` reads whatever batch
/// was put there last when it is launched.
///
/// What was captured with a batch of this slot stays within its bounds: what the captured operations would refuse is
/// refused here, with the same statuses, and the slot holds what it held before.
///
/// Errors: `TS_STATUS_TABLE` where rows, blocks or page size are not the slot's, `TS_STATUS_LIMIT` for too many pages,
/// `TS_STATUS_INDEX` for pages and sequences beyond those of captured work, `TS_STATUS_MISSING` for a batch of
/// `ts_batch_slot_translate`.
///
/// # Safety
/// - `slot` and `batch` are null or handles; nothing else uses `slot` meanwhile.
/// - `bound` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_slot_put(
    slot: *mut ts_batch_slot,
    batch: *const ts_batch,
    bound: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (slot, batch) = unsafe { (reference_mut("slot", slot)?, reference("batch", batch)?) };
        let make = || Ok(ts_batch { batch: slot.slot.put(batch.batch.clone())? });
        // SAFETY: as above.
        unsafe { hand_out("bound", bound, make) }
    })
}

/// Puts the batch that an engine's tables on the device describe in the slot, in the device's order of work. Its rows
/// and blocks are the slot's; lengths and pages are the device's alone. Nothing passes through the host: this can be
/// captured, and does its work anew at each launch.
///
/// `bound` has no rows to be asked for: `ts_batch_get_row` answers `TS_STATUS_MISSING` and `ts_batch_get_info` the
/// largest that they may be.
///
/// Errors: `TS_STATUS_TABLE` where `sequence_indices` are given to a slot without them or the other way round,
/// `TS_STATUS_CONFIG` for no pages, `TS_STATUS_MISSING` where the slot is for parts of sequences, `TS_STATUS_LIMIT` and
/// `TS_STATUS_INDEX` where captured work may not be given as much, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`
/// and those of pointers, which are aligned to 4 bytes.
///
/// # Safety
/// - `slot` is null or a handle that nothing else uses meanwhile.
/// - `tables` is null or a structure of `tables->struct_size` bytes whose pointers are null or name arrays of the
///   stated lengths in memory of the slot's device, which live, unchanged, until its work is done, and while captured
///   work is launched.
/// - `bound` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_slot_translate(
    slot: *mut ts_batch_slot,
    tables: *const ts_device_tables,
    bound: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (slot, given) = unsafe { (reference_mut("slot", slot)?, sized::read(tables)?) };
        let ts_batch_slot { slot, device, num_rows } = slot;
        // SAFETY: as above.
        let make = || unsafe { Ok(ts_batch { batch: slot.translate(&given.view(device, *num_rows)?)? }) };
        // SAFETY: as above.
        unsafe { hand_out("bound", bound, make) }
    })
}

impl ts_device_tables {
    /// The library's tables.
    ///
    /// # Safety
    /// - The arrays are `device`'s and there during `'a`; nothing writes them until its work is done.
    unsafe fn view<'a>(&self, device: &'a Device, num_rows: usize) -> Result<TablesOnDevice<'a>> {
        let per_row = |what, data: *const i32| Argument::new(what, data.cast(), DType::U32, [num_rows]);
        let optional = |what, data: *const i32| {
            // SAFETY: the caller's promise.
            (!data.is_null()).then(|| unsafe { per_row(what, data).table(device) }).transpose()
        };
        expect_zero("tables.reserved", self.reserved)?;
        let are_slots = [(0, false), (1, true)];
        let slots = choose("tables.entries_are_slots", "0 or 1", self.entries_are_slots, &are_slots)?;
        let shape = [self.num_table_rows, self.num_entries];
        let entries = Argument::new("tables.entries", self.entries.cast(), DType::U32, shape);
        Ok(TablesOnDevice {
            // SAFETY: the caller's promise.
            entries: unsafe { entries.table(device)? },
            slots,
            rows: optional("tables.rows", self.rows)?,
            // SAFETY: the caller's promise.
            kv_lens: unsafe { per_row("tables.kv_lens", self.kv_lens).table(device)? },
            sequences: optional("tables.sequence_indices", self.sequence_indices)?,
            num_pages: self.num_pages,
            num_sequences: self.num_sequences,
        })
    }
}

/// How many rows `ts_batch_slot_translate` left without tokens, pages it replaced and sequences it left out since the
/// slot was made. Waits for the device's earlier work.
///
/// Errors: `TS_STATUS_DRIVER`, `TS_STATUS_MISSING` while work is being captured.
///
/// # Safety
/// - `slot` is null or a handle that nothing else uses meanwhile; `num_faults` is null or has room for a number,
///   written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_slot_faults(slot: *const ts_batch_slot, num_faults: *mut u32) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let slot = reference("slot", slot)?;
        answer("num_faults", num_faults, || Ok(slot.slot.faults()?))
    })
}

/// Gives a slot back. Null is nothing.
///
/// # Safety
/// - `slot` is null or a handle, used for the last time; no captured work that reads it is launched any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_slot_destroy(slot: *mut ts_batch_slot) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("slot", slot) })
}
