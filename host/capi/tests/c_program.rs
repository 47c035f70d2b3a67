//! Compiles `c/decode.c` against the header and the libraries and runs it; compiles the header as C++, and the README's C.
//! Skipped, loudly, where there is no compiler.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{announce, shared_library};

const EXPECTED: &str = "\
device cpu
8 tokens, 8 selected: 0 1 2 3 4 5 6 7
";

/// The C program, with the shared library and with the static one.
#[test]
fn c() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/decode.c");
    let flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];
    for (name, link) in [("decode_shared", shared()), ("decode_static", archive())] {
        let Some(program) = compile("cc", &flags, &source, (name, &link)) else { return };
        let text = run(&program);
        let version = concat!("tokenselect ", env!("CARGO_PKG_VERSION"), "\n");
        assert!(text.starts_with(&format!("{version}{EXPECTED}")), "{text}");
        assert!(text.ends_with("error: out of pages: 250 needed, 11 free\ndone\n"), "{text}");
    }
}

/// The header alone: the program is C99.
#[test]
fn cpp() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("header.cpp");
    std::fs::write(&source, "#include \"tokenselect.h\"\nint main() { return ts_abi_version() == 0; }\n")
        .unwrap();
    let flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];
    if let Some(program) = compile("c++", &flags, &source, ("header", &shared())) {
        run(&program);
    }
}

/// What the README shows of C, in one file, as C99.
#[test]
fn readme() {
    let text = include_str!("../README.md");
    let blocks: Vec<&str> =
        text.split("```c\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(blocks.len(), 2);
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readme.c");
    std::fs::write(&source, blocks.concat()).unwrap();
    let flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c"];
    compile("cc", &flags, &source, ("readme.o", &[]));
}

/// What the shared library exports: this interface and nothing else, in particular no function of the CUDA driver.
#[test]
fn exports() {
    let Ok(listed) = Command::new("nm").args(["-D", "--defined-only"]).arg(shared_library()).output() else {
        return announce("SKIPPED: exports: no `nm`");
    };
    let text = output_of("nm", &listed);
    let names: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert!(names.contains(&"ts_step"), "{names:?}");
    let others: Vec<_> = names.iter().filter(|name| !name.starts_with("ts_")).collect();
    assert!(others.iter().all(|name| name.starts_with("rust_eh_")), "{others:?}");
}

/// What the linker is told to use the shared library.
fn shared() -> Vec<String> {
    let library = shared_library();
    let folder = library.parent().expect("a file is in a folder").display();
    vec![format!("-L{folder}"), "-ltokenselect_c".into(), format!("-Wl,-rpath,{folder}")]
}

/// What the linker is told to use the archive that is built with the shared library.
fn archive() -> Vec<String> {
    let archive = shared_library().with_extension("a");
    [&archive.display().to_string(), "-lpthread", "-ldl", "-lm"].map(str::to_owned).to_vec()
}

/// The program made of a source; `None` where there is no such compiler.
fn compile(
    compiler: &str,
    flags: &[&str],
    source: &Path,
    (name, link): (&str, &[String]),
) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut command = Command::new(compiler);
    command.args(flags).arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"));
    command.arg(source).arg("-o").arg(&program).args(link);
    match command.output() {
        Ok(output) => {
            output_of(compiler, &output);
            Some(program)
        }
        Err(error) => {
            announce(&format!("SKIPPED: {name}: no compiler `{compiler}`: {error}"));
            None
        }
    }
}

fn run(program: &Path) -> String {
    // The test's own library path names folders of cargo's, which may hold an older library.
    let output = Command::new(program).env_remove("LD_LIBRARY_PATH").output().expect("the program was made");
    output_of(&program.display().to_string(), &output)
}

/// What a command printed, if it succeeded.
fn output_of(what: &str, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
