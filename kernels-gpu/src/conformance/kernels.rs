//! The kernels; their parameters and launches are in the parent module.

use super::*;
use crate::common::element::Element;
use crate::common::fragment::{A, Accumulator, B, lane};
use crate::simt::bulk::{self, MBarrier};
use crate::simt::shared::Shared;
use crate::simt::thread::*;
use crate::simt::warp::{self, FULL, lane_id, warp_id};
use crate::simt::warpgroup::{self, Columns, Rows};
use crate::simt::{cluster, grid, math as m, tensor};

/// What every kernel begins with: launches may overlap.
#[inline(always)]
fn begin() {
    grid::wait_for_previous();
    grid::launch_dependents();
}

/// Every index and size.
///
/// # Safety
/// - The shapes in [`IndicesParams`]; launched with [`INDICES_DIMS`].
pub unsafe fn indices(p: IndicesParams) {
    begin();
    let block = block_idx_x() + grid_dim_x() * (block_idx_y() + grid_dim_y() * block_idx_z());
    let threads = block_dim_x() * block_dim_y() * block_dim_z();
    let out = p.out.add((block * threads + linear_thread_idx()) as u64 * 16);
    let all = [
        thread_idx_x(),
        thread_idx_y(),
        thread_idx_z(),
        block_idx_x(),
        block_idx_y(),
        block_idx_z(),
        block_dim_x(),
        block_dim_y(),
        block_dim_z(),
        grid_dim_x(),
        grid_dim_y(),
        grid_dim_z(),
        lane_id(),
        warp_id(),
        linear_thread_idx(),
        0,
    ];
    let mut i = 0;
    while i < 16 {
        out.add(i as u64).store(all[i]);
        i += 1;
    }
}

/// Every shuffle with every operand, and the f32 reductions made of them.
///
/// # Safety
/// - The shapes in [`ShufflesParams`]; launched with [`WARP_DIMS`].
pub unsafe fn shuffles(p: ShufflesParams) {
    begin();
    let lane = lane_id();
    let value = p.values.add(lane as u64).load();
    let mut operand = 0;
    while operand < 32 {
        let received = [
            warp::shuffle_idx(FULL, value, operand),
            warp::shuffle_xor(FULL, value, operand),
            warp::shuffle_up(FULL, value, operand),
            warp::shuffle_down(FULL, value, operand),
        ];
        let mut kind = 0;
        while kind < 4 {
            p.words.add(((kind * 32 + operand) * 32 + lane) as u64).store(received[kind as usize]);
            kind += 1;
        }
        operand += 1;
    }
    p.floats.add(lane as u64).store(warp::reduce_add_f32(value as f32));
    p.floats.add(32 + lane as u64).store(warp::reduce_max_f32(value as f32));
    let double = value as f64 + lane as f64 / (1u64 << 30) as f64;
    p.doubles.add(lane as u64).store(warp::reduce_add_f64(double));
    // Lane 32 and up: only the low five bits of a source count.
    p.signed.add(lane as u64).store(warp::shuffle_idx(FULL, -(value as i32), lane + 7));
}

/// The collectives with a mask and its complement at the same time.
///
/// # Safety
/// - The shapes in [`MaskedParams`]; launched with [`WARP_DIMS`].
pub unsafe fn masked(p: MaskedParams) {
    begin();
    let lane = lane_id();
    let value = p.values.add(lane as u64).load();
    let source = p.sources.add(lane as u64).load();
    let mask = if p.mask >> lane & 1 == 1 { p.mask } else { !p.mask };
    let odd = value % 2 == 1;
    let all = [
        warp::shuffle_idx(mask, value, source),
        warp::ballot(mask, odd),
        warp::any(mask, odd) as u32,
        warp::all(mask, odd) as u32,
        warp::reduce_add(mask, value),
        warp::reduce_min(mask, value),
        warp::reduce_max(mask, value),
    ];
    let mut i = 0;
    while i < 7 {
        p.out.add((i as u32 * 32 + lane) as u64).store(all[i]);
        i += 1;
    }
}

