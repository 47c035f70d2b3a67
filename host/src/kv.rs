//! Keys and values of one layer as the operations see them: paged, strided, owned by anyone.

use crate::config::HeadShape;
use crate::dtype::{DType, Shape};
use crate::error::{Error, Result};
use crate::ledger::OwnedLayer;
use crate::pages::PageCopy;
use crate::tensor::{TensorView, TensorViewMut};

/// Order of the dimensions of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvLayout {
    /// `[num_pages, page_size, num_kv_heads, head_dim]`: FlashInfer's `NHD`, SGLang, vLLM.
    #[default]
    Nhd,
    /// `[num_pages, num_kv_heads, page_size, head_dim]`: FlashInfer's `HND`.
    Hnd,
}

/// Extent of the paged keys (and of the values) of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Pages in the pool.
    pub num_pages: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// KV heads of a token.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Dimensions of a dense pool in `layout`.
    pub fn dims(&self, layout: KvLayout) -> [usize; 4] {
        match layout {
            KvLayout::Nhd => [self.num_pages, self.page_size, self.num_kv_heads, self.head_dim],
            KvLayout::Hnd => [self.num_pages, self.num_kv_heads, self.page_size, self.head_dim],
        }
    }

    fn from_dims(dims: Shape, layout: KvLayout, what: &'static str) -> Result<Self> {
        let &[num_pages, a, b, head_dim] = dims.dims() else {
            return Err(Error::argument(what, "four-dimensional", dims));
        };
        let (page_size, num_kv_heads) = if layout == KvLayout::Nhd { (a, b) } else { (b, a) };
        if a.checked_mul(b).and_then(|len| len.checked_mul(head_dim)).is_none() {
            return Err(Error::argument(what, "of pages that fit the address space", dims));
        }
        Ok(KvShape { num_pages, page_size, num_kv_heads, head_dim })
    }

    /// Elements from the first to one past the last of pages that lie `strides` apart, or `None` where that does not fit
    /// a `usize`.
    pub fn extent(&self, strides: KvStrides) -> Option<usize> {
        if [self.num_pages, self.page_size, self.num_kv_heads, self.head_dim].contains(&0) {
            return Some(0);
        }
        let last = |count: usize, stride: usize| (count - 1).checked_mul(stride);
        last(self.num_pages, strides.page)?
            .checked_add(last(self.page_size, strides.token)?)?
            .checked_add(last(self.num_kv_heads, strides.head)?)?
            .checked_add(self.head_dim)
    }
}

/// Distances in elements; the elements of one head are always adjacent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvStrides {
    /// From a page to the next.
    pub page: usize,
    /// From a token to the next of its page.
    pub token: usize,
    /// From a head to the next of its token.
    pub head: usize,
}

impl KvStrides {
    /// Strides of a dense pool.
    pub fn dense(shape: KvShape, layout: KvLayout) -> Self {
        // Saturated: what does not fit the address space reaches beyond every tensor.
        let of_token = shape.num_kv_heads.saturating_mul(shape.head_dim);
        let page = shape.page_size.saturating_mul(of_token);
        let head = shape.page_size.saturating_mul(shape.head_dim);
        match layout {
            KvLayout::Nhd => KvStrides { page, token: of_token, head: shape.head_dim },
            KvLayout::Hnd => KvStrides { page, token: shape.head_dim, head },
        }
    }

    /// Offset in elements of one head of one token.
    #[inline(always)]
    pub(crate) fn offset(&self, page: usize, token_in_page: usize, head: usize) -> usize {
        page * self.page + token_in_page * self.token + head * self.head
    }
}

/// What errors call strides of the keys, of the values, and of both where they are the same: of pages, tokens and heads.
pub(crate) const K_STRIDES: [&str; 3] = ["k_strides.page", "k_strides.token", "k_strides.head"];
pub(crate) const V_STRIDES: [&str; 3] = ["v_strides.page", "v_strides.token", "v_strides.head"];
const STRIDES: [&str; 3] = ["strides.page", "strides.token", "strides.head"];

