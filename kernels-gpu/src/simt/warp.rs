//! Collectives of a warp: shuffles, votes, reductions.
//!
//! `mask` has a bit for each lane that takes part. Every lane named calls with the same mask; disjoint parts of a warp
//! may work at the same time. None but [`sync_warp`] orders memory accesses.

use super::data::Word;
use super::imp;

/// All 32 lanes.
pub const FULL: u32 = u32::MAX;

/// Lanes of a warp.
pub const SIZE: u32 = 32;

/// The lane of the thread in its warp, `0..32` (`%laneid`).
#[inline(always)]
pub fn lane_id() -> u32 {
    imp::lane_id()
}

/// The warp of the thread in its block: [`linear_thread_idx`](super::thread::linear_thread_idx)` / 32`.
#[inline(always)]
pub fn warp_id() -> u32 {
    super::thread::linear_thread_idx() / SIZE
}

/// Waits for the lanes of `mask` and orders their memory accesses (`bar.warp.sync`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - `mask` names the calling lane, and all lanes named call with the same mask.
#[inline(always)]
#[track_caller]
pub unsafe fn sync_warp(mask: u32) {
    imp::sync_warp(mask)
}

/// The `value` of lane `lane % 32` (`shfl.sync.idx`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - `mask` names the calling lane, and all lanes named call with the same mask.
/// - `mask` names the lane read.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_idx<W: Word>(mask: u32, value: W, lane: u32) -> W {
    W::from_word(imp::shuffle_idx(mask, value.to_word(), lane))
}

/// The `value` of lane `lane_id() ^ lane_mask` (`shfl.sync.bfly`); the own one if there is no such lane.
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`shuffle_idx`].
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_xor<W: Word>(mask: u32, value: W, lane_mask: u32) -> W {
    W::from_word(imp::shuffle_xor(mask, value.to_word(), lane_mask))
}

/// The `value` of lane `lane_id() - delta` (`shfl.sync.up`); the own one if there is no such lane.
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`shuffle_idx`].
/// - `delta < 32`.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_up<W: Word>(mask: u32, value: W, delta: u32) -> W {
    W::from_word(imp::shuffle_up(mask, value.to_word(), delta))
}

/// The `value` of lane `lane_id() + delta` (`shfl.sync.down`); the own one if there is no such lane.
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`shuffle_idx`].
/// - `delta < 32`.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_down<W: Word>(mask: u32, value: W, delta: u32) -> W {
    W::from_word(imp::shuffle_down(mask, value.to_word(), delta))
}

/// A bit for each lane of `mask` whose `predicate` is true (`vote.sync.ballot`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - `mask` names the calling lane, and all lanes named call with the same mask.
#[inline(always)]
#[track_caller]
pub unsafe fn ballot(mask: u32, predicate: bool) -> u32 {
    imp::ballot(mask, predicate)
}

/// Whether `predicate` is true in any lane of `mask` (`vote.sync.ballot`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`ballot`].
#[inline(always)]
#[track_caller]
pub unsafe fn any(mask: u32, predicate: bool) -> bool {
    ballot(mask, predicate) != 0
}

/// Whether `predicate` is true in all lanes of `mask` (`vote.sync.ballot`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`ballot`].
#[inline(always)]
#[track_caller]
pub unsafe fn all(mask: u32, predicate: bool) -> bool {
    ballot(mask, predicate) == mask
}

/// The wrapping sum of `value` over the lanes of `mask` (`redux.sync.add.u32`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`ballot`].
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_add(mask: u32, value: u32) -> u32 {
    imp::reduce_add(mask, value)
}

/// The smallest `value` over the lanes of `mask` (`redux.sync.min.u32`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`ballot`].
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_min(mask: u32, value: u32) -> u32 {
    imp::reduce_min(mask, value)
}

/// The largest `value` over the lanes of `mask` (`redux.sync.max.u32`).
///
/// *Convergence:* the lanes of `mask`.
///
/// # Safety
/// - As for [`ballot`].
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_max(mask: u32, value: u32) -> u32 {
    imp::reduce_max(mask, value)
}

/// The sum of `value` over the warp, the same bits in every lane (five [`shuffle_xor`], distances 16, 8, 4, 2, 1).
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_add_f32(value: f32) -> f32 {
    let mut sum = value;
    sum += shuffle_xor(FULL, sum, 16);
    sum += shuffle_xor(FULL, sum, 8);
    sum += shuffle_xor(FULL, sum, 4);
    sum += shuffle_xor(FULL, sum, 2);
    sum + shuffle_xor(FULL, sum, 1)
}

/// The sum of `value` over the warp, the same bits in every lane (five times two [`shuffle_xor`], distances 16, 8, 4, 2, 1).
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_add_f64(value: f64) -> f64 {
    let mut sum = value;
    sum += shuffle_xor_f64(sum, 16);
    sum += shuffle_xor_f64(sum, 8);
    sum += shuffle_xor_f64(sum, 4);
    sum += shuffle_xor_f64(sum, 2);
    sum + shuffle_xor_f64(sum, 1)
}

/// [`shuffle_xor`] of the whole warp, the lower half of the bits first.
#[inline(always)]
#[track_caller]
unsafe fn shuffle_xor_f64(value: f64, lane_mask: u32) -> f64 {
    let bits = value.to_bits();
    let low = shuffle_xor(FULL, bits as u32, lane_mask);
    let high = shuffle_xor(FULL, (bits >> 32) as u32, lane_mask);
    f64::from_bits(low as u64 | (high as u64) << 32)
}

/// The largest `value` over the warp, NaN ignored unless all are NaN (five [`shuffle_xor`]).
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[inline(always)]
#[track_caller]
pub unsafe fn reduce_max_f32(value: f32) -> f32 {
    let mut max = value;
    max = max.max(shuffle_xor(FULL, max, 16));
    max = max.max(shuffle_xor(FULL, max, 8));
    max = max.max(shuffle_xor(FULL, max, 4));
    max = max.max(shuffle_xor(FULL, max, 2));
    max.max(shuffle_xor(FULL, max, 1))
}
