//! What the GPU backend asks of a driver: memory, copies, launches and events, all in the order of one stream.

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kernels_gpu::entries::{Entry, Op};
use kernels_gpu::launch::{Dims, GpuInfo};

use crate::error::{Error, Result};

/// A moment in a device's order of work: see [`Device::record`](crate::Device::record).
pub struct Event(pub(crate) Box<dyn std::any::Any + Send + Sync>);

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event")
    }
}

/// Work that was recorded instead of done.
pub(crate) struct Captured(pub(crate) Box<dyn std::any::Any + Send + Sync>);

/// A device with one stream. Everything is done in the order of the calls; only [`read`](Self::read),
/// [`synchronize`](Self::synchronize) and [`elapsed`](Self::elapsed) wait.
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Name for messages: `cuda:0 (NVIDIA H200)`, `emulated`.
    fn name(&self) -> &str;

    /// What launch shapes depend on.
    fn gpu(&self) -> &GpuInfo;

    /// How long it took to load kernels so far.
    fn load_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Loads kernels, so that [`launch`](Self::launch) can start them.
    fn prepare(&self, entries: &[&'static Entry]) -> Result<()> {
        let _ = entries;
        Ok(())
    }

    /// Allocates `bytes > 0` bytes, aligned to 256.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Frees an allocation once the work that uses it is done.
    fn free(&self, addr: u64);

    /// Sets bytes to 0.
    fn zero(&self, addr: u64, bytes: usize) -> Result<()>;

    /// Copies from the host; `from` may be reused at once.
    fn write(&self, addr: u64, from: &[u8]) -> Result<()>;

    /// Copies to the host, and waits for it.
    fn read(&self, addr: u64, to: &mut [u8]) -> Result<()>;

    /// Copies within the device; the ranges do not overlap.
    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// What was launched last.
    fn order(&self) -> &LaunchOrder;

    /// Starts a kernel that was [prepared](Self::prepare). `params` are the bytes of the entry's parameter struct. With
    /// `overlaps` it may begin before the launch before it has ended (see [`kernels_gpu::common::overlap`]).
    ///
    /// # Safety
    /// - The entry's own rules hold for the parameters: its pointers name memory of this device with the stated
    ///   shapes, which lives until the launch has ended.
    /// - `overlaps` is what [`LaunchOrder`] says.
    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8], overlaps: bool) -> Result<()>;

    /// Waits until everything is done.
    fn synchronize(&self) -> Result<()>;

    /// Marks this moment.
    fn record(&self) -> Result<Event>;

    /// Milliseconds between two moments; waits for the later one.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32>;

    /// From now on launches, copies within the device and zeroing are recorded instead of done. What cannot be recorded
    /// (allocating, loading kernels, copies from and to the host, waiting) fails meanwhile.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording, also where it failed.
    fn end_capture(&self) -> Result<Captured>;

    /// Does what was recorded by this driver.
    ///
    /// # Safety
    /// - As for each [`launch`](Self::launch) that was recorded.
    unsafe fn replay(&self, captured: &Captured) -> Result<()>;
}

/// Which launches may overlap: all but those that read through the non-coherent path what a launch may write that is still
/// at work. Such a one is the launch before, or one before that as long as each in between lets the next begin before it has
/// waited. What is read so are pages, and the queries, keys and values of a block.
#[derive(Debug, Default)]
pub(crate) struct LaunchOrder(Mutex<InFlight>);

/// What launches may write that are at work when the next begins.
#[derive(Debug)]
struct InFlight {
    pages: bool,
    /// Addresses of an output of attention.
    output: Range<u64>,
    /// The next launch reads it.
    output_is_read: bool,
}

impl Default for InFlight {
    /// Anything: nothing is known of the launches before.
    fn default() -> Self {
        InFlight { pages: true, output: 0..u64::MAX, output_is_read: false }
    }
}

impl LaunchOrder {
    fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is launched next follows other launches than those seen here: where a recording begins, where it ends, and
    /// behind a replay.
    pub(crate) fn forget(&self) {
        *self.in_flight() = InFlight::default();
    }

    /// The next launch reads these tensors, which are at no place that is written while it runs.
    pub(super) fn reads(&self, tensors: &[Range<u64>]) {
        let mut in_flight = self.in_flight();
        let output = in_flight.output.clone();
        in_flight.output_is_read |= tensors.iter().any(|it| it.start < output.end && output.start < it.end);
    }

    /// The last launch writes this tensor.
    pub(super) fn writes(&self, output: Range<u64>) {
        self.in_flight().output = output;
    }

    /// Calls `launch`, which is told whether a launch of `op` may overlap, while no other one is made. With `pages_are_older`
    /// it reads no page's token that a launch at work may write.
    fn launch(&self, op: Op, pages_are_older: bool, launch: impl FnOnce(bool) -> Result<()>) -> Result<()> {
        let mut in_flight = self.in_flight();
        let ordering = op.ordering();
        let pages_are_read = ordering.reads_constant_pages && !pages_are_older;
        let overlaps = !(in_flight.pages && pages_are_read || in_flight.output_is_read);
        launch(overlaps)?;
        if !(overlaps && ordering.begins_next_early) {
            *in_flight = InFlight { pages: false, output: 0..0, output_is_read: false };
        }
        in_flight.pages |= ordering.writes_pages;
        Ok(())
    }
}

