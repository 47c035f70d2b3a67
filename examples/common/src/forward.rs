//! The forward pass of a model over the next tokens of a sequence: all but attention, on the processor.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tokenselect::{DType, Device, StepInput, StepOutput, Tensor, TensorView, TensorViewMut};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::{Layer, Model};
use crate::ops::{rms_norm, rms_norm_heads, swiglu};

/// Runs a model over parts of a text. What is remembered of the parts before is the caller's: its attention has the cache.
pub struct Forward<'a> {
    model: &'a Model,
    device: Device,
    buffers: Buffers,
    operands: Operands,
}

/// Attention of one layer, by its index: appends the keys and values of the input, and writes the output.
pub type Attend<'a> = dyn FnMut(usize, StepInput<'_>, StepOutput<'_>) -> Result<()> + 'a;

/// Activations of some tokens, all `[tokens, ...]` and as large as what was read last.
#[derive(Default)]
struct Buffers {
    /// Residual stream, `hidden_size` wide.
    x: Vec<f32>,
    /// After a norm, `hidden_size` wide.
    normed: Vec<f32>,
    /// Queries, then the output of attention, `num_qo_heads * head_dim` wide.
    q: Vec<f32>,
    /// Keys before RoPE, `num_kv_heads * head_dim` wide.
    k: Vec<f32>,
    /// Values, `num_kv_heads * head_dim` wide.
    v: Vec<f32>,
    /// Gate of the feed-forward part, `intermediate_size` wide.
    gate: Vec<f32>,
    /// What is gated, `intermediate_size` wide.
    up: Vec<f32>,
    /// Logits of some tokens, `vocab_size` wide.
    logits: Vec<f32>,
}

/// Logits that are computed together: those of all tokens of a part would take more memory than the rest of the pass where the
/// vocabulary is large.
const LOGITS: usize = 1 << 23;

/// What attention reads and writes, where the device works. Made for a number of tokens, and kept while that stays.
struct Operands {
    tokens: usize,
    /// `[tokens, num_qo_heads, head_dim]`, the type of the cache.
    q: Tensor,
    /// `[tokens, num_kv_heads, head_dim]`, the type of the cache.
    k: Tensor,
    /// As `k`.
    v: Tensor,
    /// `[tokens, num_qo_heads, head_dim]` f32.
    out: Tensor,
}

impl<'a> Forward<'a> {
    /// A pass whose attention runs on `device`.
    ///
    /// # Errors
    /// [`Error::Library`](crate::error::Error::Library) where the device has no memory.
    pub fn new(model: &'a Model, device: &Device) -> Result<Self> {
        let operands = Operands::new(device, &model.config, 0)?;
        Ok(Forward { model, device: device.clone(), buffers: Buffers::default(), operands })
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Reads `tokens`. `attend` is called for one layer after the other, with queries and keys before RoPE.
    ///
    /// # Errors
    /// Those of `attend`; [`Error::Token`](crate::error::Error::Token);
    /// [`Error::Library`](crate::error::Error::Library) where the device fails.
    pub fn run(&mut self, tokens: &[u32], attend: &mut Attend<'_>) -> Result<()> {
        let model = self.model;
        let epsilon = model.config.norm_epsilon;
        self.buffers.resize(model, tokens.len());
        model.embed(tokens, &mut self.buffers.x)?;
        for (index, layer) in model.layers.iter().enumerate() {
            let b = &mut self.buffers;
            rms_norm(&b.x, &layer.attention_norm, epsilon, &mut b.normed);
            self.attention(tokens.len(), index, layer, attend)?;
            let b = &mut self.buffers;
            layer.o.add(&b.q, &mut b.x);
            rms_norm(&b.x, &layer.mlp_norm, epsilon, &mut b.normed);
            layer.gate.apply(&b.normed, &mut b.gate);
            layer.up.apply(&b.normed, &mut b.up);
            swiglu(&b.gate, &mut b.up);
            layer.down.add(&b.up, &mut b.x);
        }
        let b = &mut self.buffers;
        rms_norm(&b.x, &model.final_norm, epsilon, &mut b.normed);
        Ok(())
    }

    /// The predictions after each of the tokens that were read last, some tokens at a time: `each` is given logits,
    /// `[some, vocab_size]`.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn predictions(&mut self, each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let Buffers { normed, logits, .. } = &mut self.buffers;
        let config = &self.model.config;
        let rows = (LOGITS / config.vocab_size).max(1);
        for normed in normed.chunks(rows * config.hidden_size) {
            logits.resize(normed.len() / config.hidden_size * config.vocab_size, 0.0);
            self.model.output.apply(normed, logits);
            each(logits)?;
        }
        Ok(())
    }

