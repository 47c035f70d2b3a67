//! What is computed, and how large a step may be.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use tokenselect::{
    HeadShape, Limits, Operations, Positions, Rope, RopePairing, RopeScaling, SelectConfig,
    SelectionCacheConfig,
};

use crate::errors::{Failure, Kind, Result, fence};
use crate::numbers::{choose, dtype, optional_real, optional_whole, real, switch, type_name, whole};

/// What is computed. Every argument is a keyword and has a default; a rule that is broken is a `ValueError` that names it.
///
/// - `num_qo_heads`, `num_kv_heads`, `head_dim`: query heads, a multiple of the key/value heads, and elements of a head, a
///   multiple of 8 up to 256.
/// - `dtype`: of queries, keys and values: `"f16"`, `"bf16"`, `"f32"`, a `torch.dtype` or a `numpy.dtype`.
/// - `n_init`, `top_k`, `n_local`: first tokens, tokens chosen by vote, and last tokens before the block.
/// - `vote_pool_window`: odd width of the max-pool over votes; 1 for none.
/// - `score_scale`, `sm_scale`: factors on the dot products of scoring and of attention; None for `1 / sqrt(head_dim)`.
/// - `logits_soft_cap`: `c` of `c * tanh(logit / c)` in attention; None for none.
/// - `positions`: `"native"`, where keys enter the cache rotated by the model, or `"reassigned"`, where they enter it before
///   RoPE and are rotated at their rank in the selected list, by `rope`: a dict of `theta`, `rotary_dim`, `pairing`
///   (`"half_split"`, `"interleaved"`), `scaling` (`"none"`, `"linear"`, `"llama3"`, `"yarn"`), `factor`,
///   `low_freq_factor`, `high_freq_factor`, `original_max_position`, `beta_fast`, `beta_slow` and `attention_factor`.
/// - `selection_cache`: whether selections may be used again between steps, while the cosine of the scoring queries is at
///   least `similarity_threshold`, and up to `max_reuse` times; None for `max(n_local, 1)`.
#[pyclass(frozen, eq, module = "tokenselect")]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    inner: SelectConfig,
}

impl Config {
    /// The library's configuration.
    pub fn inner(&self) -> &SelectConfig {
        &self.inner
    }
}

/// Fields of [`Config`] by name; what is not given has the library's default.
fn set(config: &mut SelectConfig, fields: &Bound<'_, PyDict>) -> Result<()> {
    let mut rope = Rope::default();
    let mut is_reassigned = false;
    let mut reuse = SelectionCacheConfig::default();
    let mut caches = true;
    for (name, value) in fields {
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = &mut config.heads;
        match &*name.cast::<PyString>().map_err(PyErr::from)?.to_cow()? {
            "num_qo_heads" => *num_qo_heads = whole("num_qo_heads", &value)?,
            "num_kv_heads" => *num_kv_heads = whole("num_kv_heads", &value)?,
            "head_dim" => *head_dim = whole("head_dim", &value)?,
            "dtype" => config.dtype = dtype("dtype", &value)?,
            "n_init" => config.n_init = whole("n_init", &value)?,
            "n_local" => config.n_local = whole("n_local", &value)?,
            "top_k" => config.top_k = whole("top_k", &value)?,
            "vote_pool_window" => config.vote_pool_window = whole("vote_pool_window", &value)?,
            "score_scale" => config.score_scale = optional_f32("score_scale", &value)?,
            "sm_scale" => config.sm_scale = optional_f32("sm_scale", &value)?,
            "logits_soft_cap" => {
                config.logits_soft_cap = optional_f32("logits_soft_cap", &value)?.filter(|&cap| cap != 0.0);
            }
            "positions" => {
                is_reassigned = choose("positions", &value, &[("native", false), ("reassigned", true)])?;
            }
            "rope" => rope = read_rope(&value)?,
            "selection_cache" => caches = switch("selection_cache", &value)?,
            "similarity_threshold" => {
                reuse.similarity_threshold = real("similarity_threshold", &value)? as f32;
            }
            "max_reuse" => reuse.max_reuse = max_reuse(&value)?,
            other => {
                let text = format!("Config() got an unexpected keyword argument '{other}'");
                let (kind, status) = (Kind::ArgumentType, "TS_STATUS_CONFIG");
                return Err(Failure::Rule { kind, status, text });
            }
        }
    }
    config.positions = if is_reassigned { Positions::Reassigned(rope) } else { Positions::Native };
    config.selection_cache = caches.then_some(reuse);
    Ok(())
}

