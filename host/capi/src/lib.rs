//! The C interface of `tokenselect`. The header is `include/tokenselect.h`, the guide `README.md` beside it.
//!
//! Rules that hold everywhere:
//! - A function answers a [`ts_status`]; the text of the last error is kept per thread ([`ts_last_error_message`]). No
//!   panic leaves a function.
//! - Objects are opaque handles, made by a `_create` function and given back by `_destroy`, in any order.
//! - Pointers to tensors are addresses of the device, of the host for the processor. Types and shapes follow from
//!   configuration and batch. The cache and a step's queries, keys and values may be strided; other tensors are dense.
//! - Work on a GPU is put in the device's stream. Only functions that say so wait for it.
//! - A handle is used by one thread at a time, except where it says otherwise.
//! - Structures that callers fill begin with their size and grow at their end.
//!
//! Each file has the same order: structures of the header, functions of the header, private steps.

// The names are those of the header.
#![allow(non_camel_case_types)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod batch;
mod cache;
mod config;
mod context;
mod device;
mod graph;
mod kv;
mod ops;
mod pointers;
mod prefill;
mod selection_cache;
mod sized;
mod status;
mod version;

pub use batch::*;
pub use cache::*;
pub use config::*;
pub use context::*;
pub use device::*;
pub use graph::*;
pub use kv::*;
pub use ops::*;
pub use prefill::*;
pub use selection_cache::*;
pub use status::*;
pub use version::*;
