//! Contexts that share the heads of a layer, with their products and votes added, decide and choose as one with all heads.

mod common;

use std::ffi::c_void;
use std::ptr::null_mut;

use common::{config, context, cpu, input, limits, made, numbers, ok, one_row, selected, sized};
use half::bf16;
use tokenselect_c::*;

const HQ: usize = 4;
const HKV: usize = 2;
const D: usize = 64;
const PAGE_SIZE: usize = 4;
const NUM_PAGES: usize = 16;
static SEQUENCE: i32 = 1;

/// Some KV heads of a layer, with their query heads.
struct Rank {
    device: *mut ts_device,
    context: *mut ts_context,
    selections: *mut ts_selection_cache,
    kv: ts_kv_view,
    first: usize,
}

impl Rank {
    /// `count` KV heads from `first` on, in pools that hold all of them.
    fn new(device: *mut ts_device, [first, count]: [usize; 2], [k, v]: [*mut c_void; 2]) -> Self {
        let config = ts_config {
            num_qo_heads: (count * HQ / HKV) as u32,
            num_kv_heads: count as u32,
            head_dim: D as u32,
            dtype: ts_dtype::Bf16 as i32,
            selection_cache: 1,
            similarity_threshold: 0.8,
            max_reuse: 2,
            ..config()
        };
        let context = context(device, &config, &limits(1, 8, 64));
        // SAFETY: handles and structures are alive.
        let selections = made(|to| unsafe { ts_selection_cache_create(device, &config, 1, 2, to) });
        let mut kv = ts_kv_view {
            k: k.wrapping_byte_add(2 * first * D),
            v: v.wrapping_byte_add(2 * first * D),
            num_pages: NUM_PAGES,
            page_size: PAGE_SIZE,
            num_kv_heads: HKV,
            head_dim: D,
            ..sized()
        };
        // SAFETY: a view that is alive.
        ok(unsafe { ts_kv_view_set_dense(&mut kv, ts_kv_layout::Nhd as i32) });
        kv.num_kv_heads = count;
        Rank { device, context, selections, kv, first }
    }

    /// The rank's heads of all queries.
    fn queries(&self, all: &ts_step_input) -> ts_step_input {
        let q = all.q.wrapping_byte_add(2 * self.first * HQ / HKV * D);
        ts_step_input { q, q_stride_token: HQ * D, ..*all }
    }

    fn buffer(&self, buffer: ts_workspace) -> ts_tensor {
        // SAFETY: the context is alive.
        made(|to| unsafe { ts_context_workspace(self.context, buffer as i32, to) })
    }

    fn read<T: Copy + Default>(&self, buffer: ts_workspace) -> Vec<T> {
        let from = self.buffer(buffer);
        let mut to = vec![T::default(); from.shape.iter().product()];
        // SAFETY: as many bytes as the buffer has.
        ok(unsafe { ts_memory_read(self.device, to.as_mut_ptr().cast(), from.data, size_of_val(&to[..])) });
        to
    }

    fn write<T>(&self, buffer: ts_workspace, values: &[T]) {
        let (to, num_bytes) = (self.buffer(buffer).data, size_of_val(values));
        // SAFETY: as many bytes as the buffer has.
        ok(unsafe { ts_memory_write(self.device, to, values.as_ptr().cast(), num_bytes) });
    }

    fn action(&self) -> u32 {
        self.read::<u32>(ts_workspace::Actions)[0]
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // SAFETY: used for the last time.
        unsafe {
            ok(ts_selection_cache_destroy(self.selections));
            ok(ts_context_destroy(self.context));
        }
    }
}

/// What a collective does: every rank gets the sums.
fn all_reduce<T: Copy + Default + std::ops::Add<Output = T>>(ranks: &[Rank], buffer: ts_workspace) {
    let mut sums = ranks[0].read::<T>(buffer);
    for rank in &ranks[1..] {
        sums.iter_mut().zip(rank.read::<T>(buffer)).for_each(|(sum, part)| *sum = *sum + part);
    }
    ranks.iter().for_each(|rank| rank.write(buffer, &sums));
}

fn batch(len: usize, block: usize) -> *mut ts_batch {
    let pages = len.div_ceil(PAGE_SIZE);
    let indices: Vec<i32> = (0..pages as i32).collect();
    one_row(PAGE_SIZE, &indices, len, block, Some(&SEQUENCE))
}

