//! Element types and shapes.

use std::fmt;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE 754 single precision.
    F32,
    /// Unsigned 32-bit integer: token indices, lengths, ages.
    U32,
    /// Unsigned 64-bit integer: counters.
    U64,
    /// IEEE 754 double precision: sums of products that devices add.
    F64,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::U64 | DType::F64 => 8,
        }
    }

    /// Whether keys, values and queries may have this type.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::Bf16 | DType::F32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F32 => "f32",
            DType::U32 => "u32",
            DType::U64 => "u64",
            DType::F64 => "f64",
        })
    }
}

/// Up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub(crate) dims: [usize; 4],
    pub(crate) rank: usize,
}

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Bytes of elements of a type. `None` where they do not fit the address space.
    pub(crate) fn num_bytes(&self, dtype: DType) -> Option<usize> {
        self.checked_len()?.checked_mul(dtype.size()).filter(|&bytes| bytes <= isize::MAX as usize)
    }

    /// Number of elements. `None` where it does not fit a `usize`.
    pub fn checked_len(&self) -> Option<usize> {
        self.dims().iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(given: [usize; N]) -> Self {
        const { assert!(N <= 4, "a shape has at most four dimensions") };
        let mut dims = [1; 4];
        dims[..N].copy_from_slice(&given);
        Shape { dims, rank: N }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
