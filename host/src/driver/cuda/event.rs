//! Moments in a stream.

use cust::sys;

/// An event of the driver API.
pub(super) struct CudaEvent(pub sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for CudaEvent {}
// SAFETY: as above.
unsafe impl Sync for CudaEvent {}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: made by `record`; destroying needs no current context.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// As long as this lives, this thread's calls are no mistake of a capture that another library has under way in the mode "global":
/// without it, asking whether an event has passed would end such a capture, whatever stream that is of.
pub(super) struct Relaxed(Option<sys::CUstreamCaptureMode>);

impl Relaxed {
    pub(super) fn begin() -> Self {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges the thread's mode with `mode`. Where that fails, the mode is as it was.
        let code = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
        Relaxed((code == sys::CUresult::CUDA_SUCCESS).then_some(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Some(mut mode) = self.0 {
            // SAFETY: as in `begin`.
            let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
        }
    }
}