fn optional_f32(what: &str, value: &Bound<'_, PyAny>) -> Result<Option<f32>> {
    Ok(optional_real(what, Some(value))?.map(|number| number as f32))
}

fn max_reuse(value: &Bound<'_, PyAny>) -> Result<Option<u32>> {
    let Some(number) = optional_whole("max_reuse", Some(value))? else { return Ok(None) };
    let most = u32::MAX;
    u32::try_from(number)
        .map(Some)
        .map_err(|_| Failure::argument("max_reuse", format!("be from 0 to {most}"), number))
}

fn read_rope(given: &Bound<'_, PyAny>) -> Result<Rope> {
    if given.is_none() {
        return Ok(Rope::default());
    }
    let Ok(fields) = given.cast::<PyDict>() else {
        return Err(Failure::of_type("rope", "a dict", type_name(given)));
    };
    let pairings = [("half_split", RopePairing::HalfSplit), ("interleaved", RopePairing::Interleaved)];
    let scalings = [("none", 0), ("linear", 1), ("llama3", 2), ("yarn", 3)];
    let (mut rope, mut scaling) = (Rope::default(), 0);
    let (mut factor, mut low, mut high, mut original_max_position) = (1.0, 1.0, 4.0, 8192.0);
    let (mut beta_fast, mut beta_slow, mut attention_factor) = (32.0, 1.0, None);
    for (name, value) in fields {
        match &*name.cast::<PyString>().map_err(PyErr::from)?.to_cow()? {
            "theta" => rope.theta = real("rope.theta", &value)?,
            "rotary_dim" => {
                rope.rotary_dim = optional_whole("rope.rotary_dim", Some(&value))?.filter(|&dim| dim != 0);
            }
            "pairing" => rope.pairing = choose("rope.pairing", &value, &pairings)?,
            "scaling" => scaling = choose("rope.scaling", &value, &scalings)?,
            "factor" => factor = real("rope.factor", &value)?,
            "low_freq_factor" => low = real("rope.low_freq_factor", &value)?,
            "high_freq_factor" => high = real("rope.high_freq_factor", &value)?,
            "original_max_position" => original_max_position = real("rope.original_max_position", &value)?,
            "beta_fast" => beta_fast = real("rope.beta_fast", &value)?,
            "beta_slow" => beta_slow = real("rope.beta_slow", &value)?,
            "attention_factor" => attention_factor = optional_real("rope.attention_factor", Some(&value))?,
            other => {
                let text = format!("`rope` has no field `{other}`");
                let (kind, status) = (Kind::ArgumentType, "TS_STATUS_CONFIG");
                return Err(Failure::Rule { kind, status, text });
            }
        }
    }
    rope.scaling = match scaling {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor },
        2 => RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position,
        },
        _ => RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor },
    };
    Ok(rope)
}

