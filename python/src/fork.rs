//! Processes that were forked: a child has the memory of its parent, but neither its threads nor its CUDA contexts.
//!
//! A child that used either would wait for ever, or fail somewhere deep in the driver; here each of its calls says what is wrong.

use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict};

use crate::errors::{Failure, Kind, Result};

/// How many forks lie between this process and the one that imported the module. Counted by Python in each child: asking for the
/// number of the process would be a system call at every use of an object.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process of this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// This one.
    pub fn current() -> Self {
        Process(FORKS.load(Ordering::Relaxed))
    }

    /// Whether this process was forked from that one since.
    pub fn is_gone(self) -> bool {
        self != Process::current()
    }

    /// Checks that `what` was made in this process.
    pub fn expect_current(self, what: &str) -> Result<()> {
        if self.is_gone() {
            return Err(forked(what, "was made in the process that this one was forked from"));
        }
        Ok(())
    }
}

/// What a process has of which a forked child has none: the threads of the processor, or contexts of CUDA.
#[derive(Debug)]
pub(crate) struct Once(AtomicU32);

impl Once {
    const NEVER: u32 = u32::MAX;

    /// Not there yet.
    pub const fn new() -> Self {
        Once(AtomicU32::new(Once::NEVER))
    }

    /// It is made now if it never was. An error where that was in a process before this one, whose `what` stays as it is.
    pub fn begin(&self, what: &str) -> Result<()> {
        let Process(now) = Process::current();
        let made = self.0.compare_exchange(Once::NEVER, now, Ordering::Relaxed, Ordering::Relaxed);
        match made {
            Err(before) if before != now => {
                Err(forked(what, "cannot be made where the process that this one was forked from made one"))
            }
            _ => Ok(()),
        }
    }
}

fn forked(what: &str, rule: &str) -> Failure {
    let text = format!(
        "`{what}` {rule}: neither threads nor CUDA contexts live on in a forked child. Start processes with \
         `multiprocessing.get_context(\"spawn\")`"
    );
    Failure::Rule { kind: Kind::Base, status: "TS_STATUS_CLOSED", text }
}

/// Has forks counted.
pub(crate) fn watch(py: Python<'_>) -> PyResult<()> {
    let count = PyCFunction::new_closure(py, None, None, |_, _| {
        FORKS.fetch_add(1, Ordering::Relaxed);
    })?;
    let options = PyDict::new(py);
    options.set_item("after_in_child", count)?;
    py.import("os")?.call_method("register_at_fork", (), Some(&options))?;
    Ok(())
}
