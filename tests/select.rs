//! A whole selection, in as few launches as the device can do it, against its operations one by one.

mod common;

use common::paged::{Pool, Storage};
use common::problem::{Content, Problem, small_config};
use common::run::{Inputs, selection};
use common::{bits, on_devices};
use tokenselect::{
    Buffer, DType, Device, Error, HeadShape, Limits, Positions, Rope, RowAction, SelectConfig, TokenSelect,
    Workspace,
};

on_devices! {
    gpus: a_selection_leaves_what_its_operations_leave;
}

/// Everything that a selection leaves in a workspace.
fn left(workspace: &Workspace) -> Vec<(&'static str, Vec<u64>)> {
    [
        ("queries", workspace.buffer(Buffer::Queries)),
        ("similarities", workspace.buffer(Buffer::Similarities)),
        ("actions", workspace.buffer(Buffer::Actions)),
        ("logits", workspace.buffer(Buffer::Logits)),
        ("stats", workspace.buffer(Buffer::Stats)),
        ("votes", workspace.buffer(Buffer::Votes)),
        ("pooled votes", workspace.buffer(Buffer::PooledVotes)),
        ("top_k", workspace.buffer(Buffer::TopK)),
        ("selected", workspace.buffer(Buffer::Selected)),
        ("selected_len", workspace.buffer(Buffer::SelectedLen)),
    ]
    .map(|(name, tensor)| (name, bits(tensor)))
    .into()
}

fn config(heads: [usize; 3], window: usize, positions: Positions) -> SelectConfig {
    let [num_kv_heads, group, head_dim] = heads;
    let heads = HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim };
    SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_local: 16,
        vote_pool_window: window,
        positions,
        ..small_config()
    }
}

/// The statistics of the chunks are folded by another kernel then, and keys are asked for ahead: the bits are the same.
/// Groups, chunks and heads of each kernel that scores; rows of every action but `Reuse`.
fn a_selection_leaves_what_its_operations_leave(device: &Device) {
    let rope = || Positions::Reassigned(Rope::default());
    let rows: [&[(usize, usize)]; 3] =
        [&[(700, 1)], &[(150, 4), (0, 0), (20, 1), (90, 0), (333, 2)], &[(120, 6), (60, 1)]];
    for (heads, page_size, window, positions) in [
        ([8, 4, 128], 16, 1, rope()),
        ([8, 4, 128], 1, 1, Positions::Native),
        ([2, 7, 64], 32, 3, rope()),
        ([1, 16, 128], 16, 1, Positions::Native),
        ([3, 2, 96], 16, 1, rope()),
        ([4, 5, 256], 7, 1, Positions::Native),
        ([40, 1, 64], 16, 1, rope()),
        ([20, 16, 64], 8, 1, Positions::Native),
    ] {
        for rows in rows {
            let config = config(heads, window, positions.clone());
            let problem = Problem::new(&config, rows, Content::Peaked, 3);
            let pool = Pool::full(&problem, page_size, Storage::Nhd, 4).to(device);
            let batch = pool.batch(&problem);
            let q = Inputs::new(&problem).to(device).q;
            let [mut whole, mut apart] = [0, 1].map(|_| selection(device, &problem, &batch));
            whole.select(&batch, pool.view(), q.view(), None).unwrap();
            apart.pool(&batch, q.view(), None).unwrap();
            apart.score(&batch, pool.view()).unwrap();
            apart.vote(&batch).unwrap();
            apart.top_k(&batch, None).unwrap();
            let what = format!("{}: {heads:?}, pages of {page_size}, {rows:?}", device.name());
            assert!(whole.workspace().actions().unwrap().contains(&RowAction::Score), "{what}");
            for ((name, got), (_, want)) in left(whole.workspace()).iter().zip(left(apart.workspace())) {
                assert!(*got == want, "{what}: {name}");
            }
        }
    }
}

/// More query heads than `vote` has room for are refused before there is anything to write.
#[test]
fn too_many_heads_are_refused() {
    let problem = Problem::new(&config([33, 16, 64], 1, Positions::Native), &[(60, 1)], Content::Peaked, 1);
    let device = Device::emulated();
    let error = device.supports(&problem.config).unwrap_err();
    assert!(matches!(error, Error::Unsupported { op: "vote", .. }), "{error}");
    assert!(error.to_string().contains("528 query heads, only up to 512"), "{error}");
    let made = TokenSelect::new(&device, problem.config.clone(), Limits::default());
    assert_eq!(made.map(drop), Err(error));
}
