//! The assembler of the CUDA toolkit, which tells what a kernel costs: registers, shared memory, spills.

use std::path::{Path, PathBuf};
use std::process::Command;

use tokenselect_ptx::inspect::IsaVersion;

use crate::error::{Error, Result};
use crate::{File, Options};

/// What one entry uses, in registers a thread and in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    pub(crate) entry: String,
    pub(crate) registers: u32,
    pub(crate) static_shared: u32,
    pub(crate) stack: u32,
    pub(crate) spill_stores: u32,
    pub(crate) spill_loads: u32,
}

/// Where `ptxas` is below a folder: a toolkit, the packages of PyPI, or a Python environment that holds one.
const BELOW: [&str; 4] = ["ptxas", "bin/ptxas", "nvidia/cu13/bin/ptxas", "nvidia/cuda_nvcc/bin/ptxas"];

/// Where `cargo ptx` and its error text expect `pip install --target` to have put it.
const PIP_TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/nvcc");

/// `ptxas` as asked for, else on PATH, in `target/nvcc`, or in the toolkit's usual places.
pub(crate) fn find(options: &Options) -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> = match &options.ptxas {
        Some(path) if path.is_file() => return Ok(path.clone()),
        Some(path) => vec![path.clone()],
        None => std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect(),
    };
    if options.ptxas.is_none() {
        folders.push(PIP_TARGET.into());
        folders.extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from));
        folders.extend(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from));
    }
    let candidates = folders.iter().flat_map(|folder| BELOW.map(|below| folder.join(below)));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| Error::NoPtxas { asked: options.ptxas.clone(), tried: folders })
}

/// First line of interest of `ptxas --version`.
pub(crate) fn version(ptxas: &Path) -> Result<String> {
    let output = Command::new(ptxas).arg("--version").output();
    let output = output.map_err(|source| Error::Run { program: ptxas.to_path_buf(), source })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().find(|line| line.contains("release")).unwrap_or("unknown version").to_owned())
}

/// Assembles a text and returns what each entry uses, in alphabetical order.
pub(crate) fn assemble(ptxas: &Path, file: File, text: &str) -> Result<Vec<Usage>> {
    let (accepted, output) = run(ptxas, file, text)?;
    if accepted { Ok(usages(&output)) } else { Err(Error::Assemble { file: file.name, output }) }
}

/// The next lower instruction set version, if `ptxas` accepts the text under it as well.
pub(crate) fn lower_isa(ptxas: &Path, file: File, text: &str) -> Result<Option<IsaVersion>> {
    let isa = file.architecture.isa;
    let Some(lower) = next_lower(isa) else { return Ok(None) };
    let directive = |isa: IsaVersion| format!(".version {isa}\n");
    let lowered = text.replacen(&directive(isa), &directive(lower), 1);
    Ok(run(ptxas, file, &lowered)?.0.then_some(lower))
}

/// PTX 7 ended with 7.8.
fn next_lower(isa: IsaVersion) -> Option<IsaVersion> {
    match (isa.major, isa.minor) {
        (8, 0) => Some(IsaVersion { major: 7, minor: 8 }),
        (_, 0) => None,
        (major, minor) => Some(IsaVersion { major, minor: minor - 1 }),
    }
}

/// Whether `ptxas` accepts the text, and what it says.
fn run(ptxas: &Path, file: File, text: &str) -> Result<(bool, String)> {
    let folder = std::env::temp_dir();
    let unpacked = tempfile::Builder::new().suffix(".ptx").tempfile_in(&folder);
    let unpacked = unpacked.map_err(|source| Error::Write { path: folder, source })?;
    let unwritable = |source| Error::Write { path: unpacked.path().to_path_buf(), source };
    std::fs::write(unpacked.path(), text).map_err(unwritable)?;
    let mut command = Command::new(ptxas);
    command.args(["-v", "-arch", file.architecture.name, "-o", "/dev/null"]).arg(unpacked.path());
    let output = command.output().map_err(|source| Error::Run { program: ptxas.to_path_buf(), source })?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// Reads `ptxas -v`:
///
/// ```text
/// ptxas info    : Compiling entry function 'score' for 'sm_80'
/// ptxas info    : Function properties for score
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 72 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
/// ```
fn usages(output: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    // Properties of other functions come under `Function properties` alone; they belong to no entry.
    let mut current = None;
    for line in output.lines() {
        if let Some(entry) = quoted_after(line, "Compiling entry function ") {
            usages.push(Usage { entry: entry.to_owned(), ..Usage::default() });
        } else if let Some(function) = line.split("Function properties for ").nth(1) {
            current = usages.iter().position(|usage| usage.entry == function.trim());
        } else if let Some(usage) = current.and_then(|index| usages.get_mut(index)) {
            read_properties(line, usage);
        }
    }
    usages.sort_by(|a, b| a.entry.cmp(&b.entry));
    usages
}

fn read_properties(line: &str, usage: &mut Usage) {
    for item in line.split(',') {
        let item = item.trim().rsplit(": ").next().unwrap_or_default();
        let number = item.split_whitespace().find_map(|word| word.parse::<u32>().ok());
        let Some(number) = number else { continue };
        let field = match item {
            _ if item.ends_with(" registers") => &mut usage.registers,
            _ if item.ends_with(" bytes smem") => &mut usage.static_shared,
            _ if item.ends_with(" bytes stack frame") => &mut usage.stack,
            _ if item.ends_with(" bytes spill stores") => &mut usage.spill_stores,
            _ if item.ends_with(" bytes spill loads") => &mut usage.spill_loads,
            _ => continue,
        };
        *field = number;
    }
}

fn quoted_after<'a>(line: &'a str, prefix: &str) -> Option<&'a str> {
    line.split(prefix).nth(1)?.split('\'').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_each_entry_is_read() {
        let output = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'vote' for 'sm_80'\n\
            ptxas info    : Function properties for vote\n    \
            16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, \
            400 bytes cmem[0]\n\
            ptxas info    : Function properties for helper\n    \
            32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Compiling entry function 'pool' for 'sm_80'\n\
            ptxas info    : Function properties for pool\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 32 registers, used 0 barriers, 384 bytes cmem[0]\n\
            ptxas info    : Compile time = 25.020 ms\n";
        let pool = Usage { entry: "pool".to_owned(), registers: 32, ..Usage::default() };
        let vote = Usage {
            entry: "vote".to_owned(),
            registers: 255,
            static_shared: 1024,
            stack: 16,
            spill_stores: 8,
            spill_loads: 4,
        };
        assert_eq!(usages(output), [pool, vote]);
    }

    #[test]
    fn versions_below() {
        let isa = |major, minor| IsaVersion { major, minor };
        assert_eq!(next_lower(isa(8, 0)), Some(isa(7, 8)));
        assert_eq!(next_lower(isa(7, 4)), Some(isa(7, 3)));
        assert_eq!(next_lower(isa(7, 0)), None);
    }
}
