//! Entries are found by their values, and names follow from these.

extern crate std;

use std::format;
use std::string::ToString;
use std::vec::Vec;

use super::*;

const TYPES: [ElementType; 2] = [ElementType::F16, ElementType::Bf16];

/// All values that a host may ask for, and some that it may not.
fn keys() -> impl Iterator<Item = Key> {
    let dtypes = [None, Some(ElementType::F16), Some(ElementType::Bf16)];
    let head_dims = [None, Some(64), Some(80), Some(96), Some(128), Some(256)];
    let columns = [None, Some(4), Some(8), Some(16), Some(32)];
    let rotations =
        [Rotation::Native, Rotation::HalfSplit, Rotation::Interleaved, Rotation::AnyPairs].map(Some);
    dtypes.into_iter().flat_map(move |dtype| {
        head_dims.into_iter().flat_map(move |head_dim| {
            columns.into_iter().flat_map(move |columns| {
                rotations.into_iter().chain([None]).map(move |rotation| Key {
                    dtype,
                    head_dim,
                    columns,
                    rotation,
                })
            })
        })
    })
}

#[test]
fn an_entry_is_found_by_its_values_and_by_no_others() {
    for entry in &ENTRIES {
        let mut times = 0;
        for key in keys() {
            let found = Entry::find(entry.op, key).is_ok_and(|found| found.index == entry.index);
            assert_eq!(found, key == entry.key, "{} for {key:?}", entry.name);
            times += u32::from(found);
        }
        assert_eq!(times, 1, "{}", entry.name);
    }
}

#[test]
fn names_are_unique_and_say_the_values() {
    for (i, entry) in ENTRIES.iter().enumerate() {
        assert_eq!(entry.index, i);
        assert_eq!(Entry::named(entry.name).map(|entry| entry.index), Some(i), "{}", entry.name);
        let parts: Vec<&str> = entry.name.split('_').collect();
        let says = |part: &str| parts.contains(&part);
        for dtype in TYPES {
            assert_eq!(says(dtype.name()), entry.key.dtype == Some(dtype), "{}", entry.name);
        }
        for size in [4, 8, 16, 64, 96, 128, 256] {
            assert_eq!(says(&format!("d{size}")), entry.key.head_dim == Some(size), "{}", entry.name);
            assert_eq!(says(&format!("g{size}")), entry.key.columns == Some(size), "{}", entry.name);
        }
        for (suffix, rotation) in [
            ("_half_split", Rotation::HalfSplit),
            ("_interleaved", Rotation::Interleaved),
            ("_any_pairs", Rotation::AnyPairs),
        ] {
            let ends = entry.name.ends_with(suffix);
            assert_eq!(ends, entry.key.rotation == Some(rotation), "{}", entry.name);
        }
        let op = format!("{:?}", entry.op).to_lowercase();
        assert!(entry.name.replace('_', "").starts_with(&op), "{}", entry.name);
    }
    assert!(Entry::named("nothing").is_none());
}

#[test]
fn symbols_stay_as_they_are() {
    for name in [
        "append",
        "append_pool_f16",
        "compare",
        "decide",
        "score_f16_d64_g4",
        "score_stream_bf16_d256_g8",
        "vote_by_four",
        "top_k_choose_in_cluster",
        "attend_decode_bf16_d128",
        "attend_decode_f16_d96_half_split",
        "attend_decode_bf16_d64_interleaved",
        "attend_decode_f16_d128_any_pairs",
        "attend_prefill_bf16_d128",
        "attend_stream_merge_f16",
    ] {
        assert!(Entry::named(name).is_some(), "{name}");
    }
}

#[test]
fn head_dimensions_are_those_of_the_module_documentation() {
    for dtype in TYPES {
        let head_dims = |op| Entry::head_dims(op, dtype).collect::<Vec<_>>();
        for op in [Op::Score, Op::ScoreStream] {
            assert_eq!(head_dims(op), [64, 96, 128, 256]);
            for (head_dim, columns) in [(64, 16), (96, 16), (128, 16), (256, 8)] {
                let serves = |columns| {
                    Entry::find(op, Key::of(dtype).with_head_dim(head_dim).with_columns(columns)).is_ok()
                };
                assert!([4, 8, 16].iter().all(|&it| serves(it) == (it <= columns)), "{op:?} {head_dim}");
            }
        }
        for op in [Op::AttendDecode, Op::AttendPrefill, Op::AttendWarpgroups, Op::AttendStream] {
            assert_eq!(head_dims(op), [64, 96, 128, 256]);
        }
        for op in [Op::AppendPool, Op::Pool, Op::Gather, Op::AttendStreamMerge, Op::Merge] {
            assert_eq!(head_dims(op), []);
        }
    }
}

#[test]
fn an_entry_serves_what_its_values_say() {
    let serves =
        |name: &str, columns| Entry::named(name).expect("an entry").serves(ElementType::Bf16, 128, columns);
    for name in [
        "append",
        "forget",
        "vote_by_four",
        "top_k_choose",
        "gather_bf16",
        "score_stream_bf16_d128_g4",
        "attend_decode_bf16_d128_half_split",
    ] {
        assert!(serves(name, Some(4)), "{name}");
    }
    for name in ["gather_f16", "score_bf16_d64_g4", "score_bf16_d128_g8", "attend_stream_f16_d128"] {
        assert!(!serves(name, Some(4)), "{name}");
    }
    assert!(!serves("score_bf16_d128_g16", None) && serves("attend_prefill_bf16_d128", None));
}

#[test]
fn what_is_missing_is_said_with_what_there_is() {
    let text = |op, key| Entry::find(op, key).expect_err("no such entry").to_string();
    let bf16 = Key::of(ElementType::Bf16);
    assert_eq!(
        text(Op::AttendPrefill, bf16.with_head_dim(80)),
        "bf16, head dimension 80; there are 64, 96, 128, 256"
    );
    assert_eq!(
        text(Op::Score, bf16.with_head_dim(80).with_columns(4)),
        "bf16, head dimension 80; there are 64, 96, 128, 256"
    );
    assert_eq!(
        text(Op::Score, bf16.with_head_dim(256).with_columns(16)),
        "bf16, head dimension 256, groups of up to 16 heads; there are 4, 8"
    );
    assert_eq!(
        text(Op::AttendDecode, bf16.with_head_dim(192).with_rotation(Rotation::Native)),
        "bf16, head dimension 192; there are 64, 96, 128, 256"
    );
    assert_eq!(text(Op::Vote, bf16), "bf16");
}

#[cfg(feature = "conformance")]
#[test]
fn kernels_of_tests_have_names_and_places_of_their_own() {
    let of_tests = &crate::conformance::entries::ENTRIES;
    assert_eq!(ENTRIES.len() + of_tests.len(), COUNT);
    for (i, entry) in of_tests.iter().enumerate() {
        assert_eq!((entry.op, entry.index), (Op::Test, ENTRIES.len() + i), "{}", entry.name);
        assert_eq!(Entry::named(entry.name).map(|entry| entry.index), Some(entry.index), "{}", entry.name);
        assert!(!entry.serves(ElementType::Bf16, 128, Some(4)), "{}", entry.name);
    }
}
