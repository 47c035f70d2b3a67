//! Links the system's unwinder, which CPython ends threads by (`pthread_exit`). Zig's linker would take one of LLVM's into the module, and
//! Rust's frames would then be unwound by two unwinders that do not know each other's state: a thread that is in a long call when the
//! interpreter ends crashed the process.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let found = Command::new("cc").arg("-print-file-name=libgcc_s.so.1").output();
    let path =
        found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    // Without a compiler, or where it does not know the library, the linker does what it does.
    if path.starts_with('/') {
        println!("cargo::rustc-cdylib-link-arg={path}");
    }
}
