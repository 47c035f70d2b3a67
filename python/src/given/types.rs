//! Types of elements, and how array interfaces tell of them.

use pyo3::prelude::*;
use tokenselect::DType;

/// Element types that the elements may be read as, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Types(u8);

impl Types {
    /// None that this library has.
    pub(super) const NONE: Types = Types(0);

    pub fn of(dtype: DType) -> Self {
        Types(1 << Types::bit(dtype))
    }

    fn or(self, dtype: DType) -> Self {
        Types(self.0 | Types::of(dtype).0)
    }

    pub fn has(self, dtype: DType) -> bool {
        self.0 & Types::of(dtype).0 != 0
    }

    fn bit(dtype: DType) -> u8 {
        match dtype {
            DType::F16 => 0,
            DType::Bf16 => 1,
            DType::F32 => 2,
            DType::U32 => 3,
            DType::U64 => 4,
            _ => 5,
        }
    }
}

/// What an array tells of itself: `PyArrayInterface` of the array interface protocol, version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ArrayStruct {
    pub(super) two: i32,
    pub(super) nd: i32,
    pub(super) typekind: u8,
    pub(super) itemsize: i32,
    pub(super) flags: i32,
    /// `[nd]`.
    pub(super) shape: *const isize,
    /// `[nd]`, in bytes.
    pub(super) strides: *const isize,
    pub(super) data: *mut u8,
    descr: *mut pyo3::ffi::PyObject,
}

impl ArrayStruct {
    /// What every such structure begins with.
    pub(super) const TWO: i32 = 2;
    /// Elements are in the machine's order of bytes.
    const NOT_SWAPPED: i32 = 0x200;
    /// Elements may be written.
    pub(super) const WRITEABLE: i32 = 0x400;

    pub(super) fn order(&self) -> char {
        if self.itemsize == 1 {
            '|'
        } else if self.flags & ArrayStruct::NOT_SWAPPED == 0 {
            '>'
        } else {
            '<'
        }
    }

    pub(super) fn types(&self, array: &Bound<'_, PyAny>) -> Types {
        if self.order() == '>' {
            return Types::NONE;
        }
        match (self.typekind, self.itemsize) {
            (b'f', 2) => Types::of(DType::F16),
            (b'u', 2) => Types::of(DType::Bf16).or(DType::F16),
            (b'f', 4) => Types::of(DType::F32),
            (b'u' | b'i', 4) => Types::of(DType::U32),
            (b'u' | b'i', 8) => Types::of(DType::U64),
            (b'f', 8) => Types::of(DType::F64),
            (b'V', 2) => extension_types(array),
            _ => Types::NONE,
        }
    }
}

/// Element types of a type string of the array interfaces, and bytes of an element. Without PyTorch bf16 is `uint16`.
pub(crate) fn interface_types(typestr: &str) -> (Types, isize) {
    let types = match typestr {
        "<f2" => Types::of(DType::F16),
        "<u2" => Types::of(DType::Bf16).or(DType::F16),
        "<f4" => Types::of(DType::F32),
        "<u4" | "<i4" => Types::of(DType::U32),
        "<u8" | "<i8" => Types::of(DType::U64),
        "<f8" => Types::of(DType::F64),
        _ => Types::NONE,
    };
    let size = typestr.get(2..).and_then(|size| size.parse().ok()).filter(|&size| size > 0);
    (types, size.unwrap_or(1))
}

/// Element types that NumPy has by an extension: `ml_dtypes.bfloat16`.
pub(super) fn extension_types(object: &Bound<'_, PyAny>) -> Types {
    let name = object.getattr("dtype").and_then(|dtype| dtype.getattr("name"));
    let is_bf16 = name.is_ok_and(|name| name.eq("bfloat16").unwrap_or(false));
    if is_bf16 { Types::of(DType::Bf16) } else { Types::NONE }
}
