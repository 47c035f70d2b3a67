//! Inner loops, written so that the compiler vectorises them for whatever instruction set the caller was
//! compiled for. Callers are `#[multiversion]` functions that pass `FMA` for their target; everything here
//! is inlined into them.

/// Lanes of explicit accumulators: one AVX-512 register, two AVX2 ones, four of SSE or NEON.
pub(super) const LANES: usize = 16;

/// `a * b + c`, fused where the target has the instruction (elsewhere it would be a library call).
#[inline(always)]
pub(super) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` for `x <= 0`, within 2 units in the last place; exact 1 at 0, 0 at negative infinity, NaN at NaN.
///
/// Cody-Waite reduction and the polynomial of Cephes' `expf`; the scaling is split in two so that results
/// below the normal range are rounded, not flushed.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -105.0 { -105.0 } else { x }; // keeps NaN, which `max` would not
    let shifted = madd::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd::<FMA>(n, -LN2_HIGH, x);
    let r = madd::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = madd::<FMA>(p, r, c);
    }
    let p = madd::<FMA>(p * r, r, r) + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// Combines the lanes pairwise.
#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| f(lanes[i], lanes[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| f(eight[i], eight[i + 4]));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

/// Dot products of one row with `R` rows of `rows` (`row.len()` apart). The length is a multiple of 8.
#[inline(always)]
pub(super) fn dots<const R: usize, const FMA: bool>(row: &[f32], rows: &[f32]) -> [f32; R] {
    let len = row.len();
    let mut lanes = [[0.0; LANES]; R];
    let mut i = 0;
    while i + LANES <= len {
        let x: &[f32] = &row[i..i + LANES];
        for (r, lanes) in lanes.iter_mut().enumerate() {
            let y = &rows[r * len + i..][..LANES];
            for l in 0..LANES {
                lanes[l] = madd::<FMA>(x[l], y[l], lanes[l]);
            }
        }
        i += LANES;
    }
    if i < len {
        // A length of 8 more than a multiple of 16.
        let x = &row[i..i + 8];
        for (r, lanes) in lanes.iter_mut().enumerate() {
            let y = &rows[r * len + i..][..8];
            for l in 0..8 {
                lanes[l] = madd::<FMA>(x[l], y[l], lanes[l]);
            }
        }
    }
    lanes.map(|lanes| fold_lanes(lanes, |a, b| a + b))
}

/// Dot products of `row` with all rows of `rows`, times `scale`, into `out`.
#[inline(always)]
pub(super) fn dot_rows<const FMA: bool>(row: &[f32], rows: &[f32], scale: f32, out: &mut [f32]) {
    let len = row.len();
    let mut done = 0;
    while done + 4 <= out.len() {
        let four = dots::<4, FMA>(row, &rows[done * len..]);
        for (o, d) in out[done..done + 4].iter_mut().zip(four) {
            *o = d * scale;
        }
        done += 4;
    }
    for (o, rows) in out[done..].iter_mut().zip(rows[done * len..].chunks_exact(len)) {
        *o = dots::<1, FMA>(row, rows)[0] * scale;
    }
}

/// The largest number of a slice whose length is a multiple of 16; NaN is passed over, -inf if there is
/// nothing else.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in values.chunks_exact(LANES) {
        for l in 0..LANES {
            lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
        }
    }
    fold_lanes(lanes, f32::max)
}

/// Replaces `values` (a multiple of 16 of them) by `exp(value - max)` and returns their sum.
#[inline(always)]
pub(super) fn exp_sum<const FMA: bool>(values: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for chunk in values.chunks_exact_mut(LANES) {
        for l in 0..LANES {
            chunk[l] = exp::<FMA>(chunk[l] - max);
            lanes[l] += chunk[l];
        }
    }
    fold_lanes(lanes, |a, b| a + b)
}

/// A matrix stored by rows.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    /// Elements from a row to the next.
    pub stride: usize,
}

/// `c += a * b` for `a` of `rows x inner`, `b` of `inner x cols`, `c` of `rows x cols` with rows `c_stride`
/// apart; `cols` is a multiple of 8. `WIDE` columns at a time: two registers of the target.
#[inline(always)]
pub(super) fn gemm<const WIDE: usize, const FMA: bool>(
    (rows, inner, cols): (usize, usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    let mut row = 0;
    while row < rows {
        let a = Matrix { data: &a.data[row * a.stride..], stride: a.stride };
        let c = &mut c[row * c_stride..];
        if row + 4 <= rows {
            gemm_rows::<4, WIDE, FMA>((inner, cols), a, b, c, c_stride);
            row += 4;
        } else {
            gemm_rows::<1, WIDE, FMA>((inner, cols), a, b, c, c_stride);
            row += 1;
        }
    }
}

#[inline(always)]
fn gemm_rows<const R: usize, const WIDE: usize, const FMA: bool>(
    (inner, cols): (usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    let mut col = 0;
    while col + WIDE <= cols {
        gemm_tile::<R, WIDE, FMA>(inner, a, b, &mut c[col..], c_stride, col);
        col += WIDE;
    }
    while col < cols {
        gemm_tile::<R, 8, FMA>(inner, a, b, &mut c[col..], c_stride, col);
        col += 8;
    }
}

#[inline(always)]
fn gemm_tile<const R: usize, const W: usize, const FMA: bool>(
    inner: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
    col: usize,
) {
    let mut sums = [[0.0; W]; R];
    let a_rows: [&[f32]; R] = std::array::from_fn(|r| &a.data[r * a.stride..][..inner]);
    // The copy into `xs` is what lets the compiler keep the sums in registers.
    for (i, b_row) in b.data.chunks(b.stride).take(inner).enumerate() {
        let xs: [f32; R] = std::array::from_fn(|r| a_rows[r][i]);
        for (sums, x) in sums.iter_mut().zip(xs) {
            for (sum, b) in sums.iter_mut().zip(&b_row[col..col + W]) {
                *sum = madd::<FMA>(x, *b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in c[r * c_stride..][..W].iter_mut().zip(sums) {
            *c += sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units() {
        for i in 0..1_050_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            let unit = (want * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
            for got in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(got) - want).abs() <= 2.0 * unit, "exp({x}) = {got}, not {want}");
            }
        }
        assert_eq!(exp::<false>(0.0), 1.0);
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
        assert!(exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn gemm_and_dots_match_plain_loops() {
        for (rows, inner, cols) in [(1, 8, 8), (4, 16, 32), (5, 24, 40), (7, 3, 72), (11, 64, 16)] {
            let a: Vec<f32> = (0..rows * inner).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
            let b: Vec<f32> = (0..inner * cols).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
            let mut c = vec![1.0; rows * cols];
            let (ma, mb) = (Matrix { data: &a, stride: inner }, Matrix { data: &b, stride: cols });
            gemm::<16, false>((rows, inner, cols), ma, mb, &mut c, cols);
            for r in 0..rows {
                for j in 0..cols {
                    let want: f32 = (0..inner).map(|i| a[r * inner + i] * b[i * cols + j]).sum();
                    assert_eq!(c[r * cols + j], want + 1.0, "small integers are exact");
                }
            }
        }
        for len in [8, 16, 24, 64, 136, 256] {
            let x: Vec<f32> = (0..len).map(|i| (i % 9) as f32 - 4.0).collect();
            let y: Vec<f32> = (0..len * 6).map(|i| (i % 7) as f32 - 3.0).collect();
            let mut got = [0.0; 6];
            dot_rows::<false>(&x, &y, 2.0, &mut got);
            for (r, got) in got.iter().enumerate() {
                let want: f32 = (0..len).map(|i| x[i] * y[r * len + i]).sum();
                assert_eq!(*got, 2.0 * want);
            }
        }
    }
}
