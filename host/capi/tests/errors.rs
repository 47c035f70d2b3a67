//! What C can get wrong: every kind of mistake is a status and a text that names it, and nothing unwinds.

mod common;

use std::ffi::CStr;
use std::ptr::{null, null_mut};

use common::{
    Out, at, cache_config, config, context, cpu, fails, input, last_error, limits, made, numbers, ok,
    queries, sized,
};
use tokenselect_c::*;

/// A batch of one row with the tables given.
fn batch(qo: &[i32], indptr: &[i32], indices: &[i32], last: &[i32], to: *mut *mut ts_batch) -> ts_status {
    let tables = ts_batch_tables {
        page_size: 4,
        num_rows: last.len(),
        qo_indptr: qo.as_ptr(),
        indptr: indptr.as_ptr(),
        indices: indices.as_ptr(),
        last_page_len: last.as_ptr(),
        ..sized()
    };
    // SAFETY: the arrays have the lengths that the tables say, or the tables are refused before.
    unsafe { ts_batch_create(&tables, to) }
}

#[test]
fn versions_and_names() {
    // SAFETY: static texts.
    let text = |text| unsafe { CStr::from_ptr(text) }.to_str().unwrap();
    assert_eq!(ts_abi_version(), TS_ABI_VERSION);
    assert_eq!(text(ts_version()), env!("CARGO_PKG_VERSION"));
    assert_eq!(text(ts_status_name(-1)), "unknown status");
    let header = include_str!("../include/tokenselect.h");
    let mut named = 0;
    for line in header.lines().filter(|line| line.trim_start().starts_with("TS_STATUS_")) {
        let (name, number) = line.trim().trim_end_matches(',').split_once(" = ").unwrap();
        assert_eq!(text(ts_status_name(number.parse().unwrap())), name);
        named += 1;
    }
    assert_eq!(named, 32);
    let name = cpu();
    // SAFETY: a device, alive while its name is read.
    unsafe {
        assert_eq!(text(ts_device_name(name)), "cpu");
        assert!(ts_device_name(null()).is_null());
        ok(ts_device_synchronize(name));
        ok(ts_device_destroy(name));
    }
}

