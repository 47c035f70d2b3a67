//! The operations of a step, one at a time, over anybody's cache.

use std::ffi::c_void;

use tokenselect::{
    Batch, DType, Device, LayerMut, Over, Ranks, Selection, SelectionCacheLayer, StepInput, StepOutput,
    TensorView, TokenSelect,
};

use crate::batch::ts_batch;
use crate::config::{dtype, expect_zero};
use crate::context::{expect_at_least_one, ts_context};
use crate::kv::ts_kv_view;
use crate::pointers::{Argument, reference, reference_mut};
use crate::selection_cache::{layer_of, ts_selection_cache};
use crate::sized;
use crate::status::{Result, fence, ts_status};

/// Queries, keys and values of a step of one layer, of the configuration's type. An operation reads those that it needs;
/// the others may be null.
///
/// The element `i` of head `h` of token `t` of the queries is at `t * q_stride_token + h * q_stride_head + i`, and of keys
/// and values likewise. Strides that are 0 are those of dense tensors, others may be those of slices of a fused projection,
/// `[num_query_tokens, num_qo_heads + 2 * num_kv_heads, head_dim]`: all `_stride_token` are then the elements of its row.
/// On a GPU strides are multiples of 8. Fields that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_step_input {
    /// `sizeof(ts_step_input)`.
    pub struct_size: usize,
    /// `[num_query_tokens, num_qo_heads, head_dim]`: queries of all rows. Aligned to 16 bytes on a GPU.
    pub q: *const c_void,
    /// `[num_query_tokens, num_kv_heads, head_dim]`: keys to append, rotated by the model for native positions, not rotated
    /// for reassigned ones. As `q`.
    pub k: *const c_void,
    /// As `k`: values to append.
    pub v: *const c_void,
    /// Elements from a token to the next, in the queries; 0 for `num_qo_heads * head_dim`.
    pub q_stride_token: usize,
    /// Elements from a head to the next of its token, in the queries; 0 for `head_dim`.
    pub q_stride_head: usize,
    /// As `q_stride_token`, in the keys; 0 for `num_kv_heads * head_dim`.
    pub k_stride_token: usize,
    /// As `q_stride_head`, in the keys.
    pub k_stride_head: usize,
    /// As `k_stride_token`, in the values.
    pub v_stride_token: usize,
    /// As `q_stride_head`, in the values.
    pub v_stride_head: usize,
}

/// Outputs of attention, dense. Fields that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_output {
    /// `sizeof(ts_output)`.
    pub struct_size: usize,
    /// `[num_query_tokens, num_qo_heads, head_dim]` of `out_dtype`, written.
    pub out: *mut c_void,
    /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials. May be null.
    pub lse: *mut f32,
    /// A `ts_dtype`: the configuration's or f32.
    pub out_dtype: i32,
    /// 0.
    pub reserved: i32,
}

/// Lists of tokens to attend to, one a row, in memory of the device. Fields that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_selection {
    /// `sizeof(ts_selection)`.
    pub struct_size: usize,
    /// Rows of the arrays, at least the batch's.
    pub num_rows: usize,
    /// Places for tokens in a row.
    pub width: usize,
    /// `[num_rows, width]`: tokens of each row, ascending.
    pub tokens: *const u32,
    /// `[num_rows]`: length of each list.
    pub len: *const u32,
    /// `[num_rows, width]`, or null: rank of each token in the whole list, where these lists are parts of longer ones.
    pub ranks: *const u32,
    /// `[num_rows]`, null exactly if `ranks` is: length of each whole list.
    pub total_len: *const u32,
}

/// Attention outputs over disjoint parts of a list, dense. Fields that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_parts {
    /// `sizeof(ts_parts)`.
    pub struct_size: usize,
    /// Parts, at least 1.
    pub num_parts: usize,
    /// Query tokens.
    pub num_query_tokens: usize,
    /// `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32.
    pub parts: *const f32,
    /// `[num_parts, num_query_tokens, num_qo_heads]` f32. A part with `-inf` does not count.
    pub part_lses: *const f32,
}

/// Queries of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queries(pub Argument);

impl Queries {
    pub fn of(context: &ts_context, batch: &Batch, input: &ts_step_input) -> Self {
        let config = context.select.config();
        let shape = [batch.num_query_tokens(), config.heads.num_qo_heads, config.heads.head_dim];
        let strides = [input.q_stride_token, input.q_stride_head];
        Queries(Argument::heads("q", input.q, config.dtype, shape, strides))
    }

