//! Prompts of any length, piece by piece.

use std::ffi::c_void;
use std::ops::ControlFlow;

use tokenselect::{
    Batch, LayerMut, Pieces, PrefillConfig, PrefillProgress, SequenceId, StepInput, TokenSelect,
};

use crate::batch::ts_batch;
use crate::cache::{given_apart, ts_cache, ts_sequence};
use crate::config::{read_config, ts_config};
use crate::context::ts_context;
use crate::device::ts_device;
use crate::kv::ts_kv_view;
use crate::ops::{NewKv, Output, Queries, ts_output, ts_step_input};
use crate::pointers::{answer, hand_out, reference, reference_mut, slice, take_back};
use crate::selection_cache::{layer_of, ts_selection_cache};
use crate::sized;
use crate::status::{fence, ts_status};

/// How prompts are read, and the memory for it. Filled by `ts_prefill_config_default`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_prefill_config {
    /// `sizeof(ts_prefill_config)`.
    pub struct_size: usize,
    /// Tokens of a block. A dial, from about 4 to 512: short blocks are nearer to dense attention and cost more passes over
    /// the keys; long blocks pool many queries into one and are fastest. Default 512, the paper's.
    pub block_len: usize,
    /// The most tokens that a sequence has when its prompt has been read. Default 131072.
    pub max_kv_len: usize,
    /// The most tokens of a piece, which is the work of one step and of one call of a `ts_progress`; where it is less
    /// than a block, a piece is one block. Default 8192.
    pub max_piece_len: usize,
    /// The most bytes of the workspace; where they have no room for a piece of `max_piece_len`, pieces are shorter. Default
    /// 1 GiB.
    pub max_workspace_bytes: usize,
}

/// A batch of prompts, of any number of tokens each, as pieces that one step of a context has room for. Made once for all
/// layers. Prompts are read one after the other: pieces are parts of the query tokens, in their order.
///
/// Never changes. Tables of the first pieces, up to 64 MiB, are kept here and on the device; those of others are made
/// whenever a layer comes to them.
#[derive(Debug)]
pub struct ts_pieces {
    pieces: Pieces,
}

/// Sizes of pieces.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_pieces_info {
    /// Pieces.
    pub num_pieces: usize,
    /// Blocks of all pieces.
    pub num_blocks: usize,
    /// Query tokens of all pieces: the leading dimension of `q`, `k`, `v` and `out`.
    pub num_query_tokens: usize,
    /// Tokens of a block; the last one of a prompt may have fewer.
    pub block_len: usize,
}

/// Is told after each piece of a layer how many query tokens are done, and of how many; on a GPU, when the work is in the
/// stream. `user_data` is what was given with it. Answers 0 to go on, anything else to stop. Must not unwind.
pub type ts_progress = Option<unsafe extern "C" fn(user_data: *mut c_void, done: usize, total: usize) -> i32>;

/// Fills a configuration with defaults: blocks of 512, sequences of up to 131072 tokens, pieces of 8192, a workspace of
/// 1 GiB. `struct_size` is `sizeof(ts_prefill_config)`.
///
/// # Safety
/// - `prefill` is null or has room for `struct_size` bytes, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_prefill_config_default(
    prefill: *mut ts_prefill_config,
    struct_size: usize,
) -> ts_status {
    let PrefillConfig { block_len, max_kv_len, max_piece_len, max_workspace_bytes } =
        PrefillConfig::default();
    let value = ts_prefill_config { struct_size, block_len, max_kv_len, max_piece_len, max_workspace_bytes };
    // SAFETY: the caller's promise.
    fence(|| unsafe { sized::write(prefill, struct_size, value) })
}

/// A context that reads prompts, with a workspace of no more than `max_workspace_bytes`: its limits are as many blocks a
/// step as that and the piece have room for. It selects for blocks alone; decoding has a context of its own, over the same
/// cache.
///
/// Errors: `TS_STATUS_CONFIG` where a field breaks its rule, and where the workspace has no room for one block, with the
/// bytes that it needs; those of `ts_context_create`.
///
/// # Safety
/// - `device` is null or a handle; `config` and `prefill` are null or hold as many bytes as their `struct_size`.
/// - `context` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_create_prefill(
    device: *const ts_device,
    config: *const ts_config,
    prefill: *const ts_prefill_config,
    context: *mut *mut ts_context,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config, given) = unsafe {
            let device = &reference("device", device)?.device;
            (device.clone(), read_config(config)?, sized::read(prefill)?)
        };
        let ts_prefill_config { block_len, max_kv_len, max_piece_len, max_workspace_bytes, .. } = given;
        let prefill = PrefillConfig { block_len, max_kv_len, max_piece_len, max_workspace_bytes };
        let make = || Ok(ts_context { select: TokenSelect::for_prefill(&device, config, &prefill)?, device });
        // SAFETY: as above.
        unsafe { hand_out("context", context, make) }
    })
}

