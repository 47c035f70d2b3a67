//! Every error: what provokes it, what it says, and that nothing has changed afterwards.

mod common;
#[path = "errors/configuration.rs"]
mod configuration;

use std::collections::BTreeSet;

use common::paged::{Pool, Storage, append};
use common::problem::{Content, Problem, cached, small_config};
use common::reader::{Reader, readable};
use common::run::{Inputs, outputs, queries};
use common::{bits, on_devices, tensor};
use half::bf16;
use tokenselect::{
    Batch, Buffer, CacheConfig, DType, Device, Error, HeadShape, KvLayout, KvShape, KvStrides, KvView,
    KvViewMut, LayerMut, Limits, MAX_SEQUENCE_LEN, Operations, Over, PageAllocator, PageTables, PagedKvCache,
    Plan, Positions, Ranks, Rope, RopeTable, SelectConfig, Selection, SelectionCache, SequenceId, StepOutput,
    Tensor, TensorView, TensorViewMut, TokenSelect,
};

on_devices! {
    cpu:
        wrong_shapes_and_types_of_a_step, batches_that_do_not_fit_a_step,
        caches_that_do_not_fit_an_operation, lists_that_contradict_themselves,
        a_list_longer_than_the_table_of_angles, merging_parts_of_wrong_shapes,
        operations_that_lack_something, operations_that_a_plan_leaves_out, buffers_that_contradict_themselves,
        cached_selections_without_sequences, blocks_beyond_the_limits, sequences_and_pages, stale_batches,
        batches_made_before_a_fork_are_stale, batches_with_a_page_that_moved_are_stale;
}

/// Asserts the whole text: argument, rule and numbers stand in it.
#[track_caller]
fn says<T>(result: Result<T, Error>, text: &str) -> Error {
    let error = result.err().unwrap_or_else(|| panic!("no error; expected: {text}"));
    assert_eq!(error.to_string(), text);
    error
}

fn f32s(shape: &[usize]) -> Tensor {
    let zeros = vec![0.0; shape.iter().product()];
    match *shape {
        [a] => tensor(DType::F32, &zeros, [a]),
        [a, b] => tensor(DType::F32, &zeros, [a, b]),
        [a, b, c] => tensor(DType::F32, &zeros, [a, b, c]),
        [a, b, c, d] => tensor(DType::F32, &zeros, [a, b, c, d]),
        _ => panic!("one to four dimensions"),
    }
}

// ---- views and batches -----------------------------------------------------------------------------------

#[test]
fn tensors_and_views() {
    says(
        Tensor::from_vec(vec![1.0f32; 5], [2, 3]),
        "`data` of shape [2, 3] needs 6 elements, the slice has 5",
    );
    says(TensorView::new(&[1u32; 7], [2, 3]), "`data` of shape [2, 3] needs 6 elements, the slice has 7");
    says(TensorViewMut::new(&mut [1u32; 1], [0]), "`data` of shape [0] needs 0 elements, the slice has 1");
    says(f32s(&[2]).as_slice::<bf16>(), "`tensor` must be bf16, got f32");
    says(f32s(&[2]).as_mut_slice::<u64>(), "`tensor` must be u64, got f32");

    let (pool, other) = (f32s(&[3, 4, 2, 8]), f32s(&[3, 4, 2, 16]));
    let text = "`v` must have shape [3, 4, 2, 8], got [3, 4, 2, 16]";
    says(KvView::new(pool.view(), other.view(), KvLayout::Nhd), text);
    says(
        KvViewMut::new(f32s(&[3, 4, 2, 8]).view_mut(), f32s(&[3, 4, 2, 16]).view_mut(), KvLayout::Nhd),
        text,
    );
    let half = tensor(DType::F16, &[0.0; 192], [3, 4, 2, 8]);
    says(KvView::new(pool.view(), half.view(), KvLayout::Nhd), "`v` must be f32, got f16");
    let flat = f32s(&[192]);
    let text = "argument `k` must be four-dimensional, got [192]";
    says(KvView::new(flat.view(), flat.view(), KvLayout::Hnd), text);

    let shape = KvShape { num_pages: 3, page_size: 4, num_kv_heads: 2, head_dim: 8 };
    let strides = KvStrides { page: 128, token: 16, head: 8 }; // reaches to 2 * 128 + 3 * 16 + 8 + 8 = 320
    let (enough, short) = (f32s(&[320]), f32s(&[319]));
    KvView::strided(enough.view(), enough.view(), shape, [strides; 2]).unwrap();
    let text = |what: &str, offset: usize, needed: usize, got: usize| {
        format!(
            "`{what}` of shape [3, 4, 2, 8] in strides [128, 16, 8] from element {offset} on needs {needed} elements, \
             the memory has {got}"
        )
    };
    let short_of = |what: &str| text(what, 0, 320, 319);
    says(KvView::strided(short.view(), enough.view(), shape, [strides; 2]), &short_of("k"));
    says(KvView::strided(enough.view(), short.view(), shape, [strides; 2]), &short_of("v"));
    let half = tensor(DType::F16, &[0.0; 320], [320]);
    says(KvView::strided(enough.view(), half.view(), shape, [strides; 2]), "`v` must be f32, got f16");
    let (mut k, mut v) = (f32s(&[320]), f32s(&[319]));
    says(KvViewMut::strided(k.view_mut(), v.view_mut(), shape, [strides; 2]), &short_of("v"));
    says(KvViewMut::strided(v.view_mut(), k.view_mut(), shape, [strides; 2]), &short_of("k"));
    let mut half = half;
    says(KvViewMut::strided(k.view_mut(), half.view_mut(), shape, [strides; 2]), "`v` must be f32, got f16");
    KvViewMut::combined(f32s(&[384]).view_mut(), [0, 64], shape, [strides; 2]).unwrap();
    let attempt = KvViewMut::combined(f32s(&[383]).view_mut(), [0, 64], shape, [strides; 2]).map(drop);
    says(attempt, &text("kv", 64, 384, 383));
    let far = KvStrides { page: usize::MAX, ..strides };
    let text = format!(
        "`k` of shape [3, 4, 2, 8] in strides [{}, 16, 8] from element 0 on needs {0} elements, the memory has 320",
        usize::MAX
    );
    says(KvView::strided(enough.view(), enough.view(), shape, [far; 2]), &text);
    let text =
        "`data` of shape [2, 3, 4] in strides [20, 6] from element 0 on needs 36 elements, the memory has 35";
    says(TensorView::strided(&[0.0f32; 35], [2, 3, 4], [20, 6]), text);

    let table = RopeTable::new(&Rope::default(), 8, 100).unwrap();
    says(table.rotate(&mut [0.0; 8], 100), "`position` must be below 100, got 100");
    says(table.rotate(&mut [0.0; 7], 99), "`head` of shape [8] needs 8 elements, the slice has 7");
}

