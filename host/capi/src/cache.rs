//! The owned cache: keys and values of many sequences in shared pages, and steps on it.

use std::ffi::c_void;

use tokenselect::{Batch, PagedKvCache, SequenceId, StepInput};

use crate::batch::ts_batch;
use crate::config::{read_cache_config, read_config, ts_cache_config, ts_config};
use crate::context::ts_context;
use crate::device::ts_device;
use crate::kv::ts_kv_view;
use crate::ops::{NewKv, Output, Queries, ts_output, ts_step_input};
use crate::pointers::{Argument, answer, hand_out, reference, reference_mut, slice, take_back};
use crate::selection_cache::{NO_SELECTIONS, ts_selection_cache, ts_selection_stats};
use crate::sized;
use crate::status::{Result, fence, ts_status};

/// Names a sequence of one cache. A name is never used twice.
pub type ts_sequence = u64;

/// An owned paged cache: memory, page tables and Selection Cache. One thread at a time.
#[derive(Debug)]
pub struct ts_cache {
    pub(crate) cache: PagedKvCache,
}

/// Allocates an empty cache on a device, with a Selection Cache if `config` asks for one: `2 * num_layers * num_pages *
/// page_size * num_kv_heads * head_dim` elements.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_DRIVER`.
///
/// # Safety
/// - `device` is null or a handle; `config` and `cache_config` are null or hold as many bytes as their `struct_size`.
/// - `cache` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_create(
    device: *const ts_device,
    config: *const ts_config,
    cache_config: *const ts_cache_config,
    cache: *mut *mut ts_cache,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config, cache_config) = unsafe {
            let device = &reference("device", device)?.device;
            (device.clone(), read_config(config)?, read_cache_config(cache_config)?)
        };
        let make = || Ok(ts_cache { cache: PagedKvCache::new(&device, &config, &cache_config)? });
        // SAFETY: as above.
        unsafe { hand_out("cache", cache, make) }
    })
}

/// Gives a cache back, after the device's earlier work. Null is nothing.
///
/// # Safety
/// - `cache` is null or a handle, used for the last time; so are views of its layers and its selections.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_destroy(cache: *mut ts_cache) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("cache", cache) })
}

/// Adds an empty sequence. Errors: `TS_STATUS_TOO_MANY_SEQUENCES`.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile; `sequence` is null or has room for one, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_sequence_create(
    cache: *mut ts_cache,
    sequence: *mut ts_sequence,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference_mut("cache", cache)?;
        answer("sequence", sequence, || Ok(cache.cache.create()?.to_bits()))
    })
}

/// Adds a sequence with the same tokens and cached selections. Pages are shared until one of the two writes into them.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_TOO_MANY_SEQUENCES`.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile; `child` is null or has room for one, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_sequence_fork(
    cache: *mut ts_cache,
    sequence: ts_sequence,
    child: *mut ts_sequence,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference_mut("cache", cache)?;
        answer("child", child, || Ok(cache.cache.fork(SequenceId::from_bits(sequence))?.to_bits()))
    })
}

/// Drops the tokens of a sequence from `len` on, and every cached selection that could name one of them.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_TRUNCATE_BEYOND_END`.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_sequence_truncate(
    cache: *mut ts_cache,
    sequence: ts_sequence,
    len: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    let cache = || unsafe { reference_mut("cache", cache) };
    fence(|| Ok(cache()?.cache.truncate(SequenceId::from_bits(sequence), len)?))
}

/// Ends a sequence; pages that no fork holds become free. Errors: `TS_STATUS_UNKNOWN_SEQUENCE`.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_sequence_free(cache: *mut ts_cache, sequence: ts_sequence) -> ts_status {
    // SAFETY: the caller's promise.
    let cache = || unsafe { reference_mut("cache", cache) };
    fence(|| Ok(cache()?.cache.free(SequenceId::from_bits(sequence))?))
}

/// Tokens of a sequence. Errors: `TS_STATUS_UNKNOWN_SEQUENCE`.
///
/// # Safety
/// - `cache` is null or a handle that nothing changes meanwhile; `len` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_sequence_len(
    cache: *const ts_cache,
    sequence: ts_sequence,
    len: *mut usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference("cache", cache)?;
        answer("len", len, || Ok(cache.cache.len(SequenceId::from_bits(sequence))?))
    })
}