/// Two producer warps hand values to two consumer warps over named barriers, twice through one buffer; then
/// barriers that count. (All wait where the buffer is handed back: compute-sanitizer does not take `bar.arrive` as an order
/// of reads before writes.)
///
/// # Safety
/// - The shapes in [`BarriersParams`]; launched with [`BARRIERS_DIMS`].
pub unsafe fn barriers(p: BarriersParams) {
    begin();
    const FILLED: u32 = 1;
    const EMPTIED: u32 = 2;
    let thread = thread_idx_x();
    let value = p.values.add(thread as u64).load();
    let buffer = LAYOUT.words.get();
    let (mut sum, mut round) = (0, 0);
    while round < 2 {
        if thread < 64 {
            buffer.add(thread).store(value + round);
            arrive_named(FILLED, 128);
        } else {
            sync_named(FILLED, 128);
            sum += buffer.add((thread + 1) % 64).load();
        }
        sync_named(EMPTIED, 128);
        round += 1;
    }
    if thread >= 64 {
        p.consumed.add((thread - 64) as u64).store(sum);
    }
    let odd = sync_threads_count(value % 2 == 1);
    let five = sync_threads_or(value == 5);
    let thousand = sync_threads_or(value == 1000);
    let counts = p.counts.add(thread as u64 * 3);
    counts.store(odd);
    counts.add(1).store(five as u32);
    counts.add(2).store(thousand as u32);
}

/// Loads and stores of every width, and atomics.
///
/// # Safety
/// - The shapes in [`SharedParams`]; launched with [`SHARED_DIMS`].
pub unsafe fn shared(p: SharedParams) {
    begin();
    let thread = thread_idx_x();
    let quad = p.input.add(thread as u64).load();
    let (halves, words, pairs, quads) =
        (LAYOUT.halves.get(), LAYOUT.words.get(), LAYOUT.pairs.get(), LAYOUT.quads.get());
    let counters = LAYOUT.counters.get();
    if thread < 4 {
        counters.add(thread).store(0);
    }
    // Halves, then words, pairs and quads: each stage reads the one before in another width, from the thread
    // opposite.
    let mut i = 0;
    while i < 4 {
        halves.add(thread * 8 + 2 * i).store(quad.0[i as usize] as u16);
        halves.add(thread * 8 + 2 * i + 1).store((quad.0[i as usize] >> 16) as u16);
        i += 1;
    }
    sync_threads();
    let mut from = 63 - thread;
    let mut i = 0;
    while i < 4 {
        words.add(from * 4 + i).store(halves.byte_add(from * 16 + i * 4).cast::<u32>().load());
        i += 1;
    }
    sync_threads();
    from = (from + 17) % 64;
    pairs.add(from * 2).store(words.add(from * 4).cast::<u64>().load());
    let V2(second) = words.add(from * 4 + 2).cast::<V2<u32>>().load();
    pairs.add(from * 2 + 1).cast::<V2<u32>>().store(V2(second));
    sync_threads();
    quads.add(thread).store(pairs.add(thread * 2).cast::<V4<u32>>().load());
    p.out.add(thread as u64).store(quads.add(thread).load());

    counters.atomic_add(quad.0[0]);
    counters.add(1).atomic_max(quad.0[0]);
    sync_threads();
    if thread == 0 {
        p.atomics.store(counters.load());
        p.atomics.add(1).store(counters.add(1).load());
        counters.add(2).store(7);
        p.atomics.add(2).store(counters.add(2).atomic_add(5));
        p.atomics.add(3).store(counters.add(2).atomic_max(3));
    }
}

/// Copies with every kind of load and store.
///
/// # Safety
/// - The shapes in [`GlobalParams`]; launched with [`GRID_DIMS`].
pub unsafe fn global(p: GlobalParams) {
    begin();
    let mut i = (block_idx_x() * block_dim_x() + thread_idx_x()) as u64;
    while i < p.num_elements as u64 {
        let (half, word, pair, quad) = match i % 6 {
            0 => {
                (p.halves.add(i).load(), p.words.add(i).load(), p.pairs.add(i).load(), p.quads.add(i).load())
            }
            1 => (
                p.halves.add(i).load_once(),
                p.words.add(i).load_once(),
                p.pairs.add(i).load_once(),
                p.quads.add(i).load_once(),
            ),
            2 => (
                p.halves.add(i).load_settled(),
                p.words.add(i).load_settled(),
                p.pairs.add(i).load_settled(),
                p.quads.add(i).load_settled(),
            ),
            3 => (
                p.halves.add(i).load_constant(),
                p.words.add(i).load_constant(),
                p.pairs.add(i).load_constant(),
                p.quads.add(i).load_constant(),
            ),
            4 => (
                p.halves.add(i).load_constant_once(),
                p.words.add(i).load_constant_once(),
                p.pairs.add(i).load_constant_once(),
                p.quads.add(i).load_constant_once(),
            ),
            _ => (
                p.halves.add(i).load_constant_row(),
                p.words.add(i).load_constant_row(),
                p.pairs.add(i).load_constant_row(),
                p.quads.add(i).load_constant_row(),
            ),
        };
        if i & 1 == 0 {
            p.out_halves.add(i).store(half);
            p.out_words.add(i).store(word);
            p.out_pairs.add(i).store(pair);
            p.out_quads.add(i).store(quad);
        } else {
            p.out_halves.add(i).store_evict_first(half);
            p.out_words.add(i).store_evict_first(word);
            p.out_pairs.add(i).store_evict_first(pair);
            p.out_quads.add(i).store_evict_first(quad);
        }
        i += (grid_dim_x() * block_dim_x()) as u64;
    }
}

