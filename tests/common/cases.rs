//! The golden files: inputs and float64 results written by `golden/generate.py`.

use std::collections::HashMap;
use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use tokenselect::{DType, HeadShape, Positions, Rope, SelectConfig, SelectionCacheConfig};

use super::problem::{Problem, Row};

/// One file.
pub struct Case {
    pub name: String,
    pub config: SelectConfig,
    meta: HashMap<String, String>,
    arrays: HashMap<String, Vec<f64>>,
}

/// The folder of golden files: `TOKENSELECT_GOLDEN`, or the one beside this file.
pub fn golden_dir() -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("TOKENSELECT_GOLDEN").map_or_else(own, PathBuf::from)
}

/// All golden files, sorted by name. A folder without any is an error, not an empty list.
pub fn golden_cases() -> Vec<Case> {
    let dir = golden_dir();
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("golden folder {}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    assert!(!paths.is_empty(), "no golden files in {}", dir.display());
    paths.iter().map(Case::load).collect()
}

impl Case {
    fn load(path: &PathBuf) -> Self {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let meta = header.metadata().clone().unwrap_or_else(|| panic!("{name}: no __metadata__"));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let arrays = file.iter().map(|(array, view)| (array.to_string(), decode(view.dtype(), view.data())));
        let arrays = arrays.collect();
        let config = config(&name, &meta);
        Case { name, config, meta, arrays }
    }

    /// An array of the file, if it has it.
    pub fn get(&self, array: &str) -> Option<&[f64]> {
        self.arrays.get(array).map(Vec::as_slice)
    }

    /// An array that the file must have.
    pub fn array(&self, array: &str) -> &[f64] {
        self.get(array).unwrap_or_else(|| panic!("{}: no array `{array}`", self.name))
    }

    /// An array of indices.
    pub fn indices(&self, array: &str) -> Vec<usize> {
        self.array(array).iter().map(|&x| x as usize).collect()
    }

    /// A number of the metadata, if it is there.
    pub fn find(&self, key: &str) -> Option<usize> {
        self.meta.get(key).map(|text| text.parse().unwrap_or_else(|e| panic!("{}: {key}: {e}", self.name)))
    }

    /// The one sequence of a case that is a single step.
    pub fn problem(&self) -> Problem {
        let need = |key: &str| self.find(key).unwrap_or_else(|| panic!("{}: no `{key}`", self.name));
        let array = |key: &str| self.array(key).to_vec();
        let row = Row { n: need("n"), t: need("t"), q: array("q"), k: array("k"), v: array("v") };
        Problem { config: self.config.clone(), rows: vec![row] }
    }
}

fn decode(dtype: Dtype, data: &[u8]) -> Vec<f64> {
    fn words<const N: usize>(data: &[u8], decode: fn([u8; N]) -> f64) -> Vec<f64> {
        data.chunks_exact(N).map(|word| decode(word.try_into().unwrap())).collect()
    }
    match dtype {
        Dtype::BF16 => words(data, |w| bf16::from_le_bytes(w).to_f64()),
        Dtype::F16 => words(data, |w| f16::from_le_bytes(w).to_f64()),
        Dtype::F32 => words(data, |w| f64::from(f32::from_le_bytes(w))),
        Dtype::F64 => words(data, f64::from_le_bytes),
        Dtype::I32 => words(data, |w| f64::from(i32::from_le_bytes(w))),
        Dtype::U8 => words(data, |[byte]: [u8; 1]| f64::from(byte)),
        other => panic!("golden array of type {other:?}"),
    }
}

fn config(name: &str, meta: &HashMap<String, String>) -> SelectConfig {
    let text =
        |key: &str| meta.get(key).unwrap_or_else(|| panic!("{name}: no `{key}` in the metadata")).as_str();
    let count = |key: &str| text(key).parse::<usize>().unwrap_or_else(|e| panic!("{name}: {key}: {e}"));
    let real = |key: &str| text(key).parse::<f64>().unwrap_or_else(|e| panic!("{name}: {key}: {e}"));
    SelectConfig {
        heads: HeadShape { num_qo_heads: count("hq"), num_kv_heads: count("hkv"), head_dim: count("d") },
        dtype: match text("dtype") {
            "BF16" => DType::Bf16,
            "F16" => DType::F16,
            "F32" => DType::F32,
            other => panic!("{name}: dtype {other}"),
        },
        n_init: count("n_init"),
        n_local: count("n_local"),
        top_k: count("top_k"),
        score_scale: Some(real("score_scale") as f32),
        sm_scale: Some(real("sm_scale") as f32),
        logits_soft_cap: Some(real("softcap") as f32).filter(|&cap| cap > 0.0),
        vote_pool_window: count("pool_window"),
        positions: match text("positions") {
            "native" => Positions::Native,
            "reassigned" => Positions::Reassigned(Rope { theta: real("theta"), ..Rope::default() }),
            other => panic!("{name}: positions {other}"),
        },
        selection_cache: meta.contains_key("similarity_threshold").then(|| SelectionCacheConfig {
            similarity_threshold: real("similarity_threshold") as f32,
            max_reuse: Some(count("max_reuse") as u32),
        }),
    }
}
