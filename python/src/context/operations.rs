//! Operations one at a time, over anybody's cache.

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tokenselect::{DType, Ranks, Selection, StepInput, TokenSelect};

use super::Context;
use super::inputs::Outputs;
use crate::argument::{Argument, Span, expect_apart};
use crate::batch::Batch;
use crate::cache::Cache;
use crate::errors::{Failure, Result};
use crate::given::tuple;
use crate::numbers::{of_class, whole};
use crate::selection_cache::Reuse;
use crate::uses::Uses;

/// The tokens that rows attend to.
#[derive(Clone, Copy)]
pub(super) enum Over<'a, 'py> {
    Selected,
    All,
    Lists {
        tokens: &'a Bound<'py, PyAny>,
        length: &'a Bound<'py, PyAny>,
        ranks: Option<&'a Bound<'py, PyAny>>,
        total_len: Option<&'a Bound<'py, PyAny>>,
    },
}

impl Context {
    /// Runs `work` with the library's object, which nobody else uses meanwhile, and a batch.
    pub(super) fn with_batch<'py, R>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        work: impl FnOnce(&mut TokenSelect, &tokenselect::Batch, &mut Uses<'_, 'py>) -> Result<R>,
    ) -> Result<R> {
        let batch = of_class::<Batch>("batch", batch)?;
        let mut select = slf.get().slot.write()?;
        let guard = batch.get().slot().read()?;
        let mut uses = Context::uses(slf, batch.get().work());
        uses.hold(batch, batch.get().slot());
        work(select.get()?, guard.get()?, &mut uses)
    }

    pub(super) fn run_append<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
    ) -> Result<()> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let (tokens, device) = (batch.num_query_tokens(), uses.device().inner());
            if let Ok(pair) = kv.cast::<PyTuple>() {
                let Ok((cache, layer)) = pair.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>() else {
                    return Err(Failure::of_type("kv", "a KvView or a pair of a Cache and a layer", pair));
                };
                let (cache, layer) = (of_class::<Cache>("cache", &cache)?, whole("layer", &layer)?);
                uses.hold(cache, cache.get().slot());
                let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
                expect_apart(&cache.get().spans(layer)?, &[k.span()?, v.span()?])?;
                let mut cache = cache.get().slot().write()?;
                let cache = cache.get()?;
                // SAFETY: tensors of the device, apart from the cache, which live until it has read them.
                let (k, v) = unsafe { (k.view(device)?, v.view(device)?) };
                return uses.run(|| select.fill(cache, layer, batch, k, v));
            }
            let kv = this.kv(uses, kv, batch.page_size())?;
            let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
            this.expect_pages_apart(&kv.spans()?, &[k.span()?, v.span()?])?;
            // SAFETY: tensors of the device, pages apart from what is written into them, which live until it has done so.
            unsafe {
                let (k, v) = (k.view(device)?, v.view(device)?);
                kv.write(device, &Reuse::NONE, |layer| uses.run(|| select.append(batch, layer.kv, k, v)))
            }
        })
    }

    pub(super) fn run_select<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        reuse: Reuse<'py>,
    ) -> Result<()> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let device = uses.device().inner();
            reuse.hold(uses);
            let (kv, q) =
                (this.kv(uses, kv, batch.page_size())?, this.heads(uses, "q", q, batch.num_query_tokens())?);
            this.expect_pages_apart(&kv.spans()?, &[])?;
            this.expect_apart(&[], &[q.span()?])?;
            // SAFETY: tensors of the device, none of which is the workspace, which live until it has read them.
            unsafe {
                let q = q.view(device)?;
                kv.read(device, &reuse, |kv, cached| uses.run(|| select.select(batch, kv, q, cached)))
            }
        })
    }

    pub(super) fn run_append_select<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        reuse: Reuse<'py>,
    ) -> Result<()> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let (tokens, device) = (batch.num_query_tokens(), uses.device().inner());
            reuse.hold(uses);
            let kv = this.kv(uses, kv, batch.page_size())?;
            let q = this.heads(uses, "q", q, tokens)?;
            let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
            this.expect_pages_apart(&kv.spans()?, &[k.span()?, v.span()?, q.span()?])?;
            // SAFETY: tensors of the device, pages and workspace apart from what is read, which live until it has done so.
            unsafe {
                let input = StepInput { q: q.view(device)?, k: k.view(device)?, v: v.view(device)? };
                kv.write(device, &reuse, |layer| uses.run(|| select.append_select(batch, layer, input)))
            }
        })
    }

    pub(super) fn run_pool<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        reuse: Reuse<'py>,
    ) -> Result<()> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let device = uses.device().inner();
            reuse.hold(uses);
            let q = this.heads(uses, "q", q, batch.num_query_tokens())?;
            this.expect_apart(&[], &[q.span()?])?;
            // SAFETY: a tensor of the device, apart from the workspace, which lives until it has been read.
            let q = unsafe { q.view(device)? };
            reuse.with(|cached| uses.run(|| select.pool(batch, q, cached)))
        })
    }

    pub(super) fn run_score<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
    ) -> Result<()> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let device = uses.device().inner();
            let kv = this.kv(uses, kv, batch.page_size())?;
            this.expect_pages_apart(&kv.spans()?, &[])?;
            // SAFETY: pages of the device, apart from the workspace, which live until they have been read.
            unsafe { kv.read(device, &Reuse::NONE, |kv, _| uses.run(|| select.score(batch, kv))) }
        })
    }

    pub(super) fn run_attend<'py>(
        slf: &Bound<'py, Self>,
        batch: &Bound<'py, PyAny>,
        kv: &Bound<'py, PyAny>,
        q: &Bound<'py, PyAny>,
        over: Over<'_, 'py>,
        outputs: Outputs<'_, 'py>,
    ) -> Result<Bound<'py, PyAny>> {
        let this = slf.get();
        Context::with_batch(slf, batch, |select, batch, uses| {
            let (tokens, device) = (batch.num_query_tokens(), uses.device().inner());
            let (kv, queries) = (this.kv(uses, kv, batch.page_size())?, this.heads(uses, "q", q, tokens)?);
            let lists = match over {
                Over::Lists { tokens, length, ranks, total_len } => {
                    lists(uses, tokens, length, ranks, total_len)?
                }
                Over::Selected | Over::All => Vec::new(),
            };
            let output = this.output(uses, tokens, q, outputs, this.output_types())?;
            let [k_pages, v_pages] = kv.spans()?;
            let mut read = vec![queries.span()?, k_pages, v_pages];
            this.expect_apart(&output.spans()?, &read)?;
            // Lists may be the workspace's own.
            read.clear();
            for list in &lists {
                read.push(list.span()?);
            }
            expect_apart(&output.spans()?, &read)?;
            // SAFETY: tensors of the device, outputs apart from inputs, which live until it has done its work.
            unsafe {
                let (q, output_view) = (queries.view(device)?, output.view(device)?);
                let views = lists.iter().map(|list| list.view(device)).collect::<Result<Vec<_>>>()?;
                let given = match views[..] {
                    [tokens, len] => Some(Selection { tokens, len, ranks: None }),
                    [tokens, len, ranks, total_len] => {
                        Some(Selection { tokens, len, ranks: Some(Ranks { ranks, total_len }) })
                    }
                    _ => None,
                };
                let over = match (over, &given) {
                    (Over::All, _) => tokenselect::Over::All,
                    (_, Some(lists)) => tokenselect::Over::Lists(lists),
                    (_, None) => tokenselect::Over::Selected,
                };
                kv.read(device, &Reuse::NONE, |kv, _| {
                    uses.run(|| select.attend(batch, kv, q, over, output_view))
                })?;
            }
            Ok(output.answer)
        })
    }

    pub(super) fn run_merge<'py>(
        slf: &Bound<'py, Self>,
        parts: &Bound<'py, PyAny>,
        part_lses: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        let this = slf.get();
        let mut select = this.slot.write()?;
        let select = select.get()?;
        let mut uses = Context::uses(slf, 0);
        let uses = &mut uses;
        let device = uses.device().inner();
        let given = uses.look("parts", parts)?;
        let (heads, dim) = (this.heads.num_qo_heads, this.heads.head_dim);
        let &[num_parts, tokens, ..] = given.shape() else {
            let rule =
                format!("must have shape (parts, tokens, {heads}, {dim}), got {}", tuple(given.shape()));
            return Err(Failure::tensor("TS_STATUS_SHAPE", "parts", rule));
        };
        if num_parts == 0 {
            return Err(Failure::argument("parts", "be at least 1", num_parts));
        }
        let parts = Context::dense(uses, "parts", parts, &[num_parts, tokens, heads, dim], &[DType::F32])?;
        let lses = Context::dense(uses, "part_lses", part_lses, &[num_parts, tokens, heads], &[DType::F32])?;
        let types = [this.dtype, DType::F32, DType::F16, DType::Bf16];
        let output = this.output(uses, tokens, out, (Some(out), lse), &types)?;
        this.expect_apart(&output.spans()?, &[parts.span()?, lses.span()?])?;
        // SAFETY: tensors of the device, outputs apart from inputs, which live until it has done its work.
        let (parts, lses, view) = unsafe { (parts.view(device)?, lses.view(device)?, output.view(device)?) };
        uses.run(|| select.merge(parts, lses, view))?;
        Ok(output.answer)
    }

    /// Checks that pages share no byte with what is read beside them, nor any of it with the workspace.
    pub(super) fn expect_pages_apart(&self, pages: &[Span; 2], read: &[Span]) -> Result<()> {
        for span in pages {
            for other in read {
                span.expect_apart(other)?;
            }
        }
        self.expect_apart(&[], pages)?;
        self.expect_apart(&[], read)
    }
}

