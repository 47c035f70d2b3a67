//! From raw pointers to references and tensors, with every check that needs no trust.

use std::ffi::c_void;

use half::{bf16, f16};
use tokenselect::{DType, Device, Error, Shape, TensorView, TensorViewMut};

use crate::status::{Failure, Result};

/// Kernels move 16 bytes at a time.
const GPU_ALIGN: usize = 16;

/// Checks that a pointer is neither null nor misaligned for its type.
fn check<T>(what: &'static str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(Failure::Null { what });
    }
    check_align(what, pointer.addr(), align_of::<T>())
}

fn check_align(what: &'static str, addr: usize, align: usize) -> Result<()> {
    if addr.is_multiple_of(align) { Ok(()) } else { Err(Failure::Misaligned { what, align, addr }) }
}

/// A handle or structure to read.
///
/// # Safety
/// - Null, or a `T` that nothing writes during `'a`.
pub(crate) unsafe fn reference<'a, T>(what: &'static str, pointer: *const T) -> Result<&'a T> {
    check(what, pointer)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    Ok(unsafe { &*pointer })
}

/// A handle to change.
///
/// # Safety
/// - Null, or a `T` that nothing else uses during `'a`.
pub(crate) unsafe fn reference_mut<'a, T>(what: &'static str, pointer: *mut T) -> Result<&'a mut T> {
    check(what, pointer)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    Ok(unsafe { &mut *pointer })
}

/// An array to read. May be null where `len` is 0.
///
/// # Safety
/// - Null, or `len` elements that nothing writes during `'a`.
pub(crate) unsafe fn slice<'a, T>(what: &'static str, pointer: *const T, len: usize) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    check(what, pointer)?;
    check_len::<T>(what, len)?;
    // SAFETY: not null, aligned, and of a size that the address space has; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// An array to write. May be null where `len` is 0.
///
/// # Safety
/// - Null, or `len` elements that nothing else uses during `'a`.
pub(crate) unsafe fn slice_mut<'a, T>(
    what: &'static str,
    pointer: *mut T,
    len: usize,
) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    check(what, pointer)?;
    check_len::<T>(what, len)?;
    // SAFETY: not null, aligned, and of a size that the address space has; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) })
}

fn check_len<T>(what: &'static str, len: usize) -> Result<()> {
    match len.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::Index { what, limit: isize::MAX as usize / size_of::<T>(), got: len }.into()),
    }
}

/// Writes an answer through the caller's pointer.
///
/// # Safety
/// - Null, or room for a `T` that nothing else uses meanwhile.
pub(crate) unsafe fn answer<T>(
    what: &'static str,
    to: *mut T,
    make: impl FnOnce() -> Result<T>,
) -> Result<()> {
    check(what, to)?;
    let made = make()?;
    // SAFETY: not null and aligned; the rest is the caller's promise. What was there is plain data.
    unsafe { to.write(made) };
    Ok(())
}

/// Writes a new handle through the caller's pointer; null where making it fails.
///
/// # Safety
/// - Null, or room for a pointer that nothing else uses meanwhile.
pub(crate) unsafe fn hand_out<T>(
    what: &'static str,
    to: *mut *mut T,
    make: impl FnOnce() -> Result<T>,
) -> Result<()> {
    check(what, to)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    unsafe { to.write(std::ptr::null_mut()) };
    let made = Box::into_raw(Box::new(make()?));
    // SAFETY: as above.
    unsafe { to.write(made) };
    Ok(())
}

/// Takes a handle back and drops it. Null is nothing.
///
/// # Safety
/// - Null, or made by [`hand_out`], and used for the last time.
pub(crate) unsafe fn take_back<T>(what: &'static str, handle: *mut T) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    check(what, handle)?;
    // SAFETY: made by `Box::into_raw` in `hand_out`, and not used again, by the caller's promise.
    drop(unsafe { Box::from_raw(handle) });
    Ok(())
}

/// A tensor that the caller has described by a pointer; type and shape follow from the operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument {
    pub what: &'static str,
    pub data: *mut c_void,
    pub dtype: DType,
    pub shape: Shape,
    /// Of tokens and heads, where the tensor `[tokens, heads, dim]` is not dense.
    strides: Option<[usize; 2]>,
}

impl Argument {
    /// An argument that is read.
    pub fn new(what: &'static str, data: *const c_void, dtype: DType, shape: impl Into<Shape>) -> Self {
        Argument { what, data: data.cast_mut(), dtype, shape: shape.into(), strides: None }
    }

    /// An argument `[tokens, heads, dim]` that is read, with the strides of tokens and heads; 0 is that of a dense tensor.
    pub fn heads(
        what: &'static str,
        data: *const c_void,
        dtype: DType,
        shape: [usize; 3],
        strides: [usize; 2],
    ) -> Self {
        let dense = [shape[1] * shape[2], shape[2]];
        let strides = [0, 1].map(|i| if strides[i] == 0 { dense[i] } else { strides[i] });
        Argument { strides: (strides != dense).then_some(strides), ..Argument::new(what, data, dtype, shape) }
    }

    /// Shape and strides, where the tensor is not dense.
    fn strided(&self) -> Option<([usize; 3], [usize; 2])> {
        let &[tokens, heads, dim] = self.shape.dims() else { return None };
        self.strides.map(|strides| ([tokens, heads, dim], strides))
    }

    /// Elements from the first to the last, gaps included, where their bytes fit the address space.
    fn len(&self) -> Result<usize> {
        let fits = |len: &usize| {
            len.checked_mul(self.dtype.size()).is_some_and(|bytes| bytes <= isize::MAX as usize)
        };
        let too_large = || Error::Argument {
            what: self.what,
            rule: "at most isize::MAX bytes".into(),
            got: match self.strides {
                None => self.shape.to_string(),
                Some(strides) => format!("{} in strides {strides:?}", self.shape),
            },
        };
        let len = match self.strided() {
            None => self.shape.checked_len(),
            Some((shape, strides)) => reach(shape, strides),
        };
        Ok(len.filter(fits).ok_or_else(too_large)?)
    }

