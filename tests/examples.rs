//! The short examples, run as processes.

#[path = "common/example.rs"]
#[allow(dead_code)] // nothing fails here
mod example;

fn assert_runs(name: &str, words: &[&str]) {
    let output = example::run(name, []);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {stderr}");
    for word in words {
        assert!(stdout.contains(word), "no `{word}` in: {stdout}");
    }
}

#[test]
fn sequences_join_fork_take_back_and_leave() {
    assert_runs("decode", &["1003 tokens in a sequence, 113 selected", "173 pages free, 192 after"]);
}

#[test]
fn caches_of_other_engines_give_the_same_bits() {
    assert_runs(
        "borrowed_cache",
        &["selected over pages of 16\n", "113 of 601 tokens selected over pages of 1\n", "bit for bit"],
    );
}

mod cuda {
    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn streams_and_buffers_of_cust_are_lent() {
        super::assert_runs("cust", &["a step in a stream of cust's"]);
    }
}
