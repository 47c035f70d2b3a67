//! Products of warpgroups: registers that are under way, and what the tensor cores may see of shared memory.
//!
//! Each warp multiplies its own 16 rows when it starts a product; the result is kept aside, and the accumulators are NaN
//! until somebody waits. What is checked:
//!
//! - a product without `fence` behind the last wait, a wait with products that no `commit` has closed, a block that ends with some
//!   under way;
//! - accumulators that are written before the wait, or others than those under way (of which there is one set at a time);
//! - B: bounds, races, and that whoever wrote it has called `fence_writes` since; no write to it before the wait; the same for all
//!   lanes;
//! - warps of a warpgroup that start other products than their neighbours.
//!
//! Accumulators written between `fence` and a product that adds to them go unnoticed.

use super::access::Access;
use super::block::{Block, with};
use super::report::{Fault, Kind, Site};

/// B in shared memory: address, bytes from 8 rows and from 8 columns to the next.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub addr: u32,
    pub row_bytes: u32,
    pub column_bytes: u32,
}

/// What a lane has under way.
#[derive(Clone, Default)]
pub(crate) struct Products {
    /// The accumulators as they will be; empty: nothing is under way.
    accumulators: Vec<f32>,
    /// A fence is behind the last wait.
    is_fenced: bool,
    is_committed: bool,
    /// The lane's two rows of A, of the product that its warp has met for.
    pub rows: [[u32; 8]; 2],
    /// All products so far: their number, and what tells their operands in order.
    history: (u32, u64),
}

/// What accumulators hold while a product is under way: a NaN like no other.
const UNDER_WAY: f32 = f32::from_bits(0x7fd5_4321);

fn are_under_way(d: &[[f32; 4]; 8]) -> bool {
    d.as_flattened().iter().all(|x| x.to_bits() == UNDER_WAY.to_bits())
}

/// Columns of B.
const COLUMNS: usize = 64;

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
        block.products[lane].is_committed = true;
    })
}

/// The running thread's stores so far are known to the tensor cores, once others are ordered behind it.
#[inline(never)]
pub(crate) fn fence_writes() {
    with(|block| {
        if block.options.races {
            block.shadow.fence_writes(block.current);
        }
    })
}

/// The running lane waits: what its accumulators are.
#[inline(never)]
pub(crate) fn wait(d: &mut [[f32; 4]; 8], site: Site) {
    with(|block| {
        let lane = block.current;
        let Products { accumulators, is_fenced: _, is_committed, .. } = block.products[lane].clone();
        block.products[lane].is_fenced = false;
        if accumulators.is_empty() {
            return;
        }
        if !is_committed {
            block.fail(Kind::Warpgroup, "wait for products that no commit has closed".to_owned(), site);
        }
        if !are_under_way(d) {
            let what = "wait with accumulators that are not under way, or were written meanwhile".to_owned();
            block.fail(Kind::Warpgroup, what, site);
        }
        block.products[lane].accumulators.clear();
        d.as_flattened_mut().copy_from_slice(&accumulators);
        block.operands_under_way.retain(|(warp, ..)| *warp != lane / 32);
    })
}

/// The running lane's part of a product whose A its warp has laid down: see [`Block::gather_rows`].
#[inline(never)]
pub(crate) fn multiply(
    d: &mut [[f32; 4]; 8],
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
        products.is_committed = false;
        let (count, hash) = products.history;
        let operand = [b.addr, b.row_bytes, b.column_bytes].map(u64::from);
        let told = operand.into_iter().fold(hash, |hash, x| (hash ^ x).wrapping_mul(0x100_0000_01b3));
        products.history = (count + 1, told);
        if products.accumulators.is_empty() {
            products.accumulators = d.as_flattened().to_vec();
        } else if !are_under_way(d) {
            let what =
                "a product with other accumulators than those under way, or written meanwhile".to_owned();
            block.fail(Kind::Warpgroup, what, site);
        }
        let mut accumulators = std::mem::take(&mut products.accumulators);
        let a = products.rows.map(|row| row.map(&unpack));
        let t = lane % 4;
        for (i, sum) in accumulators.iter_mut().enumerate() {
            let (half, column) = (i / 2 % 2, 8 * (i / 4) + 2 * t + i % 2);
            let column_of_b = block.column(b, column);
            let mut x = if adds { *sum } else { 0.0 };
            for (pair, [a0, a1]) in a[half].into_iter().enumerate() {
                let [b0, b1] = unpack(column_of_b[pair]);
                x += a0 * b0;
                x += a1 * b1;
            }
            *sum = x;
        }
        block.products[lane].accumulators = accumulators;
        d.as_flattened_mut().fill(UNDER_WAY);
        let warp = lane / 32;
        let end = b.addr + b.row_bytes + (COLUMNS as u32 / 8 - 1) * b.column_bytes + 128;
        if !block.operands_under_way.contains(&(warp, b.addr, end)) {
            block.operands_under_way.push((warp, b.addr, end));
        }
    })
}

