//! The object that runs steps: configuration, limits and workspace.

use std::ffi::c_void;

use tokenselect::{Buffer, Device, Error, Plan, TokenSelect, Workspace};

use crate::batch::ts_batch;
use crate::config::{choose, dtype_code, read_config, read_limits, ts_config, ts_limits};
use crate::device::{address, ts_device};
use crate::pointers::{answer, hand_out, reference, reference_mut, slice_mut, take_back};
use crate::status::{Failure, fence, ts_status};

/// Runs steps and operations: configuration, limits and workspace. One context serves all layers and sequences of a
/// model in turn; one thread at a time.
#[derive(Debug)]
pub struct ts_context {
    pub(crate) device: Device,
    pub(crate) select: TokenSelect,
}

/// Buffers between the operations of a step. Rows are rows of the batch; token `j` of a row is at
/// `ts_batch_row.token_base + j`. Entries that the current batch does not use are undefined.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_workspace {
    /// `[max_rows, num_qo_heads, head_dim]` f32, written by pool: the scoring queries.
    Queries = 0,
    /// `[max_rows]` f32, written by pool and decide: cosine with the cached scoring query; -1 where there is none.
    Similarities = 1,
    /// `[max_rows]` u32, written by pool and decide: a `ts_row_action`.
    Actions = 2,
    /// `[places, num_qo_heads]` f32, written by score for candidates: scaled dot products. `places` is somewhat more
    /// than `max_kv_tokens`, and the order is the device's own, which `ts_context_logit_index` tells. On the processor
    /// `[token_base + token, num_qo_heads]`; on GPUs tiles of `[num_kv_heads, 16 tokens, num_qo_heads / num_kv_heads]`,
    /// each row from a tile of its own on.
    Logits = 3,
    /// `[max_rows, num_qo_heads, 2]` f32, written by score: the largest logit, and the sum of `exp(logit - largest)`.
    Stats = 4,
    /// `[max_kv_tokens]` f32, written by vote for candidates: softmax probabilities summed over heads.
    Votes = 5,
    /// `[max_kv_tokens]` f32, written by top-k where `vote_pool_window` is above 1 (else `[0]`): max-pooled votes.
    PooledVotes = 6,
    /// `[max_rows, top_k]` u32, written by top-k: chosen tokens, ascending.
    TopK = 7,
    /// `[max_rows, width]` u32, written by top-k: selected tokens, ascending.
    Selected = 8,
    /// `[max_rows]` u32, written by top-k: length of each selected list.
    SelectedLen = 9,
    /// `[max_rows, 3]` f64, written by compare: scoring query times cached one, scoring query squared, cached one squared,
    /// each over all heads of this context; zeros where no cached selection is usable.
    Products = 10,
}

/// What a step does for a row, as `TS_WORKSPACE_ACTIONS` holds it.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_row_action {
    /// Nothing: the row has no queries, or no tokens.
    Skip = 0,
    /// There are at most `top_k` candidates: every token is selected.
    Complete = 1,
    /// Score, vote and select.
    Score = 2,
    /// Use the cached selection again.
    Reuse = 3,
}

/// Address, type and shape of a dense tensor of the library's.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_tensor {
    /// First element: an address of the device, of the host for the processor. Null or any address for an empty tensor.
    pub data: *mut c_void,
    /// A `ts_dtype`.
    pub dtype: i32,
    /// Dimensions used of `shape`.
    pub rank: u32,
    /// Outermost first; 1 beyond the rank.
    pub shape: [usize; 4],
}

/// Validates the configuration and allocates a workspace, `ts_workspace_bytes` in all, for batches within the limits.
///
/// On a GPU this loads the kernels of the operations in `limits`, which takes seconds the first time that its driver
/// compiles them. One of whole steps (`ts_step`) needs all operations.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`, `TS_STATUS_UNSUPPORTED` where a GPU has no kernel for the configuration
/// (`ts_device_supports` tells before), `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_DRIVER`.
///
/// # Safety
/// - `device` is null or a handle; `config` and `limits` are null or hold as many bytes as their `struct_size`.
/// - `context` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_create(
    device: *const ts_device,
    config: *const ts_config,
    limits: *const ts_limits,
    context: *mut *mut ts_context,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config, (limits, operations)) = unsafe {
            let device = &reference("device", device)?.device;
            (device.clone(), read_config(config)?, read_limits(limits)?)
        };
        let make = || {
            let plan = Plan::new(&device, config, limits, operations)?;
            Ok(ts_context { select: TokenSelect::with_plan(plan)?, device })
        };
        // SAFETY: as above.
        unsafe { hand_out("context", context, make) }
    })
}

/// Bytes of the workspace that `ts_context_create` would allocate with the same arguments. Allocates nothing on the
/// device.
///
/// Errors: as `ts_context_create`.
///
/// # Safety
/// - As for `ts_context_create`; `num_bytes` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_workspace_bytes(
    device: *const ts_device,
    config: *const ts_config,
    limits: *const ts_limits,
    num_bytes: *mut usize,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config, (limits, operations)) =
            unsafe { (reference("device", device)?, read_config(config)?, read_limits(limits)?) };
        let make = || Ok(Workspace::num_bytes(&Plan::new(&device.device, config, limits, operations)?)?);
        // SAFETY: as above.
        unsafe { answer("num_bytes", num_bytes, make) }
    })
}

/// Gives a context back, after the device's earlier work. Null is nothing.
///
/// # Safety
/// - `context` is null or a handle, used for the last time; so are pointers into its workspace.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_destroy(context: *mut ts_context) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("context", context) })
}

