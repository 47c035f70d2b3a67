//! Configurations as plain structures.
//!
//! Each begins with its size, so that a later version of the library can tell which fields its caller knows.

use tokenselect::{
    CacheConfig, DType, HeadShape, KvLayout, Limits, Operations, Positions, Rope, RopePairing, RopeScaling,
    SelectConfig, SelectionCacheConfig,
};

use crate::sized;
use crate::status::{Failure, Result, fence, ts_status};

/// Element types.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_dtype {
    /// IEEE 754 half precision.
    F16 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE 754 single precision.
    F32 = 2,
    /// Unsigned 32-bit integer.
    U32 = 3,
    /// Unsigned 64-bit integer.
    U64 = 4,
    /// IEEE 754 double precision.
    F64 = 5,
}

/// Where tokens stand when they are compared.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_positions {
    /// Keys enter the cache already rotated by the model.
    Native = 0,
    /// Keys enter the cache before RoPE and are rotated at their rank in the selected list.
    Reassigned = 1,
}

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_rope_pairing {
    /// `i` with `i + rotary_dim / 2`: Llama and Qwen in the Hugging Face layout.
    HalfSplit = 0,
    /// `2 i` with `2 i + 1`: GPT-J, GLM.
    Interleaved = 1,
}

/// How frequencies are stretched for contexts beyond the training length.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_rope_scaling {
    /// Frequencies as trained.
    None = 0,
    /// Every frequency divided by `factor`.
    Linear = 1,
    /// Llama 3.1: uses `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position`.
    Llama3 = 2,
    /// YaRN: uses `factor`, `original_max_position`, `beta_fast`, `beta_slow`, `attention_factor`.
    Yarn = 3,
}

/// Order of the dimensions of a page.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_kv_layout {
    /// `[num_pages, page_size, num_kv_heads, head_dim]`.
    Nhd = 0,
    /// `[num_pages, num_kv_heads, page_size, head_dim]`.
    Hnd = 1,
}

/// Rotary embedding of the position mode `TS_POSITIONS_REASSIGNED`; not looked at otherwise.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_rope {
    /// Base of the frequencies, above 1. Default 10000.
    pub theta: f64,
    /// Leading elements of a head that are rotated, even; 0 for all. Default 0.
    pub rotary_dim: u32,
    /// A `ts_rope_pairing`. Default `TS_ROPE_PAIRING_HALF_SPLIT`.
    pub pairing: i32,
    /// A `ts_rope_scaling`, which says what fields below are used. Default `TS_ROPE_SCALING_NONE`.
    pub scaling: i32,
    /// 0.
    pub reserved: u32,
    /// Stretch, above 0. Default 1.
    pub factor: f64,
    /// Default 1.
    pub low_freq_factor: f64,
    /// Default 4.
    pub high_freq_factor: f64,
    /// Training context in tokens. Default 8192.
    pub original_max_position: f64,
    /// Default 32.
    pub beta_fast: f64,
    /// Default 1.
    pub beta_slow: f64,
    /// Factor on rotated queries and keys; NaN for `0.1 ln(factor) + 1`. Default NaN.
    pub attention_factor: f64,
}

/// Everything that decides what is selected and attended to. Filled by `ts_config_default`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_config {
    /// `sizeof(ts_config)`.
    pub struct_size: usize,
    /// Query (and output) heads, a multiple of `num_kv_heads`. Default 32.
    pub num_qo_heads: u32,
    /// Key/value heads. Default 8.
    pub num_kv_heads: u32,
    /// Elements of a head, a multiple of 8, at most 256. Default 128.
    pub head_dim: u32,
    /// Type of queries, keys and values, a `ts_dtype`: f16, bf16 or f32 (on a GPU f16 or bf16). Default
    /// `TS_DTYPE_BF16`.
    pub dtype: i32,
    /// The first `n_init` tokens of a sequence are always selected. Default 128.
    pub n_init: usize,
    /// The last `n_local` tokens before the current block are always selected. Default 512.
    pub n_local: usize,
    /// Tokens chosen by vote among the rest, at least 1. Default 2048.
    pub top_k: usize,
    /// Odd width of the max-pool over votes before the top-k; 1 for none. Default 1.
    pub vote_pool_window: usize,
    /// Factor on the scoring dot products; NaN for `1 / sqrt(head_dim)`. Default NaN.
    pub score_scale: f32,
    /// Factor on the attention logits; NaN for `1 / sqrt(head_dim)`. Default NaN.
    pub sm_scale: f32,
    /// `c` of the soft cap `c * tanh(logit / c)` in attention; 0 for none. Default 0.
    pub logits_soft_cap: f32,
    /// Position mode, a `ts_positions`. Default `TS_POSITIONS_NATIVE`.
    pub positions: i32,
    /// Rotary embedding for reassigned positions.
    pub rope: ts_rope,
    /// Whether selections may be used again between steps: 0 or 1. Default 1.
    pub selection_cache: i32,
    /// Smallest cosine of scoring queries for which a selection is used again, from -1 to 1. Default 0.9.
    pub similarity_threshold: f32,
    /// How often one selection may be used again; `UINT32_MAX` for `max(n_local, 1)`. Default `UINT32_MAX`.
    pub max_reuse: u32,
    /// 0.
    pub reserved: u32,
}

