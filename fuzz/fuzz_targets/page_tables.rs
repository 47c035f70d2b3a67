//! Page tables of other engines: a batch is refused with an error or serves every accessor and every operation.
#![no_main]

#[path = "../src/tables.rs"]
mod tables;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use tables::Tables;
use tokenselect::{
    Batch, DType, Device, HeadShape, KvLayout, KvView, KvViewMut, LayerMut, Limits, Over, PageTables,
    Positions, Rope, SelectConfig, SelectionCache, SelectionCacheConfig, StepInput, StepOutput, Tensor,
    TokenSelect,
};

/// Pages of the pool that operations run on.
const NUM_PAGES: usize = 16;
const MAX_SEQUENCES: usize = 8;
/// Larger batches are looked at and not run.
const MAX_QUERY_TOKENS: usize = 64;
const MAX_PLACES: usize = 2048;
/// Stands where an operation must write.
const UNTOUCHED: f32 = -77.0;

#[derive(Arbitrary, Debug)]
struct Small {
    group: bool,
    f16: bool,
    n_init: u8,
    n_local: u8,
    top_k: u8,
    window: u8,
    reassigned: bool,
    cached: bool,
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let _ = run(&mut input);
});

fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let Tables { page_size, qo_indptr, indptr, indices, last_page_len, candidates, sequence_indices } =
        Tables::arbitrary(input)?;
    let tables = PageTables { indptr, indices, last_page_len };
    let made = match candidates {
        None => Batch::new(page_size, qo_indptr, tables),
        Some(bounds) => {
            let ranges = bounds.into_iter().map(|(begin, end)| begin..end).collect();
            Batch::partial(page_size, qo_indptr, tables, ranges)
        }
    };
    let Ok(mut batch) = made else { return Ok(()) };
    if let Some(indices) = sequence_indices {
        let Ok(named) = batch.with_sequence_indices(indices) else { return Ok(()) };
        batch = named;
    }
    if input.ratio(1, 3)? {
        let (rows, block_len) = (input.int_in_range(0..=12)?, size(input)?);
        let Ok(padded) = batch.padded(rows, block_len) else { return Ok(()) };
        batch = padded;
    }
    let config = config(&Small::arbitrary(input)?);
    look_at(&batch, &config);
    if config.validate().is_ok()
        && batch.num_query_tokens() <= MAX_QUERY_TOKENS
        && batch.num_token_places() <= MAX_PLACES
    {
        operate(&batch, config, input.arbitrary()?);
    }
    Ok(())
}

fn size(input: &mut Unstructured<'_>) -> arbitrary::Result<usize> {
    if input.ratio(1, 8)? { input.arbitrary() } else { input.int_in_range(0..=8) }
}

fn config(small: &Small) -> SelectConfig {
    let num_qo_heads = if small.group { 4 } else { 2 };
    SelectConfig {
        heads: HeadShape { num_qo_heads, num_kv_heads: 2, head_dim: 8 },
        dtype: if small.f16 { DType::F16 } else { DType::F32 },
        n_init: usize::from(small.n_init % 8),
        n_local: usize::from(small.n_local % 8),
        top_k: 1 + usize::from(small.top_k % 16),
        vote_pool_window: 1 + 2 * usize::from(small.window % 3),
        positions: if small.reassigned { Positions::Reassigned(Rope::default()) } else { Positions::Native },
        selection_cache: small
            .cached
            .then(|| SelectionCacheConfig { similarity_threshold: -1.0, ..SelectionCacheConfig::default() }),
        ..SelectConfig::default()
    }
}

/// Every accessor, and what must hold between them.
fn look_at(batch: &Batch, config: &SelectConfig) {
    let rows = batch.num_rows();
    assert_eq!(batch.qo_indptr().len(), rows + 1);
    assert_eq!(batch.tables().indptr.len(), rows + 1);
    let (mut queries, mut places) = (0, 0);
    for row in 0..rows {
        assert_eq!(batch.row(row).unwrap().queries.start, queries);
        queries += batch.row(row).unwrap().block_len();
        assert_eq!(batch.row(row).unwrap().token_base, places);
        places += batch.row(row).unwrap().pages.len() * batch.page_size();
        assert!(batch.row(row).unwrap().kv_len <= places - batch.row(row).unwrap().token_base);
        assert!(
            batch.row(row).unwrap().kv_len <= batch.max_kv_len()
                && batch.row(row).unwrap().block_len() <= batch.max_block_len()
        );
        let candidates = batch.row(row).unwrap().candidates(config);
        assert!(candidates.start <= candidates.end && candidates.end <= batch.row(row).unwrap().kv_len);
        let _ = batch.row(row).unwrap().sequence_index;
    }
    assert_eq!((queries, places), (batch.num_query_tokens(), batch.num_token_places()));
    let _ = format!("{batch:?}");
}