/// Leading tokens of a sequence whose keys and values a layer has: less than `ts_cache_sequence_len` between
/// `ts_cache_extend` and the layer's step. A layer that was left out of a step, or whose step failed, stays behind, and
/// its next step answers `TS_STATUS_UNWRITTEN`. Two ways lead back: the layer's step with the batch that it missed,
/// which is valid until its sequences are truncated or forked; or `ts_cache_sequence_truncate` to the shortest of the
/// layers.
///
/// Errors: `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_INDEX` where there is no such layer.
///
/// # Safety
/// - `cache` is null or a handle that nothing changes meanwhile; `len` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_written_len(
    cache: *const ts_cache,
    layer: usize,
    sequence: ts_sequence,
    len: *mut usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference("cache", cache)?;
        answer("len", len, || Ok(cache.cache.written_len(layer, SequenceId::from_bits(sequence))?))
    })
}

/// Pages that no sequence holds.
///
/// # Safety
/// - `cache` is null or a handle that nothing changes meanwhile; `num_pages` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_num_free_pages(cache: *const ts_cache, num_pages: *mut usize) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference("cache", cache)?;
        answer("num_pages", num_pages, || Ok(cache.cache.pages().num_free_pages()))
    })
}

/// Makes room for a block of new tokens of each sequence named, all or nothing, and hands out the batch whose rows are
/// these sequences in this order. Once for all layers. A length of 0 is a padding row.
///
/// A batch beyond the limits of a context is refused by its steps. Nothing is lost then: `ts_cache_sequence_truncate` takes
/// each sequence back to its length before, to be extended by less.
///
/// Errors: `TS_STATUS_OUT_OF_PAGES`, `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_DUPLICATE_SEQUENCE`,
/// `TS_STATUS_SEQUENCE_TOO_LONG`.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile.
/// - `sequences` and `num_tokens` are null or hold `num_rows` entries.
/// - `batch` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_extend(
    cache: *mut ts_cache,
    sequences: *const ts_sequence,
    num_tokens: *const usize,
    num_rows: usize,
    batch: *mut *mut ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (cache, sequences, num_tokens) = unsafe {
            let cache = reference_mut("cache", cache)?;
            (cache, slice("sequences", sequences, num_rows)?, slice("num_tokens", num_tokens, num_rows)?)
        };
        let ids = sequences.iter().map(|&bits| SequenceId::from_bits(bits));
        let growth: Vec<(SequenceId, usize)> = ids.zip(num_tokens.iter().copied()).collect();
        // SAFETY: as above.
        unsafe { hand_out("batch", batch, || Ok(ts_batch { batch: cache.cache.extend(&growth)? })) }
    })
}

/// A layer's keys and values, to read: for `ts_score`, `ts_select`, `ts_attend` and kernels of the caller's own. To
/// write them use `ts_cache_append`, or `ts_cache_layer_mut`, so that the cache knows of it.
///
/// `struct_size` is `sizeof(ts_kv_view)`; it is written to `kv->struct_size`. Errors: `TS_STATUS_INDEX` where there is
/// no such layer, `TS_STATUS_STRUCT_SIZE`.
///
/// # Safety
/// - `cache` is null or a handle that nothing changes meanwhile. The view is valid as long as the cache.
/// - `kv` is null or has room for `struct_size` bytes, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_layer(
    cache: *const ts_cache,
    layer: usize,
    kv: *mut ts_kv_view,
    struct_size: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference("cache", cache)?;
        sized::write(kv, struct_size, cache.layer_view(layer)?)
    })
}

/// As `ts_cache_layer`, for kernels of the caller's own that write keys and values on a GPU: all tokens that the
/// sequences have now count as written in this layer. (On the processor use `ts_cache_append`.)
///
/// Errors: as `ts_cache_layer`.
///
/// # Safety
/// - As for `ts_cache_layer`, and nothing else uses `cache` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_layer_mut(
    cache: *mut ts_cache,
    layer: usize,
    kv: *mut ts_kv_view,
    struct_size: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference_mut("cache", cache)?;
        sized::write(kv, struct_size, cache.layer_view(layer)?)?;
        Ok(cache.cache.mark_written(layer)?)
    })
}

