//! `cargo ptx --check`: the checked-in files are what the sources give, and what they cost.

use std::collections::BTreeMap;
use std::path::Path;

use tokenselect_ptx::inspect::{self, Entry, Header};
use tokenselect_ptx::source;

use crate::compiler::Compiler;
use crate::error::{Error, Result};
use crate::ptxas::{self, Usage};
use crate::{ARCHITECTURES, Architecture, FILES, File, Options, compile, each_file};

/// One thing that is wrong with the checked-in files.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    #[error("{file}: out of date, made from sources {recorded}, they are {current} now")]
    Stale { file: &'static str, recorded: String, current: String },
    #[error("{file}: the header says it is for {got}")]
    WrongArchitecture { file: &'static str, got: String },
    #[error("{file}: made by {recorded}, but the compiler here is {here}")]
    OtherCompiler { file: &'static str, recorded: String, here: String },
    #[error("{file}: entry `{entry}` is not in the checked-in file")]
    Missing { file: &'static str, entry: String },
    #[error("{file}: entry `{entry}` is in the checked-in file alone")]
    Extra { file: &'static str, entry: String },
    #[error("{file}: the parameters of `{entry}` take {checked_in:?} bytes, now {regenerated:?}")]
    Parameters { file: &'static str, entry: String, checked_in: Vec<usize>, regenerated: Vec<usize> },
    #[error("{file}: {place} differs in line {line}: checked in `{checked_in}`, now `{regenerated}`")]
    Differs { file: &'static str, place: String, line: usize, checked_in: String, regenerated: String },
    #[error("{file}: entry `{}` uses local memory: {} bytes of stack, {} stored and {} loaded by spills",
        .usage.entry, .usage.stack, .usage.spill_stores, .usage.spill_loads)]
    LocalMemory { file: &'static str, usage: Usage },
}

pub(crate) fn run(options: &Options) -> Result<()> {
    // Before the minutes that the compiler takes.
    let ptxas = ptxas::find(options)?;
    let recorded = Header::parse(&compile::read_packed(&FILES[0].path(&options.out))?)?.compiler;
    let compiler = Compiler::find(options, Some(&recorded))?;
    eprintln!("compiler: {} ({})", compiler.version, compiler.origin);
    let sources = source::hash(&options.kernels)?;
    let found = each_file(|file| check(file, options, &compiler, &ptxas, &sources))?;
    println!("{}", ptxas::version(&ptxas)?);
    let (problems, usages): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    print!("{}", table(&usages_of_architectures(&usages)));
    let problems: Vec<Problem> = problems.into_iter().flatten().collect();
    if problems.is_empty() { Ok(()) } else { Err(Error::Check(problems)) }
}

/// What is wrong with a file, and what its entries use.
fn check(
    file: File,
    options: &Options,
    compiler: &Compiler,
    ptxas: &Path,
    sources: &str,
) -> Result<(Vec<Problem>, Vec<Usage>)> {
    let text = compile::read_packed(&file.path(&options.out))?;
    let header = Header::parse(&text)?;
    let mut problems = header_problems(file, &header, sources);
    let regenerated = compile::compile(compiler, file, options)?;
    if header.compiler == compiler.version {
        problems.extend(differences(file.name, &text, &regenerated)?);
    } else {
        let (recorded, here) = (header.compiler, compiler.version.clone());
        let other = Problem::OtherCompiler { file: file.name, recorded, here };
        if options.require_same_compiler {
            problems.push(other);
        } else {
            eprintln!("NOTICE {other}: instructions are NOT compared, only entry points and parameters");
        }
        problems.extend(interface_differences(file.name, &text, &regenerated)?);
    }
    let used = ptxas::assemble(ptxas, file, &text)?;
    problems.extend(used.iter().filter_map(|usage| local_memory(file.name, usage)));
    if let Some(lower) = ptxas::lower_isa(ptxas, file, &text)? {
        eprintln!("NOTICE {}: PTX {lower} would do, {} is written", file.name, file.architecture.isa);
    }
    Ok((problems, used))
}

fn header_problems(file: File, header: &Header, sources: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let File { name, architecture, .. } = file;
    if header.architecture != architecture.name {
        problems.push(Problem::WrongArchitecture { file: name, got: header.architecture.clone() });
    }
    if header.sources != sources {
        let (recorded, current) = (header.sources.clone(), sources.to_owned());
        problems.push(Problem::Stale { file: name, recorded, current });
    }
    problems
}

/// What entries use on each architecture, from what those of each file do.
fn usages_of_architectures(of_files: &[Vec<Usage>]) -> Vec<Vec<Usage>> {
    let of_architecture = |architecture: Architecture| {
        let files =
            FILES.iter().zip(of_files).filter(|(file, _)| file.architecture.name == architecture.name);
        files.flat_map(|(_, usages)| usages.iter().cloned()).collect()
    };
    ARCHITECTURES.map(of_architecture).into()
}

fn local_memory(file: &'static str, usage: &Usage) -> Option<Problem> {
    let uses = usage.stack > 0 || usage.spill_stores > 0 || usage.spill_loads > 0;
    uses.then(|| Problem::LocalMemory { file, usage: usage.clone() })
}

fn by_name(text: &str) -> Result<BTreeMap<&str, Entry<'_>>> {
    Ok(inspect::entries(text)?.into_iter().map(|entry| (entry.name, entry)).collect())
}

/// Entry points and their parameters, which do not depend on the compiler.
fn interface_differences(file: &'static str, checked_in: &str, now: &str) -> Result<Vec<Problem>> {
    let (old, new) = (by_name(checked_in)?, by_name(now)?);
    let missing = new.keys().filter(|name| !old.contains_key(*name));
    let missing = missing.map(|name| Problem::Missing { file, entry: (*name).to_owned() });
    let extra = old.keys().filter(|name| !new.contains_key(*name));
    let extra = extra.map(|name| Problem::Extra { file, entry: (*name).to_owned() });
    let both = old.values().filter_map(|entry| Some((entry, new.get(entry.name)?)));
    let parameters = both.filter(|(old, new)| old.param_bytes != new.param_bytes).map(|(old, new)| {
        let (checked_in, regenerated) = (old.param_bytes.clone(), new.param_bytes.clone());
        Problem::Parameters { file, entry: old.name.to_owned(), checked_in, regenerated }
    });
    Ok(missing.chain(extra).chain(parameters).collect())
}

/// Every entry that differs, and the text around the entries.
fn differences(file: &'static str, checked_in: &str, now: &str) -> Result<Vec<Problem>> {
    let mut problems = interface_differences(file, checked_in, now)?;
    let (old, new) = (by_name(checked_in)?, by_name(now)?);
    for (name, entry) in &old {
        if let Some(other) = new.get(name) {
            problems.extend(first_difference(file, format!("entry `{name}`"), entry.text, other.text));
        }
    }
    let around = |text: &str, entries: &BTreeMap<&str, Entry<'_>>| {
        let body = text.lines().filter(|line| !line.starts_with("//")).collect::<Vec<_>>().join("\n");
        entries.values().fold(body, |body, entry| body.replacen(entry.text, "", 1)).trim().to_owned()
    };
    if problems.is_empty() {
        let place = "the text outside of the entries".to_owned();
        problems.extend(first_difference(file, place, &around(checked_in, &old), &around(now, &new)));
    }
    Ok(problems)
}

fn first_difference(file: &'static str, place: String, old: &str, new: &str) -> Option<Problem> {
    if old == new {
        return None;
    }
    let same = old.lines().zip(new.lines()).take_while(|(old, new)| old == new).count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("end").trim().to_owned();
    Some(Problem::Differs { file, place, line: same + 1, checked_in: line(old), regenerated: line(new) })
}

/// One line an entry: registers, static shared memory and spills for each architecture.
fn table(usages: &[Vec<Usage>]) -> String {
    let mut rows: BTreeMap<&str, Vec<Option<&Usage>>> = BTreeMap::new();
    for (column, used) in usages.iter().enumerate() {
        for usage in used {
            rows.entry(&usage.entry).or_insert_with(|| vec![None; usages.len()])[column] = Some(usage);
        }
    }
    let width = rows.keys().map(|entry| entry.len()).max().unwrap_or_default().max("entry".len());
    let heads = ARCHITECTURES.map(|Architecture { name, .. }| format!("{:<28}", format!(" | {name}")));
    let units = format!(" | {:>9} {:>6} {:>8}", "registers", "shared", "spills");
    let mut text = format!("{:width$}{}\n", "", heads.concat()).trim_end().to_owned();
    text.push_str(&format!("\n{:<width$}{}\n", "entry", units.repeat(usages.len())));
    for (entry, columns) in rows {
        text.push_str(&format!("{entry:<width$}"));
        for usage in columns {
            text.push_str(&usage.map_or_else(
                || format!(" | {:>9} {:>6} {:>8}", "-", "-", "-"),
                |usage| {
                    let spills = usage.spill_stores + usage.spill_loads;
                    format!(" | {:>9} {:>6} {spills:>8}", usage.registers, usage.static_shared)
                },
            ));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "// x\n.version 7.4\n\n.visible .entry a(\n\t.param .u64 p\n)\n{\n\tret;\n}\n\
        .visible .entry b()\n{\n\tret;\n}\n";

    #[test]
    fn equal_texts_have_no_differences() {
        let other_header = OLD.replace("// x", "// y");
        assert_eq!(differences("sm_80", OLD, &other_header).expect("readable"), []);
    }

    #[test]
    fn the_entry_and_line_that_differ_are_named() {
        let new = OLD.replacen("\tret;", "\tbar.sync 0;\n\tret;", 1);
        let problems = differences("sm_80", OLD, &new).expect("readable");
        let text = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text, ["sm_80: entry `a` differs in line 5: checked in `ret;`, now `bar.sync 0;`"]);
    }

    #[test]
    fn entries_that_come_go_or_change_their_parameters_are_named() {
        let new = OLD.replace("entry b", "entry c").replace(".u64 p", ".u32 p");
        let problems = interface_differences("sm_90a", OLD, &new).expect("readable");
        let text = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        let expected = [
            "sm_90a: entry `c` is not in the checked-in file",
            "sm_90a: entry `b` is in the checked-in file alone",
            "sm_90a: the parameters of `a` take [8] bytes, now [4]",
        ];
        assert_eq!(text, expected);
    }

    #[test]
    fn text_outside_of_entries_is_compared() {
        let problems = differences("sm_80", OLD, &OLD.replace("7.4", "7.5")).expect("readable");
        assert!(
            matches!(&problems[..], [Problem::Differs { place, .. }] if place.contains("outside")),
            "{problems:?}"
        );
    }

    #[test]
    fn stack_and_spills_are_local_memory() {
        let fine = Usage { entry: "a".to_owned(), registers: 255, static_shared: 9, ..Usage::default() };
        assert_eq!(local_memory("sm_80", &fine), None);
        for usage in [
            Usage { stack: 8, ..fine.clone() },
            Usage { spill_stores: 4, ..fine.clone() },
            Usage { spill_loads: 4, ..fine.clone() },
        ] {
            assert!(local_memory("sm_80", &usage).is_some());
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_entry() {
        let usage = |entry: &str, registers| Usage { entry: entry.to_owned(), registers, ..Usage::default() };
        let text = table(&[vec![usage("a", 32)], vec![usage("a", 40), usage("wgmma", 168)]]);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows.len(), 4, "{text}");
        assert_eq!(rows[2], ["a", "|", "32", "0", "0", "|", "40", "0", "0"]);
        assert_eq!(rows[3], ["wgmma", "|", "-", "-", "-", "|", "168", "0", "0"]);
    }
}
