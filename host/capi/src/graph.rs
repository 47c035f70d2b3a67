//! Captured work.

use std::ffi::c_void;

use tokenselect::{Error, Graph};

use crate::device::ts_device;
use crate::pointers::{hand_out, reference, take_back};
use crate::status::{Failure, fence, last_error_text, ts_status};

/// Work recorded by `ts_capture`: a CUDA graph. One thread at a time.
#[derive(Debug)]
pub struct ts_graph {
    graph: Graph,
}

/// Work to record: calls of this library on the device that is captured. `user_data` is what `ts_capture` was given.
/// Answers 0 if all went well. Must not unwind.
pub type ts_work = Option<unsafe extern "C" fn(user_data: *mut c_void) -> i32>;

/// Calls `work` and records what it puts on the device, instead of doing it: launching that costs the processor one
/// call for the whole of it.
///
/// Run the work once before: what it allocates at its first run (tables of a batch, angles) cannot be recorded. Batches
/// come from a `ts_batch_slot`, so that each launch reads the lengths and pages put there last.
///
/// Errors: `TS_STATUS_CALLBACK` where `work` does not answer 0, `TS_STATUS_MISSING` where it allocates, waits or copies
/// from or to the host, `TS_STATUS_UNSUPPORTED` on the processor. Then nothing was done.
///
/// # Safety
/// - `device` is null or a handle; `work` is null or may be called with `user_data` and does not unwind.
/// - `graph` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_capture(
    device: *const ts_device,
    work: ts_work,
    user_data: *mut c_void,
    graph: *mut *mut ts_graph,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let device = &unsafe { reference("device", device)? }.device;
        let work = work.ok_or(Failure::Null { what: "work" })?;
        let make = || {
            let mut answer = 0;
            let captured = device.capture(|| {
                // SAFETY: as above.
                answer = unsafe { work(user_data) };
                // Stops the capture; what is told is the callback's answer, below.
                let failed = Error::Missing { op: "ts_capture", needs: "work that answers 0" };
                if answer == 0 { Ok(()) } else { Err(failed) }
            });
            if answer != 0 {
                return Err(Failure::Callback { answer, text: last_error_text() });
            }
            Ok(ts_graph { graph: captured? })
        };
        // SAFETY: as above.
        unsafe { hand_out("graph", graph, make) }
    })
}

/// Does recorded work, after the device's earlier work. Does not wait for it.
///
/// Errors: `TS_STATUS_DRIVER`, or `TS_STATUS_LAUNCH` in the emulator.
///
/// # Safety
/// - `graph` is null or a handle that nothing else uses meanwhile.
/// - All memory, contexts, caches, batches and slots that the recorded work used are alive, and slots hold a batch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_graph_launch(graph: *const ts_graph) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        reference("graph", graph)?.graph.launch()?;
        Ok(())
    })
}

/// Gives a graph back. Null is nothing.
///
/// # Safety
/// - `graph` is null or a handle, used for the last time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_graph_destroy(graph: *mut ts_graph) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("graph", graph) })
}
