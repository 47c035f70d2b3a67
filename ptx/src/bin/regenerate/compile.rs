//! From the kernel crate to one PTX text, and how that is kept in a file.

use std::path::{Path, PathBuf};

use tokenselect_ptx::inspect::{self, Header, IsaVersion};
use tokenselect_ptx::{packed, source};

use crate::compiler::Compiler;
use crate::error::{Error, Result};
use crate::{Architecture, File, Options};

const TARGET: &str = "nvptx64-nvidia-cuda";

/// The cargo profile, given on the command line so that the workspace's own `release` does not matter.
const PROFILE: [&str; 9] = [
    "profile.ptx.inherits='release'",
    "profile.ptx.opt-level=3",
    "profile.ptx.lto='fat'",
    "profile.ptx.codegen-units=1",
    "profile.ptx.panic='abort'",
    "profile.ptx.debug=0",
    "profile.ptx.debug-assertions=false",
    "profile.ptx.overflow-checks=false",
    "profile.ptx.strip='none'",
];

/// Builds the kernels of a file and returns its text, header included. The same sources and compiler give the same text
/// wherever they are.
pub(crate) fn compile(compiler: &Compiler, file: File, options: &Options) -> Result<String> {
    let File { name, architecture: Architecture { name: target, isa }, features } = file;
    // One folder an architecture, whose files share `core`.
    let target_dir = absolute(&options.target_dir)?.join(target);
    let flags = [
        format!("-Ctarget-cpu={target}"),
        format!("-Ctarget-feature=+ptx{}{}", isa.major, isa.minor),
        // There is nothing to link: the PTX is the assembly.
        "-Clinker=/bin/true".to_owned(),
        // Neither pass knows of convergence: asked twice whether a thread belongs to a group, with a barrier in between,
        // they give each answer a barrier of its own, and a warp whose lanes disagree waits for ever.
        "-Zmir-enable-passes=-JumpThreading".to_owned(),
        "-Cllvm-args=-jump-threading-threshold=0".to_owned(),
        // Arrays of fragments stay in registers only if every loop over them is unrolled, whatever its size.
        "-Cllvm-args=-unroll-threshold=3000".to_owned(),
        // A kernel is one function: the assembler knows nothing of what a call needs.
        "-Cllvm-args=-inline-threshold=1000000".to_owned(),
        // Others are left as they are: a kernel of a few microseconds spends them on fetching its code.
        "-Cllvm-args=-unroll-runtime=false".to_owned(),
        "-Cllvm-args=-unroll-allow-partial=false".to_owned(),
        // Without it, panic messages carry the paths of this machine.
        "-Zlocation-detail=none".to_owned(),
    ];
    let mut command = compiler.cargo();
    command.current_dir(&options.kernels);
    command.args(["rustc", "--lib", "--crate-type", "cdylib", "--target", TARGET, "-Zbuild-std=core"]);
    command
        .args(["--profile", "ptx", "--features", &["kernels", features].join(",")])
        .arg("--target-dir")
        .arg(&target_dir);
    for setting in PROFILE {
        command.args(["--config", setting]);
    }
    command.args(["--", "--emit=asm"]);
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    // What is there after the build is from this build: cargo finds no library (nothing is linked) and always builds anew.
    let outputs = target_dir.join(TARGET);
    for old in assembly_files(&outputs)? {
        std::fs::remove_file(&old).map_err(|source| Error::Write { path: old, source })?;
    }
    let run = |source| Error::Run { program: compiler.cargo_path().to_path_buf(), source };
    let status = command.status().map_err(run)?;
    if !status.success() {
        return Err(Error::Build { file: name, status, compiler: compiler.version.clone() });
    }
    let found = assembly_files(&outputs)?;
    let [assembly] = found.as_slice() else {
        return Err(Error::Output { file: name, folder: outputs, found: found.len() });
    };
    check_inputs(&assembly.with_extension("d"), name, &options.kernels)?;
    let body = local_labels(&tidy(&bound_launches(&read(assembly)?)));
    let got = IsaVersion::of(&body)?;
    if got != isa {
        return Err(Error::IsaVersion { file: name, expected: isa.to_string(), got: got.to_string() });
    }
    if let Some(function) = inspect::functions(&body).next() {
        return Err(Error::Function { file: name, function: function.to_owned() });
    }
    let header = Header {
        architecture: target.to_owned(),
        compiler: compiler.version.clone(),
        sources: source::hash(&options.kernels)?,
    };
    Ok(format!("{header}\n{body}"))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

/// The text of a file as it is checked in.
pub(crate) fn read_packed(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).and_then(|bytes| packed::unpack(&bytes));
    bytes.map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

/// Packs a text into a file.
pub(crate) fn write_packed(path: &Path, text: &str) -> Result<usize> {
    let written = packed::pack(text).and_then(|bytes| std::fs::write(path, &bytes).map(|()| bytes.len()));
    written.map_err(|source| Error::Write { path: path.to_path_buf(), source })
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

/// All `.s` files below `folder`: cargo's layout of build outputs differs from version to version.
fn assembly_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |source| Error::Read { path: folder.to_path_buf(), source };
    let mut found = Vec::new();
    if !folder.exists() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() {
            found.append(&mut assembly_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "s") {
            found.push(path);
        }
    }
    Ok(found)
}

/// The source hash speaks for the PTX only if it covers every file that the compiler read.
fn check_inputs(dep_info: &Path, file: &'static str, kernels: &Path) -> Result<()> {
    let hashed = source::files(kernels)?;
    match unhashed_input(&read(dep_info)?, &hashed) {
        Some(input) => Err(Error::Input {
            file,
            input,
            why: "which the source hash does not cover: move it below src/, or take it off `source::HOST_ONLY`",
        }),
        None => Ok(()),
    }
}

/// A file that make-style dependencies list and `hashed` does not. The lists have no common root: rustc's is relative to
/// the workspace, wherever that is.
fn unhashed_input(dep_info: &str, hashed: &[String]) -> Option<String> {
    // After the rules, rustc lists each input again as a rule of its own, `path:`.
    let inputs = dep_info.lines().filter_map(|line| line.strip_suffix(':'));
    let covered = |input: &str| {
        hashed.iter().any(|name| {
            input.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        })
    };
    inputs.map(|input| input.replace('\\', "/")).find(|input| !covered(input))
}

/// The comment that `simt::thread::launch_bounds` leaves in an entry, as directives at the entry's head: rustc has no
/// attribute for them.
fn bound_launches(text: &str) -> String {
    let mut bounded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find(".entry") {
        let (before, entry) = rest.split_at(begin);
        bounded.push_str(before);
        let end = entry[1..].find(".entry").map_or(entry.len(), |next| next + 1);
        let (entry, others) = entry.split_at(end);
        let marker = entry.lines().find_map(|line| line.trim().strip_prefix("// launch_bounds "));
        match (marker.and_then(|bounds| bounds.split_once(' ')), entry.split_once("\n{")) {
            (Some((threads, blocks)), Some((head, body))) => {
                bounded
                    .push_str(&format!("{head}\n.maxntid {threads}, 1, 1\n.minnctapersm {blocks}\n{{{body}"));
            }
            _ => bounded.push_str(entry),
        }
        rest = others;
    }
    bounded.push_str(rest);
    bounded
}

/// The compiler's text without comments (two lines for each inline instruction) and runs of empty lines.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    let mut lines =
        text.lines().map(str::trim_end).filter(|line| !line.trim_start().starts_with("//")).peekable();
    while lines.next_if(|line| line.is_empty()).is_some() {}
    while let Some(line) = lines.next() {
        let followed_by_empty = lines.peek().is_none_or(|next| next.is_empty());
        if !(line.is_empty() && followed_by_empty) {
            tidied.push_str(line);
            tidied.push('\n');
        }
    }
    tidied
}

