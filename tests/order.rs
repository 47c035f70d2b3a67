//! Calls in the wrong order are errors, never results of another batch; what was recorded counts as done when it is done.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem};
use common::run::{Inputs, outputs_on, token_select};
use common::{bits, on_devices};
use tokenselect::{
    Batch, BatchSlot, Buffer, CacheConfig, DType, Device, Error, HeadShape, Limits, Over, PageTables,
    PagedKvCache, Positions, Rope, SelectConfig, SelectionCache, SelectionCacheConfig, StepInput, StepOutput,
    TablesOnDevice, Tensor, TokenSelect,
};

on_devices! {
    all: operations_follow_each_other, a_failed_call_leaves_what_was_selected, positions_are_those_of_the_cache,
        a_layer_that_missed_a_step_is_known, a_page_of_two_rows_is_not_written, selections_of_another_layer_are_refused,
        renamed_rows_are_no_cache_s_own, hostile_tables_do_no_harm, elements_in_two_places_are_refused, layers_of_a_cache_are_not_anyone_s;
    gpus: recorded_work_counts_when_it_is_done, recorded_layers_count_when_they_are_done,
        a_batch_that_was_replaced_is_refused, a_slot_keeps_what_was_recorded_with_it, a_recorded_translation_takes_the_slot_when_it_is_done, a_panic_ends_a_recording,
        another_thread_is_not_recorded, a_step_that_cannot_end_does_not_begin, a_cache_does_not_change_while_work_is_recorded,
        a_graph_asks_what_a_step_asks, a_refused_step_is_not_recorded, a_graph_keeps_the_tables_of_its_batches, a_failed_recording_leaves_no_limits,
        another_thread_s_failure_is_not_recorded, tables_of_another_device_are_refused, parts_in_a_slot_are_checked;
}

fn config() -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 },
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 3,
        top_k: 8,
        selection_cache: None,
        ..SelectConfig::default()
    }
}

/// Operations one by one over the views of an owned cache ask what a step asks.
fn layers_of_a_cache_are_not_anyone_s(device: &Device) {
    let config = config();
    let mut owner = Owner::new(device, &config, 2);
    let tensor =
        |tokens: usize, heads: usize| Tensor::zeros_on(device, DType::Bf16, [tokens, heads, 64]).unwrap();
    let append_select = |owner: &mut Owner, layer: usize, batch: &Batch| {
        let (q, kv) = (tensor(batch.num_query_tokens(), 4), tensor(batch.num_query_tokens(), 2));
        let input = StepInput { q: q.view(), k: kv.view(), v: kv.view() };
        owner.ts.append_select(batch, owner.cache.layer_mut(layer)?, input)
    };
    let append = |owner: &mut Owner, layer: usize, batch: &Batch, heads: usize| {
        let kv = tensor(batch.num_query_tokens(), heads);
        owner.ts.append(batch, owner.cache.layer_mut(layer)?.kv, kv.view(), kv.view())
    };
    let attend = |owner: &Owner, layer: usize, batch: &Batch| {
        let q = tensor(batch.num_query_tokens(), 4);
        let mut out = tensor(batch.num_query_tokens(), 4);
        let output = StepOutput { out: out.view_mut(), lse: None };
        owner.ts.attend(batch, owner.cache.layer(layer)?, q.view(), Over::All, output)
    };
    let (a, b) = (owner.cache.create().unwrap(), owner.cache.create().unwrap());
    let first = owner.cache.extend(&[(a, 20), (b, 5)]).unwrap();
    let missing = |written, needed| Err(Error::Unwritten { layer: 1, id: a, written, needed });
    for layer in 0..2 {
        append_select(&mut owner, layer, &first).unwrap();
    }
    // An append that failed, or was left out, has written nothing.
    let second = owner.cache.extend(&[(a, 1), (b, 1)]).unwrap();
    append_select(&mut owner, 0, &second).unwrap();
    assert!(matches!(append(&mut owner, 1, &second, 3), Err(Error::Shape { .. })));
    owner.cache.layer_mut(1).unwrap();
    assert_eq!((owner.cache.written_len(0, a), owner.cache.written_len(1, a)), (Ok(21), Ok(20)));
    attend(&owner, 0, &second).unwrap();
    assert_eq!(attend(&owner, 1, &second), missing(20, 21));
    let q = tensor(2, 4);
    let view = owner.cache.layer(1).unwrap();
    assert_eq!(owner.ts.select(&second, view, q.view(), None), missing(20, 21));
    owner.ts.pool(&second, q.view(), None).unwrap();
    assert_eq!(owner.ts.score(&second, owner.cache.layer(1).unwrap()), missing(20, 21));
    let third = owner.cache.extend(&[(a, 1)]).unwrap();
    append_select(&mut owner, 0, &third).unwrap();
    assert_eq!(append_select(&mut owner, 1, &third), missing(20, 21));
    assert_eq!(append(&mut owner, 1, &third, 2), missing(20, 21));
    append(&mut owner, 1, &second, 2).unwrap();
    append(&mut owner, 1, &third, 2).unwrap();
    attend(&owner, 1, &third).unwrap();
    // A copy of the view asks as well.
    let layer = owner.cache.layer_mut(1).unwrap();
    let mut kv = layer.kv;
    let new = tensor(1, 2);
    owner.ts.append(&third, kv.reborrow(), new.view(), new.view()).unwrap();
    let again = kv.as_view().unwrap();
    let q = tensor(1, 4);
    owner.ts.select(&third, again, q.view(), None).unwrap();
    // Batches that are out of date, and those of another cache.
    owner.cache.truncate(a, 21).unwrap();
    let stale =
        |result: Result<(), Error>| assert!(matches!(result, Err(Error::StaleBatch { .. })), "{result:?}");
    stale(append_select(&mut owner, 0, &third));
    stale(append(&mut owner, 0, &third, 2));
    stale(attend(&owner, 0, &third));
    owner.cache.free(b).unwrap();
    let unknown = Err(Error::UnknownSequence(b));
    assert_eq!(
        append_select(&mut owner, 0, &first),
        Err(Error::StaleBatch {
            row: 0,
            id: a,
            expected: 20,
            got: 21,
            change: tokenselect::SequenceChange::Truncated { to: 21 }
        })
    );
    let mut other = Owner::new(device, &config, 2);
    let c = other.cache.create().unwrap();
    assert_eq!(other.cache.len(a), Err(Error::UnknownSequence(a)), "a name of another cache");
    assert_eq!(owner.cache.truncate(b, 0), unknown);
    let foreign = other.cache.extend(&[(c, 3)]).unwrap();
    let result = append_select(&mut owner, 0, &foreign);
    assert!(matches!(result, Err(Error::Missing { op: "append_select", .. })), "{result:?}");
    let result = attend(&owner, 0, &foreign);
    assert!(matches!(result, Err(Error::Missing { op: "attend", .. })), "{result:?}");
    // Keys before RoPE are not those that native positions read.
    let reassigned = SelectConfig {
        positions: tokenselect::Positions::Reassigned(tokenselect::Rope::default()),
        ..config
    };
    let mut ts = TokenSelect::new(device, reassigned, Limits::default()).unwrap();
    let fresh = other.cache.layer(0).unwrap();
    let q = tensor(3, 4);
    let result = ts.select(&foreign, fresh, q.view(), None);
    assert!(matches!(result, Err(Error::Config { field: "positions", .. })), "{result:?}");
}

