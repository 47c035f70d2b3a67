//! The example `longtext`, run as a process: its numbers, its report, and every way to use it wrongly.

#[path = "common/example.rs"]
mod example;
#[path = "longtext/naive.rs"]
mod naive;
#[path = "longtext/tiny_model.rs"]
mod tiny_model;

use std::fs;
use std::path::Path;
use std::process::Output;

use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny_model::TinyModel;
use tokenselect::Device;

/// Runs the example on the processor.
fn longtext<'a>(args: impl IntoIterator<Item = &'a str>) -> Output {
    longtext_on("cpu", args)
}

/// Runs the example.
fn longtext_on<'a>(device: &'a str, args: impl IntoIterator<Item = &'a str>) -> Output {
    example::run("longtext", ["--device", device].into_iter().chain(args))
}

/// Runs the example with `--json` and parses what it prints.
fn json<'a>(args: impl IntoIterator<Item = &'a str>) -> Value {
    json_on("cpu", args)
}

/// As [`json`], on a device.
fn json_on<'a>(device: &'a str, args: impl IntoIterator<Item = &'a str>) -> Value {
    let output = longtext_on(device, args.into_iter().chain(["--json"]));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    // Where stderr is no terminal, progress is a line every few seconds.
    assert!(stderr.lines().all(|line| line.contains(" tokens read, ")), "{stderr}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Runs the example, which must fail with exit code 1 and a message that holds all of `words`.
fn fails<'a>(args: impl IntoIterator<Item = &'a str>, words: &[&str]) {
    fails_on("cpu", args, words);
}

/// As [`fails`], on a device.
fn fails_on<'a>(device: &'a str, args: impl IntoIterator<Item = &'a str>, words: &[&str]) {
    example::assert_fails(&longtext_on(device, args), words);
}

