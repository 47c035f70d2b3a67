//! Fragments of the tensor core.

use super::*;

on_machines! {
    ldmatrix_plain_and_transposed, mma_f16, mma_bf16, warpgroup_mma_f16, warpgroup_mma_bf16,
    warpgroup_layouts_f16, warpgroup_layouts_bf16
}

fn ldmatrix_plain_and_transposed(on: On) {
    // Element (tile, row, column) is told from all others by its number.
    let element =
        |tile: usize, row: usize, column: usize| (tile * 64 + row * 8 + column) as u32 * 251 % 65536;
    let rows: Vec<_> = (0..32)
        .map(|lane| {
            V4(std::array::from_fn(|i| {
                let at = |column| element(lane / 8, lane % 8, column);
                at(2 * i) | at(2 * i + 1) << 16
            }))
        })
        .collect();
    for mut machine in on.machines() {
        let params = LdMatrixParams { rows: machine.input("rows", &rows), out: machine.alloc("out", 64) };
        machine.launch("conformance_ldmatrix", WARP_SHARED_DIMS, params);
        let out = machine.read(params.out, 64);
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            for tile in 0..4 {
                assert_eq!(out[lane].0[tile], element(tile, g, 2 * t) | element(tile, g, 2 * t + 1) << 16);
                assert_eq!(
                    out[32 + lane].0[tile],
                    element(tile, 2 * t, g) | element(tile, 2 * t + 1, g) << 16
                );
            }
        }
    }
}

/// `a·b + c` in f64, and the f32 results of the tensor core within the error of 16 additions.
fn mma_is_a_product<T: Element>(on: On, name: &str, to_bits: fn(T) -> u16) {
    for seed in 0..4 {
        let mut numbers = numbers(seed, 4001);
        let mut draw = |len: usize| -> Vec<f32> {
            (0..len).map(|_| (numbers.next().unwrap() as f32 - 2000.0) / 512.0).collect()
        };
        let round = |values: Vec<f32>| -> Vec<T> { values.into_iter().map(T::from_f32).collect() };
        let (a, b, c) = (round(draw(256)), round(draw(128)), draw(128));
        let bits = |values: &[T]| values.iter().map(|&v| to_bits(v)).collect::<Vec<_>>();
        for mut machine in on.machines() {
            let params = MmaParams {
                a: machine.input("a", &bits(&a)),
                b: machine.input("b", &bits(&b)),
                c: machine.input("c", &c),
                d: machine.alloc("d", 128),
            };
            machine.launch(name, WARP_DIMS, params);
            let d = machine.read(params.d, 128);
            for row in 0..16 {
                for column in 0..8 {
                    let terms =
                        (0..16).map(|k| a[row * 16 + k].to_f32() as f64 * b[k * 8 + column].to_f32() as f64);
                    let start = c[row * 8 + column] as f64;
                    let want = terms.clone().sum::<f64>() + start;
                    let size = terms.map(f64::abs).sum::<f64>() + start.abs();
                    let error = (d[row * 8 + column] as f64 - want).abs();
                    assert!(error <= 17.0 * size * 2f64.powi(-24), "{name} ({row}, {column}): {error}");
                }
            }
        }
    }
}

fn mma_f16(on: On) {
    mma_is_a_product::<f16>(on, "conformance_mma_f16", f16::to_bits);
}

fn mma_bf16(on: On) {
    mma_is_a_product::<bf16>(on, "conformance_mma_bf16", bf16::to_bits);
}