/// The error that a call in the wrong order gives.
#[track_caller]
fn early<T: std::fmt::Debug>(result: Result<T, Error>, wanted: (&str, &str)) {
    match result {
        Err(Error::Order { op, needs, .. }) => assert_eq!((op, needs), wanted),
        other => panic!("wanted {wanted:?}, got {other:?}"),
    }
}

fn operations_follow_each_other(device: &Device) {
    let problem = Problem::new(&config(), &[(60, 1), (40, 2)], Content::Peaked, 1);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 2).to(device);
    let (batch, other) = (pool.batch(&problem), pool.batch(&problem));
    let q = Inputs::new(&problem).to(device).q;
    let (mut out, _) = outputs_on(device, &problem, DType::F32);
    let mut ts = token_select(device, &problem, &batch);
    let mut attend = |ts: &TokenSelect, batch: &Batch| {
        ts.attend(batch, pool.view(), q.view(), Over::Selected, StepOutput { out: out.view_mut(), lse: None })
    };
    early(ts.score(&batch, pool.view()), ("score", "pool"));
    early(ts.vote(&batch), ("vote", "pool"));
    early(ts.top_k(&batch, None), ("top_k", "pool"));
    early(attend(&ts, &batch), ("attend", "top_k"));
    early(ts.provide(Buffer::Votes, &batch), ("provide", "pool"));
    ts.pool(&batch, q.view(), None).unwrap();
    early(ts.vote(&batch), ("vote", "score"));
    early(ts.top_k(&batch, None), ("top_k", "vote"));
    early(ts.vote_top_k(&batch, None), ("vote_top_k", "score"));
    early(ts.score(&other, pool.view()), ("score", "pool"));
    ts.score(&batch, pool.view()).unwrap();
    early(ts.top_k(&batch, None), ("top_k", "vote"));
    early(ts.vote(&other), ("vote", "pool"));
    ts.vote(&batch).unwrap();
    ts.top_k(&batch, None).unwrap();
    attend(&ts, &batch).unwrap();
    early(attend(&ts, &other), ("attend", "top_k"));
    // A clone is the same batch; a batch with other sequences is another.
    attend(&ts, &batch.clone()).unwrap();
    early(attend(&ts, &batch.clone().with_sequence_indices(vec![0, 1]).unwrap()), ("attend", "top_k"));
    // Scoring anew drops the votes, not the lists.
    ts.pool(&batch, q.view(), None).unwrap();
    early(ts.vote(&batch), ("vote", "score"));
    attend(&ts, &batch).unwrap();
    ts.select(&other, pool.view(), q.view(), None).unwrap();
    early(attend(&ts, &batch), ("attend", "top_k"));
    attend(&ts, &other).unwrap();
    // Votes of one's own take the place of `score` and `vote`.
    ts.pool(&batch, q.view(), None).unwrap();
    ts.provide(Buffer::Votes, &batch).unwrap();
    ts.top_k(&batch, None).unwrap();
    attend(&ts, &batch).unwrap();
}

fn a_failed_call_leaves_what_was_selected(device: &Device) {
    let problem = Problem::new(&config(), &[(60, 1)], Content::Peaked, 1);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 2).to(device);
    let (batch, other) = (pool.batch(&problem), pool.batch(&problem));
    let q = Inputs::new(&problem).to(device).q;
    let (mut out, _) = outputs_on(device, &problem, DType::F32);
    let mut ts = token_select(device, &problem, &batch);
    ts.select(&batch, pool.view(), q.view(), None).unwrap();
    let short = Tensor::zeros_on(device, DType::Bf16, [1, 4, 32]).unwrap();
    assert!(ts.select(&other, pool.view(), short.view(), None).is_err());
    let output = StepOutput { out: out.view_mut(), lse: None };
    ts.attend(&batch, pool.view(), q.view(), Over::Selected, output).unwrap();
}