/// Paged keys and values of one layer, read only.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    pub(crate) k: TensorView<'a>,
    pub(crate) v: TensorView<'a>,
    pub(crate) shape: KvShape,
    pub(crate) k_strides: KvStrides,
    pub(crate) v_strides: KvStrides,
    /// `None` for another engine's memory.
    pub(crate) owner: Option<OwnedLayer<'a>>,
}

impl<'a> KvView<'a> {
    /// The same memory, of a layer of a cache.
    pub(crate) fn owned_by(self, owner: OwnedLayer<'a>) -> Self {
        KvView { owner: Some(owner), ..self }
    }

    /// Two dense pools of the same type and of the shape that `layout` says.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] or [`Error::Argument`] where the two differ or are not
    /// four-dimensional.
    pub fn new(k: TensorView<'a>, v: TensorView<'a>, layout: KvLayout) -> Result<Self> {
        let shape = KvShape::from_dims(k.shape(), layout, "k")?;
        v.expect("v", &[k.dtype()], k.shape())?;
        let strides = KvStrides::dense(shape, layout);
        Ok(KvView { k, v, shape, k_strides: strides, v_strides: strides, owner: None })
    }

    /// Strided pools inside two one-dimensional tensors, which may be parts of the same allocation: for
    /// `[num_pages, 2, page_size, num_kv_heads, head_dim]` pass the whole as `k`, the whole from the first
    /// value on as `v`, and a page stride of two pages. `strides` are those of the keys and those of the values.
    ///
    /// # Errors
    /// [`Error::Extent`] where a tensor is shorter than the strides reach, [`Error::DType`] where the types
    /// differ.
    pub fn strided(
        k: TensorView<'a>,
        v: TensorView<'a>,
        shape: KvShape,
        strides: [KvStrides; 2],
    ) -> Result<Self> {
        let [k_strides, v_strides] = strides;
        k.expect("k", &[k.dtype()], k.shape())?; // dense
        v.expect("v", &[k.dtype()], v.shape())?;
        reach("k", shape, k_strides, 0, k.shape())?;
        reach("v", shape, v_strides, 0, v.shape())?;
        Ok(KvView { k, v, shape, k_strides, v_strides, owner: None })
    }

    /// Distances in the keys and in the values.
    pub fn strides(&self) -> [KvStrides; 2] {
        [self.k_strides, self.v_strides]
    }

    /// The keys' memory.
    pub fn k(&self) -> TensorView<'a> {
        self.k
    }

    /// The values' memory.
    pub fn v(&self) -> TensorView<'a> {
        self.v
    }

    /// Extent of the pools.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> DType {
        self.k.dtype()
    }

    /// Checks heads and type against a configuration.
    pub(crate) fn expect(&self, heads: &HeadShape, dtype: DType, page_size: usize) -> Result<()> {
        expect(self.shape, self.dtype(), heads, dtype, page_size)
    }
}

/// Where the values of a writable view lie.
#[derive(Debug)]
pub(crate) enum KvStorageMut<'a> {
    /// Keys and values in memory of their own.
    Separate { k: TensorViewMut<'a>, v: TensorViewMut<'a> },
    /// Both in one allocation, the first key and the first value so many elements from its beginning.
    Combined { kv: TensorViewMut<'a>, offsets: [usize; 2] },
}