/// Tokens and lengths, and ranks and whole lengths where they are given.
fn lists<'py>(
    uses: &mut Uses<'_, 'py>,
    tokens: &Bound<'py, PyAny>,
    length: &Bound<'py, PyAny>,
    ranks: Option<&Bound<'py, PyAny>>,
    total_len: Option<&Bound<'py, PyAny>>,
) -> Result<Vec<Argument>> {
    let given = uses.look("tokens", tokens)?;
    let &[rows, width] = given.shape() else {
        let rule = format!("must have two dimensions, its shape is {}", tuple(given.shape()));
        return Err(Failure::tensor("TS_STATUS_SHAPE", "tokens", rule));
    };
    let mut lists = vec![
        Context::dense(uses, "tokens", tokens, &[rows, width], &[DType::U32])?,
        Context::dense(uses, "length", length, &[rows], &[DType::U32])?,
    ];
    let (ranks, total_len) =
        (ranks.filter(|ranks| !ranks.is_none()), total_len.filter(|total_len| !total_len.is_none()));
    match (ranks, total_len) {
        (None, None) => {}
        (Some(ranks), Some(total_len)) => {
            lists.push(Context::dense(uses, "ranks", ranks, &[rows, width], &[DType::U32])?);
            lists.push(Context::dense(uses, "total_len", total_len, &[rows], &[DType::U32])?);
        }
        (Some(_), None) => return Err(Failure::of_type("total_len", "given with `ranks`", "none")),
        (None, Some(_)) => return Err(Failure::of_type("ranks", "given with `total_len`", "none")),
    }
    Ok(lists)
}