/// Reads a short text with a model folder that must be refused.
fn refused(folder: &TempDir, words: &[&str]) {
    let text = text(b"some text");
    fails(["--model", path(folder.path()), "--text", path(text.path())], words);
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn text(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("text written");
    file
}

fn bits(report: &Value, pass: &str) -> f64 {
    report[pass]["bits_per_byte"].as_f64().expect("a number")
}

/// Lists of selected tokens: for blocks, for single tokens anew, for these from the Selection Cache.
fn counts(report: &Value, pass: &str) -> [u64; 3] {
    ["for_blocks", "for_tokens_anew", "for_tokens_reused"]
        .map(|name| report[pass]["selections"][name].as_u64().expect("a count"))
}

/// Names of the fields of an object, sorted.
fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = object.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// This file, which is Rust, which the shipped model was trained on.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/longtext.rs");

#[test]
fn shipped_model_reads_source_text() {
    let plot = tempfile::tempdir().expect("a temporary folder");
    let plot = plot.path().join("plot.svg");
    let report = json(["--text", SOURCE, "--tokens", "1100", "--plot", path(&plot)]);
    assert_eq!(keys(&report), ["bytes", "dense", "device", "model", "options", "selected", "tokens"]);
    assert_eq!((&report["device"], &report["model"]), (&json!("cpu"), &json!("tiny-llama")));
    assert_eq!((&report["tokens"], &report["bytes"]), (&json!(1100), &json!(1100)));
    let options = &report["options"];
    assert_eq!((&options["block"], &options["text"]), (&json!(128), &json!(SOURCE)));
    for pass in ["selected", "dense"] {
        let speeds = ["prefill_tokens_per_second", "selections", "tokens_per_second"];
        assert_eq!(keys(&report[pass]), [&["bits_per_byte", "buckets"], &speeds[..]].concat());
        let buckets = report[pass]["buckets"].as_array().expect("a list");
        let bounds: Vec<_> = buckets.iter().map(|b| (b["from"].as_u64(), b["to"].as_u64())).collect();
        assert_eq!(bounds, [(Some(0), Some(1024)), (Some(1024), Some(1100))]);
        // The first byte is not predicted.
        let bucket = |i: usize| buckets[i]["bits_per_byte"].as_f64().expect("a number");
        let mean = (bucket(0) * 1023.0 + bucket(1) * 76.0) / 1099.0;
        assert!((mean - bits(&report, pass)).abs() < 1e-5);
        assert!((0.5..2.5).contains(&bucket(0)), "a trained model, not {} bits", bucket(0));
        assert!(report[pass]["tokens_per_second"].as_f64().expect("a number") > 0.0);
        assert_eq!(counts(&report, pass)[1..], [0, 0], "no single tokens");
    }
    let svg = fs::read_to_string(plot).expect("the plot");
    for part in ["<svg", "token selection", "dense attention", "training context, 1024 tokens"] {
        assert!(svg.contains(part), "no {part} in the plot");
    }
}

#[test]
fn selection_of_everything_is_dense_attention() {
    let report = json(["--text", SOURCE, "--tokens", "416"]);
    assert!((bits(&report, "selected") - bits(&report, "dense")).abs() < 1e-3, "{report}");
}

#[test]
fn decoding_goes_through_the_selection_cache() {
    let windows =
        ["--text", SOURCE, "--tokens", "600", "--n-init", "16", "--top-k", "128", "--n-local", "64"];
    let blocks = json(windows);
    let single = json(windows.into_iter().chain(["--decode", "80"]));
    // 520 bytes in blocks of 128: from the third on (256 bytes before it, 80 in the windows) there are more than 128 candidates, in
    // each of 6 layers.
    let [for_blocks, anew, reused] = counts(&single, "selected");
    assert_eq!((for_blocks, anew + reused), (6 * 3, 6 * 80));
    assert!(reused > 0 && anew >= 6);
    assert_eq!(counts(&single, "dense"), [0, 0, 0]);
    assert!(single["selected"]["decode_tokens_per_second"].as_f64() > Some(0.0), "{single}");
    // The text is this file, whatever it says: of 80 bytes, each selects better on its own than in its block.
    assert!((bits(&single, "selected") - bits(&blocks, "selected")).abs() < 0.1, "{blocks} {single}");
    assert!((bits(&single, "dense") - bits(&blocks, "dense")).abs() < 2e-3, "{blocks} {single}");
}

/// Bits per byte of both readings of a device, which must be close to those of the processor: bf16 is rounded elsewhere.
fn assert_like_cpu(device: &str) {
    let args = ["--text", SOURCE, "--tokens", "72", "--block", "20", "--decode", "8"];
    let args = args.into_iter().chain(["--n-init", "4", "--top-k", "16", "--n-local", "8"]);
    let (want, got) = (json(args.clone()), json_on(device, args));
    let name = got["device"].as_str().expect("a name");
    assert!(name.starts_with(device), "{name}");
    for pass in ["selected", "dense"] {
        let (want, got) = (bits(&want, pass), bits(&got, pass));
        assert!((got / want - 1.0).abs() < 5e-3, "{pass} on {name}: {got}, on the processor {want}");
    }
    let made = |report: &Value| counts(report, "selected").iter().sum::<u64>();
    assert_eq!(made(&got), made(&want), "{want} {got}");
}

mod emulated {
    #[test]
    fn reads_as_the_processor_does() {
        super::assert_like_cpu("emulated");
    }
}

mod cuda {
    #[test]
    #[ignore = "needs a GPU"]
    fn reads_as_the_processor_does() {
        super::assert_like_cpu("cuda");
    }
}

#[test]
fn without_a_gpu_the_device_cuda_is_refused() {
    let Err(error) = Device::cuda(0) else { return };
    fails_on("cuda", ["--text", SOURCE, "--tokens", "72"], &[&error.to_string()]);
}

#[test]
fn a_model_that_the_gpu_cannot_run() {
    let (model, text) = (TinyModel::new().save(), text(b"some text"));
    let args = ["--model", path(model.path()), "--text", path(text.path()), "--json"];
    fails_on("emulated", args, &["emulated has no `append` for f32, only for f16 and bf16"]);
    let output = longtext_on("auto", args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["device"], "cpu");
    if Device::auto().is_cpu() {
        assert_eq!(stderr, "");
    } else {
        assert!(stderr.starts_with("attention runs on the processor: cuda:0"), "{stderr}");
        assert!(stderr.contains("`append` for f32"), "{stderr}");
    }
}

#[test]
fn table_and_continuation() {
    let short = text(b"fn main() {\n    let mut sum = 0;\n    for i in 0..10 {\n        sum += i;\n");
    let args = ["--text", path(short.path()), "--generate", "12"];
    let output = longtext(args);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let parts = [
        "tiny-llama",
        "0 to 71",
        "shorter than the 8192",
        "tokens per second",
        "one at a time",
        "Continuation with dense",
    ];
    for part in parts {
        assert!(stdout.contains(part), "no `{part}` in: {stdout}");
    }
    let greedy = json(args);
    assert_eq!(greedy["selected"]["generated"], greedy["dense"]["generated"], "everything is selected");
    let drawn =
        |seed: &str| json(args.into_iter().chain(["--temperature", "2", "--seed", seed]))["dense"].clone();
    assert_eq!(drawn("1")["generated"], drawn("1")["generated"]);
    assert_ne!(drawn("1")["generated"], drawn("2")["generated"]);
}

#[test]
fn without_dense_attention() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plot = folder.path().join("plot.PNG");
    // The default text, which comes with the project.
    let args = [
        "--no-dense",
        "--tokens",
        "300",
        "--block",
        "64",
        "--n-init",
        "8",
        "--n-local",
        "16",
        "--top-k",
        "32",
    ];
    let report = json(args.into_iter().chain(["--plot", path(&plot), "--score-scale", "1"]));
    assert_eq!(report.get("dense"), None);
    assert_eq!(report["options"]["score_scale"], 1.0);
    let default = json(args);
    let difference = bits(&report, "selected") - bits(&default, "selected");
    assert!(difference != 0.0, "scores times 1 and times 1/8 select other tokens");
    assert_eq!(
        bits(&json(args.into_iter().chain(["--score-scale", "0.125"])), "selected"),
        bits(&default, "selected")
    );
    let image = fs::read(plot).expect("the plot");
    assert_eq!(&image[1..4], b"PNG");
    let table = longtext(args);
    let table = String::from_utf8_lossy(&table.stdout);
    assert!(!table.contains("dense") && table.contains("scores times 0.125"), "{table}");
    assert!(table.contains("Lists of tokens selected, summed over 6 layers:"), "{table}");
}

