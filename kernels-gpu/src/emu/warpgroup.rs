//! Products of warpgroups: registers that are under way, and what the tensor cores may see of shared memory.
//!
//! Each warp multiplies its own 16 rows when it starts a product; the result is kept aside, and the accumulators are NaN
//! until somebody waits for them. What is checked:
//!
//! - a product without `fence` behind the last wait, a wait with products that no `commit` has closed or that it leaves under way, a
//!   block that ends with some under way;
//! - accumulators that are written before the wait, or of which a part belongs to others;
//! - operands in shared memory: bounds, races, and a `fence_writes` between every write and the product, by who wrote it or by all lanes
//!   that multiply; no write to them before the wait; the same for all lanes. Every warp is taken to read all 64 rows of A;
//! - warps of a warpgroup that start other products than their neighbours;
//! - registers of a warpgroup: no number that there is not, no other one for some of its threads, no more than a block has.
//!
//! Accumulators written between `fence` and a product that adds to them go unnoticed.

use std::ops::Range;

use super::access::Access;
use super::block::{Block, with};
use super::report::{Fault, Kind, Site};
use crate::limits::{WARPGROUP, WARPGROUP_ROWS};

/// B in shared memory: see [`Columns`](crate::simt::warpgroup::Columns). Or A, whose rows are its columns then.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub addr: u32,
    pub row_bytes: u32,
    pub column_bytes: u32,
    /// How many times 8 columns there are.
    pub fragments: u32,
    pub is_by_rows: bool,
    pub is_swizzled: bool,
}

impl Operand {
    pub fn words(self) -> [u32; 5] {
        let layout = 2 * self.is_swizzled as u32 + self.is_by_rows as u32;
        [self.addr, self.row_bytes, self.column_bytes, self.fragments, layout]
    }

    /// A, of the words that lanes lay down: bounds, address, stride.
    pub fn of_rows([_, _, addr, row_bytes]: [u32; 4]) -> Self {
        Operand {
            addr,
            row_bytes: 0,
            column_bytes: row_bytes,
            fragments: WARPGROUP_ROWS / 8,
            is_by_rows: false,
            is_swizzled: true,
        }
    }

    fn from_words([addr, row_bytes, column_bytes, fragments, layout]: [u32; 5]) -> Self {
        let (is_swizzled, is_by_rows) = (layout / 2 == 1, layout % 2 == 1);
        Operand { addr, row_bytes, column_bytes, fragments, is_by_rows, is_swizzled }
    }

    /// Where the piece of 16 bytes lies that holds a value, and which of its eight values it is.
    fn piece(&self, row: u32, column: u32) -> (u32, u32) {
        let (lines, within) = if self.is_by_rows { (row, column) } else { (column, row) };
        let at = match (self.is_swizzled, self.is_by_rows) {
            (false, _) => row / 8 * self.row_bytes + column / 8 * self.column_bytes + lines % 8 * 16,
            (true, true) => {
                row / 8 * self.row_bytes
                    + column / 64 * self.column_bytes
                    + lines % 8 * 128
                    + within % 64 / 8 * 16
            }
            (true, false) => column / 8 * self.column_bytes + lines % 8 * 128 + within / 8 * 16,
        };
        let at = self.addr.wrapping_add(at);
        (if self.is_swizzled { at ^ (at >> 7 & 7) << 4 } else { at }, within % 8)
    }

    /// Every piece.
    fn pieces(self) -> impl Iterator<Item = u32> {
        let columns = 8 * self.fragments;
        let [row_step, column_step] = if self.is_by_rows { [1, 8] } else { [8, 1] };
        (0..16).step_by(row_step).flat_map(move |row| {
            (0..columns).step_by(column_step).map(move |column| self.piece(row, column).0)
        })
    }

    /// A range of bytes that holds all pieces.
    fn hull(self) -> (u32, u32) {
        let (begin, last) = self.pieces().fold((u32::MAX, 0), |(low, high), at| (low.min(at), high.max(at)));
        (begin, last + 16)
    }
}

