//! Errors of configurations, limits and sizes: every rule of every `validate`.

use tokenselect::{
    CacheConfig, DType, Device, HeadShape, Limits, MAX_SEQUENCE_LEN, Operations, PageAllocator, PagedKvCache,
    Plan, Positions, Rope, RopeScaling, SelectConfig, SelectionCache, SelectionCacheConfig, Tensor,
    TokenSelect,
};

use super::common::problem::{cached, small_config};
use super::says;

/// Asserts that whatever takes a configuration refuses this one with this text.
#[track_caller]
fn refused(change: impl FnOnce(&mut SelectConfig), text: &str) {
    let mut config = cached(small_config(), 0.9, None);
    change(&mut config);
    let text = format!("configuration field {text}");
    says(config.validate(), &text);
    says(Plan::new(&Device::cpu(), config.clone(), Limits::default(), Operations::ALL), &text);
    says(TokenSelect::new(&Device::cpu(), config.clone(), Limits::default()), &text);
    says(PagedKvCache::new(&Device::cpu(), &config, &CacheConfig::default()), &text);
    says(SelectionCache::new(&Device::cpu(), &config, 1, 1), &text);
}

#[test]
fn configuration_of_heads_and_windows() {
    let heads = |hq: usize, hkv: usize, d: usize| {
        move |c: &mut SelectConfig| c.heads = HeadShape { num_qo_heads: hq, num_kv_heads: hkv, head_dim: d }
    };
    refused(heads(4, 0, 8), "`num_kv_heads` must be at least 1, got 0");
    refused(heads(0, 2, 8), "`num_qo_heads` must be a positive multiple of num_kv_heads = 2, got 0");
    refused(heads(5, 2, 8), "`num_qo_heads` must be a positive multiple of num_kv_heads = 2, got 5");
    refused(heads(1, 2, 8), "`num_qo_heads` must be a positive multiple of num_kv_heads = 2, got 1");
    refused(heads(4, 2, 0), "`head_dim` must be a multiple of 8 from 8 to 256, got 0");
    refused(heads(4, 2, 20), "`head_dim` must be a multiple of 8 from 8 to 256, got 20");
    refused(heads(4, 2, 264), "`head_dim` must be a multiple of 8 from 8 to 256, got 264");
    refused(|c| c.dtype = DType::U32, "`dtype` must be f16, bf16 or f32, got u32");
    let max = MAX_SEQUENCE_LEN;
    refused(|c| c.n_init = max + 1, &format!("`n_init` must be at most {max}, got {}", max + 1));
    refused(|c| c.n_local = max + 1, &format!("`n_local` must be at most {max}, got {}", max + 1));
    refused(|c| c.top_k = max + 1, &format!("`top_k` must be at most {max}, got {}", max + 1));
    refused(|c| c.top_k = 0, "`top_k` must be at least 1, got 0");
}

#[test]
fn configuration_of_scales_pool_and_reuse() {
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        refused(|c| c.score_scale = Some(bad), &format!("`score_scale` must be finite, got {shown}"));
        refused(|c| c.sm_scale = Some(bad), &format!("`sm_scale` must be finite, got {shown}"));
    }
    for (bad, shown) in [(0.0, "0"), (-2.5, "-2.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let text = format!("`logits_soft_cap` must be finite and above 0, got {shown}");
        refused(|c| c.logits_soft_cap = Some(bad), &text);
    }
    let max = MAX_SEQUENCE_LEN;
    for bad in [0, 2, 64, max + 2 - max % 2] {
        let text = format!("`vote_pool_window` must be odd and at most {max}, got {bad}");
        refused(|c| c.vote_pool_window = bad, &text);
    }
    for (bad, shown) in [(1.5, "1.5"), (-1.25, "-1.25"), (f32::NAN, "NaN")] {
        let cache = SelectionCacheConfig { similarity_threshold: bad, max_reuse: None };
        let text = format!("`similarity_threshold` must be from -1 to 1, got {shown}");
        refused(|c| c.selection_cache = Some(cache), &text);
    }
}

#[test]
fn configuration_of_rope() {
    let rope = |change: fn(&mut Rope), text: &str| {
        let mut rope = Rope::default();
        change(&mut rope);
        refused(|c| c.positions = Positions::Reassigned(rope), &format!("`rope.{text}"));
    };
    rope(|r| r.theta = 0.0, "theta` must be finite and above 0, got 0");
    rope(|r| r.theta = f64::NAN, "theta` must be finite and above 0, got NaN");
    rope(|r| r.theta = f64::INFINITY, "theta` must be finite and above 0, got inf");
    rope(|r| r.theta = 1.0, "theta` must be above 1, got 1");
    rope(|r| r.rotary_dim = Some(0), "rotary_dim` must be even, from 2 to head_dim = 16, got 0");
    rope(|r| r.rotary_dim = Some(5), "rotary_dim` must be even, from 2 to head_dim = 16, got 5");
    rope(|r| r.rotary_dim = Some(18), "rotary_dim` must be even, from 2 to head_dim = 16, got 18");
    rope(
        |r| r.scaling = RopeScaling::Linear { factor: -1.0 },
        "scaling.factor` must be finite and above 0, got -1",
    );
}