/// Makes room for whole prompts: `ts_cache_extend` by any number of new tokens of each sequence, cut into blocks of
/// `block_len` tokens, and these into pieces within the limits of `context`. A context of `ts_context_create_prefill` takes
/// blocks of any length up to its own.
///
/// Errors: `TS_STATUS_LIMIT` where a block alone is beyond the limits, `TS_STATUS_CONFIG` for blocks of no tokens, and those
/// of `ts_cache_extend`. Then nothing grew.
///
/// # Safety
/// - `cache` and `context` are null or handles; nothing else uses `cache` meanwhile.
/// - `sequences` and `num_tokens` are null or hold `num_rows` entries.
/// - `pieces` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_extend_in_pieces(
    cache: *mut ts_cache,
    context: *const ts_context,
    sequences: *const ts_sequence,
    num_tokens: *const usize,
    num_rows: usize,
    block_len: usize,
    pieces: *mut *mut ts_pieces,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (cache, context, sequences, num_tokens) = unsafe {
            let (cache, context) = (reference_mut("cache", cache)?, reference("context", context)?);
            let sequences = slice("sequences", sequences, num_rows)?;
            (cache, context, sequences, slice("num_tokens", num_tokens, num_rows)?)
        };
        let ids = sequences.iter().map(|&bits| SequenceId::from_bits(bits));
        let growth: Vec<(SequenceId, usize)> = ids.zip(num_tokens.iter().copied()).collect();
        let limits = context.select.plan().limits();
        let make = || Ok(ts_pieces { pieces: cache.cache.extend_in_pieces(limits, &growth, block_len)? });
        // SAFETY: as above.
        unsafe { hand_out("pieces", pieces, make) }
    })
}

/// The pieces of another engine's prompts. The batch has all tokens of each prompt in one row; the rest is as for
/// `ts_cache_extend_in_pieces`.
///
/// Errors: `TS_STATUS_LIMIT` where a block alone is beyond the limits of `context`, `TS_STATUS_CONFIG` for blocks of no
/// tokens, `TS_STATUS_MISSING` where the rows are parts of sequences, blocks already, or the device's alone.
///
/// # Safety
/// - `batch` and `context` are null or handles.
/// - `pieces` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_batch_in_pieces(
    batch: *const ts_batch,
    context: *const ts_context,
    block_len: usize,
    pieces: *mut *mut ts_pieces,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (batch, context) = unsafe { (&reference("batch", batch)?.batch, reference("context", context)?) };
        let limits = context.select.plan().limits();
        let make = || Ok(ts_pieces { pieces: batch.in_pieces(limits, block_len)? });
        // SAFETY: as above.
        unsafe { hand_out("pieces", pieces, make) }
    })
}

/// Sizes of pieces.
///
/// # Safety
/// - `pieces` is null or a handle; `info` is null or has room for the structure, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_pieces_get_info(
    pieces: *const ts_pieces,
    info: *mut ts_pieces_info,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let pieces = unsafe { &reference("pieces", pieces)?.pieces };
        let make = || {
            Ok(ts_pieces_info {
                num_pieces: pieces.len(),
                num_blocks: pieces.num_blocks(),
                num_query_tokens: pieces.whole().num_query_tokens(),
                block_len: pieces.block_len(),
            })
        };
        // SAFETY: as above.
        unsafe { answer("info", info, make) }
    })
}

/// Gives pieces back. Null is nothing. On a GPU, their tables are freed after the device's earlier work.
///
/// # Safety
/// - `pieces` is null or a handle, used for the last time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_pieces_destroy(pieces: *mut ts_pieces) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("pieces", pieces) })
}

