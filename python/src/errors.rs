//! What can go wrong, as Python sees it: one family of exceptions, `tokenselect.errors`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokenselect::Error;

/// Why a call fails.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An error of the library.
    Library(Error),
    /// An exception of Python's: of an argument's own methods, or of a callback.
    Python(PyErr),
    /// A rule of this package that is broken.
    Rule { kind: Kind, status: &'static str, text: String },
}

/// The class of an exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Base,
    Argument,
    ArgumentType,
    OutOfRange,
    OutOfMemory,
    OutOfPages,
    Unsupported,
    Busy,
    Defect,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Library(error)
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Failure::Python(error)
    }
}

impl Kind {
    fn class(self) -> &'static str {
        match self {
            Kind::Base => "TokenSelectError",
            Kind::Argument => "ArgumentError",
            Kind::ArgumentType => "ArgumentTypeError",
            Kind::OutOfRange => "OutOfRangeError",
            Kind::OutOfMemory => "OutOfMemoryError",
            Kind::OutOfPages => "OutOfPagesError",
            Kind::Unsupported => "UnsupportedError",
            Kind::Busy => "BusyError",
            Kind::Defect => "DefectError",
        }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::Config { .. }
            | Error::Argument { .. }
            | Error::Shape { .. }
            | Error::Length { .. }
            | Error::Extent { .. }
            | Error::Table { .. }
            | Error::Limit { .. }
            | Error::WrongDevice { .. }
            | Error::UnknownSequence(_)
            | Error::DuplicateSequence { .. }
            | Error::SequenceTooLong { .. }
            | Error::TruncateBeyondEnd { .. } => Kind::Argument,
            Error::DType { .. } => Kind::ArgumentType,
            Error::Index { .. } => Kind::OutOfRange,
            Error::OutOfMemory { .. } => Kind::OutOfMemory,
            Error::OutOfPages { .. } => Kind::OutOfPages,
            Error::Unsupported { .. } => Kind::Unsupported,
            _ => Kind::Base,
        }
    }
}

/// The status of the C interface that stands for the same error.
fn status_of(error: &Error) -> &'static str {
    match error {
        Error::Config { .. } | Error::Argument { .. } => "TS_STATUS_CONFIG",
        Error::Shape { .. } => "TS_STATUS_SHAPE",
        Error::Length { .. } | Error::Extent { .. } => "TS_STATUS_LENGTH",
        Error::DType { .. } => "TS_STATUS_ELEMENT_TYPE",
        Error::Index { .. } => "TS_STATUS_INDEX",
        Error::Limit { .. } => "TS_STATUS_LIMIT",
        Error::Table { .. } => "TS_STATUS_TABLE",
        Error::OutOfPages { .. } => "TS_STATUS_OUT_OF_PAGES",
        Error::TooManySequences { .. } => "TS_STATUS_TOO_MANY_SEQUENCES",
        Error::UnknownSequence(_) => "TS_STATUS_UNKNOWN_SEQUENCE",
        Error::DuplicateSequence { .. } => "TS_STATUS_DUPLICATE_SEQUENCE",
        Error::SequenceTooLong { .. } => "TS_STATUS_SEQUENCE_TOO_LONG",
        Error::TruncateBeyondEnd { .. } => "TS_STATUS_TRUNCATE_BEYOND_END",
        Error::StaleBatch { .. } => "TS_STATUS_STALE_BATCH",
        Error::WrongDevice { .. } => "TS_STATUS_WRONG_DEVICE",
        Error::Unsupported { .. } => "TS_STATUS_UNSUPPORTED",
        Error::Driver { .. } => "TS_STATUS_DRIVER",
        Error::Launch { .. } => "TS_STATUS_LAUNCH",
        Error::Missing { .. } => "TS_STATUS_MISSING",
        Error::Order { .. } => "TS_STATUS_ORDER",
        Error::Unwritten { .. } => "TS_STATUS_UNWRITTEN",
        Error::OutOfMemory { .. } => "TS_STATUS_OUT_OF_MEMORY",
        _ => "TS_STATUS_OTHER",
    }
}

impl Failure {
    /// `what` must be as the rule says.
    pub fn argument(what: &str, rule: impl std::fmt::Display, got: impl std::fmt::Display) -> Self {
        let text = format!("`{what}` must {rule}, got {got}");
        Failure::Rule { kind: Kind::Argument, status: "TS_STATUS_CONFIG", text }
    }

    /// `what` must be of a type.
    pub fn of_type(what: &str, rule: impl std::fmt::Display, got: impl std::fmt::Display) -> Self {
        let text = format!("`{what}` must be {rule}, got {got}");
        Failure::Rule { kind: Kind::ArgumentType, status: "TS_STATUS_ELEMENT_TYPE", text }
    }

    /// `what` must be a tensor as the rule says, which goes on with what it is instead.
    pub fn tensor(status: &'static str, what: &str, rule: impl std::fmt::Display) -> Self {
        Failure::Rule { kind: Kind::Argument, status, text: format!("`{what}` {rule}") }
    }

    /// Memory of the host that cannot be had.
    pub fn out_of_memory(what: &str, bytes: usize) -> Self {
        let text = format!("cpu: no memory for {what} of {bytes} bytes");
        Failure::Rule { kind: Kind::OutOfMemory, status: "TS_STATUS_OUT_OF_MEMORY", text }
    }

    /// The error for a class whose objects come from elsewhere: `from`.
    pub fn not_called(class: &str, from: &str) -> Self {
        let text = format!("`{class}` must not be called, its objects come from {from}");
        Failure::Rule { kind: Kind::ArgumentType, status: "TS_STATUS_CONFIG", text }
    }

    /// The exception.
    fn raise(self, py: Python<'_>) -> PyErr {
        let (kind, status, text) = match self {
            Failure::Python(error) => return error,
            Failure::Library(error) => (Kind::of(&error), status_of(&error), error.to_string()),
            Failure::Rule { kind, status, text } => (kind, status, text),
        };
        let made = py
            .import("tokenselect.errors")
            .and_then(|errors| errors.getattr(kind.class()))
            .and_then(|class| class.call1((text.clone(), status)));
        // Where the package is half torn down, as at the interpreter's end, the text is told nevertheless.
        made.map_or_else(|_| PyRuntimeError::new_err(text), PyErr::from_value)
    }
}

/// Runs the body of a method: an error becomes an exception, and so does a panic.
pub(crate) fn fence<T>(py: Python<'_>, work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = format!("defect in tokenselect: {}", panic_text(payload));
            Failure::Rule { kind: Kind::Defect, status: "TS_STATUS_PANIC", text }
        }
    };
    Err(failure.raise(py))
}

fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
        (Some(text), _) => text.clone(),
        (None, Some(text)) => (*text).to_owned(),
        (None, None) => "a panic without a text".to_owned(),
    };
    std::mem::forget(payload); // dropping a stranger's value could panic again
    text
}
