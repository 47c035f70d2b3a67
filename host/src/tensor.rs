//! Typed, shaped memory: owned ([`Tensor`]) and borrowed ([`TensorView`], [`TensorViewMut`]).
//!
//! All tensors are dense and row-major; the only strided memory in this crate is the KV cache
//! ([`KvView`](crate::KvView)).

use std::fmt;

use half::{bf16, f16};

use crate::error::{Error, Result};

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
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::U64 => 8,
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
        })
    }
}

/// Up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
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

mod sealed {
    use super::{HostMut, HostRef, HostVec};

    /// Moves slices of one element type in and out of the tagged unions.
    pub trait Storage: Sized {
        fn wrap(slice: &[Self]) -> HostRef<'_>;
        fn wrap_mut(slice: &mut [Self]) -> HostMut<'_>;
        fn wrap_vec(vec: Vec<Self>) -> HostVec;
        fn unwrap(host: HostRef<'_>) -> Option<&[Self]>;
        fn unwrap_mut(host: HostMut<'_>) -> Option<&mut [Self]>;
    }
}

/// A type that tensors can hold.
pub trait Element: sealed::Storage + Copy + Default + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// The tag of this type.
    const DTYPE: DType;
}

/// Defines the tagged unions over the element types, and [`Element`] for each type.
macro_rules! elements {
    ($($variant:ident($ty:ty),)*) => {
        #[derive(Clone, Copy)]
        #[doc(hidden)]
        pub enum HostRef<'a> { $($variant(&'a [$ty]),)* }

        #[doc(hidden)]
        pub enum HostMut<'a> { $($variant(&'a mut [$ty]),)* }

        #[derive(Clone)]
        #[doc(hidden)]
        pub enum HostVec { $($variant(Vec<$ty>),)* }

        impl HostRef<'_> {
            fn dtype(&self) -> DType { match self { $(HostRef::$variant(_) => DType::$variant,)* } }
        }

        impl HostMut<'_> {
            fn dtype(&self) -> DType { match self { $(HostMut::$variant(_) => DType::$variant,)* } }
            fn as_ref(&self) -> HostRef<'_> { match self { $(HostMut::$variant(s) => HostRef::$variant(s),)* } }
            fn reborrow(&mut self) -> HostMut<'_> { match self { $(HostMut::$variant(s) => HostMut::$variant(s),)* } }
        }

        impl HostVec {
            fn zeros(dtype: DType, len: usize) -> Self {
                match dtype { $(DType::$variant => HostVec::$variant(vec![<$ty>::default(); len]),)* }
            }
            fn as_ref(&self) -> HostRef<'_> { match self { $(HostVec::$variant(v) => HostRef::$variant(v),)* } }
            fn as_mut(&mut self) -> HostMut<'_> { match self { $(HostVec::$variant(v) => HostMut::$variant(v),)* } }
        }

        $(
            impl sealed::Storage for $ty {
                fn wrap(slice: &[Self]) -> HostRef<'_> { HostRef::$variant(slice) }
                fn wrap_mut(slice: &mut [Self]) -> HostMut<'_> { HostMut::$variant(slice) }
                fn wrap_vec(vec: Vec<Self>) -> HostVec { HostVec::$variant(vec) }
                fn unwrap(host: HostRef<'_>) -> Option<&[Self]> {
                    match host { HostRef::$variant(s) => Some(s), _ => None }
                }
                fn unwrap_mut(host: HostMut<'_>) -> Option<&mut [Self]> {
                    match host { HostMut::$variant(s) => Some(s), _ => None }
                }
            }
            impl Element for $ty { const DTYPE: DType = DType::$variant; }
        )*
    };
}

elements! {
    F16(f16),
    Bf16(bf16),
    F32(f32),
    U32(u32),
    U64(u64),
}

