//! Whole steps, and prompts of any length.

use std::ops::ControlFlow;

use pyo3::prelude::*;
use tokenselect::{LayerMut, PrefillProgress, StepInput, StepOutput, TokenSelect};

use super::Context;
use super::inputs::Outputs;
use crate::batch::Pieces;
use crate::cache::Cache;
use crate::errors::{self, Failure, Result, fence};
use crate::fork::Process;
use crate::numbers::{of_class, type_name, whole};
use crate::selection_cache::Reuse;
use crate::uses::Places;

/// What a step attends to.
pub(super) enum Kind {
    Select,
    Dense,
}

impl Context {
    /// Checks that sequences are no longer than it reads: the workspace has places for some tokens more, since pages may be partly
    /// used, but no promise was made of these.
    pub fn expect_kv_len(&self, longest: usize) -> Result<()> {
        match self.max_kv_len {
            Some(most) if longest > most => {
                let text = format!(
                    "`max_kv_len` is limited to {most}, a sequence would have {longest} tokens: make the limit of \
                     `Context.for_prefill` larger"
                );
                Err(Failure::Rule { kind: errors::Kind::Argument, status: "TS_STATUS_LIMIT", text })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn run_step<'py>(
        slf: &Bound<'py, Self>,
        (cache, layer): (&Bound<'py, PyAny>, &Bound<'py, PyAny>),
        batch: &Bound<'py, PyAny>,
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        outputs: Outputs<'_, 'py>,
        kind: Kind,
    ) -> Result<Bound<'py, PyAny>> {
        let this = slf.get();
        let (cache, layer) = (of_class::<Cache>("cache", cache)?, whole("layer", layer)?);
        Context::with_batch(slf, batch, |select, batch, uses| {
            let (tokens, device) = (batch.num_query_tokens(), uses.device().inner());
            uses.hold(cache, cache.get().slot());
            let queries = this.heads(uses, "q", q, tokens)?;
            let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
            let output = this.output(uses, tokens, q, outputs, this.output_types())?;
            let (read, written) = ([queries.span()?, k.span()?, v.span()?], output.spans()?);
            this.expect_apart(&written, &read)?;
            let pages = cache.get().spans(layer)?;
            for span in written.iter().chain(&read) {
                span.expect_apart(&pages[0])?;
                span.expect_apart(&pages[1])?;
            }
            let mut cache = cache.get().slot().write()?;
            let cache = cache.get()?;
            // SAFETY: tensors of the device, outputs, pages and workspace apart from inputs, which live until it has done its work.
            let (input, view) = unsafe {
                let input = StepInput { q: queries.view(device)?, k: k.view(device)?, v: v.view(device)? };
                (input, output.view(device)?)
            };
            uses.run(|| match kind {
                Kind::Select => select.step(cache, layer, batch, input, view),
                Kind::Dense => select.step_dense(cache, layer, batch, input, view),
            })?;
            Ok(output.answer)
        })
    }

    pub(super) fn run_prefill<'py>(
        slf: &Bound<'py, Self>,
        (cache, layer): (&Bound<'py, PyAny>, &Bound<'py, PyAny>),
        pieces: &Bound<'py, PyAny>,
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        outputs: Outputs<'_, 'py>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        let this = slf.get();
        let (cache, layer) = (of_class::<Cache>("cache", cache)?, whole("layer", layer)?);
        let (pieces, told) = (of_class::<Pieces>("pieces", pieces)?.get(), Told::new(progress)?);
        let (mut select, guard) = (this.slot.write()?, pieces.slot().read()?);
        let (select, all) = (select.get()?, guard.get()?);
        this.expect_kv_len(all.whole().max_kv_len())?;
        let tokens = pieces.num_query_tokens;
        let mut uses = Context::uses(slf, usize::MAX);
        let uses = &mut uses;
        let device = uses.device().inner();
        let queries = this.heads(uses, "q", q, tokens)?;
        let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
        let output = this.output(uses, tokens, q, outputs, this.output_types())?;
        let (read, written) = ([queries.span()?, k.span()?, v.span()?], output.spans()?);
        this.expect_apart(&written, &read)?;
        let pages = cache.get().spans(layer)?;
        for span in written.iter().chain(&read) {
            span.expect_apart(&pages[0])?;
            span.expect_apart(&pages[1])?;
        }
        let mut cache = cache.get().slot().write()?;
        let layer = cache.get()?.layer_mut(layer)?;
        // SAFETY: tensors of the device, outputs, pages and workspace apart from inputs, held until it has done its work.
        let (input, view) = unsafe {
            let input = StepInput { q: queries.view(device)?, k: k.view(device)?, v: v.view(device)? };
            (input, output.view(device)?)
        };
        told.prefill(uses.py(), uses.take_places(), select, layer, all, (input, view))?;
        Ok(output.answer)
    }