    /// # Safety
    /// - As for [`Argument::view`].
    pub unsafe fn view<'a>(&self, device: &'a Device) -> Result<TensorView<'a>> {
        // SAFETY: the caller's promise.
        unsafe { self.0.view(device) }
    }
}

/// Keys and values to append.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewKv {
    pub k: Argument,
    pub v: Argument,
}

impl NewKv {
    pub fn of(context: &ts_context, batch: &Batch, input: &ts_step_input) -> Self {
        let config = context.select.config();
        let shape = [batch.num_query_tokens(), config.heads.num_kv_heads, config.heads.head_dim];
        let (k_strides, v_strides) =
            ([input.k_stride_token, input.k_stride_head], [input.v_stride_token, input.v_stride_head]);
        NewKv {
            k: Argument::heads("k", input.k, config.dtype, shape, k_strides),
            v: Argument::heads("v", input.v, config.dtype, shape, v_strides),
        }
    }

    /// # Safety
    /// - As for [`Argument::view`].
    pub unsafe fn views<'a>(&self, device: &'a Device) -> Result<(TensorView<'a>, TensorView<'a>)> {
        // SAFETY: the caller's promise.
        unsafe { Ok((self.k.view(device)?, self.v.view(device)?)) }
    }
}

/// What a selection works with, borrowed from its handles.
type Selecting<'a> = (&'a mut ts_context, &'a Batch, ts_kv_view, Option<SelectionCacheLayer<'a>>);

/// # Safety
/// - Handles are null or live through `'a`; nothing else uses `context` and `selection_cache` meanwhile.
unsafe fn selection_handles<'a>(
    context: *mut ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> Result<Selecting<'a>> {
    // SAFETY: the caller's promise.
    unsafe {
        let context = reference_mut("context", context)?;
        let batch = &reference("batch", batch)?.batch;
        Ok((context, batch, sized::read(kv)?, layer_of(selection_cache, layer)?))
    }
}

/// Where attention is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    out: Argument,
    lse: Option<Argument>,
}

impl Output {
    pub fn of(context: &ts_context, num_query_tokens: usize, given: &ts_output) -> Result<Self> {
        let heads = context.select.config().heads;
        let (tokens, hq) = (num_query_tokens, heads.num_qo_heads);
        expect_zero("output.reserved", given.reserved)?;
        let out_dtype = dtype("output.out_dtype", given.out_dtype)?;
        let out = Argument::new("output.out", given.out, out_dtype, [tokens, hq, heads.head_dim]);
        let lse = Argument::new("output.lse", given.lse.cast(), DType::F32, [tokens, hq]);
        Ok(Output { out, lse: (!given.lse.is_null()).then_some(lse) })
    }

    /// Checks that nothing written is part of another argument.
    pub fn expect_apart(&self, others: &[Argument]) -> Result<()> {
        self.out.expect_apart(others.iter().chain(&self.lse))?;
        self.lse.map_or(Ok(()), |lse| lse.expect_apart(others))
    }

    /// What is written.
    pub fn arguments(&self) -> Vec<Argument> {
        [Some(self.out), self.lse].into_iter().flatten().collect()
    }

    /// # Safety
    /// - As for [`Argument::view_mut`]; [`expect_apart`](Self::expect_apart) was asked.
    pub unsafe fn view<'a>(&self, device: &'a Device) -> Result<StepOutput<'a>> {
        // SAFETY: the caller's promise.
        unsafe {
            let lse = self.lse.map(|lse| lse.view_mut(device)).transpose()?;
            Ok(StepOutput { out: self.out.view_mut(device)?, lse })
        }
    }
}

