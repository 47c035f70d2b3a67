//! Model folders that the examples refuse: each error names what is at fault, its rule and what was found.

#[path = "longtext/tiny_model.rs"]
#[allow(dead_code, reason = "`longtext` reads elements, too")]
mod tiny_model;

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny_model::{HIDDEN, TinyModel, config_file};
use tokenselect::RopeScaling;
use tokenselect_examples::error::Result;
use tokenselect_examples::model::Model;
use tokenselect_examples::vocabulary::Vocabulary;

/// Reads a folder as the examples do.
fn load(folder: &Path) -> Result<()> {
    let model = Model::load(folder)?;
    Vocabulary::load(folder, model.config.vocab_size).map(drop)
}

/// A folder that must be refused, with a message of one line that holds all of `words`.
fn refused_path(folder: &Path, words: &[&str]) {
    let message = load(folder).expect_err("an error").to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

/// The same of a temporary folder.
fn refused(folder: &TempDir, words: &[&str]) {
    refused_path(folder.path(), words);
}

/// A model of another family, without the biases that only Llama has everywhere.
fn of_family(architecture: &str, model_type: &str) -> TinyModel {
    let mut model = TinyModel::new();
    model.tensors.retain(|name, _| !name.ends_with("bias"));
    let model = model.with("architectures", json!([architecture])).with("model_type", json!(model_type));
    model.with("attention_bias", json!(false)).with("mlp_bias", json!(false))
}

fn mistral() -> TinyModel {
    of_family("MistralForCausalLM", "mistral").with("sliding_window", Value::Null)
}

fn qwen3() -> TinyModel {
    let mut model = of_family("Qwen3ForCausalLM", "qwen3");
    for layer in 0..2 {
        for part in ["q", "k"] {
            let name = format!("model.layers.{layer}.self_attn.{part}_norm.weight");
            model.tensors.insert(name, (vec![8], vec![1.0; 8]));
        }
    }
    model
}

#[test]
fn what_the_refusals_begin_with_is_read() {
    for model in [TinyModel::new(), mistral(), qwen3()] {
        load(model.save().path()).expect("a model");
        load(model.save_in_two().path()).expect("a model");
    }
    let mut old = TinyModel::new();
    // Frequencies of RoPE, which follow from the configuration.
    old.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![4], vec![1.0; 4]));
    load(old.save().path()).expect("a model");
}

#[test]
fn folders() {
    refused_path(Path::new("no/such"), &["model folder no/such does not exist"]);
    refused_path(Path::new(file!()), &["not a folder"]);
    let model = TinyModel::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    refused(&folder, &["config.json"]);
    fs::write(config_file(folder.path()), "{").expect("config written");
    refused(&folder, &["config.json", "EOF"]);
    fs::write(config_file(folder.path()), model.config.to_string()).expect("config written");
    refused(&folder, &["model.safetensors", folder.path().to_str().expect("UTF-8")]);

    let folder = model.save();
    let weights = folder.path().join("model.safetensors");
    let bytes = fs::read(&weights).expect("weights");
    for len in [0, 5, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&weights, &bytes[..len]).expect("weights written");
        refused(&folder, &["model.safetensors", "not a whole safetensors file"]);
    }
}

#[test]
fn shards() {
    let model = TinyModel::new();
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let index = |folder: &TempDir| folder.path().join("model.safetensors.index.json");
    let folder = model.save_in_two();
    let text = fs::read_to_string(index(&folder)).expect("an index");
    let with = |text: &str| fs::write(index(&folder), text).expect("index written");

    with("[]");
    refused(&folder, &["model.safetensors.index.json"]);
    // A name that leads out of the folder is refused, even where it leads back.
    let name = folder.path().file_name().expect("a name").display().to_string();
    let absolute = folder.path().join(two).display().to_string();
    for file in [&format!("../{name}/{two}"), &format!("./{two}"), &absolute, "..", "", "sub/x.safetensors"] {
        with(&text.replace(two, file));
        let words = ["model.safetensors.index.json", "model.layers.1.", "a name without folders", file];
        refused(&folder, &words);
    }
    // A tensor that the index seeks in the other file, or in no file.
    let norm = "\"model.norm.weight\":";
    with(&text.replace(&format!("{norm}\"{one}"), &format!("{norm}\"{two}")));
    refused(&folder, &["tensor `model.norm.weight` is missing", two]);
    with(&text.replace(norm, "\"model.norm.bias\":"));
    refused(&folder, &["tensor `model.norm.bias` is missing", one]);
    with(&text);
    fs::copy(folder.path().join(one), folder.path().join(two)).expect("file copied");
    refused(&folder, &["is in two weights files", one, two]);
    fs::remove_file(folder.path().join(two)).expect("file removed");
    refused(&folder, &["cannot read", two]);
}