/// Memory of a device with these values.
fn upload(device: *mut ts_device, values: &[f32]) -> (*mut ts_buffer, *mut c_void) {
    let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
    // SAFETY: the buffer has room for the values.
    unsafe {
        let buffer = made(|to| ts_buffer_create(device, size_of_val(&values[..]), to));
        let data = made(|to| ts_buffer_data(buffer, to));
        ok(ts_memory_write(device, data, values.as_ptr().cast(), size_of_val(&values[..])));
        (buffer, data)
    }
}

/// Queries that change little from step to step, but more in the last heads every other step.
fn draw_queries(step: u64, block: usize) -> Vec<f32> {
    let (mut q, noise) = (numbers(1, block * HQ * D), numbers(100 + step, block * HQ * D));
    for (place, (q, noise)) in q.iter_mut().zip(noise).enumerate() {
        let is_last = place / D % HQ >= HQ / 2;
        *q += if is_last && step % 2 == 1 { 0.8 } else { 0.3 } * noise;
    }
    q
}

fn on(device: *mut ts_device) {
    let pool = vec![0.0; NUM_PAGES * PAGE_SIZE * HKV * D];
    let (k_pool, v_pool) = (upload(device, &pool), upload(device, &pool));
    let (mut buffers, pools) = (vec![k_pool.0, v_pool.0], [k_pool.1, v_pool.1]);
    let whole = Rank::new(device, [0, HKV], pools);
    let ranks = [0, 1].map(|first| Rank::new(device, [first, 1], pools));
    let (mut actions, mut own_differ) = ([0; 4], false);
    let mut len = 0;
    for (step, block) in [8, 8, 8, 1, 1, 1, 1, 1, 1, 1].into_iter().enumerate() {
        len += block;
        let step = step as u64;
        let [q, k, v] = [
            draw_queries(step, block),
            numbers(200 + step, block * HKV * D),
            numbers(300 + step, block * HKV * D),
        ]
        .map(|values| {
            let (buffer, data) = upload(device, &values);
            buffers.push(buffer);
            data
        });
        let (all, batch) = (input(q, k, v), batch(len, block));
        // SAFETY: handles are alive, tensors as long as they must be.
        unsafe {
            ok(ts_append_select(whole.context, batch, &whole.kv, &all, whole.selections, 0));
            for rank in &ranks {
                let input = rank.queries(&all);
                ok(ts_pool(rank.context, batch, &input, rank.selections, 0));
                own_differ |= rank.action() != whole.action();
                ok(ts_pool(rank.context, batch, &input, null_mut(), 0));
                ok(ts_compare(rank.context, batch, rank.selections, 0));
            }
            assert_eq!(ranks[0].buffer(ts_workspace::Products).dtype, ts_dtype::F64 as i32);
            all_reduce::<f64>(&ranks, ts_workspace::Products);
            for rank in &ranks {
                ok(ts_decide(rank.context, batch, rank.selections, 0));
                assert_eq!(rank.action(), whole.action(), "step {step}");
                let [got, want] = [rank, &whole].map(|rank| rank.read::<f32>(ts_workspace::Similarities)[0]);
                assert!((got - want).abs() < 1e-5, "step {step}: {got}, {want}");
                ok(ts_score(rank.context, batch, &rank.kv));
                ok(ts_vote(rank.context, batch));
            }
            all_reduce::<f32>(&ranks, ts_workspace::Votes);
            for rank in &ranks {
                ok(ts_top_k(rank.context, batch, rank.selections, 0));
                assert_eq!(selected(rank.context, 0), selected(whole.context, 0), "step {step}");
            }
            ok(ts_batch_destroy(batch));
        }
        actions[whole.action() as usize] += 1;
    }
    let [_, complete, score, reuse] = actions;
    assert!(complete > 0 && score > 1 && reuse > 1 && own_differ, "{actions:?}, {own_differ}");
    drop((whole, ranks));
    // SAFETY: used for the last time.
    unsafe {
        for buffer in buffers {
            ok(ts_buffer_destroy(buffer));
        }
        ok(ts_device_destroy(device));
    }
}

#[test]
fn processor() {
    on(cpu());
}

#[test]
#[cfg(feature = "emulator")]
fn emulated() {
    // SAFETY: room for the handle.
    on(made(|to| unsafe { ts_device_emulated(0, to) }));
}