/// Strides and offsets by which an element would be in two places: each error names the one to change.
#[test]
fn elements_in_two_places() {
    let shape = KvShape { num_pages: 3, page_size: 4, num_kv_heads: 2, head_dim: 8 };
    let dense = KvStrides::dense(shape, KvLayout::Nhd); // pages of 64 elements
    let combined = |offsets: [usize; 2], strides: [KvStrides; 2], text: &str| {
        let made = KvViewMut::combined(f32s(&[1000]).view_mut(), offsets, shape, strides).map(drop);
        says(made, &format!("argument {text}"));
    };
    let of_page = |page| [KvStrides { page, ..dense }; 2];
    let text = "`strides.page` must be at least 128, so that nothing is in two places with `offsets` 64 apart, got 64";
    combined([0, 64], of_page(64), text);
    let text = "`strides.page` must be at least 160, so that nothing is in two places with `offsets` 96 apart, got 130";
    combined([96, 0], of_page(130), text);
    let text = "`offsets` must be at least 64 apart, so that nothing is in two places, got 40";
    combined([0, 40], of_page(128), text);
    let text = "`offsets` must be at least 8 apart, so that nothing is in two places, got 0";
    combined([7, 7], of_page(128), text);
    let text = "`strides.token` must be at least 16, so that nothing is in two places, got 15";
    combined([0, 64], [KvStrides { token: 15, page: 128, ..dense }; 2], text);
    let text = "`v_strides.head` must be at least 8, so that nothing is in two places, got 4";
    combined([0, 500], [dense, KvStrides { head: 4, ..dense }], text);
    let text = "`offsets` must be at least 192 apart, or their pages between each other, where keys and values have other \
                strides, got 100";
    combined([0, 100], [dense, KvStrides { page: 128, ..dense }], text);
    let separate = |strides: [KvStrides; 2], text: &str| {
        let (mut k, mut v) = (f32s(&[500]), f32s(&[500]));
        let made = KvViewMut::strided(k.view_mut(), v.view_mut(), shape, strides).map(drop);
        says(made, &format!("argument {text}"));
    };
    let text = "`k_strides.page` must be at least 64, so that nothing is in two places, got 63";
    separate([KvStrides { page: 63, ..dense }, dense], text);
    let text = "`v_strides.token` must be at least 16, so that nothing is in two places, got 8";
    separate([dense, KvStrides { token: 8, ..dense }], text);
}

fn tables(indptr: &[u32], indices: &[u32], last_page_len: &[u32]) -> PageTables {
    let (indptr, indices) = (indptr.to_vec(), indices.to_vec());
    PageTables { indptr, indices, last_page_len: last_page_len.to_vec() }
}

#[test]
fn batches() {
    let two_rows = || tables(&[0, 2, 3], &[5, 1, 7], &[3, 16]); // 19 and 16 tokens
    Batch::new(16, vec![0, 1, 17], two_rows()).unwrap();
    says(Batch::new(0, vec![0, 1, 2], two_rows()), "argument `page_size` must be from 1 to 256, got 0");
    for (qo_indptr, text) in [
        (vec![0, 1], ": `qo_indptr` must be of length 3, that of `last_page_len` (2) plus 1, got 2"),
        (vec![1, 1, 2], ": `qo_indptr` must be 0 at its start, got 1"),
        (vec![0, 5, 4], " row 1: `qo_indptr` must be at least 5, its predecessor, got 4"),
        (vec![0, 20, 21], " row 0: `block length` must be at most the row's 19 cached tokens, got 20"),
        (vec![0, 0, 17], " row 1: `block length` must be at most the row's 16 cached tokens, got 17"),
    ] {
        says(Batch::new(16, qo_indptr, two_rows()), &format!("batch{text}"));
    }
    let pages = 1 << 24;
    let huge = tables(&[0, pages as u32], &vec![0; pages], &[256]);
    for (bad, text) in [
        (
            tables(&[0, 3], &[5, 1, 7], &[3, 16]),
            ": `indptr` must be of length 3, that of `last_page_len` (2) plus 1, got 2",
        ),
        (tables(&[1, 2, 3], &[5, 1, 7], &[3, 16]), ": `indptr` must be 0 at its start, got 1"),
        (
            tables(&[0, 3, 2], &[5, 1], &[3, 16]),
            " row 1: `indptr` must be at least 3, its predecessor, got 2",
        ),
        (
            tables(&[0, 2, 3], &[5, 1], &[3, 16]),
            ": `indptr` must be 2 at its end, the length of `indices`, got 3",
        ),
        (
            tables(&[0, 2, 3], &[5, 1, 7], &[0, 16]),
            " row 0: `last_page_len` must be from 1 to page_size = 16, got 0",
        ),
        (
            tables(&[0, 2, 3], &[5, 1, 7], &[3, 17]),
            " row 1: `last_page_len` must be from 1 to page_size = 16, got 17",
        ),
        (
            tables(&[0, 3, 3], &[5, 1, 7], &[3, 1]),
            " row 1: `last_page_len` must be 0 for a row without pages, got 1",
        ),
    ] {
        says(Batch::new(16, vec![0, 0, 0], bad), &format!("batch{text}"));
    }
    let text = format!("batch row 0: `kv_len` must be at most {MAX_SEQUENCE_LEN}, got {}", 1u64 << 32);
    says(Batch::new(256, vec![0, 0], huge), &text);

    let partial = |candidates| Batch::partial(16, vec![0, 40, 40], two_rows(), candidates);
    partial(vec![0..19, 16..16]).unwrap();
    let text = "batch: `candidates` must be of length 2, that of `last_page_len`, got 1";
    says(partial(std::iter::once(0..19).collect()), text);
    let text = "batch row 1: `candidates` must be an ascending range within [0, 16], got 3..17";
    says(partial(vec![0..19, 3..17]), text);
    let text = "batch row 0: `candidates` must be an ascending range within [0, 19], got 9..8";
    says(partial(vec![std::ops::Range { start: 9, end: 8 }, 0..0]), text);

    let batch = Batch::new(16, vec![0, 1, 2], two_rows()).unwrap();
    let text = "batch: `sequence_indices` must be of length 2, one for each row, got 3";
    says(batch.clone().with_sequence_indices(vec![1, 2, 3]), text);
    let text = "batch row 1: `sequence_indices` must be unlike that of row 0, got 4";
    says(batch.with_sequence_indices(vec![4, 4]), text);
}