/// Every atomic from every thread; then a message from block 0 to block 2.
///
/// # Safety
/// - The shapes in [`AtomicsParams`]; launched with [`ATOMICS_DIMS`], all blocks resident at once or started in
///   index order, since block 2 waits for block 0.
pub unsafe fn atomics(p: AtomicsParams) {
    begin();
    let thread = block_idx_x() * block_dim_x() + thread_idx_x();
    let value = p.values.add(thread as u64).load();
    p.words.atomic_add(value);
    p.words.add(1).atomic_max(value);
    p.words.add(2).atomic_exchange(value | 1 << 31);
    let counted = p.words.add(3);
    let mut seen = counted.atomic_add(0);
    loop {
        let found = counted.atomic_compare_exchange(seen, seen + 1);
        if found == seen {
            break;
        }
        seen = found;
    }
    p.words.add(4).atomic_inc(99);
    p.float.atomic_add(value as f32);

    let flag = p.words.add(5);
    if thread == 0 {
        p.message.store(value + 1);
        flag.store_release(1);
    }
    if block_idx_x() == 2 && thread_idx_x() == 0 {
        while flag.load_acquire() == 0 {}
        p.received.store(p.message.load());
    }
}

/// Sums everything: each warp its part, the last block the parts.
///
/// # Safety
/// - The shapes in [`LastBlockParams`]; launched with [`last_block_dims`].
pub unsafe fn last_block(p: LastBlockParams) {
    begin();
    let value = p.values.add((block_idx_x() * 64 + thread_idx_x()) as u64).load();
    let sum = warp::reduce_add(FULL, value);
    if lane_id() == 0 {
        p.partial.add((block_idx_x() * 2 + warp_id()) as u64).store(sum);
    }
    if grid::is_last_block(p.counter, grid_dim_x()) && warp_id() == 0 {
        let mut sum = 0;
        let mut i = lane_id();
        while i < 2 * grid_dim_x() {
            sum += p.partial.add(i as u64).load();
            i += 32;
        }
        sum = warp::reduce_add(FULL, sum);
        if lane_id() == 0 {
            p.sum.store(sum);
        }
    }
    grid::launch_dependents();
}

/// Four groups of copies of all lengths, waited for one after the other.
///
/// # Safety
/// - The shapes in [`AsyncCopyParams`]; launched with [`WARP_SHARED_DIMS`].
pub unsafe fn async_copy(p: AsyncCopyParams) {
    begin();
    let lane = lane_id();
    let tile = LAYOUT.quads.get();
    let mut group = 0;
    while group < 4 {
        let at = group * 32 + lane;
        let bytes = p.lengths.add(at as u64).load();
        tensor::cp_async_16(tile.add(at), p.input.add(at as u64), bytes);
        tensor::cp_async_commit();
        group += 1;
    }
    let mut group = 0;
    while group < 4 {
        match group {
            0 => tensor::cp_async_wait::<3>(),
            1 => tensor::cp_async_wait::<2>(),
            2 => tensor::cp_async_wait::<1>(),
            _ => tensor::cp_async_wait::<0>(),
        }
        warp::sync_warp(FULL);
        let at = group * 32 + (31 - lane);
        p.out.add(at as u64).store(tile.add(at).load());
        group += 1;
    }
}

