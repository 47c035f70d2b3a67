//! Keys and values of a problem in pages: borrowed memory in every layout, and owned caches. Pages are
//! shuffled and whatever no token owns is NaN, so that a wrong page or slot cannot go unnoticed.

use tokenselect::{
    Batch, CacheConfig, Device, KvLayout, KvShape, KvStrides, KvView, KvViewMut, Limits, Operations,
    PageTables, PagedKvCache, SequenceId, Tensor, TokenSelect,
};

use super::problem::{Problem, Row};
use super::{Random, tensor, to_device};

/// How borrowed memory is arranged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Storage {
    /// `[num_pages, page_size, hkv, d]`, keys and values apart.
    Nhd,
    /// `[num_pages, hkv, page_size, d]`, keys and values apart.
    Hnd,
    /// `[num_pages, 2, page_size, hkv, d]`, keys and values in one allocation.
    CombinedNhd,
    /// `[num_pages, 2, hkv, page_size, d]`.
    CombinedHnd,
    /// `[num_pages, page_size, hkv, 2, d + 8]`: gaps between all rows.
    Gaps,
}

pub const STORAGES: [Storage; 5] =
    [Storage::Nhd, Storage::Hnd, Storage::CombinedNhd, Storage::CombinedHnd, Storage::Gaps];

impl Storage {
    fn is_combined(self) -> bool {
        !matches!(self, Storage::Nhd | Storage::Hnd)
    }

    /// Strides, offset of the first value from the first key, and elements in all.
    fn geometry(self, shape: KvShape) -> (KvStrides, usize, usize) {
        let KvShape { num_pages, page_size, num_kv_heads: hkv, head_dim: d } = shape;
        let page = page_size * hkv * d;
        match self {
            Storage::Nhd => (KvStrides { page, token: hkv * d, head: d }, 0, num_pages * page),
            Storage::Hnd => (KvStrides { page, token: d, head: page_size * d }, 0, num_pages * page),
            Storage::CombinedNhd => {
                (KvStrides { page: 2 * page, token: hkv * d, head: d }, page, 2 * num_pages * page)
            }
            Storage::CombinedHnd => {
                (KvStrides { page: 2 * page, token: d, head: page_size * d }, page, 2 * num_pages * page)
            }
            Storage::Gaps => {
                let head = 2 * (d + 8);
                let strides = KvStrides { page: page_size * hkv * head, token: hkv * head, head };
                (strides, d + 8, num_pages * page_size * hkv * head)
            }
        }
    }
}

/// Another engine's cache: plain memory with page tables.
pub struct Pool {
    pub storage: Storage,
    pub shape: KvShape,
    pub tables: PageTables,
    strides: KvStrides,
    v_offset: usize,
    /// Keys, or keys and values.
    pub k: Tensor,
    /// Values; unused where they lie among the keys.
    pub v: Tensor,
}

/// Page tables for sequences of the given lengths over shuffled pages, a few of which stay unused; and the
/// number of pages.
pub fn shuffled_tables(lens: &[usize], page_size: usize, random: &mut Random) -> (PageTables, usize) {
    let counts: Vec<usize> = lens.iter().map(|len| len.div_ceil(page_size)).collect();
    let num_pages = counts.iter().sum::<usize>() + 3;
    let mut pages: Vec<u32> = (0..num_pages as u32).collect();
    random.shuffle(&mut pages);
    let mut tables = PageTables { indptr: vec![0], ..PageTables::default() };
    for (len, count) in lens.iter().zip(counts) {
        tables.indices.extend(pages.drain(..count));
        tables.indptr.push(tables.indices.len() as u32);
        tables.last_page_len.push((len - count.saturating_sub(1) * page_size) as u32);
    }
    (tables, num_pages)
}

impl Pool {
    /// All tokens of all rows of a problem.
    pub fn full(problem: &Problem, page_size: usize, storage: Storage, seed: u64) -> Self {
        Pool::new(problem, page_size, storage, seed, |row| row.n)
    }

    /// The tokens that are there before the blocks are appended.
    pub fn before_block(problem: &Problem, page_size: usize, storage: Storage, seed: u64) -> Self {
        Pool::new(problem, page_size, storage, seed, |row| row.n.saturating_sub(row.t))
    }

    fn new(
        problem: &Problem,
        page_size: usize,
        storage: Storage,
        seed: u64,
        filled: fn(&Row) -> usize,
    ) -> Self {
        let heads = problem.config.heads;
        let lens: Vec<usize> = problem.rows.iter().map(|row| row.n).collect();
        let (tables, num_pages) = shuffled_tables(&lens, page_size, &mut Random(seed));
        let (num_kv_heads, head_dim) = (heads.num_kv_heads, heads.head_dim);
        let shape = KvShape { num_pages, page_size, num_kv_heads, head_dim };
        let (strides, v_offset, len) = storage.geometry(shape);
        let (mut k, mut v) = (vec![f64::NAN; len], vec![f64::NAN; len]);
        let width = num_kv_heads * head_dim;
        for (r, row) in problem.rows.iter().enumerate() {
            for token in 0..filled(row) {
                for head in 0..num_kv_heads {
                    let page = tables.indices[tables.indptr[r] as usize + token / page_size] as usize;
                    let at = page * strides.page + token % page_size * strides.token + head * strides.head;
                    let from = token * width + head * head_dim;
                    let to_v = if storage.is_combined() { &mut k } else { &mut v };
                    to_v[at + v_offset..][..head_dim].copy_from_slice(&row.v[from..][..head_dim]);
                    k[at..][..head_dim].copy_from_slice(&row.k[from..][..head_dim]);
                }
            }
        }
        let dtype = problem.config.dtype;
        let dims: Vec<usize> = match storage {
            Storage::Nhd => shape.dims(KvLayout::Nhd).to_vec(),
            Storage::Hnd => shape.dims(KvLayout::Hnd).to_vec(),
            _ => vec![len],
        };
        let make = |data: &[f64]| match dims[..] {
            [a, b, c, d] => tensor(dtype, data, [a, b, c, d]),
            _ => tensor(dtype, data, [len]),
        };
        let (k, v) = (make(&k), make(&v));
        Pool { storage, shape, tables, strides, v_offset, k, v }
    }