/// One buffer of the workspace, a `ts_workspace`, for a collective that reads or changes it between two operations, or
/// for results of the caller's own (`ts_context_provide`). Its address never changes.
///
/// Errors: `TS_STATUS_UNKNOWN_ENUM`.
///
/// # Safety
/// - `context` is null or a handle that nothing else uses meanwhile; the address is valid as long as it.
/// - `tensor` is null or has room for the structure, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_workspace(
    context: *mut ts_context,
    buffer: i32,
    tensor: *mut ts_tensor,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let select = unsafe { &mut reference_mut("context", context)?.select };
        let found = select.buffer_mut(buffer_of(buffer)?);
        let make = || {
            let (dims, dtype) = (found.shape(), found.dtype());
            let data = address(found)?;
            let mut shape = [1; 4];
            shape[..dims.dims().len()].copy_from_slice(dims.dims());
            Ok(ts_tensor { data, dtype: dtype_code(dtype), rank: dims.dims().len() as u32, shape })
        };
        // SAFETY: as above.
        unsafe { answer("tensor", tensor, make) }
    })
}

/// Says that a buffer of the workspace, a `ts_workspace`, holds results of the caller's own for a batch: votes of a
/// policy of one's own, for `ts_top_k` to choose from, or lists for `ts_attend`.
///
/// Queries, similarities and actions stand for what pool writes, products for what compare does, logits and statistics
/// for what score does, the selected tokens and their lengths for what top-k does: all of them are to be there. On a GPU they are not looked at:
/// what is made of results that break a rule, such as lists that do not ascend, is not specified.
///
/// Errors: `TS_STATUS_ORDER` for products, logits, statistics and votes without `ts_pool` of the same batch before, for
/// all of these but products also after `ts_compare` without `ts_decide`,
/// `TS_STATUS_MISSING` for a batch whose slot holds another, `TS_STATUS_UNKNOWN_ENUM`.
///
/// # Safety
/// - `context` and `batch` are null or handles; nothing else uses `context` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_provide(
    context: *mut ts_context,
    buffer: i32,
    batch: *const ts_batch,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch) = unsafe { (reference_mut("context", context)?, reference("batch", batch)?) };
        Ok(context.select.provide(buffer_of(buffer)?, &batch.batch)?)
    })
}

/// Index into the elements of `TS_WORKSPACE_LOGITS` of a query head's logit for a token of a row: `token` counts from
/// the row's first, chosen or not.
///
/// Errors: `TS_STATUS_INDEX` where the batch has no such row, the row no such token (none is known of tables on the
/// device) or the configuration no such head, `TS_STATUS_LIMIT`.
///
/// # Safety
/// - `context` and `batch` are null or handles; nothing changes `context` meanwhile.
/// - `index` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_logit_index(
    context: *const ts_context,
    batch: *const ts_batch,
    row: usize,
    token: usize,
    qo_head: usize,
    index: *mut usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let (context, batch) = (reference("context", context)?, reference("batch", batch)?);
        let make = || Ok(context.select.logit_index(&batch.batch, row, token, qo_head)?);
        answer("index", index, make)
    })
}

/// Copies the selected tokens of one row of the current batch, ascending, to the host. Waits for the device's earlier
/// work. With `tokens` null and `capacity` 0, only tells the length.
///
/// Errors: `TS_STATUS_INDEX` where there is no such row, `TS_STATUS_CAPACITY` where the list is longer than `capacity`
/// (then `len` is written nevertheless).
///
/// # Safety
/// - `context` is null or a handle that nothing changes meanwhile.
/// - `tokens` is null or has room for `capacity` entries in the host's memory, `len` of them written.
/// - `len` is null or has room for a number, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_context_selected(
    context: *const ts_context,
    row: usize,
    tokens: *mut u32,
    capacity: usize,
    len: *mut usize,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let workspace = unsafe { reference("context", context)? }.select.workspace();
        // SAFETY: as above.
        let to = unsafe { slice_mut("tokens", tokens, capacity)? };
        let list = workspace.selected(row)?;
        // SAFETY: as above.
        unsafe { answer("len", len, || Ok(list.len()))? };
        if tokens.is_null() {
            return Ok(());
        }
        let needed = list.len();
        let to = to.get_mut(..needed).ok_or(Failure::Capacity { what: "tokens", capacity, needed })?;
        to.copy_from_slice(&list);
        Ok(())
    })
}

/// The buffer with this code.
fn buffer_of(code: i32) -> Result<Buffer, Failure> {
    let codes = [
        (ts_workspace::Queries, Buffer::Queries),
        (ts_workspace::Similarities, Buffer::Similarities),
        (ts_workspace::Actions, Buffer::Actions),
        (ts_workspace::Logits, Buffer::Logits),
        (ts_workspace::Stats, Buffer::Stats),
        (ts_workspace::Votes, Buffer::Votes),
        (ts_workspace::PooledVotes, Buffer::PooledVotes),
        (ts_workspace::TopK, Buffer::TopK),
        (ts_workspace::Selected, Buffer::Selected),
        (ts_workspace::SelectedLen, Buffer::SelectedLen),
        (ts_workspace::Products, Buffer::Products),
    ];
    choose("buffer", "a ts_workspace", code, &codes.map(|(code, buffer)| (code as i32, buffer)))
}

/// Checks that an optional size was given.
pub(crate) fn expect_at_least_one(what: &'static str, got: usize) -> Result<(), Failure> {
    if got > 0 {
        Ok(())
    } else {
        Err(Error::Argument { what, rule: "at least 1".into(), got: got.to_string() }.into())
    }
}
