//! Examples, run as processes. `cargo test` builds them; `cargo test --test NAME` alone does not.

use std::process::{Command, Output};

/// An example of the profile that this test has.
pub fn command(name: &str) -> Command {
    let test = std::env::current_exe().expect("path of this test");
    let profile = test.ancestors().nth(2).expect("target/<profile>/deps");
    let example = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(example.is_file(), "no {}: run `cargo build --example {name}` first", example.display());
    Command::new(example)
}

/// Runs an example.
pub fn run<'a>(name: &str, args: impl IntoIterator<Item = &'a str>) -> Output {
    command(name).args(args).output().expect("the example starts")
}

/// An example that must fail with exit code 1 and one line on stderr that holds all of `words`.
pub fn assert_fails(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert!(stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no `{word}` in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}