fn positions_are_those_of_the_cache(device: &Device) {
    let native = config();
    let reassigned = SelectConfig { positions: Positions::Reassigned(Rope::default()), ..config() };
    for (of_cache, other, text) in [
        (&native, &reassigned, "native, as those of the cache, got reassigned"),
        (&reassigned, &native, "reassigned, as those of the cache, got native"),
    ] {
        let mut owner = Owner::new(device, of_cache, 1);
        owner.ts = TokenSelect::new(device, other.clone(), Limits::default()).unwrap();
        let id = owner.cache.create().unwrap();
        let batch = owner.cache.extend(&[(id, 1)]).unwrap();
        let error = owner.step(0, &batch).unwrap_err().to_string();
        assert_eq!(error, format!("configuration field `positions` must be {text}"));
        assert_eq!(owner.cache.written_len(0, id), Ok(0));
    }
}

/// An owned cache and what a step of it needs.
struct Owner {
    cache: PagedKvCache,
    ts: TokenSelect,
}

impl Owner {
    fn new(device: &Device, config: &SelectConfig, num_layers: usize) -> Self {
        let pages = CacheConfig { num_layers, num_pages: 16, page_size: 16, ..CacheConfig::default() };
        Owner {
            cache: PagedKvCache::new(device, config, &pages).unwrap(),
            ts: TokenSelect::new(device, config.clone(), Limits { max_rows: 2, ..Limits::default() })
                .unwrap(),
        }
    }

    /// A step of one layer with zeros.
    fn step(&mut self, layer: usize, batch: &Batch) -> Result<(), Error> {
        let (device, heads) = (self.ts.device().clone(), self.ts.config().heads);
        let tokens = batch.num_query_tokens();
        let zeros =
            |heads: usize, dim: usize| Tensor::zeros_on(&device, DType::Bf16, [tokens, heads, dim]).unwrap();
        let (q, kv) = (zeros(heads.num_qo_heads, heads.head_dim), zeros(heads.num_kv_heads, heads.head_dim));
        let mut out = Tensor::zeros_on(&device, DType::F32, q.shape()).unwrap();
        let input = StepInput { q: q.view(), k: kv.view(), v: kv.view() };
        let output = StepOutput { out: out.view_mut(), lse: None };
        self.ts.step(&mut self.cache, layer, batch, input, output)
    }
}

fn a_layer_that_missed_a_step_is_known(device: &Device) {
    let mut owner = Owner::new(device, &config(), 3);
    let (a, b) = (owner.cache.create().unwrap(), owner.cache.create().unwrap());
    let first = owner.cache.extend(&[(a, 20), (b, 5)]).unwrap();
    (0..3).for_each(|layer| owner.step(layer, &first).unwrap());
    let second = owner.cache.extend(&[(b, 0), (a, 1)]).unwrap();
    owner.step(0, &second).unwrap();
    owner.step(2, &second).unwrap(); // layer 1 was forgotten
    assert_eq!(
        (0..3).map(|layer| owner.cache.written_len(layer, a).unwrap()).collect::<Vec<_>>(),
        [21, 20, 21]
    );
    let third = owner.cache.extend(&[(a, 2), (b, 1)]).unwrap();
    owner.step(0, &third).unwrap();
    let error = owner.step(1, &third).unwrap_err();
    assert_eq!(error, Error::Unwritten { layer: 1, id: a, written: 20, needed: 21 });
    assert_eq!(owner.cache.written_len(1, b), Ok(5), "nothing was written");
    // One way back: the step that was missed.
    owner.step(1, &second).unwrap();
    owner.step(1, &third).unwrap();
    owner.step(2, &third).unwrap();
    // Doing a step twice writes the same again.
    owner.step(2, &third).unwrap();
    assert_eq!(owner.cache.written_len(2, a), Ok(23));
    // The other way: back to what all layers have.
    let fourth = owner.cache.extend(&[(a, 4)]).unwrap();
    owner.step(0, &fourth).unwrap();
    let shortest = (0..3).map(|layer| owner.cache.written_len(layer, a).unwrap()).min().unwrap();
    owner.cache.truncate(a, shortest).unwrap();
    let again = owner.cache.extend(&[(a, 4)]).unwrap();
    (0..3).for_each(|layer| owner.step(layer, &again).unwrap());
    // A fork has what its parent has; a new sequence in an old one's place nothing.
    let next = owner.cache.extend(&[(a, 1)]).unwrap();
    owner.step(0, &next).unwrap();
    let child = owner.cache.fork(a).unwrap();
    assert_eq!((owner.cache.written_len(0, child), owner.cache.written_len(1, child)), (Ok(28), Ok(27)));
    owner.cache.free(child).unwrap();
    let fresh = owner.cache.create().unwrap();
    assert_eq!((fresh.index(), owner.cache.written_len(0, fresh)), (child.index(), Ok(0)));
    assert_eq!(owner.cache.written_len(0, child), Err(Error::UnknownSequence(child)));
    // Taking a layer's memory writes nothing; who writes by other means says so.
    owner.cache.layer_mut(1).unwrap();
    assert_eq!(owner.cache.written_len(1, a), Ok(27));
    owner.cache.mark_written(1).unwrap();
    assert_eq!(owner.cache.written_len(1, a), Ok(28));
}

