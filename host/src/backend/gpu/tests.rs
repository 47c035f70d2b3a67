//! What a step launches.

use half::{bf16, f16};
use tokenselect_kernels::ops::score::ScoreParams;

use super::PREFETCHED_STAGES;
use crate::driver::emulated::Command;
use crate::error::Result;
use crate::{
    CacheConfig, DType, Device, HeadShape, Limits, PagedKvCache, SelectConfig, SelectionCacheConfig,
    StepInput, StepOutput, Tensor, TokenSelect,
};

/// What a step over 80 tokens launches, of which one is new.
fn launches_of_a_step(config: SelectConfig) -> Result<Vec<Command>> {
    let device = Device::emulated();
    let cache_config = CacheConfig { num_layers: 1, num_pages: 16, ..CacheConfig::default() };
    let mut cache = PagedKvCache::new(&device, &config, &cache_config)?;
    let heads = config.heads;
    let mut select = TokenSelect::new(&device, config, Limits::default())?;
    let id = cache.create()?;
    let mut commands = Vec::new();
    for block in [79, 1] {
        let numbers = vec![bf16::ONE; block * heads.num_qo_heads * heads.head_dim];
        let tensor = |num_heads: usize| {
            let numbers = &numbers[..block * num_heads * heads.head_dim];
            Tensor::from_slice_on(&device, numbers, [block, num_heads, heads.head_dim])
        };
        let (q, k, v) =
            (tensor(heads.num_qo_heads)?, tensor(heads.num_kv_heads)?, tensor(heads.num_kv_heads)?);
        let mut out = tensor(heads.num_qo_heads)?;
        let batch = cache.extend(&[(id, block)])?;
        let mut step = || {
            let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
            select.step(&mut cache, 0, &batch, input, StepOutput { out: out.view_mut(), lse: None })
        };
        step()?; // makes the tables
        let driver = device.driver().expect("a GPU");
        driver.begin_capture()?;
        let done = step();
        let captured = driver.end_capture()?;
        done?;
        commands = *captured.0.downcast().expect("commands of this driver");
    }
    Ok(commands)
}

/// Stages of keys that a step's `score_stream` prefetches.
fn prefetched_stages(config: SelectConfig) -> Option<u32> {
    launches_of_a_step(config).expect("a step").into_iter().find_map(|command| match command {
        Command::Launch { entry, params, .. } if entry.name.starts_with("score_stream") => {
            assert_eq!(params.len(), size_of::<ScoreParams<f16>>());
            // SAFETY: the bytes are the entry's parameters, which are the same for all element types.
            Some(
                unsafe { params.as_ptr().cast::<ScoreParams<f16>>().read_unaligned() }
                    .overlap
                    .prefetched_stages(),
            )
        }
        _ => None,
    })
}

/// Prefetched where they are wanted for certain: not where a selection may be used again, and not where the
/// launch before writes next to them.
#[test]
fn keys_are_prefetched_where_they_are_wanted() {
    let config = SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 },
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 20,
        top_k: 24,
        selection_cache: None,
        ..SelectConfig::default()
    };
    assert_eq!(prefetched_stages(config.clone()), Some(PREFETCHED_STAGES));
    assert_eq!(prefetched_stages(SelectConfig { n_local: 5, ..config.clone() }), Some(0));
    let selection_cache = Some(SelectionCacheConfig { similarity_threshold: 0.9, max_reuse: None });
    assert_eq!(prefetched_stages(SelectConfig { selection_cache, ..config }), Some(0));
}
