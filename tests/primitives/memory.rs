//! Shared and global memory, atomics, asynchronous copies.

use super::*;

on_machines! {
    shared_memory_in_every_width, global_memory_in_every_form, global_atomics,
    last_block_sums_again_and_again, async_copies_of_all_lengths, bulk_copies_through_two_stages,
    clusters_add_each_others_values
}

#[test]
fn carve_aligns_and_counts() {
    let mut carve = Carve::new();
    let a: Region<u16> = carve.array(3, 2);
    let b: Region<V4<f32>> = carve.array(2, 128);
    let c: Region<u32> = carve.array(0, 4);
    let d: Region<u64> = carve.array(1, 8);
    assert_eq!((a.offset(), a.bytes()), (0, 6));
    assert_eq!((b.offset(), b.bytes()), (128, 32));
    assert_eq!((c.offset(), c.len(), c.is_empty()), (160, 0, true));
    assert_eq!((d.offset(), carve.bytes()), (160, 168));
}

#[test]
#[should_panic(expected = "alignment smaller than the element's")]
fn carve_refuses_a_small_alignment() {
    Carve::new().array::<V4<f32>>(1, 8);
}

fn shared_memory_in_every_width(on: On) {
    let numbers: [u32; 256] = take(6, 1 << 32);
    let input: Vec<_> = numbers.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
    for mut machine in on.machines() {
        let params = SharedParams {
            input: machine.input("input", &input),
            out: machine.alloc("out", 64),
            atomics: machine.alloc("atomics", 4),
        };
        machine.launch("conformance_shared", SHARED_DIMS, params);
        assert_eq!(machine.read(params.out, 64), input);
        let sum = input.iter().fold(0, |sum: u32, quad| sum.wrapping_add(quad.0[0]));
        let max = input.iter().map(|quad| quad.0[0]).max().unwrap();
        assert_eq!(machine.read(params.atomics, 4), [sum, max, 7, 12]);
    }
}

fn global_memory_in_every_form(on: On) {
    for n in [0usize, 1, 287, 288, 289, 1000] {
        let words: Vec<u32> = numbers(n as u64, 1 << 32).take(4 * n).collect();
        let halves: Vec<_> = words[..n].iter().map(|&w| w as u16).collect();
        let floats: Vec<_> = words[..n].iter().map(|&w| w as f32).collect();
        let pairs: Vec<_> = words[..2 * n].chunks(2).map(|c| V2([c[0] as f32, c[1] as f32])).collect();
        let quads: Vec<_> = words.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
        for mut machine in on.machines() {
            let params = GlobalParams {
                halves: machine.input("halves", &halves),
                words: machine.input("words", &floats),
                pairs: machine.input("pairs", &pairs),
                quads: machine.input("quads", &quads),
                out_halves: machine.alloc("out_halves", n),
                out_words: machine.alloc("out_words", n),
                out_pairs: machine.alloc("out_pairs", n),
                out_quads: machine.alloc("out_quads", n),
                num_elements: n as u32,
                reserved: 0,
            };
            machine.launch("conformance_global", GRID_DIMS, params);
            assert_eq!(machine.read(params.out_halves, n), halves);
            assert_eq!(machine.read(params.out_words, n), floats);
            assert_eq!(machine.read(params.out_pairs, n), pairs);
            assert_eq!(machine.read(params.out_quads, n), quads);
        }
    }
}

fn global_atomics(on: On) {
    let values: [u32; 320] = take(8, 1000);
    for mut machine in on.machines() {
        let params = AtomicsParams {
            words: machine.buffer("words", &[0; 6]),
            float: machine.buffer("float", &[0.0]),
            message: machine.alloc("message", 1),
            received: machine.alloc("received", 1),
            values: machine.input("values", &values),
        };
        machine.launch("conformance_atomics", ATOMICS_DIMS, params);
        let sum = values.iter().sum::<u32>();
        let words = machine.read(params.words, 6);
        assert_eq!(words[..2], [sum, *values.iter().max().unwrap()]);
        assert!(words[2] >> 31 == 1 && values.contains(&(words[2] & !(1 << 31))));
        assert_eq!(words[3..], [320, 320 % 100, 1]);
        assert_eq!(machine.read(params.float, 1), [sum as f32], "below 2^24, so exact in any order");
        assert_eq!(machine.read(params.received, 1), [values[0] + 1]);
    }
}

