//! The checked-in files.

use std::collections::BTreeSet;

use tokenselect_ptx::inspect::{Header, IsaVersion, entries};
use tokenselect_ptx::{ALL, SM_80, SM_90A, for_compute_capability};

#[test]
fn each_compute_capability_gets_what_it_can_run() {
    for (major, minor) in [(0, 0), (6, 1), (7, 5), (7, 9)] {
        assert_eq!(for_compute_capability(major, minor), None, "{major}.{minor}");
    }
    for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 1), (10, 0), (10, 3), (12, 0), (12, 1), (99, 0)] {
        assert_eq!(for_compute_capability(major, minor), Some(SM_80), "{major}.{minor}");
    }
    assert_eq!(for_compute_capability(9, 0), Some(SM_90A));
}

#[test]
fn headers_name_the_architecture() {
    for ptx in ALL {
        let header = Header::parse(ptx.text).expect("header");
        assert_eq!(header.architecture, ptx.name);
        assert!(header.compiler.starts_with("rustc "), "{}", header.compiler);
        assert!(header.sources.starts_with("sha256:"), "{}", header.sources);
        assert!(ptx.text.contains(&format!("\n.target {}\n", ptx.name)), "{}", ptx.name);
    }
    assert_eq!(
        Header::parse(SM_80.text).map(|header| header.sources),
        Header::parse(SM_90A.text).map(|header| header.sources)
    );
}

#[test]
fn instruction_sets_are_those_of_the_oldest_driver_named() {
    assert_eq!(IsaVersion::of(SM_80.text).expect("version").to_string(), "7.4");
    assert_eq!(IsaVersion::of(SM_90A.text).expect("version").to_string(), "8.0");
}

#[test]
fn both_files_have_the_same_entries_and_nothing_calls() {
    let names = |text| {
        let entries = entries(text).expect("readable");
        let entries: BTreeSet<_> =
            entries.iter().map(|entry| (entry.name.to_owned(), entry.param_bytes.clone())).collect();
        entries
    };
    assert_eq!(names(SM_80.text), names(SM_90A.text));
    for ptx in ALL {
        assert!(
            !ptx.text.contains(".func"),
            "{}: a function was not inlined, or a check can panic",
            ptx.name
        );
    }
}

#[test]
fn entries_are_modules_of_their_own() {
    for ptx in ALL {
        let all = entries(ptx.text).expect("readable");
        // Outside of entries there is the header, which comes first, and nothing else.
        let header = &ptx.text[..ptx.text.find(".visible .entry").expect("an entry")];
        let parts: usize = all.iter().map(|entry| entry.text.len()).sum();
        let between = ptx.text.bytes().filter(|&byte| byte == b'\n').count()
            - header.matches('\n').count()
            - all.iter().map(|entry| entry.text.matches('\n').count()).sum::<usize>();
        assert_eq!(ptx.text.len(), header.len() + parts + between, "{}", ptx.name);
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
    for ptx in ALL {
        for trace in ["/home", "/root", "/tmp", "/usr", ".cargo", ".rs"] {
            assert!(!ptx.text.contains(trace), "{}: {trace}", ptx.name);
        }
    }
}
