//! Tensors as operations take them: address, type, shape and strides that were checked, before anything is borrowed.

use half::{bf16, f16};
use tokenselect::{DType, Element, KvShape, KvStrides, Shape, TensorView, TensorViewMut};

use crate::errors::{Failure, Kind, Result};

/// Bytes from the first to one past the last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub what: &'static str,
    pub begin: usize,
    pub end: usize,
}

impl Span {
    /// Checks that a span that is written shares no byte with this one.
    pub fn expect_apart(&self, other: &Span) -> Result<()> {
        let is_apart = self.begin >= other.end || other.begin >= self.end;
        if is_apart || self.begin == self.end || other.begin == other.end {
            return Ok(());
        }
        let range = |span: &Span| format!("[{:#x}, {:#x})", span.begin, span.end);
        let rule = format!(
            "is written and must not overlap `{}`: it is at {}, that at {}",
            other.what,
            range(self),
            range(other)
        );
        Err(Failure::tensor("TS_STATUS_OVERLAP", self.what, rule))
    }
}

/// Checks that nothing written shares a byte with what is read, or with anything else that is written.
pub(crate) fn expect_apart(written: &[Span], read: &[Span]) -> Result<()> {
    for (place, span) in written.iter().enumerate() {
        for other in written[place + 1..].iter().chain(read) {
            span.expect_apart(other)?;
        }
    }
    Ok(())
}

/// A tensor that was looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument {
    pub what: &'static str,
    pub addr: usize,
    pub dtype: DType,
    pub shape: Shape,
    /// Of tokens and heads, where the tensor `[tokens, heads, dim]` is not dense.
    pub strides: Option<[usize; 2]>,
}

impl Argument {
    /// Elements from the first to the last, gaps included.
    fn len(&self) -> Result<usize> {
        let len = match (self.strides, self.shape.dims()) {
            (Some(strides), &[tokens, heads, dim]) => reach([tokens, heads, dim], strides),
            _ => self.shape.checked_len(),
        };
        let fits = |len: &usize| {
            len.checked_mul(self.dtype.size()).is_some_and(|bytes| bytes <= isize::MAX as usize)
        };
        len.filter(fits).ok_or_else(|| {
            Failure::argument(self.what, "be at most isize::MAX bytes", format!("shape {}", self.shape))
        })
    }

    /// Its bytes, gaps included.
    pub fn span(&self) -> Result<Span> {
        let bytes = self.len()? * self.dtype.size();
        Ok(Span { what: self.what, begin: self.addr, end: self.addr.saturating_add(bytes) })
    }

    fn check(&self) -> Result<usize> {
        let (len, align) = (self.len()?, self.dtype.size());
        if len > 0 && self.addr == 0 {
            return Err(Failure::tensor(
                "TS_STATUS_NULL_POINTER",
                self.what,
                "must have memory, its address is 0",
            ));
        }
        if len > 0 && !self.addr.is_multiple_of(align) {
            let rule = format!("must be at an address divisible by {align}, got {:#x}", self.addr);
            return Err(Failure::tensor("TS_STATUS_MISALIGNED", self.what, rule));
        }
        Ok(len)
    }

