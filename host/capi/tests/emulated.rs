//! GPU kernels through the C functions, in the emulator: raw device addresses, and captured work.
#![cfg(feature = "emulator")]

mod common;

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use common::{
    Lie, arrange, config, context, cpu, fails, input, limits, made, numbers, ok, one_row, queries, selected,
    sized,
};
use half::bf16;
use tokenselect_c::*;

const PAGE_SIZE: usize = 4;
const NUM_PAGES: usize = 16;
const HEADS: [usize; 3] = [4, 2, 64];

/// A device, a context and a pool of pages on it.
struct Rig {
    device: *mut ts_device,
    context: *mut ts_context,
    buffers: Vec<*mut ts_buffer>,
    kv: ts_kv_view,
}

/// How keys and values lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pages {
    /// Two pools `[pages, tokens, heads, D]`.
    Apart,
    /// `[pages, heads, tokens, 2 D]`, values first.
    ValuesFirst,
    /// Two pools, keys `[pages, tokens, heads, D]` and values `[pages, heads, tokens, D]`.
    Unlike,
}

impl Rig {
    fn new(device: *mut ts_device) -> Self {
        Rig::with_pages(device, Pages::Apart)
    }

    fn with_pages(device: *mut ts_device, pages: Pages) -> Self {
        let [_, num_kv_heads, head_dim] = HEADS;
        let config = ts_config { dtype: ts_dtype::Bf16 as i32, head_dim: head_dim as u32, ..config() };
        let context = context(device, &config, &limits(2, 8, 64));
        let kv = ts_kv_view { num_pages: NUM_PAGES, page_size: PAGE_SIZE, num_kv_heads, head_dim, ..sized() };
        let mut rig = Rig { device, context, buffers: Vec::new(), kv };
        let pool = vec![bf16::ZERO; 2 * NUM_PAGES * PAGE_SIZE * num_kv_heads * head_dim];
        let base = rig.upload(&pool);
        let behind = base.wrapping_byte_add(size_of_val(&pool[..]) / 2);
        let kv = &mut rig.kv;
        // SAFETY: views that are alive.
        let set_dense = |kv: &mut ts_kv_view, layout| ok(unsafe { ts_kv_view_set_dense(kv, layout as i32) });
        match pages {
            Pages::Apart => {
                set_dense(kv, ts_kv_layout::Nhd);
                (kv.k, kv.v) = (base, behind);
            }
            Pages::ValuesFirst => {
                kv.head_dim = 2 * head_dim;
                set_dense(kv, ts_kv_layout::Hnd);
                kv.head_dim = head_dim;
                (kv.v, kv.k) = (base, base.wrapping_byte_add(2 * head_dim));
            }
            Pages::Unlike => {
                let mut values = *kv;
                set_dense(kv, ts_kv_layout::Nhd);
                set_dense(&mut values, ts_kv_layout::Hnd);
                *kv = ts_kv_view {
                    k_stride_page: kv.k_stride_page,
                    k_stride_token: kv.k_stride_token,
                    k_stride_head: kv.k_stride_head,
                    k: base,
                    v: behind,
                    ..values
                };
            }
        }
        rig
    }

    /// Numbers in memory of the device's, copied to the host.
    fn download<T: Copy + Default>(&self, from: *const c_void, len: usize) -> Vec<T> {
        let mut to = vec![T::default(); len];
        // SAFETY: as many bytes as are asked for, on both sides.
        ok(unsafe { ts_memory_read(self.device, to.as_mut_ptr().cast(), from, size_of_val(&to[..])) });
        to
    }

    /// A buffer of the workspace, copied to the host.
    fn workspace<T: Copy + Default>(&self, buffer: ts_workspace) -> Vec<T> {
        // SAFETY: the context is alive.
        let tensor: ts_tensor = made(|to| unsafe { ts_context_workspace(self.context, buffer as i32, to) });
        self.download(tensor.data, tensor.shape.iter().product())
    }

    /// 32-bit numbers in memory of the device.
    fn table(&mut self, numbers: &[i32]) -> *const i32 {
        let num_bytes = size_of_val(numbers);
        // SAFETY: the buffer has room for the numbers.
        unsafe {
            let buffer = made(|to| ts_buffer_create(self.device, num_bytes, to));
            let data = made(|to| ts_buffer_data(buffer, to));
            ok(ts_memory_write(self.device, data, numbers.as_ptr().cast(), num_bytes));
            self.buffers.push(buffer);
            data.cast_const().cast()
        }
    }

