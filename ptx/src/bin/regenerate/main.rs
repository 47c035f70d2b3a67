//! Regenerates and checks the PTX of the kernels. Run as `cargo ptx`.

mod check;
mod compile;
mod compiler;
mod error;
mod ptxas;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::compiler::Compiler;
use crate::error::{Error, Result};
use tokenselect_ptx::inspect::IsaVersion;

/// Regenerate the checked-in PTX from the Rust sources of the kernels.
#[derive(Debug, Parser)]
#[command(name = "cargo ptx", bin_name = "cargo ptx", version)]
pub(crate) struct Options {
    /// Change nothing: regenerate, compare with the checked-in files, assemble them, fail on spills and local memory
    #[arg(long)]
    check: bool,
    /// With --check: fail, rather than compare entry points alone, if the checked-in files are from another compiler
    #[arg(long, requires = "check")]
    require_same_compiler: bool,
    /// With --check: ptxas, or a folder that a CUDA toolkit or `pip install --target` put it in
    #[arg(long, value_name = "PATH", requires = "check")]
    ptxas: Option<PathBuf>,
    /// The rustup toolchain to try first
    #[arg(long, value_name = "NAME", default_value = "nightly")]
    toolchain: String,
    /// Where the distribution's compiler is installed, which is tried next
    #[arg(long, value_name = "PREFIX", default_value = "/usr")]
    distribution: PathBuf,
    /// The kernel crate
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels-gpu"))]
    kernels: PathBuf,
    /// Folder of the PTX files
    #[arg(long, value_name = "DIR", default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
    /// Folder for build outputs
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ptx"))]
    target_dir: PathBuf,
}

/// One of the PTX files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Architecture {
    /// Name of the file, of rustc's `target-cpu` and of `ptxas -arch`.
    name: &'static str,
    /// The lowest instruction set version that has all the instructions used: an older driver refuses a newer one.
    isa: IsaVersion,
}

/// `sm_80` needs 7.4 for `ld.global.L1::no_allocate`; `sm_90a` exists since 8.0.
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { name: "sm_80", isa: IsaVersion { major: 7, minor: 4 } },
    Architecture { name: "sm_90a", isa: IsaVersion { major: 8, minor: 0 } },
];

impl Architecture {
    fn file(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.ptx", self.name))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = if options.check { check::run(&options) } else { regenerate(&options) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn regenerate(options: &Options) -> Result<()> {
    let compiler = Compiler::find(options, None)?;
    eprintln!("compiler: {} ({})", compiler.version, compiler.origin);
    let texts = each_architecture(|architecture| compile::compile(&compiler, architecture, options))?;
    for (architecture, text) in ARCHITECTURES.into_iter().zip(texts) {
        let path = architecture.file(&options.out);
        let unchanged = std::fs::read_to_string(&path).is_ok_and(|old| old == text);
        if !unchanged {
            std::fs::write(&path, &text).map_err(|source| Error::Write { path: path.clone(), source })?;
        }
        let entries = tokenselect_ptx::inspect::entries(&text)?.len();
        let state = if unchanged { "unchanged" } else { "written" };
        println!("{}: {entries} entries, {} bytes, {state}", path.display(), text.len());
    }
    Ok(())
}

/// What `f` returns for each architecture, in their order; they are worked on at the same time.
fn each_architecture<T: Send>(f: impl Fn(Architecture) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads = ARCHITECTURES.map(|architecture| {
            let f = &f;
            scope.spawn(move || f(architecture))
        });
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.map(join).into_iter().collect()
    })
}
