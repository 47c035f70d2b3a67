//! Whose methods an object has.

use std::sync::{Mutex, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::MAX_KNOWN;
use crate::errors::Result;
use crate::memory::Memory;

/// Whose methods a tensor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// PyTorch's.
    Torch,
    /// Those of PyTorch's that say where the elements are, and not all others.
    LikeTorch,
    /// NumPy's, which tell all of it in a structure.
    Struct,
    /// NumPy's or PyTorch's with a mask, of which neither structure nor address tell.
    Masked,
    /// Those of the array interfaces.
    Interface,
    /// This package's memory.
    Own,
}

/// Classes whose kind is known: looking for attributes that are not there costs more than the rest of a call.
static CLASSES: Mutex<Vec<(Py<PyType>, Source)>> = Mutex::new(Vec::new());

/// Whose methods an object has: none where only the object itself, not its class, may have them.
pub(super) fn source_of(object: &Bound<'_, PyAny>) -> Result<Option<Source>> {
    let (py, class) = (object.py(), object.get_type());
    {
        let known = CLASSES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, source)) = known.iter().find(|(known, _)| known.as_ptr() == class.as_ptr()) {
            return Ok(Some(*source));
        }
    }
    let source = if object.is_instance_of::<Memory>() {
        Source::Own
    } else if is_masked(&class)? {
        Source::Masked
    } else if class.hasattr(intern!(py, "data_ptr"))? {
        let is_whole =
            class.hasattr(intern!(py, "is_neg"))? && class.hasattr(intern!(py, "requires_grad"))?;
        if is_whole { Source::Torch } else { Source::LikeTorch }
    } else if class.hasattr(intern!(py, "__array_struct__"))? {
        Source::Struct
    } else if class.hasattr(intern!(py, "__array_interface__"))?
        || class.hasattr(intern!(py, "__cuda_array_interface__"))?
    {
        Source::Interface
    } else {
        return Ok(None);
    };
    let mut known = CLASSES.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() < MAX_KNOWN {
        known.push((class.unbind(), source));
    }
    Ok(Some(source))
}

/// Whether a class is one of NumPy's or of PyTorch's with a mask. Where an object is of one, its module was imported.
fn is_masked(class: &Bound<'_, PyType>) -> Result<bool> {
    let modules = class.py().import(intern!(class.py(), "sys"))?.getattr(intern!(class.py(), "modules"))?;
    for (module, name) in [("numpy.ma", "MaskedArray"), ("torch.masked", "MaskedTensor")] {
        if let Ok(module) = modules.get_item(module)
            && let Some(masked) = module.getattr_opt(name)?
            && class.is_subclass(&masked)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