    fn layout(&self) -> KvLayout {
        if self.storage == Storage::Hnd { KvLayout::Hnd } else { KvLayout::Nhd }
    }

    pub fn view(&self) -> KvView<'_> {
        if !self.storage.is_combined() {
            return KvView::new(self.k.view(), self.v.view(), self.layout()).unwrap();
        }
        let values = self.k.view().tail(self.v_offset).unwrap();
        KvView::strided(self.k.view(), values, self.shape, [self.strides; 2]).unwrap()
    }

    pub fn view_mut(&mut self) -> KvViewMut<'_> {
        let (layout, k) = (self.layout(), self.k.view_mut());
        let view = match self.storage {
            Storage::Nhd => KvViewMut::new(k, self.v.view_mut(), layout),
            Storage::Hnd => KvViewMut::strided(k, self.v.view_mut(), self.shape, [self.strides; 2]),
            _ => KvViewMut::combined(k, [0, self.v_offset], self.shape, [self.strides; 2]),
        };
        view.unwrap()
    }

    /// The same pool in the memory of a device.
    pub fn to(&self, device: &Device) -> Pool {
        let (k, v) = (to_device(device, &self.k), to_device(device, &self.v));
        Pool { tables: self.tables.clone(), k, v, ..*self }
    }

    pub fn batch(&self, problem: &Problem) -> Batch {
        Batch::new(self.shape.page_size, problem.qo_indptr(), self.tables.clone()).unwrap()
    }
}

/// Limits that just fit a batch.
pub fn limits(batch: &Batch) -> Limits {
    Limits {
        max_rows: batch.num_rows().max(1),
        max_block_len: batch.max_block_len().max(1),
        max_kv_tokens: batch.num_token_places().max(1),
    }
}

/// Keys (or values) of `tokens` of a row as a tensor to append.
fn block(row: &Row, of: &[f64], tokens: std::ops::Range<usize>, problem: &Problem) -> Tensor {
    let heads = problem.config.heads;
    let width = of.len() / row.n.max(1);
    let part = &of[tokens.start * width..tokens.end * width];
    tensor(problem.config.dtype, part, [tokens.len(), heads.num_kv_heads, heads.head_dim])
}

/// An owned cache that holds the tokens of every row before its block, in every layer. All memory was
/// written with NaN and freed first, and the rows grew in turns, so that their pages interleave.
pub fn owned(
    device: &Device,
    problem: &Problem,
    page_size: usize,
    layout: KvLayout,
    num_layers: usize,
    seed: u64,
) -> (PagedKvCache, Vec<SequenceId>) {
    let mut random = Random(seed);
    let config = &problem.config;
    let rows = problem.rows.len();
    let num_pages = problem.rows.iter().map(|row| row.n.div_ceil(page_size) + 1).sum::<usize>().max(1);
    let cache_config = CacheConfig { num_layers, num_pages, page_size, max_sequences: rows.max(4), layout };
    let mut cache = PagedKvCache::new(device, config, &cache_config).unwrap();
    let largest = num_pages * page_size;
    let limits = Limits { max_rows: 1, max_block_len: largest, max_kv_tokens: largest };
    let operations = Operations { append: true, ..Operations::NONE };
    let writer = super::run::only(device, config, limits, operations);

    let poison = [cache.create().unwrap(), cache.create().unwrap(), cache.create().unwrap()];
    let mut left = num_pages;
    while left > 0 {
        let pages = 1 + random.below(left.min(3));
        let id = poison[random.below(3)];
        let nan = vec![f64::NAN; pages * page_size * config.heads.num_kv_heads * config.heads.head_dim];
        let shape = [pages * page_size, config.heads.num_kv_heads, config.heads.head_dim];
        let nan = tensor(config.dtype, &nan, shape);
        append(&writer, &mut cache, id, pages * page_size, &nan, &nan);
        left -= pages;
    }
    poison.into_iter().for_each(|id| cache.free(id).unwrap());

    let ids: Vec<SequenceId> = problem.rows.iter().map(|_| cache.create().unwrap()).collect();
    let mut growing: Vec<usize> = (0..rows).collect();
    while !growing.is_empty() {
        let place = random.below(growing.len());
        let row = &problem.rows[growing[place]];
        let id = ids[growing[place]];
        let len = cache.len(id).unwrap();
        let missing = row.n - row.t - len;
        if missing == 0 {
            growing.swap_remove(place);
            continue;
        }
        let add = 1 + random.below(missing.min(2 * page_size + 40));
        let (k, v) =
            (block(row, &row.k, len..len + add, problem), block(row, &row.v, len..len + add, problem));
        append(&writer, &mut cache, id, add, &k, &v);
    }
    (cache, ids)
}

/// Grows one sequence and writes the same keys and values to all layers.
pub fn append(
    writer: &TokenSelect,
    cache: &mut PagedKvCache,
    id: SequenceId,
    num_tokens: usize,
    k: &Tensor,
    v: &Tensor,
) {
    let batch = cache.extend(&[(id, num_tokens)]).unwrap();
    let (k, v) = (to_device(writer.device(), k), to_device(writer.device(), v));
    for layer in 0..cache.num_layers() {
        writer.fill(cache, layer, &batch, k.view(), v.view()).unwrap();
    }
}