// ---- steps ---------------------------------------------------------------------------------------------

/// An owned cache with two sequences, all buffers filled, and a step that would succeed.
struct Fixture {
    cache: PagedKvCache,
    ts: TokenSelect,
    reader: Reader,
    ids: [SequenceId; 2],
    batch: Batch,
    problem: Problem,
    out: Tensor,
    lse: Tensor,
}

/// The step's 3 query tokens: heads 16 over 2 of 8 elements.
const TOKENS: usize = 3;

impl Fixture {
    fn new(device: &Device) -> Self {
        let config = readable(2, cached(small_config(), 0.9, None));
        let problem = Problem::new(&config, &[(40, 1), (30, 2)], Content::Peaked, 3);
        let size = CacheConfig {
            num_layers: 2,
            num_pages: 12,
            page_size: 8,
            max_sequences: 3,
            layout: KvLayout::Nhd,
        };
        let mut cache = PagedKvCache::new(device, &config, &size).unwrap();
        let limits = Limits { max_rows: 3, max_block_len: 39, max_kv_tokens: 100 };
        let mut ts = TokenSelect::new(device, config.clone(), limits).unwrap();
        let ids = [0, 1].map(|_| cache.create().unwrap());
        for (row, &id) in problem.rows.iter().zip(&ids) {
            let before = row.n - row.t;
            let part = |of: &[f64]| tensor(DType::F32, &of[..before * 16], [before, 2, 8]);
            append(&ts, &mut cache, id, before, &part(&row.k), &part(&row.v));
        }
        let batch = cache.extend(&[(ids[0], 1), (ids[1], 2)]).unwrap();
        let (mut out, mut lse) = outputs(&problem, DType::F32);
        let inputs = Inputs::new(&problem);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.step(&mut cache, 0, &batch, inputs.step(), output).unwrap();
        let (out, lse) = outputs(&problem, DType::F32);
        Fixture { reader: Reader::new(device, &config), cache, ts, ids, batch, problem, out, lse }
    }

    /// Everything that an operation could change, bit by bit.
    fn state(&mut self) -> Vec<Vec<u64>> {
        let mut state = vec![format!("{:?}", self.cache.pages()).bytes().map(u64::from).collect()];
        for layer in 0..2 {
            for id in self.ids.into_iter().filter(|&id| self.cache.len(id).is_ok()) {
                let (k, v) = self.reader.read(&self.cache, layer, id);
                state.extend([k, v].map(|x| x.iter().map(|x| x.to_bits()).collect()));
            }
            let mut cached = self.cache.layer_mut(layer).unwrap().selections.unwrap();
            for view in [cached.selections.reborrow(), cached.ages.reborrow(), cached.made_at.reborrow()] {
                state.push(view.as_view().as_slice::<u32>().unwrap().iter().map(|&x| u64::from(x)).collect());
            }
            state.push(cached.counters.as_view().as_slice::<u64>().unwrap().to_vec());
        }
        let w = self.ts.workspace();
        let buffers = [
            w.buffer(Buffer::Queries),
            w.buffer(Buffer::Products),
            w.buffer(Buffer::Similarities),
            w.buffer(Buffer::Actions),
            w.buffer(Buffer::Logits),
            w.buffer(Buffer::Stats),
            w.buffer(Buffer::Votes),
            w.buffer(Buffer::TopK),
        ];
        state.extend(
            buffers
                .into_iter()
                .chain([w.buffer(Buffer::Selected), w.buffer(Buffer::SelectedLen), &self.out, &self.lse])
                .map(bits),
        );
        state
    }

    /// Asserts that an attempt fails with this text and changes nothing.
    #[track_caller]
    fn refuses<T>(&mut self, attempt: impl FnOnce(&mut Self) -> Result<T, Error>, text: &str) -> Error {
        let before = self.state();
        let error = says(attempt(self), text);
        assert!(self.state() == before, "something changed in spite of: {text}");
        error
    }

    /// A step with some of its arguments replaced.
    fn step(&mut self, change: impl FnOnce(&mut Args)) -> Result<(), Error> {
        let inputs = Inputs::new(&self.problem);
        let mut args = Args { layer: 0, batch: self.batch.clone(), inputs, out: None, lse: None };
        change(&mut args);
        let (out, lse) =
            (args.out.as_mut().unwrap_or(&mut self.out), args.lse.as_mut().unwrap_or(&mut self.lse));
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        self.ts.step(&mut self.cache, args.layer, &args.batch, args.inputs.step(), output)
    }
}

impl Fixture {
    /// The step of layer 0 with dense attention.
    fn step_dense(&mut self, batch: &Batch) -> Result<(), Error> {
        let inputs = Inputs::new(&self.problem);
        let output = StepOutput { out: self.out.view_mut(), lse: None };
        self.ts.step_dense(&mut self.cache, 0, batch, inputs.step(), output)
    }

    /// Writes zeros as the block of a batch.
    fn fill(&mut self, layer: usize, batch: &Batch) -> Result<(), Error> {
        let heads = self.problem.config.heads;
        let zeros = f32s(&[batch.num_query_tokens(), heads.num_kv_heads, heads.head_dim]);
        self.ts.fill(&mut self.cache, layer, batch, zeros.view(), zeros.view())
    }
}

struct Args {
    layer: usize,
    batch: Batch,
    inputs: Inputs,
    out: Option<Tensor>,
    lse: Option<Tensor>,
}

fn wrong_shapes_and_types_of_a_step(device: &Device) {
    let mut f = Fixture::new(device);
    f.refuses(
        |f| f.step(|a| a.inputs.q = f32s(&[2, 16, 8])),
        "`q` must have shape [3, 16, 8], got [2, 16, 8]",
    );
    f.refuses(|f| f.step(|a| a.inputs.k = f32s(&[3, 8, 2])), "`k` must have shape [3, 2, 8], got [3, 8, 2]");
    f.refuses(|f| f.step(|a| a.inputs.v = f32s(&[3, 16])), "`v` must have shape [3, 2, 8], got [3, 16]");
    f.refuses(
        |f| f.step(|a| a.out = Some(f32s(&[3, 16, 16]))),
        "`out` must have shape [3, 16, 8], got [3, 16, 16]",
    );
    f.refuses(|f| f.step(|a| a.lse = Some(f32s(&[3, 2]))), "`lse` must have shape [3, 16], got [3, 2]");
    let half = || tensor(DType::F16, &[0.0; TOKENS * 128], [TOKENS, 16, 8]);
    f.refuses(|f| f.step(|a| a.inputs.q = half()), "`q` must be f32, got f16");
    f.refuses(|f| f.step(|a| a.out = Some(half())), "`out` must be f32, got f16");
    f.refuses(
        |f| f.step(|a| a.lse = Some(tensor(DType::U32, &[0.0; 48], [3, 16]))),
        "`lse` must be f32, got u32",
    );
    f.refuses(|f| f.step(|a| a.layer = 2), "`layer` must be below 2, got 2");
    f.step(|_| ()).expect("the step itself is right");
}

