//! Where the tests' shared libraries are, and what a binary shows to the dynamic linker.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn, FileHeader};
use object::{Endianness, Object, ObjectSymbol};

/// The shared library built from `examples/<name>.rs`.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("path of the test");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    let library = profile.join("examples").join(format!("lib{name}.so"));
    assert!(library.is_file(), "{} is missing: build it with `cargo build --examples`", library.display());
    library
}

/// Names of the driver functions in the dynamic symbol table, defined or asked for.
pub fn dynamic_driver_symbols(binary: &Path) -> Vec<String> {
    let bytes = std::fs::read(binary).expect("read the binary");
    let file = object::File::parse(&*bytes).expect("parse the binary");
    let names = file.dynamic_symbols().filter_map(|symbol| symbol.name().ok().map(str::to_owned));
    names.filter(|name| tokenselect_cuda_lazy::symbols().contains(&name.as_str())).collect()
}

/// Libraries that the binary makes the dynamic linker load.
pub fn needed(binary: &Path) -> Vec<String> {
    let bytes = std::fs::read(binary).expect("read the binary");
    let header = FileHeader64::<Endianness>::parse(&*bytes).expect("ELF header");
    let endian = header.endian().expect("byte order");
    let sections = header.sections(endian, &*bytes).expect("sections");
    let (entries, strings) = sections.dynamic(endian, &*bytes).expect("dynamic section").expect("is dynamic");
    let strings = sections.strings(endian, &*bytes, strings).expect("dynamic strings");
    let needed = entries.iter().filter(|entry| entry.tag32(endian) == Some(DT_NEEDED));
    needed
        .map(|entry| String::from_utf8_lossy(entry.string(endian, strings).expect("name")).into_owned())
        .collect()
}
