//! Typed, shaped memory: owned ([`Tensor`]) and borrowed ([`TensorView`], [`TensorViewMut`]).
//!
//! Memory lies on the host or on the device of a [`Device`](crate::Device); a view of a host slice costs nothing.
//! An operation takes tensors that lie where its device works; others are an
//! [`Error::WrongDevice`].
//!
//! Tensors are dense and row-major. Two things may be strided: the KV cache ([`KvView`](crate::KvView)), and the queries, keys
//! and values of a step, such as slices of a fused projection ([`TensorView::heads`], [`TensorView::strided`]).

use std::alloc::{Layout, alloc_zeroed};
use std::fmt;
use std::ops::Range;

use half::{bf16, f16};

use crate::device::Device;
use crate::dtype::{DType, Shape};
use crate::error::{Error, Result};
use crate::memory::{DeviceMemory, DeviceSlice};

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
///
/// ```
/// use tokenselect::Tensor;
/// use tokenselect::half::bf16;
///
/// let ones = Tensor::from_vec(vec![bf16::ONE; 6], [2, 3])?;
/// # Ok::<(), tokenselect::Error>(())
/// ```
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

        #[doc(hidden)]
        pub enum HostVec { $($variant(Vec<$ty>),)* }

        impl<'a> HostRef<'a> {
            fn part(self, begin: usize, end: usize) -> Self {
                match self { $(HostRef::$variant(s) => HostRef::$variant(&s[begin..end]),)* }
            }
            fn bytes(self) -> &'a [u8] { match self { $(HostRef::$variant(s) => as_bytes(s),)* } }
            fn dtype(&self) -> DType { match self { $(HostRef::$variant(_) => DType::$variant,)* } }
        }

        impl HostMut<'_> {
            fn as_ref(&self) -> HostRef<'_> { match self { $(HostMut::$variant(s) => HostRef::$variant(s),)* } }
            fn part(self, begin: usize, end: usize) -> Self {
                match self { $(HostMut::$variant(s) => HostMut::$variant(&mut s[begin..end]),)* }
            }
            fn copy_within(&mut self, from: usize, to: usize, len: usize) {
                match self { $(HostMut::$variant(s) => s.copy_within(from..from + len, to),)* }
            }
            fn bytes(&mut self) -> &mut [u8] { match self { $(HostMut::$variant(s) => as_bytes_mut(s),)* } }
            fn reborrow(&mut self) -> HostMut<'_> { match self { $(HostMut::$variant(s) => HostMut::$variant(s),)* } }
        }

        impl HostVec {
            /// `None` where there is no memory.
            fn zeros(dtype: DType, len: usize) -> Option<Self> {
                Some(match dtype { $(DType::$variant => HostVec::$variant(zeros::<$ty>(len)?),)* })
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
    F64(f64),
}

/// A vector of zeros, which costs nothing before it is written. `None` where there is no memory.
fn zeros<T: Element>(len: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(len).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the size is not 0.
    let first = unsafe { alloc_zeroed(layout) }.cast::<T>();
    // SAFETY: allocated by the global allocator as a vector of `len` elements would be; elements are plain numbers, for
    // which zero bits are a value.
    (!first.is_null()).then(|| unsafe { Vec::from_raw_parts(first, len, len) })
}

/// The bytes of plain elements.
fn as_bytes<T: Copy>(slice: &[T]) -> &[u8] {
    // SAFETY: element types are plain numbers without padding, and the length is that of the slice.
    unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), size_of_val(slice)) }
}

/// The bytes of plain elements, writable.
fn as_bytes_mut<T: Copy>(slice: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; every bit pattern is a valid element.
    unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), size_of_val(slice)) }
}

enum Owned {
    Host(HostVec),
    Device(DeviceMemory, DType),
}

