//! What is particular to GPUs, real or emulated: memory of a device, copies of pages and of cached selections, streams
//! and contexts of the caller's, single kernels, and the errors of devices.

mod common;

use std::ptr::null_mut;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem, cached, small_config};
use common::run::Inputs;
use common::{bits, on_devices, tensor, to_device};
use cust::sys;
use half::bf16;
use tokenselect::{
    Batch, Buffer, CacheConfig, DType, Device, Dims, HeadShape, KvLayout, KvShape, KvStrides, KvView,
    KvViewMut, Limits, Operations, PageTables, PagedKvCache, Plan, Positions, Rope, RopePairing,
    SelectConfig, SelectionCache, StepOutput, Tensor, TensorView, TokenSelect,
};
use tokenselect_kernels::conformance::{INDICES_DIMS, IndicesParams};
use tokenselect_kernels::simt::global::GlobalMut;

on_devices! {
    all: moments_pass;
    gpus:
        tensors_move_between_host_and_device, cached_selections_are_forked_and_forgotten,
        forks_are_copied_on_write, every_layer_caches_selections, what_has_no_kernel_is_refused,
        rotations_of_every_kind_are_supported,
        tensors_must_be_where_the_device_works, strides_that_break_pieces_are_refused, kernels_are_launched_by_name;
    cuda: work_joins_the_stream_of_the_caller;
}

fn config(head_dim: usize, group: usize, dtype: DType) -> SelectConfig {
    let heads = HeadShape { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim };
    SelectConfig { heads, dtype, ..small_config() }
}

fn moments_pass(device: &Device) {
    let before = device.record().unwrap();
    let numbers = Tensor::from_slice_on(device, &[1u32; 1000], [1000]).unwrap();
    let after = device.record().unwrap();
    assert_eq!(numbers.to_vec::<u32>().unwrap(), [1; 1000]); // waits
    assert!(device.has_passed(&before).unwrap());
    device.synchronize().unwrap();
    assert!(device.has_passed(&after).unwrap());
    device.elapsed(&before, &after).unwrap();
}

fn tensors_move_between_host_and_device(device: &Device) {
    let numbers: Vec<u32> = (0..1000).collect();
    let mut tensor = Tensor::from_slice_on(device, &numbers, [10, 100]).unwrap();
    assert_eq!(tensor.to_vec::<u32>().unwrap(), numbers);
    assert_eq!(tensor.view().tail(990).unwrap().to_vec::<u32>().unwrap(), numbers[990..]);
    let text = tensor.as_slice::<u32>().unwrap_err().to_string();
    assert_eq!(text, format!("`tensor` must be on cpu, it is on {}", device.name()));
    let zeros = Tensor::zeros_on(device, DType::U32, [10, 100]).unwrap();
    tensor.copy_from(zeros.view()).unwrap();
    assert_eq!(tensor.to_vec::<u32>().unwrap(), [0; 1000]);
    let elsewhere = Tensor::zeros_on(&Device::emulated(), DType::U32, [10, 100]).unwrap();
    let text = tensor.copy_from(elsewhere.view()).unwrap_err().to_string();
    assert!(text.starts_with("`from` must be on "), "{text}");
}

/// `made_at` of every layer and sequence, and the first word of each selection.
fn entries(cache: &mut SelectionCache) -> Vec<(Vec<u32>, Vec<u32>)> {
    (0..cache.num_layers())
        .map(|layer| {
            let layer = cache.layer_mut(layer).unwrap();
            let width = layer.selections.shape().dims()[1];
            let selections = layer.selections.as_view().to_vec::<u32>().unwrap();
            (layer.made_at.as_view().to_vec().unwrap(), selections.into_iter().step_by(width).collect())
        })
        .collect()
}