    /// The prediction after the last token: `[vocab_size]`. Nothing was read: an empty slice.
    pub fn last_prediction(&mut self) -> &[f32] {
        let Buffers { normed, logits, .. } = &mut self.buffers;
        let config = &self.model.config;
        let last = &normed[normed.len().saturating_sub(config.hidden_size)..];
        logits.resize(if last.is_empty() { 0 } else { config.vocab_size }, 0.0);
        self.model.output.apply(last, logits);
        logits
    }

    /// Queries, keys and values of the normed stream, then attention; its output replaces the queries.
    fn attention(
        &mut self,
        tokens: usize,
        index: usize,
        layer: &Layer,
        attend: &mut Attend<'_>,
    ) -> Result<()> {
        let b = &mut self.buffers;
        layer.q.apply(&b.normed, &mut b.q);
        layer.k.apply(&b.normed, &mut b.k);
        layer.v.apply(&b.normed, &mut b.v);
        if let Some([q_norm, k_norm]) = &layer.head_norms {
            rms_norm_heads(&mut b.q, q_norm, self.model.config.norm_epsilon);
            rms_norm_heads(&mut b.k, k_norm, self.model.config.norm_epsilon);
        }
        if self.operands.tokens != tokens {
            self.operands = Operands::new(&self.device, &self.model.config, tokens)?;
        }
        let Operands { q, k, v, out, .. } = &mut self.operands;
        copy_rounded(&b.q, q)?;
        copy_rounded(&b.k, k)?;
        copy_rounded(&b.v, v)?;
        let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
        attend(index, input, StepOutput { out: out.view_mut(), lse: None })?;
        TensorViewMut::new(&mut b.q, out.shape())?.copy_from(out.view())?;
        Ok(())
    }
}

impl Operands {
    fn new(device: &Device, config: &ModelConfig, tokens: usize) -> Result<Self> {
        let heads = config.heads;
        let zeros = |dtype, num_heads| Tensor::zeros_on(device, dtype, [tokens, num_heads, heads.head_dim]);
        Ok(Operands {
            tokens,
            q: zeros(config.dtype, heads.num_qo_heads)?,
            k: zeros(config.dtype, heads.num_kv_heads)?,
            v: zeros(config.dtype, heads.num_kv_heads)?,
            out: zeros(DType::F32, heads.num_qo_heads)?,
        })
    }
}

impl Buffers {
    fn resize(&mut self, model: &Model, tokens: usize) {
        let config = &model.config;
        let q_width = config.heads.num_qo_heads * config.heads.head_dim;
        let kv_width = config.heads.num_kv_heads * config.heads.head_dim;
        self.x.resize(tokens * config.hidden_size, 0.0);
        self.normed.resize(tokens * config.hidden_size, 0.0);
        self.q.resize(tokens * q_width, 0.0);
        self.k.resize(tokens * kv_width, 0.0);
        self.v.resize(tokens * kv_width, 0.0);
        self.gate.resize(tokens * config.intermediate_size, 0.0);
        self.up.resize(tokens * config.intermediate_size, 0.0);
    }
}

/// Copies `data` to where `to` lies, rounded to its type.
fn copy_rounded(data: &[f32], to: &mut Tensor) -> tokenselect::Result<()> {
    let shape = to.shape();
    match to.dtype() {
        DType::F16 => {
            let mut rounded = vec![f16::ZERO; data.len()];
            rounded.convert_from_f32_slice(data);
            to.copy_from(TensorView::new(&rounded, shape)?)
        }
        DType::Bf16 => {
            let mut rounded = vec![bf16::ZERO; data.len()];
            rounded.convert_from_f32_slice(data);
            to.copy_from(TensorView::new(&rounded, shape)?)
        }
        _ => to.copy_from(TensorView::new(data, shape)?),
    }
}
