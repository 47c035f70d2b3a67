//! Paged keys and values of one layer that somebody else owns.

use std::ffi::c_void;

use tokenselect::{DType, Device, Error, KvShape, KvStrides, KvView, KvViewMut};

use crate::pointers::Argument;
use crate::sized;
use crate::status::{Failure, Result, fence, ts_status};

/// Paged keys and values of one layer. Their type is the configuration's; they lie on the context's device.
///
/// The element `i` of head `h` of token `t` of page `p` of the keys is at `p * k_stride_page + t * k_stride_token + h *
/// k_stride_head + i`, and of the values likewise. The two may lie among each other in either order, as in `[num_pages,
/// 2, page_size, num_kv_heads, head_dim]` or `[num_pages, num_kv_heads, page_size, 2 * head_dim]`, as long as no
/// element is in both. Unused places are never read into a result. Fields that are not set are 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ts_kv_view {
    /// `sizeof(ts_kv_view)`.
    pub struct_size: usize,
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
    /// Elements from a page to the next, in the keys. On a GPU strides are multiples of 8.
    pub k_stride_page: usize,
    /// Elements from a token to the next of its page, in the keys.
    pub k_stride_token: usize,
    /// Elements from a head to the next of its token, in the keys.
    pub k_stride_head: usize,
    /// As `k_stride_page`, in the values.
    pub v_stride_page: usize,
    /// As `k_stride_token`, in the values.
    pub v_stride_token: usize,
    /// As `k_stride_head`, in the values.
    pub v_stride_head: usize,
}

/// Sets all strides of a view to those of dense pools of its `num_pages`, `page_size`, `num_kv_heads` and `head_dim`.
/// `layout` is a `ts_kv_layout`.
///
/// Errors: `TS_STATUS_STRUCT_SIZE`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_CONFIG` where a page does not fit the address
/// space.
///
/// # Safety
/// - `kv` is null or a view of `kv->struct_size` bytes that nothing else uses meanwhile, its strides written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_kv_view_set_dense(kv: *mut ts_kv_view, layout: i32) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let mut view = unsafe { sized::read(kv)? };
        let layout = crate::config::layout("layout", layout)?;
        let shape = view.shape();
        let page =
            shape.page_size.checked_mul(shape.num_kv_heads).and_then(|n| n.checked_mul(shape.head_dim));
        if page.is_none() {
            let (rule, got) = ("of pages that fit the address space".into(), format!("{shape:?}"));
            return Err(Error::Argument { what: "kv", rule, got }.into());
        }
        view.set_strides([KvStrides::dense(shape, layout); 2]);
        // SAFETY: as above.
        unsafe { sized::write(kv, view.struct_size, view) }
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

    pub(crate) fn set_strides(&mut self, [k, v]: [KvStrides; 2]) {
        (self.k_stride_page, self.k_stride_token, self.k_stride_head) = (k.page, k.token, k.head);
        (self.v_stride_page, self.v_stride_token, self.v_stride_head) = (v.page, v.token, v.head);
    }

    /// Those of the keys and those of the values.
    fn strides(&self) -> [KvStrides; 2] {
        let (page, token, head) = (self.k_stride_page, self.k_stride_token, self.k_stride_head);
        let k = KvStrides { page, token, head };
        let (page, token, head) = (self.v_stride_page, self.v_stride_token, self.v_stride_head);
        [k, KvStrides { page, token, head }]
    }

    /// Keys and values from the first element to the last, gaps included.
    pub(crate) fn arguments(&self, dtype: DType) -> Result<[Argument; 2]> {
        let [k, v] = self.strides();
        Ok([self.pool("kv.k", self.k, k, dtype)?, self.pool("kv.v", self.v, v, dtype)?])
    }

    fn pool(
        &self,
        what: &'static str,
        data: *mut c_void,
        strides: KvStrides,
        dtype: DType,
    ) -> Result<Argument> {
        let too_large = || Error::Argument {
            what,
            rule: "of strides within the address space".into(),
            got: format!("{strides:?}"),
        };
        Ok(Argument::new(what, data, dtype, [self.shape().extent(strides).ok_or_else(too_large)?]))
    }

    /// The view, to read.
    ///
    /// # Safety
    /// - The memory is `device`'s and there during `'a`; nothing writes it while operations on the view run.
    pub(crate) unsafe fn view<'a>(&self, device: &'a Device, dtype: DType) -> Result<KvView<'a>> {
        let [k, v] = self.arguments(dtype)?;
        // SAFETY: the caller's promise.
        let (k, v) = unsafe { (k.view(device)?, v.view(device)?) };
        Ok(KvView::strided(k, v, self.shape(), self.strides())?)
    }

    /// The view, to write.
    ///
    /// # Safety
    /// - As for [`view`](Self::view), and nothing reads it either.
    pub(crate) unsafe fn view_mut<'a>(&self, device: &'a Device, dtype: DType) -> Result<KvViewMut<'a>> {
        let (shape, strides) = (self.shape(), self.strides());
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
        let end = |place: usize| shape.extent(strides[place])?.checked_add(offsets[place]);
        let len = end(0).zip(end(1)).map_or(usize::MAX, |(k, v)| k.max(v));
        let both = Argument::new("kv", first.data, dtype, [len]);
        // SAFETY: the caller's promise; all bytes between the first and the last belong to the pools.
        let both = unsafe { both.view_mut(device)? };
        Ok(KvViewMut::combined(both, offsets, shape, strides)?)
    }
}
