//! The mean query of a short block of tokens, and its products with the cached one: what
//! [`append_pool`](mod@crate::append_pool) and [`score`](mod@crate::score) share.
//!
//! A thread has the same two pairs of elements (that RoPE may rotate together) in several heads, so that it needs two
//! angles. It asks for all it needs before it uses any: in decoding, one trip to memory.

/// Longest block of a row.
pub(crate) const MAX_BLOCK_LEN: u32 = 4;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) use machine::{Share, products, sum_of_block};

// Arrays are registers here; zipped iterators would put them in memory.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
#[allow(clippy::needless_range_loop)]
mod machine {
    use crate::element::Element;
    use crate::layout::Tokens;
    use crate::pool::{Cached, EMPTY, PoolParams};
    use crate::rope::{HALF_SPLIT, TwoRows};
    use crate::simt::data::V2;
    use crate::simt::shared::Shared;
    use crate::simt::{thread, warp};

    /// What a thread works on: two pairs of elements in the heads `begin + first`, `begin + first + step`, ...
    #[derive(Clone, Copy)]
    pub struct Share {
        /// The two pairs: `2 unit` and `2 unit + 1`.
        pub unit: u32,
        /// Less than `step`, or the thread has no heads.
        pub first: u32,
        pub step: u32,
        pub begin: u32,
    }

    impl Share {
        /// Its head number `i`, if there is one.
        #[inline(always)]
        fn head(&self, i: usize, num_qo_heads: u32) -> Option<u32> {
            let head = self.begin + self.first + i as u32 * self.step;
            (self.first < self.step && head < num_qo_heads).then_some(head)
        }
    }

    /// What a thread loads of a token.
    #[derive(Clone, Copy)]
    struct Token<const H: usize> {
        /// Two elements each.
        q: [[u32; 2]; H],
        rows: TwoRows,
    }

    impl<const H: usize> Token<H> {
        const ZERO: Token<H> = Token { q: [[0; 2]; H], rows: TwoRows::ZERO };
    }

    /// Two pairs of a head: four elements, two by two.
    #[derive(Clone, Copy)]
    struct Unit {
        /// The first pair, even.
        pair: u32,
        /// First of either two elements.
        at: [u32; 2],
        /// Whether a pair has an element of either two; else each two are a pair.
        is_split: bool,
    }

    impl Unit {
        #[inline(always)]
        fn new<T>(params: &PoolParams<T>, pair: u32) -> Self {
            let is_split = params.rope.pairing == HALF_SPLIT && pair < params.rope.pairs;
            let at = if is_split { [pair, pair + params.rope.pairs] } else { [2 * pair, 2 * pair + 2] };
            Unit { pair, at, is_split }
        }

        /// The elements' values at the place of their pairs, or back.
        #[inline(always)]
        fn swap(self, [[a, b], [c, d]]: [[f32; 2]; 2]) -> [[f32; 2]; 2] {
            if self.is_split { [[a, c], [b, d]] } else { [[a, b], [c, d]] }
        }
    }

