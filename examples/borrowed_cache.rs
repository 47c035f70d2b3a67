//! Steps over the cache of another engine, in place: vLLM's blocks and SGLang's slots of tokens.

use tokenselect::*;

const HEADS: HeadShape = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
const PROMPT: usize = 600;

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 29 + seed * 13) % 97) as f32 / 48.0 - 1.0).collect()
}

/// A prompt, then a token, over whatever cache `kv` is; returns the token's attention.
fn steps(kv: &mut KvViewMut<'_>, page_size: usize, pages_of: impl Fn(usize) -> Vec<u32>) -> Result<Vec<f32>> {
    let config = SelectConfig {
        heads: HEADS,
        dtype: DType::F32,
        n_init: 16,
        top_k: 64,
        n_local: 32,
        ..SelectConfig::default()
    };
    let limits = Limits { max_block_len: PROMPT, ..Limits::default() };
    let mut select = TokenSelect::new(&Device::cpu(), config, limits)?;
    let mut out = Vec::new();
    for (block, len) in [(PROMPT, PROMPT), (1, PROMPT + 1)] {
        let indices = pages_of(len);
        let last_page_len = vec![(len - (indices.len() - 1) * page_size) as u32];
        let tables = PageTables { indptr: vec![0, indices.len() as u32], indices, last_page_len };
        let batch = Batch::new(page_size, vec![0, block as u32], tables)?;
        // Queries, keys and values are slices of a fused projection: nothing is copied.
        let width = HEADS.num_qo_heads + 2 * HEADS.num_kv_heads;
        let projection = numbers(len, block * width * HEADS.head_dim);
        let qkv = TensorView::new(&projection, [block, width, HEADS.head_dim])?;
        let input = StepInput { q: qkv.heads(0..8)?, k: qkv.heads(8..10)?, v: qkv.heads(10..12)? };
        out = vec![0.0; block * HEADS.num_qo_heads * HEADS.head_dim];
        select.append_select(&batch, LayerMut { kv: kv.reborrow(), selections: None }, input)?;
        let output = select.output(&batch, &mut out, None)?;
        select.attend(&batch, kv.as_view()?, input.q, Over::Selected, output)?;
    }
    println!(
        "{} of {} tokens selected over pages of {page_size}",
        select.workspace().selected(0)?.len(),
        PROMPT + 1
    );
    Ok(out)
}

/// vLLM: `[blocks, heads, tokens, 2 * head_dim]`, a token's key before its value; a table of blocks for each request.
fn vllm() -> Result<Vec<f32>> {
    let shape =
        KvShape { num_pages: 64, page_size: 16, num_kv_heads: HEADS.num_kv_heads, head_dim: HEADS.head_dim };
    let token = 2 * HEADS.head_dim;
    let strides = KvStrides { page: HEADS.num_kv_heads * 16 * token, token, head: 16 * token };
    let mut memory = vec![0.0f32; 64 * strides.page];
    let len = memory.len();
    let pages = TensorViewMut::new(&mut memory, [len])?;
    let mut kv = KvViewMut::combined(pages, [0, HEADS.head_dim], shape, [strides; 2])?;
    steps(&mut kv, 16, |len| (0..len.div_ceil(16) as u32).map(|block| block * 37 % 64).collect())
}

/// SGLang: `[slots, heads, head_dim]` for keys and for values; `req_to_token` has the slot of every token.
fn sglang() -> Result<Vec<f32>> {
    let pool = [1024, 1, HEADS.num_kv_heads, HEADS.head_dim];
    let mut memory = [(); 2].map(|()| vec![0.0f32; pool.iter().product()]);
    let [k, v] = memory.each_mut().map(|memory| TensorViewMut::new(memory, pool));
    let mut kv = KvViewMut::new(k?, v?, KvLayout::Nhd)?;
    steps(&mut kv, 1, |len| (0..len as u32).map(|token| token * 7 % 1024).collect())
}

fn main() -> Result<()> {
    // On a GPU: `TensorView::from_device_addr` for tensors, and for tables that lie there `BatchSlot::translate`.
    assert_eq!(vllm()?, sglang()?);
    println!("both caches give the same attention, bit for bit");
    Ok(())
}
