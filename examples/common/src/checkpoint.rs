//! Tensors of a model folder: one safetensors file, or several with an index.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::config::MAX_SIZE;
use crate::error::{Error, Result};

/// The weights files of a folder, read but not yet parsed.
pub struct WeightFiles {
    folder: PathBuf,
    files: Vec<(PathBuf, Vec<u8>)>,
    /// Name of the file that an index gives for each tensor.
    index: BTreeMap<String, String>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Reads `model.safetensors` of `folder`, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Files that are missing or that lie elsewhere.
    pub fn read(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        let (paths, index) = if single.exists() {
            (vec![single], BTreeMap::new())
        } else if index.exists() {
            let map = read_index(&index)?;
            let names: BTreeSet<&String> = map.values().collect();
            (names.into_iter().map(|name| folder.join(name)).collect(), map)
        } else {
            return Err(Error::NoWeights { path: folder.to_owned() });
        };
        let read = |path: PathBuf| match fs::read(&path) {
            Ok(bytes) => Ok((path, bytes)),
            Err(source) => Err(Error::Read { path, source }),
        };
        let files = paths.into_iter().map(read).collect::<Result<_>>()?;
        Ok(WeightFiles { folder: folder.to_owned(), files, index })
    }

    /// Parses the headers.
    ///
    /// # Errors
    /// Damaged files, a tensor in two of them, and tensors that are not in the file that the index gives.
    pub fn parse(&self) -> Result<Checkpoint<'_>> {
        let mut files = Vec::new();
        let mut file_of = BTreeMap::new();
        for (path, bytes) in &self.files {
            let tensors = SafeTensors::deserialize(bytes)
                .map_err(|source| Error::Safetensors { path: path.clone(), source })?;
            for name in tensors.names() {
                if let Some(other) = file_of.insert(name.to_owned(), files.len()) {
                    let (path, other) = (path.clone(), self.files[other].0.clone());
                    return Err(Error::TensorTwice { path, name: name.to_owned(), other });
                }
            }
            files.push((path.as_path(), tensors));
        }
        for (name, file) in &self.index {
            let path = self.folder.join(file);
            if file_of.get(name).is_none_or(|&index| self.files[index].0 != path) {
                return Err(Error::MissingTensor { path, name: name.clone() });
            }
        }
        let unread = RefCell::new(file_of.keys().cloned().collect());
        Ok(Checkpoint { folder: &self.folder, files, file_of, unread })
    }
}

/// Reads an index, whose files must lie beside it: a name that leads elsewhere could read any file.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    for (tensor, file) in &index.weight_map {
        let mut parts = Path::new(file).components();
        let is_plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == file.as_str());
        if !is_plain {
            let (tensor, file) = (tensor.clone(), file.clone());
            return Err(Error::ShardName { path: path.to_owned(), tensor, file });
        }
    }
    Ok(index.weight_map)
}

/// The tensors of a folder, by name.
pub struct Checkpoint<'a> {
    folder: &'a Path,
    files: Vec<(&'a Path, SafeTensors<'a>)>,
    /// Index of each tensor's file.
    file_of: BTreeMap<String, usize>,
    /// Tensors that nothing has asked for.
    unread: RefCell<BTreeSet<String>>,
}

impl Checkpoint<'_> {
    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// A tensor as f32, outermost dimension first.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or of a type that is not read.
    pub fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Vec<f32>> {
        let found = self.file_of.get(name).and_then(|&index| {
            let (path, file) = &self.files[index];
            Some((path, file.tensor(name).ok()?))
        });
        let Some((path, tensor)) = found else {
            return Err(Error::MissingTensor { path: self.folder.to_owned(), name: name.to_owned() });
        };
        self.unread.borrow_mut().remove(name);
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

    /// Layers that the names speak of, `model.layers.N.…`: one more than the largest `N` that a model can have. A tensor of a
    /// larger one is no part of any.
    pub fn num_layers(&self) -> usize {
        let layer = |name: &String| {
            let number = name.strip_prefix("model.layers.")?.split('.').next()?;
            number.parse().ok().filter(|&layer: &usize| layer < MAX_SIZE)
        };
        self.file_of.keys().filter_map(layer).max().map_or(0, |last| last + 1)
    }

    /// The end of reading: a tensor that nothing has asked for is a part of the model that is not implemented.
    ///
    /// # Errors
    /// [`Error::UnreadTensors`].
    pub fn finish(self) -> Result<()> {
        // Old checkpoints hold the frequencies of RoPE, which follow from the configuration.
        let is_part = |name: &String| !name.ends_with(".rotary_emb.inv_freq");
        let unread: Vec<String> = self.unread.into_inner().into_iter().filter(is_part).collect();
        match unread.first() {
            Some(first) => {
                let path = self.files[self.file_of[first]].0.to_owned();
                Err(Error::UnreadTensors { path, first: first.clone(), count: unread.len() })
            }
            None => Ok(()),
        }
    }
}

/// Converts elements of `SIZE` bytes. The length is a multiple of `SIZE`: the header was checked against it.
fn elements<const SIZE: usize>(bytes: &[u8], convert: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<SIZE>().0.iter().map(|&element| convert(element)).collect()
}
