//! Arithmetic and conversions, against definitions that share no code with the emulator.

use super::*;

on_machines! {
    arithmetic_and_conversions, every_f16_and_bf16_survives_its_conversion
}

/// A 16-bit float: exponent and mantissa bits.
#[derive(Clone, Copy)]
struct Format {
    exponent: u32,
    mantissa: u32,
}

const F16: Format = Format { exponent: 5, mantissa: 10 };
const BF16: Format = Format { exponent: 8, mantissa: 7 };

impl Format {
    fn infinity(self) -> u16 {
        (((1 << self.exponent) - 1) << self.mantissa) as u16
    }

    /// The value of non-negative bits, infinity read as the power of two that would come next.
    fn value(self, bits: u16) -> f64 {
        let bias = (1 << (self.exponent - 1)) - 1;
        let exponent = (bits >> self.mantissa) as i32;
        let fraction = (bits & ((1 << self.mantissa) - 1)) as f64 / 2f64.powi(self.mantissa as i32);
        match exponent {
            0 => fraction * 2f64.powi(1 - bias),
            _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
        }
    }

    /// The nearest value, ties to even, by searching all of them.
    fn nearest(self, x: f32) -> u16 {
        if x.is_nan() {
            return 0x7fff;
        }
        let (sign, size) = ((x.is_sign_negative() as u16) << 15, x.abs() as f64);
        if size >= self.value(self.infinity()) {
            return sign | self.infinity();
        }
        let (mut low, mut high) = (0, self.infinity());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.value(middle) <= size { low = middle } else { high = middle }
        }
        let (below, above) = (size - self.value(low), self.value(high) - size);
        let up = above < below || above == below && low % 2 == 1;
        sign | if up { high } else { low }
    }

    /// What the bits stand for.
    fn decode(self, bits: u16) -> f32 {
        let size = bits & 0x7fff;
        let value = match size {
            _ if size > self.infinity() => f64::NAN,
            _ if size == self.infinity() => f64::INFINITY,
            _ => self.value(size),
        };
        if bits >> 15 == 1 { -value as f32 } else { value as f32 }
    }
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// The result of an approximation: exact at the specials, `relative` or `absolute` close elsewhere, and 0 where the true
/// value is too small for a normal number.
fn close(found: f32, want: f64, relative: f64, absolute: f64) -> bool {
    let smallest = f32::MIN_POSITIVE as f64;
    if want.is_nan() {
        return found.is_nan();
    }
    if want.abs() < smallest * (1.0 - relative) {
        return found == 0.0;
    }
    if want.abs() > f32::MAX as f64 * (1.0 + relative) {
        return found.is_infinite() && (found > 0.0) == (want > 0.0);
    }
    let near = (found as f64 - want).abs() <= (want.abs() * relative).max(absolute);
    let at_edge = want.abs() < smallest * (1.0 + relative) && found == 0.0;
    near || at_edge || found.is_infinite() && want.abs() > f32::MAX as f64 * (1.0 - relative)
}

fn interesting_floats() -> Vec<f32> {
    let p = |e: i32| 2f32.powi(e);
    let specials = [
        0.0,
        f32::INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        1.0,
        1.5,
        0.75,
        2.0,
        0.5,
        3.0,
        126.5,
        127.99,
        128.0,
    ];
    // Around the smallest and largest f16, and ties of both formats between an even and an odd neighbour.
    let f16 =
        [65504.0, 65519.0, 65519.996, 65520.0, 65536.0, p(-14), p(-14) - p(-25), p(-24), p(-25), p(-26)];
    let ties = [
        1.0 + p(-11),
        1.0 + 3.0 * p(-11),
        1.5 * p(-24),
        2.5 * p(-24),
        1.0 + p(-8),
        1.0 + 3.0 * p(-8),
        p(-25) * 1.0001,
    ];
    let bits = [
        0x7f80_0001,
        0x7fc0_0000,
        0x7fff_ffff,
        0x7fa5_a5a5,
        1,
        0x007f_ffff,
        0x0000_8000,
        0x0001_8000,
        0x7f7f_8000,
    ];
    let bits = bits.into_iter().map(f32::from_bits);
    let positive: Vec<f32> = specials.into_iter().chain(f16).chain(ties).chain(bits).collect();
    let random = numbers(11, 1 << 32).map(f32::from_bits).take(3000);
    let moderate = numbers(12, 1 << 24).map(|n| (n as f32 / (1 << 23) as f32 - 1.0) * 140.0).take(2000);
    positive.iter().copied().chain(positive.iter().map(|x| -x)).chain(random).chain(moderate).collect()
}

fn arithmetic_and_conversions(on: On) {
    let mut x = interesting_floats();
    let mut y: Vec<f32> = x.iter().rev().copied().collect();
    // Rounding the product first would lose the last term.
    x.push(1.0 + 2f32.powi(-12));
    y.push(-1.0 - 2f32.powi(-12));
    let mut machine = on.machine(Options::default());
    check_arithmetic(&mut machine, &x, &y);
}