    pub(super) fn run_prefill_kv<'py>(
        slf: &Bound<'py, Self>,
        pieces: &Bound<'py, PyAny>,
        (kv, reuse): (&Bound<'py, PyAny>, Reuse<'py>),
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        outputs: Outputs<'_, 'py>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        let this = slf.get();
        let (pieces, told) = (of_class::<Pieces>("pieces", pieces)?.get(), Told::new(progress)?);
        let (mut select, guard) = (this.slot.write()?, pieces.slot().read()?);
        let (select, all) = (select.get()?, guard.get()?);
        this.expect_kv_len(all.whole().max_kv_len())?;
        let tokens = pieces.num_query_tokens;
        let mut uses = Context::uses(slf, usize::MAX);
        let uses = &mut uses;
        let device = uses.device().inner();
        let kv = this.kv(uses, kv, all.whole().page_size())?;
        let queries = this.heads(uses, "q", q, tokens)?;
        let (k, v) = (this.heads(uses, "k", k, tokens)?, this.heads(uses, "v", v, tokens)?);
        let output = this.output(uses, tokens, q, outputs, this.output_types())?;
        let (read, written) = ([queries.span()?, k.span()?, v.span()?], output.spans()?);
        this.expect_apart(&written, &read)?;
        let pages = kv.spans()?;
        this.expect_pages_apart(&pages, &read)?;
        for span in &written {
            span.expect_apart(&pages[0])?;
            span.expect_apart(&pages[1])?;
        }
        let (py, places) = (uses.py(), uses.take_places());
        // SAFETY: tensors of the device, outputs, pages and workspace apart from inputs, held until it has done its work.
        unsafe {
            let input = StepInput { q: queries.view(device)?, k: k.view(device)?, v: v.view(device)? };
            let view = output.view(device)?;
            kv.write(device, &reuse, |layer| told.prefill(py, places, select, layer, all, (input, view)))?;
        }
        Ok(output.answer)
    }
}

/// Who is told of progress.
struct Told {
    progress: Option<Py<PyAny>>,
    /// The process that reads, which the one that is told may have forked.
    process: Process,
}

impl Told {
    fn new(progress: Option<&Bound<'_, PyAny>>) -> Result<Self> {
        let progress = progress.filter(|progress| !progress.is_none());
        match progress {
            Some(progress) if !progress.is_callable() => {
                Err(Failure::of_type("progress", "a function of `done` and `total`", type_name(progress)))
            }
            _ => {
                let progress = progress.map(|progress| progress.clone().unbind());
                Ok(Told { progress, process: Process::current() })
            }
        }
    }

    /// Whether to go on. Where nobody is told, an interrupt from the keyboard is looked for.
    fn goes_on(&self, py: Python<'_>, places: &Places, at: PrefillProgress) -> PyResult<bool> {
        let goes_on = match &self.progress {
            None => py.check_signals().map(|()| true)?,
            Some(progress) => {
                let answer = progress.bind(py).call1((at.done, at.total))?;
                answer.is_none() || answer.is_truthy()?
            }
        };
        fence(py, || {
            self.process.expect_current("context")?;
            places.expect_unchanged(py)
        })?;
        Ok(goes_on)
    }

    /// Reads prompts, without the interpreter but where somebody is told.
    fn prefill(
        &self,
        py: Python<'_>,
        places: Places,
        select: &mut TokenSelect,
        layer: LayerMut<'_>,
        pieces: &tokenselect::Pieces,
        (input, output): (StepInput<'_>, StepOutput<'_>),
    ) -> Result<()> {
        places.expect_unchanged(py)?;
        let mut raised = None;
        let tell = |at| match Python::try_attach(|py| self.goes_on(py, &places, at)) {
            Some(Ok(true)) => ControlFlow::Continue(()),
            Some(Ok(false)) | None => ControlFlow::Break(()),
            Some(Err(error)) => {
                raised = Some(error);
                ControlFlow::Break(())
            }
        };
        py.detach(|| select.prefill(layer, pieces, input, output, tell))?;
        raised.map_or(Ok(()), |error| Err(error.into()))
    }
}