/// Blocks of a cluster add each other's values, twice.
///
/// # Safety
/// - The shapes in [`ClusterParams`]; launched with [`cluster_dims`].
pub unsafe fn cluster(p: ClusterParams) {
    begin();
    let first = block_idx_x() == 0 && thread_idx_x() == 0;
    if first {
        p.available.store(cluster::AVAILABLE as u32);
    }
    if !cluster::AVAILABLE {
        return;
    }
    let (here, place) = (thread_idx_x(), LAYOUT.words.get().add(thread_idx_x()));
    let at = (block_idx_x() * 64 + here) as u64;
    place.store(p.values.add(at).load());
    let mut round = 0;
    while round < 2 {
        cluster::sync();
        let (mut sum, mut rank) = (0, 0);
        while rank < cluster::num_blocks() {
            sum += (rank + 1) * place.of_block(rank).load();
            rank += 1;
        }
        let blocks = grid_dim_x();
        p.out.add((round * blocks * 64) as u64 + at).store(sum + cluster::block_rank() - block_idx_x() % 4);
        cluster::sync();
        // Each block has the same sums, and brings them to the next one.
        place.of_block((cluster::block_rank() + 1) % cluster::num_blocks().max(1)).store(sum);
        round += 1;
    }
    cluster::sync();
}

/// A producer warp hands bulk copies to two consumer warps through two stages, over barriers in shared memory. Each
/// round is two copies by two lanes, whose sizes change from round to round.
///
/// # Safety
/// - The shapes in [`BulkCopyParams`]; launched with [`BULK_COPY_DIMS`].
pub unsafe fn bulk_copy(p: BulkCopyParams) {
    begin();
    if thread_idx_x() == 0 {
        p.available.store(bulk::AVAILABLE as u32);
    }
    if !bulk::AVAILABLE {
        return;
    }
    let full = |stage: u32| MBarrier::at(LAYOUT.pairs.get().add(stage));
    let empty = |stage: u32| MBarrier::at(LAYOUT.pairs.get().add(2 + stage));
    if thread_idx_x() == 0 {
        let mut stage = 0;
        while stage < 2 {
            full(stage).init(1);
            empty(stage).init(64);
            stage += 1;
        }
        bulk::publish();
    }
    sync_threads();
    let mut round = 0;
    while round < BULK_ROUNDS {
        let (stage, parity) = (round % 2, round / 2 % 2);
        let (tile, at) = (LAYOUT.quads.get().add(64 * stage), 64 * round);
        if warp_id() == 0 {
            empty(stage).wait(parity ^ 1);
            warp::sync_warp(FULL); // no lane falls two phases behind
            let split = 1 + 13 * round;
            let [begin, quads] = if lane_id() == 0 { [0, split] } else { [split, 64 - split] };
            // The second lane may well copy before the bytes are announced.
            if lane_id() < 2 {
                let from = p.input.add((at + begin) as u64);
                bulk::copy_to_shared(tile.add(begin), from, 16 * quads, full(stage));
            }
            if lane_id() == 0 {
                full(stage).arrive_expecting(64 * 16);
            }
        } else {
            full(stage).wait(parity);
            let place = thread_idx_x() - 32;
            let quad = tile.add(63 - place).load();
            empty(stage).arrive();
            p.out.add((at + place) as u64).store(quad);
        }
        round += 1;
    }
}

/// Four tiles, plain and transposed.
///
/// # Safety
/// - The shapes in [`LdMatrixParams`]; launched with [`WARP_SHARED_DIMS`].
pub unsafe fn ldmatrix(p: LdMatrixParams) {
    begin();
    let lane = lane_id();
    let row = LAYOUT.quads.get().add(lane);
    row.store(p.rows.add(lane as u64).load());
    warp::sync_warp(FULL);
    p.out.add(lane as u64).store(V4(tensor::ldmatrix_x4(row)));
    p.out.add(32 + lane as u64).store(V4(tensor::ldmatrix_x4_trans(row)));
}

/// One product, with operands gathered by the maps of [`fragment`](crate::common::fragment).
///
/// # Safety
/// - The shapes in [`MmaParams`]; launched with [`WARP_DIMS`].
pub unsafe fn mma<T: Element>(p: MmaParams) {
    begin();
    let at = lane();
    let a =
        [0, 1, 2, 3].map(|i| p.a.add((A::row(at, i) * 16 + A::column(at, i)) as u64).cast::<u32>().load());
    let b = [0, 1].map(|i| {
        let value = |row: u32| p.b.add((row * 8 + B::column(at)) as u64).load() as u32;
        value(B::row(at, i)) | value(B::row(at, i) + 1) << 16
    });
    let place = |i: usize| (Accumulator::row(at, i) * 8 + Accumulator::column(at, i)) as u64;
    let mut d = Accumulator([0, 1, 2, 3].map(|i| p.c.add(place(i)).load()));
    T::mma(&mut d, A(a), B(b));
    for i in 0..4 {
        p.d.add(place(i)).store(d.0[i]);
    }
}

