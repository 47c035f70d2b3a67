//! Golden cases, computed in float64 by `golden/generate.py`: first against `naive`, so that the reference
//! of all other tests is itself checked, then against every device.
//!
//! `TOKENSELECT_GOLDEN=DIR` runs the cases of another folder.

mod common;

use common::cases::{Case, golden_cases};
use common::paged::{Pool, Storage, owned};
use common::problem::{Problem, Row};
use common::run::{Inputs, Outcome, outputs_on, select_and_attend, step, token_select};
use common::{
    announce, assert_close, assert_lse, gpu_tolerance, naive, naive_config, on_devices, round, values,
};
use tokenselect::{Buffer, Device, KvLayout, Limits, Over, RowAction, StepOutput, TokenSelect};

on_devices! {
    all:
        every_device_matches_on_borrowed_memory, every_device_matches_on_an_owned_cache,
        every_device_matches_over_steps, outputs_in_the_storage_type_are_rounded_once;
}

/// The promise: `out` and `lse` within this of float64, `out` relative to the largest element of its head.
const GOLDEN_TOLERANCE: f64 = 1e-3;
/// The files hold `out` and `lse` as f32.
const NAIVE_TOLERANCE: f64 = 1e-6;
/// Page sizes to try on a device; an emulator is slow.
fn page_sizes(device: &Device) -> &'static [usize] {
    if device.name() == "emulated" { &[1, 16] } else { &[1, 16, 64, 128] }
}

/// [`GOLDEN_TOLERANCE`], or what is promised of GPUs.
fn golden_tolerance(device: &Device, case: &Case) -> f64 {
    if device.name() == "cpu" { GOLDEN_TOLERANCE } else { gpu_tolerance(case.config.dtype) }
}

/// Runs `check` on every case that is a single step (`steps: false`) or a run of steps, and counts them.
fn each_case(what: &str, steps: bool, mut check: impl FnMut(&Case)) {
    let all = golden_cases();
    let of_kind: Vec<&Case> = all.iter().filter(|case| case.find("steps").is_some() == steps).collect();
    of_kind.iter().for_each(|case| check(case));
    announce(&format!("golden: {what}: {} of {} cases", of_kind.len(), all.len()));
    let standard = std::env::var_os("TOKENSELECT_GOLDEN").is_none();
    assert!(!of_kind.is_empty() || !standard, "{what}: the project's own folder has cases of both kinds");
}

#[test]
fn naive_matches_numpy() {
    each_case("naive against NumPy", false, |case| {
        let (problem, config) = (case.problem(), naive_config(&case.config));
        let row = &problem.rows[0];
        let selection = naive::select(&config, &row.q, &row.k, &mut None);
        assert_eq!(selection.list, case.indices("selected"), "{}: selected", case.name);
        assert_eq!(selection.votes.is_some(), case.get("vote").is_some(), "{}: scored", case.name);
        if let Some(votes) = &selection.votes {
            // Scales pass through f32 on their way here, which moves votes by some 1e-7.
            assert_close(&case.name, votes, case.array("vote"), 1, 1e-5);
        }
        let list = naive::ranked(&selection.list);
        let (out, lse) = naive::attend(&config, &row.q, &row.k, &row.v, &list, list.len());
        assert_close(&case.name, &out, case.array("out"), config.d, NAIVE_TOLERANCE);
        assert_lse(&case.name, &lse, case.array("lse"), NAIVE_TOLERANCE);
    });
}

fn assert_golden(what: &str, device: &Device, case: &Case, outcome: &Outcome) -> f64 {
    let tolerance = golden_tolerance(device, case);
    assert_eq!(outcome.selected[0], case.indices("selected"), "{what}: selected");
    let d = case.config.heads.head_dim;
    let worst = assert_close(what, &values(&outcome.out), case.array("out"), d, tolerance);
    assert_lse(what, &values(&outcome.lse), case.array("lse"), tolerance);
    worst * tolerance
}

fn every_device_matches_on_borrowed_memory(device: &Device) {
    let mut worst: f64 = 0.0;
    each_case(&format!("{} on borrowed memory", device.name()), false, |case| {
        let problem = case.problem();
        for (page_size, storage) in page_sizes(device)
            .iter()
            .copied()
            .flat_map(|p| [Storage::Nhd, Storage::Hnd, Storage::CombinedNhd].map(|s| (p, s)))
        {
            let what = format!("{} on {}, page size {page_size}, {storage:?}", case.name, device.name());
            let pool = Pool::full(&problem, page_size, storage, page_size as u64).to(device);
            let batch = pool.batch(&problem);
            let mut ts = token_select(device, &problem, &batch);
            let outcome = select_and_attend(&mut ts, &problem, &batch, pool.view(), None);
            worst = worst.max(assert_golden(&what, device, case, &outcome));
        }
    });
    announce(&format!("golden: {}: largest error of out {worst:.1e}", device.name()));
}

fn every_device_matches_on_an_owned_cache(device: &Device) {
    each_case(&format!("{} on an owned cache", device.name()), false, |case| {
        let problem = case.problem();
        for (page_size, layout) in
            page_sizes(device).iter().copied().flat_map(|p| [KvLayout::Nhd, KvLayout::Hnd].map(|l| (p, l)))
        {
            let what = format!("{} on {}, page size {page_size}, {layout:?}", case.name, device.name());
            let (mut cache, ids) = owned(device, &problem, page_size, layout, 1, page_size as u64);
            let batch = cache.extend(&[(ids[0], problem.rows[0].t)]).unwrap();
            let mut ts = token_select(device, &problem, &batch);
            let outcome = step(&mut ts, &mut cache, 0, &batch, &problem);
            assert_golden(&what, device, case, &outcome);
        }
    });
}

