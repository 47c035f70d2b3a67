//! Page tables of an engine that lie on the device: vLLM's block tables and SGLang's slots of tokens, in recorded work and out
//! of it, and tables that are wrong.

mod common;

use common::paged::{Pool, Storage};
use common::problem::{Content, Problem, Row};
use common::run::{Inputs, outputs_on};
use common::{Random, on_devices, values};
use tokenselect::{
    Batch, BatchSlot, DType, Device, Error, HeadShape, LayerMut, Limits, Over, PageTables, SelectConfig,
    SelectionCache, SelectionCacheConfig, StepInput, StepOutput, TablesOnDevice, Tensor, TensorView,
    TokenSelect,
};

fn config() -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 },
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 3,
        top_k: 8,
        selection_cache: Some(SelectionCacheConfig { similarity_threshold: 0.5, max_reuse: Some(2) }),
        ..SelectConfig::default()
    }
}

/// A tensor of integers on a device.
fn ints(device: &Device, values: &[u32], shape: &[usize]) -> Tensor {
    match *shape {
        [a] => Tensor::from_slice_on(device, values, [a]),
        [a, b] => Tensor::from_slice_on(device, values, [a, b]),
        _ => panic!("one or two dimensions"),
    }
    .unwrap()
}

/// An engine's tables for the rows of a host's batch.
struct Engine {
    entries: Vec<u32>,
    width: usize,
    rows: Option<Vec<u32>>,
    lens: Vec<u32>,
}

impl Engine {
    /// Rows of `width` entries, in another order where `shuffles`; unused entries are no pages.
    fn new(batch: &Batch, width: usize, slots: bool, shuffles: bool, random: &mut Random) -> Self {
        let rows = batch.num_rows();
        let mut order: Vec<u32> = (0..rows as u32 + 3).collect();
        if shuffles {
            random.shuffle(&mut order);
        }
        let mut entries = vec![u32::MAX; order.len() * width];
        let mut lens = Vec::new();
        for r in 0..rows {
            let row = batch.row(r).unwrap();
            lens.push(row.kv_len as u32);
            let to = &mut entries[order[r] as usize * width..][..width];
            if slots {
                let size = batch.page_size();
                for (token, to) in to[..row.kv_len].iter_mut().enumerate() {
                    *to = row.pages[token / size] * size as u32 + (token % size) as u32;
                }
            } else {
                to[..row.pages.len()].copy_from_slice(row.pages);
            }
        }
        Engine { entries, width, rows: shuffles.then(|| order[..rows].to_vec()), lens }
    }

    fn on(&self, device: &Device) -> Given {
        Given {
            entries: ints(device, &self.entries, &[self.entries.len() / self.width, self.width]),
            rows: self.rows.as_ref().map(|rows| ints(device, rows, &[rows.len()])),
            lens: ints(device, &self.lens, &[self.lens.len()]),
        }
    }
}

/// The same on a device.
struct Given {
    entries: Tensor,
    rows: Option<Tensor>,
    lens: Tensor,
}

impl Given {
    fn tables<'a>(&'a self, slots: bool, sequences: &'a Tensor, num_pages: usize) -> TablesOnDevice<'a> {
        TablesOnDevice {
            entries: self.entries.view(),
            slots,
            rows: self.rows.as_ref().map(Tensor::view),
            kv_lens: self.lens.view(),
            sequences: Some(sequences.view()),
            num_pages,
            num_sequences: sequences.shape().dims()[0],
        }
    }

    fn copy_from(&mut self, engine: &Engine) {
        let shape = self.entries.shape();
        let entries = Tensor::from_vec(engine.entries.clone(), [shape.dims()[0], shape.dims()[1]]).unwrap();
        self.entries.copy_from(entries.view()).unwrap();
        let lens = Tensor::from_vec(engine.lens.clone(), [engine.lens.len()]).unwrap();
        self.lens.copy_from(lens.view()).unwrap();
        if let (Some(to), Some(rows)) = (&mut self.rows, &engine.rows) {
            to.copy_from(Tensor::from_vec(rows.clone(), [rows.len()]).unwrap().view()).unwrap();
        }
    }
}