/// A warpgroup's product, and one that adds to it.
///
/// # Safety
/// - The shapes in [`WarpgroupMmaParams`]; launched with [`WARPGROUP_DIMS`].
pub unsafe fn warpgroup_mma<T: Element>(p: WarpgroupMmaParams) {
    /// From eight columns of B to the next, and from eight rows to the next.
    const STRIDES: [u32; 2] = [128, 1024];
    begin();
    if thread_idx_x() == 0 {
        p.available.store(warpgroup::available() as u32);
    }
    if !warpgroup::available() {
        return;
    }
    let columns = LAYOUT.columns.get();
    let mut i = thread_idx_x();
    while i < 32 * 64 {
        let (row, column) = (i / 64, i % 64);
        let core = columns.byte_add(row / 8 * STRIDES[1] + column / 8 * STRIDES[0]);
        core.add(column % 8 * 8 + row % 8).store(p.b.add(i as u64).load());
        i += 128;
    }
    warpgroup::fence_writes();
    sync_threads();
    let at = lane();
    let a = |step: u32| {
        A([0, 1, 2, 3].map(|i| {
            let (row, column) = (16 * warp_id() + A::row(at, i), 16 * step + A::column(at, i));
            p.a.add((row * 32 + column) as u64).cast::<u32>().load()
        }))
    };
    let b = |step: u32| Columns {
        start: columns.byte_add(2 * step * STRIDES[1]).cast::<T>(),
        row_bytes: STRIDES[1],
        column_bytes: STRIDES[0],
        is_swizzled: false,
    };
    let mut d = [[7.0; 4]; 8]; // which the first product does not add to
    let (first, second) = (a(0), a(1));
    warpgroup::fence();
    T::mma_of_warpgroup::<_, false, false>(&mut d, first, b(0));
    warpgroup::commit();
    warpgroup::wait::<_, 0>(&mut d);
    write_products(p.d, 64, &d);
    warpgroup::fence();
    T::mma_of_warpgroup::<_, true, false>(&mut d, second, b(1));
    warpgroup::commit();
    warpgroup::wait::<_, 0>(&mut d);
    write_products(p.d.add(64 * 64), 64, &d);
}