/// The operations that a context is made for, to be added up. A GPU has more kernels for some than for others: it
/// scores and attends for some head dimensions, and votes for any. `ts_merge` is always there.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum ts_operation {
    /// `ts_append`, `ts_cache_append`.
    Append = 1,
    /// `ts_pool`.
    Pool = 2,
    /// `ts_score`.
    Score = 4,
    /// `ts_vote`, `ts_top_k`, `ts_vote_top_k`.
    Vote = 8,
    /// `ts_attend`, `ts_attend_dense`, `ts_attend_to`.
    Attend = 16,
    /// All but attention, for engines that attend with kernels of their own: `ts_select` and `ts_append_select`, too.
    Selection = 15,
    /// All of them.
    All = 31,
}

/// What a context is made for: the largest batch that it will be given, and operations. Filled by `ts_limits_default`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_limits {
    /// `sizeof(ts_limits)`.
    pub struct_size: usize,
    /// Rows of a batch. Default 1.
    pub max_rows: usize,
    /// Query tokens of one row. Default 512.
    pub max_block_len: usize,
    /// Tokens cached by all rows of a batch together, every row rounded up to whole pages. Default 131072.
    pub max_kv_tokens: usize,
    /// A sum of `ts_operation`; 0 for all of them. What is left out answers `TS_STATUS_MISSING`. Default
    /// `TS_OPERATION_ALL`.
    pub operations: i32,
    /// 0.
    pub reserved: i32,
}

/// Size and layout of an owned cache. Filled by `ts_cache_config_default`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_cache_config {
    /// `sizeof(ts_cache_config)`.
    pub struct_size: usize,
    /// Layers of the model, each with keys and values of its own. Default 1.
    pub num_layers: usize,
    /// Pages of every layer. Default 1024.
    pub num_pages: usize,
    /// Tokens in a page, 1 to 256. Default 16.
    pub page_size: usize,
    /// Sequences that may be alive at once. Default 16.
    pub max_sequences: usize,
    /// Order of the dimensions of a page, a `ts_kv_layout`. Default `TS_KV_LAYOUT_NHD`.
    pub layout: i32,
    /// 0.
    pub reserved: i32,
}

/// Fills a configuration with defaults: 32 query heads and 8 KV heads of 128, bf16, 128 initial, 2048 chosen and 512
/// local tokens, native positions, Selection Cache on.
///
/// `struct_size` is `sizeof(ts_config)`; it is written to `config->struct_size`.
/// Errors: `TS_STATUS_STRUCT_SIZE` where it is less than that of the first version.
///
/// # Safety
/// - `config` is null or has room for `struct_size` bytes, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_config_default(config: *mut ts_config, struct_size: usize) -> ts_status {
    let default = SelectConfig::default();
    let rope = ts_rope {
        theta: Rope::default().theta,
        rotary_dim: 0,
        pairing: ts_rope_pairing::HalfSplit as i32,
        scaling: ts_rope_scaling::None as i32,
        reserved: 0,
        factor: 1.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: f64::NAN,
    };
    let value = ts_config {
        struct_size,
        num_qo_heads: default.heads.num_qo_heads as u32,
        num_kv_heads: default.heads.num_kv_heads as u32,
        head_dim: default.heads.head_dim as u32,
        dtype: ts_dtype::Bf16 as i32,
        n_init: default.n_init,
        n_local: default.n_local,
        top_k: default.top_k,
        vote_pool_window: default.vote_pool_window,
        score_scale: f32::NAN,
        sm_scale: f32::NAN,
        logits_soft_cap: 0.0,
        positions: ts_positions::Native as i32,
        rope,
        selection_cache: 1,
        similarity_threshold: SelectionCacheConfig::default().similarity_threshold,
        max_reuse: u32::MAX,
        reserved: 0,
    };
    // SAFETY: the caller's promise.
    fence(|| unsafe { sized::write(config, struct_size, value) })
}

