//! Structures of the C interface with any numbers in them: every call answers a status, and none is that of a panic.
//!
//! Pointers are null or name as much memory as the structures say; nothing else is a caller's to pass.
#![no_main]

#[path = "../src/tables.rs"]
mod tables;

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use tables::Tables;
use tokenselect_c::*;

// SAFETY of every call below: handles are null or made by the library and not yet given back, structures are locals, and
// arrays have the lengths that they state, or are null.

/// Bytes that one object may take. What would take more, and fits the address space, is not tried.
const MOST: u128 = 64 << 20;
/// Elements of the pools that views name.
const POOL: usize = 1 << 14;

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

/// A status that a call may answer.
fn fine(status: ts_status) -> bool {
    assert!(!matches!(status, ts_status::Panic), "a panic came to the fence");
    assert!(matches!(status, ts_status::Ok) || message_is_text(), "an error without a text");
    matches!(status, ts_status::Ok)
}

fn message_is_text() -> bool {
    let message = unsafe { std::ffi::CStr::from_ptr(ts_last_error_message()) };
    message.to_str().is_ok_and(|text| !text.is_empty())
}

fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut device = null_mut();
    assert!(fine(unsafe { ts_device_cpu(&mut device) }));
    let result = with_device(device, input);
    assert!(fine(unsafe { ts_device_destroy(device) }));
    result
}

fn with_device(device: *mut ts_device, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let (config, limits) = (config(input)?, limits(input)?);
    let (config_at, limits_at) = (or_null(&config, input)?, or_null(&limits, input)?);
    fine(unsafe { ts_config_validate(config_at) });
    let mut bytes = 0;
    let sized = fine(unsafe { ts_workspace_bytes(device, config_at, limits_at, &mut bytes) });
    let mut context = null_mut();
    // The limits alone make buffers that are not counted as workspace, such as tables of angles.
    let small = limits.max_kv_tokens < 1 << 16 && limits.max_block_len < 1 << 16 && config.n_local < 1 << 16;
    if sized && (bytes as u128) < MOST && small && config.top_k < 1 << 16 && config.n_init < 1 << 16 {
        fine(unsafe { ts_context_create(device, config_at, limits_at, &mut context) });
    }
    let mut batch = null_mut();
    make_batch(input, &mut batch)?;
    if !batch.is_null() {
        look_at(batch, input)?;
    }
    operate(context, batch, &config, input)?;
    owned(device, context, &config, input)?;
    assert!(fine(unsafe { ts_batch_destroy(batch) }));
    assert!(fine(unsafe { ts_context_destroy(context) }));
    Ok(())
}

/// A number of a field: mostly small, sometimes any.
fn number(input: &mut Unstructured<'_>, most: usize) -> arbitrary::Result<usize> {
    match input.int_in_range(0..=15)? {
        0 => input.arbitrary(),
        1 => Ok(usize::MAX >> input.int_in_range(0..=40)?),
        2 => Ok(0),
        _ => input.int_in_range(0..=most),
    }
}

fn or_null<T>(value: &T, input: &mut Unstructured<'_>) -> arbitrary::Result<*const T> {
    Ok(if input.ratio(1, 32)? { null() } else { value })
}