/// Writes the keys and values of each row's block into its pages.
///
/// Of `input` this reads `k` and `v`. Writes `kv`.
///
/// Errors: `TS_STATUS_SHAPE` where `kv` is not as the configuration says, `TS_STATUS_INDEX` for a page number beyond
/// the pool, `TS_STATUS_TABLE` for a page that is written and appears twice in the batch, `TS_STATUS_LIMIT`,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_MISSING` for parts of sequences, a batch whose
/// slot holds another, and a context without `TS_OPERATION_APPEND`, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE` and
/// those of pointers. Then nothing was written.
///
/// # Safety
/// - `context` and `batch` are null or handles.
/// - `kv` is null or a view whose memory, from the first element to the last of keys and values together where they lie
///   among each other, is the device's, and in which no element is a key's and a value's; `input` is null or a structure
///   of `struct_size` bytes, whose tensors, from the first element to the last, are the device's. All memory is valid
///   until the device's work is done, and nothing else uses the pages of the batch meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_append(
    context: *const ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch, kv, input) = unsafe {
            (
                reference("context", context)?,
                &reference("batch", batch)?.batch,
                sized::read(kv)?,
                sized::read(input)?,
            )
        };
        let (device, dtype) = (&context.device, context.select.config().dtype);
        let new = NewKv::of(context, batch, &input);
        for pages in kv.arguments(dtype)? {
            pages.expect_apart(&[new.k, new.v])?;
        }
        // SAFETY: as above, and pages are apart from what is written into them.
        let ((k, v), kv) = unsafe { (new.views(device)?, kv.view_mut(device, dtype)?) };
        Ok(context.select.append(batch, kv, k, v)?)
    })
}

/// `ts_pool`, `ts_score`, `ts_vote` and `ts_top_k` in one: the tokens to attend to, left in `TS_WORKSPACE_SELECTED`.
///
/// Of `input` this reads `q`. With `selection_cache`, whose `layer` is used, selections of rows that name their sequence
/// may be used again; null selects anew.
///
/// Errors: those of the four operations, `TS_STATUS_ORDER` excepted; then nothing was written.
///
/// # Safety
/// - Handles are null or handles of one device; nothing else uses `context` and `selection_cache` meanwhile.
/// - `kv` and `input` are null or structures of `struct_size` bytes; their memory is the device's and unchanged until its
///   work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_select(
    context: *mut ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let ((context, batch, kv, cached), input) =
            unsafe { (selection_handles(context, batch, kv, selection_cache, layer)?, sized::read(input)?) };
        let (device, dtype) = (&context.device, context.select.config().dtype);
        let queries = Queries::of(context, batch, &input);
        // SAFETY: as above.
        let (kv, q) = unsafe { (kv.view(device, dtype)?, queries.view(device)?) };
        Ok(context.select.select(batch, kv, q, cached)?)
    })
}

/// `ts_append`, then `ts_select`, in fewer launches where blocks are short; with `ts_attend` after it, a step over a
/// borrowed cache.
///
/// `selection_cache` and `layer` are as for `ts_select`. Writes `kv`. (A layer of a `ts_cache` comes from `ts_cache_layer_mut`, which
/// counts its tokens as written; `ts_step` and `ts_cache_append` count what they write themselves.)
///
/// Errors: those of the two, `TS_STATUS_ORDER` excepted; then nothing was written.
///
/// # Safety
/// - As for `ts_append` and `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_append_select(
    context: *mut ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let ((context, batch, kv, cached), input) =
            unsafe { (selection_handles(context, batch, kv, selection_cache, layer)?, sized::read(input)?) };
        let (new, queries) = (NewKv::of(context, batch, &input), Queries::of(context, batch, &input));
        let (device, dtype) = (&context.device, context.select.config().dtype);
        for pages in kv.arguments(dtype)? {
            pages.expect_apart(&[new.k, new.v, queries.0])?;
        }
        // SAFETY: as above, and pages are apart from what is read.
        let ((k, v), q, pages) =
            unsafe { (new.views(device)?, queries.view(device)?, kv.view_mut(device, dtype)?) };
        Ok(context.select.append_select(
            batch,
            LayerMut { kv: pages, selections: cached },
            StepInput { q, k, v },
        )?)
    })
}