#[test]
fn architectures() {
    let refused = |field: &str, value: Value, words: &[&str]| {
        refused(&TinyModel::new().with(field, value).save(), words);
    };
    for name in [
        "GPT2LMHeadModel",
        "GemmaForCausalLM",
        "Phi3ForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
    ] {
        let known = "LlamaForCausalLM or MistralForCausalLM or Qwen2ForCausalLM or Qwen3ForCausalLM";
        refused("architectures", json!([name]), &["`architectures`", known, &format!("got {name}")]);
    }
    refused("architectures", json!("LlamaForCausalLM"), &["config.json", "invalid type"]);
    refused("model_type", json!("gemma"), &["`model_type`", "must be llama", "got gemma"]);
    let unnamed = TinyModel::new().with("architectures", json!([])).with("model_type", json!("phi3"));
    self::refused(&unnamed.save(), &["`model_type`", "llama or mistral or qwen2 or qwen3", "got phi3"]);
    refused("hidden_act", json!("gelu"), &["`hidden_act`", "silu", "gelu"]);
    refused("partial_rotary_factor", json!(0.5), &["`partial_rotary_factor`", "must be 1", "got 0.5"]);
    let quantised = json!({"quant_method": "awq", "bits": 4});
    refused("quantization_config", quantised, &["`quantization_config`", "quantised weights", "got awq"]);
    refused("quantization_config", json!({}), &["`quantization_config`", "a method without a name"]);
}

#[test]
fn sliding_windows() {
    refused(&mistral().with("sliding_window", json!(4096)).save(), &["`sliding_window`", "null", "got 4096"]);
    let mut unsaid = mistral();
    unsaid.config.as_object_mut().expect("an object").remove("sliding_window");
    refused(&unsaid.save(), &["`sliding_window`", "null", "nothing, which stands for 4096"]);
    refused(&TinyModel::new().with("sliding_window", json!(16)).save(), &["`sliding_window`", "got 16"]);
    let slides = || qwen3().with("use_sliding_window", json!(true)).with("sliding_window", json!(4096));
    refused(&slides().with("max_window_layers", json!(1)).save(), &["`use_sliding_window`", "got true"]);
    let types = json!(["full_attention", "sliding_attention"]);
    refused(&slides().with("layer_types", types).save(), &["`layer_types`", "got sliding_attention"]);
    // Where no layer has a window, the field means nothing.
    let types = json!(["full_attention", "full_attention"]);
    for none in [slides(), slides().with("max_window_layers", json!(2)), slides().with("layer_types", types)]
    {
        load(none.save().path()).expect("a model");
    }
    load(qwen3().with("sliding_window", json!(4096)).save().path()).expect("a model");
}