/// Paged keys and values of one layer, writable.
///
/// # Example
/// Steps over memory of the caller's own: pages `[num_pages, 2, page_size, num_kv_heads, head_dim]`, the two being keys and values, and
/// queries, keys and values as slices of what a fused projection gives, `[tokens, num_qo_heads + 2 * num_kv_heads, head_dim]`.
/// ```
/// use tokenselect::*;
///
/// # fn main() -> Result<()> {
/// let device = Device::cpu();
/// let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
/// let reuse = Some(SelectionCacheConfig::default());
/// let config = SelectConfig { heads, dtype: DType::F32, selection_cache: reuse, ..SelectConfig::default() };
/// let mut selections = SelectionCache::new(&device, &config, 1, 1)?; // one layer, one sequence
/// let mut select = TokenSelect::new(&device, config, Limits::default())?;
///
/// let shape = KvShape { num_pages: 8, page_size: 16, num_kv_heads: 2, head_dim: 64 };
/// let dense = KvStrides::dense(shape, KvLayout::Nhd);
/// let strides = [KvStrides { page: 2 * dense.page, ..dense }; 2]; // of keys and of values
/// let mut memory = vec![0.0f32; 8 * 2 * dense.page];
///
/// for (block, len) in [(40, 40), (1, 41)] { // a prompt, then a token
///     let tables = PageTables { indptr: vec![0, 3], indices: vec![5, 2, 7], last_page_len: vec![len - 32] };
///     let batch = Batch::new(16, vec![0, block], tables)?.with_sequence_indices(vec![0])?;
///     let projection = vec![0.5f32; block as usize * 12 * 64];
///     let qkv = TensorView::new(&projection, [block as usize, 12, 64])?;
///     let input = StepInput { q: qkv.heads(0..8)?, k: qkv.heads(8..10)?, v: qkv.heads(10..12)? };
///     let mut out = vec![0.0f32; block as usize * 8 * 64];
///
///     let pages = TensorViewMut::new(&mut memory, [8 * 2 * dense.page])?;
///     let mut kv = KvViewMut::combined(pages, [0, dense.page], shape, strides)?;
///     let layer = LayerMut { kv: kv.reborrow(), selections: Some(selections.layer_mut(0)?) };
///     select.append_select(&batch, layer, input)?;
///     let output = select.output(&batch, &mut out, None)?;
///     select.attend(&batch, kv.as_view()?, input.q, Over::Selected, output)?;
///     assert!(out.iter().all(|value| (value - 0.5).abs() < 1e-6)); // all values are 0.5, and so is their mean
/// }
/// # Ok(())
/// # }
/// ```
/// On a GPU, [`TensorViewMut::from_device_addr`] and [`TensorView::from_device_addr`] make such views of addresses.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    pub(crate) storage: KvStorageMut<'a>,
    pub(crate) shape: KvShape,
    pub(crate) k_strides: KvStrides,
    pub(crate) v_strides: KvStrides,
    /// `None` for another engine's memory.
    pub(crate) owner: Option<OwnedLayer<'a>>,
}

impl<'a> KvViewMut<'a> {
    /// The same memory, of a layer of a cache.
    pub(crate) fn owned_by(self, owner: OwnedLayer<'a>) -> Self {
        KvViewMut { owner: Some(owner), ..self }
    }

    /// Two dense pools, as in [`KvView::new`].
    ///
    /// # Errors
    /// As [`KvView::new`].
    pub fn new(k: TensorViewMut<'a>, v: TensorViewMut<'a>, layout: KvLayout) -> Result<Self> {
        let shape = KvShape::from_dims(k.shape(), layout, "k")?;
        v.expect("v", &[k.dtype()], k.shape())?;
        let strides = KvStrides::dense(shape, layout);
        let storage = KvStorageMut::Separate { k, v };
        Ok(KvViewMut { storage, shape, k_strides: strides, v_strides: strides, owner: None })
    }

    /// Strided pools inside two tensors that do not overlap: the writable twin of [`KvView::strided`] for keys and
    /// values that do not lie among each other.
    ///
    /// # Errors
    /// As [`KvView::strided`], and [`Error::Argument`] where two keys, or two values, may share an element.
    pub fn strided(
        k: TensorViewMut<'a>,
        v: TensorViewMut<'a>,
        shape: KvShape,
        strides: [KvStrides; 2],
    ) -> Result<Self> {
        let [k_strides, v_strides] = strides;
        reach("k", shape, k_strides, 0, k.shape())?;
        reach("v", shape, v_strides, 0, v.shape())?;
        v.expect("v", &[k.dtype()], v.shape())?;
        expect_apart(K_STRIDES, shape, k_strides, None)?;
        expect_apart(V_STRIDES, shape, v_strides, None)?;
        Ok(KvViewMut { storage: KvStorageMut::Separate { k, v }, shape, k_strides, v_strides, owner: None })
    }