#[derive(Clone, Copy)]
enum Borrowed<'a> {
    Host(HostRef<'a>),
    Device(DeviceSlice<'a>, DType),
}

enum BorrowedMut<'a> {
    Host(HostMut<'a>),
    Device(DeviceSlice<'a>, DType),
}

/// Owned memory with an element type and a shape, on the host or on a device.
pub struct Tensor {
    shape: Shape,
    data: Owned,
}

impl Tensor {
    /// A tensor of zeros on the host.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there is not enough memory, or the bytes do not fit the address space.
    pub fn zeros(dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let data = shape.checked_len().and_then(|len| HostVec::zeros(dtype, len));
        let data = data.ok_or_else(|| out_of_memory("cpu", dtype, shape))?;
        Ok(Tensor { shape, data: Owned::Host(data) })
    }

    /// A tensor of zeros where `device` works.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there is not enough memory, or the bytes do not fit the address space.
    pub fn zeros_on(device: &Device, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let Some(driver) = device.driver() else { return Tensor::zeros(dtype, shape) };
        let shape = shape.into();
        let bytes = shape.num_bytes(dtype).ok_or_else(|| out_of_memory(driver.name(), dtype, shape))?;
        Ok(Tensor { shape, data: Owned::Device(DeviceMemory::zeros(driver, bytes)?, dtype) })
    }

    /// A tensor of one value where `device` works.
    pub(crate) fn filled_on<T: Element>(device: &Device, value: T, shape: impl Into<Shape>) -> Result<Self> {
        /// Elements that are copied to a device at a time.
        const PIECE: usize = 1 << 16;
        let mut tensor = Tensor::zeros_on(device, T::DTYPE, shape)?;
        let len = tensor.shape.checked_len().unwrap_or(0);
        match &mut tensor.data {
            Owned::Host(_) => tensor.as_mut_slice::<T>()?.fill(value),
            Owned::Device(memory, _) => {
                let piece = vec![value; len.min(PIECE)];
                for begin in (0..len).step_by(PIECE) {
                    let count = PIECE.min(len - begin);
                    let to = memory.slice().part(begin * size_of::<T>(), (begin + count) * size_of::<T>());
                    to.write(as_bytes(&piece[..count]))?;
                }
            }
        }
        Ok(tensor)
    }

    /// Takes a vector of elements, outermost dimension first.
    ///
    /// # Errors
    /// [`Error::Length`] where the vector does not hold exactly the elements of `shape`.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(Tensor { shape, data: Owned::Host(T::wrap_vec(data)) })
    }

    /// A copy of a slice where `device` works.
    ///
    /// # Errors
    /// [`Error::Length`] where the slice does not hold exactly the elements of `shape`, [`Error::Driver`] where
    /// the device fails.
    pub fn from_slice_on<T: Element>(device: &Device, data: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        let mut tensor = Tensor::zeros_on(device, T::DTYPE, shape)?;
        tensor.copy_from(TensorView::new(data, shape)?)?;
        Ok(tensor)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.view().dtype()
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Borrows the tensor.
    pub fn view(&self) -> TensorView<'_> {
        let data = match &self.data {
            Owned::Host(vec) => Borrowed::Host(vec.as_ref()),
            Owned::Device(memory, dtype) => Borrowed::Device(memory.slice(), *dtype),
        };
        TensorView { shape: self.shape, data, strides: None }
    }

    /// Borrows the tensor for writing.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        let data = match &mut self.data {
            Owned::Host(vec) => BorrowedMut::Host(vec.as_mut()),
            Owned::Device(memory, dtype) => BorrowedMut::Device(memory.slice(), *dtype),
        };
        TensorViewMut { shape: self.shape, data }
    }

    /// Entry `index` of the outermost dimension of a tensor that has one; the caller has checked that.
    pub(crate) fn outer(&self, index: usize) -> TensorView<'_> {
        let width = self.shape.dims()[1..].iter().product::<usize>();
        let data = self.view().data_part(index * width, width);
        TensorView { shape: [width].into(), data, strides: None }
    }

    /// The elements of a host tensor.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type, [`Error::WrongDevice`] where it is not on the host.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.view().as_slice()
    }

    /// The elements of a host tensor, writable.
    ///
    /// # Errors
    /// As [`as_slice`](Self::as_slice).
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.view_mut().into_slice()
    }

    /// A copy of the elements, from wherever they lie. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type, [`Error::Driver`] where the device fails.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.view().to_vec()
    }

    /// Overwrites the tensor with another of the same type and shape, from the host or from its own device.
    ///
    /// # Errors
    /// As [`TensorViewMut::copy_from`].
    pub fn copy_from(&mut self, from: TensorView<'_>) -> Result<()> {
        self.view_mut().copy_from(from)
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
    data: Borrowed<'a>,
    /// Of tokens and heads, where the tensor `[tokens, heads, dim]` is not dense.
    strides: Option<[usize; 2]>,
}

