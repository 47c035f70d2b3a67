//! Model folders of the examples: a damaged one is refused with an error.
//!
//! Input: two bytes with the length of `config.json` (little endian), that file, and the weights file.
#![no_main]

use std::fs;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tokenselect::{Positions, SelectConfig};
use tokenselect_examples::model::Model;

fuzz_target!(|data: &[u8]| {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path();
    let Some((len, files)) = data.split_first_chunk::<2>() else { return };
    let (config, weights) = files.split_at(files.len().min(usize::from(u16::from_le_bytes(*len))));
    fs::write(folder.join("config.json"), config).expect("a file of the temporary folder");
    fs::write(folder.join("model.safetensors"), weights).expect("a file of the temporary folder");
    match Model::load(folder) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(model) => {
            let config = model.config;
            assert_eq!(model.embedding.len(), config.vocab_size * config.hidden_size);
            assert_eq!(model.layers.len(), config.num_layers);
            let positions = Positions::Reassigned(config.rope);
            let select = SelectConfig {
                heads: config.heads,
                dtype: config.dtype,
                positions,
                ..SelectConfig::default()
            };
            let _ = select.validate();
        }
    }
});
