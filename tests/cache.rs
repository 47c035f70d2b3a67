//! The paged cache against a simple model: sequences are lists of tokens, every token is unlike all others,
//! and what the cache holds is read back after every change.

mod common;

use std::collections::{HashMap, HashSet};

use common::problem::{cached, small_config};
use common::reader::{Reader, readable};
use common::{cases, on_devices, tensor};
use proptest::prelude::*;
use tokenselect::{
    Batch, CacheConfig, DType, Device, Error, KvLayout, Limits, PageAllocator, PagedKvCache, SequenceId,
    TokenSelect,
};

on_devices! {
    cpu: behaves_like_lists_of_tokens;
}

const NUM_PAGES: usize = 14;
const MAX_SEQUENCES: usize = 5;
const NUM_LAYERS: usize = 2;
const KV_HEADS: usize = 2;

/// Sequences are named by their place among those alive, modulo their number.
#[derive(Debug, Clone)]
enum Op {
    Create,
    Fork(usize),
    Extend(Vec<(usize, usize)>),
    /// To this share of the length, in percent.
    Truncate(usize, usize),
    Free(usize),
}

fn op(page_size: usize) -> impl Strategy<Value = Op> {
    let which = 0..MAX_SEQUENCES;
    let growth = prop_oneof![Just(0usize), Just(1), Just(page_size), 0..=2 * page_size + 1];
    prop_oneof![
        2 => Just(Op::Create),
        3 => which.clone().prop_map(Op::Fork),
        8 => prop::collection::vec((which.clone(), growth), 1..4).prop_map(Op::Extend),
        3 => (which.clone(), 0usize..=100).prop_map(|(i, percent)| Op::Truncate(i, percent)),
        1 => which.prop_map(Op::Free),
    ]
}

/// A batch made earlier, with what its rows were then.
struct Held {
    batch: Batch,
    rows: Vec<(SequenceId, Vec<u32>)>,
    /// Whether nothing but growth happened since, without a page moving.
    untouched: bool,
}

struct Machine {
    cache: PagedKvCache,
    writer: TokenSelect,
    reader: Reader,
    page_size: usize,
    /// The tokens of each sequence alive, in the order of creation.
    model: Vec<(SequenceId, Vec<u32>)>,
    ever: HashSet<SequenceId>,
    next_token: u32,
    held: Vec<Held>,
}

impl Machine {
    fn new(device: &Device, page_size: usize, layout: KvLayout) -> Self {
        let config = readable(KV_HEADS, cached(small_config(), 0.9, None));
        let max_sequences = MAX_SEQUENCES;
        let cache_config =
            CacheConfig { num_layers: NUM_LAYERS, num_pages: NUM_PAGES, page_size, max_sequences, layout };
        let limits = Limits { max_rows: 8, max_block_len: 256, max_kv_tokens: 8 * NUM_PAGES * page_size };
        Machine {
            cache: PagedKvCache::new(device, &config, &cache_config).unwrap(),
            writer: TokenSelect::new(device, config.clone(), limits).unwrap(),
            reader: Reader::new(device, &config),
            page_size,
            model: Vec::new(),
            ever: HashSet::new(),
            next_token: 1,
            held: Vec::new(),
        }
    }

    /// Everything the allocator knows, private fields included.
    fn state(&self) -> String {
        format!("{:?}", self.cache.pages())
    }

    fn run(&mut self, op: &Op) {
        let before = self.state();
        let changed = match op {
            Op::Create => {
                let made = self.cache.create();
                self.added(made, Vec::new())
            }
            _ if self.model.is_empty() => false,
            Op::Fork(i) => {
                let (id, tokens) = self.model[i % self.model.len()].clone();
                let made = self.cache.fork(id);
                // Batches made before would write into pages that are now shared.
                self.touch(id, made.is_ok());
                self.added(made, tokens)
            }
            Op::Extend(growth) => self.extend(growth),
            Op::Truncate(i, percent) => {
                let place = i % self.model.len();
                let (id, tokens) = &mut self.model[place];
                let len = tokens.len() * percent / 100;
                self.cache.truncate(*id, len).unwrap();
                let cut = len < tokens.len();
                tokens.truncate(len);
                let id = *id;
                self.touch(id, cut);
                true
            }
            Op::Free(i) => {
                let (id, _) = self.model.remove(i % self.model.len());
                self.cache.free(id).unwrap();
                assert_eq!(self.cache.len(id), Err(Error::UnknownSequence(id)), "freed once and for all");
                assert_eq!(self.cache.free(id), Err(Error::UnknownSequence(id)), "no double free");
                self.touch(id, true);
                true
            }
        };
        assert!(changed || self.state() == before, "an error changed the tables: {op:?}");
    }

