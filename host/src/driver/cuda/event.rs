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