/// Mean of the queries of each block, its cosine with the cached one, and what is to be done for the row. Writes
/// `TS_WORKSPACE_QUERIES`, `_SIMILARITIES` and `_ACTIONS`; changes nothing in `selection_cache`.
///
/// `input` and `selection_cache` are as for `ts_select`. Errors: `TS_STATUS_LIMIT`, `TS_STATUS_INDEX` for a sequence or
/// layer that the Selection Cache does not have, `TS_STATUS_SHAPE` where that is of another configuration,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_MISSING` for a batch whose slot holds another, a
/// batch without `sequence_indices` where a Selection Cache is given, and a context without `TS_OPERATION_POOL`, `TS_STATUS_STRUCT_SIZE` and those of pointers.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_pool(
    context: *mut ts_context,
    batch: *const ts_batch,
    input: *const ts_step_input,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch, input, cached) = unsafe {
            let context = reference_mut("context", context)?;
            let batch = &reference("batch", batch)?.batch;
            (context, batch, sized::read(input)?, layer_of(selection_cache, layer)?)
        };
        let queries = Queries::of(context, batch, &input);
        // SAFETY: as above.
        let q = unsafe { queries.view(&context.device)? };
        Ok(context.select.pool(batch, q, cached)?)
    })
}

/// What the cosines are made of, where ranks share the heads of a layer (tensor parallelism): `TS_WORKSPACE_PRODUCTS` of
/// this context's heads, to be added over all ranks before `ts_decide`. Every rank then takes the same action, and chooses
/// the same tokens, as one context with all heads would, up to rounding; each has a Selection Cache for its own heads:
///
/// ```text
/// ts_pool with null;  ts_compare;  sum TS_WORKSPACE_PRODUCTS over ranks;  ts_decide
/// ts_score;           ts_vote;     sum TS_WORKSPACE_VOTES over ranks;     ts_top_k
/// ```
///
/// Reads `TS_WORKSPACE_QUERIES`; changes nothing in `selection_cache`. Actions are void until `ts_decide`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` of the same batch before it, and those of `ts_pool`.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_compare(
    context: *mut ts_context,
    batch: *const ts_batch,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with_cached(context, batch, selection_cache, layer, TokenSelect::compare) }
}

/// What is to be done for each row, by the sums of `TS_WORKSPACE_PRODUCTS` over all ranks. Writes
/// `TS_WORKSPACE_SIMILARITIES` and `_ACTIONS`; changes nothing in `selection_cache`. Pass what was passed to `ts_compare`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_compare` of the same batch before it, and those of `ts_pool`.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_decide(
    context: *mut ts_context,
    batch: *const ts_batch,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with_cached(context, batch, selection_cache, layer, TokenSelect::decide) }
}

/// Scaled dot products of the scoring queries with the candidates' keys, and softmax statistics. Reads
/// `TS_WORKSPACE_QUERIES` and `_ACTIONS`, writes `_LOGITS` and `_STATS`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` of the same batch before it, or after `ts_compare` without `ts_decide`,
/// `TS_STATUS_SHAPE`, `TS_STATUS_LIMIT`, `TS_STATUS_INDEX` for a page number beyond the pool, `TS_STATUS_CONFIG` for strides that the device cannot go,
/// `TS_STATUS_MISSING` as `ts_pool`, and those of pointers.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_score(
    context: *mut ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch, kv) = unsafe {
            (reference_mut("context", context)?, &reference("batch", batch)?.batch, sized::read(kv)?)
        };
        let (device, dtype) = (&context.device, context.select.config().dtype);
        // SAFETY: as above.
        let kv = unsafe { kv.view(device, dtype)? };
        Ok(context.select.score(batch, kv)?)
    })
}

/// Votes: softmax probabilities of the candidates, summed over heads. Reads `TS_WORKSPACE_ACTIONS`, `_LOGITS` and
/// `_STATS`, writes `_VOTES`. With tensor parallelism, sum these over the ranks before `ts_top_k`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_score` of the same batch before it, `TS_STATUS_LIMIT`, `TS_STATUS_MISSING` as
/// `ts_pool`.
///
/// # Safety
/// - `context` and `batch` are null or handles; nothing else uses `context` meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_vote(context: *mut ts_context, batch: *const ts_batch) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch) = unsafe { (reference_mut("context", context)?, reference("batch", batch)?) };
        Ok(context.select.vote(&batch.batch)?)
    })
}

