//! Numbers, names and objects from Python, with errors that name the argument.

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyInt, PyString};
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
    let Some(number) = index(value)? else {
        return Err(Failure::of_type(what, "a whole number", type_name(value)));
    };
    match number.extract::<u64>() {
        Ok(number) if number <= most => Ok(number),
        _ => Err(Failure::argument(what, format!("be from 0 to {most}"), number_text(&number))),
    }
}

/// The whole number that an object is or stands for; none for others.
pub(crate) fn index<'py>(value: &Bound<'py, PyAny>) -> Result<Option<Bound<'py, PyInt>>> {
    if let Ok(number) = value.cast::<PyInt>() {
        return Ok(Some(number.clone()));
    }
    let Some(index) = value.getattr_opt(intern!(value.py(), "__index__"))? else { return Ok(None) };
    match index.call0() {
        Ok(number) => Ok(number.cast_into::<PyInt>().ok()),
        // As arrays say that they are no single number.
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A whole number as errors show it: Python writes only so many digits.
pub(crate) fn number_text(number: &Bound<'_, PyInt>) -> String {
    if let Ok(text) = number.str() {
        return text.to_string();
    }
    let bits = number.call_method0("bit_length").and_then(|bits| bits.extract::<usize>());
    bits.map_or_else(|_| "a huge number".to_owned(), |bits| format!("a number of {bits} bits"))
}

/// A whole number, or none.
pub(crate) fn optional_whole(what: &str, value: Option<&Bound<'_, PyAny>>) -> Result<Option<usize>> {
    value.filter(|value| !value.is_none()).map(|value| whole(what, value)).transpose()
}

/// A number.
pub(crate) fn real(what: &str, value: &Bound<'_, PyAny>) -> Result<f64> {
    if let Ok(number) = value.cast::<PyFloat>() {
        return Ok(number.value());
    }
    value.extract::<f64>().map_err(|_| match value.cast::<PyInt>() {
        Ok(number) => Failure::argument(what, "be a number that fits a float", number_text(number)),
        Err(_) => Failure::of_type(what, "a number", type_name(value)),
    })
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
        let name = class.name()?.to_string();
        // Those of Python's own, of which a float has 64 bits, are no element types.
        let is_pythons = class.module()?.to_cow()? == "builtins";
        return Ok(if is_pythons { format!("Python's {name}") } else { name }); // `numpy.float32`
    }
    let text = value.str()?.to_string();
    Ok(text.strip_prefix("torch.").unwrap_or(&text).to_owned())
}

/// The element type of a name of this library's, of PyTorch's or of NumPy's. `float` and `int` are none: PyTorch calls types of 32 bits so,
/// and NumPy those of 64.
pub(crate) fn dtype_of_name(name: &str) -> Option<DType> {
    Some(match name {
        "f16" | "float16" | "half" => DType::F16,
        "bf16" | "bfloat16" => DType::Bf16,
        "f32" | "float32" => DType::F32,
        "u32" | "int32" | "uint32" => DType::U32,
        "u64" | "int64" | "uint64" | "long" => DType::U64,
        "f64" | "float64" | "double" => DType::F64,
        _ => return None,
    })
}
