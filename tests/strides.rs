//! Queries, keys and values that are slices of a fused projection, or lie head by head, and keys and values with strides of
//! their own: results are those of dense tensors, bit by bit.

mod common;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem};
use common::run::{Inputs, outputs_on, selected_lists};
use common::{bits, on_devices, tensor, to_device, values};
use tokenselect::{
    DType, Device, HeadShape, KvShape, KvStrides, KvView, KvViewMut, LayerMut, Over, Positions, Rope,
    SelectConfig, StepInput, StepOutput, Tensor, TensorView, TokenSelect,
};

on_devices! {
    all: parts_of_a_fused_projection, heads_outermost, keys_and_values_apart, what_cannot_be_strided;
    gpus: strides_of_whole_pieces;
}

fn config(dtype: DType, positions: Positions) -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 },
        dtype,
        n_init: 2,
        n_local: 3,
        top_k: 8,
        positions,
        selection_cache: None,
        ..SelectConfig::default()
    }
}

/// Decoding, short blocks and long ones.
const LENGTHS: [&[(usize, usize)]; 3] =
    [&[(70, 1), (0, 2), (33, 1)], &[(60, 3), (20, 0), (40, 4)], &[(150, 70), (90, 33)]];

/// Every operation that takes queries, keys or values, with what `give` makes of dense ones.
fn results(device: &Device, problem: &Problem, input: StepInput<'_>) -> Vec<Vec<u64>> {
    let mut pool = Pool::before_block(problem, 16, Storage::Nhd, 3).to(device);
    let batch = pool.batch(problem);
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let mut left = Vec::new();
    ts.append_select(&batch, LayerMut { kv: pool.view_mut(), selections: None }, input).unwrap();
    left.extend([bits(&pool.k), bits(&pool.v)]);
    let mut fresh = Pool::before_block(problem, 16, Storage::Nhd, 3).to(device);
    ts.append(&batch, fresh.view_mut(), input.k, input.v).unwrap();
    left.extend([bits(&fresh.k), bits(&fresh.v)]);
    ts.pool(&batch, input.q, None).unwrap();
    left.push(bits(ts.workspace().buffer(tokenselect::Buffer::Queries)));
    ts.select(&batch, pool.view(), input.q, None).unwrap();
    left.extend(
        selected_lists(&ts, problem.rows.len()).iter().map(|l| l.iter().map(|&t| t as u64).collect()),
    );
    for over in [Over::Selected, Over::All] {
        let (mut out, mut lse) = outputs_on(device, problem, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.attend(&batch, pool.view(), input.q, over, output).unwrap();
        left.extend([bits(&out), bits(&lse)]);
    }
    left
}

fn problems(device: &Device) -> impl Iterator<Item = Problem> {
    let dtypes: &[DType] =
        if device.is_cpu() { &[DType::F32, DType::Bf16] } else { &[DType::F16, DType::Bf16] };
    let rope = Positions::Reassigned(Rope::default());
    let kinds: Vec<_> =
        dtypes.iter().flat_map(|&dtype| [(dtype, Positions::Native), (dtype, rope.clone())]).collect();
    kinds.into_iter().flat_map(|(dtype, positions)| {
        LENGTHS.map(|lengths| Problem::new(&config(dtype, positions.clone()), lengths, Content::Peaked, 9))
    })
}

/// The numbers of three tensors `[tokens, heads, dim]`, token by token behind each other.
fn fused(inputs: &Inputs, tokens: usize) -> Vec<f64> {
    let parts = [&inputs.q, &inputs.k, &inputs.v].map(values);
    let width = |part: &Vec<f64>| part.len() / tokens.max(1);
    (0..tokens).flat_map(|t| parts.iter().flat_map(move |p| p[t * width(p)..][..width(p)].to_vec())).collect()
}

fn parts_of_a_fused_projection(device: &Device) {
    for problem in problems(device) {
        let (tokens, heads) = (problem.num_query_tokens(), problem.config.heads);
        let inputs = Inputs::new(&problem);
        let (hq, hkv, d) = (heads.num_qo_heads, heads.num_kv_heads, heads.head_dim);
        let all = tensor(problem.config.dtype, &fused(&inputs, tokens), [tokens, hq + 2 * hkv, d]);
        let all = to_device(device, &all);
        let part = |from, to| all.view().heads(from..to).unwrap();
        let strided = StepInput { q: part(0, hq), k: part(hq, hq + hkv), v: part(hq + hkv, hq + 2 * hkv) };
        let dense = inputs.to(device);
        assert!(
            results(device, &problem, strided) == results(device, &problem, dense.step()),
            "on {}",
            device.name()
        );
    }
}

/// `[heads, tokens, dim]`, as some models leave their queries after the rotation.
fn heads_outermost(device: &Device) {
    for problem in problems(device) {
        let tokens = problem.num_query_tokens();
        let inputs = Inputs::new(&problem);
        let turned = [&inputs.q, &inputs.k, &inputs.v].map(|given| {
            let (dims, all) = (given.shape().dims().to_vec(), values(given));
            let (heads, dim) = (dims[1], dims[2]);
            let at = |head: usize, t: usize| all[(t * heads + head) * dim..][..dim].to_vec();
            let turned: Vec<f64> =
                (0..heads).flat_map(|head| (0..tokens).flat_map(move |t| at(head, t))).collect();
            (to_device(device, &tensor(problem.config.dtype, &turned, [heads, tokens, dim])), heads, dim)
        });
        let [q, k, v] = &turned;
        fn view<'a>(device: &'a Device, given: &'a (Tensor, usize, usize), tokens: usize) -> TensorView<'a> {
            let (tensor, heads, dim) = given;
            strided(device, tensor, [tokens, *heads, *dim], [*dim, tokens * dim])
        }
        let view = |given| view(device, given, tokens);
        let input = StepInput { q: view(q), k: view(k), v: view(v) };
        let dense = inputs.to(device);
        let (got, want) = (results(device, &problem, input), results(device, &problem, dense.step()));
        // Pages, and lists; between them scoring queries, whose sums are in another order where blocks are short.
        assert!(got[..4] == want[..4], "pages on {}", device.name());
        let outputs = got.len() - 4;
        assert!(got[5..outputs] == want[5..outputs], "lists on {}", device.name());
        close(&got[4..5], &want[4..5], device);
        close(&got[outputs..], &want[outputs..], device);
    }
}

/// A strided view of a tensor's memory.
fn strided<'a>(device: &'a Device, of: &'a Tensor, shape: [usize; 3], strides: [usize; 2]) -> TensorView<'a> {
    if !device.is_cpu() {
        // SAFETY: the tensor is alive as long as the view, which nothing writes; its strides stay within it.
        return unsafe {
            let addr = of.view().device_addr().unwrap();
            TensorView::strided_from_device_addr(device, addr, of.dtype(), shape, strides).unwrap()
        };
    }
    match of.dtype() {
        DType::F32 => TensorView::strided(of.as_slice::<f32>().unwrap(), shape, strides),
        _ => TensorView::strided(of.as_slice::<half::bf16>().unwrap(), shape, strides),
    }
    .unwrap()
}

/// Keys in pages of one layout, values in pages of another, in one allocation and in two; values before keys, too.
fn keys_and_values_apart(device: &Device) {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::F16 };
    for (i, lengths) in LENGTHS.into_iter().enumerate() {
        let config = config(dtype, Positions::Native);
        let problem = Problem::new(&config, lengths, Content::Peaked, 2);
        let (page_size, heads) = (7, config.heads);
        let mut dense = Pool::before_block(&problem, page_size, Storage::Nhd, 3).to(device);
        let batch = dense.batch(&problem);
        let shape = dense.view().shape();
        let (hkv, d) = (heads.num_kv_heads, heads.head_dim);
        // Keys token by token, values head by head, in rows of 2 D, and gaps between the pages.
        let page = 2 * page_size * hkv * d + 16;
        let k = KvStrides { page, token: 2 * hkv * d, head: 2 * d };
        let v = KvStrides { page, token: 2 * d, head: page_size * 2 * d };
        let inputs = Inputs::new(&problem).to(device);
        let mut ts = TokenSelect::new(device, config.clone(), limits(&batch)).unwrap();
        let attend = |ts: &mut TokenSelect, kv: KvView<'_>| {
            let (mut out, mut lse) = outputs_on(device, &problem, DType::F32);
            ts.select(&batch, kv, inputs.q.view(), None).unwrap();
            let lists = selected_lists(ts, problem.rows.len());
            let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
            ts.attend(&batch, kv, inputs.q.view(), Over::Selected, output).unwrap();
            let mut left = (lists, vec![bits(&out), bits(&lse)]);
            let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
            ts.attend(&batch, kv, inputs.q.view(), Over::All, output).unwrap();
            left.1.extend([bits(&out), bits(&lse)]);
            left
        };
        let cached = |pool: &Pool| (values(&pool.k), values(&pool.v));
        let (old_k, old_v) = cached(&dense);
        ts.append(&batch, dense.view_mut(), inputs.k.view(), inputs.v.view()).unwrap();
        let want = attend(&mut ts, dense.view());
        // Where a head of a token of a page lies in a dense pool.
        let at = |page: usize, token: usize, head: usize| ((page * page_size + token) * hkv + head) * d;
        let scatter = |to: &mut [f64], from: &[f64], strides: KvStrides, offset: usize, shape: KvShape| {
            for page in 0..shape.num_pages {
                for token in 0..page_size {
                    for head in 0..hkv {
                        let place =
                            offset + page * strides.page + token * strides.token + head * strides.head;
                        to[place..place + d].copy_from_slice(&from[at(page, token, head)..][..d]);
                    }
                }
            }
        };
        // Two pools of their own: every slot is apart from every other one.
        let len = shape.num_pages * page + 2 * page;
        let (mut k_pool, mut v_pool) = (vec![0.0; len], vec![0.0; len]);
        scatter(&mut k_pool, &old_k, k, 0, shape);
        scatter(&mut v_pool, &old_v, v, 0, shape);
        let on = |numbers: &[f64]| to_device(device, &tensor(dtype, numbers, [numbers.len()]));
        let (mut k_pool, mut v_pool) = (on(&k_pool), on(&v_pool));
        let pages = KvViewMut::strided(k_pool.view_mut(), v_pool.view_mut(), shape, [k, v]).unwrap();
        ts.append(&batch, pages, inputs.k.view(), inputs.v.view()).unwrap();
        let kv = KvView::strided(k_pool.view(), v_pool.view(), shape, [k, v]).unwrap();
        assert_eq!(kv.strides(), [k, v]);
        let got = attend(&mut ts, kv);
        assert_eq!(got.0, want.0, "lists of case {i} on {}", device.name());
        close(&got.1, &want.1, device);
        // One pool, values before keys: rows of 2 D hold both.
        let both = KvStrides { page, token: 2 * hkv * d, head: 2 * d };
        let mut pool = vec![0.0; len];
        scatter(&mut pool, &old_k, both, d, shape);
        scatter(&mut pool, &old_v, both, 0, shape);
        let mut pool = on(&pool);
        let pages = KvViewMut::combined(pool.view_mut(), [d, 0], shape, [both; 2]).unwrap();
        ts.append(&batch, pages, inputs.k.view(), inputs.v.view()).unwrap();
        let keys = pool.view().tail(d).unwrap();
        let got = attend(&mut ts, KvView::strided(keys, pool.view(), shape, [both; 2]).unwrap());
        assert_eq!(got.0, want.0, "lists of case {i} in one pool on {}", device.name());
        close(&got.1, &want.1, device);
    }
}