#[test]
fn null_pointers() {
    use ts_status::NullPointer;
    let (config, limits, device) = (config(), limits(1, 4, 16), cpu());
    let context = context(device, &config, &limits);
    let mut made_context = null_mut();
    // SAFETY: null where it is refused, else alive.
    unsafe {
        fails(ts_device_cpu(null_mut()), NullPointer, "`device` must not be null");
        let status = ts_context_create(null(), &config, &limits, &mut made_context);
        fails(status, NullPointer, "`device` must not be null");
        let status = ts_context_create(device, null(), &limits, &mut made_context);
        fails(status, NullPointer, "`config` must not be null");
        let status = ts_context_create(device, &config, null(), &mut made_context);
        fails(status, NullPointer, "`limits` must not be null");
        let status = ts_context_create(device, &config, &limits, null_mut());
        fails(status, NullPointer, "`context` must not be null");
        fails(
            ts_config_default(null_mut(), size_of::<ts_config>()),
            NullPointer,
            "`config` must not be null",
        );
        fails(ts_vote(context, null()), NullPointer, "`batch` must not be null");
        fails(ts_vote(null_mut(), null()), NullPointer, "`context` must not be null");
        fails(ts_batch_create(null(), null_mut()), NullPointer, "`batch` must not be null");
        fails(ts_graph_launch(null()), NullPointer, "`graph` must not be null");
        fails(ts_capture(device, None, null_mut(), &mut null_mut()), NullPointer, "`work` must not be null");
        fails(ts_selection_cache_clear(null_mut(), 0), NullPointer, "`selections` must not be null");

        let batch = made(|to| batch(&[0, 1], &[0, 1], &[0], &[1], to));
        fails(ts_pool(context, batch, null(), null_mut(), 0), NullPointer, "`input` must not be null");
        let none: ts_step_input = sized();
        fails(ts_pool(context, batch, &none, null_mut(), 0), NullPointer, "`q` must not be null");
        let mut kv = ts_kv_view { num_pages: 1, page_size: 4, num_kv_heads: 2, head_dim: 16, ..sized() };
        ok(ts_kv_view_set_dense(&mut kv, ts_kv_layout::Hnd as i32));
        assert_eq!((kv.k_stride_page, kv.k_stride_token, kv.k_stride_head), (128, 16, 64));
        assert_eq!((kv.v_stride_page, kv.v_stride_token, kv.v_stride_head), (128, 16, 64));
        fails(ts_score(context, batch, &kv), NullPointer, "`kv.k` must not be null");
        for destroyed in [
            ts_device_destroy(null_mut()),
            ts_cache_destroy(null_mut()),
            ts_batch_destroy(null_mut()),
            ts_batch_slot_destroy(null_mut()),
            ts_selection_cache_destroy(null_mut()),
            ts_buffer_destroy(null_mut()),
            ts_graph_destroy(null_mut()),
        ] {
            ok(destroyed);
        }
        ok(ts_batch_destroy(batch));
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn configurations() {
    use ts_status::{Config, StructSize, UnknownEnum};
    // SAFETY: structures that are alive and as long as they say.
    let check = |config: ts_config, status, text: &str| unsafe {
        fails(ts_config_validate(&config), status, text);
    };
    let valid = config();
    check(ts_config { dtype: 9, ..valid }, UnknownEnum, "`config.dtype` must be a ts_dtype, got 9");
    let text = "`config.positions` must be a ts_positions, got -1";
    check(ts_config { positions: -1, ..valid }, UnknownEnum, text);
    let text = "`config.selection_cache` must be 0 or 1, got 2";
    check(ts_config { selection_cache: 2, ..valid }, UnknownEnum, text);
    let mut rope = ts_config { positions: ts_positions::Reassigned as i32, ..valid };
    rope.rope.pairing = 7;
    check(rope, UnknownEnum, "`config.rope.pairing` must be a ts_rope_pairing, got 7");
    rope.rope.pairing = ts_rope_pairing::Interleaved as i32;
    rope.rope.scaling = 4;
    check(rope, UnknownEnum, "`config.rope.scaling` must be a ts_rope_scaling, got 4");
    for scaling in
        [ts_rope_scaling::None, ts_rope_scaling::Linear, ts_rope_scaling::Llama3, ts_rope_scaling::Yarn]
    {
        rope.rope.scaling = scaling as i32;
        // SAFETY: a structure that is alive.
        ok(unsafe { ts_config_validate(&rope) });
    }
    rope.rope.rotary_dim = 18;
    let text = "configuration field `rope.rotary_dim` must be even, from 2 to head_dim = 16, got 18";
    check(rope, Config, text);
    let text = "configuration field `top_k` must be at least 1, got 0";
    check(ts_config { top_k: 0, ..valid }, Config, text);
    let text = "configuration field `dtype` must be f16, bf16 or f32, got u32";
    check(ts_config { dtype: ts_dtype::U32 as i32, ..valid }, Config, text);
    let text = "configuration field `sm_scale` must be finite, got inf";
    check(ts_config { sm_scale: f32::INFINITY, ..valid }, Config, text);
    let text = "configuration field `logits_soft_cap` must be finite and above 0, got NaN";
    check(ts_config { logits_soft_cap: f32::NAN, ..valid }, Config, text);

    let size = size_of::<ts_config>();
    let text =
        |got: usize| format!("`config.struct_size` must be {size}, or more with zeros after it, got {got}");
    check(ts_config { struct_size: 0, ..valid }, StructSize, &text(0));
    check(ts_config { struct_size: size - 8, ..valid }, StructSize, &text(size - 8));
    #[repr(C)]
    struct Later {
        config: ts_config,
        new_field: u64,
    }
    let struct_size = size_of::<Later>();
    let mut later = Later { config: ts_config { struct_size, ..valid }, new_field: 0 };
    // SAFETY: structures that are alive and as long as they say.
    unsafe {
        ok(ts_config_validate(&raw const later.config));
        later.new_field = 1;
        fails(ts_config_validate(&raw const later.config), StructSize, &text(struct_size));
        ok(ts_config_default(&raw mut later.config, struct_size));
        assert_eq!((later.config.struct_size, later.new_field, later.config.top_k), (struct_size, 0, 2048));
        fails(ts_config_default(&raw mut later.config, 8), StructSize, &text(8));
        ok(ts_limits_default(&mut limits(0, 0, 0), size_of::<ts_limits>()));
    }
    let mut cache = cache_config();
    (cache.layout, cache.num_layers) = (2, 0);
    let device = cpu();
    let mut handle = null_mut();
    // SAFETY: structures that are alive.
    unsafe {
        let text = "`cache_config.layout` must be a ts_kv_layout, got 2";
        fails(ts_cache_create(device, &valid, &cache, &mut handle), UnknownEnum, text);
        cache.layout = 1;
        let text = "configuration field `num_layers` must be from 1 to 65536, got 0";
        handle = std::ptr::dangling_mut();
        fails(ts_cache_create(device, &valid, &cache, &mut handle), Config, text);
        assert!(handle.is_null(), "no handle where there is an error");
        ok(ts_device_destroy(device));
    }
}

/// Every structure that callers fill is asked for its size, and for what is behind it.
#[test]
fn sizes_of_structures() {
    use ts_status::{StructSize, UnknownEnum};

    /// A structure of a caller that knows one more field.
    #[repr(C)]
    struct Later<T> {
        known: T,
        new_field: u64,
    }

    fn check<T: Copy>(name: &str, mut call: impl FnMut(*const T) -> ts_status) {
        let size = size_of::<T>();
        let text = |expected: usize, got: usize| {
            format!("`{name}.struct_size` must be {expected}, or more with zeros after it, got {got}")
        };
        let mut later = Later::<T> { known: sized(), new_field: 0 };
        let at = &raw mut later;
        let mut with = |struct_size: usize, new_field: u64| {
            // SAFETY: the structure is alive and begins with its size.
            unsafe {
                (*at).new_field = new_field;
                at.cast::<usize>().write(struct_size);
            }
            call(at.cast_const().cast())
        };
        // Whatever is wrong in a structure of zeros, it is not its size.
        for fine in [size, size + 8] {
            assert_ne!(with(fine, 0), StructSize, "{name}");
        }
        let first = if name == "limits" { 32 } else { size };
        for short in [0, 8, first - 1] {
            fails(with(short, 0), StructSize, &text(first, short));
        }
        fails(with(4097, 0), StructSize, &text(first, 4097));
        fails(with(size + 8, 1), StructSize, &text(size, size + 8));
        fails(with(size + 1, 1), StructSize, &text(size, size + 1));
    }

    let (config, device) = (config(), cpu());
    let context = context(device, &config, &limits(1, 4, 16));
    let batch = made(|to| batch(&[0, 0], &[0, 0], &[], &[0], to));
    let (mut bytes, mut handle, mut cache) = (0, null_mut(), null_mut());
    let (input, output): (ts_step_input, ts_output) = (sized(), sized());
    // SAFETY: structures are alive and as long as they say; what they name is empty or null.
    unsafe {
        let owned = made(|to| ts_cache_create(device, &config, &cache_config(), to));
        check("config", |it| ts_config_validate(it));
        check("limits", |it| ts_workspace_bytes(device, &config, it, &mut bytes));
        check("cache_config", |it| ts_cache_create(device, &config, it, &mut cache));
        check("prefill", |it| ts_context_create_prefill(device, &config, it, &mut null_mut()));
        check("tables", |it| ts_batch_create(it, &mut handle));
        check("kv", |it| ts_score(context, batch, it));
        check("kv", |it| ts_append(context, batch, it, &input));
        check("kv", |it| ts_select(context, batch, it, &input, null_mut(), 0));
        check("kv", |it| ts_append_select(context, batch, it, &input, null_mut(), 0));
        check::<ts_kv_view>("kv", |it| ts_kv_view_set_dense(it.cast_mut(), 0));
        let kv: ts_kv_view = sized();
        check("output", |it| ts_attend(context, batch, &kv, &input, it));
        check("output", |it| ts_attend_dense(context, batch, &kv, &input, it));
        check("kv", |it| ts_attend(context, batch, it, &input, &output));
        check("selection", |it| ts_attend_to(context, batch, &kv, &input, it, &output));
        check("input", |it| ts_append(context, batch, &kv, it));
        check("input", |it| ts_select(context, batch, &kv, it, null_mut(), 0));
        check("input", |it| ts_append_select(context, batch, &kv, it, null_mut(), 0));
        check("input", |it| ts_pool(context, batch, it, null_mut(), 0));
        check("input", |it| ts_attend(context, batch, &kv, it, &output));
        check("input", |it| ts_cache_append(context, owned, 0, batch, it));
        check("parts", |it| ts_merge(context, it, &output));
        check("input", |it| ts_step(context, owned, 0, batch, it, &output));
        check("output", |it| ts_step_dense(context, owned, 0, batch, &input, it));
        let pieces = made(|to| ts_batch_in_pieces(batch, context, 4, to));
        check("input", |it| ts_prefill(context, owned, 0, pieces, it, &output, None, null_mut()));
        check("output", |it| ts_prefill(context, owned, 0, pieces, &input, it, None, null_mut()));
        check("kv", |it| {
            ts_prefill_kv(context, pieces, it, &input, &output, null_mut(), 0, None, null_mut())
        });
        ok(ts_pieces_destroy(pieces));
        let mut view: ts_kv_view = sized();
        let text = "`kv.struct_size` must be 104, or more with zeros after it, got 103";
        fails(ts_cache_layer(owned, 0, &mut view, 103), StructSize, text);
        fails(ts_cache_layer_mut(owned, 0, &mut view, 103), StructSize, text);
        assert!(view.k.is_null());

        let zero = "must be 0, got 1";
        let check = |status, what: &str| fails(status, UnknownEnum, &format!("`{what}` {zero}"));
        let reserved = ts_output { reserved: 1, ..output };
        check(ts_attend(context, batch, &kv, &input, &reserved), "output.reserved");
        let reserved = ts_limits { reserved: 1, ..limits(1, 4, 16) };
        check(ts_workspace_bytes(device, &config, &reserved, &mut bytes), "limits.reserved");
        check(ts_config_validate(&ts_config { reserved: 1, ..config }), "config.reserved");
        let reserved = ts_cache_config { reserved: 1, ..cache_config() };
        check(ts_cache_create(device, &config, &reserved, &mut cache), "cache_config.reserved");
        for handle in [handle, batch] {
            ok(ts_batch_destroy(handle));
        }
        ok(ts_cache_destroy(owned));
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

/// A context that was made for some operations refuses the others.
#[test]
fn operations() {
    let (config, device) = (config(), cpu());
    let only = |operations| ts_limits { operations, ..limits(1, 4, 16) };
    let batch = made(|to| batch(&[0, 1], &[0, 1], &[0], &[1], to));
    let (mut pool, q) = (vec![0.0; 256], numbers(2, 64));
    // SAFETY: within the arrays; handles are alive.
    unsafe {
        let mut bytes = 0;
        for wrong in [-1, 32, 33] {
            let status = ts_workspace_bytes(device, &config, &only(wrong), &mut bytes);
            let text = format!("`limits.operations` must be a sum of ts_operation, got {wrong}");
            fails(status, ts_status::UnknownEnum, &text);
        }
        let (k, v) = (pool.as_mut_ptr().cast(), pool.as_mut_ptr().add(128).cast());
        let mut kv =
            ts_kv_view { k, v, num_pages: 1, page_size: 4, num_kv_heads: 2, head_dim: 16, ..sized() };
        ok(ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32));
        let (input, none) = (input(at(&q), at(&q), at(&q)), null_mut());
        for operations in 1..=ts_operation::All as i32 {
            let context = context(device, &config, &only(operations));
            let has = |all: &[ts_operation]| all.iter().all(|&one| operations & one as i32 != 0);
            let mut got = Out::new(1, &config);
            let output = got.as_output();
            use ts_operation::{Append, Attend, Pool, Score, Vote};
            let selects = has(&[Pool, Score, Vote]);
            for (needed, status) in [
                (has(&[Append]), ts_append(context, batch, &kv, &input)),
                (selects, ts_select(context, batch, &kv, &input, none, 0)),
                (selects && has(&[Append]), ts_append_select(context, batch, &kv, &input, none, 0)),
                (has(&[Pool]), ts_pool(context, batch, &input, none, 0)),
                (has(&[Pool]), ts_compare(context, batch, none, 0)),
                (has(&[Pool]), ts_decide(context, batch, none, 0)),
                (has(&[Attend]), ts_attend_dense(context, batch, &kv, &input, &output)),
            ] {
                let expected = if needed { ts_status::Ok } else { ts_status::Missing };
                assert_eq!(status, expected, "{operations}: {}", last_error());
            }
            for (needed, status) in [
                (has(&[Score]), ts_score(context, batch, &kv)),
                (has(&[Vote]), ts_vote(context, batch)),
                (has(&[Vote]), ts_top_k(context, batch, none, 0)),
                (has(&[Vote]), ts_vote_top_k(context, batch, none, 0)),
                (has(&[Attend]), ts_attend(context, batch, &kv, &input, &output)),
            ] {
                assert_eq!(status == ts_status::Missing, !needed, "{operations}: {}", last_error());
            }
            ok(ts_context_destroy(context));
        }
        ok(ts_device_supports(device, &config));
        let wrong = ts_config { top_k: 0, ..config };
        assert_eq!(ts_device_supports(device, &wrong), ts_status::Config);
        ok(ts_batch_destroy(batch));
        ok(ts_device_destroy(device));
    }
}

/// An operation that comes before what it works on, or after that was done for another batch.
#[test]
fn order() {
    use ts_status::{Order, UnknownEnum};
    let (config, device) = (config(), cpu());
    let context = context(device, &config, &limits(1, 4, 16));
    let [first, second] = [0, 1].map(|_| made(|to| batch(&[0, 1], &[0, 1], &[0], &[1], to)));
    let (mut pool, q) = (vec![0.0; 256], numbers(2, 64));
    let mut got = Out::new(1, &config);
    // SAFETY: within the arrays; handles are alive.
    unsafe {
        let (k, v) = (pool.as_mut_ptr().cast(), pool.as_mut_ptr().add(128).cast());
        let mut kv =
            ts_kv_view { k, v, num_pages: 1, page_size: 4, num_kv_heads: 2, head_dim: 16, ..sized() };
        ok(ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32));
        let (q, none, output) = (&queries(at(&q)), null_mut(), got.as_output());
        let text = |op: &str, needs: &str, holds: &str| {
            format!("`{op}` needs `{needs}` of the same batch before it, the workspace holds {holds}")
        };
        let no = "no such results";
        fails(ts_score(context, first, &kv), Order, &text("score", "pool", no));
        fails(ts_compare(context, first, none, 0), Order, &text("compare", "pool", no));
        fails(ts_attend(context, first, &kv, q, &output), Order, &text("attend", "top_k", no));
        ok(ts_pool(context, first, q, none, 0));
        fails(ts_decide(context, first, none, 0), Order, &text("decide", "compare", no));
        fails(ts_vote(context, first), Order, &text("vote", "score", no));
        fails(ts_vote_top_k(context, first, none, 0), Order, &text("vote_top_k", "score", no));
        fails(ts_top_k(context, first, none, 0), Order, &text("top_k", "vote", no));
        fails(ts_score(context, second, &kv), Order, &text("score", "pool", "the results of another batch"));
        ok(ts_compare(context, first, none, 0));
        fails(ts_score(context, first, &kv), Order, &text("score", "decide", no));
        ok(ts_decide(context, first, none, 0));
        ok(ts_score(context, first, &kv));
        ok(ts_vote(context, first));
        ok(ts_top_k(context, first, none, 0));
        ok(ts_attend(context, first, &kv, q, &output));
        let text = text("attend", "top_k", "the results of another batch");
        fails(ts_attend(context, second, &kv, q, &output), Order, &text);
        let mut index = 9;
        for (row, token, head, what) in [(1, 0, 0, "row"), (0, 1, 0, "token"), (0, 0, 4, "query head")] {
            let status = ts_context_logit_index(context, first, row, token, head, &mut index);
            assert_eq!((status, index), (ts_status::Index, 9));
            assert!(last_error().starts_with(&format!("`{what}` must be below ")), "{}", last_error());
        }
        assert_eq!(ts_context_provide(context, 11, first), UnknownEnum);
        for handle in [first, second] {
            ok(ts_batch_destroy(handle));
        }
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

/// A call that fails has written nothing: neither pages nor outputs nor counts.
#[test]
fn failed_calls_change_nothing() {
    use ts_status::{Misaligned, NullPointer, Overlap};
    let (config, device) = (config(), cpu());
    let context = context(device, &config, &limits(1, 4, 16));
    let (mut pool, q) = (numbers(1, 256), numbers(2, 64));
    let (before, mut got) = (pool.clone(), Out::new(1, &config));
    let base = pool.as_mut_ptr();
    let (qo_indptr, indptr, indices, last_page_len) = ([0, 1], [0, 1], [0], 1);
    let tables = |sequence_indices| ts_batch_tables {
        page_size: 4,
        num_rows: 1,
        qo_indptr: qo_indptr.as_ptr(),
        indptr: indptr.as_ptr(),
        indices: indices.as_ptr(),
        last_page_len: &last_page_len,
        sequence_indices,
        ..sized()
    };
    // SAFETY: within the arrays; handles are alive.
    unsafe {
        let selections = made(|to| ts_selection_cache_create(device, &config, 1, 2, to));
        let right_batch = made(|to| ts_batch_create(&tables(&1), to));
        let far = made(|to| ts_batch_create(&tables(&2), to)); // a sequence that the Selection Cache does not have
        for [k_place, v_place] in [[0, 128], [128, 0], [0, 16], [16, 0]] {
            let (k, v) = (base.add(k_place).cast(), base.add(v_place).cast());
            let mut kv =
                ts_kv_view { k, v, num_pages: 1, page_size: 4, num_kv_heads: 2, head_dim: 16, ..sized() };
            ok(ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32));
            if k_place.abs_diff(v_place) == 16 {
                (kv.k_stride_head, kv.v_stride_head) = (32, 32);
                (kv.k_stride_token, kv.v_stride_token) = (64, 64);
            }
            let few_pages = ts_kv_view { num_pages: 0, ..kv };
            let other_heads = ts_kv_view { num_kv_heads: 1, ..kv };
            let (q, output) = (at(&q), got.as_output());
            let odd = q.byte_add(2);
            let step = |batch, kv: &ts_kv_view, [q, k, v]: [*const std::ffi::c_void; 3], layer| {
                ts_append_select(context, batch, kv, &input(q, k, v), selections, layer)
            };
            for (status, expected) in [
                (step(far, &kv, [q, q, q], 0), ts_status::Index),
                (step(right_batch, &kv, [q, q, q], 1), ts_status::Index),
                (step(right_batch, &few_pages, [q, q, q], 0), ts_status::Index),
                (step(right_batch, &other_heads, [q, q, q], 0), ts_status::Shape),
                (step(right_batch, &kv, [odd, q, q], 0), Misaligned),
                (step(right_batch, &kv, [q, null(), q], 0), NullPointer),
                (step(right_batch, &kv, [q, q, kv.k], 0), Overlap),
                (step(right_batch, &kv, [kv.v, q, q], 0), Overlap),
                (ts_append(context, right_batch, &few_pages, &input(q, q, q)), ts_status::Index),
                (ts_append(context, right_batch, &kv, &input(q, q, odd)), Misaligned),
                (ts_append(context, right_batch, &kv, &input(q, kv.v, q)), Overlap),
                (ts_attend_dense(context, right_batch, &few_pages, &queries(q), &output), ts_status::Index),
                (ts_attend_dense(context, right_batch, &kv, &queries(odd), &output), Misaligned),
            ] {
                assert_eq!(status, expected, "{}", last_error());
                assert_eq!(pool, before);
                assert!(got.out.iter().chain(&got.lse).all(|x| x.is_nan()));
            }
            ok(step(right_batch, &kv, [q, q, q], 0)); // all is well without the mistakes
            assert_ne!(pool, before);
            pool.copy_from_slice(&before);
        }
        let stats: ts_selection_stats = made(|to| ts_selection_cache_stats(selections, to));
        assert_eq!((stats.reused, stats.scored, stats.complete), (0, 0, 4));

        // The same for a step of an owned cache, whose own pages are no inputs and outputs.
        let cache = made(|to| ts_cache_create(device, &config, &cache_config(), to));
        let id = made(|to| ts_cache_sequence_create(cache, to));
        let batch = made(|to| ts_cache_extend(cache, &id, &1, 1, to));
        let kv: ts_kv_view = made(|to| ts_cache_layer(cache, 1, to, size_of::<ts_kv_view>()));
        let pages = std::slice::from_raw_parts(kv.k.cast::<f32>(), 32 * 4 * 32);
        let (q, output) = (at(&q), got.as_output());
        let right = input(q, q, q);
        for (input, output) in [
            (ts_step_input { k: kv.k, ..right }, output),
            (ts_step_input { q: kv.v, ..right }, output),
            (right, ts_output { out: kv.k, ..output }),
            (right, ts_output { lse: kv.v.cast(), ..output }),
        ] {
            assert_eq!(ts_step(context, cache, 1, batch, &input, &output), Overlap);
            assert_eq!(ts_step_dense(context, cache, 1, batch, &input, &output), Overlap);
        }
        assert_eq!(ts_cache_append(context, cache, 1, batch, &input(q, q, kv.v)), Overlap);
        assert!(pages.iter().all(|&x| x == 0.0));
        assert_eq!(made::<usize>(|to| ts_cache_written_len(cache, 1, id, to)), 0);
        ok(ts_cache_destroy(cache));
        for handle in [batch, far, right_batch] {
            ok(ts_batch_destroy(handle));
        }
        ok(ts_selection_cache_destroy(selections));
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn tables() {
    use ts_status::Table;
    let mut to = null_mut();
    let text = "batch row 0: `last_page_len` must be from 1 to page_size = 4, got 5";
    fails(batch(&[0, 1], &[0, 1], &[0], &[5], &mut to), Table, text);
    let text = "batch row 0: `block length` must be at most the row's 1 cached tokens, got 2";
    fails(batch(&[0, 2], &[0, 1], &[0], &[1], &mut to), Table, text);
    fails(batch(&[0, 1], &[0, 2], &[3, -7], &[1], &mut to), Table, "`indices[1]` must be 0 or more, got -7");
    fails(batch(&[0, -1], &[0, 1], &[0], &[1], &mut to), Table, "`qo_indptr[1]` must be 0 or more, got -1");
    assert!(to.is_null());

    let batch = made(|to| batch(&[0, 1], &[0, 1], &[9], &[1], to));
    let (config, device) = (config(), cpu());
    let small = context(device, &config, &limits(1, 1, 3));
    // SAFETY: handles are alive.
    unsafe {
        let text = "`max_kv_tokens` is limited to 3, the batch needs 4: make the limit larger, or the batch smaller (after an `extend`, \
                `truncate` takes it back)";
        fails(ts_vote(small, batch), ts_status::Limit, text);
        let mut row: ts_batch_row = made(|to| ts_batch_get_row(batch, 0, to));
        fails(ts_batch_get_row(batch, 1, &mut row), ts_status::Index, "`row` must be below 1, got 1");
        let padded = made(|to| ts_batch_padded(batch, 3, 1, to));
        let info: ts_batch_info = made(|to| ts_batch_get_info(padded, to));
        assert_eq!((info.num_rows, info.num_query_tokens), (3, 3));
        let text = "`num_rows` is limited to 1, the batch needs 3";
        fails(ts_batch_padded(padded, 1, 1, &mut to), ts_status::Limit, text);
        let mut slot = null_mut();
        let text = "`device` must be on a GPU, it is on cpu";
        fails(ts_batch_slot_create(device, batch, 4, &mut slot), ts_status::WrongDevice, text);
        for handle in [batch, padded] {
            ok(ts_batch_destroy(handle));
        }
        ok(ts_context_destroy(small));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn pointers_to_tensors() {
    use ts_status::{Capacity, Misaligned, Overlap, UnknownEnum};
    let (config, device) = (config(), cpu());
    let context = context(device, &config, &limits(1, 4, 16));
    let batch = made(|to| batch(&[0, 1], &[0, 1], &[0], &[1], to));
    let mut pool = numbers(1, 2 * 128 + 1);
    let base = pool.as_mut_ptr();
    let q = numbers(2, 64);
    let mut got = Out::new(1, &config);
    // SAFETY: within the arrays; handles are alive.
    unsafe {
        let mut kv = ts_kv_view {
            k: base.cast(),
            v: base.add(128).cast(),
            num_pages: 1,
            page_size: 4,
            num_kv_heads: 2,
            head_dim: 16,
            ..sized()
        };
        ok(ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32));
        let text = "`layout` must be a ts_kv_layout, got 5";
        fails(ts_kv_view_set_dense(&mut kv, 5), UnknownEnum, text);
        let right = input(at(&q), at(&q), at(&q));
        ok(ts_append(context, batch, &kv, &right));
        ok(ts_select(context, batch, &kv, &right, null_mut(), 0));

        let odd = at(&q).byte_add(1);
        let text = format!("`q` must be at an address divisible by 4, got {:#x}", odd.addr());
        fails(ts_pool(context, batch, &queries(odd), null_mut(), 0), Misaligned, &text);
        let odd_batch: *const ts_batch = batch.byte_add(1);
        assert_eq!(ts_vote(context, odd_batch), Misaligned);
        assert!(last_error().starts_with("`batch` must be at an address divisible by 8, got 0x"));

        let output = got.as_output();
        let wrong = ts_output { out_dtype: 77, ..output };
        let text = "`output.out_dtype` must be a ts_dtype, got 77";
        fails(ts_attend(context, batch, &kv, &right, &wrong), UnknownEnum, text);
        let wrong = ts_output { out_dtype: ts_dtype::F16 as i32, ..output };
        let text = "`out` must be f32, got f16";
        fails(ts_attend(context, batch, &kv, &right, &wrong), ts_status::ElementType, text);
        let wrong = ts_output { out: q.as_ptr().cast_mut().cast(), ..output };
        let text = "`output.out` is written and must not overlap `q`";
        fails(ts_attend(context, batch, &kv, &right, &wrong), Overlap, text);
        let wrong = ts_output { lse: output.out.cast::<f32>().add(63), ..output };
        let text = "`output.out` is written and must not overlap `output.lse`";
        fails(ts_attend(context, batch, &kv, &right, &wrong), Overlap, text);
        let text = "`kv.k` is written and must not overlap `k`";
        fails(ts_append(context, batch, &kv, &ts_step_input { k: kv.k, ..right }), Overlap, text);
        let same = ts_kv_view { v: kv.k, ..kv };
        // What lies between the first element and the last counts, and nothing behind it.
        let mut long = numbers(3, 256);
        let base = long.as_mut_ptr();
        let strided = ts_step_input { q_stride_head: 24, ..queries(base.cast()) };
        let text = "`output.lse` is written and must not overlap `q`";
        for gap in [16, 3 * 24 + 15] {
            let wrong = ts_output { lse: base.add(gap), ..output };
            fails(ts_attend(context, batch, &kv, &strided, &wrong), Overlap, text);
        }
        let behind = ts_output { lse: base.add(3 * 24 + 16), ..output };
        ok(ts_attend(context, batch, &kv, &strided, &behind));
        let far = ts_step_input { q_stride_head: usize::MAX, ..right };
        let text = format!(
            "argument `q` must be at most isize::MAX bytes, got [1, 4, 16] in strides [64, {}]",
            usize::MAX
        );
        fails(ts_attend(context, batch, &kv, &far, &output), ts_status::Config, &text);
        let text = "`kv.k` is written and must not overlap `kv.v`";
        fails(ts_append(context, batch, &same, &right), Overlap, text);
        let wrong = ts_kv_view { head_dim: 8, ..kv };
        let text = "`kv` must have shape [1, 4, 2, 16], got [1, 4, 2, 8]";
        fails(ts_score(context, batch, &wrong), ts_status::Shape, text);
        let far = ts_kv_view { num_pages: 3, v_stride_page: usize::MAX, ..kv };
        assert_eq!(ts_score(context, batch, &far), ts_status::Config);

        ok(ts_attend(context, batch, &kv, &right, &ts_output { lse: null_mut(), ..output }));
        let mut len = 0;
        let mut tokens = [7u32; 0];
        let status = ts_context_selected(context, 0, tokens.as_mut_ptr(), 0, &mut len);
        fails(status, Capacity, "`tokens` has room for 0 entries, 1 are needed");
        assert_eq!(len, 1);
        len = 7;
        let status = ts_context_selected(context, 0, null_mut(), 3, &mut len);
        fails(status, ts_status::NullPointer, "`tokens` must not be null");
        assert_eq!(len, 7);
        let status = ts_context_selected(context, 1, null_mut(), 0, &mut len);
        fails(status, ts_status::Index, "`row` must be below 1, got 1");
        let mut tensor: ts_tensor = made(|to| ts_context_workspace(context, 0, to));
        let text = "`buffer` must be a ts_workspace, got 11";
        fails(ts_context_workspace(context, 11, &mut tensor), UnknownEnum, text);
        let parts = ts_parts { num_parts: 0, num_query_tokens: 1, parts: base, part_lses: base, ..sized() };
        let text = "argument `num_parts` must be at least 1, got 0";
        fails(ts_merge(context, &parts, &output), ts_status::Config, text);
        ok(ts_batch_destroy(batch));
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn owned_caches() {
    let device = cpu();
    let plain = ts_config { selection_cache: 0, ..config() };
    // SAFETY: handles are alive.
    unsafe {
        let cache = made(|to| ts_cache_create(device, &plain, &cache_config(), to));
        let context = context(device, &plain, &limits(2, 200, 200));
        let id = made(|to| ts_cache_sequence_create(cache, to));
        let (mut to, mut selections) = (null_mut(), null_mut());
        let status = ts_cache_extend(cache, &id, &129, 1, &mut to);
        fails(status, ts_status::OutOfPages, "out of pages: 33 needed, 32 free");
        let status = ts_cache_extend(cache, [id, id].as_ptr(), [1, 1].as_ptr(), 2, &mut to);
        assert_eq!(status, ts_status::DuplicateSequence);
        let status = ts_cache_extend(cache, &id, &(1 << 40), 1, &mut to);
        assert_eq!(status, ts_status::SequenceTooLong);
        let status = ts_cache_extend(cache, &u64::MAX, &1, 1, &mut to);
        assert_eq!(status, ts_status::UnknownSequence);
        let status = ts_cache_sequence_truncate(cache, id, 1);
        assert_eq!(status, ts_status::TruncateBeyondEnd);
        let text = "`ts_cache_selections` needs a cache whose configuration has selection_cache = 1";
        fails(ts_cache_selections(cache, &mut selections), ts_status::Missing, text);
        for _ in 0..3 {
            ok(ts_cache_sequence_create(cache, &mut 0));
        }
        let text = "the cache holds at most 4 sequences";
        fails(ts_cache_sequence_create(cache, &mut 0), ts_status::TooManySequences, text);

        let batch = made(|to| ts_cache_extend(cache, &id, &2, 1, to));
        let (q, kv) = (numbers(1, 2 * 64), numbers(2, 2 * 32));
        let mut got = Out::new(2, &plain);
        let input = input(at(&q), at(&kv), at(&kv));
        let status = ts_step(context, cache, 2, batch, &input, &got.as_output());
        fails(status, ts_status::Index, "`layer` must be below 2, got 2");
        ok(ts_cache_sequence_truncate(cache, id, 1));
        let status = ts_step(context, cache, 0, batch, &input, &got.as_output());
        assert_eq!(status, ts_status::StaleBatch);
        let text = last_error();
        assert!(text.starts_with("batch row 0 is stale: sequence "), "{text}");
        let change =
            " was truncated to length 1 after the batch was made; its length was 2 then and is 1 now";
        assert!(text.ends_with(change), "{text}");
        assert_eq!(ts_cache_append(context, cache, 0, batch, &input), ts_status::StaleBatch);
        assert!(got.out.iter().all(|x| x.is_nan()), "nothing was written");
        ok(ts_batch_destroy(batch));
        ok(ts_context_destroy(context));
        ok(ts_cache_destroy(cache));
        ok(ts_device_destroy(device));
    }
}

/// What there is no memory for is refused, and no handle is made.
#[test]
fn more_than_there_is() {
    use ts_status::OutOfMemory;
    let device = cpu();
    let config = ts_config { num_qo_heads: 128, num_kv_heads: 128, head_dim: 256, ..config() };
    let (mut cache, mut context, mut selections) =
        (std::ptr::dangling_mut(), std::ptr::dangling_mut(), std::ptr::dangling_mut());
    // SAFETY: structures that are alive, room for handles.
    unsafe {
        let size = ts_cache_config { num_pages: 1 << 30, page_size: 256, ..cache_config() };
        assert_eq!(ts_cache_create(device, &config, &size, &mut cache), OutOfMemory, "{}", last_error());
        assert!(last_error().starts_with("cpu: no memory for "), "{}", last_error());
        let limits = limits(1 << 30, 1, 1 << 30);
        assert_eq!(
            ts_context_create(device, &config, &limits, &mut context),
            OutOfMemory,
            "{}",
            last_error()
        );
        let status = ts_selection_cache_create(device, &config, 1 << 16, 1 << 30, &mut selections);
        assert_eq!(status, OutOfMemory, "{}", last_error());
        assert!(cache.is_null() && context.is_null() && selections.is_null());
        ok(ts_device_destroy(device));
    }
}

#[test]
fn memory() {
    let device = cpu();
    let (from, mut to) = ([1u16, 2], [0u16; 2]);
    // SAFETY: handles are alive, the arrays aligned and long enough.
    unsafe {
        let buffer = made(|to| ts_buffer_create(device, 4, to));
        let data = made(|to| ts_buffer_data(buffer, to));
        let (from, to_pointer) = (from.as_ptr().cast(), to.as_mut_ptr().cast::<std::ffi::c_void>());
        let text = "argument `num_bytes` must be even, got 3";
        fails(ts_memory_write(device, data, from, 3), ts_status::Config, text);
        ok(ts_memory_write(device, data, from, 4));
        ok(ts_memory_read(device, to_pointer, data, 4));
        assert_eq!(to, [1, 2]);
        let odd = to_pointer.byte_add(1);
        let text = format!("`to` must be at an address divisible by 2, got {:#x}", odd.addr());
        fails(ts_memory_read(device, odd, data, 2), ts_status::Misaligned, &text);
        ok(ts_buffer_destroy(buffer));
        let mut huge = null_mut();
        assert_eq!(ts_buffer_create(device, usize::MAX, &mut huge), ts_status::OutOfMemory);
        assert_eq!(ts_buffer_create(device, 1 << 62, &mut huge), ts_status::OutOfMemory);
        ok(ts_device_destroy(device));
    }
}

/// Each thread has a text of its own.
#[test]
fn texts_are_per_thread() {
    // SAFETY: null is refused.
    unsafe {
        fails(ts_graph_launch(null()), ts_status::NullPointer, "`graph` must not be null");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(last_error(), "");
                fails(ts_vote(null_mut(), null()), ts_status::NullPointer, "`context` must not be null");
            });
        });
    }
    assert_eq!(last_error(), "`graph` must not be null");
}

/// The emulator panics where memory is copied that it has not handed out; C sees a status.
#[test]
#[cfg(feature = "emulator")]
fn panics_stay_inside() {
    let mut to = [0u32; 2];
    // SAFETY: the emulator looks at addresses before it uses them.
    unsafe {
        let device = made(|to| ts_device_emulated(0, to));
        let nowhere = std::ptr::without_provenance(1 << 20);
        let status = ts_memory_read(device, to.as_mut_ptr().cast(), nowhere, 8);
        assert_eq!(status, ts_status::Panic);
        assert!(last_error().starts_with("defect in tokenselect: copy of 8 bytes: "), "{}", last_error());
        ok(ts_device_destroy(device));
    }
}

#[test]
fn devices_that_are_not_there() {
    let mut device = null_mut();
    // SAFETY: room for the handle.
    unsafe {
        let status = ts_device_cuda(1 << 30, &mut device);
        assert!([ts_status::Driver, ts_status::Unsupported].contains(&status), "{status:?}");
        assert!(last_error().starts_with("cuda:1073741824"), "{}", last_error());
        let status = ts_device_cuda_on_stream(1 << 30, null_mut(), &mut device);
        assert!([ts_status::Driver, ts_status::Unsupported].contains(&status), "{status:?}");
    }
    assert!(device.is_null());
    #[cfg(not(feature = "emulator"))]
    {
        // SAFETY: room for the handle.
        let status = unsafe { ts_device_emulated(0, &mut device) };
        let text = "emulated has no `any operation` for any configuration: the library was built without the feature \
                    `emulator`";
        fails(status, ts_status::Unsupported, text);
    }
}