/// A small, valid configuration, some fields of which are replaced.
fn config(input: &mut Unstructured<'_>) -> arbitrary::Result<ts_config> {
    let mut config = unsafe { std::mem::zeroed::<ts_config>() };
    assert!(fine(unsafe { ts_config_default(&mut config, size_of::<ts_config>()) }));
    config = ts_config {
        num_qo_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        dtype: input.int_in_range(0..=2)?,
        n_init: input.int_in_range(0..=4)?,
        n_local: input.int_in_range(0..=4)?,
        top_k: input.int_in_range(1..=6)?,
        positions: input.int_in_range(0..=1)?,
        ..config
    };
    for _ in 0..input.int_in_range(0..=3)? {
        match input.int_in_range(0..=26)? {
            // A structure may not say that it is longer than it is.
            0 => config.struct_size = input.int_in_range(0..=size_of::<ts_config>())?,
            1 => config.num_qo_heads = number(input, 16)? as u32,
            2 => config.num_kv_heads = number(input, 16)? as u32,
            3 => config.head_dim = number(input, 256)? as u32,
            4 => config.dtype = input.arbitrary()?,
            5 => config.n_init = number(input, 16)?,
            6 => config.n_local = number(input, 16)?,
            7 => config.top_k = number(input, 16)?,
            8 => config.vote_pool_window = number(input, 9)?,
            9 => config.score_scale = input.arbitrary()?,
            10 => config.sm_scale = input.arbitrary()?,
            11 => config.logits_soft_cap = input.arbitrary()?,
            12 => config.positions = input.arbitrary()?,
            13 => config.selection_cache = input.arbitrary()?,
            14 => config.similarity_threshold = input.arbitrary()?,
            15 => config.max_reuse = input.arbitrary()?,
            16 => config.reserved = input.arbitrary()?,
            17 => config.rope.theta = input.arbitrary()?,
            18 => config.rope.rotary_dim = number(input, 8)? as u32,
            19 => config.rope.pairing = input.arbitrary()?,
            20 => config.rope.scaling = input.int_in_range(-1..=4)?,
            21 => config.rope.factor = input.arbitrary()?,
            22 => config.rope.low_freq_factor = input.arbitrary()?,
            23 => config.rope.high_freq_factor = input.arbitrary()?,
            24 => config.rope.original_max_position = input.arbitrary()?,
            25 => config.rope.beta_fast = input.arbitrary()?,
            _ => config.rope.attention_factor = input.arbitrary()?,
        }
    }
    Ok(config)
}

/// A structure of zeros that begins with its size, or with a smaller one.
fn sized<T: Copy>(input: &mut Unstructured<'_>) -> arbitrary::Result<T> {
    let size = size_of::<T>();
    let struct_size = if input.ratio(1, 32)? { input.int_in_range(0..=size)? } else { size };
    // Structures that begin with their size are plain data.
    unsafe {
        let mut value: T = std::mem::zeroed();
        (&raw mut value).cast::<usize>().write(struct_size);
        Ok(value)
    }
}

fn limits(input: &mut Unstructured<'_>) -> arbitrary::Result<ts_limits> {
    Ok(ts_limits {
        max_rows: number(input, 12)?,
        max_block_len: number(input, 40)?,
        max_kv_tokens: number(input, 2000)?,
        operations: if input.ratio(1, 8)? { input.int_in_range(-1..=32)? } else { 0 },
        ..sized(input)?
    })
}

/// Entries as C has them; a table that is left out is null.
fn signed(table: Vec<u32>) -> Vec<i32> {
    table.into_iter().map(|entry| entry as i32).collect()
}

fn pointer(table: &[i32], input: &mut Unstructured<'_>) -> arbitrary::Result<*const i32> {
    Ok(if input.ratio(1, 24)? { null() } else { table.as_ptr() })
}

/// Arrays have the lengths that the structure states: what is too short is filled up with zeros.
fn make_batch(input: &mut Unstructured<'_>, batch: &mut *mut ts_batch) -> arbitrary::Result<()> {
    let tables = Tables::arbitrary(input)?;
    let num_rows = tables.last_page_len.len();
    let (mut qo_indptr, mut indptr) = (signed(tables.qo_indptr), signed(tables.indptr));
    qo_indptr.resize(num_rows + 1, 0);
    indptr.resize(num_rows + 1, 0);
    let num_indices = indptr[num_rows];
    let mut indices = signed(tables.indices);
    // What the last entry states has to be there; where that would be a lot, the pointer is null.
    let is_long = num_indices > 1 << 16;
    indices.resize(usize::try_from(num_indices).unwrap_or(0).min(1 << 16), 0);
    let last_page_len = signed(tables.last_page_len);
    let sequence_indices = tables.sequence_indices.map(|indices| {
        let mut indices = signed(indices);
        indices.resize(num_rows, 0);
        indices
    });
    let candidates = tables.candidates.map(|bounds| {
        let mut bounds: Vec<i32> =
            bounds.into_iter().flat_map(|(begin, end)| [begin as i32, end as i32]).collect();
        bounds.resize(2 * num_rows, 0);
        bounds
    });
    let tables = ts_batch_tables {
        page_size: tables.page_size,
        num_rows,
        qo_indptr: pointer(&qo_indptr, input)?,
        indptr: pointer(&indptr, input)?,
        indices: if is_long { null() } else { pointer(&indices, input)? },
        last_page_len: pointer(&last_page_len, input)?,
        sequence_indices: sequence_indices.as_ref().map_or(null(), |table| table.as_ptr()),
        candidates: candidates.as_ref().map_or(null(), |table| table.as_ptr()),
        ..sized(input)?
    };
    if fine(unsafe { ts_batch_create(or_null(&tables, input)?, batch) }) && input.ratio(1, 4)? {
        let mut padded = null_mut();
        let (rows, block_len) = (input.int_in_range(0..=12)?, number(input, 8)?);
        if fine(unsafe { ts_batch_padded(*batch, rows, block_len, &mut padded) }) {
            assert!(fine(unsafe { ts_batch_destroy(*batch) }));
            *batch = padded;
        }
    }
    Ok(())
}