/// The `top_k` largest votes of each row (larger first, equal votes by smaller index, NaN last) and the selected lists.
/// Reads `TS_WORKSPACE_ACTIONS`, `_VOTES` and `_QUERIES`, writes `_POOLED_VOTES`, `_TOP_K`, `_SELECTED` and
/// `_SELECTED_LEN`. With `selection_cache`, reused rows take their tokens from it, scored rows replace what it holds,
/// and every row is counted; pass what was passed to `ts_pool` or `ts_decide`.
///
/// Errors: `TS_STATUS_ORDER` without `ts_pool` and `ts_vote` of the same batch before it (or votes of one's own,
/// `ts_context_provide`), `TS_STATUS_LIMIT`, `TS_STATUS_INDEX`, `TS_STATUS_SHAPE`, `TS_STATUS_MISSING` as `ts_pool`
/// and, on the processor, where rows reuse a selection that is not given.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_top_k(
    context: *mut ts_context,
    batch: *const ts_batch,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with_cached(context, batch, selection_cache, layer, TokenSelect::top_k) }
}

/// `ts_vote`, then `ts_top_k` of these votes, which takes less than the two one by one. Arguments are those of
/// `ts_top_k`.
///
/// Errors: those of the two, `TS_STATUS_ORDER` without `ts_pool` and `ts_score` of the same batch before it. Then
/// nothing was written.
///
/// # Safety
/// - As for `ts_select`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_vote_top_k(
    context: *mut ts_context,
    batch: *const ts_batch,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    unsafe { with_cached(context, batch, selection_cache, layer, TokenSelect::vote_top_k) }
}

/// An operation on the workspace and cached selections.
///
/// # Safety
/// - As for `ts_select`.
unsafe fn with_cached(
    context: *mut ts_context,
    batch: *const ts_batch,
    selection_cache: *mut ts_selection_cache,
    layer: usize,
    operation: fn(&mut TokenSelect, &Batch, Option<SelectionCacheLayer<'_>>) -> tokenselect::Result<()>,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, batch, cached) = unsafe {
            let context = reference_mut("context", context)?;
            (context, &reference("batch", batch)?.batch, layer_of(selection_cache, layer)?)
        };
        Ok(operation(&mut context.select, batch, cached)?)
    })
}

/// Attention over the selected lists of the workspace. Writes `output`.
///
/// Of `input` this reads `q`. Query `t` of a block of `T` sees the first `m - T + t + 1` of the `m` tokens of its row's
/// list. Rows whose list is empty get `out = 0` and `lse = -inf`.
///
/// Errors: `TS_STATUS_ORDER` without a selection of the same batch before it (or lists of one's own,
/// `ts_context_provide`), `TS_STATUS_SHAPE`, `TS_STATUS_ELEMENT_TYPE`, `TS_STATUS_LIMIT`, `TS_STATUS_INDEX`,
/// `TS_STATUS_CONFIG` for strides that the device cannot go, `TS_STATUS_TABLE` for a list on the processor that breaks
/// a rule, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_MISSING` for parts of sequences, a batch whose slot
/// holds another, and a context without `TS_OPERATION_ATTEND`, and those of pointers.
///
/// # Safety
/// - `context` and `batch` are null or handles; nothing changes the context meanwhile.
/// - `kv`, `input` and `output` are null or structures of `struct_size` bytes; all memory is the device's and valid until
///   its work is done, and nothing else uses the outputs meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_attend(
    context: *const ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    output: *const ts_output,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { attend(context, batch, (kv, input), output, To::Selected) })
}

/// As `ts_attend`, over all tokens of each row: ordinary paged attention.
///
/// Errors: those of `ts_attend`, `TS_STATUS_ORDER` excepted.
///
/// # Safety
/// - As for `ts_attend`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_attend_dense(
    context: *const ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    output: *const ts_output,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { attend(context, batch, (kv, input), output, To::All) })
}

/// As `ts_attend`, over lists of the caller's own, which may be parts of longer ones. Outputs over the parts of a list
/// are combined by `ts_merge`. Lists ascend, name tokens of their row only, and are no longer than `width`.
///
/// Errors: those of `ts_attend`, `TS_STATUS_ORDER` excepted, and `TS_STATUS_MISSING` for parts of sequences without
/// `ranks`. On a GPU the lists are not looked at: outputs of rows whose list breaks a rule are not specified.
///
/// # Safety
/// - As for `ts_attend`, and `selection` is null or a structure of `struct_size` bytes whose arrays are the device's
///   and unchanged until its work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_attend_to(
    context: *const ts_context,
    batch: *const ts_batch,
    kv: *const ts_kv_view,
    input: *const ts_step_input,
    selection: *const ts_selection,
    output: *const ts_output,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { attend(context, batch, (kv, input), output, To::Lists(sized::read(selection)?)) })
}