fn a_page_of_two_rows_is_not_written(device: &Device) {
    let config = config();
    let limits = Limits { max_rows: 2, ..Limits::default() };
    let ts = TokenSelect::new(device, config.clone(), limits).unwrap();
    let zeros = |shape: [usize; 4]| Tensor::zeros_on(device, DType::Bf16, shape).unwrap();
    let (mut k, mut v) = (zeros([4, 16, 2, 64]), zeros([4, 16, 2, 64]));
    let new = Tensor::zeros_on(device, DType::Bf16, [2, 2, 64]).unwrap();
    let mut append = |indices: Vec<u32>, last_page_len: Vec<u32>| {
        let tables = PageTables { indptr: vec![0, 2, 4], indices, last_page_len };
        let batch = Batch::new(16, vec![0, 1, 2], tables)?;
        let pages = tokenselect::KvViewMut::new(k.view_mut(), v.view_mut(), tokenselect::KvLayout::Nhd)?;
        ts.append(&batch, pages, new.view(), new.view())
    };
    append(vec![0, 1, 0, 2], vec![3, 3]).unwrap(); // a shared prefix is read alone
    for (indices, row) in [(vec![0, 1, 0, 1], 1), (vec![0, 1, 1, 2], 0), (vec![1, 1, 0, 2], 0)] {
        let page = 1;
        match append(indices, vec![3, 3]) {
            Err(Error::Table { row: Some(at), what: "indices", got, .. }) => {
                assert_eq!((at, got), (row, page.to_string()))
            }
            other => panic!("accepted: {other:?}"),
        }
    }
}

/// A slot, recorded work over it, and what that needs.
struct Recorded {
    problem: Problem,
    pool: Pool,
    q: Tensor,
    out: Tensor,
    ts: TokenSelect,
    slot: BatchSlot,
}

impl Recorded {
    fn new(device: &Device) -> Self {
        let problem = Problem::new(&config(), &[(60, 1), (33, 1)], Content::Peaked, 1);
        let pool = Pool::full(&problem, 16, Storage::Nhd, 2).to(device);
        let batch = pool.batch(&problem);
        Recorded {
            q: Inputs::new(&problem).to(device).q,
            out: outputs_on(device, &problem, DType::F32).0,
            ts: TokenSelect::new(device, config(), limits(&batch)).unwrap(),
            slot: BatchSlot::new(device, &batch, 40).unwrap(),
            problem,
            pool,
        }
    }

    fn batch(&self) -> Batch {
        self.pool.batch(&self.problem)
    }

    fn select(&mut self, batch: &Batch) -> Result<(), Error> {
        self.ts.select(batch, self.pool.view(), self.q.view(), None)
    }

    fn attend(&mut self, batch: &Batch) -> Result<(), Error> {
        let output = StepOutput { out: self.out.view_mut(), lse: None };
        self.ts.attend(batch, self.pool.view(), self.q.view(), Over::Selected, output)
    }
}

fn recorded_work_counts_when_it_is_done(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let first = r.slot.put(fresh).unwrap();
    let graph = device.capture(|| r.select(&first).and_then(|()| r.attend(&first))).unwrap();
    early(r.attend(&first), ("attend", "top_k")); // nothing was done yet
    // SAFETY: all that was recorded is alive.
    unsafe { graph.launch().unwrap() };
    r.attend(&first).unwrap();
    let fresh = r.batch();
    let second = r.slot.put(fresh).unwrap();
    early(r.attend(&second), ("attend", "top_k"));
    // SAFETY: as above.
    unsafe { graph.launch().unwrap() };
    r.attend(&second).unwrap();
    // A recording that fails leaves things as they were.
    let fresh = r.batch();
    assert!(device.capture(|| r.select(&second).and_then(|()| r.attend(&fresh))).is_err());
    r.attend(&second).unwrap();
}

fn recorded_layers_count_when_they_are_done(device: &Device) {
    let mut owner = Owner::new(device, &config(), 1);
    let heads = config().heads;
    let zeros = |heads: usize, dim: usize| Tensor::zeros_on(device, DType::Bf16, [1, heads, dim]).unwrap();
    let (q, kv) = (zeros(heads.num_qo_heads, heads.head_dim), zeros(heads.num_kv_heads, heads.head_dim));
    let mut out = Tensor::zeros_on(device, DType::F32, q.shape()).unwrap();
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 1)]).unwrap();
    let mut slot = BatchSlot::new(device, &batch, 16).unwrap();
    let batch = slot.put(batch).unwrap();
    let Owner { cache, ts } = &mut owner;
    let graph = device.capture(|| {
        let input = StepInput { q: q.view(), k: kv.view(), v: kv.view() };
        ts.step(cache, 0, &batch, input, StepOutput { out: out.view_mut(), lse: None })
    });
    let graph = graph.unwrap();
    assert_eq!(cache.written_len(0, id), Ok(0));
    for len in 1..5 {
        // SAFETY: all that was recorded is alive.
        unsafe { graph.launch().unwrap() };
        assert_eq!(cache.written_len(0, id), Ok(len));
        let next = cache.extend(&[(id, 1)]).unwrap();
        slot.put(next).unwrap();
    }
    // A step that the graph missed is missed.
    let next = cache.extend(&[(id, 1)]).unwrap();
    slot.put(next).unwrap();
    // SAFETY: as above.
    let error = unsafe { graph.launch().unwrap_err() };
    assert_eq!(error, Error::Unwritten { layer: 0, id, written: 4, needed: 5 });
    assert_eq!(cache.written_len(0, id), Ok(4), "nothing was done");
}

fn a_batch_that_was_replaced_is_refused(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let first = r.slot.put(fresh).unwrap();
    r.select(&first).unwrap();
    let fresh = r.batch();
    r.slot.put(fresh).unwrap();
    let text = "`batch` needs its slot, in which another batch was put since";
    assert_eq!(r.select(&first).unwrap_err().to_string(), text);
    assert_eq!(r.attend(&first).unwrap_err().to_string(), text);
}