/// Every number of the scalings must be positive, and the ramps must not be reversed.
#[test]
fn configuration_of_rope_scalings() {
    let refuse = |scaling: RopeScaling, text: &str| {
        let rope = Rope { scaling, ..Rope::default() };
        refused(|c| c.positions = Positions::Reassigned(rope), &format!("`rope.scaling.{text}"));
    };
    let llama3 = |at: usize, bad: f64| {
        let mut n = [8.0, 1.0, 4.0, 8192.0];
        n[at] = bad;
        let [factor, low_freq_factor, high_freq_factor, original_max_position] = n;
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position }
    };
    for (at, name) in
        ["factor", "low_freq_factor", "high_freq_factor", "original_max_position"].iter().enumerate()
    {
        refuse(llama3(at, 0.0), &format!("{name}` must be finite and above 0, got 0"));
    }
    refuse(llama3(2, 1.0), "high_freq_factor` must be above low_freq_factor = 1, got 1");
    let yarn = |at: usize, bad: f64| {
        let mut n = [4.0, 4096.0, 32.0, 1.0, 1.1];
        n[at] = bad;
        let [factor, original_max_position, beta_fast, beta_slow, attention] = n;
        let attention_factor = Some(attention);
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor }
    };
    for (at, name) in
        ["factor", "original_max_position", "beta_fast", "beta_slow", "attention_factor"].iter().enumerate()
    {
        refuse(yarn(at, f64::NAN), &format!("{name}` must be finite and above 0, got NaN"));
    }
    refuse(yarn(2, 0.5), "beta_fast` must be at least beta_slow = 1, got 0.5");
}

/// The outermost values that the rules allow.
#[test]
fn configuration_limits_are_inclusive() {
    let accept = |change: &dyn Fn(&mut SelectConfig)| {
        let mut config = small_config();
        change(&mut config);
        config.validate().unwrap();
    };
    for d in [8, 24, 256] {
        accept(&|c| c.heads = HeadShape { num_qo_heads: 3, num_kv_heads: 1, head_dim: d });
    }
    accept(&|c| (c.n_init, c.n_local, c.top_k) = (0, 0, 1));
    accept(&|c| (c.n_init, c.n_local, c.top_k) = (MAX_SEQUENCE_LEN, MAX_SEQUENCE_LEN, MAX_SEQUENCE_LEN));
    accept(&|c| (c.score_scale, c.sm_scale) = (Some(-1.0), Some(0.0)));
    accept(&|c| c.vote_pool_window = MAX_SEQUENCE_LEN - (MAX_SEQUENCE_LEN + 1) % 2);
    for similarity_threshold in [-1.0, 1.0] {
        let cache = SelectionCacheConfig { similarity_threshold, max_reuse: Some(0) };
        accept(&|c| c.selection_cache = Some(cache));
    }
    accept(&|c| c.positions = Positions::Reassigned(Rope { rotary_dim: Some(2), ..Rope::default() }));
    SelectConfig::default().validate().unwrap();
    SelectConfig::paper(SelectConfig::default().heads, Rope::default(), 512).validate().unwrap();
}

#[test]
fn limits_and_cache_sizes() {
    let field = |text: &str| format!("configuration field {text}");
    let argument = |text: &str| format!("argument {text}");
    let cache = |size| PagedKvCache::new(&Device::cpu(), &small_config(), &size);
    let max = MAX_SEQUENCE_LEN;
    for bad in [0, max + 1] {
        let rule = format!("must be from 1 to {max}, got {bad}");
        let limits = |change: fn(&mut Limits, usize)| {
            let mut limits = Limits::default();
            change(&mut limits, bad);
            Plan::new(&Device::cpu(), small_config(), limits, Operations::ALL)
        };
        says(limits(|l, bad| l.max_rows = bad), &field(&format!("`max_rows` {rule}")));
        says(limits(|l, bad| l.max_block_len = bad), &field(&format!("`max_block_len` {rule}")));
        says(limits(|l, bad| l.max_kv_tokens = bad), &field(&format!("`max_kv_tokens` {rule}")));
        says(PageAllocator::new(bad, 16, 1), &argument(&format!("`num_pages` {rule}")));
        says(PageAllocator::new(1, 16, bad), &argument(&format!("`max_sequences` {rule}")));
        let size = CacheConfig { num_pages: bad, ..CacheConfig::default() };
        says(cache(size), &field(&format!("`num_pages` {rule}")));
    }
    for bad in [0, 257] {
        let text = format!("`page_size` must be from 1 to 256, got {bad}");
        says(PageAllocator::new(1, bad, 1), &argument(&text));
        says(cache(CacheConfig { page_size: bad, ..CacheConfig::default() }), &field(&text));
    }
    let no_layers = CacheConfig { num_layers: 0, ..CacheConfig::default() };
    says(cache(no_layers), &field("`num_layers` must be from 1 to 65536, got 0"));
    let too_many = SelectionCache::new(&Device::cpu(), &small_config(), 65537, 1);
    says(too_many, &argument("`num_layers` must be at most 65536, got 65537"));
    let text = format!("cpu: no memory for a tensor of {} bytes", usize::MAX);
    says(Tensor::zeros(DType::F32, [usize::MAX, 4]), &text);
}