fn batch_info(batch: *const ts_batch) -> ts_batch_info {
    let mut info = unsafe { std::mem::zeroed::<ts_batch_info>() };
    assert!(fine(unsafe { ts_batch_get_info(batch, &mut info) }));
    info
}

fn look_at(batch: *mut ts_batch, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let info = batch_info(batch);
    let mut row = unsafe { std::mem::zeroed::<ts_batch_row>() };
    for place in 0..info.num_rows {
        assert!(fine(unsafe { ts_batch_get_row(batch, place, &mut row) }));
        assert!(row.block_len <= info.max_block_len && row.kv_len <= info.max_kv_len);
    }
    assert!(!fine(unsafe { ts_batch_get_row(batch, info.num_rows + number(input, 3)? % 9, &mut row) }));
    assert!(!fine(unsafe { ts_batch_get_info(batch, null_mut()) }));
    Ok(())
}

fn view(
    input: &mut Unstructured<'_>,
    config: &ts_config,
    page_size: usize,
    [k, v]: [&mut [u32]; 2],
) -> arbitrary::Result<ts_kv_view> {
    let mut kv = ts_kv_view {
        num_pages: 16,
        page_size,
        num_kv_heads: config.num_kv_heads as usize,
        head_dim: config.head_dim as usize,
        ..sized(input)?
    };
    for _ in 0..input.int_in_range(0..=2)? {
        match input.int_in_range(0..=3)? {
            0 => kv.num_pages = number(input, 20)?,
            1 => kv.page_size = number(input, 20)?,
            2 => kv.num_kv_heads = number(input, 4)?,
            _ => kv.head_dim = number(input, 16)?,
        }
    }
    fine(unsafe { ts_kv_view_set_dense(&mut kv, input.int_in_range(-1..=2)?) });
    for _ in 0..input.int_in_range(0..=2)? {
        match input.int_in_range(0..=5)? {
            0 => kv.k_stride_page = number(input, 200)?,
            1 => kv.k_stride_token = number(input, 40)?,
            2 => kv.k_stride_head = number(input, 20)?,
            3 => kv.v_stride_page = number(input, 200)?,
            4 => kv.v_stride_token = number(input, 40)?,
            _ => kv.v_stride_head = number(input, 20)?,
        }
    }
    // Pools are there where they are large enough for what the view says, and null otherwise.
    let last = |count: usize, stride: usize| count.saturating_sub(1) as u128 * stride as u128;
    let extent_of = |page: usize, token: usize, head: usize| {
        last(kv.num_pages, page)
            + last(kv.page_size, token)
            + last(kv.num_kv_heads, head)
            + kv.head_dim as u128
    };
    let extent = extent_of(kv.k_stride_page, kv.k_stride_token, kv.k_stride_head).max(extent_of(
        kv.v_stride_page,
        kv.v_stride_token,
        kv.v_stride_head,
    ));
    if extent <= POOL as u128 && !input.ratio(1, 32)? {
        kv.k = k.as_mut_ptr().cast();
        kv.v = v.as_mut_ptr().cast();
    }
    Ok(kv)
}