/// What a direct call would refuse is refused where it would be found too late.
fn a_slot_keeps_what_was_recorded_with_it(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let num_pages = r.pool.view().shape().num_pages;
    let bound = r.slot.put(fresh).unwrap();
    device.capture(|| r.select(&bound)).unwrap();
    let batch = |pages: Vec<u32>| {
        let count = pages.len() as u32;
        let tables =
            PageTables { indptr: vec![0, count - 1, count], indices: pages, last_page_len: vec![16, 16] };
        Batch::new(16, vec![0, 1, 2], tables).unwrap()
    };
    let too_many = batch(vec![0; 20]);
    let text = "`max_kv_tokens` is limited to 112, the batch needs 320: make the limit larger, or the batch smaller (after an `extend`, \
                `truncate` takes it back)";
    assert_eq!(r.ts.plan().limits().max_kv_tokens, 112);
    assert_eq!(r.select(&too_many).unwrap_err().to_string(), text);
    assert_eq!(r.slot.put(too_many).unwrap_err().to_string(), text);
    let beyond = batch(vec![0, num_pages as u32]);
    let text = format!("`page` must be below {num_pages}, got {num_pages}");
    assert_eq!(r.select(&beyond).unwrap_err().to_string(), text);
    assert_eq!(r.slot.put(beyond).unwrap_err().to_string(), text);
    r.slot.put(batch(vec![1, 0])).unwrap();
    let huge = BatchSlot::new(device, &bound, usize::MAX / 4).unwrap_err();
    assert!(matches!(huge, Error::Limit { what: "pages of a slot", .. }), "{huge}");
}

fn a_recorded_translation_takes_the_slot_when_it_is_done(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let first = r.slot.put(fresh).unwrap();
    r.select(&first).unwrap();
    let entries = Tensor::from_slice_on(device, &[0u32, 1, 2, 3, 0, 1], [2, 3]).unwrap();
    let lens = Tensor::from_slice_on(device, &[20u32, 40], [2]).unwrap();
    let tables = TablesOnDevice {
        entries: entries.view(),
        slots: false,
        rows: None,
        kv_lens: lens.view(),
        sequences: None,
        num_pages: r.pool.view().shape().num_pages,
        num_sequences: 0,
    };
    let mut slot = BatchSlot::new(device, &r.batch(), 40).unwrap();
    let fresh = r.batch();
    let bound = slot.put(fresh).unwrap();
    let mut translated = None;
    let graph = device.capture(|| {
        let batch = slot.translate(&tables)?;
        r.select(&batch)?;
        translated = Some(batch);
        Ok(())
    });
    let (graph, translated) = (graph.unwrap(), translated.unwrap());
    r.select(&bound).unwrap(); // still there
    assert!(r.select(&translated).is_err(), "not yet there");
    // SAFETY: all that was recorded is alive.
    unsafe { graph.launch().unwrap() };
    assert!(r.select(&bound).is_err(), "replaced");
    r.attend(&translated).unwrap();
    // A translation that is refused leaves the slot as it was.
    let wrong = TablesOnDevice { num_pages: 0, ..tables };
    slot.translate(&wrong).unwrap_err();
    r.select(&translated).unwrap();
}

fn a_panic_ends_a_recording(device: &Device) {
    let tensor = Tensor::zeros_on(device, DType::F32, [4]).unwrap();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        device.capture(|| panic!("in the middle of it")).map(drop).unwrap();
    }));
    assert!(panicked.is_err());
    assert_eq!(bits(&tensor), [0; 4], "the device does its work again");
    device.synchronize().unwrap();
}

fn another_thread_is_not_recorded(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let bound = r.slot.put(fresh).unwrap();
    r.select(&bound).unwrap();
    let graph = device.capture(|| {
        let other = std::thread::scope(|scope| scope.spawn(|| r.select(&bound)).join().unwrap());
        let error = other.unwrap_err().to_string();
        assert!(error.ends_with("needs the device, which records the work of another thread"), "{error}");
        Ok(())
    });
    graph.unwrap();
    r.select(&bound).unwrap();
}

/// Attention's arguments are looked at before keys are appended.
fn a_step_that_cannot_end_does_not_begin(device: &Device) {
    let mut owner = Owner::new(device, &config(), 1);
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 1)]).unwrap();
    let zeros = |heads: usize| Tensor::zeros_on(device, DType::Bf16, [1, heads, 64]).unwrap();
    let (q, kv) = (zeros(4), zeros(2));
    let input = StepInput { q: q.view(), k: kv.view(), v: kv.view() };
    let mut on_host = Tensor::zeros(DType::F32, [1, 4, 64]).unwrap();
    let output = StepOutput { out: on_host.view_mut(), lse: None };
    let error = owner.ts.step(&mut owner.cache, 0, &batch, input, output).unwrap_err().to_string();
    assert_eq!(error, "`out` must be on a GPU, it is on cpu");
    let room = Tensor::zeros_on(device, DType::F32, [300]).unwrap();
    let addr = room.view().device_addr().unwrap() + 4;
    // SAFETY: within `room`, which nothing else uses.
    let odd = unsafe { tokenselect::TensorViewMut::from_device_addr(device, addr, DType::F32, [1, 4, 64]) };
    let output = StepOutput { out: odd.unwrap(), lse: None };
    let error = owner.ts.step(&mut owner.cache, 0, &batch, input, output).unwrap_err().to_string();
    assert_eq!(error, format!("argument `out` must be at an address divisible by 16, got {addr}"));
    assert_eq!(owner.cache.written_len(0, id), Ok(0));
}

/// A cache, a graph of its step, and the slot that this reads.
struct Graphed {
    owner: Owner,
    slot: BatchSlot,
    graph: tokenselect::Graph,
    id: tokenselect::SequenceId,
    _tensors: Vec<Tensor>,
}

