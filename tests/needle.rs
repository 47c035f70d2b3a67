//! The example `needle`, run as a process: keys beyond the training context, its policies, its report, and wrong options.

#[path = "common/example.rs"]
mod example;

use std::fs;
use std::process::Output;

use serde_json::Value;

/// No comparisons: what a test is about is added.
const PLAIN: [&str; 6] =
    ["--ablate-top-k", "--ablate-threshold", "--ablate-scale", "--ablate-vote-pool", "--device", "cpu"];

fn needle<'a>(args: impl IntoIterator<Item = &'a str>) -> Output {
    example::run("needle", PLAIN.into_iter().chain(args))
}

fn json<'a>(args: impl IntoIterator<Item = &'a str>) -> (Value, String) {
    let output = needle(args.into_iter().chain(["--json"]));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    (serde_json::from_slice(&output.stdout).expect("one JSON object"), stderr)
}

fn found(retrieval: &Value) -> Vec<u64> {
    let found = retrieval["found"].as_array().expect("a list");
    found.iter().map(|found| found.as_u64().expect("a number")).collect()
}

#[test]
fn soft_votes_find_what_lies_beyond_the_training_context() {
    let args = ["--lengths", "2048", "--depths", "3", "--policies", "dense,windows,soft,cached"];
    let (report, stderr) = json(args);
    let by_policy: Vec<_> = report["policies"].as_array().expect("a list").iter().map(found).collect();
    assert_eq!(by_policy, [[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 1, 1]], "{report}");
    // Where stderr is no terminal, progress is lines.
    assert_eq!(stderr.lines().count(), 4, "{stderr}");
    assert!(stderr.starts_with("1/4 dense, 2048 bytes: 0.0 % found"), "{stderr}");
    assert_eq!(json(args).0, report, "the same seed");
}

#[test]
fn policies_written_on_top_of_the_operations() {
    // Where everything is selected, all policies are one.
    let all = ["--lengths", "400", "--depths", "2", "--top-k", "1024", "--policies", "quest,raw,hard,soft"];
    let (report, _) = json(all);
    for policy in report["policies"].as_array().expect("a list") {
        assert_eq!(found(policy), [1, 1], "{policy}");
    }
    // A block that is one part votes as the library does; more parts than one do not lose what it finds.
    let args = ["--lengths", "1400", "--depths", "2", "--policies", "quest,raw,hard,soft"];
    let ablation = ["--ablation-length", "1400", "--ablate-parts", "128", "64", "--ablate-vote-pool", "3"];
    let (report, _) = json(args.into_iter().chain(ablation));
    assert_eq!(found(&report["policies"][3]), [1, 1], "{report}");
    let rows = |index: usize| report["comparisons"][index]["rows"].as_array().expect("a list").clone();
    for row in rows(0).into_iter().chain(rows(1)) {
        assert_eq!(found(&row[1]), [1, 1], "{row}");
    }
}

#[test]
fn tables_plots_and_votes() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("maps");
    let (length, plot) = ["--lengths", "1200", "--ablation-length", "1200"].split_at(2);
    let args = length.iter().chain(plot).copied().chain(["--depths", "2", "--policies", "soft", "--explain"]);
    let curves = ["--curves", "--curve-blocks", "64,128", "--curve-top-k", "128", "--curve-length", "1200"];
    let output = needle(args.chain(curves).chain([
        "--plot",
        path.to_str().expect("UTF-8"),
        "--ablate-scale",
        "0.125",
    ]));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let parts =
        ["keys found, %", "soft vote", "score scale, 1200 bytes", "votes at the end", "bits per byte"];
    for part in parts {
        assert!(stdout.contains(part), "no `{part}` in: {stdout}");
    }
    for (name, text) in [("maps", "soft vote: 100 %"), ("maps-curves", "bits per byte")] {
        let svg = fs::read_to_string(folder.path().join(format!("{name}.svg"))).expect("an SVG");
        assert!(svg.contains("<svg") && svg.contains(text), "no `{text}` in {name}.svg");
        let png = fs::read(folder.path().join(format!("{name}.png"))).expect("a PNG");
        assert_eq!(&png[1..4], b"PNG");
        let image = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a header");
        assert!(image.info().width > 900, "{name}.png");
    }
}

#[test]
fn wrong_options_are_refused() {
    let fails = |args: &[&str], words: &[&str]| {
        example::assert_fails(&needle(args.iter().copied()), words);
    };
    fails(&["--lengths", "100"], &["`--lengths`", "for 11 keys", "got 100"]);
    fails(&["--lengths", "99999999"], &["`--lengths`", "length of the text", "got 99999999"]);
    fails(&["--depths", "0"], &["`--depths`", "at least 1"]);
    fails(&["--samples", "0"], &["`--samples`"]);
    fails(&["--block", "0"], &["`--block`"]);
    fails(&["--singles", "0"], &["`--singles`", "from 1 to 32"]);
    fails(&["--plot", "no/such/folder/plot"], &["`--plot`", "no/such/folder"]);
    fails(&["--model", "no/such"], &["model folder no/such does not exist"]);
}
