//! Tensors of a step, from Python's objects to checked arguments.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyTuple};
use tokenselect::{DType, HeadShape, StepOutput};

use super::Context;
use crate::argument::{Argument, Span, expect_apart};
use crate::errors::{Failure, Result};
use crate::given::{Given, like, tuple};
use crate::kv::{Kv, KvView, Wanted};
use crate::numbers::of_class;
use crate::uses::Uses;

/// `out` and `lse` as they were passed.
pub(super) type Outputs<'a, 'py> = (Option<&'a Bound<'py, PyAny>>, Option<&'a Bound<'py, PyAny>>);

/// Where attention is written, and what is answered.
pub(super) struct Output<'py> {
    out: Argument,
    lse: Option<Argument>,
    pub answer: Bound<'py, PyAny>,
}

impl Output<'_> {
    /// Bytes that are written.
    pub fn spans(&self) -> Result<Vec<Span>> {
        let mut spans = vec![self.out.span()?];
        if let Some(lse) = &self.lse {
            spans.push(lse.span()?);
        }
        Ok(spans)
    }

    /// # Safety
    /// - As for [`Argument::view_mut`].
    pub unsafe fn view<'a>(&self, device: &'a tokenselect::Device) -> Result<StepOutput<'a>> {
        // SAFETY: the caller's promise.
        unsafe {
            let lse = self.lse.map(|lse| lse.view_mut(device)).transpose()?;
            Ok(StepOutput { out: self.out.view_mut(device)?, lse })
        }
    }
}

impl Context {
    /// Queries, `q`, or keys and values to append, `k` and `v`: `[tokens, heads, head_dim]`, strided.
    pub(super) fn heads<'py>(
        &self,
        uses: &mut Uses<'_, 'py>,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        tokens: usize,
    ) -> Result<Argument> {
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = self.heads;
        let heads = if what == "q" { num_qo_heads } else { num_kv_heads };
        let (given, shape) = (uses.look(what, object)?, [tokens, heads, head_dim]);
        given.expect_shape(&shape)?;
        let dtype = given.expect_type(&[self.dtype])?;
        let whole = Argument { what, addr: given.addr, dtype, shape: shape.into(), strides: None };
        let &[token, head, element] = given.strides() else { return Ok(whole) };
        if shape.contains(&0) {
            return Ok(whole);
        }
        if head_dim > 1 && element != 1 {
            let rule = "must have adjacent elements in its last dimension, its strides are";
            let rule = format!("{rule} {}", tuple(given.strides()));
            return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
        }
        // The stride of a dimension of one place means nothing.
        let dense = [heads * head_dim, head_dim];
        let mut strides = dense;
        for (stride, (got, size)) in strides.iter_mut().zip([(token, tokens), (head, heads)]) {
            if size > 1 {
                let positive = usize::try_from(got).ok().filter(|&got| got > 0);
                *stride = positive.ok_or_else(|| {
                    let rule =
                        format!("must have strides above 0, its strides are {}", tuple(given.strides()));
                    Failure::tensor("TS_STATUS_CONFIG", what, rule)
                })?;
            }
        }
        Ok(Argument { strides: (strides != dense).then_some(strides), ..whole })
    }

    /// A dense tensor of one type.
    pub(super) fn dense<'py>(
        uses: &mut Uses<'_, 'py>,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        shape: &[usize],
        allowed: &[DType],
    ) -> Result<Argument> {
        Context::checked(&uses.look(what, object)?, shape, allowed)
    }

    fn checked(given: &Given<'_>, shape: &[usize], allowed: &[DType]) -> Result<Argument> {
        given.expect_shape(shape)?;
        let dtype = given.expect_type(allowed)?;
        given.expect_dense()?;
        let shape = match *shape {
            [a] => [a].into(),
            [a, b] => [a, b].into(),
            [a, b, c] => [a, b, c].into(),
            [a, b, c, d] => [a, b, c, d].into(),
            _ => [].into(),
        };
        Ok(Argument { what: given.what, addr: given.addr, dtype, shape, strides: None })
    }

    /// As [`dense`](Self::dense), of a tensor that is written.
    fn written<'py>(
        uses: &mut Uses<'_, 'py>,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        shape: &[usize],
        allowed: &[DType],
    ) -> Result<Argument> {
        let given = uses.look(what, object)?;
        given.expect_writable()?;
        Context::checked(&given, shape, allowed)
    }

    /// Where attention of `tokens` query tokens is written: what was passed, or tensors made like `q`.
    pub(super) fn output<'py>(
        &self,
        uses: &mut Uses<'_, 'py>,
        tokens: usize,
        q: &Bound<'py, PyAny>,
        (out, lse): Outputs<'_, 'py>,
        allowed: &[DType],
    ) -> Result<Output<'py>> {
        let (heads, dim) = (self.heads.num_qo_heads, self.heads.head_dim);
        let out = out.filter(|out| !out.is_none());
        let out = out.map_or_else(|| like("out", q, &[tokens, heads, dim], false), |out| Ok(out.clone()))?;
        let out_argument = Context::written(uses, "out", &out, &[tokens, heads, dim], allowed)?;
        let lse = match lse.filter(|lse| !lse.is_none()) {
            None => None,
            Some(lse) => match lse.cast::<PyBool>() {
                Ok(wanted) if wanted.is_true() => Some(like("lse", q, &[tokens, heads], true)?),
                Ok(_) => None,
                Err(_) => Some(lse.clone()),
            },
        };
        let Some(lse) = lse else { return Ok(Output { out: out_argument, lse: None, answer: out }) };
        let lse_argument = Context::written(uses, "lse", &lse, &[tokens, heads], &[DType::F32])?;
        let answer = PyTuple::new(uses.py(), [&out, &lse])?.into_any();
        Ok(Output { out: out_argument, lse: Some(lse_argument), answer })
    }

    /// Types of outputs.
    pub(super) fn output_types(&self) -> &'static [DType] {
        match self.dtype {
            DType::F16 => &[DType::F16, DType::F32],
            DType::Bf16 => &[DType::Bf16, DType::F32],
            _ => &[DType::F32],
        }
    }

    /// Where the keys and values of a view are now.
    pub(super) fn kv<'py>(
        &self,
        uses: &mut Uses<'_, 'py>,
        kv: &Bound<'py, PyAny>,
        page_size: usize,
    ) -> Result<Kv<'py>> {
        let wanted = Wanted { heads: self.heads, dtype: self.dtype, page_size };
        of_class::<KvView>("kv", kv)?.get().look(uses, &wanted)
    }

    /// Checks that nothing written shares a byte with what is read or with the workspace, which has nothing of what is read either.
    pub(super) fn expect_apart(&self, written: &[Span], read: &[Span]) -> Result<()> {
        expect_apart(written, read)?;
        for given in written.iter().chain(read) {
            for buffer in &self.workspace {
                given.expect_apart(buffer)?;
            }
        }
        Ok(())
    }
}