#[pymethods]
impl Config {
    #[new]
    #[pyo3(
        signature = (*args, **fields),
        text_signature = "(*, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype='bf16', n_init=128, n_local=512, \
                          top_k=2048, vote_pool_window=1, score_scale=None, sm_scale=None, logits_soft_cap=None, \
                          positions='native', rope=None, selection_cache=True, similarity_threshold=0.9, max_reuse=None)"
    )]
    fn make(py: Python<'_>, args: &Bound<'_, PyTuple>, fields: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        fence(py, || {
            if !args.is_empty() {
                let got = args.len();
                let text = format!(
                    "`Config` takes keywords alone, such as `num_qo_heads=32`, got {got} arguments without one"
                );
                let (kind, status) = (Kind::ArgumentType, "TS_STATUS_CONFIG");
                return Err(Failure::Rule { kind, status, text });
            }
            let mut inner = SelectConfig::default();
            if let Some(fields) = fields {
                set(&mut inner, fields)?;
            }
            inner.validate()?;
            Ok(Config { inner })
        })
    }

    /// Query (and output) heads.
    #[getter]
    fn num_qo_heads(&self) -> usize {
        self.inner.heads.num_qo_heads
    }

    /// Key/value heads.
    #[getter]
    fn num_kv_heads(&self) -> usize {
        self.inner.heads.num_kv_heads
    }

    /// Elements of a head.
    #[getter]
    fn head_dim(&self) -> usize {
        self.inner.heads.head_dim
    }

    /// Type of queries, keys and values: `f16`, `bf16` or `f32`.
    #[getter(dtype)]
    fn dtype_name(&self) -> String {
        self.inner.dtype.to_string()
    }

    /// First tokens of a sequence that are always selected.
    #[getter]
    fn n_init(&self) -> usize {
        self.inner.n_init
    }

    /// Last tokens before the block that are always selected.
    #[getter]
    fn n_local(&self) -> usize {
        self.inner.n_local
    }

    /// Tokens chosen by vote.
    #[getter]
    fn top_k(&self) -> usize {
        self.inner.top_k
    }

    /// Odd width of the max-pool over votes.
    #[getter]
    fn vote_pool_window(&self) -> usize {
        self.inner.vote_pool_window
    }

    /// Factor on the scoring dot products; None for `1 / sqrt(head_dim)`.
    #[getter]
    fn score_scale(&self) -> Option<f32> {
        self.inner.score_scale
    }

    /// Factor on the attention logits; None for `1 / sqrt(head_dim)`.
    #[getter]
    fn sm_scale(&self) -> Option<f32> {
        self.inner.sm_scale
    }

    /// Soft cap of the attention logits.
    #[getter]
    fn logits_soft_cap(&self) -> Option<f32> {
        self.inner.logits_soft_cap
    }

    /// `native` or `reassigned`.
    #[getter]
    fn positions(&self) -> &'static str {
        if matches!(self.inner.positions, Positions::Native) { "native" } else { "reassigned" }
    }

    /// Whether selections may be used again.
    #[getter]
    fn selection_cache(&self) -> bool {
        self.inner.selection_cache.is_some()
    }

    /// Smallest cosine for which a selection is used again; None without a Selection Cache.
    #[getter]
    fn similarity_threshold(&self) -> Option<f32> {
        self.inner.selection_cache.map(|cache| cache.similarity_threshold)
    }

    /// How often one selection may be used again; None for `max(n_local, 1)`.
    #[getter(max_reuse)]
    fn reuse_limit(&self) -> Option<u32> {
        self.inner.selection_cache.and_then(|cache| cache.max_reuse)
    }

    /// What makes an equal one. All fields, but those of a Selection Cache only where there is one.
    fn __repr__(&self) -> String {
        let SelectConfig { heads, dtype, n_init, n_local, top_k, vote_pool_window, .. } = &self.inner;
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = heads;
        let mut text = format!(
            "Config(num_qo_heads={num_qo_heads}, num_kv_heads={num_kv_heads}, head_dim={head_dim}, dtype='{dtype}', \
             n_init={n_init}, n_local={n_local}, top_k={top_k}, vote_pool_window={vote_pool_window}, score_scale={}, \
             sm_scale={}, logits_soft_cap={}, positions='{}'",
            or_none(self.inner.score_scale),
            or_none(self.inner.sm_scale),
            or_none(self.inner.logits_soft_cap),
            self.positions(),
        );
        if let Positions::Reassigned(rope) = &self.inner.positions {
            text += &format!(", rope={}", rope_text(rope));
        }
        match self.inner.selection_cache {
            None => text += ", selection_cache=False)",
            Some(SelectionCacheConfig { similarity_threshold, max_reuse }) => {
                let max_reuse = or_none(max_reuse);
                text += &format!(
                    ", selection_cache=True, similarity_threshold={similarity_threshold:?}, max_reuse={max_reuse})"
                );
            }
        }
        text
    }
}