#[test]
fn sizes() {
    let refused = |field: &str, value: Value, words: &[&str]| {
        refused(&TinyModel::new().with(field, value).save(), words);
    };
    refused("vocab_size", Value::Null, &["`vocab_size`", "nothing"]);
    refused("hidden_size", Value::Null, &["`hidden_size`", "nothing"]);
    refused("hidden_size", json!(0), &["`hidden_size`", "got 0"]);
    refused("hidden_size", json!(u64::MAX), &["`hidden_size`"]);
    refused(
        "num_hidden_layers",
        json!(3),
        &["`num_hidden_layers`", "must be 2, the layers of the weights", "got 3"],
    );
    refused(
        "num_hidden_layers",
        json!(1),
        &["`num_hidden_layers`", "must be 2, the layers of the weights", "got 1"],
    );
    refused("num_attention_heads", json!(0), &["`num_attention_heads`"]);
    refused("num_key_value_heads", json!(3), &["`num_key_value_heads`", "divisor"]);
    refused("head_dim", Value::Null, &["model.layers.0.self_attn.q_proj.weight", "[16, 16], got [32, 16]"]);
    self::refused(&qwen3().with("head_dim", Value::Null).save(), &["`head_dim`", "got nothing"]);
    let heads = "num_key_value_heads";
    self::refused(&mistral().with(heads, Value::Null).save(), &["`num_key_value_heads`", "got nothing"]);
    refused("rms_norm_eps", json!(-1.0), &["`rms_norm_eps`"]);
    refused("torch_dtype", json!("int8"), &["`torch_dtype`", "int8"]);
}

#[test]
fn positions() {
    let scaled = |scaling: Value, words: &[&str]| {
        refused(&TinyModel::new().with("rope_scaling", scaling).save(), words);
    };
    for kind in ["dynamic", "longrope", "mrope", "su"] {
        let known = "default, linear, llama3 or yarn";
        scaled(json!({"rope_type": kind, "factor": 2}), &["`rope_scaling.rope_type`", known, kind]);
        scaled(json!({"type": kind, "factor": 2}), &["`rope_scaling.rope_type`", known, kind]);
    }
    scaled(json!({"rope_type": "linear"}), &["`rope_scaling.factor`", "nothing"]);
    let partial = json!({"rope_type": "default", "partial_rotary_factor": 0.25});
    scaled(partial, &["`rope_scaling.partial_rotary_factor`", "must be 1", "got 0.25"]);
}

#[test]
fn positions_that_contradict_each_other() {
    let model = |fields: Value| {
        let fields = fields.as_object().expect("an object").clone();
        fields.into_iter().fold(TinyModel::new(), |model, (name, value)| model.with(&name, value))
    };
    let refused = |fields: Value, words: &[&str]| refused(&model(fields).save(), words);
    let rope = |fields: Value| {
        let config = Model::load(model(fields).save().path()).expect("a model").config;
        (config.rope.theta, config.rope.scaling)
    };
    let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
    let with_theta = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});

    let both = ["`rope_theta`", "`rope_parameters.rope_theta`", "got 10000 and 500000"];
    refused(json!({"rope_parameters": with_theta(500_000.0)}), &both);
    assert_eq!(rope(json!({"rope_parameters": with_theta(1e4)})), (1e4, RopeScaling::None));
    let both = ["`rope_parameters.rope_theta`", "`rope_scaling.rope_theta`", "got 5 and 6"];
    let inside =
        json!({"rope_theta": null, "rope_parameters": with_theta(5.0), "rope_scaling": with_theta(6.0)});
    refused(inside, &both);

    let both = ["`rope_scaling`", "`rope_parameters`", "\"factor\":2.0", "\"factor\":8.0"];
    refused(json!({"rope_scaling": linear(8.0), "rope_parameters": linear(2.0)}), &both);
    let both = ["`rope_scaling`", "`rope_parameters`", "default", "linear"];
    refused(json!({"rope_scaling": with_theta(1e4), "rope_parameters": linear(2.0)}), &both);
    for newer in [linear(8.0), with_theta(1e4), json!({}), Value::Null] {
        let fields = json!({"rope_scaling": {"type": "linear", "factor": 8}, "rope_parameters": newer});
        assert_eq!(rope(fields), (1e4, RopeScaling::Linear { factor: 8.0 }));
    }
    let nested = json!({"full_attention": with_theta(1e4), "sliding_attention": with_theta(1e4)});
    let words = ["`rope_parameters`", "for each type of layer", "`full_attention`"];
    refused(json!({"rope_parameters": nested}), &words);

    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
    let yarn = json!({"rope_type": "yarn", "factor": 4});
    for mut scaling in [llama3, yarn] {
        // As in transformers: the longest context, where no other is given.
        for (first, want) in [(Value::Null, 64.0), (json!(32), 32.0)] {
            let fields = json!({"rope_scaling": scaling, "original_max_position_embeddings": first});
            let (RopeScaling::Llama3 { original_max_position: got, .. }
            | RopeScaling::Yarn { original_max_position: got, .. }) = rope(fields).1
            else {
                panic!("another scaling than {scaling}");
            };
            assert_eq!(got, want);
        }
        scaling["original_max_position_embeddings"] = json!(16);
        let name = "original_max_position_embeddings";
        let both = [&format!("`{name}`"), &format!("`rope_scaling.{name}`"), "got 32 and 16"];
        refused(json!({"rope_scaling": scaling, name: 32}), &both);
    }
}

