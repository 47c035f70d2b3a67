//! Page tables: lists, arrays and tensors of whole numbers, copied.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFrozenSet, PySet};

use crate::errors::{Failure, Kind, Result};
use crate::given::{Given, tuple};
use crate::numbers::{index, number_text, type_name};

/// The largest entry of a table.
const MOST: i128 = i32::MAX as i128;

/// Numbers of one dimension, or the rows of pairs of two.
pub(crate) fn table(what: &'static str, values: &Bound<'_, PyAny>, pairs: bool) -> Result<Vec<u32>> {
    let py = values.py();
    if values.hasattr(intern!(py, "data_ptr"))? {
        // On whatever device it lies.
        let on_host = if values.hasattr(intern!(py, "cpu"))? {
            values.call_method0("detach")?.call_method0("cpu")?
        } else {
            values.clone()
        };
        return match Given::on_host(what, &on_host)? {
            Some(given) => entries_of(&given, pairs),
            None => Err(Failure::of_type(what, "whole numbers", type_name(values))),
        };
    }
    if let Some(given) = Given::on_host(what, values)? {
        return entries_of(&given, pairs);
    }
    // Their order is nobody's.
    if values.is_instance_of::<PySet>()
        || values.is_instance_of::<PyFrozenSet>()
        || values.is_instance_of::<PyDict>()
    {
        return Err(Failure::of_type(
            what,
            "a list, an array or a tensor of whole numbers",
            type_name(values),
        ));
    }
    let mut entries = Vec::new();
    if let Ok(len) = values.len() {
        reserve(what, &mut entries, len)?;
    }
    let Ok(items) = values.try_iter() else {
        return Err(Failure::of_type(
            what,
            "a list, an array or a tensor of whole numbers",
            type_name(values),
        ));
    };
    for item in items {
        let item = item?;
        match number(what, &item, entries.len()) {
            Ok(entry) => push(what, &mut entries, entry)?,
            Err(_) if pairs && item.try_iter().is_ok() => {
                let before = entries.len();
                for bound in item.try_iter()? {
                    let entry = number(what, &bound?, entries.len())?;
                    push(what, &mut entries, entry)?;
                }
                let got = entries.len() - before;
                if got != 2 {
                    return Err(Failure::argument(what, "have rows of 2 entries", got));
                }
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(entries)
}

/// Adds an entry of a list that may have no end.
pub(crate) fn push<T>(what: &str, entries: &mut Vec<T>, entry: T) -> Result<()> {
    if entries.len() == entries.capacity() {
        reserve(what, entries, entries.len().max(16))?;
    }
    entries.push(entry);
    Ok(())
}

fn reserve<T>(what: &str, entries: &mut Vec<T>, more: usize) -> Result<()> {
    let bytes = size_of::<T>().saturating_mul(entries.len().saturating_add(more));
    entries.try_reserve(more).map_err(|_| Failure::out_of_memory(what, bytes))
}

/// A whole number of Python's or NumPy's.
fn number(what: &str, item: &Bound<'_, PyAny>, place: usize) -> Result<u32> {
    let found = if item.is_instance_of::<PyBool>() { None } else { index(item)? };
    let Some(number) = found else {
        return Err(Failure::of_type(what, "whole numbers", format!("{} at {place}", type_name(item))));
    };
    match number.extract::<u32>() {
        Ok(entry) if i128::from(entry) <= MOST => Ok(entry),
        _ => Err(out_of_range(what, place, number_text(&number))),
    }
}

fn out_of_range(what: &str, place: usize, got: impl std::fmt::Display) -> Failure {
    let text = format!("`{what}[{place}]` must be from 0 to {MOST}, got {got}");
    Failure::Rule { kind: Kind::Argument, status: "TS_STATUS_TABLE", text }
}

/// The entries of an array of the host, in the order of its dimensions.
fn entries_of(given: &Given<'_>, pairs: bool) -> Result<Vec<u32>> {
    let what = given.what;
    let typestr = given.typestr()?;
    let (shape, strides) = (given.shape(), given.strides());
    let (rows, columns) = match (shape, pairs) {
        (&[rows], _) => ((rows, strides[0]), (1, 0)),
        (&[rows, columns], true) => ((rows, strides[0]), (columns, strides[1])),
        _ => {
            let rule = if pairs { "of shape (rows, 2)" } else { "of one dimension" };
            let rule = format!("must be {rule}, its shape is {}", tuple(shape));
            return Err(Failure::tensor("TS_STATUS_SHAPE", what, rule));
        }
    };
    macro_rules! read {
        ($($name:literal $type:ty),*) => {
            match typestr.as_str() {
                $($name => copy::<$type>(what, given.addr, rows, columns),)*
                _ => Err(Failure::of_type(what, "whole numbers", given.number_name(&typestr))),
            }
        };
    }
    read!("|i1" i8, "|u1" u8, "<i2" i16, "<u2" u16, "<i4" i32, "<u4" u32, "<i8" i64, "<u8" u64)
}

/// Copies `rows` and `columns` of an array, each a number and the elements from one to the next.
fn copy<T: Copy + Into<i128>>(
    what: &'static str,
    addr: usize,
    rows: (usize, isize),
    columns: (usize, isize),
) -> Result<Vec<u32>> {
    let mut entries = Vec::new();
    reserve(what, &mut entries, rows.0.saturating_mul(columns.0))?;
    let first: *const T = std::ptr::with_exposed_provenance(addr);
    for row in 0..rows.0 {
        for column in 0..columns.0 {
            let offset = row as isize * rows.1 + column as isize * columns.1;
            // SAFETY: an element of an array that is alive while this thread has the interpreter, by its own word.
            let entry: i128 = unsafe { first.wrapping_offset(offset).read_unaligned() }.into();
            if !(0..=MOST).contains(&entry) {
                return Err(out_of_range(what, row * columns.0 + column, entry));
            }
            entries.push(entry as u32);
        }
    }
    Ok(entries)
}

impl Given<'_> {
    /// What numbers that are none are called.
    fn number_name(&self, typestr: &str) -> String {
        let text = self.type_text();
        if text.is_empty() { typestr.to_owned() } else { text }
    }
}