impl Graphed {
    fn new(device: &Device) -> Self {
        let mut owner = Owner::new(device, &config(), 1);
        let zeros = |heads: usize| Tensor::zeros_on(device, DType::Bf16, [1, heads, 64]).unwrap();
        let (q, kv) = (zeros(4), zeros(2));
        let mut out = Tensor::zeros_on(device, DType::F32, q.shape()).unwrap();
        let id = owner.cache.create().unwrap();
        let batch = owner.cache.extend(&[(id, 1)]).unwrap();
        let mut slot = BatchSlot::new(device, &batch, 16).unwrap();
        let batch = slot.put(batch).unwrap();
        let Owner { cache, ts } = &mut owner;
        let mut step = || {
            let input = StepInput { q: q.view(), k: kv.view(), v: kv.view() };
            ts.step(cache, 0, &batch, input, StepOutput { out: out.view_mut(), lse: None })
        };
        step().unwrap();
        let graph = device.capture(step).unwrap();
        Graphed { owner, slot, graph, id, _tensors: vec![q, kv, out] }
    }

    fn put(&mut self, batch: Batch) -> Result<(), Error> {
        self.slot.put(batch)?;
        // SAFETY: all that was recorded is alive.
        unsafe { self.graph.launch() }
    }
}

fn a_graph_asks_what_a_step_asks(device: &Device) {
    let mut g = Graphed::new(device);
    let next = g.owner.cache.extend(&[(g.id, 1)]).unwrap();
    g.put(next).unwrap();
    // Another cache's batch, an engine's, and one that was truncated since.
    let mut other = Owner::new(device, &config(), 1);
    let id = other.cache.create().unwrap();
    let foreign = other.cache.extend(&[(id, 1)]).unwrap();
    assert!(matches!(g.put(foreign), Err(Error::Missing { .. })));
    let tables = PageTables { indptr: vec![0, 1], indices: vec![0], last_page_len: vec![1] };
    let engine = Batch::new(16, vec![0, 1], tables).unwrap().with_sequence_indices(vec![0]).unwrap();
    assert!(matches!(g.put(engine), Err(Error::Missing { .. })));
    let stale = g.owner.cache.extend(&[(g.id, 1)]).unwrap();
    g.owner.cache.truncate(g.id, 1).unwrap();
    assert!(matches!(g.put(stale), Err(Error::StaleBatch { .. })));
    let next = g.owner.cache.extend(&[(g.id, 1)]).unwrap();
    g.put(next).unwrap();
    // The sequence has gone; its pages are another one's.
    g.owner.cache.free(g.id).unwrap();
    let fresh = g.owner.cache.create().unwrap();
    let batch = g.owner.cache.extend(&[(fresh, 5)]).unwrap();
    g.owner.step(0, &batch).unwrap();
    // SAFETY: as in `put`.
    let error = unsafe { g.graph.launch().unwrap_err() };
    assert_eq!(error, Error::UnknownSequence(g.id));
    assert_eq!(g.owner.cache.written_len(0, fresh), Ok(5));
}

/// A step that is refused while work is recorded does not count as recorded: what reads behind it finds no block.
fn a_refused_step_is_not_recorded(device: &Device) {
    let mut owner = Owner::new(device, &config(), 1);
    let zeros = |heads: usize| Tensor::zeros_on(device, DType::Bf16, [1, heads, 64]).unwrap();
    let (q, kv) = (zeros(4), zeros(2));
    let mut out = Tensor::zeros_on(device, DType::F32, q.shape()).unwrap();
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 1)]).unwrap();
    let mut slot = BatchSlot::new(device, &batch, 16).unwrap();
    let batch = slot.put(batch).unwrap();
    owner.step(0, &batch).unwrap();
    let graph = device.capture(|| {
        let (ts, cache) = (&mut owner.ts, &mut owner.cache);
        let wrong = StepInput { q: q.view(), k: q.view(), v: kv.view() };
        let refused = ts.step(cache, 0, &batch, wrong, StepOutput { out: out.view_mut(), lse: None });
        assert!(matches!(refused, Err(Error::Shape { what: "k", .. })), "{refused:?}");
        let output = StepOutput { out: out.view_mut(), lse: None };
        ts.attend(&batch, cache.layer(0)?, q.view(), Over::All, output)
    });
    let graph = graph.unwrap();
    // SAFETY: all that was recorded is alive.
    unsafe { graph.launch().unwrap() };
    slot.put(owner.cache.extend(&[(id, 1)]).unwrap()).unwrap();
    // SAFETY: as above.
    let error = unsafe { graph.launch().unwrap_err() };
    assert_eq!(error, Error::Unwritten { layer: 0, id, written: 1, needed: 2 });
}

fn a_cache_does_not_change_while_work_is_recorded(device: &Device) {
    let mut owner = Owner::new(device, &config(), 1);
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 20)]).unwrap();
    owner.step(0, &batch).unwrap();
    let before = format!("{:?}", owner.cache.pages());
    let graph = device.capture(|| {
        let cache = &mut owner.cache;
        for refused in [
            cache.create().map(drop),
            cache.fork(id).map(drop),
            cache.extend(&[(id, 1)]).map(drop),
            cache.truncate(id, 3),
            cache.free(id),
        ] {
            assert!(matches!(refused, Err(Error::Missing { .. })));
        }
        // Nor by another thread.
        let other =
            std::thread::scope(|scope| scope.spawn(|| cache.extend(&[(id, 1)]).map(drop)).join().unwrap());
        assert!(matches!(other, Err(Error::Missing { .. })));
        Ok(())
    });
    drop(graph.unwrap());
    assert_eq!(format!("{:?}", owner.cache.pages()), before);
    assert_eq!(owner.cache.written_len(0, id), Ok(20));
}

