//! What a cache should hold: tokens, page tables and cached selections of every sequence, in plain Rust.

use std::collections::HashMap;
use std::rc::Rc;

use tokenselect::{HeadShape, PagedKvCache, SelectConfig, SelectionStats, SequenceId};

use crate::common::{Random, naive, round};

/// A page that sequences hold. Those that share it are its owners.
pub struct Page {
    number: u32,
}

/// One layer of a sequence.
#[derive(Clone)]
pub struct Layer {
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    /// What queries of the sequence have in common.
    pub common: Vec<f64>,
    pub cached: Option<naive::Cached>,
    /// Tokens before the block when `cached` was made.
    pub made_at: usize,
}

#[derive(Clone)]
pub struct Sequence {
    pub id: SequenceId,
    pub len: usize,
    pub pages: Vec<Rc<Page>>,
    pub layers: Vec<Layer>,
}

pub struct Model {
    pub config: SelectConfig,
    pub page_size: usize,
    pub num_pages: usize,
    pub sequences: Vec<Sequence>,
    pub stats: Vec<SelectionStats>,
}

impl Sequence {
    pub fn new(id: SequenceId, num_layers: usize, heads: HeadShape, random: &mut Random) -> Self {
        let layer = |_| Layer {
            k: Vec::new(),
            v: Vec::new(),
            common: new_common(heads, random),
            cached: None,
            made_at: 0,
        };
        Sequence { id, len: 0, pages: Vec::new(), layers: (0..num_layers).map(layer).collect() }
    }

    /// Drops tokens, and the cached selections that may name one of them.
    pub fn truncate(&mut self, len: usize, page_size: usize, width: usize) {
        self.len = len;
        self.pages.truncate(len.div_ceil(page_size));
        for layer in &mut self.layers {
            layer.k.truncate(len * width);
            layer.v.truncate(len * width);
            if layer.made_at > len {
                layer.cached = None;
            }
        }
    }
}

pub fn new_common(heads: HeadShape, random: &mut Random) -> Vec<f64> {
    (0..heads.num_qo_heads * heads.head_dim).map(|_| random.normal()).collect()
}

impl Layer {
    /// The queries of a block. Most resemble those of the last block, so that selections are reused.
    pub fn queries(&mut self, t: usize, config: &SelectConfig, random: &mut Random) -> Vec<f64> {
        if random.below(8) == 0 {
            self.common = new_common(config.heads, random);
        }
        let width = self.common.len();
        let query = |i: usize, random: &mut Random| 0.7 * self.common[i % width] + 0.4 * random.normal();
        (0..t * width).map(|i| round(config.dtype, query(i, random))).collect()
    }

    /// Appends tokens; some resemble the queries, few hold a NaN.
    pub fn grow(&mut self, t: usize, config: &SelectConfig, random: &mut Random) {
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = config.heads;
        for _ in 0..t {
            let mut k: Vec<f64> = (0..num_kv_heads * head_dim).map(|_| random.normal()).collect();
            if random.below(8) == 0 {
                let (head, strength) = (random.below(num_qo_heads), 0.3 + random.unit());
                let kv_head = head / (num_qo_heads / num_kv_heads);
                for i in 0..head_dim {
                    k[kv_head * head_dim + i] += strength * self.common[head * head_dim + i];
                }
            }
            if random.below(400) == 0 {
                let odd = random.below(k.len());
                k[odd] = f64::NAN;
            }
            self.k.extend(k.into_iter().map(|x| round(config.dtype, x)));
            self.v.extend((0..num_kv_heads * head_dim).map(|_| round(config.dtype, random.normal())));
        }
    }
}

impl Model {
    /// Elements of a token's keys.
    pub fn width(&self) -> usize {
        self.config.heads.num_kv_heads * self.config.heads.head_dim
    }

    pub fn place(&self, id: SequenceId) -> usize {
        self.sequences.iter().position(|sequence| sequence.id == id).expect("a sequence of the model")
    }

    /// How many sequences hold each page.
    fn holders(&self) -> HashMap<u32, usize> {
        let pages = self.sequences.iter().flat_map(|sequence| &sequence.pages);
        pages.map(|page| (page.number, Rc::strong_count(page))).collect()
    }

    pub fn num_free_pages(&self) -> usize {
        self.num_pages - self.holders().len()
    }

    /// Pages that a growth takes, and the sequences whose last page is copied: it is partly filled, and someone else holds
    /// it when the row's turn comes.
    pub fn needs(&self, growth: &[(SequenceId, usize)]) -> (usize, Vec<SequenceId>) {
        let (mut holders, mut needed, mut moved) = (self.holders(), 0, Vec::new());
        for &(id, t) in growth {
            let sequence = &self.sequences[self.place(id)];
            needed += (sequence.len + t).div_ceil(self.page_size) - sequence.pages.len();
            let partly_filled = t > 0 && !sequence.len.is_multiple_of(self.page_size);
            let Some(last) = sequence.pages.last().filter(|_| partly_filled) else { continue };
            let held = holders.get_mut(&last.number).expect("a page with an owner");
            if *held > 1 {
                *held -= 1;
                needed += 1;
                moved.push(id);
            }
        }
        (needed, moved)
    }

    /// Follows a growth of the cache: new pages are what the cache says, and nobody else's.
    pub fn extend(&mut self, growth: &[(SequenceId, usize)], moved: &[SequenceId], cache: &PagedKvCache) {
        for id in moved {
            let place = self.place(*id);
            self.sequences[place].pages.pop();
        }
        for &(id, t) in growth {
            let (place, mut holders) = (self.place(id), self.holders());
            let sequence = &mut self.sequences[place];
            sequence.len += t;
            for &number in &cache.pages().pages(id).expect("a sequence of the cache")[sequence.pages.len()..]
            {
                assert_eq!(holders.insert(number, 1), None, "page {number} was handed out twice");
                sequence.pages.push(Rc::new(Page { number }));
            }
        }
    }

    /// The cache's tables and counters are those of the model.
    pub fn check(&self, cache: &PagedKvCache) {
        let pages = cache.pages();
        assert_eq!(pages.num_sequences(), self.sequences.len());
        assert_eq!(pages.num_free_pages(), self.num_free_pages(), "free pages");
        for sequence in &self.sequences {
            assert_eq!(pages.len(sequence.id), Ok(sequence.len));
            assert_eq!(sequence.pages.len(), sequence.len.div_ceil(self.page_size));
            let want: Vec<u32> = sequence.pages.iter().map(|page| page.number).collect();
            assert_eq!(pages.pages(sequence.id).expect("a sequence of the cache"), want);
        }
        let holders = self.holders();
        for page in 0..self.num_pages as u32 {
            let want = holders.get(&page).copied().unwrap_or(0);
            assert_eq!(pages.ref_count(page), Ok(want), "holders of page {page}");
        }
        for (layer, want) in self.stats.iter().enumerate().filter(|_| self.config.selection_cache.is_some()) {
            let got = cache.selections().expect("cached selections").layer_stats(layer);
            assert_eq!(got.as_ref(), Ok(want), "counters of layer {layer}");
        }
    }
}
