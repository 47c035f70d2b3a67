//! Model folders for the tests: random weights, a few thousand of them, in any of the ways that a folder may
//! be written.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

pub const VOCAB: usize = 256;
pub const HIDDEN: usize = 16;
pub const INTERMEDIATE: usize = 24;
pub const LAYERS: usize = 2;
pub const QO_HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const EPSILON: f64 = 1e-5;
pub const THETA: f64 = 10_000.0;

/// A model before it is written: change what a test is about, then call [`save`](Self::save).
pub struct TinyModel {
    pub config: Value,
    /// Shape and elements by name.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Type that the elements are written in.
    pub dtype: Dtype,
}

impl TinyModel {
    /// A model with every bias and with an output projection of its own, in f32.
    pub fn new() -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": QO_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": EPSILON,
            "rope_theta": THETA,
            "max_position_embeddings": 64,
            "hidden_act": "silu",
            "attention_bias": true,
            "mlp_bias": true,
            "tie_word_embeddings": false,
            "torch_dtype": "float32",
        });
        let mut model = TinyModel { config, tensors: BTreeMap::new(), dtype: Dtype::F32 };
        model.add("model.embed_tokens.weight", &[VOCAB, HIDDEN], 1.0);
        model.add("model.norm.weight", &[HIDDEN], 1.0);
        model.add("lm_head.weight", &[VOCAB, HIDDEN], 0.5);
        let (q, kv) = (QO_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for layer in 0..LAYERS {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                model.add(&format!("model.layers.{layer}.{norm}.weight"), &[HIDDEN], 1.0);
            }
            // Large queries and keys: attention to few tokens, so that positions matter.
            for (name, outputs, inputs, scale) in [
                ("self_attn.q_proj", q, HIDDEN, 2.0),
                ("self_attn.k_proj", kv, HIDDEN, 2.0),
                ("self_attn.v_proj", kv, HIDDEN, 0.5),
                ("self_attn.o_proj", HIDDEN, q, 0.5),
                ("mlp.gate_proj", INTERMEDIATE, HIDDEN, 0.5),
                ("mlp.up_proj", INTERMEDIATE, HIDDEN, 0.5),
                ("mlp.down_proj", HIDDEN, INTERMEDIATE, 0.5),
            ] {
                model.add(&format!("model.layers.{layer}.{name}.weight"), &[outputs, inputs], scale);
                model.add(&format!("model.layers.{layer}.{name}.bias"), &[outputs], 0.5);
            }
        }
        model
    }

    /// Adds a tensor of numbers from `-scale` to `scale`, all multiples of 1/64, which every type can hold.
    fn add(&mut self, name: &str, shape: &[usize], scale: f32) {
        let mut state =
            name.bytes().fold(1u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32;
            ((2.0 * unit - 1.0) * scale * 64.0).round() / 64.0
        };
        let elements = (0..shape.iter().product()).map(|_| draw()).collect();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), elements));
    }

    /// Sets a field of `config.json`; `null` removes it.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        if let Some(fields) = self.config.as_object_mut() {
            fields.insert(field.to_owned(), value);
        }
        self
    }

    /// Elements of a tensor.
    pub fn elements(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    /// Writes a folder with one weights file.
    pub fn save(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        self.save_config(folder.path());
        self.save_weights(&folder.path().join("model.safetensors"), |_| true);
        folder
    }

    /// Writes a folder with two weights files and an index.
    pub fn save_in_two(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        self.save_config(folder.path());
        let file = |second: bool| format!("model-0000{}-of-00002.safetensors", 1 + usize::from(second));
        let is_second = |name: &str| name.contains("layers.1.");
        for second in [false, true] {
            self.save_weights(&folder.path().join(file(second)), |name| is_second(name) == second);
        }
        let map: BTreeMap<&str, String> =
            self.tensors.keys().map(|name| (name.as_str(), file(is_second(name)))).collect();
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(folder.path().join("model.safetensors.index.json"), index).expect("index written");
        folder
    }

    fn save_config(&self, folder: &Path) {
        fs::write(config_file(folder), self.config.to_string()).expect("config written");
    }

    fn save_weights(&self, path: &Path, belongs: impl Fn(&str) -> bool) {
        let bytes: Vec<(&str, &[usize], Vec<u8>)> = self
            .tensors
            .iter()
            .filter(|(name, _)| belongs(name))
            .map(|(name, (shape, elements))| (name.as_str(), shape.as_slice(), self.encode(elements)))
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (*name, TensorView::new(self.dtype, shape.to_vec(), bytes).expect("bytes of the shape"))
        });
        safetensors::serialize_to_file(views, None, path).expect("weights written");
    }

    fn encode(&self, elements: &[f32]) -> Vec<u8> {
        let encode = |&x: &f32| match self.dtype {
            Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::I32 => (x as i32).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        elements.iter().flat_map(encode).collect()
    }
}

/// Path of `config.json` in a folder.
pub fn config_file(folder: &Path) -> PathBuf {
    folder.join("config.json")
}
