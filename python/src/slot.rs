//! Objects of the library behind Python's: who uses one now, and whether it is still there.
//!
//! An object that is changed is used by one call at a time. A call that finds it in use is an error instead of waiting: with
//! the interpreter's lock released, the other one may be in another thread, or further down this thread's own stack, in the
//! `progress` of a `prefill`.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use crate::errors::{Failure, Kind, Result};

/// A place for an object.
#[derive(Debug)]
pub(crate) struct Slot<T> {
    what: &'static str,
    state: RwLock<State<T>>,
    /// Whether somebody else has addresses of its memory: a recorded graph, or an array over it.
    is_lent: AtomicBool,
}

#[derive(Debug)]
enum State<T> {
    Open(T),
    /// What is lent is kept until the place itself goes.
    Closed {
        _kept: Option<T>,
    },
}

/// An object in use by calls that do not change it.
pub(crate) struct Reading<'a, T>(RwLockReadGuard<'a, State<T>>, &'static str);

/// An object in use by one call.
pub(crate) struct Writing<'a, T>(RwLockWriteGuard<'a, State<T>>, &'static str);

impl<T> Reading<'_, T> {
    /// The object.
    pub fn get(&self) -> Result<&T> {
        match self.0.deref() {
            State::Open(object) => Ok(object),
            State::Closed { .. } => Err(closed(self.1)),
        }
    }
}

impl<T> Writing<'_, T> {
    /// The object.
    pub fn get(&mut self) -> Result<&mut T> {
        match self.0.deref_mut() {
            State::Open(object) => Ok(object),
            State::Closed { .. } => Err(closed(self.1)),
        }
    }
}

impl<T> Slot<T> {
    /// A place for an object that errors call `what`.
    pub fn new(what: &'static str, object: T) -> Self {
        Slot { what, state: RwLock::new(State::Open(object)), is_lent: AtomicBool::new(false) }
    }

    /// The object, for a call that does not change it.
    pub fn read(&self) -> Result<Reading<'_, T>> {
        self.state
            .try_read()
            .map(|state| Reading(state, self.what))
            .map_err(|error| self.taken(error, "used"))
    }

    /// The object, for this call alone.
    pub fn write(&self) -> Result<Writing<'_, T>> {
        self.state
            .try_write()
            .map(|state| Writing(state, self.what))
            .map_err(|error| self.taken(error, "used"))
    }

    /// Somebody has addresses of the object's memory from now on.
    pub fn lend(&self) {
        self.is_lent.store(true, Ordering::Relaxed);
    }

    /// Drops the object now, or where it is lent when the place is dropped.
    pub fn close(&self) -> Result<()> {
        let mut state = match self.state.try_write() {
            Ok(state) => state,
            // What failed half way is dropped, too.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(error) => return Err(self.taken(error, "closed")),
        };
        if matches!(*state, State::Open(_)) {
            let was = std::mem::replace(&mut *state, State::Closed { _kept: None });
            if self.is_lent.load(Ordering::Relaxed)
                && let State::Open(object) = was
            {
                *state = State::Closed { _kept: Some(object) };
            }
        }
        Ok(())
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.state.try_read().is_ok_and(|state| matches!(*state, State::Closed { .. }))
    }

    /// Checks that it was not closed.
    pub fn expect_open(&self) -> Result<()> {
        if self.is_closed() { Err(closed(self.what)) } else { Ok(()) }
    }

    fn taken<G>(&self, error: TryLockError<G>, done: &str) -> Failure {
        let what = self.what;
        match error {
            TryLockError::WouldBlock => Failure::Rule {
                kind: Kind::Busy,
                status: "TS_STATUS_BUSY",
                text: format!(
                    "`{what}` is at work in another call, which has not returned: it must not be {done} meanwhile"
                ),
            },
            TryLockError::Poisoned(_) => Failure::Rule {
                kind: Kind::Defect,
                status: "TS_STATUS_PANIC",
                text: format!(
                    "`{what}` was at work when tokenselect failed by a defect of its own: make a new one"
                ),
            },
        }
    }
}

fn closed(what: &str) -> Failure {
    let text = format!("`{what}` was closed");
    Failure::Rule { kind: Kind::Base, status: "TS_STATUS_CLOSED", text }
}
