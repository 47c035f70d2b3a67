//! Reuse of selections between steps.

use tokenselect::{SelectionCache, SelectionCacheLayer, SelectionStats};

use crate::cache::ts_cache;
use crate::config::{read_config, ts_config};
use crate::device::ts_device;
use crate::pointers::{answer, hand_out, reference, reference_mut, take_back};
use crate::status::{Failure, Result, fence, ts_status};

/// Cached selections of every layer and sequence, for an engine with a cache of its own, which calls
/// `ts_selection_cache_clear`, `_fork` and `_truncate` whenever it does the same to a sequence; or those of a
/// `ts_cache`. One thread at a time.
#[derive(Debug)]
pub struct ts_selection_cache {
    selections: Selections,
}

#[derive(Debug)]
enum Selections {
    Own(Box<SelectionCache>),
    Of(*mut ts_cache),
}

impl ts_selection_cache {
    /// The selections of a cache.
    pub(crate) fn of(cache: *mut ts_cache) -> Self {
        ts_selection_cache { selections: Selections::Of(cache) }
    }

    /// The cached selections.
    ///
    /// # Safety
    /// - Where they belong to a `ts_cache`, that is alive and nothing else uses it meanwhile.
    unsafe fn get(&mut self) -> Result<&mut SelectionCache> {
        match &mut self.selections {
            Selections::Own(selections) => Ok(selections),
            Selections::Of(cache) => {
                // SAFETY: the caller's promise.
                let selections = unsafe { reference_mut("cache", *cache)? }.cache.selections_mut();
                selections.ok_or(Failure::Library(NO_SELECTIONS))
            }
        }
    }
}

/// The error for a cache made from a configuration without Selection Cache.
pub(crate) const NO_SELECTIONS: tokenselect::Error = tokenselect::Error::Missing {
    op: "ts_cache_selections",
    needs: "a cache whose configuration has selection_cache = 1",
};

/// A layer's selections, `None` for a null handle.
///
/// # Safety
/// - Null, or a handle that nothing else uses during `'a`.
pub(crate) unsafe fn layer_of<'a>(
    handle: *mut ts_selection_cache,
    layer: usize,
) -> Result<Option<SelectionCacheLayer<'a>>> {
    if handle.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let selections = unsafe { reference_mut("selection_cache", handle)?.get()? };
    Ok(Some(selections.layer_mut(layer)?))
}

/// What was done for the rows of past steps.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_selection_stats {
    /// Rows that used a cached selection again.
    pub reused: u64,
    /// Rows that were scored and selected anew.
    pub scored: u64,
    /// Rows so short that every token was selected without scoring.
    pub complete: u64,
}

impl From<SelectionStats> for ts_selection_stats {
    fn from(stats: SelectionStats) -> Self {
        let SelectionStats { reused, scored, complete } = stats;
        ts_selection_stats { reused, scored, complete }
    }
}

/// An empty Selection Cache on a device: `num_layers * num_sequences * (num_qo_heads * head_dim + top_k) * 4` bytes.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_CONFIG` where `config` or a number breaks a rule,
/// `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_DRIVER`.
///
/// # Safety
/// - `device` is null or a handle; `config` is null or holds `config->struct_size` bytes.
/// - `selections` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_create(
    device: *const ts_device,
    config: *const ts_config,
    num_layers: usize,
    num_sequences: usize,
    selections: *mut *mut ts_selection_cache,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config) = unsafe { (reference("device", device)?, read_config(config)?) };
        let make = || {
            let made = SelectionCache::new(&device.device, &config, num_layers, num_sequences)?;
            Ok(ts_selection_cache { selections: Selections::Own(Box::new(made)) })
        };
        // SAFETY: as above.
        unsafe { hand_out("selections", selections, make) }
    })
}

/// Runs `work` on the selections of a handle.
///
/// # Safety
/// - As for [`layer_of`].
unsafe fn with(
    handle: *mut ts_selection_cache,
    work: impl FnOnce(&mut SelectionCache) -> tokenselect::Result<()>,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| Ok(work(unsafe { reference_mut("selections", handle)?.get()? })?))
}

/// Forgets the selections of one sequence, in all layers. Errors: `TS_STATUS_INDEX`.
///
/// # Safety
/// - `selections` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_clear(
    selections: *mut ts_selection_cache,
    sequence: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with(selections, |selections| selections.clear(sequence)) }
}

/// Copies the selections of sequence `src` to `dst`, in all layers. Errors: `TS_STATUS_INDEX`.
///
/// # Safety
/// - `selections` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_fork(
    selections: *mut ts_selection_cache,
    src: usize,
    dst: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with(selections, |selections| selections.fork(src, dst)) }
}

/// Forgets those selections of a sequence cut to `len` tokens that could name a token that is gone. Errors:
/// `TS_STATUS_INDEX`.
///
/// # Safety
/// - `selections` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_truncate(
    selections: *mut ts_selection_cache,
    sequence: usize,
    len: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with(selections, |selections| selections.truncate(sequence, len)) }
}

/// What was done so far, summed over layers. Waits for the device's earlier work.
///
/// # Safety
/// - `selections` is null or a handle that nothing else uses meanwhile; `stats` is null or has room for the structure,
///   written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_stats(
    selections: *mut ts_selection_cache,
    stats: *mut ts_selection_stats,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let selections = reference_mut("selections", selections)?.get()?;
        answer("stats", stats, || Ok(selections.stats()?.into()))
    })
}

/// What was done so far in one layer. Waits for the device's earlier work. Errors: `TS_STATUS_INDEX`.
///
/// # Safety
/// - As for `ts_selection_cache_stats`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_layer_stats(
    selections: *mut ts_selection_cache,
    layer: usize,
    stats: *mut ts_selection_stats,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let selections = reference_mut("selections", selections)?.get()?;
        answer("stats", stats, || Ok(selections.layer_stats(layer)?.into()))
    })
}

/// Sets all counters to 0; cached selections stay.
///
/// # Safety
/// - `selections` is null or a handle that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_reset_stats(selections: *mut ts_selection_cache) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with(selections, SelectionCache::reset_stats) }
}

/// Gives a Selection Cache back, after the device's earlier work. Null is nothing. Those of a `ts_cache` stay in it.
///
/// # Safety
/// - `selections` is null or a handle, used for the last time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_selection_cache_destroy(selections: *mut ts_selection_cache) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("selections", selections) })
}