/// Labels without the number of their function, outside of which they are not seen: an entry's text is then the same
/// whatever other entries there are, and equal code looks equal to what packs it.
fn local_labels(text: &str) -> String {
    const LABEL: &str = "$L__BB";
    let mut renamed = String::with_capacity(text.len());
    let mut parts = text.split(LABEL);
    renamed.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let function = part.bytes().take_while(u8::is_ascii_digit).count();
        renamed.push_str(LABEL);
        renamed.push_str(if part[function..].starts_with('_') { &part[function..] } else { part });
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_lose_the_number_of_their_function() {
        let text = "$L__BB12_3:\n\t@%p1 bra \t$L__BB12_3;\n\tbra.uni $L__BB0_10;\n";
        assert_eq!(local_labels(text), "$L__BB_3:\n\t@%p1 bra \t$L__BB_3;\n\tbra.uni $L__BB_10;\n");
        assert_eq!(local_labels("ret;\n"), "ret;\n");
    }

    #[test]
    fn tidy_drops_comments_and_runs_of_empty_lines() {
        let text = "//\n// Generated\n//\n\n.version 7.4\n\n\n\t// .globl\tf\n\nf:  \n\t// begin inline asm\n\tbar;\n\n\n";
        assert_eq!(tidy(text), ".version 7.4\n\nf:\n\tbar;\n");
    }

    #[test]
    fn launch_bounds_move_to_the_head_of_their_entry() {
        let text = "a\n.visible .entry f(\n)\n{\n\tret;\n}\n.visible .entry g(\n)\n{\n\t// launch_bounds 128 3\n\tret;\n}\n";
        let bounded = "a\n.visible .entry f(\n)\n{\n\tret;\n}\n.visible .entry g(\n)\n.maxntid 128, 1, 1\n.minnctapersm 3\n{\n\tret;\n}\n";
        assert_eq!(tidy(&bound_launches(text)), bounded);
    }

    #[test]
    fn inputs_outside_the_hash_are_found() {
        let hashed = ["Cargo.toml".to_owned(), "src/lib.rs".to_owned(), "src/simt/mod.rs".to_owned()];
        let rules = "/t/k.s: k/src/lib.rs k/src/simt/mod.rs\n\nk/src/lib.rs:\nk/src/simt/mod.rs:\n";
        assert_eq!(unhashed_input(rules, &hashed), None);
        let rules = format!("{rules}k/src/emu/mod.rs:\n");
        assert_eq!(unhashed_input(&rules, &hashed).as_deref(), Some("k/src/emu/mod.rs"));
        assert_eq!(unhashed_input("k/xsrc/lib.rs:\n", &hashed).as_deref(), Some("k/xsrc/lib.rs"));
    }
}