    fn added(&mut self, made: Result<SequenceId, Error>, tokens: Vec<u32>) -> bool {
        if self.model.len() == MAX_SEQUENCES {
            assert_eq!(made, Err(Error::TooManySequences { limit: MAX_SEQUENCES }));
            return false;
        }
        let id = made.unwrap();
        assert!(self.ever.insert(id), "{id} was used twice");
        assert_eq!(SequenceId::from_bits(id.to_bits()), id);
        self.model.push((id, tokens));
        true
    }

    /// Batches that name `id` are stale from now on.
    fn touch(&mut self, id: SequenceId, touched: bool) {
        for held in self.held.iter_mut().filter(|held| held.rows.iter().any(|row| row.0 == id)) {
            held.untouched &= !touched;
        }
    }

    /// Pages that a growth takes from the free ones, and the sequences whose last page is copied: it is
    /// partly filled, about to be written, and someone else still holds it when the row's turn comes.
    fn needed(&self, growth: &[(SequenceId, usize)]) -> (usize, Vec<SequenceId>) {
        let mut holders: HashMap<u32, usize> = HashMap::new();
        for (id, _) in &self.model {
            self.cache
                .pages()
                .pages(*id)
                .unwrap()
                .iter()
                .for_each(|&page| *holders.entry(page).or_default() += 1);
        }
        let (mut needed, mut moved) = (0, Vec::new());
        for &(id, num_tokens) in growth {
            let len = self.cache.len(id).unwrap();
            needed += (len + num_tokens).div_ceil(self.page_size) - len.div_ceil(self.page_size);
            let last = self.cache.pages().pages(id).unwrap().last();
            if let Some(last) = last.filter(|_| num_tokens > 0 && !len.is_multiple_of(self.page_size)) {
                let count = holders.get_mut(last).unwrap();
                if *count > 1 {
                    *count -= 1;
                    needed += 1;
                    moved.push(id);
                }
            }
        }
        (needed, moved)
    }

    fn extend(&mut self, growth: &[(usize, usize)]) -> bool {
        let growth: Vec<(SequenceId, usize)> =
            growth.iter().map(|&(i, num_tokens)| (self.model[i % self.model.len()].0, num_tokens)).collect();
        let ids: Vec<SequenceId> = growth.iter().map(|&(id, _)| id).collect();
        let twice = (0..ids.len()).find_map(|second| {
            let first = ids[..second].iter().position(|id| *id == ids[second])?;
            Some(Error::DuplicateSequence { id: ids[second], first, second })
        });
        if let Some(error) = twice {
            assert_eq!(self.cache.extend(&growth).unwrap_err(), error);
            return false;
        }
        let (needed, moved) = self.needed(&growth);
        let free = self.cache.pages().num_free_pages();
        let made = self.cache.extend(&growth);
        if needed > free {
            assert_eq!(made.unwrap_err(), Error::OutOfPages { needed, free });
            return false;
        }
        let batch = made.unwrap();
        assert_eq!(self.cache.pages().num_free_pages(), free - needed, "exact accounting");
        moved.into_iter().for_each(|id| self.touch(id, true));
        self.write(&batch, &growth);
        let rows = ids.iter().map(|id| (*id, self.tokens(*id).clone())).collect();
        self.held.push(Held { batch, rows, untouched: true });
        true
    }

    fn tokens(&self, id: SequenceId) -> &Vec<u32> {
        &self.model.iter().find(|(other, _)| *other == id).unwrap().1
    }

    /// Gives every new token a number of its own and writes it to all layers.
    fn write(&mut self, batch: &Batch, growth: &[(SequenceId, usize)]) {
        let mut new = Vec::new();
        for &(id, num_tokens) in growth {
            let tokens = self.next_token..self.next_token + num_tokens as u32;
            self.next_token = tokens.end;
            self.model.iter_mut().find(|(other, _)| *other == id).unwrap().1.extend(tokens.clone());
            new.extend(tokens);
        }
        for layer in 0..NUM_LAYERS {
            let shape = [new.len(), KV_HEADS, 8];
            let k = tensor(DType::F32, &contents(&new, layer, false), shape);
            let v = tensor(DType::F32, &contents(&new, layer, true), shape);
            let kv = self.cache.layer_mut(layer).unwrap().kv;
            self.writer.append(batch, kv, k.view(), v.view()).unwrap();
        }
    }

    /// Tables and contents are those of the model, pages add up, and batches are stale when they should be.
    fn check(&mut self) {
        self.check_tables();
        self.check_contents(0..NUM_LAYERS);
        self.check_batches();
    }