/// What a step leaves: lists, output, and the pools.
type Left = (Vec<Vec<u32>>, Vec<f64>, Vec<u64>);

fn step(
    ts: &mut TokenSelect,
    pool: &mut Pool,
    batch: &Batch,
    input: StepInput<'_>,
    selections: &mut SelectionCache,
    out: &mut Tensor,
) -> Result<(), Error> {
    ts.append_select(
        batch,
        LayerMut { kv: pool.view_mut(), selections: Some(selections.layer_mut(0)?) },
        input,
    )?;
    let output = StepOutput { out: out.view_mut(), lse: None };
    ts.attend(batch, pool.view(), input.q, Over::Selected, output)
}

fn left(ts: &TokenSelect, pool: &Pool, out: &Tensor, rows: usize) -> Left {
    let lists = (0..rows).map(|row| ts.workspace().selected(row).unwrap()).collect();
    (lists, values(out), common::bits(&pool.k))
}

/// The same steps with tables from the host, with tables on the device, and recorded once and repeated with other tables.
fn steps_agree(device: &Device, page_size: usize, slots: bool, shuffles: bool) {
    let config = config();
    let lengths: [&[(usize, usize)]; 3] = [
        &[(40, 1), (0, 0), (90, 1), (7, 1), (33, 0)],
        &[(41, 1), (0, 0), (60, 1), (130, 1), (1, 0)],
        &[(42, 1), (0, 0), (61, 1), (9, 1), (0, 0)],
    ];
    let (max_pages, width) = (300usize.div_ceil(page_size) + 8, 140usize.div_ceil(page_size) + 1);
    let width = if slots { width * page_size } else { width };
    let limits = Limits { max_rows: 5, max_block_len: 1, max_kv_tokens: max_pages * page_size };
    let mut random = Random(page_size as u64);
    let sequences = ints(device, &[4, 1, 0, 3, 2], &[5]);
    let make = || TokenSelect::new(device, config.clone(), limits).unwrap();
    let (mut of_host, mut of_device, mut recorded) = (make(), make(), make());
    let cache = || SelectionCache::new(device, &config, 1, 5).unwrap();
    let mut caches = [cache(), cache(), cache()];
    let mut graph = None;
    let problems = lengths.map(|lengths| Problem::new(&config, lengths, Content::Peaked, 5));
    // One pool for all steps, so that addresses stay.
    let largest =
        problems.iter().map(|p| p.rows.iter().map(|row: &Row| row.n.div_ceil(page_size)).sum::<usize>());
    let num_pages = largest.max().unwrap() + 4;
    let heads = config.heads;
    let zeros = |shape: [usize; 4]| Tensor::zeros_on(device, DType::Bf16, shape).unwrap();
    let shape = [num_pages, page_size, heads.num_kv_heads, heads.head_dim];
    let mut fixed = (zeros(shape), zeros(shape));
    let inputs: Vec<Inputs> = problems.iter().map(|problem| Inputs::new(problem).to(device)).collect();
    let mut kept = Inputs::new(&problems[0]).to(device);
    let mut slot: Option<(BatchSlot, BatchSlot, Given)> = None;
    let (mut out, _) = outputs_on(device, &problems[0], DType::F32);
    for (i, problem) in problems.iter().enumerate() {
        let seed = 7 + i as u64;
        let mut pools = [0, 1].map(|_| Pool::before_block(problem, page_size, Storage::Nhd, seed).to(device));
        let host = pools[0].batch(problem).with_sequence_indices(vec![4, 1, 0, 3, 2]).unwrap();
        let engine = Engine::new(&host, width, slots, shuffles, &mut random);
        let given = engine.on(device);
        let pool_pages = pools[0].view().shape().num_pages;
        let input = inputs[i].step();
        step(&mut of_host, &mut pools[0], &host, input, &mut caches[0], &mut out).unwrap();
        let want = left(&of_host, &pools[0], &out, 5);

        let (once, again, fixed_given) = slot.get_or_insert_with(|| {
            let slot = || BatchSlot::new(device, &host, max_pages).unwrap();
            (slot(), slot(), engine.on(device))
        });
        let batch = once.translate(&given.tables(slots, &sequences, pool_pages)).unwrap();
        step(&mut of_device, &mut pools[1], &batch, input, &mut caches[1], &mut out).unwrap();
        assert!(
            left(&of_device, &pools[1], &out, 5) == want,
            "{}: step {i} with tables on the device",
            device.name()
        );
        assert_eq!(once.faults(), Ok(0));

        // The same memory, filled anew, for recorded work.
        let fresh = Pool::before_block(problem, page_size, Storage::Nhd, seed).to(device);
        for (to, from) in [(&mut fixed.0, &fresh.k), (&mut fixed.1, &fresh.v)] {
            let len = from.shape().checked_len().unwrap();
            let part = from.to_vec::<half::bf16>().unwrap();
            let mut all = to.to_vec::<half::bf16>().unwrap();
            all[..len].copy_from_slice(&part);
            let whole = Tensor::from_vec(all, shape).unwrap();
            to.copy_from(whole.view()).unwrap();
        }
        fixed_given.copy_from(&engine);
        for (to, from) in
            [(&mut kept.q, &inputs[i].q), (&mut kept.k, &inputs[i].k), (&mut kept.v, &inputs[i].v)]
        {
            to.copy_from(from.view()).unwrap();
        }
        if graph.is_none() {
            // Kernels are loaded; nothing else need be done before.
            let recording = device.capture(|| {
                let tables = fixed_given.tables(slots, &sequences, num_pages);
                let batch = again.translate(&tables)?;
                let pages = tokenselect::KvViewMut::new(
                    fixed.0.view_mut(),
                    fixed.1.view_mut(),
                    tokenselect::KvLayout::Nhd,
                )?;
                recorded.append_select(
                    &batch,
                    LayerMut { kv: pages, selections: Some(caches[2].layer_mut(0)?) },
                    kept.step(),
                )?;
                let kv =
                    tokenselect::KvView::new(fixed.0.view(), fixed.1.view(), tokenselect::KvLayout::Nhd)?;
                let output = StepOutput { out: out.view_mut(), lse: None };
                recorded.attend(&batch, kv, kept.q.view(), Over::Selected, output)
            });
            graph = Some(recording.unwrap());
        }
        // SAFETY: everything that was recorded is alive.
        unsafe { graph.as_ref().unwrap().launch().unwrap() };
        let lists: Vec<_> = (0..5).map(|row| recorded.workspace().selected(row).unwrap()).collect();
        assert_eq!(lists, want.0, "{}: lists of recorded step {i}", device.name());
        assert_eq!(values(&out), want.1, "{}: output of recorded step {i}", device.name());
    }
}