/// Reads prompts in one layer of an owned cache: for each piece in turn, appends its keys and values, selects for its blocks,
/// attends, and calls `progress`, which may be null. The result is that of a `ts_step` for each piece, bit by bit: a block
/// selects from the tokens before it with its own windows.
///
/// `pieces` come from `ts_cache_extend_in_pieces`; `input` and `output` have the query tokens of all of them. Cached
/// selections of the sequences that grow are dropped. Where `progress` stops, this answers `TS_STATUS_OK`.
///
/// Errors: those of `ts_step`, and `TS_STATUS_MISSING` while work is captured. All of these are found before the first piece,
/// and then nothing was written. After a stop, or an error of the device (`TS_STATUS_DRIVER`, `TS_STATUS_LAUNCH`), the layer
/// and the outputs have the pieces before it (`ts_cache_written_len`). The same call may be made again, and begins anew; or
/// `ts_cache_sequence_truncate` takes the sequences back to what all layers have.
///
/// # Safety
/// - Handles are null or handles of one device; nothing else uses `context` and `cache` meanwhile, `progress` neither.
/// - `input` and `output` are as for `ts_step`.
/// - `progress` is null or may be called with `user_data` and does not unwind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_prefill(
    context: *mut ts_context,
    cache: *mut ts_cache,
    layer: usize,
    pieces: *const ts_pieces,
    input: *const ts_step_input,
    output: *const ts_output,
    progress: ts_progress,
    user_data: *mut c_void,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, cache, pieces, input, output) = unsafe {
            (
                reference_mut("context", context)?,
                reference_mut("cache", cache)?,
                &reference("pieces", pieces)?.pieces,
                sized::read(input)?,
                sized::read(output)?,
            )
        };
        let (queries, new, output) = given_apart(context, cache, layer, pieces.whole(), (&input, &output))?;
        let device = context.device.clone();
        // SAFETY: as above, and outputs are apart from inputs.
        let (q, (k, v), output) =
            unsafe { (queries.view(&device)?, new.views(&device)?, output.view(&device)?) };
        let layer = cache.cache.layer_mut(layer)?;
        // SAFETY: as above.
        let told = |at| unsafe { tell(progress, user_data, at) };
        context.select.prefill(layer, pieces, StepInput { q, k, v }, output, told)?;
        Ok(())
    })
}

/// As `ts_prefill`, over another engine's memory: `pieces` come from `ts_batch_in_pieces`. What `selection_cache`, which may
/// be null, holds in `layer` for the sequences that grow is dropped.
///
/// Errors: those of `ts_append_select` and `ts_attend`, and `TS_STATUS_MISSING` while work is captured; found before the
/// first piece, as in `ts_prefill`.
///
/// # Safety
/// - As for `ts_append_select` and `ts_attend`; nothing else uses `context`, `selection_cache` and the pages of the pieces
///   meanwhile, `progress` neither.
/// - `progress` is null or may be called with `user_data` and does not unwind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_prefill_kv(
    context: *mut ts_context,
    pieces: *const ts_pieces,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    output: *const ts_output,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
    progress: ts_progress,
    user_data: *mut c_void,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, pieces, kv, input, output, selections) = unsafe {
            (
                reference_mut("context", context)?,
                &reference("pieces", pieces)?.pieces,
                sized::read(kv)?,
                sized::read(input)?,
                sized::read(output)?,
                layer_of(selection_cache, layer)?,
            )
        };
        let (device, dtype) = (context.device.clone(), context.select.config().dtype);
        let batch: &Batch = pieces.whole();
        let (queries, new) = (Queries::of(context, batch, &input), NewKv::of(context, batch, &input));
        let output = Output::of(context, batch.num_query_tokens(), &output)?;
        let [k_pages, v_pages] = kv.arguments(dtype)?;
        output.expect_apart(&[queries.0, new.k, new.v, k_pages, v_pages])?;
        for pages in [k_pages, v_pages] {
            pages.expect_apart(&[new.k, new.v, queries.0])?;
        }
        // SAFETY: as above, and what is written is apart from what is read.
        let (q, (k, v), output, kv) = unsafe {
            (queries.view(&device)?, new.views(&device)?, output.view(&device)?, kv.view_mut(&device, dtype)?)
        };
        // SAFETY: as above.
        let told = |at| unsafe { tell(progress, user_data, at) };
        let (layer, input) = (LayerMut { kv, selections }, StepInput { q, k, v });
        context.select.prefill(layer, pieces, input, output, told)?;
        Ok(())
    })
}

/// Calls the caller's function, if there is one.
///
/// # Safety
/// - It is null, or may be called with `user_data` and does not unwind.
unsafe fn tell(progress: ts_progress, user_data: *mut c_void, at: PrefillProgress) -> ControlFlow<()> {
    // SAFETY: the caller's promise.
    match progress.map_or(0, |progress| unsafe { progress(user_data, at.done, at.total) }) {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    }
}