/// The heads of tokens on the host, dense or not.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a, T> {
    data: &'a [T],
    strides: [usize; 2],
    dim: usize,
}

impl<'a, T> Heads<'a, T> {
    /// The elements of one head of one token.
    #[inline(always)]
    pub fn at(&self, token: usize, head: usize) -> &'a [T] {
        &self.data[token * self.strides[0] + head * self.strides[1]..][..self.dim]
    }
}

impl<'a> TensorView<'a> {
    /// [`new`](Self::new) for the argument called `what`.
    pub(crate) fn named<T: Element>(
        what: &'static str,
        data: &'a [T],
        shape: impl Into<Shape>,
    ) -> Result<Self> {
        let shape = shape.into();
        check_len(what, shape, data.len())?;
        Ok(TensorView { shape, data: Borrowed::Host(T::wrap(data)), strides: None })
    }

    /// Borrows a slice as a tensor.
    ///
    /// # Errors
    /// [`Error::Length`] where the slice does not hold exactly the elements of `shape`.
    pub fn new<T: Element>(data: &'a [T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(TensorView { shape, data: Borrowed::Host(T::wrap(data)), strides: None })
    }

    /// Borrows memory of a device that somebody else owns, such as another engine's tensor.
    ///
    /// # Safety
    /// - `addr` is an address of `device`, aligned to 16 bytes, with room for the tensor, for as long as `'a`.
    /// - Nothing writes it while operations on this view run; work queued earlier runs on the device's stream or
    ///   has ended.
    ///
    /// # Errors
    /// [`Error::Argument`] where the tensor is larger than the address space, [`Error::WrongDevice`] for the CPU.
    pub unsafe fn from_device_addr(
        device: &'a Device,
        addr: u64,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<Self> {
        let shape = shape.into();
        let bytes = addressable(dtype, shape)?;
        let data = Borrowed::Device(DeviceSlice::borrow(device, addr, bytes)?, dtype);
        Ok(TensorView { shape, data, strides: None })
    }

    /// Some heads of a tensor `[tokens, heads, dim]`: queries, keys or values in the output of a fused projection. Only the
    /// arguments `q`, `k` and `v` of operations take them.
    ///
    /// # Errors
    /// [`Error::Argument`] where the tensor has not three dimensions or is such a part already, or the range ends before it begins;
    /// [`Error::Index`] where it has no such heads.
    pub fn heads(&self, heads: Range<usize>) -> Result<TensorView<'a>> {
        let &[tokens, all, dim] = self.shape.dims() else {
            return Err(Error::argument("tensor", "three-dimensional", self.shape));
        };
        self.expect_dense("tensor")?;
        if heads.start > heads.end {
            let (rule, got) = ("a range that ends where it begins or later", format!("{heads:?}"));
            return Err(Error::argument("heads", rule, got));
        }
        if heads.end > all {
            return Err(Error::Index { what: "last head", limit: all, got: heads.end - 1 });
        }
        let count = heads.len();
        // Of an empty tensor no number need fit anything.
        let is_empty = self.num_elements() == 0 || count == 0;
        let (first, elements) =
            if is_empty { (0, 0) } else { (heads.start * dim, (tokens - 1) * all * dim + count * dim) };
        let all_dim = if is_empty { 0 } else { all * dim };
        let data = self.data_part(first, elements);
        Ok(TensorView { shape: [tokens, count, dim].into(), data, strides: Some([all_dim, dim]) })
    }

