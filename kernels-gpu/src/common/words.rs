//! Pieces of `W` words, 2 or 4, moved by one access; `W` is known when compiled.

use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;

fn first<const W: usize, const N: usize>(from: [u32; N]) -> [u32; W] {
    let mut words = [0; W];
    for w in 0..W {
        words[w] = from[w];
    }
    words
}

/// Loads a piece of a constant row that is read once.
///
/// # Safety
/// - As for [`GlobalPtr::load_constant_row`].
#[track_caller]
pub unsafe fn load_row<T, const W: usize>(at: GlobalPtr<T>) -> [u32; W] {
    if W == 4 {
        first(at.cast::<V4<u32>>().load_constant_row().0)
    } else {
        first(at.cast::<V2<u32>>().load_constant_row().0)
    }
}

/// Loads a piece from shared memory.
///
/// # Safety
/// - As for [`Shared::load`].
#[track_caller]
pub unsafe fn load_shared<const W: usize>(at: Shared<u32>) -> [u32; W] {
    if W == 4 { first(at.cast::<V4<u32>>().load().0) } else { first(at.cast::<V2<u32>>().load().0) }
}

/// Stores a piece to shared memory.
///
/// # Safety
/// - As for [`Shared::store`].
#[track_caller]
pub unsafe fn store_shared<const W: usize>(at: Shared<u32>, words: [u32; W]) {
    if W == 4 {
        at.cast::<V4<u32>>().store(V4(first(words)));
    } else {
        at.cast::<V2<u32>>().store(V2(first(words)));
    }
}
