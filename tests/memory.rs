//! Sizes that cannot be had are typed errors, and what is sized is not yet allocated.

mod common;

use common::{on_devices, problem};
use tokenselect::{
    Batch, BatchSlot, CacheConfig, DType, Device, Error, HeadShape, Limits, MAX_SEQUENCE_LEN, Operations,
    PageAllocator, PageTables, PagedKvCache, Plan, Positions, Rope, SelectConfig, SelectionCache, Tensor,
    TokenSelect, Workspace,
};

on_devices! {
    all: sizes_that_cannot_be_had, a_plan_allocates_nothing;
}

fn config() -> SelectConfig {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    SelectConfig { heads, dtype: DType::Bf16, ..problem::small_config() }
}

#[track_caller]
fn no_memory<T>(made: Result<T, Error>) {
    match made {
        Err(Error::OutOfMemory { .. }) => {}
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("there is no such memory"),
    }
}

fn sizes_that_cannot_be_had(device: &Device) {
    let config = config();
    no_memory(Tensor::zeros_on(device, DType::F32, [1 << 60]));
    no_memory(Tensor::zeros_on(device, DType::U64, [usize::MAX, 4]));
    no_memory(Tensor::zeros_on(device, DType::F16, [1 << 46]));
    let error = SelectionCache::new(device, &config, usize::MAX, 2).unwrap_err();
    assert!(matches!(error, Error::Argument { what: "num_layers", .. }), "{error}");
    no_memory(SelectionCache::new(device, &config, 2, usize::MAX));
    no_memory(SelectionCache::new(device, &config, 1 << 16, 1 << 28));
    let pages = CacheConfig { num_pages: MAX_SEQUENCE_LEN, page_size: 256, ..CacheConfig::default() };
    no_memory(PagedKvCache::new(device, &config, &pages));
    let many = CacheConfig { num_pages: 1, page_size: 1, num_layers: usize::MAX, ..CacheConfig::default() };
    let error = PagedKvCache::new(device, &config, &many).unwrap_err();
    assert!(matches!(error, Error::Config { field: "num_layers", .. }), "{error}");
    let limits = Limits { max_rows: MAX_SEQUENCE_LEN, max_block_len: 1, max_kv_tokens: MAX_SEQUENCE_LEN };
    no_memory(TokenSelect::new(device, config.clone(), limits));
}

/// Sizes and kernels are all that a plan has: no angles of 2^31 positions, and no bytes that wrap.
fn a_plan_allocates_nothing(device: &Device) {
    let wide = SelectConfig { top_k: MAX_SEQUENCE_LEN, ..config() };
    for positions in [Positions::Native, Positions::Reassigned(Rope::default())] {
        let config = SelectConfig { positions, ..wide.clone() };
        let huge = Limits {
            max_rows: MAX_SEQUENCE_LEN,
            max_block_len: MAX_SEQUENCE_LEN,
            max_kv_tokens: MAX_SEQUENCE_LEN,
        };
        let plan = Plan::new(device, config.clone(), huge, Operations::ALL).unwrap();
        no_memory(Workspace::num_bytes(&plan));
        no_memory(TokenSelect::with_plan(plan));
        let small = Plan::new(device, config, Limits::default(), Operations::ALL).unwrap();
        assert!(Workspace::num_bytes(&small).unwrap() > 4 * MAX_SEQUENCE_LEN);
        device.supports(small.config()).unwrap();
    }
}

/// Tables for pages and sequences grow with their use.
#[test]
fn an_allocator_costs_what_is_used() {
    let mut pages = PageAllocator::new(MAX_SEQUENCE_LEN, 1, MAX_SEQUENCE_LEN).unwrap();
    assert_eq!((pages.num_pages(), pages.num_free_pages()), (MAX_SEQUENCE_LEN, MAX_SEQUENCE_LEN));
    let id = pages.create().unwrap();
    pages.extend(&[(id, 3)]).unwrap();
    assert_eq!(pages.num_free_pages(), MAX_SEQUENCE_LEN - 3);
    assert_eq!((pages.ref_count(2), pages.ref_count(3)), (Ok(1), Ok(0)));
    assert_eq!(pages.max_sequences(), MAX_SEQUENCE_LEN);
    let beyond = MAX_SEQUENCE_LEN as u32;
    assert!(matches!(pages.ref_count(beyond), Err(Error::Index { what: "page", .. })));
}

#[test]
fn padding_beyond_all_bounds() {
    let batch = || {
        let tables = PageTables { indptr: vec![0, 1], indices: vec![0], last_page_len: vec![1] };
        Batch::new(16, vec![0, 1], tables).unwrap()
    };
    for (rows, block) in [(1 << 40, 0), (1 << 40, 1), (3, 1 << 33), (3, usize::MAX), (usize::MAX, usize::MAX)]
    {
        let error = batch().padded(rows, block).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "num_rows", .. }), "{rows} rows of {block}: {error}");
    }
    let padded = batch().padded(3, 1 << 20).unwrap();
    assert_eq!(padded.row(2).unwrap().block_len(), 1 << 20);
    let error = BatchSlot::new(&Device::emulated(), &batch(), usize::MAX).unwrap_err();
    assert!(matches!(error, Error::Limit { what: "pages of a slot", .. }), "{error}");
}