    /// Some tokens of a tensor whose first dimension is tokens, strided or not: the queries, keys or values of a piece of a prompt.
    ///
    /// # Errors
    /// [`Error::Argument`] where the tensor has no dimensions, or the range ends before it begins; [`Error::Index`] where it has no such
    /// tokens.
    pub fn tokens(&self, tokens: Range<usize>) -> Result<TensorView<'a>> {
        let shape = some_tokens(self.shape, &tokens)?;
        let [count, heads, dim, _] = shape.dims;
        let (first, elements) = match self.strides {
            _ if shape.checked_len().unwrap_or(0) == 0 => (0, 0),
            None => (tokens.start * token_len(shape), count * token_len(shape)),
            Some(strides) => {
                let elements = reach([count, heads, dim], strides).unwrap_or(0); // no more than of the whole tensor
                (tokens.start * strides[0], elements)
            }
        };
        Ok(TensorView { shape, data: self.data_part(first, elements), strides: self.strides })
    }

    /// A strided tensor `[tokens, heads, dim]` in a slice: distances in elements from a token to the next and from a head to the
    /// next of its token; the elements of a head are adjacent. As for [`heads`](Self::heads).
    ///
    /// # Errors
    /// [`Error::Extent`] where the slice is shorter than the strides reach.
    pub fn strided<T: Element>(data: &'a [T], shape: [usize; 3], strides: [usize; 2]) -> Result<Self> {
        let needed = reach(shape, strides);
        if needed.is_none_or(|needed| needed > data.len()) {
            return Err(Error::Extent {
                what: "data",
                shape: shape.into(),
                strides: strides.to_vec(),
                offset: 0,
                needed: needed.unwrap_or(usize::MAX),
                got: data.len(),
            });
        }
        Ok(TensorView { shape: shape.into(), data: Borrowed::Host(T::wrap(data)), strides: Some(strides) })
    }

    /// [`strided`](Self::strided) in memory of a device that somebody else owns.
    ///
    /// # Safety
    /// - As for [`from_device_addr`](Self::from_device_addr), from the first element to the last, gaps included.
    ///
    /// # Errors
    /// As [`from_device_addr`](Self::from_device_addr).
    pub unsafe fn strided_from_device_addr(
        device: &'a Device,
        addr: u64,
        dtype: DType,
        shape: [usize; 3],
        strides: [usize; 2],
    ) -> Result<Self> {
        let bytes = reach(shape, strides).and_then(|elements| Shape::from([elements]).num_bytes(dtype));
        let too_large = || {
            let rule = format!("at most isize::MAX bytes in strides {strides:?}");
            Error::argument("shape", rule, Shape::from(shape))
        };
        let bytes = bytes.ok_or_else(too_large)?;
        let data = Borrowed::Device(DeviceSlice::borrow(device, addr, bytes)?, dtype);
        Ok(TensorView { shape: shape.into(), data, strides: Some(strides) })
    }

    fn num_elements(&self) -> usize {
        self.shape.checked_len().unwrap_or(0)
    }

    /// `len` elements from `first` on, which are there.
    fn data_part(&self, first: usize, len: usize) -> Borrowed<'a> {
        match self.data {
            Borrowed::Host(host) => Borrowed::Host(host.part(first, first + len)),
            Borrowed::Device(slice, dtype) => {
                Borrowed::Device(slice.part(first * dtype.size(), (first + len) * dtype.size()), dtype)
            }
        }
    }

    /// Elements from a token to the next, and from a head to the next, of a tensor `[tokens, heads, dim]`.
    pub(crate) fn head_strides(&self) -> [usize; 2] {
        let dims = self.shape.dims;
        self.strides.unwrap_or([dims[1].saturating_mul(dims[2]), dims[2]])
    }

    /// Elements from the first to one past the last, gaps included.
    pub(crate) fn extent(&self) -> usize {
        let dims = self.shape.dims;
        match self.strides {
            None => self.num_elements(),
            Some(strides) => reach([dims[0], dims[1], dims[2]], strides).unwrap_or(usize::MAX),
        }
    }

    /// The heads of a tensor `[tokens, heads, dim]` on the host.
    pub(crate) fn as_heads<T: Element>(&self) -> Result<Heads<'a, T>> {
        let dense = TensorView { strides: None, ..*self };
        Ok(Heads { data: dense.as_slice()?, strides: self.head_strides(), dim: self.shape.dims[2] })
    }

    fn expect_dense(&self, what: &'static str) -> Result<()> {
        match self.strides {
            None => Ok(()),
            Some(strides) => Err(Error::argument(what, "dense", format!("strides {strides:?}"))),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match &self.data {
            Borrowed::Host(host) => host.dtype(),
            Borrowed::Device(_, dtype) => *dtype,
        }
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements of a host tensor.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type, [`Error::WrongDevice`] where it is not on the host.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T]> {
        self.expect_dense("tensor")?;
        match self.data {
            Borrowed::Host(host) => T::unwrap(host).ok_or_else(|| wrong_dtype::<T>(self.dtype())),
            Borrowed::Device(slice, _) => Err(slice.not_on_host("tensor")),
        }
    }

    /// The elements from `offset` on as a one-dimensional tensor: values that lie among keys, for
    /// [`KvView::strided`](crate::KvView::strided).
    ///
    /// # Errors
    /// [`Error::Index`] where `offset` is beyond the end.
    pub fn tail(&self, offset: usize) -> Result<TensorView<'a>> {
        self.expect_dense("tensor")?;
        let len = self.shape.checked_len().unwrap_or(0);
        if offset > len {
            return Err(Error::Index { what: "offset", limit: len + 1, got: offset });
        }
        let data = match self.data {
            Borrowed::Host(host) => Borrowed::Host(host.part(offset, len)),
            Borrowed::Device(slice, dtype) => {
                Borrowed::Device(slice.part(offset * dtype.size(), len * dtype.size()), dtype)
            }
        };
        Ok(TensorView { shape: [len - offset].into(), data, strides: None })
    }

    /// A copy of the elements, from wherever they lie. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type, [`Error::Driver`] where the device fails.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if self.dtype() != T::DTYPE {
            return Err(wrong_dtype::<T>(self.dtype()));
        }
        self.expect_dense("tensor")?;
        match self.data {
            Borrowed::Host(_) => Ok(self.as_slice::<T>()?.to_vec()),
            Borrowed::Device(slice, _) => {
                let mut elements = vec![T::default(); self.shape.checked_len().unwrap_or(0)];
                slice.read(as_bytes_mut(&mut elements))?;
                Ok(elements)
            }
        }
    }

    /// Address of the first element of a device tensor, for kernels and engines of the caller's own. What they do with it
    /// is ordered with the device's work if it runs on the device's stream.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] where the tensor is on the host.
    pub fn device_addr(&self) -> Result<u64> {
        Ok(self.device_slice("tensor")?.addr())
    }

    /// Checks that the argument called `what` lies where `device` works: on a GPU at a multiple of `align` bytes, which is what
    /// its kernels move at a time.
    pub(crate) fn expect_on(&self, what: &'static str, device: &Device, align: u64) -> Result<()> {
        let Some(driver) = device.driver() else {
            return match self.data {
                Borrowed::Host(_) => Ok(()),
                Borrowed::Device(slice, _) => Err(slice.not_on_host(what)),
            };
        };
        let slice = self.device_slice(what)?;
        slice.expect_on(driver, what)?;
        if !slice.addr().is_multiple_of(align) {
            return Err(Error::argument(what, format!("at an address divisible by {align}"), slice.addr()));
        }
        Ok(())
    }

    /// Whether the memory is the host's.
    pub(crate) fn is_on_host(&self) -> bool {
        matches!(self.data, Borrowed::Host(_))
    }

    /// The memory of a device tensor.
    pub(crate) fn device_slice(&self, what: &'static str) -> Result<DeviceSlice<'a>> {
        match self.data {
            Borrowed::Host(_) => Err(DeviceSlice::not_on_device(what)),
            Borrowed::Device(slice, _) => Ok(slice),
        }
    }

    /// Checks type and shape of the argument called `what`.
    pub(crate) fn expect(
        &self,
        what: &'static str,
        allowed: &[DType],
        shape: impl Into<Shape>,
    ) -> Result<()> {
        expect(what, self.dtype(), allowed, self.shape, shape.into())?;
        self.expect_dense(what)
    }

    /// Checks the type of the argument called `what`.
    pub(crate) fn expect_type(&self, what: &'static str, allowed: &[DType]) -> Result<()> {
        expect(what, self.dtype(), allowed, self.shape, self.shape)
    }

    /// [`expect`](Self::expect) of a tensor `[tokens, heads, dim]` that may be strided.
    pub(crate) fn expect_heads(&self, what: &'static str, dtype: DType, shape: [usize; 3]) -> Result<()> {
        expect(what, self.dtype(), &[dtype], self.shape, shape.into())
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
    data: BorrowedMut<'a>,
}

impl<'a> TensorViewMut<'a> {
    /// [`new`](Self::new) for the argument called `what`.
    pub(crate) fn named<T: Element>(
        what: &'static str,
        data: &'a mut [T],
        shape: impl Into<Shape>,
    ) -> Result<Self> {
        let shape = shape.into();
        check_len(what, shape, data.len())?;
        Ok(TensorViewMut { shape, data: BorrowedMut::Host(T::wrap_mut(data)) })
    }

    /// Borrows a slice as a tensor.
    ///
    /// # Errors
    /// [`Error::Length`] where the slice does not hold exactly the elements of `shape`.
    pub fn new<T: Element>(data: &'a mut [T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("data", shape, data.len())?;
        Ok(TensorViewMut { shape, data: BorrowedMut::Host(T::wrap_mut(data)) })
    }

    /// Borrows memory of a device that somebody else owns, for writing.
    ///
    /// # Safety
    /// - As for [`TensorView::from_device_addr`], and nothing reads it either.
    ///
    /// # Errors
    /// As [`TensorView::from_device_addr`].
    pub unsafe fn from_device_addr(
        device: &'a Device,
        addr: u64,
        dtype: DType,
        shape: impl Into<Shape>,
    ) -> Result<Self> {
        let shape = shape.into();
        let bytes = addressable(dtype, shape)?;
        let data = BorrowedMut::Device(DeviceSlice::borrow(device, addr, bytes)?, dtype);
        Ok(TensorViewMut { shape, data })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.as_view().dtype()
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// A shorter borrow of the same memory.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        let data = match &mut self.data {
            BorrowedMut::Host(host) => BorrowedMut::Host(host.reborrow()),
            BorrowedMut::Device(slice, dtype) => BorrowedMut::Device(*slice, *dtype),
        };
        TensorViewMut { shape: self.shape, data }
    }

    /// The same memory, read only.
    pub fn as_view(&self) -> TensorView<'_> {
        let data = match &self.data {
            BorrowedMut::Host(host) => Borrowed::Host(host.as_ref()),
            BorrowedMut::Device(slice, dtype) => Borrowed::Device(*slice, *dtype),
        };
        TensorView { shape: self.shape, data, strides: None }
    }

    /// Overwrites the memory with that of another tensor of the same type and shape, from the host or from its own
    /// device.
    ///
    /// # Errors
    /// [`Error::DType`] or [`Error::Shape`] where the two differ, [`Error::WrongDevice`] where `from` lies on
    /// another device, [`Error::Driver`] where the device fails.
    pub fn copy_from(self, from: TensorView<'_>) -> Result<()> {
        from.expect("from", &[self.dtype()], self.shape)?;
        match (self.data, from.data) {
            (BorrowedMut::Host(mut to), Borrowed::Host(from)) => to.bytes().copy_from_slice(from.bytes()),
            (BorrowedMut::Host(mut to), Borrowed::Device(from, _)) => from.read(to.bytes())?,
            (BorrowedMut::Device(to, _), Borrowed::Host(from)) => to.write(from.bytes())?,
            (BorrowedMut::Device(to, _), Borrowed::Device(from, _)) => to.copy_from(from)?,
        }
        Ok(())
    }

    /// Copies `len` elements from place `from` on to place `to` on; the caller has checked both ranges, which do not overlap.
    pub(crate) fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        match &mut self.data {
            BorrowedMut::Host(host) => host.copy_within(from, to, len),
            BorrowedMut::Device(slice, dtype) => {
                let part = |begin: usize| slice.part(begin * dtype.size(), (begin + len) * dtype.size());
                return part(to).copy_from(part(from));
            }
        }
        Ok(())
    }

    /// Some tokens of a tensor whose first dimension is tokens: the outputs of a piece of a prompt.
    ///
    /// # Errors
    /// As [`TensorView::tokens`].
    pub fn tokens(self, tokens: Range<usize>) -> Result<TensorViewMut<'a>> {
        let shape = some_tokens(self.shape, &tokens)?;
        let is_empty = shape.checked_len().unwrap_or(0) == 0;
        let (begin, end) =
            if is_empty { (0, 0) } else { (tokens.start * token_len(shape), tokens.end * token_len(shape)) };
        let data = match self.data {
            BorrowedMut::Host(host) => BorrowedMut::Host(host.part(begin, end)),
            BorrowedMut::Device(slice, dtype) => {
                BorrowedMut::Device(slice.part(begin * dtype.size(), end * dtype.size()), dtype)
            }
        };
        Ok(TensorViewMut { shape, data })
    }

    /// Entry `index` of the outermost dimension; the caller has checked that there is one.
    pub(crate) fn outer(self, index: usize) -> TensorViewMut<'a> {
        let inner = &self.shape.dims()[1..];
        let mut shape = Shape { dims: [1; 4], rank: inner.len() };
        shape.dims[..inner.len()].copy_from_slice(inner);
        let width = inner.iter().product::<usize>();
        let (begin, end) = (index * width, (index + 1) * width);
        let data = match self.data {
            BorrowedMut::Host(host) => BorrowedMut::Host(host.part(begin, end)),
            BorrowedMut::Device(slice, dtype) => {
                BorrowedMut::Device(slice.part(begin * dtype.size(), end * dtype.size()), dtype)
            }
        };
        TensorViewMut { shape, data }
    }

    /// The elements of a host tensor.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor holds another type, [`Error::WrongDevice`] where it is not on the host.
    pub fn into_slice<T: Element>(self) -> Result<&'a mut [T]> {
        let dtype = self.dtype();
        match self.data {
            BorrowedMut::Host(host) => T::unwrap_mut(host).ok_or_else(|| wrong_dtype::<T>(dtype)),
            BorrowedMut::Device(slice, _) => Err(slice.not_on_host("tensor")),
        }
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