/// The decode steps of a run with the Selection Cache, as problems of one row.
fn decode_steps(case: &Case) -> Vec<Problem> {
    let heads = case.config.heads;
    let (kv_width, q_width) = (heads.num_kv_heads * heads.head_dim, heads.num_qo_heads * heads.head_dim);
    let (n0, steps) = (case.find("n0").unwrap(), case.find("steps").unwrap());
    let of_step = |s: usize| {
        let n = n0 + s + 1;
        let part = |array: &str| case.array(array)[..n * kv_width].to_vec();
        let q = case.array("q")[s * q_width..][..q_width].to_vec();
        Problem { config: case.config.clone(), rows: vec![Row { n, t: 1, q, k: part("k"), v: part("v") }] }
    };
    (0..steps).map(of_step).collect()
}

#[test]
fn naive_matches_numpy_over_steps() {
    each_case("naive against NumPy over steps", true, |case| {
        let config = naive_config(&case.config);
        let mut cached = None;
        let mut lists = Vec::new();
        for (s, problem) in decode_steps(case).iter().enumerate() {
            let row = &problem.rows[0];
            let selection = naive::select(&config, &row.q, &row.k, &mut cached);
            assert_eq!(selection.reused, case.array("reused")[s] == 1.0, "{}, step {s}: reused", case.name);
            assert!(
                (selection.similarity - case.array("similarity")[s]).abs() < 1e-6,
                "{}, step {s}",
                case.name
            );
            lists.extend(selection.list);
        }
        assert_eq!(lists, case.indices("selected"), "{}: selected", case.name);
    });
}

fn every_device_matches_over_steps(device: &Device) {
    each_case(&format!("{} over steps", device.name()), true, |case| {
        let problems = decode_steps(case);
        for (page_size, layout) in
            page_sizes(device).iter().copied().flat_map(|p| [KvLayout::Nhd, KvLayout::Hnd].map(|l| (p, l)))
        {
            check_steps(case, &problems, device, page_size, layout);
        }
    });
}

fn check_steps(case: &Case, problems: &[Problem], device: &Device, page_size: usize, layout: KvLayout) {
    let (last, heads) = (problems.last().unwrap(), case.config.heads);
    // Space for all steps, filled up to the first.
    let mut whole = last.clone();
    whole.rows[0].t = problems.len();
    let (mut cache, ids) = owned(device, &whole, page_size, layout, 1, 5);
    let mut ts = {
        let limits = Limits { max_rows: 1, max_block_len: 1, max_kv_tokens: 1024 };
        TokenSelect::new(device, case.config.clone(), limits).unwrap()
    };
    let (mut lists, mut reused) = (Vec::new(), 0);
    for (s, problem) in problems.iter().enumerate() {
        let what = format!("{} on {}, step {s}, page size {page_size}", case.name, device.name());
        let batch = cache.extend(&[(ids[0], 1)]).unwrap();
        let outcome = step(&mut ts, &mut cache, 0, &batch, problem);
        let want = if case.array("reused")[s] == 1.0 { RowAction::Reuse } else { RowAction::Score };
        assert_eq!(ts.workspace().actions().unwrap()[0], want, "{what}");
        reused += u64::from(want == RowAction::Reuse);
        let similarity = values(ts.workspace().buffer(Buffer::Similarities))[0];
        assert!((similarity - case.array("similarity")[s]).abs() < 1e-4, "{what}: similarity {similarity}");
        let width = heads.num_qo_heads * heads.head_dim;
        let out = &case.array("out")[s * width..][..width];
        assert_close(&what, &values(&outcome.out), out, heads.head_dim, golden_tolerance(device, case));
        lists.extend(outcome.selected.into_iter().flatten());
    }
    assert_eq!(lists, case.indices("selected"), "{}: selected, page size {page_size}", case.name);
    let stats = cache.selection_stats().unwrap();
    assert_eq!((stats.reused, stats.scored, stats.complete), (reused, problems.len() as u64 - reused, 0));
}

/// Golden cases are written in the storage type's own numbers; outputs may be in that type, too.
fn outputs_in_the_storage_type_are_rounded_once(device: &Device) {
    each_case(&format!("{} into the storage type", device.name()), false, |case| {
        let problem = case.problem();
        let pool = Pool::full(&problem, 16, Storage::Nhd, 1).to(device);
        let batch = pool.batch(&problem);
        let mut ts = token_select(device, &problem, &batch);
        let exact = select_and_attend(&mut ts, &problem, &batch, pool.view(), None);
        let (mut out, _) = outputs_on(device, &problem, case.config.dtype);
        let inputs = Inputs::new(&problem).to(device);
        let output = StepOutput { out: out.view_mut(), lse: None };
        ts.attend(&batch, pool.view(), inputs.q.view(), Over::Selected, output).unwrap();
        let rounded: Vec<f64> = values(&exact.out).iter().map(|&x| round(case.config.dtype, x)).collect();
        let wrong = values(&out).iter().zip(&rounded).position(|(got, want)| got != want);
        assert_eq!(wrong, None, "{}: first element rounded otherwise", case.name);
    });
}