fn a_graph_keeps_the_tables_of_its_batches(device: &Device) {
    let mut r = Recorded::new(device);
    let batch = r.batch();
    r.select(&batch).unwrap();
    let graph = device.capture(|| r.select(&batch)).unwrap();
    drop(batch);
    // SAFETY: the context, its inputs and its pages are alive.
    unsafe { graph.launch().unwrap() };
    device.synchronize().unwrap();
}

fn a_failed_recording_leaves_no_limits(device: &Device) {
    let mut r = Recorded::new(device);
    let fresh = r.batch();
    let bound = r.slot.put(fresh).unwrap();
    let short = Tensor::zeros_on(device, DType::Bf16, [2, 4, 32]).unwrap();
    assert!(device.capture(|| r.ts.select(&bound, r.pool.view(), short.view(), None)).is_err());
    let count = 20;
    let tables = PageTables {
        indptr: vec![0, count - 1, count],
        indices: vec![0; count as usize],
        last_page_len: vec![16; 2],
    };
    r.slot.put(Batch::new(16, vec![0, 1, 2], tables).unwrap()).unwrap();
}

fn another_thread_s_failure_is_not_recorded(device: &Device) {
    let mut r = Recorded::new(device);
    let mut other = Recorded::new(device);
    let batch = other.batch();
    other.select(&batch).unwrap();
    let fresh = r.batch();
    let bound = r.slot.put(fresh).unwrap();
    r.select(&bound).unwrap();
    let graph = device.capture(|| {
        let failed = std::thread::scope(|scope| scope.spawn(|| other.select(&batch)).join().unwrap());
        assert!(failed.is_err());
        r.select(&bound)
    });
    other.select(&batch).unwrap();
    // SAFETY: all that was recorded is alive.
    unsafe { graph.unwrap().launch().unwrap() };
    other.attend(&batch).unwrap();
}

fn tables_of_another_device_are_refused(device: &Device) {
    let mut r = Recorded::new(device);
    let own = r.batch();
    r.select(&own).unwrap();
    let elsewhere = Device::emulated();
    let mut there = Recorded::new(&elsewhere);
    let foreign = there.batch();
    there.select(&foreign).unwrap();
    assert!(matches!(r.select(&foreign), Err(Error::WrongDevice { what: "batch", .. })));
    r.attend(&own).unwrap(); // which the refused call has not changed
    // Tables that a device alone has are none for the processor.
    let lens = Tensor::from_slice_on(device, &[20u32, 20], [2]).unwrap();
    let entries = Tensor::from_slice_on(device, &[0u32, 1, 0, 1], [2, 2]).unwrap();
    let tables = TablesOnDevice {
        entries: entries.view(),
        slots: false,
        rows: None,
        kv_lens: lens.view(),
        sequences: None,
        num_pages: 2,
        num_sequences: 0,
    };
    let batch = r.slot.translate(&tables).unwrap();
    let mut cpu = Recorded::new(&Device::emulated_random(1));
    assert!(cpu.select(&batch).is_err());
    let on_cpu =
        TokenSelect::new(&Device::cpu(), config(), Limits { max_rows: 2, ..Limits::default() }).unwrap();
    let host = Tensor::zeros(DType::Bf16, [2, 2, 64]).unwrap();
    let mut pages = [0, 1].map(|_| Tensor::zeros(DType::Bf16, [2, 16, 2, 64]).unwrap());
    let [k, v] = &mut pages;
    let kv = tokenselect::KvViewMut::new(k.view_mut(), v.view_mut(), tokenselect::KvLayout::Nhd).unwrap();
    assert!(on_cpu.append(&batch, kv, host.view(), host.view()).is_err());
}

fn parts_in_a_slot_are_checked(device: &Device) {
    let part = |candidates: std::ops::Range<u32>| {
        let tables = PageTables { indptr: vec![0, 13], indices: (0..13).collect(), last_page_len: vec![8] };
        Batch::partial(16, vec![0, 1], tables, vec![candidates]).unwrap()
    };
    let limits = Limits { max_block_len: 1, max_kv_tokens: 256, ..Limits::default() };
    let mut ts = TokenSelect::new(device, config(), limits).unwrap();
    let zeros = |shape: [usize; 4]| Tensor::zeros_on(device, DType::Bf16, shape).unwrap();
    let (k, v) = (zeros([13, 16, 2, 64]), zeros([13, 16, 2, 64]));
    let q = Tensor::zeros_on(device, DType::Bf16, [1, 4, 64]).unwrap();
    let mut slot = BatchSlot::new(device, &part(2..196), 16).unwrap();
    let batch = slot.put(part(2..196)).unwrap();
    let kv = tokenselect::KvView::new(k.view(), v.view(), tokenselect::KvLayout::Nhd).unwrap();
    device.capture(|| ts.select(&batch, kv, q.view(), None)).unwrap();
    let direct = ts.select(&part(0..0), kv, q.view(), None).unwrap_err();
    assert_eq!(slot.put(part(0..0)).unwrap_err(), direct);
}