impl Block {
    /// The two rows of A of every lane of the warp that begins with thread `first`, from words 0 to 3 of its lanes; and checks
    /// of B, whose address and bounds are in words 4 to 8.
    pub fn gather_rows(&mut self, first: usize, site: Site) {
        let fragments: [[u32; 4]; 32] =
            std::array::from_fn(|lane| std::array::from_fn(|i| self.lanes[first + lane].words[i]));
        let [addr, begin, end, row_bytes, column_bytes]: [u32; 5] =
            std::array::from_fn(|i| self.lanes[first].words[4 + i]);
        let others =
            (1..32).find(|lane| self.lanes[first + lane].words[4..9] != self.lanes[first].words[4..9]);
        if let Some(lane) = others {
            self.current = first + lane;
            self.fail(
                Kind::Warpgroup,
                "a product with another B than lane 0 of the warp has".to_owned(),
                site,
            );
        }
        for rows in 0..2 {
            for column in 0..COLUMNS as u32 {
                let at = addr + rows * row_bytes + column / 8 * column_bytes + column % 8 * 16;
                self.shared_access(first, at, (begin, end), 16, Access::Read, site);
                if self.options.races
                    && let Some((byte, thread)) = self.shadow.unfenced(at as usize, 16)
                {
                    self.current = first;
                    let what = format!(
                        "product with shared byte {byte}, which thread {thread} has written without fence_writes behind it"
                    );
                    self.fail(Kind::Warpgroup, what, site);
                }
            }
        }
        for lane in 0..32 {
            let (g, words) = (lane / 4, &mut self.products[first + lane].rows);
            for (pair, word) in (0..8).flat_map(|pair| [(pair, 0), (pair, 1)]) {
                // Pair `p` of a row lies in lane `4 g + p % 4`, word `2 (p / 4)` of the upper row and the next of the lower.
                words[word][pair] = fragments[4 * g + pair % 4][2 * (pair / 4) + word];
            }
        }
    }

    /// The pairs of a column of B.
    fn column(&self, b: Operand, column: usize) -> [u32; 8] {
        let at = b.addr as usize + column / 8 * b.column_bytes as usize + column % 8 * 16;
        let shared = self.shared.as_ptr().cast::<u8>();
        std::array::from_fn(|pair| {
            let byte = at + pair / 4 * b.row_bytes as usize + pair % 4 * 4;
            // SAFETY: `gather_rows` has checked every byte of B.
            unsafe { shared.add(byte).cast::<u32>().read() }
        })
    }

    /// Products are waited for, and all warps of a warpgroup have started the same.
    pub fn check_products(&self) -> Result<(), Fault> {
        let fault = |thread: usize, what: &str| {
            Err(Fault { kind: Kind::Warpgroup, message: format!("{}: {what}", self.describe(thread)) })
        };
        for (thread, products) in self.products.iter().enumerate() {
            if !products.accumulators.is_empty() {
                return fault(thread, "the block ends with products under way");
            }
            let first = thread / 128 * 128;
            if products.history != self.products[first].history {
                return fault(thread, "its products are not those of the first warp of its warpgroup");
            }
            if products.history.0 > 0 && first + 128 > self.products.len() {
                return fault(thread, "a product in a warpgroup of fewer than four warps");
            }
        }
        Ok(())
    }

    /// A product under way that reads any of these bytes of shared memory.
    pub fn is_read_by_product(&self, addr: u32, bytes: usize) -> bool {
        self.operands_under_way.iter().any(|&(_, begin, end)| addr < end && addr + bytes as u32 > begin)
    }
}