/// Runs every operation on the processor. Errors are answers; panics are not. What an operation says it has written is
/// written.
fn operate(batch: &Batch, config: SelectConfig, hnd: bool) {
    let device = Device::cpu();
    let (heads, dtype) = (config.heads, config.dtype);
    let limits = Limits {
        max_rows: batch.num_rows().max(1),
        max_block_len: batch.max_block_len().max(1),
        max_kv_tokens: batch.num_token_places().max(1),
    };
    let mut ts = TokenSelect::new(&device, config.clone(), limits).expect("limits of the batch");
    let (dims, layout) = match hnd {
        false => ([NUM_PAGES, batch.page_size(), heads.num_kv_heads, heads.head_dim], KvLayout::Nhd),
        true => ([NUM_PAGES, heads.num_kv_heads, batch.page_size(), heads.head_dim], KvLayout::Hnd),
    };
    let numbers = |dims: &[usize]| -> Vec<f32> {
        (0..dims.iter().product()).map(|i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
    };
    let make = |dims: [usize; 3]| tensor(dtype, numbers(&dims), dims);
    let tokens = batch.num_query_tokens();
    let q = make([tokens, heads.num_qo_heads, heads.head_dim]);
    let new = make([tokens, heads.num_kv_heads, heads.head_dim]);
    let mut k = tensor(dtype, numbers(&dims), dims);
    let mut v = tensor(dtype, numbers(&dims), dims);
    let mut cache = SelectionCache::new(&device, &config, 1, MAX_SEQUENCES).expect("a small cache");
    let out_dims = [tokens, heads.num_qo_heads, heads.head_dim];
    let output = || {
        let out = tensor(DType::F32, vec![UNTOUCHED; out_dims.iter().product()], out_dims);
        let lse =
            tensor(DType::F32, vec![UNTOUCHED; tokens * heads.num_qo_heads], [tokens, heads.num_qo_heads]);
        (out, lse)
    };
    let written = |(out, lse): &(Tensor, Tensor)| {
        for tensor in [out, lse] {
            let all = tensor.as_slice::<f32>().expect("of the host");
            assert!(all.iter().all(|&x| x != UNTOUCHED && !x.is_nan()), "not written, or no number");
        }
    };

    let kv = KvViewMut::new(k.view_mut(), v.view_mut(), layout).expect("a dense pool");
    let _ = ts.append(batch, kv, new.view(), new.view());
    for _ in 0..2 {
        let kv = KvView::new(k.view(), v.view(), layout).expect("a dense pool");
        let cached = cache.layer_mut(0).expect("one layer");
        if ts.select(batch, kv, q.view(), Some(cached)).is_ok() {
            let mut to = output();
            let output = StepOutput { out: to.0.view_mut(), lse: Some(to.1.view_mut()) };
            if ts.attend(batch, kv, q.view(), Over::Selected, output).is_ok() {
                written(&to);
            }
            for row in 0..batch.num_rows() {
                let list = ts.workspace().selected(row).expect("a row of the batch");
                assert!(list.is_sorted_by(|a, b| a < b));
                assert!(list.iter().all(|&token| (token as usize) < batch.row(row).unwrap().kv_len));
            }
        }
    }
    let kv = KvView::new(k.view(), v.view(), layout).expect("a dense pool");
    let mut to = output();
    let dense = StepOutput { out: to.0.view_mut(), lse: Some(to.1.view_mut()) };
    if ts.attend(batch, kv, q.view(), Over::All, dense).is_ok() {
        written(&to);
    }
    let kv = KvViewMut::new(k.view_mut(), v.view_mut(), layout).expect("a dense pool");
    let input = StepInput { q: q.view(), k: new.view(), v: new.view() };
    let _ = ts.append_select(
        batch,
        LayerMut { kv, selections: Some(cache.layer_mut(0).expect("one layer")) },
        input,
    );
}

fn tensor(dtype: DType, values: Vec<f32>, dims: impl Into<tokenselect::Shape>) -> Tensor {
    let made = match dtype {
        DType::F16 => Tensor::from_vec(values.into_iter().map(half::f16::from_f32).collect(), dims),
        _ => Tensor::from_vec(values, dims),
    };
    made.expect("as many values as the shape has")
}
