//! Runs the tests of the Python module with the shared library. Skipped, loudly, where `python3` or NumPy are missing:
//! `python3 -m pip install --target target/python numpy` puts it where this test looks.

mod common;

use std::mem::size_of;
use std::path::Path;
use std::process::Command;

use common::{announce, shared_library};
use tokenselect_c::*;

#[test]
fn python_module() {
    if let Err(error) = python(&["-c", "import numpy"]).map_err(|error| error.to_string()).and_then(succeeded)
    {
        return announce(&format!("SKIPPED: python: {error}"));
    }
    let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/test_tokenselect.py");
    let output = python(&[&test.display().to_string(), "-v"]).expect("it ran before");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    for line in text.lines().filter(|line| line.contains("skipped")) {
        announce(&format!("SKIPPED: python: {line}"));
    }
}

fn succeeded(output: std::process::Output) -> Result<(), String> {
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(text.lines().last().unwrap_or_default().to_owned()) }
}

/// Runs Python with the library, and the sizes of its structures.
fn python(arguments: &[&str]) -> std::io::Result<std::process::Output> {
    let sizes = [
        ("ts_rope", size_of::<ts_rope>()),
        ("ts_config", size_of::<ts_config>()),
        ("ts_limits", size_of::<ts_limits>()),
        ("ts_cache_config", size_of::<ts_cache_config>()),
        ("ts_kv_view", size_of::<ts_kv_view>()),
        ("ts_batch_tables", size_of::<ts_batch_tables>()),
        ("ts_device_tables", size_of::<ts_device_tables>()),
        ("ts_batch_info", size_of::<ts_batch_info>()),
        ("ts_batch_row", size_of::<ts_batch_row>()),
        ("ts_output", size_of::<ts_output>()),
        ("ts_selection", size_of::<ts_selection>()),
        ("ts_parts", size_of::<ts_parts>()),
        ("ts_step_input", size_of::<ts_step_input>()),
        ("ts_selection_stats", size_of::<ts_selection_stats>()),
        ("ts_tensor", size_of::<ts_tensor>()),
        ("ts_prefill_config", size_of::<ts_prefill_config>()),
        ("ts_pieces_info", size_of::<ts_pieces_info>()),
    ];
    let sizes: Vec<String> = sizes.iter().map(|(name, size)| format!("{name}={size}")).collect();
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../python");
    let given = std::env::var_os("PYTHONPATH")
        .into_iter()
        .flat_map(|all| std::env::split_paths(&all).collect::<Vec<_>>());
    let path = std::env::join_paths(given.chain([packages])).expect("no separator in these paths");
    let mut command = Command::new("python3");
    command.args(arguments).env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("TOKENSELECT_LIBRARY", shared_library()).env("TOKENSELECT_SIZES", sizes.join(","));
    command.output()
}
