//! Checkpoints that transformers wrote, in `checkpoints` by `checkpoints/make.py`: the model of the examples predicts what
//! transformers does.
//!
//! `TOKENSELECT_CHECKPOINTS=DIR` reads the folders of another directory.

#[path = "common/example.rs"]
mod example;

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use tokenselect::Device;
use tokenselect_examples::family::Family;
use tokenselect_examples::model::Model;
use tokenselect_examples::session::{Attention, Session, Settings};
use tokenselect_examples::vocabulary::Vocabulary;

/// The promise, of logits that are some units apart.
const TOLERANCE: f32 = 1e-3;

/// Folders of checkpoints with the file `expected`.
fn folders(expected: &str) -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints");
    let root = std::env::var_os("TOKENSELECT_CHECKPOINTS").map_or(own, PathBuf::from);
    let entries = fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    folders.retain(|folder| folder.join(expected).is_file());
    folders.sort_unstable();
    assert!(!folders.is_empty(), "{} has no folders with {expected}", root.display());
    folders
}

/// `tokens` and `logits` of a folder.
fn expected(folder: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = fs::read(folder.join("expected.safetensors")).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tokens = file.tensor("tokens").expect("tokens").data().as_chunks::<8>().0;
    let logits = file.tensor("logits").expect("logits").data().as_chunks::<4>().0;
    let tokens = tokens.iter().map(|&token| i64::from_le_bytes(token));
    (
        tokens.map(|token| u32::try_from(token).expect("a token")).collect(),
        logits.iter().map(|&logit| f32::from_le_bytes(logit)).collect(),
    )
}

/// Logits after each token, the last few of which are read one at a time.
fn predict(model: &Model, attention: Attention, settings: &Settings, tokens: &[u32]) -> Vec<f32> {
    const SINGLE: usize = 5;
    let mut session =
        Session::new(model, &Device::cpu(), attention, tokens.len(), settings).expect("a session");
    let mut all = Vec::new();
    let mut take = |session: &mut Session<'_>| {
        session
            .predictions(&mut |logits| {
                all.extend_from_slice(logits);
                Ok(())
            })
            .expect("predictions");
    };
    let (blocks, single) = tokens.split_at(tokens.len() - SINGLE);
    session.prefill(blocks, &mut |_| ()).expect("a prompt");
    take(&mut session);
    for &token in single {
        session.decode(token).expect("a token");
        take(&mut session);
    }
    all
}

/// The largest difference.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN is the largest of all.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).expect("elements")
}

#[test]
fn every_family_predicts_as_transformers_does() {
    let mut families = Vec::new();
    for folder in folders("expected.safetensors") {
        let name = folder.display();
        let model = Model::load(&folder).unwrap_or_else(|error| panic!("{error}"));
        let (tokens, want) = expected(&folder);
        let spread = want.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            - want.iter().copied().fold(f32::INFINITY, f32::min);
        assert!(spread > 4.0, "{name}: logits that differ by {spread} tell little");
        // All tokens are selected: by vote, or because they lie in a window.
        let everything = Settings { block: 7, n_init: 3, n_local: 5, top_k: tokens.len(), score_scale: None };
        for attention in [Attention::Dense, Attention::Selected] {
            let off = distance(&predict(&model, attention, &everything, &tokens), &want);
            println!("{name}, {attention:?}: {off:e}");
            assert!(off < TOLERANCE, "{name}, {attention:?}: off by {off}");
        }
        // Fewer are another model, so that the above would not go unnoticed.
        let few = Settings { n_local: 2, top_k: 2, ..everything };
        let off = distance(&predict(&model, Attention::Selected, &few, &tokens), &want);
        assert!(off > 10.0 * TOLERANCE, "{name}: {off}, though tokens are left out");
        families.push(model.config.family);
    }
    for family in Family::ALL {
        assert!(families.contains(&family), "no {family:?} among {families:?}");
    }
}

#[test]
fn tokenizers_cut_texts_as_in_python() {
    for folder in folders("expected.json") {
        let want: Value =
            serde_json::from_slice(&fs::read(folder.join("expected.json")).expect("a file")).expect("JSON");
        let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).expect("tokens");
        let text = fs::read(folder.join("text.txt")).expect("a text");
        let vocabulary = Vocabulary::load(&folder, 304).expect("a tokenizer");
        let tokens = vocabulary.encode(text.as_slice(), usize::MAX, "text").expect("tokens");
        assert_eq!(tokens.ids, ids);
        assert_eq!(tokens.bytes(0, ids.len()), text.len());
        assert!(tokens.ends.is_sorted());
        // What is put before a text stands for none of it.
        assert_eq!(tokens.bytes(0, 1), 0);
        let decoded = vocabulary.decode(&ids[1..]).expect("a text");
        assert_eq!(decoded.as_bytes(), text);
        // A beginning is cut where a token ends; the bytes are those of its tokens.
        let begin = vocabulary.encode(text.as_slice(), 12, "text").expect("tokens");
        assert_eq!((begin.ids.as_slice(), begin.ends.as_slice()), (&ids[..12], &tokens.ends[..12]));
    }
}

#[test]
fn longtext_counts_bits_per_byte_of_text() {
    for folder in folders("expected.json") {
        let want: Value =
            serde_json::from_slice(&fs::read(folder.join("expected.json")).expect("a file")).expect("JSON");
        let text = folder.join("text.txt");
        let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let (model, text) = (path(&folder), path(&text));
        let args = ["--model", &model, "--text", &text, "--json", "--device", "cpu"];
        let output = example::run("longtext", args.into_iter().chain(["--decode", "9", "--generate", "3"]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(report["tokens"], want["ids"].as_array().expect("tokens").len());
        assert_eq!(report["bytes"], want["bytes"]);
        for reading in ["selected", "dense"] {
            let bits = |value: &Value| value["bits_per_byte"].as_f64().expect("a number");
            let (got, want) = (bits(&report[reading]), bits(&want));
            assert!((got - want).abs() < 1e-3, "{reading}: {got}, not {want}");
            assert!(report[reading]["generated"].is_string());
        }
    }
}

#[test]
fn needle_asks_models_of_bytes() {
    for folder in folders("expected.json") {
        let model = folder.to_str().expect("UTF-8");
        let output = example::run("needle", ["--model", model]);
        example::assert_fails(&output, &[model, "has a tokenizer", "pass keys", "tokens are bytes"]);
    }
}
