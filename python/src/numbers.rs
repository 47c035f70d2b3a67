//! Numbers, names and objects from Python, with errors that name the argument.

use pyo3::prelude::*;
use pyo3::types::PyString;
use pyo3::{PyClass, PyTypeInfo};
use tokenselect::{DType, KvLayout};

use crate::errors::{Failure, Kind, Result};

/// What `type(object).__name__` says.
pub(crate) fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// An object of a class of this package.
pub(crate) fn of_class<'a, 'py, T: PyClass + PyTypeInfo>(
    what: &str,
    object: &'a Bound<'py, PyAny>,
) -> Result<&'a Bound<'py, T>> {
    object.cast::<T>().map_err(|_| {
        let class =
            T::type_object(object.py()).name().map_or_else(|_| "object".to_owned(), |name| name.to_string());
        let got = type_name(object);
        let article = if class.starts_with(['A', 'E', 'I', 'O', 'U']) { "an" } else { "a" };
        Failure::of_type(what, format!("{article} {class}"), got)
    })
}

/// A whole number that is not negative.
pub(crate) fn whole(what: &str, value: &Bound<'_, PyAny>) -> Result<usize> {
    whole_below(what, value, u64::MAX).map(|number| number as usize)
}

/// A whole number from 0 to `most`.
pub(crate) fn whole_below(what: &str, value: &Bound<'_, PyAny>, most: u64) -> Result<u64> {
    if let Ok(number) = value.extract::<u64>()
        && number <= most
    {
        return Ok(number);
    }
    let index = value.call_method0("__index__");
    let Ok(number) = index else { return Err(Failure::of_type(what, "a whole number", type_name(value))) };
    let text = number.str()?.to_string();
    Err(Failure::argument(what, format!("be from 0 to {most}"), text))
}

/// A whole number, or none.
pub(crate) fn optional_whole(what: &str, value: Option<&Bound<'_, PyAny>>) -> Result<Option<usize>> {
    value.filter(|value| !value.is_none()).map(|value| whole(what, value)).transpose()
}

/// A number.
pub(crate) fn real(what: &str, value: &Bound<'_, PyAny>) -> Result<f64> {
    value.extract::<f64>().map_err(|_| Failure::of_type(what, "a number", type_name(value)))
}

/// A number; none and NaN stand for the default.
pub(crate) fn optional_real(what: &str, value: Option<&Bound<'_, PyAny>>) -> Result<Option<f64>> {
    let number = value.filter(|value| !value.is_none()).map(|value| real(what, value)).transpose()?;
    Ok(number.filter(|number| !number.is_nan()))
}

/// Yes or no: `True`, `False`, 0 or 1.
pub(crate) fn switch(what: &str, value: &Bound<'_, PyAny>) -> Result<bool> {
    match whole(what, value)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Failure::argument(what, "be 0 or 1", other)),
    }
}

/// The choice of this name.
pub(crate) fn choose<T: Clone>(what: &str, value: &Bound<'_, PyAny>, choices: &[(&str, T)]) -> Result<T> {
    let name = value
        .cast::<PyString>()
        .map_err(|_| Failure::of_type(what, format!("one of {}", names(choices)), type_name(value)))?;
    let name = name.to_str()?;
    let found = choices.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, choice)| choice.clone())
        .ok_or_else(|| Failure::argument(what, format!("be one of {}", names(choices)), name))
}

fn names<T>(choices: &[(&str, T)]) -> String {
    choices.iter().map(|&(name, _)| name).collect::<Vec<_>>().join(", ")
}

/// The order of the dimensions of a page.
pub(crate) fn layout(value: &Bound<'_, PyAny>) -> Result<KvLayout> {
    choose("layout", value, &[("NHD", KvLayout::Nhd), ("HND", KvLayout::Hnd)])
}

/// Name of an order of dimensions.
pub(crate) fn layout_name(layout: KvLayout) -> &'static str {
    match layout {
        KvLayout::Nhd => "NHD",
        KvLayout::Hnd => "HND",
    }
}

/// An element type: a name, a `torch.dtype`, or what NumPy takes for one.
pub(crate) fn dtype(what: &str, value: &Bound<'_, PyAny>) -> Result<DType> {
    let given = dtype_text(value)?;
    match dtype_of_name(&given) {
        Some(dtype) => Ok(dtype),
        None => Err(Failure::Rule {
            kind: if value.is_instance_of::<PyString>() { Kind::Argument } else { Kind::ArgumentType },
            status: "TS_STATUS_ELEMENT_TYPE",
            text: format!(
                "`{what}` must be one of f16, bf16, f32, a `torch.dtype` or a `numpy.dtype` of these, got {given}"
            ),
        }),
    }
}

/// What an element type is called, without the name of its library.
fn dtype_text(value: &Bound<'_, PyAny>) -> Result<String> {
    if let Ok(class) = value.cast::<pyo3::types::PyType>() {
        return Ok(class.name()?.to_string()); // `numpy.float32`
    }
    let text = value.str()?.to_string();
    Ok(text.strip_prefix("torch.").unwrap_or(&text).to_owned())
}

/// The element type of a name of this library's, of PyTorch's or of NumPy's.
pub(crate) fn dtype_of_name(name: &str) -> Option<DType> {
    Some(match name {
        "f16" | "float16" | "half" => DType::F16,
        "bf16" | "bfloat16" => DType::Bf16,
        "f32" | "float32" | "float" => DType::F32,
        "u32" | "int32" | "uint32" | "int" => DType::U32,
        "u64" | "int64" | "uint64" | "long" => DType::U64,
        "f64" | "float64" | "double" => DType::F64,
        _ => return None,
    })
}