on_devices! {
    gpus: steps_with_tables_on_the_device, tables_that_are_wrong, faults_are_counted, tables_of_other_integers,
        numbers_beyond_32_bits;
}

fn steps_with_tables_on_the_device(device: &Device) {
    steps_agree(device, 16, false, true);
    steps_agree(device, 16, true, true);
    steps_agree(device, 1, false, false);
    steps_agree(device, 7, true, false);
}

/// Wrong tables leave rows empty or name pages that are there; nothing is read or written out of bounds.
fn tables_that_are_wrong(device: &Device) {
    let config = config();
    let (mut random, mut done_rounds) = (Random(3), 0);
    for round in 0..12 {
        let (page_size, rows) = ([1, 4, 16][round % 3], 4);
        let num_pages = 1 + random.below(20);
        let max_pages = 1 + random.below(30);
        let like = PageTables { indptr: vec![0; rows + 1], indices: vec![], last_page_len: vec![0; rows] };
        let like = Batch::new(page_size, vec![0, 1, 1, 2, 3], like).unwrap();
        let like = like.with_sequence_indices(vec![0, 1, 2, 3]).unwrap();
        let mut slot = BatchSlot::new(device, &like, max_pages).unwrap();
        let limits = Limits { max_rows: 4, max_block_len: 1, max_kv_tokens: 30 * page_size };
        let mut ts = TokenSelect::new(device, config.clone(), limits).unwrap();
        let mut cache = SelectionCache::new(device, &config, 1, 4).unwrap();
        let heads = config.heads;
        let zeros = |shape: [usize; 4]| Tensor::zeros_on(device, DType::Bf16, shape).unwrap();
        let shape = [num_pages, page_size, heads.num_kv_heads, heads.head_dim];
        let (mut k, mut v) = (zeros(shape), zeros(shape));
        let mut any = |count: usize, limit: usize| -> Vec<u32> {
            let one = |random: &mut Random| match random.below(4) {
                0 => random.bits() as u32,
                1 => 0,
                _ => random.below(limit) as u32,
            };
            (0..count).map(|_| one(&mut random)).collect()
        };
        let width = 10;
        let given = Given {
            entries: ints(device, &any(6 * width, num_pages + 2), &[6, width]),
            rows: Some(ints(device, &any(rows, 7), &[rows])),
            lens: ints(device, &any(rows, 11 * page_size), &[rows]),
        };
        let sequences = ints(device, &any(rows, 6), &[rows]);
        let tables =
            TablesOnDevice { num_sequences: 4, ..given.tables(round % 2 == 0, &sequences, num_pages) };
        let batch = slot.translate(&tables).unwrap();
        let q = Tensor::zeros_on(device, DType::Bf16, [3, heads.num_qo_heads, heads.head_dim]).unwrap();
        let new = Tensor::zeros_on(device, DType::Bf16, [3, heads.num_kv_heads, heads.head_dim]).unwrap();
        let mut out = Tensor::zeros_on(device, DType::F32, q.shape()).unwrap();
        let input = StepInput { q: q.view(), k: new.view(), v: new.view() };
        let pages =
            tokenselect::KvViewMut::new(k.view_mut(), v.view_mut(), tokenselect::KvLayout::Nhd).unwrap();
        // Two rows may name one page or one sequence: who writes last is not said, and the emulator reports it.
        let done = ts.append_select(
            &batch,
            LayerMut { kv: pages, selections: Some(cache.layer_mut(0).unwrap()) },
            input,
        );
        if let Err(error) = done {
            let text = error.to_string();
            assert!(text.contains("Race]") || text.contains("[Overlap]"), "{text}");
            continue;
        }
        let kv = tokenselect::KvView::new(k.view(), v.view(), tokenselect::KvLayout::Nhd).unwrap();
        let output = StepOutput { out: out.view_mut(), lse: None };
        ts.attend(&batch, kv, q.view(), Over::Selected, output).unwrap();
        let output = StepOutput { out: out.view_mut(), lse: None };
        ts.attend(&batch, kv, q.view(), Over::All, output).unwrap();
        device.synchronize().unwrap();
        done_rounds += 1;
    }
    assert!(done_rounds > 2, "{done_rounds} rounds to the end on {}", device.name());
}

