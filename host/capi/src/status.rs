//! Status codes, the text of the last error, and the fence that no panic passes.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenselect::Error;

/// What a function answers. 0 is success; anything else comes with a text, `ts_last_error_message`.
///
/// A call that fails has changed nothing, except for `TS_STATUS_PANIC`, and for `ts_prefill` and `ts_prefill_kv` where the
/// device fails behind their first piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ts_status {
    /// Done, or (on a GPU) put into the stream.
    Ok = 0,
    /// A pointer is null that must not be.
    NullPointer = 1,
    /// A pointer is not aligned as its contents or the device need it.
    Misaligned = 2,
    /// A number is none of its enumeration's.
    UnknownEnum = 3,
    /// A structure has a size that this version of the library does not know.
    StructSize = 4,
    /// A buffer that is written overlaps another argument.
    Overlap = 5,
    /// A buffer of the caller's is too short for the answer.
    Capacity = 6,
    /// The caller's function in `ts_capture` answered something else than 0.
    Callback = 7,
    /// A defect of this library. Destroy the handles that took part; nothing else may be done with them.
    Panic = 8,
    /// A field of a configuration, or another argument, breaks its rule.
    Config = 16,
    /// A tensor has the wrong shape.
    Shape = 17,
    /// A tensor has the wrong number of elements, or strides lead beyond its memory.
    Length = 18,
    /// A tensor has the wrong element type.
    ElementType = 19,
    /// An index is not below its limit.
    Index = 20,
    /// A batch is larger than the limits of the context: its sequences may be truncated to what they were and extended by less.
    Limit = 21,
    /// Page tables or lengths of a batch contradict each other.
    Table = 22,
    /// Not enough free pages.
    OutOfPages = 23,
    /// No sequence can be added.
    TooManySequences = 24,
    /// The sequence was never created by this cache, or was freed.
    UnknownSequence = 25,
    /// A sequence appears twice in one batch.
    DuplicateSequence = 26,
    /// A sequence would grow beyond the largest length.
    SequenceTooLong = 27,
    /// A sequence can be truncated only to a length it has reached.
    TruncateBeyondEnd = 28,
    /// The batch was made before the cache changed under it.
    StaleBatch = 29,
    /// Memory or a batch belongs to another device.
    WrongDevice = 30,
    /// The device, or this build of the library, cannot do that.
    Unsupported = 31,
    /// A driver call failed. It may stem from earlier asynchronous work.
    Driver = 32,
    /// A kernel could not be launched, or (in the emulator) broke a rule.
    Launch = 33,
    /// Something is needed that the configuration turned off, or that was not given.
    Missing = 34,
    /// An error that this version of the interface has no code for; its text says what it is.
    Other = 35,
    /// An operation came before another one whose results it works on, or after that was done for another batch.
    Order = 36,
    /// A layer lacks tokens that a step is to build on: it was left out of an earlier step, or that failed.
    Unwritten = 37,
    /// Memory cannot be had.
    OutOfMemory = 38,
}

