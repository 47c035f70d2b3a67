//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use tokenselect_ptx::inspect::InspectError;
use tokenselect_ptx::source::SourceError;

use crate::check::Problem;

pub(crate) type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no compiler found that can build the kernels\n  rustup: {rustup}\n  distribution: {distribution}\n\
         install one of\n  rustup toolchain install {toolchain} --profile minimal --component rust-src\n  \
         apt-get install rustc-web cargo-web rust-web-src    (Debian 12)"
    )]
    NoCompiler { rustup: String, distribution: String, toolchain: String },
    #[error(
        "no ptxas found{}; looked at {}\ninstall it without a CUDA toolkit:\n  \
         pip install --target target/nvcc nvidia-cuda-nvcc==13.0.88",
        .asked.as_ref().map(|path| format!(" at {}", path.display())).unwrap_or_default(), list(.tried)
    )]
    NoPtxas { asked: Option<PathBuf>, tried: Vec<PathBuf> },
    #[error("cannot run {}: {source}", .program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("{file}: building the kernels failed ({status}), compiler {compiler}")]
    Build { file: &'static str, status: ExitStatus, compiler: String },
    #[error("{file}: one assembly file expected below {}, found {found}; remove that folder and try again",
        .folder.display())]
    Output { file: &'static str, folder: PathBuf, found: usize },
    #[error("{file}: the compiler read `{input}`, {why}")]
    Input { file: &'static str, input: String, why: &'static str },
    #[error("{file}: the compiler wrote PTX {got}, asked for {expected}")]
    IsaVersion { file: &'static str, expected: String, got: String },
    #[error(
        "{file}: there is a function `{function}` beside the entry points: it was not inlined, or a check can panic"
    )]
    Function { file: &'static str, function: String },
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{file}: ptxas refuses the PTX\n{output}")]
    Assemble { file: &'static str, output: String },
    #[error("{} found by the check, `cargo ptx` regenerates the files:{}", count(.0.len()), lines(.0))]
    Check(Vec<Problem>),
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Source(#[from] SourceError),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn count(problems: usize) -> String {
    if problems == 1 { "1 problem".to_owned() } else { format!("{problems} problems") }
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}