    /// A copy in the device's memory.
    fn upload(&mut self, values: &[bf16]) -> *mut c_void {
        let num_bytes = size_of_val(values);
        // SAFETY: the buffer has room for the values.
        unsafe {
            let buffer = made(|to| ts_buffer_create(self.device, num_bytes, to));
            let data = made(|to| ts_buffer_data(buffer, to));
            ok(ts_memory_write(self.device, data, values.as_ptr().cast(), num_bytes));
            self.buffers.push(buffer);
            data
        }
    }

    /// Appends and selects for one row of `len` tokens, of which `block` are new.
    fn append_and_select(&mut self, seed: u64, len: usize, block: usize) -> Vec<u32> {
        let [hq, hkv, d] = HEADS;
        let random = |seed, heads| numbers(seed, block * heads * d).into_iter().map(bf16::from_f32).collect();
        let (q, k, v): (Vec<bf16>, Vec<bf16>, Vec<bf16>) =
            (random(seed, hq), random(seed + 1, hkv), random(seed + 2, hkv));
        let input = input(self.upload(&q), self.upload(&k), self.upload(&v));
        let batch = batch(len, block);
        // SAFETY: handles are alive, tensors as long as they must be.
        unsafe {
            ok(ts_append(self.context, batch, &self.kv, &input));
            ok(ts_select(self.context, batch, &self.kv, &input, null_mut(), 0));
            ok(ts_device_synchronize(self.device));
            ok(ts_batch_destroy(batch));
        }
        selected(self.context, 0)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // SAFETY: used for the last time.
        unsafe {
            for &buffer in &self.buffers {
                ok(ts_buffer_destroy(buffer));
            }
            ok(ts_context_destroy(self.context));
            ok(ts_device_destroy(self.device));
        }
    }
}

fn batch(len: usize, block: usize) -> *mut ts_batch {
    let pages = len.div_ceil(PAGE_SIZE);
    let indices: Vec<i32> = (0..pages as i32).map(|page| NUM_PAGES as i32 - 1 - page).collect();
    one_row(PAGE_SIZE, &indices, len, block, None)
}

/// Lists chosen by the kernels are those of the processor. (Votes are far enough apart in this case.)
#[test]
fn selects_like_the_processor() {
    let mut lists = [cpu(), emulated(0), emulated(7)].map(|device| {
        let mut rig = Rig::new(device);
        [(8, 8), (16, 8), (24, 8), (25, 1)].map(|(len, block)| rig.append_and_select(len as u64, len, block))
    });
    assert_eq!(lists[0][3].len(), 2 + 5 + 3 + 1);
    let last = lists[0].clone();
    lists.iter_mut().for_each(|list| assert_eq!(*list, last));
}

/// The same lists and outputs wherever keys and values lie.
#[test]
fn pages_anywhere() {
    let [hq, _, d] = HEADS;
    let q: Vec<bf16> = numbers(5, hq * d).into_iter().map(bf16::from_f32).collect();
    for device in [cpu, || emulated(0)] {
        // Few queries and keys unlike values are attended to by different kernels: the last bits may differ.
        let mut expected: Option<(Vec<u32>, Vec<f32>)> = None;
        for pages in [Pages::Apart, Pages::ValuesFirst, Pages::Unlike] {
            let mut rig = Rig::with_pages(device(), pages);
            for (len, block) in [(8, 8), (16, 8), (24, 8), (25, 1)] {
                rig.append_and_select(len as u64, len, block);
            }
            let (batch, q) = (batch(25, 1), queries(rig.upload(&q)));
            let out = rig.upload(&vec![bf16::NAN; 2 * hq * d]);
            let output = ts_output { out, out_dtype: ts_dtype::F32 as i32, ..sized() };
            // SAFETY: handles are alive, tensors as long as they must be.
            unsafe {
                ok(ts_select(rig.context, batch, &rig.kv, &q, null_mut(), 0));
                ok(ts_attend(rig.context, batch, &rig.kv, &q, &output));
                ok(ts_batch_destroy(batch));
            }
            let (list, out) = (selected(rig.context, 0), rig.download::<f32>(out, hq * d));
            let (first, expected) = expected.get_or_insert_with(|| (list.clone(), out.clone()));
            assert_eq!(*first, list, "{pages:?}");
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-2 * b.abs().max(1.0);
            assert!(out.iter().zip(&*expected).all(close), "{pages:?}: {out:?}, {expected:?}");
        }
    }
}

