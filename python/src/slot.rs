//! Objects of the library behind Python's: who uses one now, and whether it is still there.
//!
//! An object that is changed is used by one call at a time. A call that finds it in use is an error instead of waiting: with
//! the interpreter's lock released, the other one may be in another thread, or further down this thread's own stack, in the
//! `progress` of a `prefill`.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use crate::errors::{Failure, Kind, Result};
use crate::fork::Process;

/// A place for an object.
#[derive(Debug)]
pub(crate) struct Slot<T> {
    what: &'static str,
    state: RwLock<State<T>>,
    /// Whether somebody else has addresses of its memory: a recorded graph, or an array over it.
    is_lent: AtomicBool,
    /// Calls that have addresses of its memory without being at work with the object itself.
    num_calls: AtomicUsize,
    /// Where it was made.
    process: Process,
}

#[derive(Debug)]
enum State<T> {
    Open(T),
    /// What is lent is kept until the place itself goes.
    Closed {
        _kept: Option<T>,
    },
}

/// What has memory that others may have addresses of.
pub(crate) trait Lends {
    /// Somebody has addresses of the object's memory from now on.
    fn lend(&self);

    /// A call has addresses of the object's memory until [`end_call`](Self::end_call): it must not be closed meanwhile. For memory
    /// alone, which a call may use while it works with the object: with the lock of that nobody else could.
    fn begin_call(&self);

    /// Such a call is over.
    fn end_call(&self);

    /// Checks that it was not closed. One at work is there.
    fn expect_open(&self) -> Result<()>;

    /// Checks that it was made in this process.
    fn expect_own_process(&self) -> Result<()>;
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
        let (is_lent, num_calls) = (AtomicBool::new(false), AtomicUsize::new(0));
        Slot {
            what,
            state: RwLock::new(State::Open(object)),
            is_lent,
            num_calls,
            process: Process::current(),
        }
    }

    /// The object, for a call that does not change it.
    pub fn read(&self) -> Result<Reading<'_, T>> {
        self.process.expect_current(self.what)?;
        self.state
            .try_read()
            .map(|state| Reading(state, self.what))
            .map_err(|error| self.taken(error, "used"))
    }

    /// The object, for this call alone.
    pub fn write(&self) -> Result<Writing<'_, T>> {
        self.process.expect_current(self.what)?;
        self.state
            .try_write()
            .map(|state| Writing(state, self.what))
            .map_err(|error| self.taken(error, "used"))
    }

    /// Drops the object now, or where it is lent when the place is dropped.
    pub fn close(&self) -> Result<()> {
        let mut state = match self.state.try_write() {
            Ok(state) => state,
            // What failed half way is dropped, too.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(error) => return Err(self.taken(error, "closed")),
        };
        // Calls begin and end with the interpreter, which this one has.
        if self.num_calls.load(Ordering::Relaxed) > 0 {
            return Err(self.at_work("closed"));
        }
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

    /// The object, where it is open and no call changes it. For the garbage collector, which waits for nobody.
    pub fn try_get(&self) -> Option<Reading<'_, T>> {
        self.state.try_read().ok().map(|state| Reading(state, self.what))
    }

    fn is_closed(&self) -> bool {
        self.state.try_read().is_ok_and(|state| matches!(*state, State::Closed { .. }))
    }

    fn taken<G>(&self, error: TryLockError<G>, done: &str) -> Failure {
        let what = self.what;
        match error {
            TryLockError::WouldBlock => self.at_work(done),
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

impl<T> Lends for Slot<T> {
    fn lend(&self) {
        self.is_lent.store(true, Ordering::Relaxed);
    }

    fn begin_call(&self) {
        self.num_calls.fetch_add(1, Ordering::Relaxed);
    }

    fn end_call(&self) {
        self.num_calls.fetch_sub(1, Ordering::Relaxed);
    }

    fn expect_open(&self) -> Result<()> {
        if self.is_closed() { Err(closed(self.what)) } else { Ok(()) }
    }

    fn expect_own_process(&self) -> Result<()> {
        self.process.expect_current(self.what)
    }
}

impl<T> Slot<T> {
    fn at_work(&self, done: &str) -> Failure {
        let what = self.what;
        let text = format!(
            "`{what}` is at work in another call, which has not returned: it must not be {done} meanwhile"
        );
        Failure::Rule { kind: Kind::Busy, status: "TS_STATUS_BUSY", text }
    }
}

fn closed(what: &str) -> Failure {
    let text = format!("`{what}` was closed");
    Failure::Rule { kind: Kind::Base, status: "TS_STATUS_CLOSED", text }
}