    fn check_tables(&self) {
        let pages = self.cache.pages();
        assert_eq!(pages.num_sequences(), self.model.len());
        assert_eq!(pages.is_empty(), self.model.is_empty());
        let mut holders: HashMap<u32, Vec<(usize, usize)>> = HashMap::new();
        for (s, (id, tokens)) in self.model.iter().enumerate() {
            assert_eq!(pages.len(*id), Ok(tokens.len()));
            let own = pages.pages(*id).unwrap();
            assert_eq!(own.len(), tokens.len().div_ceil(self.page_size), "no page more than needed");
            own.iter()
                .enumerate()
                .for_each(|(place, &page)| holders.entry(page).or_default().push((s, place)));
        }
        for page in 0..NUM_PAGES as u32 {
            let here = holders.get(&page).map_or(&[][..], Vec::as_slice);
            assert_eq!(pages.ref_count(page), Ok(here.len()), "references of page {page}");
            for &(s, place) in here {
                let (first, first_place) = here[0];
                assert_eq!(place, first_place, "page {page} stands at one place in all forks");
                let end =
                    ((place + 1) * self.page_size).min(self.model[s].1.len()).min(self.model[first].1.len());
                let range = place * self.page_size..end;
                assert_eq!(
                    self.model[s].1[range.clone()],
                    self.model[first].1[range],
                    "page {page} is shared by forks only"
                );
            }
        }
        assert_eq!(pages.num_free_pages(), NUM_PAGES - holders.len(), "no page leaks");
    }

    fn check_contents(&mut self, layers: std::ops::Range<usize>) {
        for (id, tokens) in &self.model {
            for layer in layers.clone() {
                let (k, v) = self.reader.read(&self.cache, layer, *id);
                assert_eq!(k, contents(tokens, layer, false), "keys of {id} in layer {layer}");
                assert_eq!(v, contents(tokens, layer, true), "values of {id} in layer {layer}");
            }
        }
    }

    fn check_batches(&self) {
        for held in &self.held {
            let verdict = self.cache.check(&held.batch);
            let now =
                |id: &SequenceId| self.model.iter().find(|(other, _)| other == id).map(|(_, tokens)| tokens);
            if held.untouched {
                assert_eq!(verdict, Ok(()), "growth alone does not make a batch stale");
            } else {
                assert!(verdict.is_err(), "a batch passed for fresh after a fork, a rollback or a move");
            }
            if verdict.is_ok() {
                for (row, (id, tokens)) in held.rows.iter().enumerate() {
                    let same = now(id).is_some_and(|now| now.starts_with(tokens));
                    assert!(same, "a batch passed for fresh whose row {row} has changed");
                    let pages = self.cache.pages().pages(*id).unwrap();
                    assert!(
                        pages.starts_with(held.batch.row(row).unwrap().pages),
                        "row {row} has moved to other pages"
                    );
                }
            }
        }
    }
}

/// What is written for tokens: numbers that tell token, layer, head, element, and key from value.
fn contents(tokens: &[u32], layer: usize, value: bool) -> Vec<f64> {
    let element = |token: u32, i: usize| {
        let place = (token as usize * NUM_LAYERS + layer) * KV_HEADS * 8 + i;
        if value { -(place as f64) } else { place as f64 }
    };
    tokens.iter().flat_map(|&token| (0..KV_HEADS * 8).map(move |i| element(token, i))).collect()
}

fn behaves_like_lists_of_tokens(device: &Device) {
    proptest!(cases(64), |(
        (page_size, ops) in prop::sample::select(vec![1usize, 2, 3, 8])
            .prop_flat_map(|page_size| (Just(page_size), prop::collection::vec(op(page_size), 1..32))),
        layout in prop::sample::select(vec![KvLayout::Nhd, KvLayout::Hnd]),
    )| {
        let mut machine = Machine::new(device, page_size, layout);
        for (step, op) in ops.iter().enumerate() {
            machine.run(op);
            machine.check_tables();
            machine.check_batches();
            // Reading is slow: one layer at a time, and only where something was written.
            if matches!(op, Op::Extend(_)) {
                machine.check_contents(step % NUM_LAYERS..step % NUM_LAYERS + 1);
            }
        }
        machine.check();
        while !machine.model.is_empty() {
            machine.run(&Op::Free(0));
        }
        machine.check();
        prop_assert_eq!(machine.cache.pages().num_free_pages(), NUM_PAGES, "everything comes back");
    });
}