#[test]
fn results_come_while_the_text_is_read() {
    // A NaN far behind: what was read before it is printed, though the program fails.
    let mut model = TinyModel::new();
    let width = tiny_model::HIDDEN;
    model.tensors.get_mut("model.embed_tokens.weight").expect("a tensor").1[7 * width] = f32::NAN;
    let folder = model.save();
    let mut bytes = vec![b'x'; 3000];
    bytes[2500] = 7;
    let text = text(&bytes);
    let output = longtext(["--model", path(folder.path()), "--text", path(text.path())]);
    assert_eq!(output.status.code(), Some(1));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("0 to 1023") && stdout.contains("1024 to 2047"), "{stdout}");
    assert!(!stdout.contains("2048 to"), "{stdout}");
    assert!(stderr.contains("token 2501 is not finite"), "{stderr}");
}

#[test]
fn forward_pass_matches_naive() {
    let text = text(&fs::read(SOURCE).expect("this file")[..90]);
    let bytes = fs::read(text.path()).expect("the text");
    let run = |folder: TempDir| {
        json(["--model", path(folder.path()), "--text", path(text.path()), "--block", "16", "--decode", "7"])
    };
    let model = TinyModel::new();
    let want = naive::bits_per_byte(&model, &bytes, 1.0);
    let plain = run(model.save());
    let close = |report: &Value, want: f64, tolerance: f64| {
        for pass in ["selected", "dense"] {
            let got = bits(report, pass);
            assert!((got - want).abs() < tolerance, "{pass}: {got}, not {want}");
        }
    };
    close(&plain, want, 1e-5);
    close(&run(model.save_in_two()), bits(&plain, "dense"), 1e-9);
    for (dtype, name) in [(Dtype::BF16, "bfloat16"), (Dtype::F16, "float16")] {
        let half = TinyModel { dtype, ..TinyModel::new().with("torch_dtype", json!(name)) };
        close(&run(half.save()), want, 2e-2);
    }
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let want = naive::bits_per_byte(&model, &bytes, 4.0);
    assert!((want - bits(&plain, "dense")).abs() > 1e-3, "positions matter");
    close(&run(TinyModel::new().with("rope_scaling", linear).save()), want, 1e-5);
}

#[test]
fn every_form_of_folder_is_read() {
    let text = text(&fs::read(SOURCE).expect("this file")[..70]);
    let run = |model: &TinyModel| {
        let folder = model.save();
        bits(&json(["--model", path(folder.path()), "--text", path(text.path())]), "dense")
    };
    let mut tied = TinyModel::new();
    let embedding = tied.tensors["model.embed_tokens.weight"].clone();
    tied.tensors.insert("lm_head.weight".to_owned(), embedding);
    let untied = run(&tied);
    tied.tensors.remove("lm_head.weight");
    assert_eq!(run(&tied.with("tie_word_embeddings", json!(true))), untied);

    let mut zero = TinyModel::new();
    zero.tensors.iter_mut().filter(|(name, _)| name.ends_with("bias")).for_each(|(_, (_, x))| x.fill(0.0));
    let with_zeros = run(&zero);
    zero.tensors.retain(|name, _| !name.ends_with("bias"));
    assert_eq!(run(&zero.with("attention_bias", json!(false)).with("mlp_bias", Value::Null)), with_zeros);

    let scaled = |scaling: Value| run(&TinyModel::new().with("rope_scaling", scaling));
    let plain = scaled(json!({"rope_type": "default"}));
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 32});
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    assert!(scaled(llama3) != plain && scaled(yarn.clone()) != plain);
    let newer = TinyModel::new().with("rope_theta", Value::Null);
    let newer = newer.with("rope_parameters", json!({"rope_type": "default", "rope_theta": 10_000.0}));
    assert_eq!(run(&newer), plain);
}