/// Accumulators under way.
struct Set {
    id: u32,
    /// As they will be.
    values: Vec<f32>,
    /// The group of the last product.
    group: u32,
}

/// What a lane has under way.
#[derive(Default)]
pub(crate) struct Products {
    sets: Vec<Set>,
    /// Sets so far.
    num_sets: u32,
    /// Groups that a commit has closed; that under way is the next.
    groups: u32,
    /// A fence is behind the last wait.
    is_fenced: bool,
    /// The lane's two rows of A, of the product that its warp has met for.
    pub rows: [[u32; 8]; 2],
    /// All products so far: their number, and what tells their operands in order.
    history: (u32, u64),
    /// Registers that its thread has asked for; 0: it has not.
    registers: u32,
}

/// What accumulators hold while a product is under way: NaNs like no others, with the number of their set.
const UNDER_WAY: u32 = 0x7fd5_0000;

/// Registers of an SM.
const REGISTERS: u32 = 1 << 16;

/// The number of the set that all of `d` belong to.
fn set_of(d: &[[f32; 4]]) -> Option<u32> {
    let bits = d[0][0].to_bits();
    let is_one = bits & 0xffff_0000 == UNDER_WAY && d.as_flattened().iter().all(|x| x.to_bits() == bits);
    is_one.then_some(bits & 0xffff)
}

fn is_any_under_way(d: &[[f32; 4]]) -> bool {
    d.as_flattened().iter().any(|x| x.to_bits() & 0xffff_0000 == UNDER_WAY)
}

#[inline(never)]
pub(crate) fn fence() {
    with(|block| {
        let lane = block.current;
        block.products[lane].is_fenced = true;
    })
}

#[inline(never)]
pub(crate) fn commit() {
    with(|block| {
        let lane = block.current;
        block.products[lane].groups += 1;
    })
}

/// The running thread's stores so far, and what it knows of those of others, are known to the tensor cores: for the products of
/// threads that are ordered behind a store's own thread, and for the running thread's.
#[inline(never)]
pub(crate) fn fence_writes() {
    with(|block| {
        if block.options.races {
            block.shadow.fence_writes(block.current);
        }
    })
}

/// The running thread's warpgroup will have so many registers a thread.
#[inline(never)]
pub(crate) fn set_registers(registers: u32, site: Site) {
    with(|block| {
        if !registers.is_multiple_of(8) || !(24..=256).contains(&registers) {
            let what = format!("{registers} registers a thread, no multiple of 8 from 24 to 256");
            block.fail(Kind::Warpgroup, what, site);
        }
        let lane = block.current;
        let before = std::mem::replace(&mut block.products[lane].registers, registers);
        if before != 0 {
            let what = format!("{registers} registers a thread, which has asked for {before} before");
            block.fail(Kind::Warpgroup, what, site);
        }
    })
}

/// The running lane waits until no more than the last `pending` groups are under way: what its accumulators are.
#[inline(never)]
pub(crate) fn wait(d: &mut [[f32; 4]], pending: u32, site: Site) {
    with(|block| {
        let lane = block.current;
        let products = &mut block.products[lane];
        products.is_fenced = false;
        let (groups, ended) = (products.groups, products.groups.saturating_sub(pending));
        if products.sets.is_empty() {
            return;
        }
        let set = set_of(d).and_then(|id| products.sets.iter().position(|set| set.id == id));
        let Some(set) = set else {
            let what = "wait with accumulators that are not under way, or were written meanwhile".to_owned();
            block.fail(Kind::Warpgroup, what, site);
        };
        let set = products.sets.swap_remove(set);
        if set.group >= groups {
            block.fail(Kind::Warpgroup, "wait for products that no commit has closed".to_owned(), site);
        }
        if set.group >= ended {
            let what = format!("wait for accumulators that may be among the {pending} groups under way");
            block.fail(Kind::Warpgroup, what, site);
        }
        d.as_flattened_mut().copy_from_slice(&set.values);
        block.operands_under_way.retain(|operand| operand.warp != lane / 32 || operand.group >= ended);
    })
}