/// The error for what cannot be recorded.
pub(crate) fn while_capturing(op: &'static str) -> Error {
    Error::Missing { op, needs: "to happen before the capture: run the work once first" }
}

impl dyn Driver {
    /// The entry called `name`, or the error that the device has no such kernel. For launches by name, which no step makes.
    pub fn entry(&self, op: &'static str, name: &str) -> Result<&'static Entry> {
        Entry::named(name).ok_or_else(|| {
            let what = format!("an entry `{name}`");
            Error::Unsupported { device: self.name().to_owned(), op, what }
        })
    }

    /// [`launch`](Self::launch) with a parameter struct.
    ///
    /// # Safety
    /// - `P` is the entry's parameter struct, without padding, and the entry's own rules hold for it.
    pub unsafe fn launch_with<P: Copy>(&self, entry: &'static Entry, dims: Dims, params: &P) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_ordered(entry, dims, params, false) }
    }

    /// The same for a kernel that reads no page's token that the launches before it write.
    ///
    /// # Safety
    /// - As for [`launch_with`](Self::launch_with).
    pub unsafe fn launch_on_older_pages<P: Copy>(
        &self,
        entry: &'static Entry,
        dims: Dims,
        params: &P,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_ordered(entry, dims, params, true) }
    }

    unsafe fn launch_ordered<P: Copy>(
        &self,
        entry: &'static Entry,
        dims: Dims,
        params: &P,
        pages_are_older: bool,
    ) -> Result<()> {
        self.prepare(&[entry])?; // before others on this stream have to wait
        // SAFETY: no padding, so all bytes are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) };
        // SAFETY: the caller's promise.
        let launch = |overlaps| unsafe { self.launch(entry, dims, bytes, overlaps) };
        self.order().launch(entry.op, pages_are_older, launch)
    }
}

/// Checks what every launch must keep: the entry's parameter size and the device's limits.
pub(crate) fn check_launch(
    driver: &dyn Driver,
    entry: &'static Entry,
    dims: &Dims,
    params: &[u8],
) -> Result<()> {
    let fail =
        |reason: String| Err(Error::Launch { device: driver.name().to_owned(), kernel: entry.name, reason });
    if params.len() != entry.param_bytes {
        return fail(format!("takes {} bytes of parameters, got {}", entry.param_bytes, params.len()));
    }
    match dims.check(entry.name, &driver.gpu().limits) {
        Ok(()) => Ok(()),
        Err(error) => fail(error.fault.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Launches an operation, and returns whether it may overlap.
    fn launch(order: &LaunchOrder, op: Op, pages_are_older: bool) -> bool {
        let mut may = true;
        let launch = |overlaps| {
            may = overlaps;
            Ok(())
        };
        order.launch(op, pages_are_older, launch).unwrap();
        may
    }

    /// Whether the last of some operations may overlap, the first behind a launch that wrote no pages.
    fn overlaps(ops: &[Op]) -> bool {
        let order = LaunchOrder::default();
        launch(&order, Op::Vote, false);
        ops.iter().fold(true, |_, &op| launch(&order, op, false))
    }

    #[test]
    fn what_reads_pages_waits_for_what_writes_them() {
        for reads in [Op::Score, Op::AttendDecode, Op::Gather] {
            assert!(overlaps(&[reads]) && overlaps(&[Op::Append, Op::Vote, reads]));
            for writes in [Op::Append, Op::AppendPool] {
                assert!(!overlaps(&[writes, reads]), "{reads:?} behind {writes:?}");
                // These let the next launch begin before they have waited.
                assert!(!overlaps(&[writes, Op::ScoreStream, reads]));
                assert!(!overlaps(&[writes, Op::Pool, Op::ScoreStream, reads]));
                // What did not overlap has waited.
                assert!(overlaps(&[writes, Op::Gather, reads]));
            }
        }
        assert!(overlaps(&[Op::Append, Op::Pool]) && overlaps(&[Op::AppendPool, Op::AttendPrefill]));
    }

    #[test]
    fn what_reads_an_output_waits_for_it() {
        for (read, may) in [(0..100, true), (90..101, false), (199..300, false), (200..300, true)] {
            let order = LaunchOrder::default();
            launch(&order, Op::Merge, false);
            order.writes(100..200);
            assert!(launch(&order, Op::Pool, false), "reads another tensor");
            order.reads(&[0..1, read.clone()]);
            assert_eq!(launch(&order, Op::Append, false), may, "{read:?}");
            order.reads(&[read]);
            assert!(launch(&order, Op::Append, false), "the output is there");
        }
    }

    #[test]
    fn what_is_not_known_may_have_written_pages() {
        let order = LaunchOrder::default();
        assert!(!launch(&order, Op::Gather, false));
        assert!(launch(&order, Op::Gather, false));
        order.forget();
        assert!(launch(&order, Op::Score, true));
        order.forget();
        assert!(!launch(&order, Op::Score, false));
        order.launch(Op::Append, false, |_| Err(while_capturing("waiting"))).unwrap_err();
        assert!(launch(&order, Op::Gather, false), "a launch that failed wrote nothing");
    }
}