impl ts_cache {
    fn layer_view(&self, layer: usize) -> Result<ts_kv_view> {
        let layer = self.cache.layer(layer)?;
        let shape = layer.shape();
        let mut view = ts_kv_view {
            struct_size: size_of::<ts_kv_view>(),
            k: address(layer.k())?,
            v: address(layer.v())?,
            num_pages: shape.num_pages,
            page_size: shape.page_size,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            k_stride_page: 0,
            k_stride_token: 0,
            k_stride_head: 0,
            v_stride_page: 0,
            v_stride_token: 0,
            v_stride_head: 0,
        };
        view.set_strides(layer.strides());
        Ok(view)
    }
}

/// Checks that nothing given is memory of a layer's, where there is such a layer.
fn expect_apart_from_pages(cache: &ts_cache, layer: usize, given: &[Argument]) -> Result<()> {
    let Ok(view) = cache.layer_view(layer) else { return Ok(()) };
    view.arguments(cache.cache.dtype())?.iter().try_for_each(|pages| pages.expect_apart(given))
}

/// The tensors of a step of a layer, none of which is part of an output or of the layer.
pub(crate) fn given_apart(
    context: &ts_context,
    cache: &ts_cache,
    layer: usize,
    batch: &Batch,
    (input, output): (&ts_step_input, &ts_output),
) -> Result<(Queries, NewKv, Output)> {
    let (queries, new) = (Queries::of(context, batch, input), NewKv::of(context, batch, input));
    let output = Output::of(context, batch.num_query_tokens(), output)?;
    output.expect_apart(&[queries.0, new.k, new.v])?;
    let outputs = output.arguments();
    expect_apart_from_pages(cache, layer, &[&outputs[..], &[queries.0, new.k, new.v]].concat())?;
    Ok((queries, new, output))
}

/// Address of the first element, wherever it lies.
fn address(tensor: tokenselect::TensorView<'_>) -> Result<*mut c_void> {
    use tokenselect::DType;
    if let Ok(addr) = tensor.device_addr() {
        return Ok(std::ptr::without_provenance_mut(addr as usize));
    }
    let first: *const c_void = match tensor.dtype() {
        DType::F16 => tensor.as_slice::<half::f16>()?.as_ptr().cast(),
        DType::Bf16 => tensor.as_slice::<half::bf16>()?.as_ptr().cast(),
        _ => tensor.as_slice::<f32>()?.as_ptr().cast(),
    };
    Ok(first.cast_mut())
}

/// The Selection Cache of an owned cache, for `ts_select` and the like. A handle of its own, to be destroyed before the
/// cache; using it counts as using the cache.
///
/// Errors: `TS_STATUS_MISSING` where the cache has none.
///
/// # Safety
/// - `cache` is null or a handle that nothing else uses meanwhile.
/// - `selections` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_selections(
    cache: *mut ts_cache,
    selections: *mut *mut ts_selection_cache,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let has = unsafe { reference("cache", cache)? }.cache.selections().is_some();
        let make = || if has { Ok(ts_selection_cache::of(cache)) } else { Err(NO_SELECTIONS.into()) };
        // SAFETY: as above.
        unsafe { hand_out("selections", selections, make) }
    })
}

/// How often selections were reused and made, summed over layers; zeros without a Selection Cache. Waits for the
/// device's earlier work.
///
/// # Safety
/// - `cache` is null or a handle that nothing changes meanwhile; `stats` is null or has room for the structure,
///   written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_stats(cache: *const ts_cache, stats: *mut ts_selection_stats) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let cache = reference("cache", cache)?;
        answer("stats", stats, || Ok(cache.cache.selection_stats()?.into()))
    })
}

