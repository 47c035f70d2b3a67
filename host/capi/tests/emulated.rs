//! GPU kernels through the C functions, in the emulator: raw device addresses, and captured work.
#![cfg(feature = "emulator")]

mod common;

use std::ffi::c_void;
use std::ptr::null_mut;

use common::{config, context, cpu, fails, limits, made, numbers, ok, selected, sized};
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

impl Rig {
    fn new(device: *mut ts_device) -> Self {
        let [_, num_kv_heads, head_dim] = HEADS;
        let config = ts_config { dtype: ts_dtype::Bf16 as i32, head_dim: head_dim as u32, ..config() };
        let context = context(device, &config, &limits(2, 8, 64));
        let mut kv =
            ts_kv_view { num_pages: NUM_PAGES, page_size: PAGE_SIZE, num_kv_heads, head_dim, ..sized() };
        // SAFETY: a view that is alive.
        ok(unsafe { ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32) });
        let mut rig = Rig { device, context, buffers: Vec::new(), kv };
        let pool = vec![bf16::ZERO; NUM_PAGES * PAGE_SIZE * num_kv_heads * head_dim];
        (rig.kv.k, rig.kv.v) = (rig.upload(&pool), rig.upload(&pool));
        rig
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
        let (q, k, v) = (self.upload(&q), self.upload(&k), self.upload(&v));
        let batch = batch(len, block);
        // SAFETY: handles are alive, tensors as long as they must be.
        unsafe {
            ok(ts_append(self.context, batch, &self.kv, k, v));
            ok(ts_select(self.context, batch, &self.kv, q, null_mut(), 0));
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
    let indices: Vec<i32> = (0..pages as i32).rev().collect();
    let (qo_indptr, indptr) = ([0, block as i32], [0, pages as i32]);
    let last_page_len = (len - (pages - 1) * PAGE_SIZE) as i32;
    let tables = ts_batch_tables {
        page_size: PAGE_SIZE,
        num_rows: 1,
        qo_indptr: qo_indptr.as_ptr(),
        indptr: indptr.as_ptr(),
        indices: indices.as_ptr(),
        last_page_len: &last_page_len,
        ..sized()
    };
    // SAFETY: the arrays have the lengths that the tables say.
    made(|to| unsafe { ts_batch_create(&tables, to) })
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
        fails(ts_pool(rig.context, batch, odd, null_mut(), 0), ts_status::Misaligned, &text);
        ok(ts_batch_destroy(batch));
    }
}

/// What `work` below needs.
struct Work {
    rig: Rig,
    batch: *mut ts_batch,
    tensors: [*mut c_void; 3],
    answer: i32,
}

extern "C" fn work(data: *mut c_void) -> i32 {
    // SAFETY: `ts_capture` was given a `Work`.
    let work = unsafe { &*data.cast::<Work>() };
    let [q, k, v] = work.tensors;
    // SAFETY: handles and tensors are alive.
    unsafe {
        let (context, kv) = (work.rig.context, &work.rig.kv);
        ok(ts_append(context, work.batch, kv, k, v));
        ok(ts_select(context, work.batch, kv, q, null_mut(), 0));
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
    let tensors = [rig.upload(&values(hq)), rig.upload(&values(hkv)), rig.upload(&values(hkv))];
    // SAFETY: handles and tensors are alive until they are destroyed.
    unsafe {
        let slot = made(|to| ts_batch_slot_create(rig.device, like, NUM_PAGES, to));
        let batch_in_slot = made(|to| ts_batch_slot_put(slot, like, to));
        let mut state = Work { rig, batch: batch_in_slot, tensors, answer: 0 };
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
