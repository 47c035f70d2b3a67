use super::params::*;
use crate::common::layout::{BatchTables, HeadStrides, PageStrides, absent, absent_mut};
use crate::common::paged::{TileLayout, WARPS, stage_tiles};
use crate::common::rope::RopeTables;
use crate::launch::{GpuInfo, Limits};
use crate::limits::SHARED_BYTES_SM_90;
use crate::ops::attend::{AttendParams, MAX_POSITION};
use crate::simt::global::GlobalPtr;

const GPU: GpuInfo =
    GpuInfo { num_sms: 132, limits: Limits::SM_90, bulk_copies: true, score_stream_bytes: 0 };

/// A decode row of 1000 tokens; heads adjacent to one another, or tokens.
fn params(page_size: u32, num_kv_heads: u32, head_dim: u32, nhd: bool) -> AttendParams<u16> {
    let (dim, heads) = (head_dim as u64, num_kv_heads as u64);
    let [token, head] = if nhd { [heads * dim, dim] } else { [dim, page_size as u64 * dim] };
    let stride = PageStrides { page: page_size as u64 * heads * dim, token, head };
    AttendParams {
        q: absent(),
        k_pages: absent(),
        v_pages: absent(),
        selected: absent(),
        selected_len: absent(),
        ranks: absent(),
        total_len: absent(),
        out: absent_mut(),
        lse: absent_mut(),
        partial: absent_mut(),
        partial_stats: absent_mut(),
        counters: absent_mut(),
        batch: BatchTables::of_one_row(page_size),
        q_stride: HeadStrides::dense(8, 128),
        k_stride: stride,
        v_stride: stride,
        rope: RopeTables::none(),
        num_kv_heads,
        group: 4,
        max_selected: 0,
        max_block_len: 1,
        last_position: MAX_POSITION,
        max_len: 1000,
        k_is_gathered: 0,
        out_is_f32: 0,
        rotated_scale: 1.0,
        inverse_scale: 1.0,
        sm_scale_log2: 1.0,
        soft_cap_log2: 0.0,
        num_splits: 0,
        reserved: 0,
    }
}

#[test]
fn dense_decoding_from_large_pages_is_streamed() {
    let base = params(16, 8, 128, true);
    let streams = |params: AttendParams<u16>| params.can_stream(&GPU, 128);
    assert!(streams(base));
    for group in 1..=16 {
        assert_eq!(streams(AttendParams { group, ..base }), group <= 8, "groups of {group}");
        assert_eq!(streams(AttendParams { group, max_block_len: 2, ..base }), group <= 4);
    }
    let listed = GlobalPtr::from_addr(256);
    assert!(!streams(AttendParams { selected: listed, ..base }), "a list");
    let rope = RopeTables { coarse: GlobalPtr::from_addr(256), ..RopeTables::none() };
    assert!(!streams(AttendParams { rope, ..base }), "rotated keys");
    assert!(!streams(AttendParams { k_is_gathered: 1, ..base }), "gathered keys");
    let apart = PageStrides { page: 2 * base.k_stride.page, ..base.k_stride };
    assert!(!streams(AttendParams { v_stride: apart, ..base }), "keys and values laid out differently");
    assert!(!base.can_stream(&GpuInfo { bulk_copies: false, ..GPU }, 128), "no bulk copies");
    assert!(params(16, 8, 256, true).can_stream(&GPU, 256));
    assert!(!params(16, 8, 192, true).can_stream(&GPU, 192), "no such instance");
    // Pages: the rule itself is tested with `score_stream`.
    assert!(!streams(params(7, 8, 128, true)) && !streams(params(1, 8, 128, true)));
    assert!(streams(params(16, 1, 128, true)) && !params(16, 1, 64, true).can_stream(&GPU, 64));
}

#[test]
fn rows_share_the_device() {
    let with_rows = |num_rows| {
        let params = params(16, 8, 128, true);
        AttendParams { batch: BatchTables { num_rows, ..params.batch }, max_len: 1 << 20, ..params }
    };
    for (num_rows, blocks) in [(1, 132), (2, 66), (16, 8), (44, 3), (64, 2), (120, 1), (132, 1)] {
        let params = with_rows(num_rows);
        assert!(params.can_stream(&GPU, 128), "{num_rows} rows");
        assert_eq!(params.stream_dims(&GPU, 128).grid, [blocks, num_rows, 1]);
    }
    for num_rows in [50, 100, 133, 264] {
        assert!(!with_rows(num_rows).can_stream(&GPU, 128), "{num_rows} rows leave SMs idle");
    }
    let short = AttendParams { max_len: 40, ..with_rows(1) };
    assert_eq!(short.stream_splits(&GPU), 3);
    assert_eq!(AttendParams { max_len: 0, ..short }.stream_splits(&GPU), 1);
}

/// Splits fit the workspace, tiles their stage, blocks the device.
#[test]
fn everything_fits() {
    for head_dim in [64, 96, 128, 256] {
        let layout = Layout::new(head_dim);
        assert!(
            layout.bytes <= SHARED_BYTES_SM_90
                && layout.ring.num_stages() >= if head_dim == 256 { 3 } else { 6 },
            "{} bytes",
            layout.bytes
        );
        for heads in 1..=WARPS {
            for nhd in [true, false] {
                for num_rows in 1..=132 {
                    let params = params(16, heads, head_dim, nhd);
                    let batch = BatchTables { num_rows, ..params.batch };
                    let params = AttendParams { batch, max_len: 1 << 20, ..params };
                    let tiles = TileLayout::new(&params.pages(head_dim), PAD);
                    assert!(stage_tiles(heads) * tiles.tile <= layout.stage_bytes);
                    let splits = num_rows * heads * params.stream_splits(&GPU);
                    assert!(splits <= max_parts(&GPU), "{splits} splits");
                }
            }
        }
    }
}

/// Segments of 4 tokens are apart where copies of them are of 4 KiB.
#[test]
fn segments_are_padded_where_copies_stay_large() {
    let tiles =
        |page_size, heads, dim, nhd| TileLayout::new(&params(page_size, heads, dim, nhd).pages(dim), PAD);
    let padded = tiles(16, 8, 128, true);
    assert_eq!((padded.copy_tokens, padded.segment, padded.tile), (4, 4 * 2048 + 32, 16 * 2048 + 128));
    let small = tiles(2, 8, 128, true);
    assert_eq!((small.copy_tokens, small.segment), (2, 4 * 2048 + 32));
    let few_heads = tiles(16, 2, 128, true);
    assert_eq!((few_heads.copy_tokens, few_heads.segment), (16, 4 * 512));
    let heads_apart = tiles(16, 8, 128, false);
    assert_eq!((heads_apart.copy_tokens, heads_apart.segment, heads_apart.head), (16, 4 * 256, 16 * 256));
}