fn cached_selections_are_forked_and_forgotten(device: &Device) {
    const NONE: u32 = u32::MAX;
    let config = cached(config(64, 2, DType::Bf16), 0.9, None);
    let mut cache = SelectionCache::new(device, &config, 3, 4).unwrap();
    for layer in 0..3 {
        let base = 10 * layer as u32;
        let layer = cache.layer_mut(layer).unwrap();
        let made_at = [base, base + 1, base + 2, NONE];
        let selections: Vec<u32> =
            (0..4).flat_map(|row| (0..config.top_k as u32).map(move |i| base + row + i)).collect();
        layer.made_at.copy_from(TensorView::new(&made_at, [4]).unwrap()).unwrap();
        layer.selections.copy_from(TensorView::new(&selections, [4, config.top_k]).unwrap()).unwrap();
    }
    cache.fork(1, 3).unwrap();
    let want = |made_at: [[u32; 4]; 3]| {
        let firsts = |base: u32| vec![base, base + 1, base + 2, base + 1];
        made_at.iter().zip([0, 10, 20]).map(|(m, base)| (m.to_vec(), firsts(base))).collect::<Vec<_>>()
    };
    assert_eq!(entries(&mut cache), want([[0, 1, 2, 1], [10, 11, 12, 11], [20, 21, 22, 21]]));
    // Kept if made with at most so many tokens before the block.
    cache.truncate(1, 11).unwrap();
    assert_eq!(entries(&mut cache), want([[0, 1, 2, 1], [10, 11, 12, 11], [20, NONE, 22, 21]]));
    cache.truncate(2, 11).unwrap();
    cache.clear(0).unwrap();
    let left = [[NONE, 1, 2, 1], [NONE, 11, NONE, 11], [NONE, NONE, NONE, 21]];
    assert_eq!(entries(&mut cache), want(left));
}

fn forks_are_copied_on_write(device: &Device) {
    for layout in [KvLayout::Nhd, KvLayout::Hnd] {
        let config = config(64, 1, DType::Bf16);
        let cache_config =
            CacheConfig { num_layers: 2, num_pages: 6, page_size: 4, max_sequences: 2, layout };
        let mut cache = PagedKvCache::new(device, &config, &cache_config).unwrap();
        let ts = TokenSelect::new(device, config.clone(), Limits::default()).unwrap();
        let grow = |cache: &mut PagedKvCache, id, tokens: usize, value: f32| {
            let batch = cache.extend(&[(id, tokens)]).unwrap();
            let data = vec![bf16::from_f32(value); tokens * 2 * 64];
            let new = Tensor::from_slice_on(device, &data, [tokens, 2, 64]).unwrap();
            for layer in 0..2 {
                ts.append(&batch, cache.layer_mut(layer).unwrap().kv, new.view(), new.view()).unwrap();
            }
        };
        let parent = cache.create().unwrap();
        grow(&mut cache, parent, 6, 1.0);
        let child = cache.fork(parent).unwrap();
        grow(&mut cache, child, 1, 2.0);
        grow(&mut cache, parent, 1, 3.0);
        for (id, last) in [(parent, 3.0), (child, 2.0)] {
            let page = cache.pages().pages(id).unwrap()[1] as usize;
            for layer in 0..2 {
                let kv = cache.layer(layer).unwrap();
                for memory in [kv.k(), kv.v()] {
                    let all = memory.to_vec::<bf16>().unwrap();
                    let at = |token: usize, head: usize| match layout {
                        KvLayout::Nhd => all[((page * 4 + token) * 2 + head) * 64].to_f32(),
                        KvLayout::Hnd => all[((page * 2 + head) * 4 + token) * 64].to_f32(),
                    };
                    let got: Vec<f32> = (0..3).flat_map(|t| [at(t, 0), at(t, 1)]).collect();
                    assert_eq!(got, [1.0, 1.0, 1.0, 1.0, last, last], "on {}", device.name());
                }
            }
        }
    }
}

/// Tables of single integers, one after the other for each layer, begin anywhere.
fn every_layer_caches_selections(device: &Device) {
    const LAYERS: usize = 3;
    for max_sequences in [1, 2, 5] {
        let config = cached(SelectConfig { top_k: 7, ..config(64, 2, DType::Bf16) }, 0.9, None);
        let cache_config = CacheConfig { num_layers: LAYERS, max_sequences, ..CacheConfig::default() };
        let mut cache = PagedKvCache::new(device, &config, &cache_config).unwrap();
        let mut ts = TokenSelect::new(device, config.clone(), Limits::default()).unwrap();
        let id = cache.create().unwrap();
        for block in [40, 1, 1] {
            let batch = cache.extend(&[(id, block)]).unwrap();
            let inputs = Inputs::new(&Problem::new(&config, &[(block, block)], Content::Peaked, 1));
            let inputs = inputs.to(device);
            let mut out = Tensor::zeros_on(device, config.dtype, inputs.q.shape()).unwrap();
            for layer in 0..LAYERS {
                let output = StepOutput { out: out.view_mut(), lse: None };
                ts.step(&mut cache, layer, &batch, inputs.step(), output).unwrap();
            }
        }
        let selections = cache.selections().unwrap();
        let first = selections.layer_stats(0).unwrap();
        assert_eq!((first.complete, first.scored + first.reused), (1, 2), "on {}", device.name());
        assert!(first.scored >= 1);
        (1..LAYERS).for_each(|layer| assert_eq!(selections.layer_stats(layer).unwrap(), first));
    }
}