/// Fills limits with defaults: 1 row, blocks of 512, 131072 tokens, all operations. `struct_size` is
/// `sizeof(ts_limits)`.
///
/// # Safety
/// - `limits` is null or has room for `struct_size` bytes, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_limits_default(limits: *mut ts_limits, struct_size: usize) -> ts_status {
    let Limits { max_rows, max_block_len, max_kv_tokens } = Limits::default();
    let operations = ts_operation::All as i32;
    let value = ts_limits { struct_size, max_rows, max_block_len, max_kv_tokens, operations, reserved: 0 };
    // SAFETY: the caller's promise.
    fence(|| unsafe { sized::write(limits, struct_size, value) })
}

/// Fills the configuration of an owned cache with defaults: 1 layer, 1024 pages of 16 tokens, 16 sequences, NHD.
/// `struct_size` is `sizeof(ts_cache_config)`.
///
/// # Safety
/// - `config` is null or has room for `struct_size` bytes, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_cache_config_default(
    config: *mut ts_cache_config,
    struct_size: usize,
) -> ts_status {
    let CacheConfig { num_layers, num_pages, page_size, max_sequences, .. } = CacheConfig::default();
    let layout = ts_kv_layout::Nhd as i32;
    let value =
        ts_cache_config { struct_size, num_layers, num_pages, page_size, max_sequences, layout, reserved: 0 };
    // SAFETY: the caller's promise.
    fence(|| unsafe { sized::write(config, struct_size, value) })
}

/// Checks every field of a configuration. Errors: `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`,
/// `TS_STATUS_STRUCT_SIZE`, naming the first field that breaks its rule.
///
/// # Safety
/// - `config` is null or holds `config->struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_config_validate(config: *const ts_config) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| Ok(unsafe { read_config(config)? }.validate()?))
}

/// The library's configuration.
///
/// # Safety
/// - As for [`sized::read`].
pub(crate) unsafe fn read_config(config: *const ts_config) -> Result<SelectConfig> {
    // SAFETY: the caller's promise.
    let given = unsafe { sized::read(config)? };
    expect_zero("config.reserved", given.reserved as i32)?;
    expect_zero("config.rope.reserved", given.rope.reserved as i32)?;
    let optional = |scale: f32| (!scale.is_nan()).then_some(scale);
    let positions = [(ts_positions::Native as i32, false), (ts_positions::Reassigned as i32, true)];
    let positions = if choose("config.positions", "a ts_positions", given.positions, &positions)? {
        Positions::Reassigned(rope(&given.rope)?)
    } else {
        Positions::Native
    };
    let cached = choose("config.selection_cache", "0 or 1", given.selection_cache, &[(0, false), (1, true)])?;
    Ok(SelectConfig {
        heads: HeadShape {
            num_qo_heads: given.num_qo_heads as usize,
            num_kv_heads: given.num_kv_heads as usize,
            head_dim: given.head_dim as usize,
        },
        dtype: dtype("config.dtype", given.dtype)?,
        n_init: given.n_init,
        n_local: given.n_local,
        top_k: given.top_k,
        score_scale: optional(given.score_scale),
        sm_scale: optional(given.sm_scale),
        logits_soft_cap: (given.logits_soft_cap != 0.0).then_some(given.logits_soft_cap),
        vote_pool_window: given.vote_pool_window,
        positions,
        selection_cache: cached.then_some(SelectionCacheConfig {
            similarity_threshold: given.similarity_threshold,
            max_reuse: (given.max_reuse != u32::MAX).then_some(given.max_reuse),
        }),
    })
}