/// Cached selections that decided for one layer are no other layer's.
fn selections_of_another_layer_are_refused(device: &Device) {
    let cached = SelectConfig {
        selection_cache: Some(SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: Some(9) }),
        ..config()
    };
    let problem = Problem::new(&cached, &[(60, 1)], Content::Peaked, 1);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 2).to(device);
    let batch = pool.batch(&problem).with_sequence_indices(vec![0]).unwrap();
    let q = Inputs::new(&problem).to(device).q;
    let mut ts = TokenSelect::new(device, cached.clone(), limits(&batch)).unwrap();
    let mut layers = SelectionCache::new(device, &cached, 2, 1).unwrap();
    ts.select(&batch, pool.view(), q.view(), Some(layers.layer_mut(0).unwrap())).unwrap();
    ts.pool(&batch, q.view(), Some(layers.layer_mut(0).unwrap())).unwrap();
    ts.score(&batch, pool.view()).unwrap();
    let text = "`vote_top_k` needs the cached selections that `pool` was given";
    let error = ts.vote_top_k(&batch, Some(layers.layer_mut(1).unwrap())).unwrap_err();
    assert_eq!(error.to_string(), text);
    assert_eq!(ts.vote_top_k(&batch, None).unwrap_err().to_string(), text);
    ts.vote_top_k(&batch, Some(layers.layer_mut(0).unwrap())).unwrap();
}

fn renamed_rows_are_no_cache_s_own(device: &Device) {
    let mut owner = Owner::new(device, &config(), 1);
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 1)]).unwrap().with_sequence_indices(vec![3]).unwrap();
    assert!(matches!(owner.step(0, &batch), Err(Error::Missing { .. })));
}

/// Tables of cached selections that a caller may have filled with anything.
fn hostile_tables_do_no_harm(device: &Device) {
    let cached = SelectConfig {
        selection_cache: Some(SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: Some(9) }),
        ..config()
    };
    let mut owner = Owner::new(device, &cached, 1);
    let id = owner.cache.create().unwrap();
    let batch = owner.cache.extend(&[(id, 60)]).unwrap();
    owner.step(0, &batch).unwrap();
    let next = owner.cache.extend(&[(id, 1)]).unwrap();
    {
        let layer = owner.cache.layer_mut(0).unwrap().selections.unwrap();
        let tokens = Tensor::from_vec(vec![5u32, u32::MAX, 1000, 7, 3_000_000, 9, 10, 20], [1, 8]).unwrap();
        let rows = layer.selections.shape().dims()[0];
        let all: Vec<u32> = (0..rows).flat_map(|_| tokens.to_vec::<u32>().unwrap()).collect();
        layer.selections.copy_from(tokenselect::TensorView::new(&all, [rows, 8]).unwrap()).unwrap();
        layer.counters.copy_from(tokenselect::TensorView::new(&[u64::MAX; 3], [3]).unwrap()).unwrap();
    }
    let _ = owner.step(0, &next); // an error or an output of no meaning, and no panic
    device.synchronize().unwrap();
}

fn elements_in_two_places_are_refused(device: &Device) {
    let shape = tokenselect::KvShape { num_pages: 2, page_size: 4, num_kv_heads: 2, head_dim: 8 };
    let dense = tokenselect::KvStrides { page: 64, token: 16, head: 8 };
    let tensor = || Tensor::zeros_on(device, DType::F32, [512]).unwrap();
    for (strides, at_fault) in [
        (tokenselect::KvStrides { page: 0, ..dense }, "v_strides.page"),
        (tokenselect::KvStrides { token: 0, ..dense }, "v_strides.token"),
        (tokenselect::KvStrides { head: 4, ..dense }, "v_strides.head"),
        (tokenselect::KvStrides { page: 40, ..dense }, "v_strides.page"),
    ] {
        let (mut k, mut v) = (tensor(), tensor());
        let made = tokenselect::KvViewMut::strided(k.view_mut(), v.view_mut(), shape, [dense, strides]);
        assert!(matches!(made, Err(Error::Argument { what, .. }) if what == at_fault), "{strides:?}");
    }
    let mut kv = tensor();
    for (offset, at_fault) in [(0, "offsets"), (64, "strides.page"), (4, "offsets")] {
        let strides = [dense; 2];
        let made = tokenselect::KvViewMut::combined(kv.view_mut(), [0, offset], shape, strides);
        assert!(matches!(made, Err(Error::Argument { what, .. }) if what == at_fault), "{offset}");
    }
    let apart = tokenselect::KvStrides { page: 128, ..dense };
    tokenselect::KvViewMut::combined(kv.view_mut(), [64, 0], shape, [apart; 2]).unwrap();
    tokenselect::KvViewMut::combined(kv.view_mut(), [0, 128], shape, [dense, apart]).unwrap();
    let made = tokenselect::KvViewMut::combined(kv.view_mut(), [0, 100], shape, [dense, apart]);
    assert!(matches!(made, Err(Error::Argument { what: "offsets", .. })));
    // Keys by head, values by token, page by page among each other.
    let by_head = tokenselect::KvStrides { token: 8, head: 32, ..apart };
    tokenselect::KvViewMut::combined(kv.view_mut(), [0, 64], shape, [by_head, apart]).unwrap();
    tokenselect::KvViewMut::combined(kv.view_mut(), [64, 0], shape, [by_head, apart]).unwrap();
    for offset in [56, 72] {
        let made = tokenselect::KvViewMut::combined(kv.view_mut(), [0, offset], shape, [by_head, apart]);
        assert!(matches!(made, Err(Error::Argument { what: "offsets", .. })), "{offset}");
    }
    // Keys are dense memory, too.
    let heads = Tensor::zeros_on(device, DType::F32, [16, 4, 8]).unwrap();
    let part = heads.view().heads(1..3).unwrap();
    assert!(tokenselect::KvView::strided(part, kv.view(), shape, [dense; 2]).is_err());
    // Sizes of nothing need not fit anything.
    let nothing = tokenselect::TensorView::new::<f32>(&[], [0, usize::MAX, 2]).unwrap();
    assert!(nothing.heads(usize::MAX - 1..usize::MAX).is_ok());
    assert!(nothing.heads(std::ops::Range { start: 5, end: 3 }).is_err());
}