fn what_has_no_kernel_is_refused(device: &Device) {
    let name = device.name();
    let score_error = |config: SelectConfig| refused(device, config, Operations::SELECTION);
    let error = |config: SelectConfig| refused(device, config, Operations::ALL);
    assert_eq!(device.supports(&config(128, 4, DType::F16)), Ok(()));
    assert_eq!(device.supports(&config(256, 4, DType::Bf16)), Ok(()));
    let text = score_error(config(128, 17, DType::F16));
    assert_eq!(text, format!("{name} has no `score` for groups of 17 heads, only up to 16"));
    let text = score_error(config(80, 4, DType::Bf16));
    assert_eq!(
        text,
        format!("{name} has no `score` for bf16, head dimension 80; there are 64, 96, 128, 256")
    );
    let text = score_error(config(128, 4, DType::F32));
    assert_eq!(text, format!("{name} has no `append` for f32, only for f16 and bf16"));
    let text = error(config(256, 16, DType::Bf16));
    let groups = "bf16, head dimension 256, groups of up to 16 heads; there are 4, 8";
    assert_eq!(text, format!("{name} has no `score` for {groups}"));
    let attends = Operations { attend: true, ..Operations::NONE };
    let text = refused(device, config(192, 2, DType::Bf16), attends);
    let dims = "bf16, head dimension 192; there are 64, 96, 128, 256";
    assert_eq!(text, format!("{name} has no `attend` for {dims}"));
}

/// Rotation is no reason to refuse: every one that is valid has its kernels.
fn rotations_of_every_kind_are_supported(device: &Device) {
    for (head_dim, dtype) in [(64, DType::F16), (96, DType::Bf16), (128, DType::F16), (256, DType::Bf16)] {
        for rotary_dim in (2..=head_dim).step_by(2) {
            for pairing in [RopePairing::HalfSplit, RopePairing::Interleaved] {
                let rope = Rope { rotary_dim: Some(rotary_dim), pairing, ..Rope::default() };
                let positions = Positions::Reassigned(rope);
                device.supports(&SelectConfig { positions, ..config(head_dim, 2, dtype) }).unwrap();
            }
        }
    }
}

/// Kernels move pieces of 8 elements, which must lie at multiples of 8.
fn strides_that_break_pieces_are_refused(device: &Device) {
    let config = config(64, 2, DType::Bf16);
    let shape = KvShape { num_pages: 3, page_size: 4, num_kv_heads: 2, head_dim: 64 };
    let good = KvStrides { page: 576, token: 144, head: 72 };
    let memory = Tensor::zeros_on(device, DType::Bf16, [2000]).unwrap();
    let (q, kv) = (
        Tensor::zeros_on(device, DType::Bf16, [1, 4, 64]).unwrap(),
        Tensor::zeros_on(device, DType::Bf16, [1, 2, 64]).unwrap(),
    );
    let tables = PageTables { indptr: vec![0, 3], indices: vec![2, 0, 1], last_page_len: vec![4] };
    let batch = Batch::new(4, vec![0, 1], tables).unwrap();
    let mut ts = TokenSelect::new(device, config, limits(&batch)).unwrap();
    let mut outcome = |strides| {
        let mut own = to_device(device, &Tensor::zeros(DType::Bf16, [2000]).unwrap());
        let mut values = to_device(device, &Tensor::zeros(DType::Bf16, [2000]).unwrap());
        let to = KvViewMut::strided(own.view_mut(), values.view_mut(), shape, [strides; 2]).unwrap();
        let appended = ts.append(&batch, to, kv.view(), kv.view());
        let from = KvView::strided(memory.view(), memory.view(), shape, [strides; 2]).unwrap();
        let scored = ts.pool(&batch, q.view(), None).and_then(|()| ts.score(&batch, from));
        [appended, scored].map(|result| result.err().map(|error| error.to_string()))
    };
    assert_eq!(outcome(good), [None, None]);
    for (strides, field, got) in [
        (KvStrides { page: 580, ..good }, "page", 580),
        (KvStrides { token: 140, ..good }, "token", 140),
        (KvStrides { head: 68, ..good }, "head", 68),
    ] {
        let text =
            format!("argument `k_strides.{field}` must be a multiple of 8 elements on a GPU, got {got}");
        assert_eq!(outcome(strides), [Some(text.clone()), Some(text)]);
    }
}

