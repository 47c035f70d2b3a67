//! Prompts through the C functions: the bits of steps of their pieces, and everything that can be wrong.

mod common;

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use common::{
    Out, at, cache_config, config, context, cpu, fails, input, last_error, limits, made, numbers, ok, sized,
};
use tokenselect_c::*;

const HQ: usize = 4;
const HKV: usize = 2;
const D: usize = 16;

/// Prompts of 37 and of 20 tokens.
const LENS: [usize; 2] = [37, 20];
const TOKENS: usize = 57;

/// What a [`ts_progress`] was told, and when it stops.
struct Told {
    calls: Vec<(usize, usize)>,
    stop_after: usize,
}

unsafe extern "C" fn note(user_data: *mut c_void, done: usize, total: usize) -> i32 {
    // SAFETY: every caller here passes a `Told` of its own.
    let told = unsafe { &mut *user_data.cast::<Told>() };
    told.calls.push((done, total));
    i32::from(told.calls.len() == told.stop_after)
}

/// Blocks of 6 tokens of sequences of up to 40, four blocks a piece.
fn prefill_config() -> ts_prefill_config {
    // SAFETY: room for the structure.
    let prefill = made(|to| unsafe { ts_prefill_config_default(to, size_of::<ts_prefill_config>()) });
    ts_prefill_config { block_len: 6, max_kv_len: 40, max_piece_len: 24, ..prefill }
}

struct Rig {
    device: *mut ts_device,
    context: *mut ts_context,
    cache: *mut ts_cache,
    sequences: [ts_sequence; 2],
    tensors: [Vec<f32>; 3],
}

impl Rig {
    fn new() -> Self {
        let (device, config) = (cpu(), config());
        // SAFETY: handles and structures are alive.
        unsafe {
            let cache = made(|to| ts_cache_create(device, &config, &cache_config(), to));
            Rig {
                device,
                context: made(|to| ts_context_create_prefill(device, &config, &prefill_config(), to)),
                cache,
                sequences: [(); 2].map(|()| made(|to| ts_cache_sequence_create(cache, to))),
                tensors: [
                    numbers(1, TOKENS * HQ * D),
                    numbers(2, TOKENS * HKV * D),
                    numbers(3, TOKENS * HKV * D),
                ],
            }
        }
    }

    fn pieces(&self) -> *mut ts_pieces {
        // SAFETY: handles are alive, arrays have two entries.
        made(|to| unsafe {
            let sequences = self.sequences.as_ptr();
            ts_cache_extend_in_pieces(self.cache, self.context, sequences, LENS.as_ptr(), 2, 6, to)
        })
    }

    fn input(&self) -> ts_step_input {
        let [q, k, v] = &self.tensors;
        input(at(q), at(k), at(v))
    }

