//! Continuous batching: a prompt is read while another sequence decodes; sequences fork, take tokens back and leave.

use tokenselect::*;

const HEADS: HeadShape = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
const NUM_LAYERS: usize = 2;

/// In place of a model's projections: `[tokens, num_heads, head_dim]` numbers that follow from token and layer.
fn project(tokens: &[u32], layer: usize, num_heads: usize) -> Vec<f32> {
    let number = |base: usize, i: usize| ((base + i * 7) % 101) as f32 / 50.0 - 1.0;
    let bases = tokens.iter().map(|&token| token as usize * 31 + layer * 17);
    bases.flat_map(|base| (0..num_heads * HEADS.head_dim).map(move |i| number(base, i))).collect()
}

/// In place of a model's head: a token that follows from every bit of the last one's attention.
fn next_token(out: &[f32]) -> u32 {
    out.iter().fold(7, |hash: u32, x| hash.rotate_left(5) ^ x.to_bits()) % 256
}

struct Engine {
    cache: PagedKvCache,
    select: TokenSelect,
}

impl Engine {
    /// One step of several sequences, a prompt of one beside a token of another. Returns what follows each.
    fn step(&mut self, rows: &[(SequenceId, &[u32])]) -> Result<Vec<u32>> {
        let growth: Vec<_> = rows.iter().map(|&(id, tokens)| (id, tokens.len())).collect();
        let batch = self.cache.extend_within(self.select.plan().limits(), &growth)?; // for all layers
        let tokens: Vec<u32> = rows.iter().flat_map(|&(_, tokens)| tokens).copied().collect();
        let width = HEADS.num_qo_heads * HEADS.head_dim;
        let mut out = vec![0.0f32; tokens.len() * width];
        for layer in 0..NUM_LAYERS {
            let q = project(&tokens, layer, HEADS.num_qo_heads);
            let [k, v] = [layer + 10, layer + 20].map(|layer| project(&tokens, layer, HEADS.num_kv_heads));
            let (input, output) =
                (self.select.input(&batch, &q, &k, &v)?, self.select.output(&batch, &mut out, None)?);
            self.select.step(&mut self.cache, layer, &batch, input, output)?;
        }
        let ends = batch.qo_indptr()[1..].iter().map(|&end| end as usize * width);
        Ok(ends.map(|end| next_token(&out[end - width..end])).collect())
    }
}

fn main() -> Result<()> {
    let config = SelectConfig { heads: HEADS, dtype: DType::F32, ..SelectConfig::default() };
    let config = SelectConfig { n_init: 16, top_k: 64, n_local: 32, ..config };
    let (device, limits) = (Device::cpu(), Limits { max_rows: 4, max_block_len: 1024, ..Limits::default() });
    let pages = CacheConfig { num_layers: NUM_LAYERS, num_pages: 256, ..CacheConfig::default() };
    let cache = PagedKvCache::new(&device, &config, &pages)?;
    let mut engine = Engine { cache, select: TokenSelect::new(&device, config, limits)? };
    let prompt: Vec<u32> = (0..1000).map(|i| i * i % 251).collect();

    let first = engine.cache.create()?;
    let next = engine.step(&[(first, &prompt)])?[0];

    // A second prompt joins; the first sequence decodes in the same step.
    let second = engine.cache.create()?;
    let next = engine.step(&[(first, &[next]), (second, &prompt[..300])])?;

    // A fork has the same tokens, in the same pages until one of the two writes there.
    let fork = engine.cache.fork(first)?;
    let next = engine.step(&[(first, &[next[0]]), (second, &[next[1]]), (fork, &[next[0]])])?;
    assert_eq!(next[0], next[2]);

    // Three tokens are tried and taken back: what follows then is what would have followed without them.
    let len = engine.cache.len(fork)?;
    engine.step(&[(fork, &[1, 2, 3])])?;
    engine.cache.truncate(fork, len)?;
    let next = engine.step(&[(first, &[9]), (fork, &[9])])?;
    assert_eq!(next[0], next[1]);

    let (selected, free) =
        (engine.select.workspace().selected(0)?.len(), engine.cache.pages().num_free_pages());
    println!("{} tokens in a sequence, {selected} selected", engine.cache.len(first)?);
    engine.cache.free(second)?;
    println!("{free} pages free, {} after a sequence has left", engine.cache.pages().num_free_pages());
    Ok(())
}
