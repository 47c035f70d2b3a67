//! The checked-in header is what cbindgen makes of the sources. `TOKENSELECT_WRITE_HEADER=1` writes it.

use std::path::Path;

#[test]
fn header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = sources(root).into_iter().fold(cbindgen::Builder::new(), cbindgen::Builder::with_src);
    let mut text = Vec::new();
    bindings.with_config(config).generate().expect("the sources parse").write(&mut text);
    let text = String::from_utf8(text).expect("a header is text");
    // Rust's heading for what a caller promises says little in C.
    let text = text.replace("/// # Safety\n", "/// Promised by the caller:\n");
    let path = root.join("include/tokenselect.h");
    if std::env::var_os("TOKENSELECT_WRITE_HEADER").is_some() {
        std::fs::write(&path, &text).expect("the header can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let again = "TOKENSELECT_WRITE_HEADER=1 cargo test -p tokenselect-capi --test header";
    let differs = found.lines().zip(text.lines()).find(|(found, made)| found != made);
    assert!(found == text, "{} is stale; `{again}` writes it. First difference: {differs:?}", path.display());
}

/// The modules, in the order of the header.
fn sources(root: &Path) -> Vec<std::path::PathBuf> {
    let modules = [
        "version",
        "status",
        "device",
        "config",
        "context",
        "kv",
        "batch",
        "ops",
        "selection_cache",
        "cache",
        "prefill",
        "graph",
    ];
    let path = |module: &&str| root.join("src").join(module).with_extension("rs");
    let entries = std::fs::read_dir(root.join("src")).expect("the sources are there");
    for entry in entries.map(|entry| entry.expect("a folder can be read").path()) {
        let known = modules.iter().chain(&["lib", "pointers", "sized"]).any(|module| path(module) == entry);
        assert!(known, "{} is neither in the header nor known to have nothing for it", entry.display());
    }
    modules.iter().map(path).collect()
}
