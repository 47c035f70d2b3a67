//! Stacks of lanes.

use corosensei::stack::{DefaultStack, Stack, StackPointer};

/// A stack whose top is shifted by a multiple of 192 bytes. Stacks are page-aligned; unshifted, the tops of all lanes
/// fall into the same few cache sets, and switching among 32 of them costs three times as much.
pub(crate) struct LaneStack {
    stack: DefaultStack,
    shift: usize,
}

impl LaneStack {
    pub fn new(bytes: usize, lane: usize) -> LaneStack {
        let stack = DefaultStack::new(bytes + 4096).expect("no memory for the stack of an emulated thread");
        LaneStack { stack, shift: lane * 192 % 4096 }
    }
}

// SAFETY: the base is moved down by less than the 4096 bytes asked for in addition, stays a multiple of 64, and the
// memory between it and the limit belongs to the stack.
unsafe impl Stack for LaneStack {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.stack.base().get() - self.shift).expect("a stack is not at address 0")
    }

    fn limit(&self) -> StackPointer {
        self.stack.limit()
    }
}
