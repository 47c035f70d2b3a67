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

use super::{
    AppendArgs, AttendArgs, Backend, CopyPagesArgs, CopySequenceArgs, ForgetArgs, MergeArgs, PoolArgs,
    ScoreArgs, SmoothArgs, TopKArgs, VoteArgs,
};
use crate::cache::KvStorageMut;
use crate::error::{Error, Result};
use crate::selection_cache::EMPTY;
use crate::tensor::{DType, TensorView, TensorViewMut};

/// The processor as a device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CpuBackend;

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

impl Backend for CpuBackend {
    fn name(&self) -> &str {
        "cpu"
    }

    fn copy_pages(&self, args: CopyPagesArgs<'_>) -> Result<()> {
        with_float!(args.kv.dtype(), copy_pages::<T>(args))
    }

    fn copy_sequence(&self, args: CopySequenceArgs<'_>) -> Result<()> {
        let (src, dst) = (args.src, args.dst);
        let &[layers, sequences, query_len] = args.queries.shape().dims() else { return Ok(()) };
        let top_k = args.selections.shape().dims()[2];
        let queries = args.queries.into_slice::<f32>()?;
        let selections = args.selections.into_slice::<u32>()?;
        let (ages, made_at) = (args.ages.into_slice::<u32>()?, args.made_at.into_slice::<u32>()?);
        for base in (0..layers).map(|layer| layer * sequences) {
            let row = |width: usize| (base + src) * width..(base + src + 1) * width;
            queries.copy_within(row(query_len), (base + dst) * query_len);
            selections.copy_within(row(top_k), (base + dst) * top_k);
            ages[base + dst] = ages[base + src];
            made_at[base + dst] = made_at[base + src];
        }
        Ok(())
    }

    fn forget(&self, args: ForgetArgs<'_>) -> Result<()> {
        let sequences = args.made_at.shape().dims()[1];
        let made_at = args.made_at.into_slice::<u32>()?;
        for entry in made_at.iter_mut().skip(args.sequence).step_by(sequences) {
            if *entry as usize >= args.from {
                *entry = EMPTY;
            }
        }
        Ok(())
    }

    fn append(&self, args: AppendArgs<'_>) -> Result<()> {
        with_float!(args.kv.dtype(), append::<T>(args))
    }

    fn pool(&self, args: PoolArgs<'_>) -> Result<()> {
        let dtype = args.q.dtype();
        use pool::pool;
        with_float!(dtype, pool::<T>(args))
    }

    fn score(&self, args: ScoreArgs<'_>) -> Result<()> {
        let dtype = args.kv.dtype();
        use score::score;
        with_float!(dtype, score::<T>(args))
    }

    fn vote(&self, args: VoteArgs<'_>) -> Result<()> {
        vote::vote(args)
    }

    fn smooth(&self, args: SmoothArgs<'_>) -> Result<()> {
        vote::smooth(args)
    }

    fn top_k(&self, args: TopKArgs<'_>) -> Result<()> {
        top_k::top_k(args)
    }

    fn attend(&self, args: AttendArgs<'_>) -> Result<()> {
        let (dtype, out_dtype) = (args.kv.dtype(), args.out.dtype());
        use attend::attend;
        match out_dtype {
            DType::F16 => with_float!(dtype, attend::<T, f16>(args)),
            DType::Bf16 => with_float!(dtype, attend::<T, bf16>(args)),
            DType::F32 => with_float!(dtype, attend::<T, f32>(args)),
            other => Err(not_float(other)),
        }
    }

    fn merge(&self, args: MergeArgs<'_>) -> Result<()> {
        with_float!(args.out.dtype(), merge::<T>(args))
    }
}

fn copy_pages<T: Float>(args: CopyPagesArgs<'_>) -> Result<()> {
    let (shape, strides) = (args.kv.shape, args.kv.strides);
    let copy = |data: &mut [T], base: usize| {
        for copy in args.copies {
            for token in 0..copy.num_tokens {
                for head in 0..shape.num_kv_heads {
                    let src = base + strides.offset(copy.src as usize, token, head);
                    let dst = base + strides.offset(copy.dst as usize, token, head);
                    data.copy_within(src..src + shape.head_dim, dst);
                }
            }
        }
    };
    match args.kv.storage {
        KvStorageMut::Separate { k, v } => {
            copy(k.into_slice()?, 0);
            copy(v.into_slice()?, 0);
        }
        KvStorageMut::Combined { kv, v_offset } => {
            let data = kv.into_slice()?;
            copy(data, 0);
            copy(data, v_offset);
        }
    }
    Ok(())
}

fn append<T: Float>(args: AppendArgs<'_>) -> Result<()> {
    let (shape, strides, batch) = (args.kv.shape, args.kv.strides, args.batch);
    let write = |data: &mut [T], base: usize, new: &[T]| {
        let width = shape.num_kv_heads * shape.head_dim;
        for row in (0..batch.num_rows()).filter(|&row| batch.kv_len(row) > 0) {
            let queries = batch.query_range(row);
            let first = batch.kv_len(row) - queries.len();
            let block = new[queries.start * width..queries.end * width].chunks_exact(width);
            for (token, heads) in (first..).zip(block) {
                let (page, token_in_page) = batch.locate(row, token);
                for (head, values) in heads.chunks_exact(shape.head_dim).enumerate() {
                    let at = base + strides.offset(page, token_in_page, head);
                    data[at..at + shape.head_dim].copy_from_slice(values);
                }
            }
        }
    };
    let (new_k, new_v) = (args.k.as_slice()?, args.v.as_slice()?);
    match args.kv.storage {
        KvStorageMut::Separate { k, v } => {
            let (k, v) = (k.into_slice()?, v.into_slice()?);
            rayon::join(|| write(k, 0, new_k), || write(v, 0, new_v));
        }
        KvStorageMut::Combined { kv, v_offset } => {
            let data = kv.into_slice()?;
            write(data, 0, new_k);
            write(data, v_offset, new_v);
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

/// The first `rows` codes of an `actions` buffer.
fn actions<'a>(actions: &TensorView<'a>, rows: usize) -> Result<&'a [u32]> {
    Ok(&actions.as_slice::<u32>()?[..rows])
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