fn faults_are_counted(device: &Device) {
    let like = PageTables { indptr: vec![0; 4], indices: vec![], last_page_len: vec![0; 3] };
    let like = Batch::new(4, vec![0, 2, 3, 4], like).unwrap();
    let mut slot = BatchSlot::new(device, &like, 5).unwrap();
    let entries = ints(device, &[0, 1, 2, 9, 4, 5, 6, 7, 8], &[3, 3]);
    let mut faults = |lens: [u32; 3], num_pages: usize| {
        let kv_lens = ints(device, &lens, &[3]);
        let before = slot.faults().unwrap();
        let tables = TablesOnDevice {
            entries: entries.view(),
            slots: false,
            rows: None,
            kv_lens: kv_lens.view(),
            sequences: None,
            num_pages,
            num_sequences: 0,
        };
        slot.translate(&tables).unwrap();
        slot.faults().unwrap() - before
    };
    assert_eq!(faults([4, 8, 8], 10), 0);
    assert_eq!(faults([0, 0, 0], 10), 0);
    assert_eq!(faults([1, 8, 8], 10), 1, "a block of two in a row of one token");
    assert_eq!(faults([13, 4, 4], 10), 1, "more pages than entries");
    assert_eq!(faults([4, 4, 4], 8), 1, "page 9 of a pool of 8");
    assert_eq!(faults([8, 8, 8], 10), 3, "six pages where there is room for five: no row has tokens");
}

/// 64-bit integers on a device.
fn longs(device: &Device, values: &[u64]) -> Tensor {
    Tensor::from_slice_on(device, values, [values.len()]).unwrap()
}

