//! What the tests of the C functions share.

// Every test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::ffi::{CStr, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use tokenselect_c::*;

/// Checks that a call succeeded.
#[track_caller]
pub fn ok(status: ts_status) {
    assert_eq!(status, ts_status::Ok, "{}", last_error());
}

/// Checks status and text of a call that fails.
#[track_caller]
pub fn fails(status: ts_status, expected: ts_status, text: &str) {
    assert_eq!((status, last_error().as_str()), (expected, text));
}

/// The text of the last error.
pub fn last_error() -> String {
    // SAFETY: a text that ends with a zero byte, copied before the next call.
    unsafe { CStr::from_ptr(ts_last_error_message()) }.to_str().expect("UTF-8").to_owned()
}

/// The handle or structure that `make` writes.
#[track_caller]
pub fn made<T: Copy>(make: impl FnOnce(*mut T) -> ts_status) -> T {
    // SAFETY: handles and structures of the interface are plain data.
    let mut value: T = unsafe { std::mem::zeroed() };
    ok(make(&mut value));
    value
}

/// A structure of zeros that begins with its size.
pub fn sized<T: Copy>() -> T {
    // SAFETY: structures of the interface that begin with their size are plain data.
    unsafe {
        let mut value: T = std::mem::zeroed();
        (&raw mut value).cast::<usize>().write(size_of::<T>());
        value
    }
}

pub fn cpu() -> *mut ts_device {
    // SAFETY: room for the handle.
    made(|to| unsafe { ts_device_cpu(to) })
}

/// A small configuration: 4 query heads, 2 KV heads of 16, f32, 2 initial, 5 chosen and 3 local tokens.
pub fn config() -> ts_config {
    // SAFETY: room for the structure.
    let config = made(|to| unsafe { ts_config_default(to, size_of::<ts_config>()) });
    let dtype = ts_dtype::F32 as i32;
    let (num_qo_heads, num_kv_heads, head_dim) = (4, 2, 16);
    ts_config { num_qo_heads, num_kv_heads, head_dim, dtype, n_init: 2, n_local: 3, top_k: 5, ..config }
}

pub fn limits(max_rows: usize, max_block_len: usize, max_kv_tokens: usize) -> ts_limits {
    ts_limits { max_rows, max_block_len, max_kv_tokens, ..sized() }
}

pub fn cache_config() -> ts_cache_config {
    // SAFETY: room for the structure.
    let config = made(|to| unsafe { ts_cache_config_default(to, size_of::<ts_cache_config>()) });
    ts_cache_config { num_layers: 2, num_pages: 32, page_size: 4, max_sequences: 4, ..config }
}

pub fn context(device: *const ts_device, config: &ts_config, limits: &ts_limits) -> *mut ts_context {
    // SAFETY: handles and structures are alive.
    made(|to| unsafe { ts_context_create(device, config, limits, to) })
}

/// Numbers between -2 and 2 that look random.
pub fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    (0..len).map(|_| next()).collect()
}

/// `out` and `lse` of a step.
pub struct Out {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

impl Out {
    pub fn new(tokens: usize, config: &ts_config) -> Self {
        let heads = tokens * config.num_qo_heads as usize;
        Out { out: vec![f32::NAN; heads * config.head_dim as usize], lse: vec![f32::NAN; heads] }
    }

    pub fn as_output(&mut self) -> ts_output {
        let (out, lse) = (self.out.as_mut_ptr().cast(), self.lse.as_mut_ptr());
        ts_output { out, lse, out_dtype: ts_dtype::F32 as i32, ..sized() }
    }
}

/// The address of numbers that are read.
pub fn at(numbers: &[f32]) -> *const c_void {
    numbers.as_ptr().cast()
}

/// Dense queries, keys and values.
pub fn input(q: *const c_void, k: *const c_void, v: *const c_void) -> ts_step_input {
    ts_step_input { q, k, v, ..sized() }
}

/// Dense queries.
pub fn queries(q: *const c_void) -> ts_step_input {
    input(q, null(), null())
}

/// How queries, keys and values lie in the memory of [`arrange`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lie {
    /// Three dense tensors.
    Dense,
    /// `[tokens, num_qo_heads + 2 * num_kv_heads, head_dim]`, as of a fused projection.
    Fused,
    /// `[num_qo_heads + 2 * num_kv_heads, tokens, head_dim]`.
    HeadsFirst,
}