/// What can go wrong here, beyond the errors of the library below.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Library(#[from] Error),
    #[error("`{what}` must not be null")]
    Null { what: &'static str },
    #[error("`{what}` must be at an address divisible by {align}, got {addr:#x}")]
    Misaligned { what: &'static str, align: usize, addr: usize },
    #[error("`{what}` must be {allowed}, got {got}")]
    UnknownEnum { what: &'static str, allowed: &'static str, got: i32 },
    #[error("`{what}.struct_size` must be {expected}, or more with zeros after it, got {got}")]
    StructSize { what: &'static str, expected: usize, got: usize },
    #[error("`{written}` is written and must not overlap `{other}`")]
    Overlap { written: &'static str, other: &'static str },
    #[error("`{what}[{entry}]` must be 0 or more, got {got}")]
    Negative { what: &'static str, entry: usize, got: i32 },
    #[error("`{what}` has room for {capacity} entries, {needed} are needed")]
    Capacity { what: &'static str, capacity: usize, needed: usize },
    #[error("the captured function answered {answer}, 0 would be success: {text}")]
    Callback { answer: i32, text: String },
    #[error("defect in tokenselect: {text}")]
    Panic { text: String },
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    fn status(&self) -> ts_status {
        match self {
            Failure::Library(error) => status_of(error),
            Failure::Null { .. } => ts_status::NullPointer,
            Failure::Misaligned { .. } => ts_status::Misaligned,
            Failure::UnknownEnum { .. } => ts_status::UnknownEnum,
            Failure::StructSize { .. } => ts_status::StructSize,
            Failure::Overlap { .. } => ts_status::Overlap,
            Failure::Negative { .. } => ts_status::Table,
            Failure::Capacity { .. } => ts_status::Capacity,
            Failure::Callback { .. } => ts_status::Callback,
            Failure::Panic { .. } => ts_status::Panic,
        }
    }
}

fn status_of(error: &Error) -> ts_status {
    match error {
        Error::Config { .. } | Error::Argument { .. } => ts_status::Config,
        Error::Shape { .. } => ts_status::Shape,
        Error::Length { .. } | Error::Extent { .. } => ts_status::Length,
        Error::DType { .. } => ts_status::ElementType,
        Error::Index { .. } => ts_status::Index,
        Error::Limit { .. } => ts_status::Limit,
        Error::Table { .. } => ts_status::Table,
        Error::OutOfPages { .. } => ts_status::OutOfPages,
        Error::TooManySequences { .. } => ts_status::TooManySequences,
        Error::UnknownSequence(_) => ts_status::UnknownSequence,
        Error::DuplicateSequence { .. } => ts_status::DuplicateSequence,
        Error::SequenceTooLong { .. } => ts_status::SequenceTooLong,
        Error::TruncateBeyondEnd { .. } => ts_status::TruncateBeyondEnd,
        Error::StaleBatch { .. } => ts_status::StaleBatch,
        Error::WrongDevice { .. } => ts_status::WrongDevice,
        Error::Unsupported { .. } => ts_status::Unsupported,
        Error::Driver { .. } => ts_status::Driver,
        Error::Launch { .. } => ts_status::Launch,
        Error::Missing { .. } => ts_status::Missing,
        Error::Order { .. } => ts_status::Order,
        Error::Unwritten { .. } => ts_status::Unwritten,
        Error::OutOfMemory { .. } => ts_status::OutOfMemory,
        _ => ts_status::Other,
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function of the interface: an error or a panic becomes a status and the thread's text.
pub(crate) fn fence(work: impl FnOnce() -> Result<()>) -> ts_status {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return ts_status::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => Failure::Panic { text: panic_text(payload) },
    };
    let text = failure.to_string().replace('\0', "\u{fffd}");
    // A thread that is ending has no text any more; the status remains.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = CString::new(text).unwrap_or_default());
    failure.status()
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

/// The text of the last error of this thread.
pub(crate) fn last_error_text() -> String {
    LAST_ERROR.try_with(|last| last.borrow().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Text of the last error that a function answered in this thread, UTF-8; empty before the first. Never null. It names
/// the argument, the rule it broke and the numbers.
///
/// Belongs to the library and is valid until the next function of the library that this thread calls.
#[unsafe(no_mangle)]
pub extern "C" fn ts_last_error_message() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Name of a status: `TS_STATUS_OUT_OF_PAGES`; `unknown status` for a number that is none. Static, never null.
#[unsafe(no_mangle)]
pub extern "C" fn ts_status_name(status: i32) -> *const c_char {
    const NAMES: &[(ts_status, &CStr)] = &[
        (ts_status::Ok, c"TS_STATUS_OK"),
        (ts_status::NullPointer, c"TS_STATUS_NULL_POINTER"),
        (ts_status::Misaligned, c"TS_STATUS_MISALIGNED"),
        (ts_status::UnknownEnum, c"TS_STATUS_UNKNOWN_ENUM"),
        (ts_status::StructSize, c"TS_STATUS_STRUCT_SIZE"),
        (ts_status::Overlap, c"TS_STATUS_OVERLAP"),
        (ts_status::Capacity, c"TS_STATUS_CAPACITY"),
        (ts_status::Callback, c"TS_STATUS_CALLBACK"),
        (ts_status::Panic, c"TS_STATUS_PANIC"),
        (ts_status::Config, c"TS_STATUS_CONFIG"),
        (ts_status::Shape, c"TS_STATUS_SHAPE"),
        (ts_status::Length, c"TS_STATUS_LENGTH"),
        (ts_status::ElementType, c"TS_STATUS_ELEMENT_TYPE"),
        (ts_status::Index, c"TS_STATUS_INDEX"),
        (ts_status::Limit, c"TS_STATUS_LIMIT"),
        (ts_status::Table, c"TS_STATUS_TABLE"),
        (ts_status::OutOfPages, c"TS_STATUS_OUT_OF_PAGES"),
        (ts_status::TooManySequences, c"TS_STATUS_TOO_MANY_SEQUENCES"),
        (ts_status::UnknownSequence, c"TS_STATUS_UNKNOWN_SEQUENCE"),
        (ts_status::DuplicateSequence, c"TS_STATUS_DUPLICATE_SEQUENCE"),
        (ts_status::SequenceTooLong, c"TS_STATUS_SEQUENCE_TOO_LONG"),
        (ts_status::TruncateBeyondEnd, c"TS_STATUS_TRUNCATE_BEYOND_END"),
        (ts_status::StaleBatch, c"TS_STATUS_STALE_BATCH"),
        (ts_status::WrongDevice, c"TS_STATUS_WRONG_DEVICE"),
        (ts_status::Unsupported, c"TS_STATUS_UNSUPPORTED"),
        (ts_status::Driver, c"TS_STATUS_DRIVER"),
        (ts_status::Launch, c"TS_STATUS_LAUNCH"),
        (ts_status::Missing, c"TS_STATUS_MISSING"),
        (ts_status::Other, c"TS_STATUS_OTHER"),
        (ts_status::Order, c"TS_STATUS_ORDER"),
        (ts_status::Unwritten, c"TS_STATUS_UNWRITTEN"),
        (ts_status::OutOfMemory, c"TS_STATUS_OUT_OF_MEMORY"),
    ];
    let found = NAMES.iter().find(|(known, _)| *known as i32 == status);
    found.map_or(c"unknown status", |(_, name)| name).as_ptr()
}
