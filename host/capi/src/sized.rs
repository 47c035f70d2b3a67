//! Structures that begin with their size, so that library and caller may be of different age.

use std::mem::MaybeUninit;

use crate::pointers::{reference, reference_mut, slice, slice_mut};
use crate::status::{Failure, Result};

/// No structure is longer: what says so was not filled.
const MOST: usize = 4096;

/// A structure that callers fill. It grows at its end only, and 0 in a new field stands for what was before it.
///
/// # Safety
/// - `repr(C)`, the first field is a `usize`, and every bit pattern is a value.
pub(crate) unsafe trait Versioned: Copy {
    /// What it is called in texts.
    const NAME: &'static str;
    /// Bytes of its first version, which every caller knows.
    const FIRST: usize = size_of::<Self>();
}

/// Says which structures begin with their size; `up_to field` ends the first version before that field.
macro_rules! sized {
    ($($name:literal: $structure:ident $(up_to $field:ident)?;)*) => {
        $(
            // SAFETY: integers, floats, raw pointers and structures of them, the size first.
            unsafe impl Versioned for crate::$structure {
                const NAME: &'static str = $name;
                $(const FIRST: usize = std::mem::offset_of!(crate::$structure, $field);)?
            }
        )*
    };
}

sized! {
    "config": ts_config;
    "limits": ts_limits up_to operations;
    "cache_config": ts_cache_config;
    "prefill": ts_prefill_config;
    "kv": ts_kv_view;
    "tables": ts_batch_tables;
    "tables": ts_device_tables;
    "selection": ts_selection;
    "output": ts_output;
    "parts": ts_parts;
    "input": ts_step_input;
}

/// A copy of a caller's structure. Fields that the caller does not know are 0; those that this library does not know
/// have to be.
///
/// # Safety
/// - Null, or as many bytes as the first field says, which nothing writes meanwhile.
pub(crate) unsafe fn read<T: Versioned>(pointer: *const T) -> Result<T> {
    let what = T::NAME;
    // SAFETY: the first field is there, by the caller's promise.
    let got = *unsafe { reference(what, pointer.cast::<usize>())? };
    if !(T::FIRST..=MOST).contains(&got) {
        return Err(Failure::StructSize { what, expected: T::FIRST, got });
    }
    // SAFETY: `got` bytes are there, by the caller's promise.
    let bytes = unsafe { slice(what, pointer.cast::<u8>(), got)? };
    let (known, unknown) = bytes.split_at(got.min(size_of::<T>()));
    if unknown.iter().any(|&byte| byte != 0) {
        return Err(Failure::StructSize { what, expected: size_of::<T>(), got });
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: no more bytes than a `T` has, and every bit pattern is one.
    unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(known.as_ptr(), known.len());
        Ok(value.assume_init())
    }
}

/// Writes as much of a structure as the caller knows, with `struct_size` as its size. What only the caller knows
/// becomes 0.
///
/// # Safety
/// - Null, or `struct_size` bytes that nothing else uses meanwhile.
pub(crate) unsafe fn write<T: Versioned>(to: *mut T, struct_size: usize, value: T) -> Result<()> {
    let what = T::NAME;
    if struct_size < T::FIRST {
        return Err(Failure::StructSize { what, expected: T::FIRST, got: struct_size });
    }
    let known = struct_size.min(size_of::<T>());
    // SAFETY: `struct_size` bytes, by the caller's promise, the first of which are the size; no more than `value` has are
    // copied.
    unsafe {
        reference_mut(what, to.cast::<usize>())?;
        slice_mut(what, to.cast::<u8>(), struct_size)?.fill(0);
        to.cast::<u8>().copy_from_nonoverlapping((&raw const value).cast(), known);
        to.cast::<usize>().write(struct_size);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure that has grown: `new` came later.
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct Grown {
        struct_size: usize,
        old: u64,
        new: u64,
    }

    // SAFETY: integers, the size first.
    unsafe impl Versioned for Grown {
        const NAME: &'static str = "grown";
        const FIRST: usize = 16;
    }

    /// A structure in memory that is longer than it.
    fn given(words: &[usize; 5]) -> Result<Grown> {
        // SAFETY: the array is as long as the sizes used here, or they are refused.
        unsafe { read(words.as_ptr().cast()) }
    }

    #[test]
    fn what_the_caller_does_not_know_is_0() {
        assert_eq!(given(&[16, 1, 2, 3, 4]).unwrap(), Grown { struct_size: 16, old: 1, new: 0 });
        assert_eq!(given(&[20, 1, 2, 3, 4]).unwrap(), Grown { struct_size: 20, old: 1, new: 2 });
        assert_eq!(given(&[24, 1, 2, 3, 4]).unwrap(), Grown { struct_size: 24, old: 1, new: 2 });
        assert_eq!(given(&[40, 1, 2, 0, 0]).unwrap(), Grown { struct_size: 40, old: 1, new: 2 });
    }

    #[test]
    fn what_this_library_does_not_know_must_be_0() {
        let text = |words| given(words).unwrap_err().to_string();
        let rule = |expected, got| {
            format!("`grown.struct_size` must be {expected}, or more with zeros after it, got {got}")
        };
        assert_eq!(text(&[40, 1, 2, 0, 4]), rule(24, 40));
        assert_eq!(text(&[15, 1, 2, 3, 4]), rule(16, 15));
        assert_eq!(text(&[0; 5]), rule(16, 0));
        assert_eq!(text(&[usize::MAX; 5]), rule(16, usize::MAX));
    }

    #[test]
    fn no_more_is_written_than_the_caller_has() {
        for (struct_size, expected) in
            [(16, [16, 1, 9, 9, 9]), (24, [24, 1, 2, 9, 9]), (40, [40, 1, 2, 0, 0])]
        {
            let mut words = [9usize; 5];
            // SAFETY: the array is longer than what is written.
            unsafe {
                write(words.as_mut_ptr().cast(), struct_size, Grown { struct_size: 0, old: 1, new: 2 })
                    .unwrap();
            }
            assert_eq!(words, expected);
        }
        let mut words = [9usize; 5];
        // SAFETY: refused.
        let status =
            unsafe { write(words.as_mut_ptr().cast::<Grown>(), 8, given(&[16, 1, 0, 0, 0]).unwrap()) };
        assert!(status.is_err() && words == [9; 5]);
    }
}