    fn prefill(&self, layer: usize, pieces: *const ts_pieces, out: &mut Out, told: &mut Told) -> ts_status {
        let (output, told) = (out.as_output(), (&raw mut *told).cast());
        // SAFETY: handles and tensors are alive, and as large as the pieces say.
        unsafe {
            let input = self.input();
            ts_prefill(self.context, self.cache, layer, pieces, &input, &output, Some(note), told)
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // SAFETY: used for the last time.
        unsafe {
            ok(ts_cache_destroy(self.cache));
            ok(ts_context_destroy(self.context));
            ok(ts_device_destroy(self.device));
        }
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn prompts_are_steps_of_their_pieces() {
    let rig = Rig::new();
    let pieces = rig.pieces();
    // SAFETY: handles are alive, tensors have the elements that the batches say.
    unsafe {
        let info: ts_pieces_info = made(|to| ts_pieces_get_info(pieces, to));
        assert_eq!(
            (info.num_pieces, info.num_blocks, info.num_query_tokens, info.block_len),
            (3, 11, TOKENS, 6)
        );
        let by_hand = Rig::new();
        let mut want = [(); 2].map(|()| Out { out: Vec::new(), lse: Vec::new() });
        for (begin, parts) in [(0, [24, 0]), (24, [13, 6]), (43, [0, 14])] {
            let whole =
                made(|to| ts_cache_extend(by_hand.cache, by_hand.sequences.as_ptr(), parts.as_ptr(), 2, to));
            let blocks = made(|to| ts_batch_in_blocks(whole, 6, to));
            // A sequence that does not grow is a row of padding.
            let context = context(by_hand.device, &config(), &limits(5, 6, 200));
            for (layer, want) in want.iter_mut().enumerate() {
                let [q, k, v] = &by_hand.tensors;
                let input =
                    input(at(&q[begin * HQ * D..]), at(&k[begin * HKV * D..]), at(&v[begin * HKV * D..]));
                let mut out = Out::new(parts[0] + parts[1], &config());
                let output = out.as_output();
                ok(ts_step(context, by_hand.cache, layer, blocks, &input, &output));
                want.out.extend(out.out);
                want.lse.extend(out.lse);
            }
            ok(ts_context_destroy(context));
            ok(ts_batch_destroy(blocks));
            ok(ts_batch_destroy(whole));
        }
        for (layer, want) in want.iter().enumerate() {
            let (mut got, mut told) =
                (Out::new(TOKENS, &config()), Told { calls: Vec::new(), stop_after: 0 });
            ok(rig.prefill(layer, pieces, &mut got, &mut told));
            assert_eq!(told.calls, [(24, TOKENS), (43, TOKENS), (57, TOKENS)]);
            assert_eq!((bits(&got.out), bits(&got.lse)), (bits(&want.out), bits(&want.lse)));

            // Again, and nobody is told.
            let mut again = Out::new(TOKENS, &config());
            let (input, output) = (rig.input(), again.as_output());
            ok(ts_prefill(rig.context, rig.cache, layer, pieces, &input, &output, None, null_mut()));
            assert_eq!(bits(&again.out), bits(&want.out));
        }
        ok(ts_pieces_destroy(pieces));
    }
}

#[test]
fn a_function_that_stops() {
    let rig = Rig::new();
    let pieces = rig.pieces();
    let (mut got, mut told) = (Out::new(TOKENS, &config()), Told { calls: Vec::new(), stop_after: 2 });
    ok(rig.prefill(0, pieces, &mut got, &mut told));
    assert_eq!(told.calls, [(24, TOKENS), (43, TOKENS)]);
    assert!(
        got.lse[..43 * HQ].iter().all(|x| x.is_finite()) && got.lse[43 * HQ..].iter().all(|x| x.is_nan())
    );
    // SAFETY: handles are alive.
    unsafe {
        let written = rig.sequences.map(|id| made(|to| ts_cache_written_len(rig.cache, 0, id, to)));
        assert_eq!(written, [37, 6]);
        ok(ts_pieces_destroy(pieces));
    }
}

/// Memory of the caller's own, keys and values in one allocation.
#[test]
fn over_borrowed_memory() {
    let rig = Rig::new();
    let pieces = rig.pieces();
    let mut want = Out::new(TOKENS, &config());
    ok(rig.prefill(0, pieces, &mut want, &mut Told { calls: Vec::new(), stop_after: 0 }));
    let mut memory = vec![f32::NAN; 16 * 2 * 4 * HKV * D];
    let half = 4 * HKV * D;
    let kv = ts_kv_view {
        k: memory.as_mut_ptr().cast(),
        v: memory[half..].as_mut_ptr().cast(),
        num_pages: 16,
        page_size: 4,
        num_kv_heads: HKV,
        head_dim: D,
        k_stride_page: 2 * half,
        k_stride_token: HKV * D,
        k_stride_head: D,
        v_stride_page: 2 * half,
        v_stride_token: HKV * D,
        v_stride_head: D,
        ..sized()
    };
    let (qo_indptr, indptr) = ([0, 37, 57], [0, 10, 15]);
    let (indices, last_page_len): (Vec<i32>, _) = ((0..15).rev().collect(), [1, 4]);
    let tables = ts_batch_tables {
        page_size: 4,
        num_rows: 2,
        qo_indptr: qo_indptr.as_ptr(),
        indptr: indptr.as_ptr(),
        indices: indices.as_ptr(),
        last_page_len: last_page_len.as_ptr(),
        ..sized()
    };
    // SAFETY: handles, tables and tensors are alive, and as large as they say.
    unsafe {
        let batch = made(|to| ts_batch_create(&tables, to));
        let own = made(|to| ts_batch_in_pieces(batch, rig.context, 6, to));
        let mut got = Out::new(TOKENS, &config());
        let mut told = Told { calls: Vec::new(), stop_after: 0 };
        let (input, output, user) = (rig.input(), got.as_output(), (&raw mut told).cast());
        let prefill = |kv: &ts_kv_view, input: &ts_step_input, output: &ts_output| {
            ts_prefill_kv(rig.context, own, kv, input, output, null_mut(), 0, Some(note), user)
        };
        ok(prefill(&kv, &input, &output));
        assert_eq!(told.calls.len(), 3);
        assert_eq!((bits(&got.out), bits(&got.lse)), (bits(&want.out), bits(&want.lse)));

        let among = ts_output { out: kv.k, ..output };
        fails(
            prefill(&kv, &input, &among),
            ts_status::Overlap,
            "`output.out` is written and must not overlap `kv.k`",
        );
        let inside = ts_step_input { k: kv.v.cast_const(), ..input };
        fails(
            prefill(&kv, &inside, &output),
            ts_status::Overlap,
            "`kv.k` is written and must not overlap `k`",
        );
        fails(
            prefill(&ts_kv_view { num_pages: 14, ..kv }, &input, &output),
            ts_status::Index,
            "`page` must be below 14, got 14",
        );
        let mut none = null_mut();
        fails(
            ts_batch_in_pieces(batch, rig.context, 0, &mut none),
            ts_status::Config,
            "argument `block_len` must be at least 1, got 0",
        );
        assert_eq!(ts_batch_in_pieces(batch, rig.context, 7, &mut none), ts_status::Limit);
        assert!(
            last_error().starts_with("`max_block_len` is limited to 6, the batch needs 7"),
            "{}",
            last_error()
        );
        for handle in [own, pieces] {
            ok(ts_pieces_destroy(handle));
        }
        ok(ts_batch_destroy(batch));
    }
}

#[test]
fn the_workspace_is_bounded() {
    let (device, config) = (cpu(), config());
    let create = |prefill: ts_prefill_config, to: &mut *mut ts_context| {
        // SAFETY: handles and structures are alive.
        unsafe { ts_context_create_prefill(device, &config, &prefill, to) }
    };
    let mut smallest = null_mut();
    let small = ts_prefill_config { max_workspace_bytes: 1000, ..prefill_config() };
    assert_eq!(create(small, &mut smallest), ts_status::Config);
    let text = last_error();
    let start = "configuration field `max_workspace_bytes` must be at least ";
    let end = ", for one block of 6 tokens of a sequence of 40, got 1000";
    let least = text.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
    let least: usize = least.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(
        create(ts_prefill_config { max_workspace_bytes: least - 1, ..small }, &mut smallest),
        ts_status::Config
    );
    ok(create(ts_prefill_config { max_workspace_bytes: least, ..small }, &mut smallest));
    let text = "configuration field `block_len` must be from 1 to 2147483647, got 0";
    let mut other = null_mut();
    fails(create(ts_prefill_config { block_len: 0, ..small }, &mut other), ts_status::Config, text);
    assert!(other.is_null());
    let text = "`prefill.struct_size` must be 40, or more with zeros after it, got 0";
    fails(create(ts_prefill_config { struct_size: 0, ..small }, &mut other), ts_status::StructSize, text);
    // SAFETY: used for the last time.
    unsafe {
        ok(ts_context_destroy(smallest));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn null_pointers_and_overlaps() {
    use ts_status::NullPointer;
    let rig = Rig::new();
    let pieces = rig.pieces();
    let mut out = Out::new(TOKENS, &config());
    // SAFETY: null where it is refused, else alive.
    unsafe {
        let (input, output) = (rig.input(), out.as_output());
        let prefill = |context, cache, pieces, input, output| {
            ts_prefill(context, cache, 0, pieces, input, output, None, null_mut())
        };
        let (context, cache) = (rig.context, rig.cache);
        for (status, text) in [
            (prefill(null_mut(), cache, pieces, &input, &output), "context"),
            (prefill(context, null_mut(), pieces, &input, &output), "cache"),
            (prefill(context, cache, null(), &input, &output), "pieces"),
            (prefill(context, cache, pieces, null(), &output), "input"),
            (prefill(context, cache, pieces, &input, null()), "output"),
            (ts_prefill_config_default(null_mut(), 40), "prefill"),
            (ts_pieces_get_info(null(), null_mut()), "pieces"),
            (ts_pieces_get_info(pieces, null_mut()), "info"),
            (ts_batch_in_pieces(null(), context, 6, null_mut()), "batch"),
            (ts_context_create_prefill(rig.device, &config(), null(), null_mut()), "prefill"),
            (ts_cache_extend_in_pieces(cache, null(), null(), null(), 0, 6, null_mut()), "context"),
            (ts_cache_extend_in_pieces(cache, context, null(), LENS.as_ptr(), 2, 6, null_mut()), "sequences"),
            (ts_cache_extend_in_pieces(cache, context, null(), null(), 0, 6, null_mut()), "pieces"),
        ] {
            assert_eq!(status, NullPointer, "{text}");
        }
        fails(
            prefill(context, cache, pieces, &ts_step_input { q: null(), ..input }, &output),
            NullPointer,
            "`q` must not be null",
        );
        let same = ts_output { out: input.q.cast_mut(), ..output };
        let text = "`output.out` is written and must not overlap `q`";
        fails(prefill(context, cache, pieces, &input, &same), ts_status::Overlap, text);
        let text = "`layer` must be below 2, got 2";
        let status = ts_prefill(context, cache, 2, pieces, &input, &output, None, null_mut());
        fails(status, ts_status::Index, text);
        ok(ts_pieces_destroy(null_mut()));
        ok(ts_pieces_destroy(pieces));
    }
    assert!(out.out.iter().chain(&out.lse).all(|x| x.is_nan()), "nothing was written");
}