/// Writes the keys and values of each row's block into the pages of a layer.
///
/// Of `input` this reads `k` and `v`, which are not the cache's own. `batch` comes from `ts_cache_extend`.
///
/// Errors: `TS_STATUS_UNWRITTEN` where the layer was left out of an earlier step (`ts_cache_written_len`),
/// `TS_STATUS_STALE_BATCH`, `TS_STATUS_UNKNOWN_SEQUENCE`, `TS_STATUS_INDEX` where there is no such layer,
/// `TS_STATUS_LIMIT`, `TS_STATUS_CONFIG` where positions are not the cache's and for strides that the device cannot go,
/// `TS_STATUS_MISSING` for a batch that this cache did not make, one whose slot holds another, and a context without
/// `TS_OPERATION_APPEND`, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE` and those of pointers. Then nothing was written.
///
/// # Safety
/// - Handles are null or handles; nothing else uses `cache` meanwhile.
/// - `input` is null or a structure of `struct_size` bytes, whose `k` and `v` are memory of the device that lives,
///   unchanged, until its work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_append(
    context: *const ts_context,
    cache: *mut ts_cache,
    layer: usize,
    batch: *const ts_batch,
    input: *const ts_step_input,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, cache, batch, input) = unsafe {
            (
                reference("context", context)?,
                reference_mut("cache", cache)?,
                &reference("batch", batch)?.batch,
                sized::read(input)?,
            )
        };
        let new = NewKv::of(context, batch, &input);
        expect_apart_from_pages(cache, layer, &[new.k, new.v])?;
        // SAFETY: as above.
        let (k, v) = unsafe { new.views(&context.device)? };
        Ok(context.select.fill(&mut cache.cache, layer, batch, k, v)?)
    })
}

/// One step of one layer of an owned cache: append keys and values, select, attend.
///
/// `batch` comes from `ts_cache_extend`. Selections are reused if both the context's and the cache's configuration have
/// a Selection Cache. On a GPU this returns as soon as everything is in the stream; what was wrong with it by then is
/// found at a later call.
///
/// Errors: those of `ts_cache_append` and of `ts_attend`, `TS_STATUS_ORDER` excepted; the context needs all operations.
/// Then nothing was written. After an error of the device (`TS_STATUS_DRIVER`, `TS_STATUS_LAUNCH`) the layer counts as
/// not written, and the same step may be done again.
///
/// # Safety
/// - Handles are null or handles of one device; nothing else uses `context` and `cache` meanwhile.
/// - `input` and `output` are null or structures of `struct_size` bytes whose pointers are memory of the device with
///   the stated shapes, which lives, unchanged by others, until the device's work is done. Nothing is in the context's
///   workspace.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_step(
    context: *mut ts_context,
    cache: *mut ts_cache,
    layer: usize,
    batch: *const ts_batch,
    input: *const ts_step_input,
    output: *const ts_output,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { step(context, cache, layer, batch, (input, output, Kind::Select)) })
}

/// As `ts_step`, with dense attention: append keys and values, attend to all tokens. Errors: those of `ts_step`; the
/// context needs `TS_OPERATION_APPEND` and `_ATTEND` alone.
///
/// # Safety
/// - As for `ts_step`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_step_dense(
    context: *mut ts_context,
    cache: *mut ts_cache,
    layer: usize,
    batch: *const ts_batch,
    input: *const ts_step_input,
    output: *const ts_output,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { step(context, cache, layer, batch, (input, output, Kind::Dense)) })
}

enum Kind {
    Select,
    Dense,
}

/// # Safety
/// - As for [`ts_step`].
unsafe fn step(
    context: *mut ts_context,
    cache: *mut ts_cache,
    layer: usize,
    batch: *const ts_batch,
    (input, output, kind): (*const ts_step_input, *const ts_output, Kind),
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (context, cache, batch, input, output) = unsafe {
        (
            reference_mut("context", context)?,
            reference_mut("cache", cache)?,
            &reference("batch", batch)?.batch,
            sized::read(input)?,
            sized::read(output)?,
        )
    };
    let (queries, new, output) = given_apart(context, cache, layer, batch, (&input, &output))?;
    let device = context.device.clone();
    // SAFETY: as above, and outputs are apart from inputs.
    let (q, (k, v), output) = unsafe { (queries.view(&device)?, new.views(&device)?, output.view(&device)?) };
    let (input, cache) = (StepInput { q, k, v }, &mut cache.cache);
    match kind {
        Kind::Select => context.select.step(cache, layer, batch, input, output)?,
        Kind::Dense => context.select.step_dense(cache, layer, batch, input, output)?,
    }
    Ok(())
}
