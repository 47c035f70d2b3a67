//! Token selection as an operation of candle: tensors in, tensors out, read where they lie.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, D, Error, Layout, Result, Shape, Tensor};
use tokenselect::*;

/// What the layers of a model share.
struct State {
    cache: PagedKvCache,
    select: TokenSelect,
    batch: Batch,
}

/// Queries, new keys and new values `[1, heads, tokens, head_dim]` to attention `[tokens, heads, head_dim]`.
struct TokenAttention {
    layer: usize,
    state: Arc<Mutex<State>>,
}

impl CustomOp3 for TokenAttention {
    fn name(&self) -> &'static str {
        "token-attention"
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, q: &CpuStorage, ql: &Layout, k: &CpuStorage, kl: &Layout, v: &CpuStorage, vl: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut state = self.state.lock().expect("no step has panicked");
        let State { cache, select, batch } = &mut *state;
        let input = StepInput { q: view(q, ql)?, k: view(k, kl)?, v: view(v, vl)? };
        let (_, heads, tokens, head_dim) = ql.shape().dims4()?;
        let mut out = vec![0.0f32; tokens * heads * head_dim];
        let output = select.output(batch, &mut out, None).map_err(Error::wrap)?;
        select.step(cache, self.layer, batch, input, output).map_err(Error::wrap)?;
        Ok((CpuStorage::F32(out), (tokens, heads, head_dim).into()))
    }
}

/// `[1, heads, tokens, head_dim]` of any strides as `[tokens, heads, head_dim]`.
fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<TensorView<'a>> {
    let (_, heads, tokens, head_dim) = layout.shape().dims4()?;
    let data = &storage.as_slice::<f32>()?[layout.start_offset()..];
    let strides = [layout.stride()[2], layout.stride()[1]];
    TensorView::strided(data, [tokens, heads, head_dim], strides).map_err(Error::wrap)
}

fn main() -> Result<()> {
    let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::F32, ..SelectConfig::default() };
    let cpu = Device::cpu();
    let mut cache = PagedKvCache::new(&cpu, &config, &CacheConfig::default()).map_err(Error::wrap)?;
    let limits = Limits { max_block_len: 200, ..Limits::default() };
    let select = TokenSelect::new(&cpu, config, limits).map_err(Error::wrap)?;
    let sequence = cache.create().map_err(Error::wrap)?;
    let batch = cache.extend(&[(sequence, 200)]).map_err(Error::wrap)?; // once a forward, for all layers
    let op = TokenAttention { layer: 0, state: Arc::new(Mutex::new(State { cache, select, batch })) };

    // Slices of a fused projection, transposed: candle copies nothing, and neither does the operation.
    let qkv = Tensor::randn(0f32, 1.0, (1, 200, 12, 64), &candle_core::Device::Cpu)?.transpose(1, 2)?;
    let [q, k, v] = [(0, 8), (8, 2), (10, 2)].map(|(first, heads)| qkv.narrow(1, first, heads));
    let (q, k, v) = (q?, k?, v?);
    let out = q.apply_op3_no_bwd(&k, &v, &op)?;

    // So few tokens are all selected: the last one's attention is candle's own over all of them.
    let [keys, values] = [k, v].map(|kv| kv.unsqueeze(2)?.expand((1, 2, 4, 200, 64))?.reshape((8, 200, 64)));
    let scores = (q.squeeze(0)?.narrow(1, 199, 1)?.contiguous()?.matmul(&keys?.t()?)? * 0.125)?.exp()?;
    let dense = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.matmul(&values?)?;
    let error = (dense.squeeze(1)? - out.get(199)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("largest difference from candle's attention: {error:.1e}");
    assert!(error < 1e-5);
    Ok(())
}