#[test]
fn tensors() {
    let mut missing = TinyModel::new();
    missing.tensors.remove("lm_head.weight");
    refused(&missing.save(), &["tensor `lm_head.weight` is missing"]);
    let mut transposed = TinyModel::new();
    let name = "model.layers.1.mlp.up_proj.weight";
    transposed.tensors.get_mut(name).expect("a tensor").0.reverse();
    refused(&transposed.save(), &["model.safetensors", name, "[24, 16], got [16, 24]"]);
    refused(&TinyModel { dtype: Dtype::I32, ..TinyModel::new() }.save(), &["bf16, f16 or f32", "I32"]);

    // Biases and norms that the configuration does not tell of.
    let biases = TinyModel::new().with("attention_bias", json!(false));
    let first = "model.layers.0.self_attn.k_proj.bias";
    refused(&biases.save(), &["model.safetensors", first, "8 such tensors", "0 expected"]);
    let norms = qwen3().with("architectures", json!(["LlamaForCausalLM"])).with("model_type", json!("llama"));
    refused(&norms.save(), &["model.layers.0.self_attn.k_norm.weight", "4 such tensors"]);
    let mut more = mistral();
    more.tensors.insert("model.layers.1.mlp.shared_expert_gate.weight".into(), (vec![1, 16], vec![0.5; 16]));
    refused(&more.save(), &["model.layers.1.mlp.shared_expert_gate.weight", "1 such tensor"]);
    refused(
        &of_family("Qwen2ForCausalLM", "qwen2").save(),
        &["model.layers.0.self_attn.q_proj.bias` is missing"],
    );
    refused(
        &of_family("Qwen3ForCausalLM", "qwen3").save(),
        &["model.layers.0.self_attn.q_norm.weight` is missing"],
    );
    // More layers than any model has: not a number to put into the configuration.
    for number in [1 << 24, u64::MAX] {
        let mut far = TinyModel::new();
        let name = format!("model.layers.{number}.x");
        far.tensors.insert(name.clone(), (vec![1], vec![0.0]));
        refused(&far.save(), &[&name, "is no part of the model"]);
    }
    let without =
        TinyModel { tensors: [("norm".to_owned(), (vec![1], vec![1.0]))].into(), ..TinyModel::new() };
    refused(&without.save(), &["tensor `model.embed_tokens.weight` is missing"]);
}

#[test]
fn tied_embeddings() {
    let tie = |model: TinyModel| model.with("tie_word_embeddings", json!(true));
    let mut copied = TinyModel::new();
    let embedding = copied.tensors["model.embed_tokens.weight"].clone();
    copied.tensors.insert("lm_head.weight".to_owned(), embedding);
    load(tie(copied).save().path()).expect("a model");
    refused(
        &tie(TinyModel::new()).save(),
        &["`tie_word_embeddings`", "false where lm_head.weight", "got true"],
    );
}