/// A number as Python writes it.
fn or_none<T: std::fmt::Debug>(number: Option<T>) -> String {
    number.map_or_else(|| "None".to_owned(), |number| format!("{number:?}"))
}

/// The dict that makes an equal one.
fn rope_text(rope: &Rope) -> String {
    let Rope { theta, rotary_dim, pairing, scaling } = rope;
    let pairing = match pairing {
        RopePairing::HalfSplit => "half_split",
        RopePairing::Interleaved => "interleaved",
    };
    let scaling = match scaling {
        RopeScaling::None => "'scaling': 'none'".to_owned(),
        RopeScaling::Linear { factor } => format!("'scaling': 'linear', 'factor': {factor:?}"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => format!(
            "'scaling': 'llama3', 'factor': {factor:?}, 'low_freq_factor': {low_freq_factor:?}, \
             'high_freq_factor': {high_freq_factor:?}, 'original_max_position': {original_max_position:?}"
        ),
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
            format!(
                "'scaling': 'yarn', 'factor': {factor:?}, 'original_max_position': {original_max_position:?}, \
             'beta_fast': {beta_fast:?}, 'beta_slow': {beta_slow:?}, 'attention_factor': {}",
                or_none(*attention_factor)
            )
        }
    };
    let rotary_dim = or_none(*rotary_dim);
    format!("{{'theta': {theta:?}, 'rotary_dim': {rotary_dim}, 'pairing': '{pairing}', {scaling}}}")
}

/// Limits, `max_rows`, `max_block_len` and `max_kv_tokens`, and the operations that are asked for.
pub(crate) fn plan_limits(
    given: [Option<&Bound<'_, PyAny>>; 3],
    operations: Option<&Bound<'_, PyAny>>,
) -> Result<(Limits, Operations)> {
    let mut limits = Limits::default();
    let names = ["max_rows", "max_block_len", "max_kv_tokens"];
    let fields = [&mut limits.max_rows, &mut limits.max_block_len, &mut limits.max_kv_tokens];
    for ((field, what), value) in fields.into_iter().zip(names).zip(given) {
        if let Some(number) = optional_whole(what, value)? {
            *field = number;
        }
    }
    let Some(given) = operations.filter(|given| !given.is_none()) else {
        return Ok((limits, Operations::ALL));
    };
    let known = ["append", "pool", "score", "vote", "attend"];
    let rule = || format!("be some of {}", known.join(", "));
    if given.is_instance_of::<PyString>() {
        return Err(Failure::argument("operations", rule(), format!("the text {given}")));
    }
    let mut has = [false; 5];
    let mut unknown = Vec::new();
    for (count, name) in given.try_iter()?.enumerate() {
        if count == known.len() {
            return Err(Failure::argument("operations", rule(), "more"));
        }
        let name = name?.str()?.to_string();
        match known.iter().position(|known| *known == name) {
            Some(place) => has[place] = true,
            None => unknown.push(name),
        }
    }
    if !unknown.is_empty() || !has.contains(&true) {
        let got = if unknown.is_empty() { "none".to_owned() } else { unknown.join(", ") };
        return Err(Failure::argument("operations", rule(), got));
    }
    let [append, pool, score, vote, attend] = has;
    Ok((limits, Operations { append, pool, score, score_blocks: score, vote, attend }))
}