fn operate(
    context: *mut ts_context,
    batch: *mut ts_batch,
    config: &ts_config,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let info = if batch.is_null() { unsafe { std::mem::zeroed() } } else { batch_info(batch) };
    let (mut k, mut v) = (vec![0; POOL], vec![0; POOL]);
    let kv = view(input, config, info.page_size, [&mut k, &mut v])?;
    let kv_at = or_null(&kv, input)?;
    // Four bytes hold an element of every type.
    let width = (config.num_qo_heads.max(config.num_kv_heads) as u128) * config.head_dim as u128;
    let elements = width * info.num_query_tokens as u128;
    let there = elements < 1 << 20;
    let memory = || vec![0u32; if there { elements as usize + POOL } else { 0 }];
    let (mut q, mut new, mut out, mut lse) = (memory(), memory(), memory(), memory());
    let at = |memory: &mut Vec<u32>| if there { memory.as_mut_ptr().cast::<c_void>() } else { null_mut() };
    let (q, new) = (at(&mut q), at(&mut new));
    let output = ts_output {
        out: at(&mut out),
        lse: if input.ratio(1, 4)? { null_mut() } else { at(&mut lse).cast() },
        out_dtype: input.int_in_range(-1..=6)?,
        reserved: i32::from(input.ratio(1, 16)?),
        ..sized(input)?
    };
    let mut second = new;
    let mut other = memory();
    if input.ratio(1, 2)? {
        second = at(&mut other);
    }
    let step = step_input(input, config, &info, [q, new, second])?;
    let step = or_null(&step, input)?;
    for _ in 0..input.int_in_range(1..=5)? {
        let none = null_mut();
        fine(unsafe {
            let mut index = 0;
            match input.int_in_range(0..=12)? {
                0 => ts_append(context, batch, kv_at, step),
                1 => ts_select(context, batch, kv_at, step, none, 0),
                2 => ts_pool(context, batch, step, none, 0),
                3 => ts_score(context, batch, kv_at),
                4 => ts_vote(context, batch),
                5 => ts_top_k(context, batch, none, 0),
                6 => ts_attend(context, batch, kv_at, step, &output),
                7 => ts_append_select(context, batch, kv_at, step, none, 0),
                8 => ts_context_provide(context, input.int_in_range(-1..=11)?, batch),
                9 => ts_compare(context, batch, none, 0),
                10 => ts_decide(context, batch, none, 0),
                11 => {
                    let [row, token, head] = [number(input, 4)?, number(input, 40)?, number(input, 4)?];
                    ts_context_logit_index(context, batch, row, token, head, &mut index)
                }
                _ => ts_attend_dense(context, batch, kv_at, step, &output),
            }
        });
    }
    Ok(())
}

/// Queries, keys and values in any strides; null where these reach beyond a dense tensor and a pool.
fn step_input(
    input: &mut Unstructured<'_>,
    config: &ts_config,
    info: &ts_batch_info,
    [q, k, v]: [*mut c_void; 3],
) -> arbitrary::Result<ts_step_input> {
    let dim = config.head_dim as u128;
    let mut strided = |data: *mut c_void, heads: u32| {
        let strides = if input.ratio(1, 2)? { [0, 0] } else { [number(input, 200)?, number(input, 40)?] };
        let heads = u128::from(heads);
        let [token, head] = [(strides[0], heads * dim), (strides[1], dim)]
            .map(|(stride, dense)| if stride == 0 { dense } else { stride as u128 });
        let reach = (info.num_query_tokens as u128).saturating_sub(1).saturating_mul(token)
            + heads.saturating_sub(1).saturating_mul(head)
            + dim;
        let width = u128::from(config.num_qo_heads.max(config.num_kv_heads)) * dim;
        let there = reach <= width * info.num_query_tokens as u128 + POOL as u128;
        Ok((if there { data } else { null_mut() }, strides))
    };
    let (q, [q_stride_token, q_stride_head]) = strided(q, config.num_qo_heads)?;
    let (k, [k_stride_token, k_stride_head]) = strided(k, config.num_kv_heads)?;
    let (v, [v_stride_token, v_stride_head]) = strided(v, config.num_kv_heads)?;
    Ok(ts_step_input {
        q,
        k,
        v,
        q_stride_token,
        q_stride_head,
        k_stride_token,
        k_stride_head,
        v_stride_token,
        v_stride_head,
        ..sized(input)?
    })
}