fn rope(given: &ts_rope) -> Result<Rope> {
    let &ts_rope { factor, low_freq_factor, high_freq_factor, original_max_position, .. } = given;
    let llama3 = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position };
    let yarn = RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast: given.beta_fast,
        beta_slow: given.beta_slow,
        attention_factor: (!given.attention_factor.is_nan()).then_some(given.attention_factor),
    };
    let pairings = [
        (ts_rope_pairing::HalfSplit as i32, RopePairing::HalfSplit),
        (ts_rope_pairing::Interleaved as i32, RopePairing::Interleaved),
    ];
    let scalings = [
        (ts_rope_scaling::None as i32, RopeScaling::None),
        (ts_rope_scaling::Linear as i32, RopeScaling::Linear { factor }),
        (ts_rope_scaling::Llama3 as i32, llama3),
        (ts_rope_scaling::Yarn as i32, yarn),
    ];
    Ok(Rope {
        theta: given.theta,
        rotary_dim: (given.rotary_dim != 0).then_some(given.rotary_dim as usize),
        pairing: choose("config.rope.pairing", "a ts_rope_pairing", given.pairing, &pairings)?,
        scaling: choose("config.rope.scaling", "a ts_rope_scaling", given.scaling, &scalings)?,
    })
}

/// The library's limits, and the operations that are asked for.
///
/// # Safety
/// - As for [`sized::read`].
pub(crate) unsafe fn read_limits(limits: *const ts_limits) -> Result<(Limits, Operations)> {
    // SAFETY: the caller's promise.
    let given = unsafe { sized::read(limits)? };
    let ts_limits { max_rows, max_block_len, max_kv_tokens, operations, reserved, .. } = given;
    expect_zero("limits.reserved", reserved)?;
    let all = ts_operation::All as i32;
    if operations & !all != 0 {
        let (what, allowed) = ("limits.operations", "a sum of ts_operation");
        return Err(Failure::UnknownEnum { what, allowed, got: operations });
    }
    let has = |operation| operations == 0 || operations & operation as i32 != 0;
    let operations = Operations {
        append: has(ts_operation::Append),
        pool: has(ts_operation::Pool),
        score: has(ts_operation::Score),
        score_blocks: has(ts_operation::Score),
        vote: has(ts_operation::Vote),
        attend: has(ts_operation::Attend),
    };
    Ok((Limits { max_rows, max_block_len, max_kv_tokens }, operations))
}

/// The library's configuration of a cache.
///
/// # Safety
/// - As for [`sized::read`].
pub(crate) unsafe fn read_cache_config(config: *const ts_cache_config) -> Result<CacheConfig> {
    // SAFETY: the caller's promise.
    let given = unsafe { sized::read(config)? };
    expect_zero("cache_config.reserved", given.reserved)?;
    Ok(CacheConfig {
        num_layers: given.num_layers,
        num_pages: given.num_pages,
        page_size: given.page_size,
        max_sequences: given.max_sequences,
        layout: layout("cache_config.layout", given.layout)?,
    })
}

/// An element type from its number.
pub(crate) fn dtype(what: &'static str, code: i32) -> Result<DType> {
    let types = [DType::F16, DType::Bf16, DType::F32, DType::U32, DType::U64, DType::F64];
    choose(what, "a ts_dtype", code, &types.map(|dtype| (dtype_code(dtype), dtype)))
}

/// The number of an element type.
pub(crate) fn dtype_code(dtype: DType) -> i32 {
    let code = match dtype {
        DType::F16 => ts_dtype::F16,
        DType::Bf16 => ts_dtype::Bf16,
        DType::F32 => ts_dtype::F32,
        DType::U32 => ts_dtype::U32,
        DType::U64 => ts_dtype::U64,
        DType::F64 => ts_dtype::F64,
        _ => return -1, // none that this interface gives out
    };
    code as i32
}

/// A layout from its number.
pub(crate) fn layout(what: &'static str, code: i32) -> Result<KvLayout> {
    let layouts = [(ts_kv_layout::Nhd as i32, KvLayout::Nhd), (ts_kv_layout::Hnd as i32, KvLayout::Hnd)];
    choose(what, "a ts_kv_layout", code, &layouts)
}

/// Checks a field that means nothing yet.
pub(crate) fn expect_zero(what: &'static str, reserved: i32) -> Result<()> {
    choose(what, "0", reserved, &[(0, ())])
}

/// What a number stands for.
pub(crate) fn choose<T: Copy>(
    what: &'static str,
    allowed: &'static str,
    code: i32,
    choices: &[(i32, T)],
) -> Result<T> {
    let found = choices.iter().find(|(known, _)| *known == code);
    found.map(|(_, choice)| *choice).ok_or(Failure::UnknownEnum { what, allowed, got: code })
}