fn batches_that_do_not_fit_a_step(device: &Device) {
    let mut f = Fixture::new(device);
    let text = |op| format!("`{op}` needs a batch made by this cache's `extend`");
    f.refuses(|f| f.step(|a| a.batch = foreign_of(&a.batch)), &text("step"));
    f.refuses(|f| f.step_dense(&foreign_of(&f.batch)), &text("step_dense"));
    f.refuses(|f| f.fill(0, &foreign_of(&f.batch)), &text("fill"));
    f.refuses(|f| f.cache.check(&foreign_of(&f.batch)), &text("check"));
    let small = |limits: Limits| Plan::new(&Device::cpu(), small_config(), limits, Operations::ALL).unwrap();
    let text = limited("max_rows", 1, 2);
    says(small(Limits { max_rows: 1, ..Limits::default() }).check(&f.batch), &text);
    let text = limited("max_block_len", 1, 2);
    says(small(Limits { max_rows: 2, max_block_len: 1, ..Limits::default() }).check(&f.batch), &text);
    // 40 and 30 tokens in pages of 8 take 5 and 4 pages.
    let text = limited("max_kv_tokens", 71, 72);
    says(small(Limits { max_rows: 2, max_kv_tokens: 71, ..Limits::default() }).check(&f.batch), &text);
    small(Limits { max_rows: 2, max_block_len: 2, max_kv_tokens: 72 }).check(&f.batch).unwrap();
    // All operations check limits.
    let four = Batch::new(8, vec![0; 5], tables(&[0; 5], &[], &[0; 4])).unwrap();
    let text = limited("max_rows", 3, 4);
    f.refuses(|f| f.ts.pool(&four, f32s(&[0, 16, 8]).view(), None), &text);
    f.refuses(|f| f.ts.vote(&four), &text);
    f.refuses(|f| f.ts.top_k(&four, None), &text);
    f.refuses(|f| f.ts.score(&four, f.cache.layer(0)?), &text);
    // A part of a sequence with more tokens outside its candidates than the windows hold.
    let part = Batch::partial(8, vec![0, 1], tables(&[0, 8], &[0; 8], &[8]), std::iter::once(0..3).collect());
    let text = "`selected tokens of a row` is limited to 51, the batch needs 64";
    f.refuses(|f| f.ts.vote(&part.unwrap()), text);
}

/// The error of a batch beyond [`Limits`].
fn limited(what: &str, limit: usize, got: usize) -> String {
    format!(
        "`{what}` is limited to {limit}, the batch needs {got}: make the limit larger, or the batch smaller (after an \
         `extend`, `truncate` takes it back)"
    )
}

/// The same tables, as another engine would hand them over.
fn foreign_of(batch: &Batch) -> Batch {
    Batch::new(batch.page_size(), batch.qo_indptr().to_vec(), batch.tables().clone()).unwrap()
}

fn caches_that_do_not_fit_an_operation(device: &Device) {
    let mut f = Fixture::new(device);
    let q = queries(&f.problem);
    // The cache's pages are 8 tokens, its heads 2 of 8; there are 12 pages.
    let pages = |dims: [usize; 4]| f32s(&dims);
    let text = "`kv` must have shape [12, 8, 2, 8], got [12, 16, 2, 8]";
    let wrong = pages([12, 16, 2, 8]);
    f.refuses(|f| f.ts.score(&f.batch, KvView::new(wrong.view(), wrong.view(), KvLayout::Nhd)?), text);
    let wrong = pages([12, 8, 4, 8]);
    let text = "`kv` must have shape [12, 8, 2, 8], got [12, 8, 4, 8]";
    f.refuses(
        |f| f.ts.select(&f.batch, KvView::new(wrong.view(), wrong.view(), KvLayout::Nhd)?, q.view(), None),
        text,
    );
    let wrong = tensor(DType::Bf16, &[0.0; 1536], [12, 8, 2, 8]);
    f.refuses(
        |f| f.ts.score(&f.batch, KvView::new(wrong.view(), wrong.view(), KvLayout::Nhd)?),
        "`kv` must be f32, got bf16",
    );
    let largest = *f.batch.tables().indices.iter().max().unwrap() as usize;
    let wrong = pages([largest, 8, 2, 8]);
    let text = format!("`page` must be below {largest}, got {largest}");
    f.refuses(|f| f.ts.score(&f.batch, KvView::new(wrong.view(), wrong.view(), KvLayout::Nhd)?), &text);

    // A Selection Cache for other sizes, and for too few sequences.
    let config = f.ts.config().clone();
    let mut few = SelectionCache::new(&Device::cpu(), &config, 1, 1).unwrap();
    let text = "`sequence index` must be below 1, got 1";
    f.refuses(|f| f.ts.pool(&f.batch, q.view(), Some(few.layer_mut(0)?)), text);
    let mut other =
        SelectionCache::new(&Device::cpu(), &SelectConfig { top_k: 9, ..config.clone() }, 1, 3).unwrap();
    let text = "`cached.selections` must have shape [3, 5], got [3, 9]";
    f.refuses(|f| f.ts.top_k(&f.batch, Some(other.layer_mut(0)?)), text);
    let heads = HeadShape { num_qo_heads: 2, ..config.heads };
    let mut other = SelectionCache::new(&Device::cpu(), &SelectConfig { heads, ..config }, 1, 3).unwrap();
    let text = "`cached.queries` must have shape [3, 128], got [3, 16]";
    f.refuses(|f| f.ts.pool(&f.batch, q.view(), Some(other.layer_mut(0)?)), text);
    let mut layers = SelectionCache::new(&Device::cpu(), f.ts.config(), 2, 3).unwrap();
    says(layers.layer_mut(2), "`layer` must be below 2, got 2");
    says(layers.layer_stats(7), "`layer` must be below 2, got 7");
    says(layers.clear(3), "`sequence index` must be below 3, got 3");
    says(layers.truncate(4, 0), "`sequence index` must be below 3, got 4");
    says(layers.fork(0, 3), "`sequence index` must be below 3, got 3");
    says(f.ts.workspace().selected(3), "`row` must be below 3, got 3");
    says(f.cache.layer(2), "`layer` must be below 2, got 2");
    says(f.cache.layer_mut(3).map(|_| ()), "`layer` must be below 2, got 3");
}

