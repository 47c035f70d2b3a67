//! *Splits*: a list is cut into several, which different blocks attend to at the same time; each leaves a [`Partial`] of every
//! query row in the workspace, and these are merged in a fixed order.
//!
//! A *unit* is what a block has query rows of: up to 8 of a KV head of a row.

use super::list::List;
use crate::common::element::Element;
use crate::common::softmax::{Partial, log_sum_exp};
use crate::ops::attend::AttendParams;
use crate::simt::data::{V2, V4};

/// Query rows of a unit: the columns of one product.
const ROWS: u64 = 8;

/// The splits of one unit's list.
#[derive(Clone, Copy)]
pub struct Splits {
    pub unit: u32,
    /// How many they are.
    pub count: u32,
}

impl Splits {
    /// Where query row `row` of a split lies in `partial_stats`, and times `head_dim` in `partial`.
    fn offset(self, split: u32, row: u32) -> u64 {
        (self.unit as u64 * self.count as u64 + split as u64) * ROWS + row as u64
    }

    /// Stores the largest logit and the sum of a query row.
    ///
    /// # Safety
    /// - The workspace has room for the unit's splits.
    #[track_caller]
    pub unsafe fn store_stats<T>(self, params: &AttendParams<T>, split: u32, row: u32, max: f32, sum: f32) {
        params.partial_stats.add(self.offset(split, row)).store(V2([max, sum]));
    }

    /// Stores four adjacent dimensions of a query row, from `dimension` on.
    ///
    /// # Safety
    /// - As for [`store_stats`](Self::store_stats).
    #[track_caller]
    pub unsafe fn store_quad<T>(
        self,
        params: &AttendParams<T>,
        split: u32,
        row: u32,
        head_dim: u32,
        (dimension, quad): (u32, [f32; 4]),
    ) {
        let at = self.offset(split, row) * head_dim as u64 + dimension as u64;
        params.partial.add(at).cast::<V4<f32>>().store(V4(quad));
    }

    /// Merges four dimensions, from `dimension` on, of a query row over the splits `first`, `first + step`, …; `N` at a time are
    /// in flight.
    ///
    /// # Safety
    /// - All splits have stored theirs, and that is visible.
    #[track_caller]
    pub unsafe fn merge<T, const N: usize>(
        self,
        params: &AttendParams<T>,
        row: u32,
        head_dim: u32,
        dimension: u32,
        (first, step): (u32, u32),
    ) -> Partial {
        Partial::merged::<N>(first, self.count, step, |split| {
            let at = self.offset(split, row);
            let [max, sum] = params.partial_stats.add(at).load().0;
            let out = params.partial.add(at * head_dim as u64 + dimension as u64).cast::<V4<f32>>();
            Partial { max, sum, out: out.load().0 }
        })
    }
}

/// Writes four dimensions of query row `row` of a KV head, from `dimension` on, and with the first of them its log-sum-exp.
///
/// # Safety
/// - The row is one of the list's.
#[track_caller]
pub unsafe fn finish<T: Element>(
    params: &AttendParams<T>,
    list: &List,
    kv_head: u32,
    row: u32,
    head_dim: u32,
    dimension: u32,
    partial: &Partial,
) {
    let (at, _) = params.query_row(list, kv_head, row);
    params.store_out(at * head_dim as u64 + dimension as u64, partial.finish());
    if dimension == 0 {
        params.store_lse(at, log_sum_exp(partial.max, partial.sum));
    }
}
