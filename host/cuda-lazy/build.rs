//! Satisfies the `-lcuda` that the build scripts of `cust` and `cust_raw` ask for with an archive that is empty: the
//! functions themselves are defined in this crate. Linkers that take no archive for a shared library (zig's) find a script
//! that names it.

use std::env;
use std::io;
use std::path::PathBuf;

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Ok(());
    }
    let out =
        env::var_os("OUT_DIR").map(PathBuf::from).ok_or_else(|| io::Error::other("OUT_DIR is not set"))?;
    std::fs::write(out.join("libcuda.a"), "!<arch>\n")?;
    std::fs::write(out.join("libcuda.so"), "INPUT(libcuda.a)\n")?;
    println!("cargo::rustc-link-search=native={}", out.display());
    Ok(())
}