/// Bytes of shared memory that a product of a warp may still read.
pub(crate) struct OperandUnderWay {
    warp: usize,
    group: u32,
    begin: u32,
    end: u32,
}

/// The running lane's part of a product whose A its warp has laid down ([`Block::gather_rows`]), or found in shared memory as `a`
/// ([`Block::find_rows`]).
#[inline(never)]
pub(crate) fn multiply(
    d: &mut [[f32; 4]],
    a: Option<Operand>,
    b: Operand,
    adds: bool,
    unpack: impl Fn(u32) -> [f32; 2],
    site: Site,
) {
    with(|block| {
        let lane = block.current;
        let products = &mut block.products[lane];
        if !products.is_fenced {
            let what = "a product without warpgroup::fence behind the last wait".to_owned();
            block.fail(Kind::Warpgroup, what, site);
        }
        let (count, hash) = products.history;
        let operands = a.into_iter().chain([b]).flat_map(Operand::words).map(u64::from);
        let told = operands.fold(hash, |hash, x| (hash ^ x).wrapping_mul(0x100_0000_01b3));
        products.history = (count + 1, told);
        let index = match set_of(d).and_then(|id| products.sets.iter().position(|set| set.id == id)) {
            Some(index) => index,
            None if is_any_under_way(d) => {
                let what = "a product with accumulators of which some are under way for others, or were written meanwhile";
                block.fail(Kind::Warpgroup, what.to_owned(), site);
            }
            None => {
                let id = products.num_sets % 0x1_0000;
                products.num_sets += 1;
                products.sets.push(Set { id, values: d.as_flattened().to_vec(), group: 0 });
                products.sets.len() - 1
            }
        };
        let (set, group) = (&mut products.sets[index], products.groups);
        set.group = group;
        if set.values.len() != 4 * d.len() {
            let what = "a product with a part of the accumulators that are under way".to_owned();
            block.fail(Kind::Warpgroup, what, site);
        }
        let (id, mut values) = (set.id, std::mem::take(&mut set.values));
        let rows = products.rows.map(|row| row.map(&unpack));
        let t = lane % 4;
        for fragment in 0..d.len() {
            for side in 0..2 {
                let column = block.column(b, 8 * fragment + 2 * t + side).map(&unpack);
                for half in 0..2 {
                    let sum = &mut values[4 * fragment + 2 * half + side];
                    let mut x = if adds { *sum } else { 0.0 };
                    for ([a0, a1], [b0, b1]) in rows[half].into_iter().zip(column) {
                        x += a0 * b0;
                        x += a1 * b1;
                    }
                    *sum = x;
                }
            }
        }
        block.products[lane].sets[index].values = values;
        d.as_flattened_mut().fill(f32::from_bits(UNDER_WAY | id));
        if lane % 32 == 0 {
            for operand in a.into_iter().chain([b]) {
                let (begin, end) = operand.hull();
                block.operands_under_way.push(OperandUnderWay { warp: lane / 32, group, begin, end });
            }
        }
    })
}

impl Block {
    /// The two rows of A of every lane of the warp that begins with thread `first`, from words 0 to 3 of its lanes; and checks
    /// of B, which words 4 to 10 describe.
    pub fn gather_rows(&mut self, first: usize, site: Site) {
        let fragments: [[u32; 4]; 32] =
            std::array::from_fn(|lane| std::array::from_fn(|i| self.lanes[first + lane].words[i]));
        self.check_columns(first, site);
        for lane in 0..32 {
            let (g, words) = (lane / 4, &mut self.products[first + lane].rows);
            for (pair, word) in (0..8).flat_map(|pair| [(pair, 0), (pair, 1)]) {
                // Pair `p` of a row lies in lane `4 g + p % 4`, word `2 (p / 4)` of the upper row and the next of the lower.
                words[word][pair] = fragments[4 * g + pair % 4][2 * (pair / 4) + word];
            }
        }
    }