    /// First byte and the one after the last.
    fn span(&self) -> Result<(usize, usize)> {
        let begin = self.data.addr();
        Ok((begin, begin.saturating_add(self.len()? * self.dtype.size())))
    }

    /// Whether a byte belongs to both.
    pub fn overlaps(&self, other: &Argument) -> Result<bool> {
        let ((begin, end), (other_begin, other_end)) = (self.span()?, other.span()?);
        Ok(begin < other_end && other_begin < end)
    }

    /// Checks that nothing written here is part of another argument.
    pub fn expect_apart<'a>(&self, others: impl IntoIterator<Item = &'a Argument>) -> Result<()> {
        for other in others {
            if self.overlaps(other)? {
                return Err(Failure::Overlap { written: self.what, other: other.what });
            }
        }
        Ok(())
    }

    fn check(&self, align: usize) -> Result<usize> {
        let len = self.len()?;
        if len > 0 && self.data.is_null() {
            return Err(Failure::Null { what: self.what });
        }
        if len > 0 {
            check_align(self.what, self.data.addr(), align)?;
        }
        Ok(len)
    }

    /// The tensor, to read.
    ///
    /// # Safety
    /// - The memory is `device`'s (the host's for the processor) and holds the tensor, gaps included, during `'a`.
    /// - Nothing writes it while operations on the tensor run.
    pub unsafe fn view<'a>(&self, device: &'a Device) -> Result<TensorView<'a>> {
        // SAFETY: the caller's promise.
        unsafe { self.view_aligned(device, GPU_ALIGN) }
    }

    /// A table, to read, whose entries a GPU reads one at a time.
    ///
    /// # Safety
    /// - As for [`view`](Self::view).
    pub unsafe fn table<'a>(&self, device: &'a Device) -> Result<TensorView<'a>> {
        // SAFETY: the caller's promise.
        unsafe { self.view_aligned(device, self.dtype.size()) }
    }

    /// The tensor, to read, aligned as said where it is a GPU's.
    ///
    /// # Safety
    /// - As for [`view`](Self::view).
    unsafe fn view_aligned<'a>(&self, device: &'a Device, align: usize) -> Result<TensorView<'a>> {
        if !device.is_cpu() {
            self.check(align)?;
            let (addr, dtype) = (self.data.addr() as u64, self.dtype);
            // SAFETY: the caller's promise, and aligned.
            return Ok(unsafe {
                match self.strided() {
                    None => TensorView::from_device_addr(device, addr, dtype, self.shape)?,
                    Some((shape, strides)) => {
                        TensorView::strided_from_device_addr(device, addr, dtype, shape, strides)?
                    }
                }
            });
        }
        self.check(self.dtype.size())?;
        // SAFETY: checked for null and alignment; the rest is the caller's promise.
        unsafe {
            match self.dtype {
                DType::F16 => self.host_view::<f16>(),
                DType::Bf16 => self.host_view::<bf16>(),
                DType::F32 => self.host_view::<f32>(),
                DType::U32 => self.host_view::<u32>(),
                DType::F64 => self.host_view::<f64>(),
                _ => self.host_view::<u64>(),
            }
        }
    }

    /// The tensor, to write.
    ///
    /// # Safety
    /// - As for [`view`](Self::view), and nothing reads it either.
    pub unsafe fn view_mut<'a>(&self, device: &'a Device) -> Result<TensorViewMut<'a>> {
        if !device.is_cpu() {
            self.check(GPU_ALIGN)?;
            // SAFETY: the caller's promise, and aligned.
            return Ok(unsafe {
                TensorViewMut::from_device_addr(device, self.data.addr() as u64, self.dtype, self.shape)?
            });
        }
        self.check(self.dtype.size())?;
        // SAFETY: checked for null and alignment; the rest is the caller's promise.
        unsafe {
            match self.dtype {
                DType::F16 => self.host_view_mut::<f16>(),
                DType::Bf16 => self.host_view_mut::<bf16>(),
                DType::F32 => self.host_view_mut::<f32>(),
                DType::U32 => self.host_view_mut::<u32>(),
                DType::F64 => self.host_view_mut::<f64>(),
                _ => self.host_view_mut::<u64>(),
            }
        }
    }

    unsafe fn host_view<'a, T: tokenselect::Element>(&self) -> Result<TensorView<'a>> {
        // SAFETY: the caller's promise.
        let elements = unsafe { slice(self.what, self.data.cast::<T>(), self.len()?)? };
        Ok(match self.strided() {
            None => TensorView::new(elements, self.shape)?,
            Some((shape, strides)) => TensorView::strided(elements, shape, strides)?,
        })
    }

    unsafe fn host_view_mut<'a, T: tokenselect::Element>(&self) -> Result<TensorViewMut<'a>> {
        // SAFETY: the caller's promise.
        let elements = unsafe { slice_mut(self.what, self.data.cast::<T>(), self.len()?)? };
        Ok(TensorViewMut::new(elements, self.shape)?)
    }
}

/// Elements from the first to one past the last of a strided tensor `[tokens, heads, dim]`.
fn reach([tokens, heads, dim]: [usize; 3], [token, head]: [usize; 2]) -> Option<usize> {
    if tokens == 0 || heads == 0 || dim == 0 {
        return Some(0);
    }
    (tokens - 1).checked_mul(token)?.checked_add((heads - 1).checked_mul(head)?)?.checked_add(dim)
}