/// The last pair is one whose product cannot be rounded before the sum.
fn check_arithmetic(machine: &mut Machine, x: &[f32], y: &[f32]) {
    let n = x.len();
    let params = MathParams {
        x: machine.input("x", x),
        y: machine.input("y", y),
        floats: machine.alloc("floats", 8 * n),
        packed: machine.alloc("packed", 4 * n),
        doubles: machine.alloc("doubles", 3 * n),
        rounded: machine.alloc("rounded", n),
        num_values: n as u32,
        reserved: 0,
    };
    machine.launch("conformance_math", GRID_DIMS, params);
    let floats = machine.read(params.floats, 8 * n);
    let packed = machine.read(params.packed, 4 * n);
    let doubles = machine.read(params.doubles, 3 * n);
    let rounded = machine.read(params.rounded, n);
    let two = |e: i32| 2f64.powi(e);
    for i in 0..n {
        let (x, y) = (x[i], y[i]);
        let flushed = if x.is_subnormal() { 0f32.copysign(x) } else { x } as f64;
        let [ex2, lg2, rcp, fma, f16_x, f16_y, bf16_x, bf16_y] = floats[8 * i..8 * i + 8].try_into().unwrap();
        assert!(close(ex2, flushed.exp2(), two(-22), 0.0), "ex2 {x:e}: {ex2:e}");
        assert!(
            close(lg2, flushed.log2(), two(-22), two(-22)) || lg2 as f64 == flushed.log2(),
            "lg2 {x:e}: {lg2:e}"
        );
        assert!(close(rcp, 1.0 / flushed, two(-23), 0.0), "rcp {x:e}: {rcp:e}");
        let exact = x as f64 * y as f64 + x as f64;
        let ulp = exact.abs() * two(-23) + f32::from_bits(1) as f64;
        let overflow = exact.abs() > f32::MAX as f64 && fma.is_infinite();
        assert!(
            same(fma, exact as f32) || overflow || (fma as f64 - exact).abs() <= ulp,
            "fma {x:e} {y:e}: {fma:e}"
        );

        // In f64, the same bits as here.
        let (wide_x, wide_y) = (x as f64, y as f64);
        let wide = [wide_x * wide_y + wide_x, wide_x.sqrt(), wide_x / wide_y.sqrt()];
        for (found, want) in doubles[3 * i..].iter().zip(wide) {
            let same = found.to_bits() == want.to_bits() || found.is_nan() && want.is_nan();
            assert!(same, "f64 of {x:e} {y:e}: {found:e}, not {want:e}");
        }
        assert!(same(rounded[i], wide[2] as f32), "f64 to f32 of {x:e} {y:e}: {:e}", rounded[i]);

        let (h, b) = ([F16.nearest(x), F16.nearest(y)], [BF16.nearest(x), BF16.nearest(y)]);
        let pair = |[lo, hi]: [u16; 2]| lo as u32 | (hi as u32) << 16;
        assert_eq!(packed[4 * i], pair(h), "f16 of {x:e} {y:e}");
        assert_eq!(packed[4 * i + 1], pair(b), "bf16 of {x:e} {y:e}");
        if !x.is_nan() {
            assert_eq!(packed[4 * i + 2], h[0] as u32, "f16 of {x:e}");
            assert_eq!(packed[4 * i + 3], b[0] as u32, "bf16 of {x:e}");
        }
        let back = [F16.decode(h[0]), F16.decode(h[1]), BF16.decode(b[0]), BF16.decode(b[1])];
        for (found, want) in [f16_x, f16_y, bf16_x, bf16_y].into_iter().zip(back) {
            assert!(same(found, want), "{x:e} {y:e}: {found:e}, not {want:e}");
        }
    }
    let fused = floats[8 * (n - 1) + 3];
    assert_eq!(fused, -(2f32.powi(-12)) - 2f32.powi(-24));
}

fn every_f16_and_bf16_survives_its_conversion(on: On) {
    let decode = |format: Format| (0..=u16::MAX).map(move |bits| format.decode(bits)).filter(|x| !x.is_nan());
    let x: Vec<f32> = decode(F16).chain(decode(BF16)).collect();
    let n = x.len();
    // Two bytes of every value in one cell of the shadow each: the slow check adds nothing here.
    let mut machine = on.machine(Options { global_races: false, ..Options::default() });
    let input = machine.input("x", &x);
    let params = MathParams {
        x: input,
        y: input,
        floats: machine.alloc("floats", 8 * n),
        packed: machine.alloc("packed", 4 * n),
        doubles: machine.alloc("doubles", 3 * n),
        rounded: machine.alloc("rounded", n),
        num_values: n as u32,
        reserved: 0,
    };
    machine.launch("conformance_math", GRID_DIMS, params);
    let floats = machine.read(params.floats, 8 * n);
    let num_f16 = decode(F16).count();
    for (i, &x) in x.iter().enumerate() {
        let back = floats[8 * i + if i < num_f16 { 4 } else { 6 }];
        assert_eq!(back.to_bits(), x.to_bits(), "{x:e}");
    }
}