/// The same bits on the processor; on GPUs another kernel may serve another layout, whose sums are in another order.
fn close(got: &[Vec<u64>], want: &[Vec<u64>], device: &Device) {
    if device.is_cpu() {
        assert!(got == want, "outputs on {}", device.name());
        return;
    }
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        let (got, want) = (f32::from_bits(*got as u32), f32::from_bits(*want as u32));
        assert!(got == want || (got - want).abs() <= 2e-3 * want.abs().max(1.0), "{got} is not {want}");
    }
}

fn what_cannot_be_strided(device: &Device) {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::F16 };
    let problem = Problem::new(&config(dtype, Positions::Native), &[(20, 1)], Content::Peaked, 1);
    let all = Tensor::zeros_on(device, dtype, [4, 10, 64]).unwrap();
    let part = all.view().heads(2..8).unwrap();
    assert_eq!(part.shape().dims(), [4, 6, 64]);
    let text = |error: tokenselect::Error| error.to_string();
    assert_eq!(text(part.heads(0..1).unwrap_err()), "argument `tensor` must be dense, got strides [640, 64]");
    assert_eq!(text(all.view().heads(3..11).unwrap_err()), "`last head` must be below 10, got 10");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = all.view().heads(3..1).unwrap_err();
    let wanted = "argument `heads` must be a range that ends where it begins or later, got 3..1";
    assert_eq!(text(reversed), wanted);
    let flat = Tensor::zeros_on(device, dtype, [8]).unwrap();
    assert_eq!(
        text(flat.view().heads(0..1).unwrap_err()),
        "argument `tensor` must be three-dimensional, got [8]"
    );
    assert!(part.to_vec::<half::f16>().is_err() && part.tail(1).is_err());
    let mut copy = Tensor::zeros_on(device, dtype, [4, 6, 64]).unwrap();
    assert!(copy.copy_from(part).is_err());
    let short = TensorView::strided(&[0.0f32; 100], [2, 2, 8], [80, 16]);
    let wanted = "`data` of shape [2, 2, 8] in strides [80, 16] from element 0 on needs 104 elements, the memory has 100";
    assert_eq!(text(short.unwrap_err()), wanted);
    assert!(TensorView::strided(&[0.0f32; 100], [2, 2, 8], [usize::MAX, 16]).is_err());
    // Lists and merged parts are dense.
    let pool = Pool::full(&problem, 16, Storage::Nhd, 1).to(device);
    let batch = pool.batch(&problem);
    let ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let parts = Tensor::zeros_on(device, DType::F32, [4, 10, 64]).unwrap();
    let mut out = Tensor::zeros_on(device, DType::F32, [1, 6, 64]).unwrap();
    let output = StepOutput { out: out.view_mut(), lse: None };
    assert!(ts.merge(parts.view().heads(0..6).unwrap(), parts.view(), output).is_err());
}

/// GPUs move 8 elements at a time.
fn strides_of_whole_pieces(device: &Device) {
    let problem = Problem::new(&config(DType::F16, Positions::Native), &[(20, 1)], Content::Peaked, 1);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 1).to(device);
    let batch = pool.batch(&problem);
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let memory = Tensor::zeros_on(device, DType::F16, [4000]).unwrap();
    let addr = memory.view().device_addr().unwrap();
    for (strides, field) in [([384, 68], 68), ([388, 64], 388)] {
        // SAFETY: within `memory`.
        let q =
            unsafe { TensorView::strided_from_device_addr(device, addr, DType::F16, [1, 6, 64], strides) };
        let error = ts.pool(&batch, q.unwrap(), None).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("argument `q` must be of strides that are multiples of 8 elements on a GPU, got {field}")
        );
    }
}
