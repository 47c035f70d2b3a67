//! The checked-in files.

use std::collections::BTreeSet;

use tokenselect_ptx::inspect::{Header, IsaVersion, entries, functions};
use tokenselect_ptx::{ALL, Ptx, SM_80, SM_90A, for_compute_capability};

/// All texts, with the architecture of each.
fn texts() -> impl Iterator<Item = (&'static Ptx, &'static str)> {
    ALL.into_iter().flat_map(|ptx| [(ptx, ptx.text()), (ptx, ptx.conformance_text())])
}

#[test]
fn each_compute_capability_gets_what_it_can_run() {
    for (major, minor) in [(0, 0), (6, 1), (7, 5), (7, 9)] {
        assert!(for_compute_capability(major, minor).is_none(), "{major}.{minor}");
    }
    for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 1), (10, 0), (10, 3), (12, 0), (12, 1), (99, 0)] {
        let ptx = for_compute_capability(major, minor).expect("8.0 or newer");
        assert!(std::ptr::eq(ptx, &SM_80), "{major}.{minor}: {ptx:?}");
    }
    assert!(for_compute_capability(9, 0).is_some_and(|ptx| std::ptr::eq(ptx, &SM_90A)));
}

#[test]
fn headers_name_the_architecture() {
    let sources = Header::parse(SM_80.text()).expect("header").sources;
    for (ptx, text) in texts() {
        let header = Header::parse(text).expect("header");
        assert_eq!(header.architecture, ptx.name);
        assert!(header.compiler.starts_with("rustc "), "{}", header.compiler);
        assert!(header.sources.starts_with("sha256:"), "{}", header.sources);
        assert_eq!(header.sources, sources, "{}", ptx.name);
        assert!(text.contains(&format!("\n.target {}\n", ptx.name)), "{}", ptx.name);
    }
}

#[test]
fn instruction_sets_are_those_of_the_oldest_driver_named() {
    for (ptx, text) in texts() {
        let expected = if ptx.name == "sm_80" { "7.4" } else { "8.0" };
        assert_eq!(IsaVersion::of(text).expect("version").to_string(), expected, "{}", ptx.name);
    }
}

#[test]
fn both_architectures_have_the_same_entries_and_nothing_calls() {
    let names = |text| {
        let entries = entries(text).expect("readable");
        let entries: BTreeSet<_> =
            entries.iter().map(|entry| (entry.name.to_owned(), entry.param_bytes.clone())).collect();
        entries
    };
    assert_eq!(names(SM_80.text()), names(SM_90A.text()));
    assert_eq!(names(SM_80.conformance_text()), names(SM_90A.conformance_text()));
    assert!(names(SM_80.text()).is_disjoint(&names(SM_80.conformance_text())));
    for (ptx, text) in texts() {
        assert_eq!(functions(text).next(), None, "{}", ptx.name);
    }
}

#[test]
fn entries_are_modules_of_their_own() {
    for (ptx, whole) in texts() {
        let all = entries(whole).expect("readable");
        // Outside of entries there is the header, which comes first, and nothing else.
        let header = &whole[..whole.find(".visible .entry").expect("an entry")];
        let parts: usize = all.iter().map(|entry| entry.text.len()).sum();
        let between = whole.bytes().filter(|&byte| byte == b'\n').count()
            - header.matches('\n').count()
            - all.iter().map(|entry| entry.text.matches('\n').count()).sum::<usize>();
        assert_eq!(whole.len(), header.len() + parts + between, "{}", ptx.name);
        for directive in [".version", ".target", ".address_size", ".extern .shared"] {
            assert!(header.contains(&format!("\n{directive} ")), "{directive}");
        }
        for entry in all {
            let text = ptx.entry_text(entry.name).expect("an entry");
            assert_eq!(text, format!("{header}{}\n", entry.text), "{} for {}", entry.name, ptx.name);
        }
        assert_eq!(ptx.entry_text("pool"), None);
        assert_eq!(ptx.entry_text(""), None);
    }
}

#[test]
fn files_do_not_tell_where_they_were_made() {
    for (ptx, text) in texts() {
        for trace in ["/home", "/root", "/tmp", "/usr", ".cargo", ".rs"] {
            assert!(!text.contains(trace), "{}: {trace}", ptx.name);
        }
    }
}
