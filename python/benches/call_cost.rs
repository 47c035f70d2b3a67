//! The calls of `call_cost.py` from Rust: what the package adds to them is the difference.

use std::time::Instant;

use tokenselect::{
    Batch, CacheConfig, DType, Device, HeadShape, KvLayout, KvView, KvViewMut, Limits, Over, PageTables,
    PagedKvCache, Result, SelectConfig, TensorView, TensorViewMut, TokenSelect,
};

const HEADS: HeadShape = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 16 };
const PAGE: usize = 4;
const LENGTH: usize = 24;
const PAGES: usize = LENGTH / PAGE;
const CALLS: u32 = 2000;
const ROUNDS: usize = 15;

/// Prints the median over rounds of the mean time of a call.
fn time(name: &str, mut call: impl FnMut() -> Result<()>) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        times.push(begin.elapsed().as_secs_f64() / f64::from(CALLS) * 1e6);
    }
    times.sort_by(f64::total_cmp);
    println!("rust   {name:25} {:6.2} µs", times[ROUNDS / 2]);
    Ok(())
}

fn main() -> Result<()> {
    let device = Device::cpu();
    let config = SelectConfig {
        heads: HEADS,
        dtype: DType::F32,
        n_init: 2,
        n_local: 3,
        top_k: 5,
        selection_cache: None,
        ..SelectConfig::default()
    };
    let limits = Limits { max_rows: 1, max_block_len: LENGTH, max_kv_tokens: 64 };
    let mut select = TokenSelect::new(&device, config.clone(), limits)?;
    let tables = PageTables {
        indptr: vec![0, PAGES as u32],
        indices: (0..PAGES as u32).collect(),
        last_page_len: vec![PAGE as u32],
    };
    let batch = Batch::new(PAGE, vec![0, 1], tables)?;
    let empty = PageTables { indptr: vec![0, 0], indices: Vec::new(), last_page_len: vec![0] };
    let nothing = Batch::new(PAGE, vec![0, 1], empty)?;
    let shape = [PAGES, PAGE, HEADS.num_kv_heads, HEADS.head_dim];
    let draw = |len: usize| -> Vec<f32> { (0..len).map(|i| (i as f32 * 0.7).sin()).collect() };
    let (mut k_pages, mut v_pages) = (draw(shape.iter().product()), draw(shape.iter().product()));
    let (q, k, v) = (draw(4 * 16), draw(2 * 16), draw(2 * 16));
    let mut out = vec![0.0f32; 4 * 16];
    let mut cache = PagedKvCache::new(
        &device,
        &config,
        &CacheConfig { num_pages: PAGES, page_size: PAGE, ..CacheConfig::default() },
    )?;
    let sequence = cache.create()?;
    let prompt = cache.extend(&[(sequence, LENGTH - 1)])?;
    let prompt_kv = draw((LENGTH - 1) * 2 * 16);
    let prompt_kv = TensorView::new(&prompt_kv, [LENGTH - 1, 2, 16])?;
    select.fill(&mut cache, 0, &prompt, prompt_kv, prompt_kv)?;
    let row = cache.extend(&[(sequence, 1)])?;

    for (name, batch) in [("append", &batch), ("append nothing", &nothing)] {
        time(name, || {
            let input = select.input(batch, &q, &k, &v)?;
            let (k_pages, v_pages) =
                (TensorViewMut::new(&mut k_pages, shape)?, TensorViewMut::new(&mut v_pages, shape)?);
            select.append(batch, KvViewMut::new(k_pages, v_pages, KvLayout::Nhd)?, input.k, input.v)
        })?;
    }
    let kv =
        KvView::new(TensorView::new(&k_pages, shape)?, TensorView::new(&v_pages, shape)?, KvLayout::Nhd)?;
    for (name, attends, batch) in
        [("select", "attend", &batch), ("select nothing", "attend nothing", &nothing)]
    {
        time(name, || {
            let q = select.input(batch, &q, &k, &v)?.q;
            select.select(batch, kv, q, None)
        })?;
        time(attends, || {
            let q = select.input(batch, &q, &k, &v)?.q;
            let output = select.output(batch, &mut out, None)?;
            select.attend(batch, kv, q, Over::Selected, output)
        })?;
    }
    time("step", || {
        let input = select.input(&row, &q, &k, &v)?;
        let output = select.output(&row, &mut out, None)?;
        select.step(&mut cache, 0, &row, input, output)
    })
}
