//! Products of a tile's keys with the queries; rotation of keys.

use crate::common::element::Element;
use crate::common::fragment::{A, Accumulator, B, lane};
use crate::common::rope::{ANY_PAIRS, HALF_SPLIT, NATIVE};
use crate::common::words::load_shared;
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::tile::{Key, Work};
use crate::simt::shared::Shared;
use crate::simt::warp;

/// Products of the tile's keys with all query rows: the fragment has places `g` and `g + 8` in its rows.
pub(super) unsafe fn multiply<T: Element, const W: usize, const C: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    queries: Shared<u32>,
    rank: u32,
    keys: &[Key<W, C>; 2],
) -> Accumulator {
    let mut d = Accumulator::ZERO;
    if ROTATE == NATIVE {
        for c in 0..C {
            let query = load_shared::<W>(queries.add((c * 32 * W) as u32));
            for w in (0..W).step_by(2) {
                let words = |half: usize| [keys[half][c][w], keys[half][c][w + 1]];
                dot::<T>(&mut d, [query[w], query[w + 1]], [words(0), words(1)]);
            }
        }
        return d;
    }
    // A place that nobody sees, or a wrong rank, may be rotated by any angle.
    let position =
        |half: u32| warp::shuffle_idx(warp::FULL, rank, 8 * half + lane().g).min(work.params.last_position);
    let positions = [position(0), position(1)];
    // Of high halves with high halves, and of either with the other's low halves.
    let mut rest = Accumulator::ZERO;
    let mut first = 2 * W as u32 * lane().t;
    if const { 8 * W * C > 128 } {
        // Behind a shuffle, so that no registers hold from tile to tile what follows from it.
        first = warp::shuffle_xor(warp::FULL, first, 0);
    }
    let rope = &work.params.rope;
    // Two words at a time, one product deep: what is rotated goes to the tensor cores before more is.
    let split = const { ROTATE == HALF_SPLIT || ROTATE == ANY_PAIRS };
    let mut chunk = |c: usize| {
        let mut positions = positions;
        if const { 8 * W * C > 128 } {
            // Behind shuffles, so that the angles of all chunks are not asked for at once: there are no registers for them.
            positions = positions.map(|position| warp::shuffle_xor(warp::FULL, position, 0));
        }
        for w in (0..W).step_by(2) {
            let (mut x, mut y) = ([Split::ZERO; 2], [Split::ZERO; 2]);
            for half in 0..2 {
                if split {
                    for i in 0..2 {
                        let pair = (8 * W * c + 2 * (w + i)) as u32 + first;
                        let angles = if ROTATE == ANY_PAIRS {
                            rope.two_angles_of_any(pair, positions[half])
                        } else {
                            rope.two_angles(pair, positions[half])
                        };
                        let own = T::unpack(keys[half][c][w + i]);
                        let partner = T::unpack(keys[half][c + C / 2][w + i]);
                        let (mut x0, mut y0) = angles[0].turn((own[0], partner[0]));
                        let (mut x1, mut y1) = angles[1].turn((own[1], partner[1]));
                        if ROTATE == ANY_PAIRS {
                            (x0, y0) = if pair < rope.pairs { (x0, y0) } else { (own[0], partner[0]) };
                            (x1, y1) = if pair + 1 < rope.pairs { (x1, y1) } else { (own[1], partner[1]) };
                        }
                        x[half].set(work.params, i, (x0, x1));
                        y[half].set(work.params, i, (y0, y1));
                    }
                } else {
                    let pair = (4 * W * c + w) as u32 + first / 2;
                    // Pairs that are not rotated have no angles.
                    let angles = rope.two_angles(pair.min(rope.pairs.saturating_sub(2)), positions[half]);
                    for i in 0..2 {
                        let own = T::unpack(keys[half][c][w + i]);
                        let turned = angles[i].turn((own[0], own[1]));
                        x[half].set(
                            work.params,
                            i,
                            if pair < rope.pairs { turned } else { (own[0], own[1]) },
                        );
                    }
                }
            }
            dot_split::<T, W, C>(&mut d, &mut rest, queries, c, w, &x);
            if split {
                dot_split::<T, W, C>(&mut d, &mut rest, queries, c + C / 2, w, &y);
            }
        }
    };
    each_below(if split { C / 2 } else { C }, &mut chunk);
    for i in 0..4 {
        d.0[i] = work.params.join_rotated(d.0[i], rest.0[i]);
    }
    d
}

/// Calls `f` with `0..n`, of up to 8, without a loop: the compiler would not unroll one with so long a body, and arrays whose places it
/// does not know lie in memory.
#[inline(always)]
fn each_below(n: usize, f: &mut impl FnMut(usize)) {
    debug_assert!(n <= 8);
    macro_rules! each {
        ($($i:literal)*) => {
            $(
                if $i < n {
                    f($i);
                }
            )*
        };
    }
    each! { 0 1 2 3 4 5 6 7 }
}

/// Two rotated words of a key, in high and low halves.
#[derive(Clone, Copy)]
struct Split {
    high: [u32; 2],
    low: [u32; 2],
}

impl Split {
    const ZERO: Self = Split { high: [0; 2], low: [0; 2] };

    fn set<T: Element>(&mut self, params: &AttendParams<T>, i: usize, (x, y): (f32, f32)) {
        (self.high[i], self.low[i]) = params.split_rotated(x, y);
    }
}

/// `d += k q^T` over two words of chunk `c`, for the keys at places `g` and `g + 8`.
unsafe fn dot<T: Element>(d: &mut Accumulator, query: [u32; 2], [upper, lower]: [[u32; 2]; 2]) {
    T::mma(d, A([upper[0], lower[0], upper[1], lower[1]]), B(query));
}

/// [`dot`] of queries and keys that are both in high and low halves.
unsafe fn dot_split<T: Element, const W: usize, const C: usize>(
    d: &mut Accumulator,
    rest: &mut Accumulator,
    queries: Shared<u32>,
    c: usize,
    w: usize,
    keys: &[Split; 2],
) {
    let query = queries.add((c * 32 * W + w) as u32);
    let (high, low) = (load_shared(query), load_shared(query.add((C * 32 * W) as u32)));
    dot::<T>(d, high, [keys[0].high, keys[1].high]);
    dot::<T>(rest, high, [keys[0].low, keys[1].low]);
    dot::<T>(rest, low, [keys[0].high, keys[1].high]);
}