    /// The tensor, to read.
    ///
    /// # Safety
    /// - The memory is `device`'s (the host's for the processor) and holds the tensor, gaps included, during `'a`.
    /// - Nothing writes it while operations on the tensor run.
    pub unsafe fn view<'a>(&self, device: &'a tokenselect::Device) -> Result<TensorView<'a>> {
        self.check()?;
        if !device.is_cpu() {
            let (addr, dtype) = (self.addr as u64, self.dtype);
            // SAFETY: the caller's promise. What kernels ask of alignment, operations check.
            return Ok(unsafe {
                match (self.strides, self.shape.dims()) {
                    (Some(strides), &[tokens, heads, dim]) => {
                        let shape = [tokens, heads, dim];
                        TensorView::strided_from_device_addr(device, addr, dtype, shape, strides)?
                    }
                    _ => TensorView::from_device_addr(device, addr, dtype, self.shape)?,
                }
            });
        }
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                DType::F16 => self.host::<f16>(),
                DType::Bf16 => self.host::<bf16>(),
                DType::F32 => self.host::<f32>(),
                DType::U32 => self.host::<u32>(),
                DType::U64 => self.host::<u64>(),
                DType::F64 => self.host::<f64>(),
                other => Err(unknown(self.what, other)),
            }
        }
    }

    /// The tensor, dense, to write.
    ///
    /// # Safety
    /// - As for [`view`](Self::view), and nothing reads it either.
    pub unsafe fn view_mut<'a>(&self, device: &'a tokenselect::Device) -> Result<TensorViewMut<'a>> {
        self.check()?;
        if !device.is_cpu() {
            let (addr, dtype) = (self.addr as u64, self.dtype);
            // SAFETY: the caller's promise.
            return Ok(unsafe { TensorViewMut::from_device_addr(device, addr, dtype, self.shape)? });
        }
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                DType::F16 => self.host_mut::<f16>(),
                DType::Bf16 => self.host_mut::<bf16>(),
                DType::F32 => self.host_mut::<f32>(),
                DType::U32 => self.host_mut::<u32>(),
                DType::U64 => self.host_mut::<u64>(),
                DType::F64 => self.host_mut::<f64>(),
                other => Err(unknown(self.what, other)),
            }
        }
    }

    unsafe fn host<'a, T: Element>(&self) -> Result<TensorView<'a>> {
        let len = self.check()?;
        // SAFETY: aligned and not null, or empty; the rest is the caller's promise.
        let elements: &'a [T] = unsafe { slice(self.addr, len) };
        Ok(match (self.strides, self.shape.dims()) {
            (Some(strides), &[tokens, heads, dim]) => {
                TensorView::strided(elements, [tokens, heads, dim], strides)?
            }
            _ => TensorView::new(elements, self.shape)?,
        })
    }

    unsafe fn host_mut<'a, T: Element>(&self) -> Result<TensorViewMut<'a>> {
        let len = self.check()?;
        // SAFETY: aligned and not null, or empty; the rest is the caller's promise.
        let elements: &'a mut [T] = if len == 0 {
            &mut []
        } else {
            unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(self.addr), len) }
        };
        Ok(TensorViewMut::new(elements, self.shape)?)
    }
}

/// # Safety
/// - `addr` is aligned for `T`, and `len` elements are there during `'a`, which nothing writes; or `len` is 0.
unsafe fn slice<'a, T>(addr: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(addr), len) }
}

fn unknown(what: &'static str, dtype: DType) -> Failure {
    let text = format!("`{what}` must be of a type that this package knows, got {dtype}");
    Failure::Rule { kind: Kind::ArgumentType, status: "TS_STATUS_ELEMENT_TYPE", text }
}

/// Elements from the first to one past the last of a strided tensor `[tokens, heads, dim]`.
fn reach([tokens, heads, dim]: [usize; 3], [token, head]: [usize; 2]) -> Option<usize> {
    if tokens == 0 || heads == 0 || dim == 0 {
        return Some(0);
    }
    (tokens - 1).checked_mul(token)?.checked_add((heads - 1).checked_mul(head)?)?.checked_add(dim)
}

/// Pages of keys, or of values, from the first element to the last.
pub(crate) fn pages(
    what: &'static str,
    addr: usize,
    dtype: DType,
    shape: KvShape,
    strides: KvStrides,
) -> Result<Argument> {
    let too_large =
        || Failure::argument(what, "have strides within the address space", format!("{strides:?}"));
    let len = shape.extent(strides).ok_or_else(too_large)?;
    Ok(Argument { what, addr, dtype, shape: [len].into(), strides: None })
}
