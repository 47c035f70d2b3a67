//! Reading PTX text.

use tokenselect_ptx::inspect::{Header, InspectError, IsaVersion, entries, functions};

const TEXT: &str = "\
// The kernels.
// architecture: sm_80
// compiler: rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.4
// sources: sha256:00ff

.version 7.4
.target sm_80
.address_size 64

.extern .shared .align 1024 .b8 dynamic_shared[];
// .visible .entry commented_out(
.func  (.param .b32 func_retval0) helper(
	.param .b64 helper_param_0
)
{
	ret;
}
.visible .entry score_bf16_d128_g4(
	.param .align 8 .b8 score_bf16_d128_g4_param_0[72]
)
.maxntid 256, 1, 1
{
	.reg .b32 	%r<4>; // not the end: }
	{ .reg .pred p;
	mma.sync {%r1, %r2}, {%r3};
}
	ret;

}
.visible .entry mixed(
	.param .u64 .ptr .global .align 16 mixed_param_0,
	.param .f32 mixed_param_1,
	.param .align 2 .b8 mixed_param_2[6],
	.param .u8 mixed_param_3
)
{
	ret;
}
.visible .entry empty()
{
	ret;
}
";

#[test]
fn entries_and_their_parameters_are_listed_in_order() {
    let found = entries(TEXT).expect("readable");
    let found: Vec<_> = found.iter().map(|entry| (entry.name, entry.param_bytes.clone())).collect();
    let expected = [("score_bf16_d128_g4", vec![72]), ("mixed", vec![8, 4, 6, 1]), ("empty", vec![])];
    assert_eq!(found, expected);
}

#[test]
fn an_entrys_text_ends_with_its_own_brace() {
    let found = entries(TEXT).expect("readable");
    assert!(found[0].text.starts_with(".visible .entry score"));
    assert!(found[0].text.ends_with("ret;\n\n}"), "{}", found[0].text);
    assert_eq!(found[2].text, ".visible .entry empty()\n{\n\tret;\n}");
}

#[test]
fn functions_are_listed() {
    assert_eq!(functions(TEXT).collect::<Vec<_>>(), ["helper"]);
    let others = ".extern .func  (.param .b32 func_retval0) vprintf\n(\n.visible .func plain()\n.func panics\n\tret; // .func\n";
    assert_eq!(functions(others).collect::<Vec<_>>(), ["vprintf", "plain", "panics"]);
    assert_eq!(functions(".visible .entry f()\n{\n\tret;\n}\n").next(), None);
}

#[test]
fn text_without_entries_has_none() {
    assert_eq!(entries("").expect("readable"), []);
    assert_eq!(entries(".version 7.4\n").expect("readable"), []);
}

#[test]
fn what_cannot_be_read_is_named() {
    let error = entries(".visible .entry f(\n\t.param .texref t\n)\n{\n}\n").expect_err("no size");
    assert_eq!(error.to_string(), "PTX entry `f`: cannot read the size of parameter `.param .texref t`");
    let error = entries(".visible .entry f(\n\t.param .u64 t\n)\n{\n\tret;\n").expect_err("cut off");
    assert_eq!(error, InspectError::Unclosed { entry: "f".to_owned(), expected: '}' });
    let error = entries(".visible .entry f(\n\t.param .u64 t\n").expect_err("cut off");
    assert_eq!(error, InspectError::Unclosed { entry: "f".to_owned(), expected: ')' });
}

#[test]
fn the_header_is_read_and_written() {
    let header = Header::parse(TEXT).expect("complete");
    assert_eq!(header.architecture, "sm_80");
    assert_eq!(header.compiler, "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.4");
    assert_eq!(header.sources, "sha256:00ff");
    assert_eq!(Header::parse(&header.to_string()), Ok(header));
}

#[test]
fn a_missing_field_is_named() {
    let text = TEXT.replace("// sources: sha256:00ff\n", "");
    assert_eq!(Header::parse(&text), Err(InspectError::MissingField { field: "sources" }));
    // A comment further down is no header.
    let text = format!("{text}// sources: sha256:00ff\n");
    let error = Header::parse(&text).expect_err("not in the header");
    assert_eq!(error.to_string(), "PTX header: the line `// sources: ...` is missing");
}

#[test]
fn versions_are_read_and_compared() {
    let version = IsaVersion::of(TEXT).expect("there is one");
    assert_eq!(version, IsaVersion { major: 7, minor: 4 });
    assert!(version < IsaVersion { major: 8, minor: 0 });
    assert!(matches!(IsaVersion::of("ret;"), Err(InspectError::Version { .. })));
    assert!(matches!(IsaVersion::of(".version x.y"), Err(InspectError::Version { .. })));
}
