//! The modules of the crate `tokenselect` lie in one order: each uses those declared above it in `host/src/lib.rs`, none
//! of them one below.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Names of the modules, in the order of their declarations.
fn declared(source: &Path) -> Vec<String> {
    let lib = fs::read_to_string(source.join("lib.rs")).unwrap();
    let name = |line: &str| Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_string());
    lib.lines().filter_map(name).collect()
}

/// The modules that a file uses: the words behind `crate::`, braces included.
fn used(text: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => names.push(word(rest)),
            Some(list) => {
                let list = &list[..list.find('}').unwrap_or(list.len())];
                names.extend(list.split(',').map(|item| word(item.trim())));
            }
        }
    }
    names
}

fn files(at: &Path, each: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(at).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            files(&entry, each);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            each(&entry);
        }
    }
}

/// Each use of a module by one that is not below it.
fn upward(source: &Path) -> Vec<String> {
    let order = declared(source);
    let place: HashMap<&str, usize> = order.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
    let mut wrong = Vec::new();
    files(source, &mut |path| {
        let relative = path.strip_prefix(source).unwrap();
        let name = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_string();
        let Some(&own) = place.get(name.as_str()) else {
            assert_eq!(name, "lib", "{} is not declared in lib.rs", relative.display());
            return;
        };
        let text = fs::read_to_string(path).unwrap();
        // Tests may use what they like; docs and macros name paths that are no uses.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        if relative.ends_with("tests.rs") {
            return;
        }
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for used in used(&code.collect::<Vec<_>>().join("\n")) {
            if place.get(used.as_str()).is_some_and(|&other| other > own) {
                wrong.push(format!("{} uses {used}", relative.display()));
            }
        }
    });
    wrong
}

#[test]
fn no_module_uses_one_below_it() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("host/src");
    let order = declared(&source);
    assert!(order.len() > 10, "declarations were not understood: {order:?}");
    assert_eq!(upward(&source), [""; 0]);
}

/// What is looked for is found: with the order turned round, every use is one of a module below.
#[test]
fn uses_are_found() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("a")).unwrap();
    fs::write(source.path().join("lib.rs"), "mod a;\nmod b;\nmod c;\n").unwrap();
    fs::write(source.path().join("a/mod.rs"), "use crate::b::B;\n//! [`crate::c`]\n").unwrap();
    fs::write(source.path().join("b.rs"), "use crate::{a::A, c::C};\n").unwrap();
    fs::write(source.path().join("c.rs"), "use crate::a::A;\n").unwrap();
    let mut found = upward(source.path());
    found.sort();
    assert_eq!(found, ["a/mod.rs uses b", "b.rs uses c"]);
}