#[test]
fn wrong_options_are_refused() {
    fails(["--tokens", "1"], &["`--tokens`", "at least 2", "got 1"]);
    fails(["--tokens", "0"], &["`--tokens`", "got 0"]);
    fails(["--block", "0"], &["`--block`", "at least 1"]);
    fails(["--top-k", "0"], &["`--top-k`", "at least 1"]);
    fails(["--temperature=-1"], &["`--temperature`"]);
    fails(["--temperature", "NaN"], &["`--temperature`"]);
    fails(["--plot", "plot.jpg"], &["`--plot`", ".svg or .png", "got plot.jpg"]);
    fails(["--score-scale", "NaN"], &["score_scale", "NaN"]);
    fails(["--plot", "no/such/folder/plot.svg"], &["`--plot`", "no/such/folder"]);
    fails(["--text", SOURCE, "--tokens", "50", "--decode", "51"], &["`--decode`", "at most 50", "got 51"]);
    fails(["--text", SOURCE, "--generate", &usize::MAX.to_string()], &["`--generate`"]);
    assert_eq!(longtext(["--no-such-option"]).status.code(), Some(2), "usage");
}

#[test]
fn wrong_texts_are_refused() {
    let (empty, single) = (text(b""), text(b"x"));
    fails(["--text", path(empty.path())], &[path(empty.path()), "has 0 bytes", "at least 2"]);
    fails(["--text", path(single.path())], &[path(single.path()), "has 1 bytes"]);
    fails(["--text", "no/such.txt"], &["cannot read no/such.txt"]);
    fails(["--text", env!("CARGO_MANIFEST_DIR")], &["cannot read", env!("CARGO_MANIFEST_DIR")]);
}

#[test]
fn wrong_models_are_refused() {
    fails(["--model", "no/such"], &["model folder no/such does not exist"]);
    refused(&TinyModel::new().with("hidden_act", json!("gelu")).save(), &["`hidden_act`", "silu", "gelu"]);
    let mut damaged = TinyModel::new();
    damaged.tensors.get_mut("model.norm.weight").expect("a tensor").1[3] = f32::NAN;
    let text = text(b"some text");
    let output = longtext(["--model", path(damaged.save().path()), "--text", path(text.path()), "--json"]);
    example::assert_fails(&output, &["token 1 is not finite"]);
}

#[test]
fn a_tokenizer_that_panics_says_so_in_one_line() {
    let (folder, text) = (TinyModel::new().save(), text(b"some text"));
    let tokenizer = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"}});
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer written");
    let args = ["--model", path(folder.path()), "--text", path(text.path())];
    fails(args, &["tokenizer.json", "this tokenizer cannot be used", "it contradicts itself"]);
}

#[test]
fn plots_that_would_be_lost_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (directory, text) = (folder.path().join("x.svg"), folder.path().join("text.svg"));
    fs::create_dir(&directory).expect("a folder");
    fs::write(&text, "some text").expect("text written");
    let indirect = directory.join("../text.svg");
    fails(["--plot", path(&directory)], &["`--plot`", "must be a file", path(&directory)]);
    let same = ["`--plot`", "another file than that of `--text`", path(&indirect)];
    fails(["--plot", path(&indirect), "--text", path(&text)], &same);
    assert_eq!(fs::read(&text).expect("the text"), b"some text");
    // The other example writes two files, whose names it makes.
    let needle =
        |args: [&str; 4], words: &[&str]| example::assert_fails(&example::run("needle", args), words);
    let stem = |path: &Path| path.with_extension("").to_str().expect("UTF-8").to_owned();
    needle(["--plot", path(&directory), "--device", "cpu"], &["`--plot`", "must be a file"]);
    needle(["--plot", &stem(&directory), "--device", "cpu"], &["`--plot`", "must be a file", "x.svg"]);
    let words = ["`--plot`", "another file than that of `--text`", path(&text)];
    needle(["--plot", &stem(&text), "--text", path(&text)], &words);
}

#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let folder = tempfile::tempdir().expect("a temporary folder");
    let named = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let (text, plot) = (named(b"text-\xff"), named(b"plot-\xff.svg"));
    fs::write(&text, "some text").expect("text written");
    let mut command = example::command("longtext");
    command.args(["--device", "cpu", "--json", "--text"]).arg(&text).arg("--plot").arg(&plot);
    let output = command.output().expect("the example starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["options"]["text"], json!(text.display().to_string()));
    assert_eq!(report["options"]["plot"], json!(plot.display().to_string()));
    assert!(plot.is_file());
}
