//! The native module of the Python package `tokenselect`, over the library's own interface.
//!
//! Rules that hold everywhere:
//! - A method is fenced (`errors::fence`): an error becomes an exception of one family, and so does a panic.
//! - An object of the library's is behind a place that knows whether it is in use (`slot::Slot`): used twice at once is an error, and
//!   so is used in a process that was forked from its own (`fork`).
//! - A class that holds objects of Python's shows them to the garbage collector (`__traverse__`). But for a device's, what they
//!   hold is given when they are made, so that every ring of references has an object of somebody else's in it, which is cleared.
//! - Tensors are looked at anew at each call (`given::Given`), and live until the device has read them (`uses::Uses`).
//! - Nothing that is written overlaps what is read (`argument::expect_apart`), the library's own memory included.
//! - Arguments are read here, not by the macros, so that errors name them and their rules.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod argument;
mod batch;
mod cache;
mod config;
mod context;
mod device;
mod errors;
mod fork;
mod given;
mod graph;
mod kv;
mod memory;
mod numbers;
mod selection_cache;
mod slot;
mod tables;
mod uses;

/// Token selection and sparse attention over paged KV caches: what `tokenselect` is made of.
#[pyo3::pymodule(name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::fork::watch(module.py())
    }

    #[pymodule_export]
    use crate::batch::{Batch, BatchInfo, BatchRow, BatchSlot, Pieces};
    #[pymodule_export]
    use crate::cache::Cache;
    #[pymodule_export]
    use crate::config::Config;
    #[pymodule_export]
    use crate::context::Context;
    #[pymodule_export]
    use crate::device::Device;
    #[pymodule_export]
    use crate::graph::Graph;
    #[pymodule_export]
    use crate::kv::KvView;
    #[pymodule_export]
    use crate::memory::{Buffer, Memory};
    #[pymodule_export]
    use crate::selection_cache::{SelectionCache, SelectionStats};

    /// Version of the package.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const version: &str = env!("CARGO_PKG_VERSION");
}
