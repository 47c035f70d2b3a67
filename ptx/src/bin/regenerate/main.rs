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
    /// Only write the text of the checked-in files to this folder, to be read
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    text: Option<PathBuf>,
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
    /// Folder of the packed PTX files
    #[arg(long, value_name = "DIR", default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
    /// Folder for build outputs
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ptx"))]
    target_dir: PathBuf,
}

/// What kernels are compiled for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Architecture {
    /// Name of rustc's `target-cpu` and of `ptxas -arch`.
    name: &'static str,
    /// The lowest instruction set version that has all the instructions used: an older driver refuses a newer one.
    isa: IsaVersion,
}

/// `sm_80` needs 7.4 for `ld.global.L1::no_allocate`; `sm_90a` exists since 8.0.
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { name: "sm_80", isa: IsaVersion { major: 7, minor: 4 } },
    Architecture { name: "sm_90a", isa: IsaVersion { major: 8, minor: 0 } },
];

/// One of the PTX files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct File {
    /// Its name, without extensions.
    name: &'static str,
    architecture: Architecture,
    /// Features of the kernel crate: which kernels it has.
    features: &'static str,
}

/// For each architecture the kernels of all operations, and those that only tests and benchmarks launch.
const FILES: [File; 4] = [
    File { name: "sm_80", architecture: ARCHITECTURES[0], features: "" },
    File { name: "conformance_sm_80", architecture: ARCHITECTURES[0], features: "conformance" },
    File { name: "sm_90a", architecture: ARCHITECTURES[1], features: "" },
    File { name: "conformance_sm_90a", architecture: ARCHITECTURES[1], features: "conformance" },
];

impl File {
    /// Where it is checked in.
    fn path(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.ptx.lz", self.name))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.text {
        Some(folder) => write_texts(&options, folder),
        None if options.check => check::run(&options),
        None => regenerate(&options),
    };
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
    let texts = each_file(|file| compile::compile(&compiler, file, options))?;
    for (file, text) in FILES.into_iter().zip(texts) {
        let path = file.path(&options.out);
        let unchanged = compile::read_packed(&path).is_ok_and(|old| old == text);
        let state = if unchanged {
            "unchanged".to_owned()
        } else {
            format!("written, {} bytes packed", compile::write_packed(&path, &text)?)
        };
        let entries = tokenselect_ptx::inspect::entries(&text)?.len();
        println!("{}: {entries} entries, {} bytes, {state}", path.display(), text.len());
    }
    Ok(())
}

fn write_texts(options: &Options, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.to_path_buf(), source })?;
    for file in FILES {
        let text = compile::read_packed(&file.path(&options.out))?;
        let path = folder.join(format!("{}.ptx", file.name));
        std::fs::write(&path, text).map_err(|source| Error::Write { path: path.clone(), source })?;
        println!("{}", path.display());
    }
    Ok(())
}

/// What `f` returns for each file, in their order. Architectures are worked on at the same time, the files of one after each
/// other.
fn each_file<T: Send>(f: impl Fn(File) -> Result<T> + Sync) -> Result<Vec<T>> {
    let of_architecture = |architecture: Architecture| {
        let files = FILES.into_iter().filter(|file| file.architecture.name == architecture.name);
        files.map(&f).collect::<Result<Vec<T>>>()
    };
    std::thread::scope(|scope| {
        let threads = ARCHITECTURES.map(|architecture| scope.spawn(move || of_architecture(architecture)));
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let all: Vec<Result<Vec<T>>> = threads.map(join).into();
        Ok(all.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    })
}