/// The error of a plan, before anything is allocated.
fn refused(device: &Device, config: SelectConfig, operations: Operations) -> String {
    if operations == Operations::ALL {
        assert!(device.supports(&config).is_err());
    }
    Plan::new(device, config, Limits::default(), operations).unwrap_err().to_string()
}

fn tensors_must_be_where_the_device_works(device: &Device) {
    let config = config(64, 2, DType::Bf16);
    let mut cache = PagedKvCache::new(device, &config, &CacheConfig::default()).unwrap();
    let mut ts = TokenSelect::new(device, config, Limits::default()).unwrap();
    let id = cache.create().unwrap();
    let batch = cache.extend(&[(id, 1)]).unwrap();
    let q = Tensor::zeros(DType::Bf16, [1, 4, 64]).unwrap();
    let text = ts.pool(&batch, q.view(), None).unwrap_err().to_string();
    assert_eq!(text, "`q` must be on a GPU, it is on cpu");
}

#[test]
fn a_missing_device_says_so() {
    let text = Device::cuda(99).unwrap_err().to_string();
    assert!(text.starts_with("cuda:99: "), "{text}");
    let without_driver = text.contains("no CUDA driver: libcuda.so.1 could not be loaded");
    assert!(without_driver || text.contains("cuDeviceGet: 101 (CUDA_ERROR_INVALID_DEVICE)"), "{text}");
}

/// Appends, pools and scores a ragged batch, and returns the bits of everything that was written.
fn append_pool_score(device: &Device) -> Vec<Vec<u64>> {
    let config = SelectConfig { n_init: 2, n_local: 3, ..config(128, 4, DType::Bf16) };
    let problem = Problem::new(&config, &[(300, 1), (77, 5), (1000, 2)], Content::Peaked, 3);
    let heads = config.heads;
    let mut pool = Pool::before_block(&problem, 16, Storage::Nhd, 4).to(device);
    let batch = pool.batch(&problem);
    let block = |values: Vec<f64>, num_heads: usize| {
        let shape = [problem.num_query_tokens(), num_heads, heads.head_dim];
        to_device(device, &tensor(config.dtype, &values, shape))
    };
    let k = block(problem.blocks(|row| &row.k), heads.num_kv_heads);
    let v = block(problem.blocks(|row| &row.v), heads.num_kv_heads);
    let q = block(problem.q(), heads.num_qo_heads);
    let mut select = TokenSelect::new(device, config.clone(), limits(&batch)).unwrap();
    select.append(&batch, pool.view_mut(), k.view(), v.view()).unwrap();
    select.pool(&batch, q.view(), None).unwrap();
    select.score(&batch, pool.view()).unwrap();
    let workspace = select.workspace();
    [
        &pool.k,
        &pool.v,
        workspace.buffer(Buffer::Queries),
        workspace.buffer(Buffer::Logits),
        workspace.buffer(Buffer::Stats),
    ]
    .map(bits)
    .into()
}

/// Calls a function of the driver API, which must succeed.
macro_rules! driver {
    ($function:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: pointers to locals; handles and addresses that are alive.
        assert_eq!(unsafe { sys::$function($($argument),*) }, sys::CUresult::CUDA_SUCCESS)
    };
}

fn current_context() -> sys::CUcontext {
    let mut current = null_mut();
    driver!(cuCtxGetCurrent(&mut current));
    current
}

