//! The processor: plain Rust, in parallel on the current rayon thread pool.
//!
//! All arithmetic is f32; keys and values are widened a row at a time. Results do not depend on the number
//! of threads: work is cut by sizes alone, and partial results are combined in order.

mod attend;
mod float;
mod pool;
mod score;
mod simd;
mod top_k;
mod vote;

use float::Float;
use half::{bf16, f16};
use rayon::prelude::*;

use super::{AttendArgs, Backend, MergeArgs};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::{KvStorageMut, KvStrides, KvView, KvViewMut};
use crate::plan::Plan;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::{Heads, TensorView, TensorViewMut};
use crate::workspace::{RowAction, Workspace};

/// The processor as a device.
pub(super) struct Cpu;

/// Calls `$f::<T>` with the float type of `$dtype`.
macro_rules! with_float {
    ($dtype:expr, $f:ident :: <T $(, $more:ty)?> ($($arg:expr),*)) => {
        match $dtype {
            DType::F16 => $f::<f16 $(, $more)?>($($arg),*),
            DType::Bf16 => $f::<bf16 $(, $more)?>($($arg),*),
            DType::F32 => $f::<f32 $(, $more)?>($($arg),*),
            other => Err(not_float(other)),
        }
    };
}

fn not_float(got: DType) -> Error {
    Error::DType { what: "tensor", expected: "f16, bf16 or f32".into(), got }
}

impl Backend for Cpu {
    fn append(&self, batch: &Batch, kv: KvViewMut<'_>, k: TensorView<'_>, v: TensorView<'_>) -> Result<()> {
        with_float!(kv.dtype(), append::<T>(batch, kv, k, v))
    }

    fn pool(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        use pool::pool;
        with_float!(q.dtype(), pool::<T>(plan, batch, workspace, q, cached))
    }

    fn score(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, kv: KvView<'_>) -> Result<()> {
        use score::score;
        with_float!(kv.dtype(), score::<T>(plan, batch, workspace, kv))
    }

    fn vote(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, _counts: bool) -> Result<()> {
        vote::vote(plan, batch, workspace)
    }

    fn smooth(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace) -> Result<()> {
        vote::smooth(plan, batch, workspace)
    }

    fn top_k(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
        _votes_are_counted: bool,
    ) -> Result<()> {
        top_k::top_k(plan, batch, workspace, cached)
    }

    fn attend(&self, plan: &Plan, batch: &Batch, workspace: &Workspace, args: AttendArgs<'_>) -> Result<()> {
        let (dtype, out_dtype) = (args.kv.dtype(), args.out.dtype());
        use attend::attend;
        match out_dtype {
            DType::F16 => with_float!(dtype, attend::<T, f16>(plan, batch, workspace, args)),
            DType::Bf16 => with_float!(dtype, attend::<T, bf16>(plan, batch, workspace, args)),
            DType::F32 => with_float!(dtype, attend::<T, f32>(plan, batch, workspace, args)),
            other => Err(not_float(other)),
        }
    }

    fn merge(&self, args: MergeArgs<'_>) -> Result<()> {
        with_float!(args.out.dtype(), merge::<T>(args))
    }
}

fn append<T: Float>(batch: &Batch, kv: KvViewMut<'_>, k: TensorView<'_>, v: TensorView<'_>) -> Result<()> {
    let shape = kv.shape;
    let write = |data: &mut [T], base: usize, strides: KvStrides, new: Heads<'_, T>| {
        for row in (0..batch.num_rows()).filter(|&row| batch.kv_len(row) > 0) {
            let first = batch.kv_len(row) - batch.block_len(row);
            for (token, t) in (first..).zip(batch.query_range(row)) {
                let (page, token_in_page) = batch.locate(row, token);
                for head in 0..shape.num_kv_heads {
                    let at = base + strides.offset(page, token_in_page, head);
                    data[at..at + shape.head_dim].copy_from_slice(new.at(t, head));
                }
            }
        }
    };
    let (new_k, new_v) = (k.as_heads()?, v.as_heads()?);
    let (k_strides, v_strides) = (kv.k_strides, kv.v_strides);
    match kv.storage {
        KvStorageMut::Separate { k, v } => {
            let (k, v) = (k.into_slice()?, v.into_slice()?);
            rayon::join(|| write(k, 0, k_strides, new_k), || write(v, 0, v_strides, new_v));
        }
        KvStorageMut::Combined { kv, offsets } => {
            let data = kv.into_slice()?;
            write(data, offsets[0], k_strides, new_k);
            write(data, offsets[1], v_strides, new_v);
        }
    }
    Ok(())
}