/// Lists for the fixture's two rows: `[2, 4]` with the given row 1.
fn lists(row: [u32; 4]) -> Tensor {
    Tensor::from_vec([&[0, 1, 2, 3][..], &row[..]].concat(), [2, 4]).unwrap()
}

fn lists_that_contradict_themselves(device: &Device) {
    let counts = |a: u32, b: u32| Tensor::from_vec(vec![a, b], [2]).unwrap();
    let mut f = Fixture::new(device);
    let mut refuse = |tokens: &Tensor, len: &Tensor, ranks: Option<(&Tensor, &Tensor)>, text: &str| {
        let q = queries(&f.problem);
        f.refuses(
            |f| {
                let ranks =
                    ranks.map(|(ranks, total)| Ranks { ranks: ranks.view(), total_len: total.view() });
                let selection = Selection { tokens: tokens.view(), len: len.view(), ranks };
                let output = StepOutput { out: f.out.view_mut(), lse: Some(f.lse.view_mut()) };
                f.ts.attend(&f.batch, f.cache.layer(0)?, q.view(), Over::Lists(&selection), output)
            },
            text,
        );
    };
    let (good, full) = (lists([0, 7, 8, 29]), counts(4, 4));
    let row = |text: &str| format!("batch row 1: {text}");
    refuse(&good, &counts(4, 5), None, &row("`selection.len` must be at most 4, got 5"));
    refuse(
        &lists([0, 7, 7, 29]),
        &full,
        None,
        &row("`selection.tokens` must be ascending, so above 7, got 7"),
    );
    refuse(
        &lists([0, 9, 8, 29]),
        &full,
        None,
        &row("`selection.tokens` must be ascending, so above 9, got 8"),
    );
    refuse(&lists([0, 7, 8, 30]), &full, None, &row("`selection.tokens` must be below 30, got 30"));
    let text = row("`selection.len` must be 0 or at least the block's length, 2, got 1");
    refuse(&good, &counts(4, 1), None, &text);
    let text = row("`selection.total_len` must be 0 or at least the block's length, 2, got 1");
    refuse(&lists([0, 0, 0, 0]), &counts(4, 1), Some((&lists([0, 0, 0, 0]), &counts(9, 1))), &text);
    let text = row("`selection.ranks` must be ascending, so above 3, got 2");
    refuse(&good, &full, Some((&lists([0, 3, 2, 9]), &counts(9, 10))), &text);
    let text = row("`selection.ranks` must be below 9, got 9");
    refuse(&good, &full, Some((&lists([0, 3, 4, 9]), &counts(9, 9))), &text);
    let text = "`selection.len` must have shape [2], got [1]";
    refuse(&good, &Tensor::from_vec(vec![4u32], [1]).unwrap(), None, text);
    let wide = Tensor::from_vec(vec![0u32; 12], [3, 4]).unwrap();
    refuse(&wide, &full, None, "`selection.tokens` must have shape [2, 4], got [3, 4]");
    refuse(&f32s(&[2, 4]), &full, None, "`selection.tokens` must be u32, got f32");
    let text = "`selection.ranks` must have shape [2, 4], got [3, 4]";
    refuse(&good, &full, Some((&wide, &full)), text);
    let text = "`selection.total_len` must have shape [2], got [3]";
    refuse(&good, &full, Some((&good, &Tensor::from_vec(vec![9u32; 3], [3]).unwrap())), text);
}

/// A whole list longer than the table of angles: 100 tokens, as the limits say.
fn a_list_longer_than_the_table_of_angles(device: &Device) {
    let config =
        SelectConfig { positions: Positions::Reassigned(Rope::default()), ..readable(2, small_config()) };
    let problem = Problem::new(&config, &[(10, 1)], Content::Peaked, 3);
    let pool = Pool::full(&problem, 8, Storage::Nhd, 3);
    let limits = Limits { max_rows: 1, max_block_len: 1, max_kv_tokens: 100 };
    let ts = TokenSelect::new(device, config.clone(), limits).unwrap();
    let (mut out, _) = outputs(&problem, DType::F32);
    let [one, total] = [1u32, 101].map(|x| Tensor::from_vec(vec![x], [1]).unwrap());
    let tokens = Tensor::from_vec(vec![0u32], [1, 1]).unwrap();
    let ranks = Some(Ranks { ranks: tokens.view(), total_len: total.view() });
    let selection = Selection { tokens: tokens.view(), len: one.view(), ranks };
    let output = StepOutput { out: out.view_mut(), lse: None };
    let attempt = ts.attend(
        &pool.batch(&problem),
        pool.view(),
        queries(&problem).view(),
        Over::Lists(&selection),
        output,
    );
    says(attempt, "`positions` is limited to 100, the batch needs 101");
}

fn merging_parts_of_wrong_shapes(device: &Device) {
    let mut f = Fixture::new(device);
    let (parts, lses) = (f32s(&[2, TOKENS, 16, 8]), f32s(&[2, TOKENS, 16]));
    let mut refuse = |parts: &Tensor, lses: &Tensor, text: &str| {
        f.refuses(
            |f| {
                let output = StepOutput { out: f.out.view_mut(), lse: Some(f.lse.view_mut()) };
                f.ts.merge(parts.view(), lses.view(), output)
            },
            text,
        );
    };
    refuse(&f32s(&[2, 3, 8, 8]), &lses, "`parts` must have shape [2, 3, 16, 8], got [2, 3, 8, 8]");
    refuse(&parts, &f32s(&[3, 3, 16]), "`part_lses` must have shape [2, 3, 16], got [3, 3, 16]");
    let text = "`out` must have shape [5, 16, 8], got [3, 16, 8]";
    refuse(&f32s(&[2, 5, 16, 8]), &f32s(&[2, 5, 16]), text);
    let half = tensor(DType::F16, &[0.0; 768], [2, 3, 16, 8]);
    refuse(&half, &lses, "`parts` must be f32, got f16");
}

