//! Shared and global memory, atomics, asynchronous copies.

use super::*;

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

#[test]
fn shared_memory_in_every_width() {
    let numbers: [u32; 256] = take(6, 1 << 32);
    let input: Vec<_> = numbers.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
    for options in schedules() {
        let mut memory = Memory::new();
        let params = SharedParams {
            input: memory.input("input", &input),
            out: memory.alloc("out", 64),
            atomics: memory.alloc("atomics", 4),
        };
        launch_with("conformance_shared", SHARED_DIMS, &memory, params, options);
        assert_eq!(memory.read(params.out, 64), input);
        let sum = input.iter().fold(0, |sum: u32, quad| sum.wrapping_add(quad.0[0]));
        let max = input.iter().map(|quad| quad.0[0]).max().unwrap();
        assert_eq!(memory.read(params.atomics, 4), [sum, max, 7, 12]);
    }
}

#[test]
fn global_memory_in_every_form() {
    for n in [0usize, 1, 287, 288, 289, 1000] {
        let words: Vec<u32> = numbers(n as u64, 1 << 32).take(4 * n).collect();
        let halves: Vec<_> = words[..n].iter().map(|&w| w as u16).collect();
        let floats: Vec<_> = words[..n].iter().map(|&w| w as f32).collect();
        let pairs: Vec<_> = words[..2 * n].chunks(2).map(|c| V2([c[0] as f32, c[1] as f32])).collect();
        let quads: Vec<_> = words.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
        for options in schedules() {
            let mut memory = Memory::new();
            let params = GlobalParams {
                halves: memory.input("halves", &halves),
                words: memory.input("words", &floats),
                pairs: memory.input("pairs", &pairs),
                quads: memory.input("quads", &quads),
                out_halves: memory.alloc("out_halves", n),
                out_words: memory.alloc("out_words", n),
                out_pairs: memory.alloc("out_pairs", n),
                out_quads: memory.alloc("out_quads", n),
                num_elements: n as u32,
            };
            launch_with("conformance_global", GRID_DIMS, &memory, params, options);
            assert_eq!(memory.read(params.out_halves, n), halves);
            assert_eq!(memory.read(params.out_words, n), floats);
            assert_eq!(memory.read(params.out_pairs, n), pairs);
            assert_eq!(memory.read(params.out_quads, n), quads);
        }
    }
}

#[test]
fn global_atomics() {
    let values: [u32; 320] = take(8, 1000);
    for options in schedules() {
        let mut memory = Memory::new();
        let params = AtomicsParams {
            words: memory.buffer("words", &[0; 6]),
            float: memory.buffer("float", &[0.0]),
            message: memory.alloc("message", 1),
            received: memory.alloc("received", 1),
            values: memory.input("values", &values),
        };
        launch_with("conformance_atomics", ATOMICS_DIMS, &memory, params, options);
        let sum = values.iter().sum::<u32>();
        let words = memory.read(params.words, 6);
        assert_eq!(words[..2], [sum, *values.iter().max().unwrap()]);
        assert!(words[2] >> 31 == 1 && values.contains(&(words[2] & !(1 << 31))));
        assert_eq!(words[3..], [320, 320 % 100, 1]);
        assert_eq!(memory.read(params.float, 1), [sum as f32], "below 2^24, so exact in any order");
        assert_eq!(memory.read(params.received, 1), [values[0] + 1]);
    }
}

#[test]
fn last_block_sums_again_and_again() {
    for blocks in [1usize, 2, 7, 40] {
        let values: Vec<u32> = numbers(blocks as u64, 1 << 20).take(blocks * 64).collect();
        let mut memory = Memory::new();
        let params = LastBlockParams {
            values: memory.input("values", &values),
            partial: memory.alloc("partial", 2 * blocks),
            counter: memory.buffer("counter", &[0]),
            sum: memory.alloc("sum", 1),
        };
        for options in schedules() {
            memory.write(params.sum, &[0]);
            launch_with("conformance_last_block", last_block_dims(blocks as u32), &memory, params, options);
            assert_eq!(memory.read(params.sum, 1), [values.iter().sum::<u32>()]);
            assert_eq!(memory.read(params.counter, 1), [0], "ready for the next launch");
        }
    }
}

#[test]
fn async_copies_of_all_lengths() {
    let words: [u32; 512] = take(9, 1 << 32);
    let input: Vec<_> = words.chunks(4).map(|c| V4([c[0], c[1], c[2], c[3]])).collect();
    let lengths: Vec<u32> = (0..128).map(|i| i % 17).collect();
    for options in schedules() {
        let mut memory = Memory::new();
        let params = AsyncCopyParams {
            input: memory.input("input", &input),
            lengths: memory.input("lengths", &lengths),
            out: memory.alloc("out", 128),
        };
        launch_with("conformance_async_copy", WARP_SHARED_DIMS, &memory, params, options);
        for ((quad, length), found) in input.iter().zip(&lengths).zip(memory.read(params.out, 128)) {
            let mut bytes: Vec<u8> = quad.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes[*length as usize..].fill(0);
            assert_eq!(found.0.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>(), bytes);
        }
    }
}

#[test]
fn pointers_count_in_elements() {
    let p = GlobalMut::<V4<f32>>::from_addr(1 << 40);
    assert_eq!(p.add(3).addr(), (1 << 40) + 48);
    assert_eq!(p.cast::<u16>().add(3).addr(), (1 << 40) + 6);
    assert_eq!(p.as_const().add(1 << 33).addr(), (1 << 40) + (1 << 37));
}
