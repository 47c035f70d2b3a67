use super::params::*;
use crate::common::layout::{BatchTables, PageStrides, absent, absent_mut};
use crate::common::overlap::Overlap;
use crate::launch::{GpuInfo, Limits};
use crate::ops::score::ScoreParams;

/// Heads adjacent to one another, or tokens.
fn params(page_size: u32, num_kv_heads: u32, head_dim: u32, nhd: bool) -> ScoreParams<u16> {
    let (dim, heads) = (head_dim as u64, num_kv_heads as u64);
    let [token, head] = if nhd { [heads * dim, dim] } else { [dim, page_size as u64 * dim] };
    ScoreParams {
        k_pages: absent(),
        queries: absent(),
        actions: absent(),
        logits: absent_mut(),
        stats: absent_mut(),
        partial: absent_mut(),
        counters: absent_mut(),
        batch: BatchTables::of_one_row(page_size),
        stride: PageStrides { page: 2 * page_size as u64 * heads * dim, token, head },
        num_kv_heads,
        group: 4,
        n_init: 0,
        n_local: 0,
        rotated_scale: 1.0,
        score_scale: 1.0,
        head_dim,
        overlap: Overlap::NONE,
        top_k: 0,
        reserved: 0,
    }
}

#[test]
fn pages_that_can_be_streamed() {
    let streams = |page_size, heads, dim, nhd| params(page_size, heads, dim, nhd).can_stream();
    for dim in [64, 96, 128, 256] {
        for heads in 1..=8 {
            for page_size in [16, 32, 64, 1024] {
                let [all_heads, one_head] = [32 * heads * dim, 32 * dim].map(|bytes| bytes >= 4096);
                assert_eq!(streams(page_size, heads, dim, true), all_heads, "{heads} heads of {dim}");
                assert_eq!(streams(page_size, heads, dim, false), one_head || heads == 1 && all_heads);
            }
        }
        assert!(!streams(16, 9, dim, true), "a warp for each head");
        assert!(!streams(48, 8, dim, true) && !streams(7, 8, dim, false), "no power of two");
    }
    // Small pages: one copy a page, if that is large enough.
    assert!(!streams(1, 8, 128, true) && streams(2, 8, 128, true) && !streams(2, 4, 128, true));
    assert!(streams(8, 8, 64, true) && streams(4, 8, 64, true) && !streams(2, 8, 64, true));
    assert!(streams(1, 8, 256, true) && streams(1, 8, 256, false));
    assert!(!streams(16, 8, 80, true), "no such instance");
}

/// With 8 heads of 128, from some 200 k tokens on; not without bulk copies.
#[test]
fn short_contexts_are_not_streamed() {
    let score_stream_bytes = 132 * STREAM_BYTES_OF_SM;
    let gpu = GpuInfo { num_sms: 132, limits: Limits::SM_90, bulk_copies: true, score_stream_bytes };
    let nhd = params(16, 8, 128, true);
    assert!(!nhd.streams(&gpu, 192 << 10) && nhd.streams(&gpu, 256 << 10));
    assert!(!nhd.streams(&GpuInfo { bulk_copies: false, ..gpu }, 256 << 10));
    assert!(!params(1, 8, 128, true).streams(&gpu, 256 << 10), "pages of one token");
}

#[test]
fn gaps_between_rows_are_not_streamed() {
    let nhd = params(16, 8, 128, true);
    for (token, head) in [(1032, 128), (1024, 136), (2048, 256)] {
        let stride = PageStrides { token, head, ..nhd.stride };
        assert!(!ScoreParams { stride, ..nhd }.can_stream(), "{stride:?}");
    }
}

/// At least three stages, but for heads of 256 with large groups, and never more than a block can have.
#[test]
fn stages_fit() {
    for head_dim in [64, 96, 128, 256] {
        for columns in [4, 8, 16] {
            let layout = StreamLayout::new(head_dim, columns);
            assert!(layout.bytes <= BLOCK_BYTES, "{} bytes", layout.bytes);
            assert!(
                layout.ring.num_stages() >= if head_dim == 256 { 1 } else { 3 },
                "{}",
                layout.ring.num_stages()
            );
        }
    }
    assert_eq!(StreamLayout::new(128, 4).ring.num_stages(), 6);
}