fn operations_that_lack_something(device: &Device) {
    let mut f = Fixture::new(device);
    let q = queries(&f.problem);
    let candidates = vec![0..40, 0..30];
    let b = &f.batch;
    let part = Batch::partial(8, b.qo_indptr().to_vec(), b.tables().clone(), candidates).unwrap();
    let inputs = Inputs::new(&f.problem);
    let (mut k, mut v) = (f32s(&[12, 8, 2, 8]), f32s(&[12, 8, 2, 8]));
    let mut pages = KvViewMut::new(k.view_mut(), v.view_mut(), KvLayout::Nhd).unwrap();
    let text = |op| format!("`{op}` needs a batch of whole sequences");
    f.refuses(|f| f.ts.append(&part, pages.reborrow(), inputs.k.view(), inputs.v.view()), &text("append"));
    let layer = LayerMut { kv: pages, selections: None };
    f.refuses(|f| f.ts.append_select(&part, layer, inputs.step()), &text("append_select"));
    let dense = |f: &mut Fixture| {
        let output = StepOutput { out: f.out.view_mut(), lse: None };
        f.ts.attend(&part, f.cache.layer(0)?, q.view(), Over::All, output)
    };
    f.refuses(dense, "`attend` needs a batch of whole sequences");
    f.ts.provide(Buffer::Selected, &part).unwrap();
    let attend = |f: &mut Fixture| {
        let output = StepOutput { out: f.out.view_mut(), lse: None };
        f.ts.attend(&part, f.cache.layer(0)?, q.view(), Over::Selected, output)
    };
    f.refuses(attend, "`attend` needs ranks for a batch of parts of sequences");
    // `pool` decided to reuse (the fixture has made the same step before); `top_k` must know what.
    let cached = f.cache.layer_mut(0).unwrap().selections.unwrap();
    f.ts.pool(&f.batch, q.view(), Some(cached)).unwrap();
    f.ts.provide(Buffer::Votes, &f.batch).unwrap();
    let text = |op| format!("`{op}` needs the cached selections that `pool` was given");
    f.refuses(|f| f.ts.top_k(&f.batch, None), &text("top_k"));
    let (rows, heads) = (f.batch.num_rows(), f.problem.config.heads.num_qo_heads);
    let len = f.batch.row(0).unwrap().kv_len;
    for ((row, token, head), what) in
        [((rows, 0, 0), "row"), ((0, len, 0), "token"), ((0, 0, heads), "query head")]
    {
        let error = f.ts.logit_index(&f.batch, row, token, head).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

/// A plan that leaves out what a call needs: the text names both.
fn operations_that_a_plan_leaves_out(device: &Device) {
    let mut f = Fixture::new(device);
    let mut refuse = |operations, call: fn(&mut Fixture) -> Result<(), Error>, op: &str, needs: &str| {
        let plan = Plan::new(device, f.ts.config().clone(), *f.ts.plan().limits(), operations).unwrap();
        let whole = std::mem::replace(&mut f.ts, TokenSelect::with_plan(plan).unwrap());
        // Who plans for prompts is told of what these leave out.
        let hint = if operations == (Operations { score: false, ..Operations::ALL }) {
            ": what reads prompts selects for long blocks alone"
        } else {
            ""
        };
        f.refuses(call, &format!("`{op}` needs the operation `{needs}`, which this was made without{hint}"));
        f.ts = whole;
    };
    let all = Operations::ALL;
    let step = |f: &mut Fixture| f.step(|_| ());
    refuse(Operations::SELECTION, step, "step", "attend");
    refuse(Operations { append: false, ..all }, step, "step", "append");
    refuse(Operations { score: false, ..all }, step, "step", "score");
    refuse(Operations { score: false, score_blocks: false, ..all }, step, "step", "score");
    refuse(Operations::SELECTION, |f| f.step_dense(&f.batch.clone()), "step_dense", "attend");
    refuse(Operations { append: false, ..all }, |f| f.fill(0, &f.batch.clone()), "fill", "append");
    refuse(Operations { vote: false, ..all }, |f| f.ts.vote_top_k(&f.batch, None), "vote_top_k", "vote");
    let select = |f: &mut Fixture| {
        let q = queries(&f.problem);
        f.ts.select(&f.batch, f.cache.layer(0)?, q.view(), None)
    };
    refuse(Operations { pool: false, ..all }, select, "select", "pool");
}

/// The workspace's own lists, which a caller may write: their errors name the buffers.
fn buffers_that_contradict_themselves(device: &Device) {
    let mut f = Fixture::new(device);
    let q = queries(&f.problem);
    let width = f.ts.plan().selected_shape().dims()[1];
    let mut refuse = |row: [u32; 3], len: u32, text: &str| {
        let mut tokens = vec![0; 3 * width];
        tokens[width..][..3].copy_from_slice(&row);
        let tokens = Tensor::from_vec(tokens, [3, width]).unwrap();
        f.ts.buffer_mut(Buffer::Selected).copy_from(tokens.view()).unwrap();
        let lens = Tensor::from_vec(vec![1, len, 0], [3]).unwrap();
        f.ts.buffer_mut(Buffer::SelectedLen).copy_from(lens.view()).unwrap();
        f.ts.provide(Buffer::Selected, &f.batch).unwrap();
        f.refuses(
            |f| {
                let output = StepOutput { out: f.out.view_mut(), lse: None };
                f.ts.attend(&f.batch, f.cache.layer(0)?, q.view(), Over::Selected, output)
            },
            &format!("batch row 1: {text}"),
        );
    };
    refuse([0, 7, 7], 3, "`Buffer::Selected` must be ascending, so above 7, got 7");
    refuse([0, 7, 30], 3, "`Buffer::Selected` must be below 30, got 30");
    let text = format!("`Buffer::SelectedLen` must be at most {width}, got {}", width + 1);
    refuse([0, 1, 2], width as u32 + 1, &text);
    refuse([0, 1, 2], 1, "`Buffer::SelectedLen` must be 0 or at least the block's length, 2, got 1");
}

/// Cached selections belong to sequences: a batch that names none could only ignore them.
fn cached_selections_without_sequences(device: &Device) {
    let mut f = Fixture::new(device);
    let unnamed = foreign_of(&f.batch);
    let (q, inputs) = (queries(&f.problem), Inputs::new(&f.problem));
    let text =
        |op: &str| format!("`{op}` needs a batch with `sequence_indices` where cached selections are given");
    let mut own = SelectionCache::new(device, f.ts.config(), 1, 3).unwrap();
    let pool = Pool::full(&f.problem, 8, Storage::Nhd, 3);
    let batch = pool.batch(&f.problem);
    f.refuses(|f| f.ts.select(&batch, pool.view(), q.view(), Some(own.layer_mut(0)?)), &text("select"));
    f.refuses(|f| f.ts.pool(&unnamed, q.view(), Some(own.layer_mut(0)?)), &text("pool"));
    f.refuses(|f| f.ts.compare(&unnamed, Some(own.layer_mut(0)?)), &text("compare"));
    f.refuses(|f| f.ts.decide(&unnamed, Some(own.layer_mut(0)?)), &text("decide"));
    f.refuses(|f| f.ts.top_k(&unnamed, Some(own.layer_mut(0)?)), &text("top_k"));
    f.refuses(|f| f.ts.vote_top_k(&unnamed, Some(own.layer_mut(0)?)), &text("vote_top_k"));
    let mut pool = pool;
    let layer = LayerMut { kv: pool.view_mut(), selections: Some(own.layer_mut(0).unwrap()) };
    f.refuses(|f| f.ts.append_select(&batch, layer, inputs.step()), &text("append_select"));
    // Without the cached selections, or without a Selection Cache in the configuration, there is nothing to ignore.
    f.ts.select(&batch, pool.view(), q.view(), None).unwrap();
    let config = SelectConfig { selection_cache: None, ..f.ts.config().clone() };
    let mut without = TokenSelect::new(device, config, *f.ts.plan().limits()).unwrap();
    without.select(&batch, pool.view(), q.view(), Some(own.layer_mut(0).unwrap())).unwrap();
}

/// A block that is too long for the limits, found by the step, is taken back and loses nothing; `extend_within` finds it first.
fn blocks_beyond_the_limits(device: &Device) {
    let config = small_config();
    let heads = config.heads;
    let limits = Limits { max_rows: 2, max_block_len: 4, max_kv_tokens: 64 };
    let size = CacheConfig { num_pages: 16, page_size: 8, ..CacheConfig::default() };
    let step = |cache: &mut PagedKvCache, ts: &mut TokenSelect, batch: &Batch, from: usize| {
        let values = |heads: usize, seed: usize| -> Vec<f32> {
            let row = heads * config.heads.head_dim;
            let at = |i: usize| ((from * row + i) * (7 + seed) % 23) as f32 / 23.0;
            (0..batch.num_query_tokens() * row).map(at).collect()
        };
        let (q, k, v) =
            (values(heads.num_qo_heads, 0), values(heads.num_kv_heads, 1), values(heads.num_kv_heads, 2));
        let mut out = vec![0.0f32; q.len()];
        let (input, output) = (ts.input(batch, &q, &k, &v)?, ts.output(batch, &mut out, None)?);
        ts.step(cache, 0, batch, input, output).map(|()| out)
    };
    let new = |limits| {
        let mut cache = PagedKvCache::new(device, &config, &size).unwrap();
        let (id, ts) = (cache.create().unwrap(), TokenSelect::new(device, config.clone(), limits).unwrap());
        (cache, id, ts)
    };
    let (mut cache, id, mut ts) = new(limits);
    let (mut other, twin, mut larger) = new(Limits { max_block_len: 5, ..limits });
    for (cache, id, ts) in [(&mut cache, id, &mut ts), (&mut other, twin, &mut larger)] {
        for from in (0..40).step_by(4) {
            let batch = cache.extend_within(&limits, &[(id, 4)]).unwrap();
            step(cache, ts, &batch, from).unwrap();
        }
    }
    // Before anything grows.
    let text = limited("max_block_len", 4, 5);
    says(cache.extend_within(&limits, &[(id, 5)]), &text);
    assert_eq!((cache.len(id), cache.pages().num_free_pages()), (Ok(40), 11));
    let text_of_rows = limited("max_rows", 2, 3);
    says(cache.extend_within(&limits, &[(id, 1); 3]), &text_of_rows);
    let few = Limits { max_kv_tokens: 47, ..limits };
    says(cache.extend_within(&few, &[(id, 1)]), &limited("max_kv_tokens", 47, 48));
    // After the sequence has grown: the same batch for larger limits, or back and by less.
    let batch = cache.extend(&[(id, 5)]).unwrap();
    says(step(&mut cache, &mut ts, &batch, 40), &text);
    assert_eq!((cache.len(id), cache.written_len(0, id)), (Ok(45), Ok(40)));
    let batch = other.extend(&[(twin, 5)]).unwrap();
    says(step(&mut other, &mut ts, &batch, 40), &text);
    let at_once = step(&mut other, &mut larger, &batch, 40).unwrap();
    cache.truncate(id, 40).unwrap();
    let batch = cache.extend_within(&limits, &[(id, 4)]).unwrap();
    step(&mut cache, &mut ts, &batch, 40).unwrap();
    let batch = cache.extend_within(&limits, &[(id, 1)]).unwrap();
    step(&mut cache, &mut ts, &batch, 44).unwrap();
    assert_eq!((cache.written_len(0, id), other.written_len(0, twin)), (Ok(45), Ok(45)));
    // The two caches now hold the same: so the next step gives the same.
    assert_eq!(at_once.len(), 5 * heads.num_qo_heads * heads.head_dim);
    let next = [(&mut cache, id), (&mut other, twin)].map(|(cache, id)| {
        let batch = cache.extend(&[(id, 1)]).unwrap();
        step(cache, &mut ts, &batch, 45).unwrap()
    });
    assert_eq!(next[0], next[1]);
}

fn sequences_and_pages(device: &Device) {
    let mut f = Fixture::new(device);
    let [a, b] = f.ids;
    // 12 pages, of which 5 and 4 are taken; a grows by 8 to its sixth page, b by 24 to seven.
    f.refuses(|f| f.cache.extend(&[(a, 8), (b, 24)]), "out of pages: 4 needed, 3 free");
    let text = format!("{a} appears in rows 0 and 2 of one batch");
    f.refuses(|f| f.cache.extend(&[(a, 1), (b, 1), (a, 1)]), &text);
    let text =
        format!("{b} cannot grow to {} tokens, the limit is {MAX_SEQUENCE_LEN}", MAX_SEQUENCE_LEN + 30);
    f.refuses(|f| f.cache.extend(&[(a, 1), (b, MAX_SEQUENCE_LEN)]), &text);
    let text = format!("{a} holds 40 tokens and cannot be truncated to 41");
    f.refuses(|f| f.cache.truncate(a, 41), &text);
    let third = f.cache.create().unwrap();
    f.refuses(|f| f.cache.create(), "the cache holds at most 3 sequences");
    f.refuses(|f| f.cache.fork(a), "the cache holds at most 3 sequences");
    f.cache.free(third).unwrap();
    let text = format!("{third} is not in this cache");
    f.refuses(|f| f.cache.len(third), &text);
    f.refuses(|f| f.cache.fork(third), &text);
    f.refuses(|f| f.cache.truncate(third, 0), &text);
    f.refuses(|f| f.cache.free(third), &text);
    f.refuses(|f| f.cache.extend(&[(a, 1), (third, 1)]), &text);
    f.refuses(|f| f.cache.pages().pages(third).map(<[u32]>::len), &text);
    f.refuses(|f| f.cache.pages().tables(&[a, third]), &text);
    f.refuses(|f| f.cache.pages().ref_count(12), "`page` must be below 12, got 12");
    // What just fits is not refused.
    f.cache.extend(&[(a, 8), (b, 18)]).unwrap();
    assert_eq!(f.cache.pages().num_free_pages(), 0);
}

fn stale(id: SequenceId, change: &str, now: usize) -> String {
    format!(
        "batch row 1 is stale: {id} was {change} after the batch was made; its length was 30 then and is {now} now"
    )
}

fn stale_batches(device: &Device) {
    let mut f = Fixture::new(device);
    let [_, b] = f.ids;
    f.cache.truncate(b, 29).unwrap();
    let text = stale(b, "truncated to length 29", 29);
    f.refuses(|f| f.step(|_| ()), &text);
    // The length is back, the tokens are not.
    f.cache.extend(&[(b, 1)]).unwrap();
    f.refuses(|f| f.step(|_| ()), &stale(b, "truncated to length 29", 30));
    f.cache.free(b).unwrap();
    f.refuses(|f| f.step(|_| ()), &format!("{b} is not in this cache"));
}

/// The old batch would write into a page that the fork holds, too.
fn batches_made_before_a_fork_are_stale(device: &Device) {
    let mut f = Fixture::new(device);
    let [_, b] = f.ids;
    f.cache.fork(b).unwrap();
    f.refuses(|f| f.step(|_| ()), &stale(b, "forked", 30));
}

/// A page that moved: the fork and the sequence it came from now write into pages of their own.
fn batches_with_a_page_that_moved_are_stale(device: &Device) {
    let mut f = Fixture::new(device);
    let [_, b] = f.ids;
    f.cache.fork(b).unwrap();
    f.cache.extend(&[(b, 1)]).unwrap();
    let text = stale(b, "extended into a copy of the page that it shared with a fork", 31);
    f.refuses(|f| f.step(|_| ()), &text);
}

/// Pools one query that lies nowhere on the emulated GPU.
fn emulated_pool(dtype: DType) -> tokenselect::Result<()> {
    let device = Device::emulated();
    let config = SelectConfig { dtype, ..small_config() };
    let heads = config.heads;
    let batch = Batch::new(8, vec![0, 1], tables(&[0, 1], &[0], &[1]))?;
    let operations = Operations { pool: true, ..Operations::NONE };
    let mut ts = TokenSelect::with_plan(Plan::new(&device, config, Limits::default(), operations)?)?;
    let shape = [1, heads.num_qo_heads, heads.head_dim];
    // SAFETY: none: the emulator refuses the access, which is the point.
    let q = unsafe { TensorView::from_device_addr(&device, 4096, dtype, shape)? };
    ts.pool(&batch, q, None)
}

/// One of each, so that a new variant does not go untested.
#[test]
fn every_variant_is_provoked() {
    let mut f = Fixture::new(&Device::cpu());
    let [a, b] = f.ids;
    let mut pages = PageAllocator::new(1, 1, 1).unwrap();
    let only = pages.create().unwrap();
    let batch = Batch::new(8, vec![0, 1], tables(&[0, 1], &[0], &[1])).unwrap();
    let provoked = [
        SelectConfig { top_k: 0, ..small_config() }.validate().err(),
        f.step(|args| args.inputs.q = f32s(&[1, 16, 8])).err(),
        Tensor::from_vec(vec![0u32], [2]).err(),
        f32s(&[1]).view().heads(0..1).err(),
        TensorView::strided(&[0u32], [1, 1, 2], [2, 2]).err(),
        f32s(&[1]).as_slice::<bf16>().err(),
        f.cache.layer(9).err(),
        f.ts.plan().check(&Batch::new(8, vec![0; 5], tables(&[0; 5], &[], &[0; 4])).unwrap()).err(),
        Batch::new(8, vec![], tables(&[0], &[], &[])).err(),
        pages.extend(&[(only, 2)]).err(),
        pages.create().err(),
        {
            pages.free(only).unwrap();
            pages.len(only).err()
        },
        f.cache.extend(&[(a, 1), (a, 1)]).err(),
        f.cache.extend(&[(a, MAX_SEQUENCE_LEN)]).err(),
        f.cache.truncate(a, 99).err(),
        {
            f.cache.truncate(b, 1).unwrap();
            f.step(|_| ()).err()
        },
        f.step(|args| args.batch = foreign_of(&args.batch)).err(),
        Tensor::zeros_on(&Device::emulated(), DType::F32, [1]).unwrap().as_slice::<f32>().err(),
        emulated_pool(DType::F32).err(),
        Device::cuda(99).err(),
        f.ts.score(&batch, f.cache.layer(0).unwrap()).err(),
        {
            let batch = f.cache.extend(&[(a, 1)]).unwrap();
            f.cache
                .extend(&[(a, 1)])
                .and_then(|next| f.cache.layer(0).map(|_| next))
                .and_then(|next| {
                    drop(batch);
                    f.fill(1, &next)
                })
                .err()
        },
        Tensor::zeros(DType::F32, [1 << 60]).err(),
        emulated_pool(DType::Bf16).err(),
    ];
    let text = provoked.last().unwrap().as_ref().unwrap().to_string();
    assert!(text.starts_with("emulated: kernel `append_pool_bf16`: [GlobalBounds]"), "{text}");
    assert!(text.contains("address 0x1000 belongs to no allocation"), "{text}");
    let name = |error: &Error| {
        let text = format!("{error:?}");
        text.split([' ', '(']).next().unwrap().to_string()
    };
    let provoked: BTreeSet<String> =
        provoked.iter().map(|error| name(error.as_ref().expect("an error"))).collect();
    let source = include_str!("../host/src/error.rs");
    let body = source.split("pub enum Error {").nth(1).unwrap().split("\n}").next().unwrap();
    // Variants stand at the first level of indentation and begin with a capital.
    let variant = |line: &str| {
        let name = line.strip_prefix("    ")?;
        let is_variant = name.starts_with(|c: char| c.is_ascii_uppercase());
        is_variant.then(|| name.split([' ', '(', ',']).next().unwrap().to_string())
    };
    let declared: BTreeSet<String> = body.lines().filter_map(variant).collect();
    assert!(declared.len() >= 15, "the declaration was not understood: {declared:?}");
    assert_eq!(provoked, declared);
}