/// Both products of `conformance_warpgroup_mma` in f64, and the f32 results within the error of their additions.
fn warpgroup_mma_is_a_product<T: Element>(on: On, name: &str, to_bits: fn(T) -> u16) {
    let mut numbers = numbers(7, 4001);
    let mut draw = |len: usize| -> Vec<T> {
        (0..len).map(|_| T::from_f32((numbers.next().unwrap() as f32 - 2000.0) / 512.0)).collect()
    };
    let (a, b) = (draw(64 * 32), draw(32 * 64));
    let bits = |values: &[T]| values.iter().map(|&v| to_bits(v)).collect::<Vec<_>>();
    for mut machine in on.machines() {
        let params = WarpgroupMmaParams {
            a: machine.input("a", &bits(&a)),
            b: machine.input("b", &bits(&b)),
            d: machine.alloc("d", 2 * 64 * 64),
            available: machine.alloc("available", 1),
        };
        machine.launch(name, WARPGROUP_DIMS, params);
        if machine.read(params.available, 1) == [0] {
            println!("SKIPPED: the GPU has no products of warpgroups");
            continue;
        }
        let d = machine.read(params.d, 2 * 64 * 64);
        for (i, &got) in d.iter().enumerate() {
            let (depth, row, column) = (16 * (1 + i / 4096), i / 64 % 64, i % 64);
            let terms =
                (0..depth).map(|k| a[row * 32 + k].to_f32() as f64 * b[k * 64 + column].to_f32() as f64);
            let (want, size) = (terms.clone().sum::<f64>(), terms.map(f64::abs).sum::<f64>());
            // The tensor core aligns the terms of a sum to the largest and cuts what is below.
            let error = (got as f64 - want).abs();
            assert!(error <= 34.0 * size * 2f64.powi(-23), "{name} {depth} ({row}, {column}): {error}");
        }
    }
}

fn warpgroup_mma_f16(on: On) {
    warpgroup_mma_is_a_product::<f16>(on, "conformance_warpgroup_mma_f16", f16::to_bits);
}

fn warpgroup_mma_bf16(on: On) {
    warpgroup_mma_is_a_product::<bf16>(on, "conformance_warpgroup_mma_bf16", bf16::to_bits);
}

/// The products of `conformance_warpgroup_layouts`.
fn warpgroup_layouts<T: Element>(on: On, name: &str, to_bits: fn(T) -> u16) {
    let mut numbers = numbers(11, 4001);
    let mut draw = |len: usize| -> Vec<T> {
        (0..len).map(|_| T::from_f32((numbers.next().unwrap() as f32 - 2000.0) / 512.0)).collect()
    };
    let (a, b, wide) = (draw(64 * 16), draw(16 * 128), draw(16 * 256));
    let bits = |values: &[T]| values.iter().map(|&v| to_bits(v)).collect::<Vec<_>>();
    for mut machine in on.machines() {
        let params = WarpgroupLayoutsParams {
            a: machine.input("a", &bits(&a)),
            b: machine.input("b", &bits(&b)),
            wide: machine.input("wide", &bits(&wide)),
            d: machine.alloc("d", 3 * 64 * 128),
            from_shared: machine.alloc("from_shared", 64 * 256),
            available: machine.alloc("available", 1),
        };
        machine.launch(name, WARPGROUP_DIMS, params);
        if machine.read(params.available, 1) == [0] {
            println!("SKIPPED: the GPU has no products of warpgroups");
            continue;
        }
        let check = |layout: u32, times: f64, b: &[T], at: usize, got: f32| {
            let columns = b.len() / 16;
            let (row, column) = (at / columns, at % columns);
            let terms =
                (0..16).map(|k| a[row * 16 + k].to_f32() as f64 * b[k * columns + column].to_f32() as f64);
            let (want, size) = (times * terms.clone().sum::<f64>(), times * terms.map(f64::abs).sum::<f64>());
            let error = (got as f64 - want).abs();
            assert!(
                error <= 17.0 * times * size * 2f64.powi(-23),
                "{name} {layout} ({row}, {column}): {got}, not {want}"
            );
        };
        let d = machine.read(params.d, 3 * 64 * 128);
        for (i, &got) in d.iter().enumerate() {
            let (layout, at) = (i / 8192, i % 8192);
            if layout < 2 || at % 128 < 96 {
                check(layout as u32, 1.0, &b, at, got);
            }
        }
        let d = machine.read(params.from_shared, 64 * 256);
        for (at, &got) in d.iter().enumerate() {
            check(3, 2.0, &wide, at, got);
        }
    }
}

fn warpgroup_layouts_f16(on: On) {
    warpgroup_layouts::<f16>(on, "conformance_warpgroup_layouts_f16", f16::to_bits);
}

fn warpgroup_layouts_bf16(on: On) {
    warpgroup_layouts::<bf16>(on, "conformance_warpgroup_layouts_bf16", bf16::to_bits);
}
