//! Tensors of a model folder: one safetensors file, or several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::{Error, Result};

/// The weights files of a folder, read but not yet parsed.
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<(PathBuf, Vec<u8>)>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Reads `model.safetensors` of `folder`, or the files that `model.safetensors.index.json` names.
    pub fn read(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        let paths = if single.exists() {
            vec![single]
        } else if index.exists() {
            let bytes = fs::read(&index).map_err(Error::read(&index))?;
            let index: Index =
                serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: index, source })?;
            let names: BTreeSet<String> = index.weight_map.into_values().collect();
            names.into_iter().map(|name| folder.join(name)).collect()
        } else {
            return Err(Error::NoWeights { path: folder.to_owned() });
        };
        let read = |path: PathBuf| match fs::read(&path) {
            Ok(bytes) => Ok((path, bytes)),
            Err(source) => Err(Error::Read { path, source }),
        };
        let files = paths.into_iter().map(read).collect::<Result<_>>()?;
        Ok(WeightFiles { folder: folder.to_owned(), files })
    }

    /// Parses the headers.
    pub fn parse(&self) -> Result<Checkpoint<'_>> {
        let mut files = Vec::new();
        for (path, bytes) in &self.files {
            let tensors = SafeTensors::deserialize(bytes)
                .map_err(|source| Error::Safetensors { path: path.clone(), source })?;
            files.push((path.as_path(), tensors));
        }
        Ok(Checkpoint { folder: &self.folder, files })
    }
}

/// The tensors of a folder, by name.
pub struct Checkpoint<'a> {
    folder: &'a Path,
    files: Vec<(&'a Path, SafeTensors<'a>)>,
}

impl Checkpoint<'_> {
    /// A tensor as f32, outermost dimension first.
    pub fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Vec<f32>> {
        let found = self.files.iter().find_map(|(path, file)| Some((path, file.tensor(name).ok()?)));
        let Some((path, tensor)) = found else {
            return Err(Error::MissingTensor { path: self.folder.to_owned(), name: name.to_owned() });
        };
        let (path, name) = (path.to_path_buf(), name.to_owned());
        if tensor.shape() != shape {
            let got = tensor.shape().to_vec();
            return Err(Error::TensorShape { path, name, expected: shape.to_vec(), got });
        }
        let bytes = tensor.data();
        match tensor.dtype() {
            Dtype::BF16 => Ok(elements(bytes, |pair| bf16::from_le_bytes(pair).to_f32())),
            Dtype::F16 => Ok(elements(bytes, |pair| f16::from_le_bytes(pair).to_f32())),
            Dtype::F32 => Ok(elements(bytes, f32::from_le_bytes)),
            got => Err(Error::TensorDType { path, name, got }),
        }
    }
}

/// Converts elements of `SIZE` bytes. The length is a multiple of `SIZE`: the header was checked against it.
fn elements<const SIZE: usize>(bytes: &[u8], convert: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<SIZE>().0.iter().map(|&element| convert(element)).collect()
}
