//! Live allocations, by the number in their addresses.
//!
//! Numbers are given out in order, so that an address of freed memory leads nowhere; what is kept is the live ones alone.
//! After 2²⁴ allocations numbers start again, with those that are free.

/// Numbers have so many bits.
const BITS: u32 = 24;

struct Slot<T> {
    number: u32,
    thing: Option<T>,
}

/// Things with numbers from 1 on, each in a slot while it lives. Slots are used again, numbers are not.
pub(super) struct Slots<T> {
    slots: Vec<Slot<T>>,
    spare: Vec<u32>,
    /// Slot + 1 of a number, at the number's low bits or behind that; 0: none. At most half of it is in use.
    table: Vec<u32>,
    /// The number given out last, and whether all have been.
    last: u32,
    used_all: bool,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Slots { slots: Vec::new(), spare: Vec::new(), table: vec![0; 8], last: 0, used_all: false }
    }
}

impl<T> Slots<T> {
    /// Takes a thing in; returns its number.
    pub fn insert(&mut self, thing: T) -> u32 {
        let live = self.slots.len() - self.spare.len();
        assert!(live + 1 < 1 << BITS, "more than 2^{BITS} emulated allocations at a time");
        loop {
            self.last = (self.last + 1) % (1 << BITS);
            self.used_all |= self.last == 0;
            if self.last != 0 && self.find(self.last).is_none() {
                break;
            }
        }
        let new = Slot { number: self.last, thing: Some(thing) };
        let slot = match self.spare.pop() {
            Some(slot) => {
                self.slots[slot as usize] = new;
                slot
            }
            None => {
                self.slots.push(new);
                self.slots.len() as u32 - 1
            }
        };
        if 2 * (live + 1) > self.table.len() {
            self.table = vec![0; 2 * self.table.len()];
            for slot in 0..self.slots.len() {
                if self.slots[slot].thing.is_some() {
                    self.enter(slot as u32);
                }
            }
        } else {
            self.enter(slot);
        }
        self.last
    }

    /// Puts a slot into the table.
    fn enter(&mut self, slot: u32) {
        let mask = self.table.len() - 1;
        let mut at = self.slots[slot as usize].number as usize & mask;
        while self.table[at] != 0 {
            at = (at + 1) & mask;
        }
        self.table[at] = slot + 1;
    }

    /// Place of a number in the table.
    #[inline]
    fn place(&self, number: u32) -> Option<usize> {
        let mask = self.table.len() - 1;
        let mut at = number as usize & mask;
        loop {
            let slot = self.table[at].checked_sub(1)?;
            if self.slots[slot as usize].number == number {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
    }

    /// The slot of a number, if that is in use.
    #[inline]
    pub fn find(&self, number: u32) -> Option<usize> {
        Some(self.table[self.place(number)?] as usize - 1)
    }

    /// What is in a slot.
    #[inline]
    pub fn get(&self, slot: usize) -> Option<&T> {
        self.slots[slot].thing.as_ref()
    }

    /// What has a number, to change it.
    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let slot = self.find(number)?;
        self.slots[slot].thing.as_mut()
    }

    /// Ends the use of a number.
    pub fn remove(&mut self, number: u32) -> Option<T> {
        let mut hole = self.place(number)?;
        let slot = self.table[hole] - 1;
        // What lies behind it moves up, unless that would be before its own place.
        let mask = self.table.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(other) = self.table[at].checked_sub(1) else { break };
            let home = self.slots[other as usize].number as usize;
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.table[hole] = other + 1;
                hole = at;
            }
        }
        self.table[hole] = 0;
        self.spare.push(slot);
        self.slots[slot as usize].thing.take()
    }

    /// Whether a number is not in use, but was.
    pub fn is_gone(&self, number: u32) -> bool {
        number != 0 && (number <= self.last || self.used_all) && self.find(number).is_none()
    }

    /// All slots, empty ones too.
    pub fn iter(&self) -> impl Iterator<Item = Option<&T>> {
        self.slots.iter().map(|slot| slot.thing.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_used_again_and_numbers_are_not() {
        let mut slots = Slots::default();
        let kept = slots.insert('a');
        let mut last = kept;
        for _ in 0..1000 {
            let number = slots.insert('b');
            assert!(number > last && !slots.is_gone(number));
            assert_eq!(slots.remove(number), Some('b'));
            assert!(slots.is_gone(number) && slots.find(number).is_none() && slots.remove(number).is_none());
            last = number;
        }
        assert_eq!(slots.iter().count(), 2);
        assert!(!slots.is_gone(last + 1) && !slots.is_gone(0));
        assert_eq!(slots.find(kept).and_then(|slot| slots.get(slot)), Some(&'a'));
    }

    #[test]
    fn numbers_lead_to_their_things() {
        let (mut slots, mut live) = (Slots::default(), Vec::new());
        let mut state = 1u64;
        for step in 0..20_000u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (state >> 33) as usize;
            // 300 at most, with gaps of all lengths between them.
            if live.len() < 300 && !at.is_multiple_of(3) || live.is_empty() {
                live.push((slots.insert(step), step));
            } else {
                let (number, thing) = live.swap_remove(at % live.len());
                assert_eq!(slots.remove(number), Some(thing));
            }
            if let Some(&(number, thing)) = live.get(at % 300) {
                assert_eq!(slots.find(number).and_then(|slot| slots.get(slot)), Some(&thing));
            }
        }
        for (number, thing) in live {
            assert_eq!(slots.remove(number), Some(thing));
        }
        assert!(slots.iter().count() <= 300 && slots.table.iter().all(|&place| place == 0));
    }

    #[test]
    fn numbers_start_again_when_all_were_used() {
        let mut slots = Slots { last: (1 << BITS) - 2, ..Slots::default() };
        assert_eq!(slots.insert(0), (1 << BITS) - 1);
        assert_eq!(slots.insert(1), 1);
        slots.last = (1 << BITS) - 2;
        assert_eq!(slots.insert(2), 2, "the others live");
        assert!(slots.is_gone(3), "it was used before");
    }
}