/// The same bits wherever queries, keys and values lie.
#[test]
fn inputs_anywhere() {
    let [hq, hkv, d] = HEADS;
    for device in [cpu, || emulated(0)] {
        let mut expected: Option<(Vec<u32>, Vec<u32>)> = None;
        for lie in Lie::ALL {
            let mut rig = Rig::new(device());
            let (mut lists, mut bits) = (Vec::new(), Vec::new());
            for (len, block) in [(8, 8), (16, 8), (24, 8), (25, 1)] {
                let random = |seed, heads: usize| {
                    numbers(seed, block * heads * d).into_iter().map(bf16::from_f32).collect::<Vec<_>>()
                };
                let seed = 3 * len as u64;
                let (q, k, v) = (random(seed, hq), random(seed + 1, hkv), random(seed + 2, hkv));
                let (memory, input) = arrange(lie, HEADS, [&q, &k, &v]);
                let input = input(rig.upload(&memory));
                let out = rig.upload(&vec![bf16::NAN; 2 * block * hq * d]);
                let output = ts_output { out, out_dtype: ts_dtype::F32 as i32, ..sized() };
                let (batch, none) = (batch(len, block), null_mut());
                let mut attended = || {
                    bits.extend(rig.download::<u32>(out, block * hq * d));
                };
                // SAFETY: handles are alive, tensors as long as they must be.
                unsafe {
                    ok(ts_append_select(rig.context, batch, &rig.kv, &input, none, 0));
                    ok(ts_attend(rig.context, batch, &rig.kv, &input, &output));
                    attended();
                    ok(ts_append(rig.context, batch, &rig.kv, &input));
                    ok(ts_pool(rig.context, batch, &input, none, 0));
                    ok(ts_attend_dense(rig.context, batch, &rig.kv, &input, &output));
                    attended();
                    ok(ts_batch_destroy(batch));
                }
                bits.extend(rig.workspace::<u32>(ts_workspace::Queries));
                lists.extend(selected(rig.context, 0));
            }
            let expected = expected.get_or_insert_with(|| (lists.clone(), bits.clone()));
            assert!(*expected == (lists, bits), "{lie:?}");
        }
    }
}

/// Logits lie in another order on each device, and are the same.
#[test]
fn places_of_logits() {
    let logits = [cpu(), emulated(0)].map(|device| {
        let mut rig = Rig::new(device);
        for (len, block) in [(8, 8), (16, 8), (24, 8)] {
            rig.append_and_select(len as u64, len, block);
        }
        let (all, batch) = (rig.workspace::<f32>(ts_workspace::Logits), batch(24, 8));
        // SAFETY: handles are alive.
        let place = |token, head| unsafe {
            made::<usize>(|to| ts_context_logit_index(rig.context, batch, 0, token, head, to))
        };
        let of_candidates: Vec<f32> = (2..13)
            .flat_map(|token| (0..4).map(move |head| (token, head)))
            .map(|(t, h)| all[place(t, h)])
            .collect();
        // SAFETY: used for the last time.
        ok(unsafe { ts_batch_destroy(batch) });
        of_candidates
    });
    assert!(logits[0].iter().zip(&logits[1]).all(|(cpu, gpu)| (cpu - gpu).abs() < 1e-4), "{logits:?}");
    assert!(logits[0].iter().any(|&logit| logit.abs() > 0.01));
}

/// Votes of the caller's own, written to the device's memory.
#[test]
fn votes_of_ones_own() {
    let mut rig = Rig::new(emulated(0));
    for (len, block) in [(8, 8), (16, 8)] {
        rig.append_and_select(len as u64, len, block);
    }
    let [hq, _, d] = HEADS;
    let (q, batch) = (queries(rig.upload(&vec![bf16::ONE; hq * d])), batch(16, 1));
    let votes: Vec<f32> = (0..64).map(|token| if token % 2 == 1 { token as f32 } else { 0.0 }).collect();
    // SAFETY: handles are alive, arrays as long as they must be.
    unsafe {
        ok(ts_pool(rig.context, batch, &q, null_mut(), 0));
        let to: ts_tensor = made(|to| ts_context_workspace(rig.context, ts_workspace::Votes as i32, to));
        ok(ts_memory_write(rig.device, to.data, votes.as_ptr().cast(), size_of_val(&votes[..])));
        ok(ts_context_provide(rig.context, ts_workspace::Votes as i32, batch));
        ok(ts_top_k(rig.context, batch, null_mut(), 0));
        ok(ts_batch_destroy(batch));
    }
    assert_eq!(selected(rig.context, 0), [0, 1, 3, 5, 7, 9, 11, 12, 13, 14, 15]);
}