/// The shape of some tokens of a tensor whose first dimension is tokens.
fn some_tokens(shape: Shape, tokens: &Range<usize>) -> Result<Shape> {
    let Some(&limit) = shape.dims().first() else {
        return Err(Error::argument("tensor", "one whose first dimension is tokens", shape));
    };
    if tokens.start > tokens.end {
        let (rule, got) = ("a range that ends where it begins or later", format!("{tokens:?}"));
        return Err(Error::argument("tokens", rule, got));
    }
    if tokens.end > limit {
        return Err(Error::Index { what: "last token", limit, got: tokens.end - 1 });
    }
    let [_, b, c, d] = shape.dims;
    Ok(Shape { dims: [tokens.len(), b, c, d], ..shape })
}

/// Elements of one token of a tensor that has elements.
fn token_len(shape: Shape) -> usize {
    shape.dims()[1..].iter().product()
}

/// The number of bytes, where they fit the address space.
fn addressable(dtype: DType, shape: Shape) -> Result<usize> {
    shape.num_bytes(dtype).ok_or_else(|| Error::argument("shape", "at most isize::MAX bytes in all", shape))
}

fn out_of_memory(device: &str, dtype: DType, shape: Shape) -> Error {
    let bytes = shape.checked_len().and_then(|len| len.checked_mul(dtype.size())).unwrap_or(usize::MAX);
    Error::OutOfMemory { device: device.to_owned(), what: "a tensor", bytes }
}

/// Elements from the first to one past the last of `[tokens, heads, dim]`; `None` where they cannot be counted.
fn reach([tokens, heads, dim]: [usize; 3], strides: [usize; 2]) -> Option<usize> {
    if tokens == 0 || heads == 0 || dim == 0 {
        return Some(0);
    }
    let (tokens, heads) = ((tokens - 1).checked_mul(strides[0])?, (heads - 1).checked_mul(strides[1])?);
    tokens.checked_add(heads)?.checked_add(dim)
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