/// Owned memory with an element type and a shape.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    data: HostVec,
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Error::Config`] where the number of bytes does not fit the address space.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let fits = shape
            .checked_len()
            .filter(|len| len.checked_mul(dtype.size()).is_some_and(|b| b <= isize::MAX as usize));
        let Some(len) = fits else {
            return Err(Error::config("shape", "at most isize::MAX bytes in all", shape));
        };
        Ok(Tensor { shape, data: HostVec::zeros(dtype, len) })
    }

    /// Takes a vector of elements, outermost dimension first.
    ///
    /// # Errors
    /// [`Error::Length`] where the vector does not hold exactly the elements of `shape`.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(Tensor { shape, data: T::wrap_vec(data) })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.as_ref().dtype()
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Borrows the tensor.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { shape: self.shape, data: self.data.as_ref() }
    }

    /// Borrows the tensor for writing.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { shape: self.shape, data: self.data.as_mut() }
    }

    /// The elements.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.view().as_slice()
    }

    /// The elements, writable.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.view_mut().into_slice()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {})", self.dtype(), self.shape)
    }
}

/// Borrowed memory with an element type and a shape.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    shape: Shape,
    data: HostRef<'a>,
}

impl<'a> TensorView<'a> {
    /// Borrows a slice as a tensor.
    ///
    /// # Errors
    /// [`Error::Length`] where the slice does not hold exactly the elements of `shape`.
    pub fn new<T: Element>(data: &'a [T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(TensorView { shape, data: T::wrap(data) })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T]> {
        T::unwrap(self.data).ok_or_else(|| wrong_dtype::<T>(self.dtype()))
    }

    /// Checks type and shape of the argument called `what`.
    pub(crate) fn expect(
        &self,
        what: &'static str,
        allowed: &[DType],
        shape: impl Into<Shape>,
    ) -> Result<()> {
        expect(what, self.dtype(), allowed, self.shape, shape.into())
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorView({} {})", self.dtype(), self.shape)
    }
}

/// Borrowed memory, writable, with an element type and a shape.
pub struct TensorViewMut<'a> {
    shape: Shape,
    data: HostMut<'a>,
}

impl<'a> TensorViewMut<'a> {
    /// Borrows a slice as a tensor.
    ///
    /// # Errors
    /// [`Error::Length`] where the slice does not hold exactly the elements of `shape`.
    pub fn new<T: Element>(data: &'a mut [T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(TensorViewMut { shape, data: T::wrap_mut(data) })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// A shorter borrow of the same memory.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { shape: self.shape, data: self.data.reborrow() }
    }

    /// The same memory, read only.
    pub fn as_view(&self) -> TensorView<'_> {
        TensorView { shape: self.shape, data: self.data.as_ref() }
    }

    /// The elements.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type.
    pub fn into_slice<T: Element>(self) -> Result<&'a mut [T]> {
        let dtype = self.dtype();
        T::unwrap_mut(self.data).ok_or_else(|| wrong_dtype::<T>(dtype))
    }

    /// Checks type and shape of the argument called `what`.
    pub(crate) fn expect(
        &self,
        what: &'static str,
        allowed: &[DType],
        shape: impl Into<Shape>,
    ) -> Result<()> {
        expect(what, self.dtype(), allowed, self.shape, shape.into())
    }
}

impl fmt::Debug for TensorViewMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorViewMut({} {})", self.dtype(), self.shape)
    }
}

fn check_len(what: &'static str, shape: Shape, got: usize) -> Result<()> {
    match shape.checked_len() {
        Some(needed) if needed == got => Ok(()),
        needed => Err(Error::Length { what, shape, needed: needed.unwrap_or(usize::MAX), got }),
    }
}

fn wrong_dtype<T: Element>(got: DType) -> Error {
    Error::DType { what: "tensor", expected: T::DTYPE.to_string(), got }
}

fn expect(what: &'static str, dtype: DType, allowed: &[DType], got: Shape, expected: Shape) -> Result<()> {
    if !allowed.contains(&dtype) {
        let names: Vec<String> = allowed.iter().map(DType::to_string).collect();
        return Err(Error::DType { what, expected: names.join(" or "), got: dtype });
    }
    if got != expected {
        return Err(Error::Shape { what, expected, got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_every_type() {
        let t = Tensor::from_vec(vec![bf16::ONE; 6], [2, 3]).expect("six elements");
        assert_eq!((t.dtype(), t.shape()), (DType::Bf16, Shape::from([2, 3])));
        assert_eq!(t.as_slice::<bf16>().expect("same type"), &[bf16::ONE; 6]);
        let text = t.as_slice::<f16>().expect_err("another type").to_string();
        assert_eq!(text, "`tensor` must be f16, got bf16");
    }

    #[test]
    fn rejects_wrong_lengths() {
        let text = TensorView::new(&[1u32, 2], [3]).expect_err("too short").to_string();
        assert_eq!(text, "`data` of shape [3] needs 3 elements, the slice has 2");
        assert!(Tensor::zeros(DType::F32, [usize::MAX, 2]).is_err());
    }
}