enum To {
    Selected,
    All,
    Lists(ts_selection),
}

/// # Safety
/// - As for [`ts_attend_to`].
unsafe fn attend(
    context: *const ts_context,
    batch: *const ts_batch,
    (kv, input): (*const ts_kv_view, *const ts_step_input),
    output: *const ts_output,
    to: To,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (context, batch, kv, input, output) = unsafe {
        (
            reference("context", context)?,
            &reference("batch", batch)?.batch,
            sized::read(kv)?,
            sized::read(input)?,
            sized::read(output)?,
        )
    };
    let (device, dtype, select) = (&context.device, context.select.config().dtype, &context.select);
    let queries = Queries::of(context, batch, &input);
    let output = Output::of(context, batch.num_query_tokens(), &output)?;
    let [k, v] = kv.arguments(dtype)?;
    output.expect_apart(&[queries.0, k, v])?;
    let lists = match to {
        To::Lists(ref given) => lists(given)?,
        To::Selected | To::All => Vec::new(),
    };
    output.expect_apart(&lists)?;
    // SAFETY: as above, and outputs are apart from inputs.
    let (kv, q, output) = unsafe { (kv.view(device, dtype)?, queries.view(device)?, output.view(device)?) };
    // SAFETY: as above.
    let views = lists.iter().map(|list| unsafe { list.view(device) }).collect::<Result<Vec<_>>>()?;
    let given = match views[..] {
        [tokens, len] => Some(Selection { tokens, len, ranks: None }),
        [tokens, len, ranks, total_len] => {
            Some(Selection { tokens, len, ranks: Some(Ranks { ranks, total_len }) })
        }
        _ => None,
    };
    let over = match (to, &given) {
        (To::All, _) => Over::All,
        (_, Some(lists)) => Over::Lists(lists),
        (_, None) => Over::Selected,
    };
    Ok(select.attend(batch, kv, q, over, output)?)
}

/// Tokens and lengths, and ranks and whole lengths where they are given.
fn lists(given: &ts_selection) -> Result<Vec<Argument>> {
    let (all, per_row) = ([given.num_rows, given.width], [given.num_rows]);
    let mut lists = vec![
        Argument::new("selection.tokens", given.tokens.cast(), DType::U32, all),
        Argument::new("selection.len", given.len.cast(), DType::U32, per_row),
    ];
    if !given.ranks.is_null() || !given.total_len.is_null() {
        lists.push(Argument::new("selection.ranks", given.ranks.cast(), DType::U32, all));
        lists.push(Argument::new("selection.total_len", given.total_len.cast(), DType::U32, per_row));
    }
    Ok(lists)
}

/// Combines attention outputs over disjoint parts of a list through their log-sum-exps. Writes `output`, whose
/// `out_dtype` may be f16, bf16 or f32.
///
/// Errors: those of pointers, `TS_STATUS_CONFIG` for 0 parts, `TS_STATUS_OVERLAP`, `TS_STATUS_STRUCT_SIZE`,
/// `TS_STATUS_UNSUPPORTED`.
///
/// # Safety
/// - `context` is null or a handle; `parts` and `output` are null or structures of `struct_size` bytes; all memory is
///   the device's and valid until its work is done, and nothing else uses the outputs meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_merge(
    context: *const ts_context,
    parts: *const ts_parts,
    output: *const ts_output,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (context, given, output) =
            unsafe { (reference("context", context)?, sized::read(parts)?, sized::read(output)?) };
        let (device, heads) = (&context.device, context.select.config().heads);
        let ts_parts { num_parts, num_query_tokens: tokens, parts, part_lses, .. } = given;
        expect_at_least_one("num_parts", num_parts)?;
        let (hq, d) = (heads.num_qo_heads, heads.head_dim);
        let parts = Argument::new("parts.parts", parts.cast(), DType::F32, [num_parts, tokens, hq, d]);
        let lses = Argument::new("parts.part_lses", part_lses.cast(), DType::F32, [num_parts, tokens, hq]);
        let output = Output::of(context, tokens, &output)?;
        output.expect_apart(&[parts, lses])?;
        // SAFETY: as above, and outputs are apart from inputs.
        let (parts, lses, output) =
            unsafe { (parts.view(device)?, lses.view(device)?, output.view(device)?) };
        Ok(context.select.merge(parts, lses, output)?)
    })
}
