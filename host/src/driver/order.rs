//! Which launches may overlap the ones before them.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokenselect_kernels::entries::Op;

use crate::error::Result;

/// Which launches may overlap: all but those that read through the non-coherent path what a launch may write that is still
/// at work. Such a one is the launch before, or one before that as long as each in between lets the next begin before it has
/// waited. What is read so are pages, and the queries, keys and values of a block.
#[derive(Debug, Default)]
pub(crate) struct LaunchOrder(Mutex<InFlight>);

/// What launches may write that are at work when the next begins.
#[derive(Debug)]
struct InFlight {
    pages: bool,
    /// Tables of a batch, which kernels read before they wait.
    tables: bool,
    /// Addresses of an output of attention.
    output: Range<u64>,
    /// The next launch reads it.
    output_is_read: bool,
}

impl Default for InFlight {
    /// Anything: nothing is known of the launches before.
    fn default() -> Self {
        InFlight { pages: true, tables: true, output: 0..u64::MAX, output_is_read: false }
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
    pub(crate) fn reads(&self, tensors: &[Range<u64>]) {
        let mut in_flight = self.in_flight();
        let output = in_flight.output.clone();
        in_flight.output_is_read |= tensors.iter().any(|it| it.start < output.end && output.start < it.end);
    }

    /// The next launch begins when all before it have ended.
    pub(crate) fn separates(&self) {
        // As behind a launch that writes what any reads before it waits.
        self.in_flight().tables = true;
    }

    /// The last launch writes this tensor.
    pub(crate) fn writes(&self, output: Range<u64>) {
        self.in_flight().output = output;
    }

    /// Calls `launch`, which is told whether a launch of `op` may overlap, while no other one is made. With `pages_are_older`
    /// it reads no page's token that a launch at work may write.
    pub(super) fn launch(
        &self,
        op: Op,
        pages_are_older: bool,
        launch: impl FnOnce(bool) -> Result<()>,
    ) -> Result<()> {
        let mut in_flight = self.in_flight();
        let ordering = op.ordering();
        let pages_are_read = ordering.reads_constant_pages && !pages_are_older;
        let overlaps = !(in_flight.pages && pages_are_read || in_flight.tables || in_flight.output_is_read);
        launch(overlaps)?;
        if !(overlaps && ordering.begins_next_early) {
            *in_flight = InFlight { pages: false, tables: false, output: 0..0, output_is_read: false };
        }
        in_flight.pages |= ordering.writes_pages;
        in_flight.tables |= ordering.writes_tables;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::while_capturing;
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
    fn a_launch_that_is_separated_does_not_overlap_and_the_next_may() {
        let order = LaunchOrder::default();
        launch(&order, Op::Vote, false);
        order.separates();
        assert!(!launch(&order, Op::TopKChooseInCluster, false));
        assert!(launch(&order, Op::AttendDecode, false));
    }

    #[test]
    #[cfg(feature = "emulator")]
    fn a_device_separates_its_next_launch_alone() {
        let device = crate::Device::emulated();
        let driver = device.driver().unwrap();
        let may_overlap = || launch(driver.order(), Op::Vote, false);
        launch(driver.order(), Op::Gather, false);
        assert!(may_overlap());
        device.clone().separate();
        assert!(!may_overlap() && may_overlap());
        crate::Device::cpu().separate(); // nothing is launched there
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
    fn what_follows_tables_waits_for_them() {
        for next in [Op::Append, Op::ScoreStream, Op::Vote, Op::AttendPrefill, Op::Pool] {
            assert!(!overlaps(&[Op::Translate, next]), "{next:?}");
            assert!(overlaps(&[Op::Translate, Op::Vote, next]), "{next:?}");
        }
    }

    #[test]
    fn what_is_not_known_may_have_written_pages() {
        let order = LaunchOrder::default();
        assert!(!launch(&order, Op::Gather, false));
        assert!(launch(&order, Op::Gather, false));
        order.forget();
        assert!(!launch(&order, Op::Score, false));
        order.launch(Op::Append, false, |_| Err(while_capturing("waiting"))).unwrap_err();
        assert!(launch(&order, Op::Gather, false), "a launch that failed wrote nothing");
    }
}