/// Tables that lie on the device, as pages and as slots of tokens, direct and in captured work.
#[test]
fn tables_on_the_device() {
    let mut rig = Rig::new(emulated(0));
    for (len, block) in [(8, 8), (16, 8), (24, 8), (25, 1)] {
        rig.append_and_select(len as u64, len, block);
    }
    let [hq, _, d] = HEADS;
    let q: Vec<bf16> = numbers(5, hq * d).into_iter().map(bf16::from_f32).collect();
    let q = queries(rig.upload(&q));
    let like = batch(25, 1);
    // SAFETY: handles and arrays are alive and as long as they must be.
    unsafe {
        ok(ts_select(rig.context, like, &rig.kv, &q, null_mut(), 0));
        let expected = selected(rig.context, 0);
        // Row 1 of the table is that of `batch`: pages in reverse order; its slots are in row 1, too.
        let pages: Vec<i32> = [[0; 8], [15, 14, 13, 12, 11, 10, 9, 0]].concat();
        let slots: Vec<i32> =
            pages.iter().flat_map(|page| (0..4).map(move |token| 4 * page + token)).collect();
        let (pages, slots) = (rig.table(&pages), rig.table(&slots));
        let lens = rig.table(&[0, 25, 99]);
        let tables = ts_device_tables {
            num_table_rows: 2,
            num_entries: 8,
            entries: pages,
            rows: rig.table(&[1]),
            kv_lens: lens.wrapping_add(1), // which is not aligned to 16 bytes
            num_pages: NUM_PAGES,
            ..sized()
        };
        let slots = ts_device_tables { num_entries: 32, entries: slots, entries_are_slots: 1, ..tables };
        let slot = made(|to| ts_batch_slot_create(rig.device, like, 2 * NUM_PAGES, to));
        let faults = || made::<u32>(|to| ts_batch_slot_faults(slot, to));
        for tables in [&tables, &slots] {
            let bound = made(|to| ts_batch_slot_translate(slot, tables, to));
            ok(ts_select(rig.context, bound, &rig.kv, &q, null_mut(), 0));
            assert_eq!(selected(rig.context, 0), expected);
            let info: ts_batch_info = made(|to| ts_batch_get_info(bound, to));
            assert_eq!((info.num_rows, info.max_kv_len), (1, 32));
            let mut row: ts_batch_row = std::mem::zeroed();
            let text = "`row` needs tables on the host";
            fails(ts_batch_get_row(bound, 0, &mut row), ts_status::Missing, text);
            assert_eq!(ts_context_logit_index(rig.context, bound, 0, 0, 0, &mut 0), ts_status::Index);
            ok(ts_batch_destroy(bound));
        }
        assert_eq!(faults(), 0);
        let mut bound = std::ptr::dangling_mut();
        for (wrong, status, text) in [
            (
                ts_device_tables { entries: null(), ..tables },
                ts_status::NullPointer,
                "`tables.entries` must not be null",
            ),
            (
                ts_device_tables { kv_lens: null(), ..tables },
                ts_status::NullPointer,
                "`tables.kv_lens` must not be null",
            ),
            (
                ts_device_tables { entries_are_slots: 2, ..tables },
                ts_status::UnknownEnum,
                "`tables.entries_are_slots` must be 0 or 1, got 2",
            ),
            (
                ts_device_tables { reserved: 1, ..tables },
                ts_status::UnknownEnum,
                "`tables.reserved` must be 0, got 1",
            ),
            (
                ts_device_tables { sequence_indices: lens, ..tables },
                ts_status::Table,
                "batch: `sequences` must be left out, as in the slot's first batch, got given",
            ),
            (
                ts_device_tables { num_pages: 0, ..tables },
                ts_status::Config,
                "argument `num_pages` must be at least 1, got 0",
            ),
        ] {
            fails(ts_batch_slot_translate(slot, &wrong, &mut bound), status, text);
            assert!(bound.is_null());
        }
        let odd = ts_device_tables { kv_lens: tables.kv_lens.byte_add(2), ..tables };
        assert_eq!(ts_batch_slot_translate(slot, &odd, &mut bound), ts_status::Misaligned);
        let short = ts_device_tables { struct_size: size_of::<ts_device_tables>() - 1, ..tables };
        assert_eq!(ts_batch_slot_translate(slot, &short, &mut bound), ts_status::StructSize);

        // A row that is longer than its table is left without tokens, and counted.
        let long = ts_device_tables { kv_lens: lens.wrapping_add(2), ..tables };
        let bound = made(|to| ts_batch_slot_translate(slot, &long, to));
        assert_eq!(faults(), 1);
        ok(ts_batch_destroy(bound));

        // Captured: the tables are read at each launch.
        let mut state = Translated { rig: &rig, slot, tables, q };
        ok(ts_batch_destroy(made(|to| ts_batch_slot_translate(slot, &tables, to))));
        let data: *mut c_void = (&raw mut state).cast();
        let graph = made(|to| ts_capture(rig.device, Some(translate_and_select), data, to));
        ok(ts_graph_launch(graph));
        assert_eq!(selected(rig.context, 0), expected);
        let shorter = [0i32, 24];
        ok(ts_memory_write(rig.device, lens.cast_mut().cast(), shorter.as_ptr().cast(), 8));
        ok(ts_graph_launch(graph));
        assert_eq!(*selected(rig.context, 0).last().unwrap(), 23);
        ok(ts_graph_destroy(graph));
        ok(ts_batch_slot_destroy(slot));
        ok(ts_batch_destroy(like));
    }
}