/// A stream of the caller's, in the primary context and in one that the caller has made.
fn work_joins_the_stream_of_the_caller(own_stream: &Device) {
    let want = append_pool_score(own_stream);
    let (mut primary, mut made) = (null_mut(), null_mut());
    driver!(cuDevicePrimaryCtxRetain(&mut primary, 0));
    driver!(cuCtxCreate_v2(&mut made, 0, 0));
    for (context, other) in [(primary, made), (made, primary), (primary, null_mut()), (made, null_mut())] {
        driver!(cuCtxSetCurrent(context));
        let mut stream = null_mut();
        driver!(cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32));
        // SAFETY: a stream of the current context, destroyed after the device.
        let device = unsafe { Device::cuda_on_stream(0, stream.cast()).unwrap() };
        assert_eq!(current_context(), context);
        copies_are_ordered(&device, stream);
        assert_eq!(append_pool_score(&device), want);
        assert_eq!(current_context(), context);
        driver!(cuCtxSetCurrent(other));
        assert_eq!(append_pool_score(&device), want, "whatever context is current");
        drop(device);
        assert_eq!(current_context(), other);
        driver!(cuCtxSetCurrent(context));
        driver!(cuStreamDestroy_v2(stream));
    }
    driver!(cuCtxDestroy_v2(made));
    driver!(cuDevicePrimaryCtxRelease_v2(0));
}

/// A copy of ours takes what the caller's work before it has written, and not what is written after it.
fn copies_are_ordered(device: &Device, stream: sys::CUstream) {
    const WORDS: usize = 64 << 20;
    let mut addr = 0;
    driver!(cuMemAlloc_v2(&mut addr, 4 * WORDS));
    let mut copy = Tensor::zeros_on(device, DType::U32, [WORDS]).unwrap();
    // Enough work that a copy which does not wait for it comes too early.
    for value in 0..20 {
        driver!(cuMemsetD32Async(addr, value, WORDS, stream));
    }
    // SAFETY: an allocation of so many words, written in the order of the same stream.
    let theirs = unsafe { TensorView::from_device_addr(device, addr, DType::U32, [WORDS]).unwrap() };
    copy.copy_from(theirs).unwrap();
    driver!(cuMemsetD32Async(addr, 77, WORDS, stream));
    assert!(copy.to_vec::<u32>().unwrap().iter().all(|&word| word == 19));
    assert!(theirs.to_vec::<u32>().unwrap().iter().all(|&word| word == 77));
    driver!(cuMemFree_v2(addr));
}

/// The helper of the test above gives the same bits under every schedule of the emulator.
#[test]
fn steps_have_the_same_bits_again() {
    let [first, second] = [Device::emulated(), Device::emulated_random(7)];
    assert!(append_pool_score(&first) == append_pool_score(&second));
}

fn kernels_are_launched_by_name(device: &Device) {
    let name = device.name();
    let out = Tensor::zeros_on(device, DType::U32, [16 * 24 * 96]).unwrap();
    let params = IndicesParams { out: GlobalMut::from_addr(out.view().device_addr().unwrap()) };
    let text = |entry, dims| {
        // SAFETY: what is launched at all is the conformance kernel, as it is meant to be.
        let launched = unsafe { device.launch(entry, dims, &params) };
        launched.map_or_else(|error| error.to_string(), |()| "launched".into())
    };
    assert_eq!(text("conformance_indices", INDICES_DIMS), "launched");
    assert_eq!(out.to_vec::<u32>().unwrap()[16 * 95..][..2], [7, 5], "the last thread of the first block");
    assert_eq!(text("nothing", INDICES_DIMS), format!("{name} has no `launch` for an entry `nothing`"));
    let expected = format!("{name}: kernel `forget`: takes 24 bytes of parameters, got 8");
    assert_eq!(text("forget", INDICES_DIMS), expected);
    let refused = text("conformance_indices", Dims { block: [2048, 1, 1], ..INDICES_DIMS });
    assert!(refused.contains("2048 threads along x, the device launches 1 to 1024"), "{refused}");
}

#[test]
fn tensors_of_the_host_have_no_address_on_a_device() {
    let host = Tensor::zeros(DType::U32, [1]).unwrap();
    assert_eq!(host.view().device_addr().unwrap_err().to_string(), "`tensor` must be on a GPU, it is on cpu");
}