/// Tables of 64-bit integers, and rows that are parts of longer ones, are those of 32 bits next to each other.
fn tables_of_other_integers(device: &Device) {
    let config = SelectConfig { selection_cache: None, ..config() };
    let problem = Problem::new(&config, &[(21, 1), (40, 1), (0, 0)], Content::Peaked, 5);
    let input = Inputs::new(&problem).to(device);
    for (page_size, slots) in [(4, false), (4, true), (1, false)] {
        let pool = Pool::full(&problem, page_size, Storage::Nhd, 3).to(device);
        let host = pool.batch(&problem);
        let num_pages = pool.view().shape().num_pages;
        let width = if slots { 41usize.next_multiple_of(page_size) } else { 41usize.div_ceil(page_size) };
        let engine = Engine::new(&host, width, slots, true, &mut Random(9));
        let narrow = engine.on(device);
        let wide =
            |numbers: &[u32]| longs(device, &numbers.iter().map(|&n| u64::from(n)).collect::<Vec<_>>());
        let (rows, lens) = (wide(engine.rows.as_ref().unwrap()), wide(&engine.lens));
        // Each row behind three numbers that belong to none, and five behind it.
        let (first, stride, table_rows) = (3, width + 8, engine.entries.len() / width);
        let mut gaps = vec![u32::MAX; table_rows * stride];
        for (to, from) in gaps.chunks_mut(stride).zip(engine.entries.chunks(width)) {
            to[first..first + width].copy_from_slice(from);
        }
        let (short_gaps, long_gaps) = (ints(device, &gaps, &[gaps.len()]), wide(&gaps));
        let part = |table: &Tensor, dtype: DType| {
            let addr = table.view().device_addr().unwrap() + (first * dtype.size()) as u64;
            // SAFETY: within the table, which lives longer than what reads it.
            unsafe {
                TensorView::strided_from_device_addr(
                    device,
                    addr,
                    dtype,
                    [table_rows, 1, width],
                    [stride, width],
                )
            }
            .unwrap()
        };
        let right = TablesOnDevice {
            entries: narrow.entries.view(),
            slots,
            rows: narrow.rows.as_ref().map(Tensor::view),
            kv_lens: narrow.lens.view(),
            sequences: None,
            num_pages,
            num_sequences: 0,
        };
        let limits = Limits { max_rows: 3, max_block_len: 1, max_kv_tokens: 80 * page_size };
        let ts = TokenSelect::new(device, config.clone(), limits).unwrap();
        let attend = |tables: TablesOnDevice<'_>| {
            let mut slot = BatchSlot::new(device, &host, 80).unwrap();
            let batch = slot.translate(&tables).unwrap();
            let (mut out, _) = outputs_on(device, &problem, DType::F32);
            let output = StepOutput { out: out.view_mut(), lse: None };
            ts.attend(&batch, pool.view(), input.q.view(), Over::All, output).unwrap();
            (values(&out), slot.faults().unwrap())
        };
        let want = attend(right);
        assert!(want.0.iter().any(|&x| x != 0.0) && want.1 == 0, "the tables say nothing");
        for (name, tables) in [
            ("lengths", TablesOnDevice { kv_lens: lens.view(), ..right }),
            ("rows", TablesOnDevice { rows: Some(rows.view()), ..right }),
            ("strided", TablesOnDevice { entries: part(&short_gaps, DType::U32), ..right }),
            ("strided, 64 bits", TablesOnDevice { entries: part(&long_gaps, DType::U64), ..right }),
            (
                "all of 64 bits",
                TablesOnDevice {
                    entries: part(&long_gaps, DType::U64),
                    rows: Some(rows.view()),
                    kv_lens: lens.view(),
                    ..right
                },
            ),
        ] {
            assert!(attend(tables) == want, "{}: {name}, pages of {page_size}, slots {slots}", device.name());
        }
    }
}