/// What `translate_and_select` needs.
struct Translated<'a> {
    rig: &'a Rig,
    slot: *mut ts_batch_slot,
    tables: ts_device_tables,
    q: ts_step_input,
}

extern "C" fn translate_and_select(data: *mut c_void) -> i32 {
    // SAFETY: `ts_capture` was given a `Translated`, whose handles and tensors are alive.
    unsafe {
        let work = &*data.cast::<Translated>();
        let bound = made(|to| ts_batch_slot_translate(work.slot, &work.tables, to));
        ok(ts_select(work.rig.context, bound, &work.rig.kv, &work.q, null_mut(), 0));
        ok(ts_batch_destroy(bound));
    }
    0
}

fn emulated(seed: u64) -> *mut ts_device {
    // SAFETY: room for the handle.
    made(|to| unsafe { ts_device_emulated(seed, to) })
}

#[test]
fn addresses_are_checked() {
    let rig = Rig::new(emulated(0));
    let batch = batch(4, 1);
    // SAFETY: the address is refused; handles are alive.
    unsafe {
        let odd = rig.kv.k.byte_add(8);
        let text = format!("`q` must be at an address divisible by 16, got {:#x}", odd.addr());
        fails(ts_pool(rig.context, batch, &queries(odd), null_mut(), 0), ts_status::Misaligned, &text);
        let right = queries(rig.kv.k);
        for (stride, rule) in [
            (68, "of strides that are multiples of 8 elements"),
            (1 << 32, "of strides up to 4294967295 elements"),
        ] {
            let text = format!("argument `q` must be {rule} on a GPU, got {stride}");
            for wrong in [
                ts_step_input { q_stride_token: stride, ..right },
                ts_step_input { q_stride_head: stride, ..right },
            ] {
                fails(ts_pool(rig.context, batch, &wrong, null_mut(), 0), ts_status::Config, &text);
            }
        }
        ok(ts_batch_destroy(batch));
    }
}

/// What `work` below needs.
struct Work {
    rig: Rig,
    batch: *mut ts_batch,
    input: ts_step_input,
    answer: i32,
}

extern "C" fn work(data: *mut c_void) -> i32 {
    // SAFETY: `ts_capture` was given a `Work`.
    let work = unsafe { &*data.cast::<Work>() };
    // SAFETY: handles and tensors are alive.
    unsafe {
        let (context, kv) = (work.rig.context, &work.rig.kv);
        ok(ts_append(context, work.batch, kv, &work.input));
        ok(ts_select(context, work.batch, kv, &work.input, null_mut(), 0));
    }
    work.answer
}