    /// The same from shared memory, where words 0 to 3 of the lanes say that A lies; and checks of both operands.
    pub fn find_rows(&mut self, first: usize, site: Site) {
        let words: [u32; 4] = std::array::from_fn(|i| self.lanes[first].words[i]);
        self.check_alike(first, 0..4, "A", site);
        let a = Operand::of_rows(words);
        self.check_operand(first, a, (words[0], words[1]), site);
        self.check_columns(first, site);
        for lane in 0..32 {
            let upper = first % WARPGROUP as usize / 2 + lane / 4;
            let rows = [self.column(a, upper), self.column(a, upper + 8)];
            self.products[first + lane].rows = rows;
        }
    }

    /// Checks of B.
    fn check_columns(&mut self, first: usize, site: Site) {
        let [begin, end, b @ ..]: [u32; 7] = std::array::from_fn(|i| self.lanes[first].words[4 + i]);
        self.check_alike(first, 4..11, "B", site);
        self.check_operand(first, Operand::from_words(b), (begin, end), site);
    }

    /// All lanes of a warp have the same operand.
    fn check_alike(&mut self, first: usize, words: Range<usize>, what: &str, site: Site) {
        let own = &self.lanes[first].words[words.clone()];
        let other = (1..32).find(|lane| &self.lanes[first + lane].words[words.clone()] != own);
        if let Some(lane) = other {
            self.current = first + lane;
            let what = format!("a product with another {what} than lane 0 of the warp has");
            self.fail(Kind::Warpgroup, what, site);
        }
    }

    /// Bounds, races and fences of an operand.
    fn check_operand(&mut self, first: usize, operand: Operand, bounds: (u32, u32), site: Site) {
        for at in operand.pieces() {
            self.shared_access(first, at, bounds, 16, Access::Read, site);
            if self.options.races
                && let Some((byte, thread)) = self.shadow.unfenced(at as usize, 16, first..first + 32)
            {
                self.current = first;
                let what = format!(
                    "product with shared byte {byte}, which thread {thread} has written without fence_writes behind it"
                );
                self.fail(Kind::Warpgroup, what, site);
            }
        }
    }

    /// The pairs of a column of B, or of a row of A.
    fn column(&self, b: Operand, column: usize) -> [u32; 8] {
        let shared = self.shared.as_ptr().cast::<u16>();
        let value = |row: u32| {
            let (piece, within) = b.piece(row, column as u32);
            // SAFETY: `check_operand` has checked every byte of it.
            u32::from(unsafe { shared.add((piece / 2 + within) as usize).read() })
        };
        std::array::from_fn(|pair| value(2 * pair as u32) | value(2 * pair as u32 + 1) << 16)
    }

    /// Products are waited for, and all warps of a warpgroup have started the same.
    pub fn check_products(&self) -> Result<(), Fault> {
        let fault = |thread: usize, what: &str| {
            Err(Fault { kind: Kind::Warpgroup, message: format!("{}: {what}", self.describe(thread)) })
        };
        for (thread, products) in self.products.iter().enumerate() {
            if !products.sets.is_empty() {
                return fault(thread, "the block ends with products under way");
            }
            let first = thread - thread % WARPGROUP as usize;
            if products.registers != self.products[first].registers {
                return fault(thread, "its registers are not those of the first warp of its warpgroup");
            }
            if products.history != self.products[first].history {
                return fault(thread, "its products are not those of the first warp of its warpgroup");
            }
            if products.history.0 > 0 && first + WARPGROUP as usize > self.products.len() {
                return fault(thread, "a product in a warpgroup of fewer than four warps");
            }
        }
        let registers: u32 = self.products.iter().map(|products| products.registers).sum();
        let threads = self.products.len() as u32;
        let launched = threads * (REGISTERS / threads / 8 * 8);
        if registers > launched {
            let message = format!("the threads of a block ask for {registers} registers, it has {launched}");
            return Err(Fault { kind: Kind::Warpgroup, message });
        }
        Ok(())
    }

    /// A product under way that reads any of these bytes of shared memory.
    pub fn is_read_by_product(&self, addr: u32, bytes: usize) -> bool {
        self.operands_under_way
            .iter()
            .any(|operand| addr < operand.end && addr + bytes as u32 > operand.begin)
    }
}
