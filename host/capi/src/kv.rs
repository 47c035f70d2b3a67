//! Paged keys and values of one layer that somebody else owns.

use std::ffi::c_void;

use tokenselect::{DType, Device, Error, KvShape, KvStrides, KvView, KvViewMut};

use crate::pointers::{Argument, reference_mut};
use crate::status::{Failure, Result, fence, ts_status};

/// Paged keys and values of one layer. Their type is the configuration's; they lie on the context's device.
///
/// The element `i` of head `h` of token `t` of page `p` is at `p * stride_page + t * stride_token + h * stride_head + i`.
/// Keys and values may lie among each other, as in `[num_pages, 2, page_size, num_kv_heads, head_dim]`. Unused places are
/// never read into a result.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_kv_view {
    /// First key. Aligned to 16 bytes on a GPU.
    pub k: *mut c_void,
    /// First value. As `k`.
    pub v: *mut c_void,
    /// Pages in the pool.
    pub num_pages: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// KV heads of a token.
    pub num_kv_heads: usize,
    /// Elements of a head, which are adjacent.
    pub head_dim: usize,
    /// Elements from a page to the next. On a GPU strides are multiples of 8.
    pub stride_page: usize,
    /// Elements from a token to the next of its page.
    pub stride_token: usize,
    /// Elements from a head to the next of its token.
    pub stride_head: usize,
}

/// Sets the strides of a view to those of a dense pool of its `num_pages`, `page_size`, `num_kv_heads` and `head_dim`.
/// `layout` is a `ts_kv_layout`.
///
/// Errors: `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_CONFIG` where a page does not fit the address space.
///
/// # Safety
/// - `kv` is null or a view, its strides written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_kv_view_set_dense(kv: *mut ts_kv_view, layout: i32) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let kv = unsafe { reference_mut("kv", kv)? };
        let layout = crate::config::layout("layout", layout)?;
        let shape = kv.shape();
        let page =
            shape.page_size.checked_mul(shape.num_kv_heads).and_then(|n| n.checked_mul(shape.head_dim));
        if page.is_none() {
            let (rule, got) = ("of pages that fit the address space".into(), format!("{shape:?}"));
            return Err(Error::Config { field: "kv", rule, got }.into());
        }
        kv.set_strides(KvStrides::dense(shape, layout));
        Ok(())
    })
}

impl ts_kv_view {
    pub(crate) fn shape(&self) -> KvShape {
        KvShape {
            num_pages: self.num_pages,
            page_size: self.page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
        }
    }

    pub(crate) fn set_strides(&mut self, strides: KvStrides) {
        (self.stride_page, self.stride_token, self.stride_head) = (strides.page, strides.token, strides.head);
    }

    fn strides(&self) -> KvStrides {
        KvStrides { page: self.stride_page, token: self.stride_token, head: self.stride_head }
    }

    /// Keys and values from the first element to the last, gaps included.
    pub(crate) fn arguments(&self, dtype: DType) -> Result<[Argument; 2]> {
        let too_large = || Error::Config {
            field: "kv",
            rule: "of strides within the address space".into(),
            got: format!("{:?}", self.strides()),
        };
        let extent = self.shape().extent(self.strides()).ok_or_else(too_large)?;
        Ok([Argument::new("kv.k", self.k, dtype, [extent]), Argument::new("kv.v", self.v, dtype, [extent])])
    }

    /// The view, to read.
    ///
    /// # Safety
    /// - The memory is `device`'s and there during `'a`; nothing writes it while operations on the view run.
    pub(crate) unsafe fn view<'a>(&self, device: &'a Device, dtype: DType) -> Result<KvView<'a>> {
        let [k, v] = self.arguments(dtype)?;
        // SAFETY: the caller's promise.
        let (k, v) = unsafe { (k.view(device)?, v.view(device)?) };
        Ok(KvView::strided(k, v, self.shape(), [self.strides(); 2])?)
    }

    /// The view, to write.
    ///
    /// # Safety
    /// - As for [`view`](Self::view), and nothing reads it either.
    pub(crate) unsafe fn view_mut<'a>(&self, device: &'a Device, dtype: DType) -> Result<KvViewMut<'a>> {
        let (shape, strides) = (self.shape(), [self.strides(); 2]);
        let [k, v] = self.arguments(dtype)?;
        if !k.overlaps(&v)? {
            // SAFETY: the caller's promise.
            let (k, v) = unsafe { (k.view_mut(device)?, v.view_mut(device)?) };
            return Ok(KvViewMut::strided(k, v, shape, strides)?);
        }
        // Among each other: one tensor from the first of the two on.
        let first = if v.data.addr() < k.data.addr() { v } else { k };
        let offset = |argument: &Argument| argument.data.addr() - first.data.addr();
        let offsets = [offset(&k), offset(&v)];
        if offsets[0] == offsets[1] {
            return Err(Failure::Overlap { written: "kv.k", other: "kv.v" });
        }
        if offsets.iter().any(|offset| !offset.is_multiple_of(dtype.size())) {
            let (what, align, addr) = ("kv.v", dtype.size(), v.data.addr());
            return Err(Failure::Misaligned { what, align, addr });
        }
        let offsets = offsets.map(|offset| offset / dtype.size());
        let extent = shape.extent(self.strides());
        let len = extent.and_then(|extent| extent.checked_add(offsets[0].max(offsets[1])));
        let both = Argument::new("kv", first.data, dtype, [len.unwrap_or(usize::MAX)]);
        // SAFETY: the caller's promise; all bytes between the first and the last belong to the pools.
        let both = unsafe { both.view_mut(device)? };
        Ok(KvViewMut::combined(both, offsets, shape, strides)?)
    }
}
