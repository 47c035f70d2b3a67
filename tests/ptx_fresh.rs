//! The checked-in PTX belongs to the kernel sources: no toolchain needed to notice that it does not.

use std::collections::BTreeMap;
use std::path::Path;

use tokenselect_kernels::conformance;
use tokenselect_kernels::entries::{ENTRIES, Entry};
use tokenselect_ptx::{ALL, inspect, source};

#[test]
fn made_from_these_sources() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels-gpu");
    let current = source::hash(&kernels).expect("kernel sources");
    for ptx in ALL {
        for text in [ptx.text(), ptx.conformance_text()] {
            let header = inspect::Header::parse(text).expect("header");
            assert_eq!(header.architecture, ptx.name);
            assert_eq!(header.sources, current, "{} is out of date: run `cargo ptx`", ptx.name);
        }
    }
}

#[test]
fn entries_and_parameters_are_those_of_the_table() {
    let parameters = |table: &'static [Entry]| -> BTreeMap<&str, Vec<usize>> {
        table.iter().map(|entry| (entry.name, vec![entry.param_bytes])).collect()
    };
    for ptx in ALL {
        for (table, text) in
            [(&ENTRIES[..], ptx.text()), (&conformance::entries::ENTRIES[..], ptx.conformance_text())]
        {
            let entries = inspect::entries(text).expect("entries");
            let found: BTreeMap<&str, Vec<usize>> =
                entries.iter().map(|entry| (entry.name, entry.param_bytes.clone())).collect();
            assert_eq!(found, parameters(table), "{}", ptx.name);
        }
    }
}

/// A compiler pass that does not know of convergence may give each side of a branch its own copy of a barrier between
/// two tests of the same condition; a warp whose lanes disagree then waits for ever. `pool` has such tests.
#[test]
fn barriers_are_not_duplicated() {
    for ptx in ALL {
        let entries = inspect::entries(ptx.text()).expect("entries");
        // `pool`: two in the mean, one behind it, two in the products, one at the start of `is_last_block`.
        for (op, expected) in [("pool", (6, 1)), ("append_pool", (1, 0))] {
            for name in [format!("{op}_f16"), format!("{op}_bf16")] {
                let entry = entries.iter().find(|entry| entry.name == name).expect("an entry");
                let barriers =
                    entry.text.matches("bar.sync").count() + entry.text.matches("barrier.sync").count();
                let reductions = entry.text.matches("bar.red").count();
                assert_eq!((barriers, reductions), expected, "{name} for {}", ptx.name);
            }
        }
    }
}