/// A number of 64 bits is not cut to the 32 that a table of the batch has.
fn numbers_beyond_32_bits(device: &Device) {
    let like = PageTables { indptr: vec![0; 3], indices: vec![], last_page_len: vec![0; 2] };
    let like = Batch::new(4, vec![0, 1, 2], like).unwrap().with_sequence_indices(vec![0, 1]).unwrap();
    let mut slot = BatchSlot::new(device, &like, 8).unwrap();
    let mut faults = |entries: [u64; 4], rows: [u64; 2], lens: [u64; 2], sequences: [u64; 2]| {
        let before = slot.faults().unwrap();
        let table = Tensor::from_slice_on(device, &entries, [2, 2]).unwrap();
        let [rows, lens, sequences] = [rows, lens, sequences].map(|numbers| longs(device, &numbers));
        let tables = TablesOnDevice {
            entries: table.view(),
            slots: false,
            rows: Some(rows.view()),
            kv_lens: lens.view(),
            sequences: Some(sequences.view()),
            num_pages: 4,
            num_sequences: 2,
        };
        slot.translate(&tables).unwrap();
        slot.faults().unwrap() - before
    };
    let (entries, rows, lens, sequences) = ([0, 1, 2, 3], [0, 1], [8, 8], [0, 1]);
    let minus_one = u64::MAX;
    assert_eq!(faults(entries, rows, lens, sequences), 0);
    for beyond in [1 << 32, (1 << 32) + 1, 1 << 63, minus_one] {
        assert_eq!(faults([0, beyond, 2, 3], rows, lens, sequences), 1, "page {beyond}");
        assert_eq!(faults(entries, [0, beyond], lens, sequences), 1, "row {beyond}");
        assert_eq!(faults(entries, rows, [8, beyond | 8], sequences), 1, "length {}", beyond | 8);
        let is_none = beyond == minus_one;
        assert_eq!(faults(entries, rows, lens, [0, beyond]), u32::from(!is_none), "sequence {beyond}");
    }
}

#[test]
fn wrong_arguments() {
    let device = Device::emulated();
    let like = PageTables { indptr: vec![0; 3], indices: vec![], last_page_len: vec![0; 2] };
    let like = Batch::new(4, vec![0, 1, 2], like).unwrap();
    let mut slot = BatchSlot::new(&device, &like, 5).unwrap();
    let (entries, lens) = (ints(&device, &[0; 6], &[2, 3]), ints(&device, &[4, 4], &[2]));
    let short = ints(&device, &[4], &[1]);
    let right = TablesOnDevice {
        entries: entries.view(),
        slots: false,
        rows: None,
        kv_lens: lens.view(),
        sequences: None,
        num_pages: 9,
        num_sequences: 0,
    };
    let mut says = |tables: TablesOnDevice<'_>, text: &str| {
        assert_eq!(slot.translate(&tables).unwrap_err().to_string(), text);
    };
    says(TablesOnDevice { kv_lens: short.view(), ..right }, "`kv_lens` must have shape [2], got [1]");
    says(TablesOnDevice { rows: Some(short.view()), ..right }, "`rows` must have shape [2], got [1]");
    let text = "argument `entries` must be two-dimensional, got [2]";
    says(TablesOnDevice { entries: lens.view(), ..right }, text);
    let floats = Tensor::zeros_on(&device, DType::F32, [2, 3]).unwrap();
    says(TablesOnDevice { entries: floats.view(), ..right }, "`entries` must be u32 or u64, got f32");
    let floats = Tensor::zeros_on(&device, DType::F32, [2]).unwrap();
    says(TablesOnDevice { kv_lens: floats.view(), ..right }, "`kv_lens` must be u32 or u64, got f32");
    let text = "batch: `sequences` must be left out, as in the slot's first batch, got given";
    says(TablesOnDevice { sequences: Some(lens.view()), ..right }, text);
    says(TablesOnDevice { num_pages: 0, ..right }, "argument `num_pages` must be at least 1, got 0");
    let host = Tensor::zeros(DType::U32, [2]).unwrap();
    says(TablesOnDevice { kv_lens: host.view(), ..right }, "`kv_lens` must be on a GPU, it is on cpu");

    let batch = slot.translate(&right).unwrap();
    let text = "`row` needs tables on the host";
    assert_eq!(batch.row(0).unwrap_err().to_string(), text);
    assert!(batch.clone().padded(3, 1).is_err() && batch.clone().with_sequence_indices(vec![0, 1]).is_err());
    assert!(slot.put(batch).is_err(), "a batch of the device's is in its slot already");
}