#[test]
fn vocabularies() {
    let of_size = |vocab_size: usize| {
        let mut model = TinyModel::new().with("vocab_size", json!(vocab_size));
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            model.tensors.insert(name.into(), (vec![vocab_size, HIDDEN], vec![0.5; vocab_size * HIDDEN]));
        }
        model.save()
    };
    for vocab_size in [255, 257, 1000] {
        let got = format!("got {vocab_size}");
        refused(&of_size(vocab_size), &["no tokenizer.json", "vocab_size must be 256", &got]);
    }
    let words = json!({"a": 0, "b": 300});
    let tokenizer = |vocabulary: &Value| {
        json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}})
            .to_string()
    };
    let put = |folder: &TempDir, text: &str| {
        fs::write(folder.path().join("tokenizer.json"), text).expect("tokenizer written");
    };
    let folder = of_size(257);
    put(&folder, &tokenizer(&words));
    refused(&folder, &["tokenizer.json", "token \"b\" must be below vocab_size = 257", "got 300"]);
    for text in ["", "{", "[]", "{}", r#"{"version":"1.0","model":{"type":"Magic"}}"#] {
        put(&folder, text);
        refused(&folder, &["tokenizer.json", "this tokenizer cannot be used"]);
    }
    let folder = of_size(301);
    put(&folder, &tokenizer(&words));
    load(folder.path()).expect("a model");
    let vocabulary = Vocabulary::load(folder.path(), 301).expect("a tokenizer");
    let with_template = |special: Value| {
        let mut file: Value = serde_json::from_str(&tokenizer(&words)).expect("JSON");
        let pieces =
            json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
        let template = json!({"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special});
        file["post_processor"] = json!({"type": "Sequence", "processors": [template]});
        put(&folder, &file.to_string());
    };
    with_template(json!({}));
    refused(&folder, &["tokenizer.json", "this tokenizer cannot be used", "<s>"]);
    let special = |id: u32| json!({"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}});
    with_template(special(999));
    let far = Vocabulary::load(folder.path(), 301).expect("a tokenizer").encode(&b"a"[..], 10, "the text");
    assert_eq!(far.expect_err("an error").to_string(), "a token must be below vocab_size = 301, got 999");
    with_template(special(7));
    let begun = Vocabulary::load(folder.path(), 301).expect("a tokenizer").encode(&b"a"[..], 10, "the text");
    let begun = begun.expect("two tokens");
    assert_eq!((begun.ids, begun.ends), (vec![7, 0], vec![0, 1]));
    let error = |text: &[u8]| vocabulary.encode(text, 10, "the text").map(drop);
    let message = error(b"a b \xff").expect_err("an error").to_string();
    assert!(message.contains("the text must be UTF-8") && message.contains("at byte 4"), "{message}");
    let message = error("bé".as_bytes().split_at(2).0).expect_err("half a character").to_string();
    assert!(message.contains("the text must be UTF-8") && message.contains("at byte 1"), "{message}");
    let message = error(b"b").expect_err("one token").to_string();
    assert!(message.contains("the text has 1 tokens, but at least 2"), "{message}");
}

#[test]
fn beginnings_of_texts() {
    // A word is one token; cut anywhere, it is one for each of its letters.
    let word = "é".repeat(300);
    let model = json!({"type": "WordPiece", "vocab": {"?": 0, "é": 1, "##é": 2, word.as_str(): 3}, "unk_token": "?",
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 1000});
    let tokenizer = json!({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model});
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer written");
    let vocabulary = Vocabulary::load(folder.path(), 4).expect("a tokenizer");
    let mut text = format!("{word} ").repeat(100).into_bytes();
    let whole = vocabulary.encode(text.as_slice(), usize::MAX, "the text").expect("tokens");
    assert_eq!((whole.ids.as_slice(), whole.ends.last()), (&[3; 100][..], Some(&text.len())));
    for limit in 2..=100 {
        let tokens = vocabulary.encode(text.as_slice(), limit, "the text").expect("tokens");
        assert_eq!((&tokens.ids[..], &tokens.ends[..]), (&whole.ids[..limit], &whole.ends[..limit]));
    }
    assert_eq!(vocabulary.encode(text.as_slice(), 101, "the text").expect("tokens"), whole);
    // What lies far behind the tokens is not read.
    text.push(0xff);
    assert_eq!(vocabulary.encode(text.as_slice(), 10, "the text").expect("tokens").len(), 10);
    let message = vocabulary.encode(text.as_slice(), 100, "the text").expect_err("no UTF-8").to_string();
    assert!(message.contains(&format!("at byte {}", text.len() - 1)), "{message}");
}
