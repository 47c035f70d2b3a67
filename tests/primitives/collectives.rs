//! Indices, shuffles, votes, reductions and barriers.

use super::*;

on_machines! {
    indices_and_sizes, shuffles_of_the_whole_warp, collectives_with_masks, barriers_that_order_and_count
}

fn indices_and_sizes(on: On) {
    let (grid, block) = (INDICES_DIMS.grid, INDICES_DIMS.block);
    let threads = INDICES_DIMS.num_threads() as u32;
    for mut machine in on.machines() {
        let out = machine.alloc("out", (INDICES_DIMS.num_blocks() as u32 * threads * 16) as usize);
        machine.launch("conformance_indices", INDICES_DIMS, IndicesParams { out });
        let found = machine.read(out, (INDICES_DIMS.num_blocks() as u32 * threads * 16) as usize);
        let mut rows = found.chunks(16);
        for (bz, by, bx) in cube(grid) {
            for (linear, (z, y, x)) in cube(block).enumerate() {
                let linear = linear as u32;
                let [gx, gy, gz] = grid;
                let [dx, dy, dz] = block;
                let want = [x, y, z, bx, by, bz, dx, dy, dz, gx, gy, gz, linear % 32, linear / 32, linear, 0];
                assert_eq!(rows.next().unwrap(), want);
            }
        }
        assert!(rows.next().is_none());
    }
}

/// (z, y, x) of a box, x running fastest.
fn cube([nx, ny, nz]: [u32; 3]) -> impl Iterator<Item = (u32, u32, u32)> {
    (0..nz).flat_map(move |z| (0..ny).flat_map(move |y| (0..nx).map(move |x| (z, y, x))))
}

fn shuffles_of_the_whole_warp(on: On) {
    let values: [u32; 32] = take(1, 1 << 20);
    for mut machine in on.machines() {
        let params = ShufflesParams {
            values: machine.input("values", &values),
            words: machine.alloc("words", 4 * 32 * 32),
            floats: machine.alloc("floats", 64),
            signed: machine.alloc("signed", 32),
            doubles: machine.alloc("doubles", 32),
        };
        machine.launch("conformance_shuffles", WARP_DIMS, params);
        let words = machine.read(params.words, 4 * 32 * 32);
        for operand in 0..32usize {
            for lane in 0..32usize {
                let at = |kind: usize| words[(kind * 32 + operand) * 32 + lane];
                assert_eq!(at(0), values[operand]);
                assert_eq!(at(1), values[lane ^ operand]);
                assert_eq!(at(2), values[if lane >= operand { lane - operand } else { lane }]);
                assert_eq!(at(3), values[if lane + operand < 32 { lane + operand } else { lane }]);
            }
        }
        let floats = machine.read(params.floats, 64);
        // The sum stays below 2^24 times a power of two that all partial sums share, so it is exact.
        let sum = values.iter().map(|&v| v as u64).sum::<u64>();
        assert!(
            floats[..32]
                .iter()
                .all(|&f| (f as f64 - sum as f64).abs() <= sum as f64 * 32.0 / (1u64 << 24) as f64)
        );
        assert!(
            floats[..32].iter().all(|f| f.to_bits() == floats[0].to_bits()),
            "the same bits in every lane"
        );
        assert!(floats[32..].iter().all(|&f| f == *values.iter().max().unwrap() as f32));
        // Of these every partial sum is exact.
        let double = sum as f64 + (0..32).sum::<u32>() as f64 / 2f64.powi(30);
        assert_eq!(machine.read(params.doubles, 32), [double; 32]);
        let signed = machine.read(params.signed, 32);
        assert!((0..32).all(|lane| signed[lane] == -(values[(lane + 7) % 32] as i32)));
    }
}

fn collectives_with_masks(on: On) {
    let masks = [FULL, 1, 1 << 31, 0xffff, 0xffff_0000, 0x5555_5555, 0x0f0f_00f1, FULL - 1, 0x8000_0001];
    for (case, mask) in masks.into_iter().enumerate() {
        for (kind, values) in
            [take::<32>(case as u64, 1 << 31), [7; 32], [FULL; 32], [8; 32]].into_iter().enumerate()
        {
            let part = |lane: u32| if mask >> lane & 1 == 1 { mask } else { !mask };
            let members = |lane: u32| (0..32u32).filter(move |l| part(lane) >> l & 1 == 1);
            // Each lane asks for another one of its part, some rotated round.
            let sources: [u32; 32] = std::array::from_fn(|lane| {
                let all: Vec<_> = members(lane as u32).collect();
                all[(lane * 5 + kind) % all.len()]
            });
            for mut machine in on.machines() {
                let params = MaskedParams {
                    values: machine.input("values", &values),
                    sources: machine.input("sources", &sources),
                    out: machine.alloc("out", 7 * 32),
                    mask,
                    reserved: 0,
                };
                machine.launch("conformance_masked", WARP_DIMS, params);
                let out = machine.read(params.out, 7 * 32);
                for lane in 0..32u32 {
                    let of = |l: u32| values[l as usize];
                    let odd = members(lane).filter(|&l| of(l) % 2 == 1).fold(0, |bits, l| bits | 1 << l);
                    let want = [
                        of(sources[lane as usize]),
                        odd,
                        (odd != 0) as u32,
                        (odd == part(lane)) as u32,
                        members(lane).fold(0, |sum, l| sum.wrapping_add(of(l))),
                        members(lane).map(of).min().unwrap(),
                        members(lane).map(of).max().unwrap(),
                    ];
                    let got: [u32; 7] = std::array::from_fn(|i| out[i * 32 + lane as usize]);
                    assert_eq!(got, want, "mask {mask:#x} lane {lane}");
                }
            }
        }
    }
}

fn barriers_that_order_and_count(on: On) {
    let mut values: [u32; 128] = take(5, 900);
    values[77] = 5;
    for mut machine in on.machines() {
        let params = BarriersParams {
            consumed: machine.alloc("consumed", 64),
            counts: machine.alloc("counts", 3 * 128),
            values: machine.input("values", &values),
        };
        machine.launch("conformance_barriers", BARRIERS_DIMS, params);
        let consumed = machine.read(params.consumed, 64);
        // Thread 64 + i reads place (64 + i + 1) % 64 of both rounds.
        assert!((0..64).all(|i| consumed[i] == 2 * values[(i + 1) % 64] + 1));
        let odd = values.iter().filter(|&v| v % 2 == 1).count() as u32;
        let counts = machine.read(params.counts, 3 * 128);
        assert!(counts.chunks(3).all(|counts| counts == [odd, 1, 0]));
    }
}