/// A cache of any size, and calls with any numbers.
fn owned(
    device: *mut ts_device,
    context: *mut ts_context,
    config: &ts_config,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let size = ts_cache_config {
        struct_size: size_of::<ts_cache_config>(),
        num_layers: number(input, 2)?,
        num_pages: number(input, 12)?,
        page_size: number(input, 16)?,
        max_sequences: number(input, 4)?,
        layout: input.int_in_range(-1..=2)?,
        reserved: i32::from(input.ratio(1, 16)?),
    };
    let product = |factors: &[usize]| {
        factors
            .iter()
            .try_fold(4u128, |product, &factor| product.checked_mul(factor as u128))
            .unwrap_or(u128::MAX)
    };
    let (heads, dim) = (config.num_kv_heads as usize, config.head_dim as usize);
    let query = (config.num_qo_heads as usize).saturating_mul(dim).saturating_add(config.top_k);
    let selection_bytes = product(&[size.num_layers, size.max_sequences, query]);
    let bytes = product(&[size.num_layers, size.num_pages, size.page_size, heads, dim]).max(selection_bytes);
    // What does not fit the address space must be refused; what fits, and is large, would be allocated.
    let few = size.max_sequences < 1 << 16 && size.num_pages < 1 << 16 && size.num_layers < 64;
    let [tried, selections_tried] =
        [bytes, selection_bytes].map(|bytes| bytes < MOST && few || bytes > isize::MAX as u128);
    let mut selections = null_mut();
    if selections_tried {
        fine(unsafe {
            let config = or_null(config, input)?;
            ts_selection_cache_create(device, config, size.num_layers, size.max_sequences, &mut selections)
        });
    }
    let with_selections = selection_cache(selections, input);
    assert!(fine(unsafe { ts_selection_cache_destroy(selections) }));
    with_selections?;
    let mut cache = null_mut();
    if !tried || !fine(unsafe { ts_cache_create(device, config, or_null(&size, input)?, &mut cache) }) {
        return Ok(());
    }
    let mut known = vec![0];
    for _ in 0..input.int_in_range(1..=10)? {
        let any = if input.ratio(1, 8)? { input.arbitrary()? } else { *input.choose(&known)? };
        let mut made = 0;
        match input.int_in_range(0..=5)? {
            0 if fine(unsafe { ts_cache_sequence_create(cache, &mut made) }) => known.push(made),
            1 if fine(unsafe { ts_cache_sequence_fork(cache, any, &mut made) }) => known.push(made),
            2 => drop(fine(unsafe { ts_cache_sequence_truncate(cache, any, number(input, 40)?) })),
            3 => drop(fine(unsafe { ts_cache_sequence_free(cache, any) })),
            _ => extend(context, cache, any, config, input)?,
        }
    }
    let mut stats = unsafe { std::mem::zeroed() };
    assert!(fine(unsafe { ts_cache_stats(cache, &mut stats) }));
    assert!(fine(unsafe { ts_cache_destroy(cache) }));
    Ok(())
}

/// Calls with any numbers; the handle may be null.
fn selection_cache(
    selections: *mut ts_selection_cache,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let mut stats = unsafe { std::mem::zeroed() };
    for _ in 0..input.int_in_range(0..=3)? {
        let (a, b) = (number(input, 4)?, number(input, 4)?);
        fine(unsafe {
            match input.int_in_range(0..=3)? {
                0 => ts_selection_cache_clear(selections, a),
                1 => ts_selection_cache_fork(selections, a, b),
                2 => ts_selection_cache_truncate(selections, a, b),
                _ => ts_selection_cache_layer_stats(selections, a, &mut stats),
            }
        });
    }
    Ok(())
}

fn extend(
    context: *mut ts_context,
    cache: *mut ts_cache,
    sequence: u64,
    config: &ts_config,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let (sequences, tokens) = ([sequence, input.arbitrary()?], [number(input, 20)?, number(input, 20)?]);
    let rows = input.int_in_range(0..=2)?;
    let mut batch = null_mut();
    if !fine(unsafe { ts_cache_extend(cache, sequences.as_ptr(), tokens.as_ptr(), rows, &mut batch) }) {
        return Ok(());
    }
    let info = batch_info(batch);
    let width = (config.num_qo_heads.max(config.num_kv_heads) as usize) * config.head_dim as usize;
    let mut memory = [(); 5].map(|()| vec![0u32; width * info.num_query_tokens]);
    let [q, k, v, out, lse] = memory.each_mut().map(|memory| memory.as_mut_ptr().cast::<c_void>());
    let step = ts_step_input { q, k, v, ..sized(input)? };
    let out_dtype = input.int_in_range(0..=2)?;
    let output = ts_output { out, lse: lse.cast(), out_dtype, ..sized(input)? };
    let layer = number(input, 2)?;
    fine(unsafe {
        match input.int_in_range(0..=2)? {
            0 => ts_step(context, cache, layer, batch, &step, &output),
            1 => ts_step_dense(context, cache, layer, batch, &step, &output),
            _ => ts_cache_append(context, cache, layer, batch, &step),
        }
    });
    assert!(fine(unsafe { ts_batch_destroy(batch) }));
    Ok(())
}