    /// Gives `store` each two adjacent elements of the thread's part of the mean, `(head, first element, values)`. Its
    /// products, over up to `H` heads: mean times cached, mean squared, cached squared. `A` tokens are loaded at a time.
    ///
    /// # Safety
    /// - The buffers and tables are as [`PoolParams`] says, the rope tables cover `n_local` and the block, and have an
    ///   even number of pairs.
    /// - `queries` are those of a row, at most [`MAX_BLOCK_LEN`]; `place` its place in the cached tables, or [`EMPTY`].
    #[inline(always)]
    pub unsafe fn products<T: Element, const H: usize, const A: usize>(
        params: &PoolParams<T>,
        queries: Tokens,
        place: u32,
        share: &Share,
        cached: &mut Cached,
        mut store: impl FnMut(u32, u32, [f32; 2]),
    ) -> [f32; 3] {
        let unit = Unit::new(params, 2 * share.unit);
        let at = |head: u32, i: usize| (head * params.head_dim + unit.at[i]) as u64;
        let width = params.num_qo_heads as u64 * params.head_dim as u64;
        let load = |t: u32| {
            let mut token = Token::<H>::ZERO;
            let q = params.q.add((queries.begin + t) as u64 * width);
            for h in 0..H {
                if let Some(head) = share.head(h, params.num_qo_heads) {
                    token.q[h] = [0, 1].map(|i| q.add(at(head, i)).cast::<u32>().load_stream());
                }
            }
            if params.rope.coarse.addr() != 0 {
                let pair = unit.pair.min(params.rope.pairs - 2);
                token.rows = params.rope.two_rows(pair, params.n_local + t);
            }
            token
        };
        // Loaded before anything is used: the first tokens, the cached query and what is known of it.
        let mut ahead = [Token::<H>::ZERO; A];
        for a in 0..A {
            if (a as u32) < queries.len() {
                ahead[a] = load(a as u32);
            }
        }
        let mut olds = [[V2([0.0f32; 2]); 2]; H];
        if place != EMPTY {
            let old = params.cached_queries.add(place as u64 * width);
            for h in 0..H {
                if let Some(head) = share.head(h, params.num_qo_heads) {
                    olds[h] = [0, 1].map(|i| old.add(at(head, i)).cast::<V2<f32>>().load_cached());
                }
            }
            *cached = Cached::load(params, place);
        }
        let mut means = [[[0.0f32; 2]; 2]; H];
        let mut first = 0;
        while first < queries.len() {
            for a in 0..A {
                let t = first + a as u32;
                if t < queries.len() {
                    let token = ahead[a];
                    let angles = token.rows.angles();
                    for h in 0..H {
                        let pairs = unit.swap(token.q[h].map(T::unpack));
                        for i in 0..2 {
                            let (mut x, mut y) = (pairs[i][0], pairs[i][1]);
                            if unit.pair < params.rope.pairs {
                                (x, y) = angles[i].turn((x, y));
                            }
                            means[h][i][0] += x;
                            means[h][i][1] += y;
                        }
                    }
                    if t + (A as u32) < queries.len() {
                        ahead[a] = load(t + A as u32);
                    }
                }
            }
            first += A as u32;
        }
        let scale = 1.0 / queries.len().max(1) as f32;
        let mut products = [0.0; 3];
        for h in 0..H {
            if let Some(head) = share.head(h, params.num_qo_heads) {
                let mean = unit.swap(means[h]);
                for i in 0..2 {
                    let (mean, old) = ([mean[i][0] * scale, mean[i][1] * scale], olds[h][i].0);
                    store(head, unit.at[i], mean);
                    products[0] += mean[0] * old[0] + mean[1] * old[1];
                    products[1] += mean[0] * mean[0] + mean[1] * mean[1];
                    products[2] += old[0] * old[0] + old[1] * old[1];
                }
            }
        }
        products
    }

    /// The sums of `own` over the first `num_warps` warps of the block (at most 32), lanes first, then warps; in all
    /// threads. `place`: \[3, num_warps\].
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - Every thread of the block calls it; none uses `place` otherwise before the block has met again.
    #[inline(always)]
    pub unsafe fn sum_of_block(place: Shared<f32>, num_warps: u32, own: [f32; 3]) -> [f32; 3] {
        let (warp_id, lane) = (warp::warp_id(), warp::lane_id());
        for i in 0..3 {
            let sum = warp::reduce_add_f32(own[i]);
            if lane == 0 && warp_id < num_warps {
                place.add(i as u32 * num_warps + warp_id).store(sum);
            }
        }
        thread::sync_threads();
        let mut sums = [0.0; 3];
        for i in 0..3 {
            let of_warp = if lane < num_warps { place.add(i as u32 * num_warps + lane).load() } else { 0.0 };
            sums[i] = warp::reduce_add_f32(of_warp);
        }
        sums
    }
}
