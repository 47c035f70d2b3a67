//! Reads keys and values back out of an owned cache through the public operations alone: a value is what
//! attention to a single token returns, an element of a key is its dot product with a unit vector.

use tokenselect::{
    Batch, Buffer, DType, Device, HeadShape, Limits, Over, PageTables, PagedKvCache, RowAction, SelectConfig,
    Selection, SequenceId, StepOutput, TokenSelect,
};

use super::{tensor, values};

/// The most tokens that a sequence to be read may hold.
const LONGEST: usize = 128;

/// A configuration whose caches a [`Reader`] can read: as many query heads as a token has key elements.
pub fn readable(num_kv_heads: usize, base: SelectConfig) -> SelectConfig {
    let heads = HeadShape { num_qo_heads: num_kv_heads * 8, num_kv_heads, head_dim: 8 };
    SelectConfig { heads, dtype: DType::F32, ..base }
}

pub struct Reader {
    ts: TokenSelect,
}

impl Reader {
    pub fn new(device: &Device, config: &SelectConfig) -> Self {
        let config = SelectConfig {
            score_scale: Some(1.0),
            n_init: LONGEST,
            selection_cache: None,
            ..readable(config.heads.num_kv_heads, config.clone())
        };
        let max_kv_tokens = LONGEST * (LONGEST + 256);
        let limits = Limits { max_rows: LONGEST, max_block_len: 1, max_kv_tokens };
        Reader { ts: TokenSelect::new(device, config, limits).unwrap() }
    }

    /// Keys and values of all tokens of a sequence, `[n, hkv, 8]` each.
    pub fn read(&mut self, cache: &PagedKvCache, layer: usize, id: SequenceId) -> (Vec<f64>, Vec<f64>) {
        let tables = cache.pages().tables(&[id]).unwrap();
        let n = cache.len(id).unwrap();
        if n == 0 {
            return (Vec::new(), Vec::new());
        }
        (self.keys(cache, layer, &tables, n), self.values(cache, layer, &tables, n))
    }

    fn keys(&mut self, cache: &PagedKvCache, layer: usize, tables: &PageTables, n: usize) -> Vec<f64> {
        let page_size = cache.pages().page_size();
        let all = std::iter::once(0..n as u32).collect();
        let batch = Batch::partial(page_size, vec![0, 0], tables.clone(), all).unwrap();
        let hq = self.ts.config().heads.num_qo_heads;
        let ts = &mut self.ts;
        let queries = ts.buffer_mut(Buffer::Queries).into_slice::<f32>().unwrap();
        queries.fill(0.0);
        (0..hq).for_each(|head| queries[head * 8 + head % 8] = 1.0);
        ts.buffer_mut(Buffer::Actions).into_slice::<u32>().unwrap()[0] = RowAction::Score as u32;
        ts.provide(Buffer::Actions, &batch).unwrap();
        self.ts.score(&batch, cache.layer(layer).unwrap()).unwrap();
        values(self.ts.workspace().buffer(Buffer::Logits))[..n * hq].to_vec()
    }

    /// One row a token, all with the pages of the sequence.
    fn values(&mut self, cache: &PagedKvCache, layer: usize, tables: &PageTables, n: usize) -> Vec<f64> {
        let heads = self.ts.config().heads;
        let repeated = PageTables {
            indptr: (0..=n as u32).map(|row| row * tables.indices.len() as u32).collect(),
            indices: tables.indices.repeat(n),
            last_page_len: tables.last_page_len.repeat(n),
        };
        let batch = Batch::new(cache.pages().page_size(), (0..=n as u32).collect(), repeated).unwrap();
        let shape = [n, heads.num_qo_heads, 8];
        let q = tensor(DType::F32, &vec![0.0; n * heads.num_qo_heads * 8], shape);
        let mut out = tensor(DType::F32, &vec![f64::NAN; n * heads.num_qo_heads * 8], shape);
        let tokens = tensor(DType::U32, &(0..n).map(|token| token as f64).collect::<Vec<_>>(), [n, 1]);
        let len = tensor(DType::U32, &vec![1.0; n], [n]);
        let selection = Selection { tokens: tokens.view(), len: len.view(), ranks: None };
        let output = StepOutput { out: out.view_mut(), lse: None };
        self.ts
            .attend(&batch, cache.layer(layer).unwrap(), q.view(), Over::Lists(&selection), output)
            .unwrap();
        // All eight query heads of a group return the same value.
        values(&out).chunks(8 * 8).flat_map(|group| group[..8].to_vec()).collect()
    }
}
