//! What is asked of PyTorch's tensors: where they lie, of what type they are, and that nothing is to be computed from them that this
//! library does not compute.

use std::sync::{Mutex, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;
use tokenselect::DType;

use super::{MAX_KNOWN, Source, Types};
use crate::device::{Device, Where};
use crate::errors::{Failure, Result};

/// Element types of PyTorch, each of which is one object.
static TORCH_TYPES: Mutex<Vec<(Py<PyAny>, Types)>> = Mutex::new(Vec::new());

/// Whether a tensor of PyTorch's lies where a device works, on the host where there is none. Costs a quarter of asking for its
/// `device`.
pub(super) fn is_at(tensor: &Bound<'_, PyAny>, device: Option<&Device>) -> Result<bool> {
    let py = tensor.py();
    Ok(match device.map_or(Where::Cpu, Device::place) {
        Where::Cpu => tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()?,
        Where::Cuda(ordinal) => {
            tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()?
                && tensor.call_method0(intern!(py, "get_device"))?.extract::<i64>()? == i64::from(ordinal)
        }
        Where::Emulated => false,
    })
}

/// Checks where a tensor of PyTorch's lies: on the host where there is no device.
pub(super) fn expect_place(
    what: &'static str,
    found: &Bound<'_, PyAny>,
    device: Option<&Device>,
) -> Result<()> {
    let place = device.map_or(Where::Cpu, Device::place);
    let (found, expected) = (found.str()?.to_string(), place.torch_name());
    if expected.as_deref() == Some(found.as_str()) {
        return Ok(());
    }
    let expected = expected.unwrap_or_else(|| "no PyTorch device".to_owned());
    Err(Failure::tensor("TS_STATUS_WRONG_DEVICE", what, format!("must be on {expected}, it is on {found}")))
}

/// Checks that the memory of a tensor of PyTorch's is what its elements are, and that nothing is to be differentiated. (Only complex
/// numbers are conjugated, which no operation takes.)
pub(super) fn expect_plain(what: &'static str, tensor: &Bound<'_, PyAny>, source: Source) -> Result<()> {
    if source == Source::LikeTorch {
        return Ok(());
    }
    let py = tensor.py();
    if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
        let rule =
            format!("must have its elements in memory, it is lazily negated: pass `{what}.resolve_neg()`");
        return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
    }
    if tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()?
        && py.import(intern!(py, "torch"))?.call_method0(intern!(py, "is_grad_enabled"))?.is_truthy()?
    {
        let rule = format!(
            "requires gradients, which this library does not compute: call it under `torch.no_grad()`, or pass `{what}.detach()`"
        );
        return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
    }
    Ok(())
}

/// Checks that PyTorch does not follow what is computed from a tensor: tangents of dual tensors would be lost without a word, and a
/// trace would hold the results of this call as constants. Answers whether that holds for all tensors of the moment.
pub(crate) fn expect_untraced(what: &str, tensor: &Bound<'_, PyAny>) -> Result<bool> {
    static FORWARD_AD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static IS_TRACING: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    let py = tensor.py();
    let is_tracing = IS_TRACING.get_or_try_init(py, || {
        let native = py.import("torch")?.getattr(intern!(py, "_C"))?;
        Ok::<_, PyErr>(native.getattr_opt(intern!(py, "_is_tracing"))?.map(Bound::unbind))
    })?;
    if let Some(is_tracing) = is_tracing
        && is_tracing.bind(py).call0()?.is_truthy()?
    {
        let rule = "is given within `torch.jit.trace`, which would take the results for constants: use `torch.compile` and the \
                    operations of `tokenselect.torch`";
        return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
    }
    let forward_ad = FORWARD_AD
        .get_or_try_init(py, || py.import("torch.autograd.forward_ad").map(|it| it.into_any().unbind()))?
        .bind(py);
    let level = forward_ad.getattr_opt(intern!(py, "_current_level"))?;
    if level.is_none_or(|level| level.extract::<i64>().is_ok_and(|level| level < 0)) {
        return Ok(true);
    }
    let Ok(dual) = forward_ad.call_method1(intern!(py, "unpack_dual"), (tensor,)) else {
        // Within an operator of PyTorch's nobody can tell any more.
        let rule = "is given within `torch.autograd.forward_ad.dual_level()`, whose derivatives this library does not compute";
        return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
    };
    if !dual.getattr(intern!(py, "tangent"))?.is_none() {
        let rule = format!(
            "is a dual tensor, whose derivatives this library does not compute: pass \
             `torch.autograd.forward_ad.unpack_dual({what}).primal`"
        );
        return Err(Failure::tensor("TS_STATUS_CONFIG", what, rule));
    }
    Ok(false)
}

/// Element types of a `torch.dtype`, or of its name.
pub(super) fn torch_types(dtype: &Bound<'_, PyAny>) -> Result<Types> {
    {
        let known = TORCH_TYPES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, types)) = known.iter().find(|(known, _)| known.as_ptr() == dtype.as_ptr()) {
            return Ok(*types);
        }
    }
    let text = dtype.str()?.to_string();
    let types = match text.strip_prefix("torch.").unwrap_or(&text) {
        "float16" => Types::of(DType::F16),
        "bfloat16" => Types::of(DType::Bf16),
        "float32" => Types::of(DType::F32),
        "int32" | "uint32" => Types::of(DType::U32),
        "int64" | "uint64" => Types::of(DType::U64),
        "float64" => Types::of(DType::F64),
        _ => Types::NONE,
    };
    let mut known = TORCH_TYPES.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() < MAX_KNOWN && !dtype.is_instance_of::<PyString>() {
        known.push((dtype.clone().unbind(), types));
    }
    Ok(types)
}