    /// Keys and values in one one-dimensional tensor, the first key and the first value `offsets` elements from its
    /// beginning: the writable twin of [`KvView::strided`] for keys and values that lie among each other, apart from each
    /// other element by element.
    ///
    /// # Errors
    /// [`Error::Extent`] where the tensor is shorter than the strides reach, [`Error::Argument`] where keys and values, or two of
    /// either, may share an element.
    pub fn combined(
        kv: TensorViewMut<'a>,
        offsets: [usize; 2],
        shape: KvShape,
        strides: [KvStrides; 2],
    ) -> Result<Self> {
        let [k_strides, v_strides] = strides;
        reach("kv", shape, k_strides, offsets[0], kv.shape())?;
        reach("kv", shape, v_strides, offsets[1], kv.shape())?;
        let distance = offsets[0].abs_diff(offsets[1]);
        if k_strides == v_strides {
            expect_apart(STRIDES, shape, k_strides, Some(distance))?;
        } else {
            expect_apart(K_STRIDES, shape, k_strides, None)?;
            expect_apart(V_STRIDES, shape, v_strides, None)?;
            expect_pools_apart(shape, offsets, strides)?;
        }
        Ok(KvViewMut {
            storage: KvStorageMut::Combined { kv, offsets },
            shape,
            k_strides,
            v_strides,
            owner: None,
        })
    }

    /// The same memory for a shorter time.
    pub fn reborrow(&mut self) -> KvViewMut<'_> {
        let storage = match &mut self.storage {
            KvStorageMut::Separate { k, v } => KvStorageMut::Separate { k: k.reborrow(), v: v.reborrow() },
            KvStorageMut::Combined { kv, offsets } => {
                KvStorageMut::Combined { kv: kv.reborrow(), offsets: *offsets }
            }
        };
        let (k_strides, v_strides) = (self.k_strides, self.v_strides);
        KvViewMut { storage, shape: self.shape, k_strides, v_strides, owner: self.owner }
    }

    /// The same memory, read only.
    ///
    /// # Errors
    /// None where the view was made by one of its constructors.
    pub fn as_view(&self) -> Result<KvView<'_>> {
        let (k, v) = match &self.storage {
            KvStorageMut::Separate { k, v } => (k.as_view(), v.as_view()),
            KvStorageMut::Combined { kv, offsets: [k, v] } => {
                (kv.as_view().tail(*k)?, kv.as_view().tail(*v)?)
            }
        };
        let view = KvView::strided(k, v, self.shape, [self.k_strides, self.v_strides])?;
        Ok(KvView { owner: self.owner, ..view })
    }

    /// Copies leading tokens of pages, keys and values: the copy of copy-on-write. Such copies are rare, so one for each run
    /// of adjacent elements will do. The caller has checked that all pages are within the pool.
    pub(crate) fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<()> {
        let (shape, strides) = (self.shape, [self.k_strides, self.v_strides]);
        let token = shape.num_kv_heads * shape.head_dim;
        let copy_in = |pool: &mut TensorViewMut<'_>, base: usize, strides: KvStrides| -> Result<()> {
            let token_is_dense = strides.token == token && strides.head == shape.head_dim;
            for copy in copies {
                let at =
                    |page: u32, token: usize, head: usize| base + strides.offset(page as usize, token, head);
                if token_is_dense {
                    pool.copy_within(at(copy.src, 0, 0), at(copy.dst, 0, 0), copy.num_tokens * token)?;
                    continue;
                }
                for token in 0..copy.num_tokens {
                    for head in 0..shape.num_kv_heads {
                        pool.copy_within(
                            at(copy.src, token, head),
                            at(copy.dst, token, head),
                            shape.head_dim,
                        )?;
                    }
                }
            }
            Ok(())
        };
        match &mut self.storage {
            KvStorageMut::Separate { k, v } => {
                copy_in(k, 0, strides[0])?;
                copy_in(v, 0, strides[1])
            }
            KvStorageMut::Combined { kv, offsets } => {
                copy_in(kv, offsets[0], strides[0])?;
                copy_in(kv, offsets[1], strides[1])
            }
        }
    }

    /// Extent of the pools.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> DType {
        match &self.storage {
            KvStorageMut::Separate { k, .. } => k.dtype(),
            KvStorageMut::Combined { kv, .. } => kv.dtype(),
        }
    }

    /// Checks heads and type against a configuration.
    pub(crate) fn expect(&self, heads: &HeadShape, dtype: DType, page_size: usize) -> Result<()> {
        expect(self.shape, self.dtype(), heads, dtype, page_size)
    }
}