impl Lie {
    pub const ALL: [Lie; 3] = [Lie::Dense, Lie::Fused, Lie::HeadsFirst];
}

/// Dense queries, keys and values copied into one memory, and what they are called when that is at an address.
pub fn arrange<T: Copy>(
    lie: Lie,
    [hq, hkv, d]: [usize; 3],
    [q, k, v]: [&[T]; 3],
) -> (Vec<T>, impl Fn(*const c_void) -> ts_step_input + use<T>) {
    let (mut memory, tokens) = ([q, k, v].concat(), q.len() / (hq * d));
    let (row, places) = ((hq + 2 * hkv) * d, [0, q.len(), q.len() + k.len()]);
    let (first, [token_stride, head_stride]) = match lie {
        Lie::Dense => (places, [0, 0]),
        Lie::Fused => ([0, hq * d, (hq + hkv) * d], [row, d]),
        Lie::HeadsFirst => (places, [d, tokens * d]),
    };
    if lie != Lie::Dense {
        for ((from, heads), first) in [(q, hq), (k, hkv), (v, hkv)].into_iter().zip(first) {
            for (place, head) in from.chunks_exact(d).enumerate() {
                let to = first + place / heads * token_stride + place % heads * head_stride;
                memory[to..to + d].copy_from_slice(head);
            }
        }
    }
    let called = move |base: *const c_void| {
        let [q, k, v] = first.map(|first| base.cast::<T>().wrapping_add(first).cast());
        ts_step_input {
            q_stride_token: token_stride,
            q_stride_head: head_stride,
            k_stride_token: token_stride,
            k_stride_head: head_stride,
            v_stride_token: token_stride,
            v_stride_head: head_stride,
            ..input(q, k, v)
        }
    };
    (memory, called)
}

/// The lists that the last selection of a context made.
pub fn selected(context: *const ts_context, row: usize) -> Vec<u32> {
    // SAFETY: the context is alive; the second call has the room that the first asked for.
    unsafe {
        let len = made(|to| ts_context_selected(context, row, null_mut(), 0, to));
        let mut tokens = vec![0; len];
        let again = made(|to| ts_context_selected(context, row, tokens.as_mut_ptr(), tokens.len(), to));
        assert_eq!(again, len);
        tokens
    }
}

/// Prints past the test harness, which hides the output of tests that pass.
pub fn announce(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The shared library that cargo has built beside this test.
pub fn shared_library() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let name = format!("{}tokenselect_c{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    // `deps` first: the copy beside it is made by `cargo build` only, and may be older.
    let places = test.ancestors().skip(1).take(2).map(|folder| folder.join(&name));
    let found = places.clone().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("none of {:?}", places.collect::<Vec<_>>()))
}

/// A batch of one row, which is sequence `sequence` if it has one, over these pages.
pub fn one_row(
    page_size: usize,
    indices: &[i32],
    len: usize,
    block: usize,
    sequence: Option<&'static i32>,
) -> *mut ts_batch {
    let (qo_indptr, indptr) = ([0, block as i32], [0, indices.len() as i32]);
    let last_page_len = (len - (indices.len() - 1) * page_size) as i32;
    let tables = ts_batch_tables {
        page_size,
        num_rows: 1,
        qo_indptr: qo_indptr.as_ptr(),
        indptr: indptr.as_ptr(),
        indices: indices.as_ptr(),
        last_page_len: &last_page_len,
        sequence_indices: sequence.map_or(null(), std::ptr::from_ref),
        ..sized()
    };
    // SAFETY: the arrays have the lengths that the tables say.
    made(|to| unsafe { ts_batch_create(&tables, to) })
}