fn last_block_sums_again_and_again(on: On) {
    for blocks in [1usize, 2, 7, 40] {
        let values: Vec<u32> = numbers(blocks as u64, 1 << 20).take(blocks * 64).collect();
        for mut machine in on.machines() {
            let params = LastBlockParams {
                values: machine.input("values", &values),
                partial: machine.alloc("partial", 2 * blocks),
                counter: machine.buffer("counter", &[0]),
                sum: machine.alloc("sum", 1),
            };
            for _ in 0..3 {
                machine.write(params.sum, &[0]);
                machine.launch("conformance_last_block", last_block_dims(blocks as u32), params);
                assert_eq!(machine.read(params.sum, 1), [values.iter().sum::<u32>()]);
                assert_eq!(machine.read(params.counter, 1), [0], "ready for the next launch");
            }
        }
    }
}

fn async_copies_of_all_lengths(on: On) {
    let words: [u32; 512] = take(9, 1 << 32);
    let input: Vec<_> = words.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
    let lengths: Vec<u32> = (0..128).map(|i| i % 17).collect();
    for mut machine in on.machines() {
        let params = AsyncCopyParams {
            input: machine.input("input", &input),
            lengths: machine.input("lengths", &lengths),
            out: machine.alloc("out", 128),
        };
        machine.launch("conformance_async_copy", WARP_SHARED_DIMS, params);
        for ((quad, length), found) in input.iter().zip(&lengths).zip(machine.read(params.out, 128)) {
            let mut bytes: Vec<u8> = quad.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes[*length as usize..].fill(0);
            assert_eq!(found.0.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>(), bytes);
        }
    }
}

fn bulk_copies_through_two_stages(on: On) {
    let words: Vec<u32> = numbers(10, 1 << 32).take(BULK_ROUNDS as usize * 256).collect();
    let input: Vec<_> = words.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
    for mut machine in on.machines() {
        let params = BulkCopyParams {
            input: machine.input("input", &input),
            out: machine.alloc("out", input.len()),
            available: machine.alloc("available", 1),
        };
        machine.launch("conformance_bulk_copy", BULK_COPY_DIMS, params);
        if machine.read(params.available, 1) == [0] {
            println!("SKIPPED: the GPU has no bulk copies");
            continue;
        }
        let want: Vec<_> = input.chunks(64).flat_map(|round| round.iter().rev().copied()).collect();
        assert_eq!(machine.read(params.out, input.len()), want);
    }
}

fn clusters_add_each_others_values(on: On) {
    const CLUSTERS: usize = 3;
    let blocks = CLUSTERS * CLUSTER_BLOCKS as usize;
    let values: Vec<u32> = numbers(11, 1 << 20).take(blocks * 64).collect();
    let sums = |values: &[u32]| -> Vec<u32> {
        let of_cluster = |cluster: &[u32]| {
            let sum =
                |thread| (1..).zip(cluster.iter().skip(thread).step_by(64)).map(|(rank, x)| rank * x).sum();
            (0..64).map(sum).collect::<Vec<u32>>().repeat(CLUSTER_BLOCKS as usize)
        };
        values.chunks(CLUSTER_BLOCKS as usize * 64).flat_map(of_cluster).collect()
    };
    for mut machine in on.machines() {
        let params = ClusterParams {
            values: machine.input("values", &values),
            out: machine.alloc("out", 2 * values.len()),
            available: machine.alloc("available", 1),
        };
        machine.launch("conformance_cluster", cluster_dims(CLUSTERS as u32), params);
        if machine.read(params.available, 1) == [0] {
            println!("SKIPPED: the GPU has no clusters");
            continue;
        }
        let once = sums(&values);
        assert_eq!(machine.read(params.out, 2 * values.len()), [sums(&values), sums(&once)].concat());
    }
}

#[test]
fn pointers_count_in_elements() {
    let p = GlobalMut::<V4<f32>>::from_addr(1 << 40);
    assert_eq!(p.add(3).addr(), (1 << 40) + 48);
    assert_eq!(p.cast::<u16>().add(3).addr(), (1 << 40) + 6);
    assert_eq!(p.as_const().add(1 << 33).addr(), (1 << 40) + (1 << 37));
}