impl KvStorageMut<'_> {
    /// The tensors, with their names.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&'static str, TensorView<'_>)> {
        let (first, second) = match self {
            KvStorageMut::Separate { k, v } => (("k pages", k.as_view()), Some(("v pages", v.as_view()))),
            KvStorageMut::Combined { kv, .. } => (("kv pages", kv.as_view()), None),
        };
        std::iter::once(first).chain(second)
    }
}

/// Checks that no two heads of a pool share an element: sorted by their strides, each step goes beyond all that the smaller ones
/// reach. With `distance` there are two such pools, so far from each other.
fn expect_apart(
    [page, token, head]: [&'static str; 3],
    shape: KvShape,
    strides: KvStrides,
    distance: Option<usize>,
) -> Result<()> {
    let mut steps = [
        (distance.unwrap_or(0), if distance.is_some() { 2 } else { 1 }, "offsets"),
        (strides.page, shape.num_pages, page),
        (strides.token, shape.page_size, token),
        (strides.head, shape.num_kv_heads, head),
    ];
    steps.sort_by_key(|&(step, count, _)| (step, count));
    let (mut reached, mut within) = (shape.head_dim, String::new());
    for (step, count, what) in steps.into_iter().filter(|&(_, count, _)| count > 1) {
        let apart = if what == "offsets" { " apart" } else { "" };
        if step < reached {
            let rule = format!("at least {reached}{apart}, so that nothing is in two places{within}");
            return Err(Error::argument(what, rule, step));
        }
        reached = step.saturating_mul(count - 1).saturating_add(reached);
        if what == "offsets" {
            within = format!(" with `offsets` {step} apart");
        }
    }
    Ok(())
}

/// That keys and values of other strides share no element: one pool lies behind the other, or, where pages are equally far apart,
/// each page of one between two of the other.
fn expect_pools_apart(shape: KvShape, offsets: [usize; 2], strides: [KvStrides; 2]) -> Result<()> {
    let order = if offsets[0] < offsets[1] { [0, 1] } else { [1, 0] };
    let distance = offsets[order[1]] - offsets[order[0]];
    let extents =
        |num_pages| order.map(|of| KvShape { num_pages, ..shape }.extent(strides[of]).unwrap_or(usize::MAX));
    let [first, _] = extents(shape.num_pages);
    let page = strides[0].page;
    let among_each_other = page > 0 && page == strides[1].page && {
        let ([first, second], distance) = (extents(1), distance % page);
        first <= distance && second <= page - distance
    };
    if distance >= first || among_each_other {
        return Ok(());
    }
    let rule = format!(
        "at least {first} apart, or their pages between each other, where keys and values have other strides"
    );
    Err(Error::argument("offsets", rule, distance))
}

fn reach(what: &'static str, shape: KvShape, strides: KvStrides, offset: usize, given: Shape) -> Result<()> {
    let needed = shape.extent(strides).and_then(|extent| extent.checked_add(offset)).unwrap_or(usize::MAX);
    let got = given.checked_len().unwrap_or(0);
    if got >= needed {
        return Ok(());
    }
    let (shape, strides) =
        (shape.dims(KvLayout::Nhd).into(), vec![strides.page, strides.token, strides.head]);
    Err(Error::Extent { what, shape, strides, offset, needed, got })
}

fn expect(got: KvShape, dtype: DType, heads: &HeadShape, expected: DType, page_size: usize) -> Result<()> {
    if dtype != expected {
        return Err(Error::DType { what: "kv", expected: expected.to_string(), got: dtype });
    }
    let wanted = KvShape {
        num_pages: got.num_pages,
        page_size,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
    };
    if got != wanted {
        let (expected, got) = (wanted.dims(KvLayout::Nhd).into(), got.dims(KvLayout::Nhd).into());
        return Err(Error::Shape { what: "kv", expected, got });
    }
    Ok(())
}