/// A graph captured with a batch in a slot reads the batch that was put there last.
#[test]
fn captured_work() {
    let mut rig = Rig::new(emulated(0));
    for (len, block) in [(8, 8), (16, 8), (24, 8), (32, 8)] {
        rig.append_and_select(len as u64, len, block);
    }
    let like = batch(20, 1);
    let [hq, hkv, d] = HEADS;
    let values = |heads| numbers(77, heads * d).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let input = input(rig.upload(&values(hq)), rig.upload(&values(hkv)), rig.upload(&values(hkv)));
    // SAFETY: handles and tensors are alive until they are destroyed.
    unsafe {
        let slot = made(|to| ts_batch_slot_create(rig.device, like, NUM_PAGES, to));
        let batch_in_slot = made(|to| ts_batch_slot_put(slot, like, to));
        let mut state = Work { rig, batch: batch_in_slot, input, answer: 0 };
        let data: *mut c_void = (&raw mut state).cast();
        assert_eq!(work(data), 0);
        let eager = selected(state.rig.context, 0);
        assert_eq!(*eager.last().unwrap(), 19);

        state.answer = 3;
        let mut graph = null_mut();
        let status = ts_capture(state.rig.device, Some(work), data, &mut graph);
        assert_eq!((status, graph.is_null()), (ts_status::Callback, true));
        assert!(common::last_error().starts_with("the captured function answered 3, "));
        state.answer = 0;
        let graph = made(|to| ts_capture(state.rig.device, Some(work), data, to));
        ok(ts_graph_launch(graph));
        assert_eq!(selected(state.rig.context, 0), eager);

        let longer = batch(31, 1);
        let also_bound = made(|to| ts_batch_slot_put(slot, longer, to));
        ok(ts_graph_launch(graph));
        assert_eq!(*selected(state.rig.context, 0).last().unwrap(), 30);
        ok(ts_graph_destroy(graph));
        for handle in [like, batch_in_slot, longer, also_bound] {
            ok(ts_batch_destroy(handle));
        }
        ok(ts_batch_slot_destroy(slot));
        let processor = cpu();
        let mut graph = null_mut();
        assert_eq!(ts_capture(processor, Some(work), data, &mut graph), ts_status::Unsupported);
        ok(ts_device_destroy(processor));
    }
}

/// A row in blocks selects, for each of them, what a row of the block's length does.
#[test]
fn blocks_of_a_row() {
    let mut rig = Rig::new(made(|to| unsafe { ts_device_emulated(0, to) }));
    let pages = [3, 7, 1, 5, 2, 9];
    let q: Vec<bf16> = numbers(2, 8 * HEADS[0] * HEADS[2]).into_iter().map(bf16::from_f32).collect();
    let q = rig.upload(&q);
    let whole = one_row(PAGE_SIZE, &pages, 22, 8, None);
    // SAFETY: handles are alive, addresses have the elements that the batches say.
    unsafe {
        let blocks = made(|to| ts_batch_in_blocks(whole, 5, to));
        let mut info: ts_batch_info = std::mem::zeroed();
        ok(ts_batch_get_info(blocks, &mut info));
        assert_eq!((info.num_rows, info.max_block_len, info.max_kv_len), (2, 5, 22));
        ok(ts_select(rig.context, blocks, &rig.kv, &queries(q), null_mut(), 0));
        let got = [selected(rig.context, 0), selected(rig.context, 1)];
        let first = one_row(PAGE_SIZE, &pages[..5], 19, 5, None);
        ok(ts_select(rig.context, first, &rig.kv, &queries(q), null_mut(), 0));
        assert_eq!(got[0], selected(rig.context, 0));
        assert_eq!(got[1].last(), Some(&21));
        let mut none = null_mut();
        fails(
            ts_batch_in_blocks(whole, 0, &mut none),
            ts_status::Config,
            "argument `block_len` must be at least 1, got 0",
        );
        fails(
            ts_batch_in_blocks(blocks, 2, &mut none),
            ts_status::Missing,
            "`in_blocks` needs rows that are not cut into blocks",
        );
        for batch in [whole, blocks, first] {
            ok(ts_batch_destroy(batch));
        }
    }
}