fn machine_with_fork(page_size: usize, len: usize) -> Machine {
    let mut machine = Machine::new(&Device::cpu(), page_size, KvLayout::Nhd);
    machine.run(&Op::Create);
    machine.run(&Op::Extend(vec![(0, len)]));
    machine.run(&Op::Fork(0));
    machine
}

#[test]
fn forks_share_pages_until_they_write() {
    let mut machine = machine_with_fork(4, 10);
    let free = machine.cache.pages().num_free_pages();
    assert_eq!(free, NUM_PAGES - 3, "a fork costs nothing");
    // Both write: the first copies the shared page, the second is alone with it by then.
    machine.run(&Op::Extend(vec![(0, 1), (1, 1)]));
    assert_eq!(machine.cache.pages().num_free_pages(), free - 1);
    machine.check();
    // A full last page is never copied.
    let mut machine = machine_with_fork(4, 8);
    machine.run(&Op::Extend(vec![(0, 1)]));
    assert_eq!(machine.cache.pages().num_free_pages(), NUM_PAGES - 3);
    machine.check();
    // Nor is a page that grows by nothing.
    let mut machine = machine_with_fork(4, 10);
    machine.run(&Op::Extend(vec![(0, 0), (1, 0)]));
    assert_eq!(machine.cache.pages().num_free_pages(), NUM_PAGES - 3);
    machine.check();
}

#[test]
fn writing_after_a_rollback_into_a_shared_page_copies_it() {
    let mut machine = machine_with_fork(8, 12);
    machine.run(&Op::Truncate(1, 75)); // to 9, inside the shared second page
    machine.check();
    machine.run(&Op::Extend(vec![(1, 2)]));
    machine.check(); // the fork's tokens 9 to 11 are still what they were
    assert_eq!(machine.cache.pages().num_free_pages(), NUM_PAGES - 3);
}

#[test]
fn the_last_page_can_be_used() {
    let mut machine = Machine::new(&Device::cpu(), 4, KvLayout::Nhd);
    machine.run(&Op::Create);
    machine.run(&Op::Extend(vec![(0, NUM_PAGES * 4)]));
    machine.check();
    assert_eq!(machine.cache.pages().num_free_pages(), 0);
    machine.run(&Op::Extend(vec![(0, 1)])); // checked to fail
    machine.run(&Op::Truncate(0, 50));
    machine.run(&Op::Extend(vec![(0, 4)]));
    machine.check();
}

/// The tables are FlashInfer's: rows in the order asked for, `last_page_len` from 1, 0 for an empty row.
#[test]
fn tables_describe_sequences() {
    let mut pages = PageAllocator::new(10, 4, 3).unwrap();
    let ids = [0, 1, 2].map(|_| pages.create().unwrap());
    assert_eq!(pages.extend(&[(ids[0], 5), (ids[2], 8)]).unwrap(), []);
    let own = |i: usize| pages.pages(ids[i]).unwrap().to_vec();
    let tables = pages.tables(&[ids[2], ids[1], ids[0]]).unwrap();
    assert_eq!(tables.indptr, [0, 2, 2, 4]);
    assert_eq!(tables.indices, [own(2), own(0)].concat());
    assert_eq!(tables.last_page_len, [4, 0, 1]);
    let batch = Batch::new(4, vec![0, 8, 8, 10], tables).unwrap();
    assert_eq!((0..3).map(|row| batch.row(row).unwrap().kv_len).collect::<Vec<_>>(), [8, 0, 5]);
    assert_eq!((0..3).map(|row| batch.row(row).unwrap().block_len()).collect::<Vec<_>>(), [8, 0, 2]);
    assert_eq!((batch.max_kv_len(), batch.max_block_len(), batch.num_token_places()), (8, 8, 16));
}

/// Copies are named for whoever holds the memory.
#[test]
fn the_allocator_alone_reports_copies() {
    let mut pages = PageAllocator::new(10, 4, 3).unwrap();
    let parent = pages.create().unwrap();
    pages.extend(&[(parent, 6)]).unwrap();
    let child = pages.fork(parent).unwrap();
    let shared = pages.pages(parent).unwrap().to_vec();
    let copies = pages.extend(&[(child, 1), (parent, 1)]).unwrap();
    let moved = pages.pages(child).unwrap().to_vec();
    assert_eq!(pages.pages(parent).unwrap(), shared, "the last holder stays");
    assert_eq!(moved[0], shared[0], "full pages stay shared");
    assert_eq!(copies.len(), 1);
    assert_eq!((copies[0].src, copies[0].dst, copies[0].num_tokens), (shared[1], moved[1], 2));
    assert_eq!(pages.ref_count(shared[0]), Ok(2));
    assert_eq!(pages.ref_count(shared[1]), Ok(1));
}