fn merge<O: Float>(args: MergeArgs<'_>) -> Result<()> {
    let parts = args.parts.as_slice::<f32>()?;
    let part_lses = args.part_lses.as_slice::<f32>()?;
    let &[num_parts, tokens, heads, head_dim] = args.parts.shape().dims() else { return Ok(()) };
    let mut lses = vec![0.0f32; tokens * heads];
    let out = args.out.into_slice::<O>()?;
    out.par_chunks_mut(head_dim).zip(lses.par_iter_mut()).enumerate().for_each(|(i, (out, lse))| {
        let list = (0..num_parts).map(|part| {
            let at = part * tokens * heads + i;
            Merged { out: &parts[at * head_dim..][..head_dim], lse: part_lses[at], count: 1.0 }
        });
        let mut sum = vec![0.0; head_dim];
        *lse = merge_one(list, &mut sum);
        O::narrow(&sum, out);
    });
    write_lse(args.lse, &lses)
}

/// One part of what is merged.
struct Merged<'a> {
    out: &'a [f32],
    lse: f32,
    /// Of an infinite `lse`: how many logits reached it.
    count: f32,
}

impl Merged<'_> {
    /// Its weight beside a largest `lse`, which is a number.
    fn weight(&self, max: f32) -> f32 {
        if self.lse == f32::INFINITY { self.count } else { (self.lse - max).exp() }
    }
}

/// `lse = ln(sum of exp(lse_i))`, `out = sum of exp(lse_i - lse) out_i` over the parts with `lse_i > -inf`; those with +inf share
/// the mass.
fn merge_one<'a>(parts: impl Iterator<Item = Merged<'a>> + Clone, out: &mut [f32]) -> f32 {
    out.fill(0.0);
    let counted = parts.filter(|part| part.lse != f32::NEG_INFINITY);
    let max = counted.clone().map(|part| part.lse).fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = counted.clone().map(|part| part.weight(max)).sum();
    if sum == 0.0 {
        return f32::NEG_INFINITY;
    }
    for part in counted {
        let weight = part.weight(max) / sum;
        for (o, x) in out.iter_mut().zip(part.out) {
            *o += weight * x;
        }
    }
    max + sum.ln()
}

fn write_lse(to: Option<TensorViewMut<'_>>, lses: &[f32]) -> Result<()> {
    if let Some(to) = to {
        to.into_slice::<f32>()?.copy_from_slice(lses);
    }
    Ok(())
}

/// The rows that are scored.
fn scored<'a>(batch: &'a Batch, actions: &'a [u32]) -> impl Iterator<Item = usize> + Clone + 'a {
    (0..batch.num_rows()).filter(|&row| actions[row] == RowAction::Score as u32)
}

/// Cuts `data` into the disjoint parts `[start, start + len)`, which must ascend.
fn split_parts<T>(mut data: &mut [T], parts: impl Iterator<Item = (usize, usize)>) -> Vec<&mut [T]> {
    let mut done = 0;
    let mut cut = Vec::new();
    for (start, len) in parts {
        let (_, rest) = data.split_at_mut(start - done);
        let (part, rest) = rest.split_at_mut(len);
        cut.push(part);
        (data, done) = (rest, start + len);
    }
    cut
}