/// Three products under way at a time, of operands that lie in other ways; then one of both operands in shared memory, twice.
///
/// # Safety
/// - The shapes in [`WarpgroupLayoutsParams`]; launched with [`WARPGROUP_DIMS`].
pub unsafe fn warpgroup_layouts<T: Element>(p: WarpgroupLayoutsParams) {
    begin();
    if thread_idx_x() == 0 {
        p.available.store(warpgroup::available() as u32);
    }
    if !warpgroup::available() {
        return;
    }
    let (cores, lines, by_rows) = (LAYOUT.columns.get(), LAYOUT.lines.get(), LAYOUT.lines_by_rows.get());
    let swizzled = |byte: u32| byte ^ (byte >> 7 & 7) << 4;
    let mut i = thread_idx_x();
    while i < 16 * 128 {
        let (row, column, value) = (i / 128, i % 128, p.b.add(i as u64).load());
        let core = row / 8 * 2048 + column / 8 * 128;
        cores.byte_add(core + row % 8 * 16 + column % 8 * 2).store(value);
        // The third quarter of each line.
        lines.byte_add(swizzled(128 * column + 2 * (32 + row))).store(value);
        by_rows.byte_add(swizzled(column / 64 * 2048 + 128 * row + column % 64 * 2)).store(value);
        i += 128;
    }
    let (wide_lines, rows) = (LAYOUT.wide_lines.get(), LAYOUT.rows.get());
    let mut i = thread_idx_x();
    while i < 16 * 256 {
        // The second quarter of each line.
        let line = 128 * (i % 256) + 2 * (16 + i / 256);
        wide_lines.byte_add(swizzled(line)).store(p.wide.add(i as u64).load());
        i += 128;
    }
    let mut i = thread_idx_x();
    while i < 64 * 16 {
        rows.byte_add(swizzled(128 * (i / 16) + 2 * (32 + i % 16))).store(p.a.add(i as u64).load());
        i += 128;
    }
    sync_threads();
    warpgroup::fence_writes();
    let at = lane();
    let a = A([0, 1, 2, 3].map(|i| {
        let (row, column) = (16 * warp_id() + A::row(at, i), A::column(at, i));
        p.a.add((row * 16 + column) as u64).cast::<u32>().load()
    }));
    let operand = |start: Shared<u16>, [row_bytes, column_bytes]: [u32; 2], is_swizzled| Columns {
        start: start.cast::<T>(),
        row_bytes,
        column_bytes,
        is_swizzled,
    };
    let (mut first, mut second, mut third) = ([[0.0; 4]; 16], [[0.0; 4]; 16], [[0.0; 4]; 12]);
    warpgroup::fence();
    T::mma_of_warpgroup::<_, false, true>(&mut first, a, operand(cores, [2048, 128], false));
    warpgroup::commit();
    T::mma_of_warpgroup::<_, false, false>(&mut second, a, operand(lines.byte_add(64), [0, 1024], true));
    warpgroup::commit();
    T::mma_of_warpgroup::<_, false, true>(&mut third, a, operand(by_rows, [1024, 2048], true));
    warpgroup::commit();
    warpgroup::wait::<_, 2>(&mut first);
    write_products(p.d, 128, &first);
    warpgroup::wait::<_, 1>(&mut second);
    write_products(p.d.add(64 * 128), 128, &second);
    warpgroup::wait::<_, 0>(&mut third);
    write_products(p.d.add(2 * 64 * 128), 128, &third);
    let a = Rows { start: rows.byte_add(64).cast::<T>(), row_bytes: 1024 };
    let b = operand(wide_lines.byte_add(32), [0, 1024], true);
    let mut from_shared = [[0.0; 4]; 32];
    warpgroup::fence();
    T::mma_of_warpgroup_from_shared::<_, false, false>(&mut from_shared, a, b);
    T::mma_of_warpgroup_from_shared::<_, true, false>(&mut from_shared, a, b);
    warpgroup::commit();
    warpgroup::wait::<_, 0>(&mut from_shared);
    write_products(p.from_shared, 256, &from_shared);
}

/// Writes a warp's rows of a warpgroup's product.
unsafe fn write_products<const N: usize>(to: GlobalMut<f32>, pitch: u32, d: &[[f32; 4]; N]) {
    let at = lane();
    for tile in 0..N {
        for i in 0..4 {
            let row = 16 * warp_id() + Accumulator::row(at, i);
            let column = 8 * tile as u32 + Accumulator::column(at, i);
            to.add((row * pitch + column) as u64).store(d[tile][i]);
        }
    }
}

/// Arithmetic and conversions.
///
/// # Safety
/// - The shapes in [`MathParams`]; launched with [`GRID_DIMS`].
pub unsafe fn math(p: MathParams) {
    begin();
    let mut i = (block_idx_x() * block_dim_x() + thread_idx_x()) as u64;
    while i < p.num_values as u64 {
        let (x, y) = (p.x.add(i).load(), p.y.add(i).load());
        let (f16, bf16) = (half::f16::pack(x, y), half::bf16::pack(x, y));
        let packed = p.packed.add(i * 4).cast::<V4<u32>>();
        let (one_f16, one_bf16) = (half::f16::from_f32(x), half::bf16::from_f32(x));
        packed.store(V4([f16, bf16, one_f16.to_bits() as u32, one_bf16.to_bits() as u32]));
        let floats = p.floats.add(i * 8).cast::<V4<f32>>();
        floats.store(V4([m::ex2(x), m::lg2(x), m::rcp(x), m::fma(x, y, x)]));
        let ([a, b], [c, d]) = (half::f16::unpack(f16), half::bf16::unpack(bf16));
        floats.add(1).store(V4([a, b, c, d]));
        let (wide_x, wide_y) = (x as f64, y as f64);
        let quotient = wide_x / m::sqrt_f64(wide_y);
        let doubles = p.doubles.add(i * 3);
        doubles.store(wide_x * wide_y + wide_x);
        doubles.add(1).store(m::sqrt_f64(wide_x));
        doubles.add(2).store(quotient);
        p.rounded.add(i).store(quotient as f32);
        i += (grid_dim_x() * block_dim_x()) as u64;
    }
}
