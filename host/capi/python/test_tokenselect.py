"""Tests of the Python module on the processor and, where it was built in, the emulated GPU, against the definitions in
NumPy. Run by `cargo test -p tokenselect-capi --test python`, or by hand with TOKENSELECT_LIBRARY set."""

import ctypes
import gc
import os
import re
import unittest
import weakref
from pathlib import Path

import numpy as np
import tokenselect as ts
import tokenselect_abi

HQ, HKV, D, PAGE = 4, 2, 16, 4
THETA = 5e5


def rotate(x, positions):
    """RoPE of `[tokens, heads, D]`, pairs `i` and `i + D / 2`."""
    angles = positions[:, None, None] * THETA ** (-2.0 * np.arange(D // 2) / D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)


def select(config, q, k):
    """The votes of the candidates and the selected list."""
    n, block = len(k), len(q)
    end = max(n - block - config.n_local, 0)
    begin = min(config.n_init, end)
    if end - begin <= config.top_k:
        return None, list(range(n))
    if config.positions == 1:
        q = rotate(q, config.n_local + np.arange(block))
    keys = np.repeat(k[begin:end], HQ // HKV, axis=1)
    logits = np.einsum("hd,jhd->hj", q.mean(0), keys) / np.sqrt(D)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    votes = (weights / weights.sum(-1, keepdims=True)).sum(0)
    chosen = np.sort(np.lexsort((np.arange(len(votes)), -votes))[: config.top_k]) + begin
    return votes, [*range(begin), *chosen.tolist(), *range(end, n)]


def attend(config, q, k, v, tokens):
    """Attention over a list: out and log-sum-exp."""
    block, m = len(q), len(tokens)
    k, v = k[tokens], v[tokens]
    if config.positions == 1:
        k, q = rotate(k, np.arange(m)), rotate(q, m - block + np.arange(block))
    k, v = np.repeat(k, HQ // HKV, axis=1), np.repeat(v, HQ // HKV, axis=1)
    logits = np.einsum("thd,jhd->thj", q, k) / np.sqrt(D)
    hidden = np.arange(m)[None, :] > m - block + np.arange(block)[:, None]
    logits[np.broadcast_to(hidden[:, None, :], logits.shape)] = -np.inf
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("thj,jhd->thd", weights / total, v), (largest + np.log(total))[..., 0]


def to_bf16(x):
    """Rounded to bfloat16, as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x):
    """bfloat16 bits as float64."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def config(**fields):
    given = dict(num_qo_heads=HQ, num_kv_heads=HKV, head_dim=D, dtype="f32", n_init=2, n_local=3, top_k=5)
    return ts.Config(**{**given, "selection_cache": 0, **fields})


def tables(length, num_pages):
    """indptr, indices and last_page_len of one row in pages that lie in reverse order."""
    pages = -(-length // PAGE)
    return [0, pages], [num_pages - 1 - page for page in range(pages)], [length - (pages - 1) * PAGE]


class StandIn:
    """What the module asks of a PyTorch tensor, over a NumPy array: for machines without PyTorch."""

    def __init__(self, array, dtype):
        self.array, self.dtype, self.shape, self.device = array, f"torch.{dtype}", array.shape, "cpu"

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def stride(self):
        return tuple(stride // self.array.itemsize for stride in self.array.strides)


class Fleeting(StandIn):
    """A copy of an array that scribbles over its elements when nobody holds it any more."""

    def __init__(self, array):
        super().__init__(array.copy(), str(array.dtype))

    def __del__(self):
        self.array.view(np.uint8).fill(0x7F)


class Structures(unittest.TestCase):
    def test_functions(self):
        """Every function of the header, with as many arguments."""
        header = (Path(__file__).parents[1] / "include/tokenselect.h").read_text()
        prototypes = re.findall(r"^(?:const char \*|ts_status |uint32_t )(ts_\w+)\(([^)]*)\);", header, re.MULTILINE)
        counts = {name: 0 if text == "void" else text.count(",") + 1 for name, text in prototypes}
        no_status = ["ts_version", "ts_abi_version", "ts_last_error_message", "ts_status_name", "ts_device_name"]
        for name in [*no_status, "ts_kv_view_set_dense"]:  # and strides are known here
            counts.pop(name)
        mine = {name: len(types) for name, types in tokenselect_abi.FUNCTIONS.items()}
        self.assertEqual(mine, counts)

    def test_sizes(self):
        given = os.environ.get("TOKENSELECT_SIZES")
        if given is None:
            self.skipTest("TOKENSELECT_SIZES is not set")
        sizes = dict(entry.split("=") for entry in given.split(","))
        mine = {struct.__name__: str(ctypes.sizeof(struct)) for struct in tokenselect_abi.STRUCTURES}
        self.assertEqual(mine, sizes)


class Steps(unittest.TestCase):
    def setUp(self):
        self.random = np.random.default_rng(1)
        self.device = ts.Device.cpu()

    def draw(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def test_owned_cache(self):
        for fields in [{}, dict(positions="reassigned", rope=dict(theta=THETA))]:
            cfg = config(**fields)
            cache = ts.Cache(self.device, cfg, num_layers=1, num_pages=16, page_size=PAGE)
            ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
            sequence = cache.create()
            keys, values = np.zeros((0, HKV, D)), np.zeros((0, HKV, D))
            for block in [8, 8, 8, 1, 1]:
                q, k, v = self.draw(block, HQ, D), self.draw(block, HKV, D), self.draw(block, HKV, D)
                keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
                batch = cache.extend([(sequence, block)])
                out, lse = ctx.step(cache, 0, batch, q, k, v, lse=True)
                votes, tokens = select(cfg, q.astype(np.float64), keys)
                self.assertEqual(ctx.selected(), tokens)
                want_out, want_lse = attend(cfg, q.astype(np.float64), keys, values, tokens)
                np.testing.assert_allclose(out, want_out, atol=1e-5)
                np.testing.assert_allclose(lse, want_lse, atol=1e-5)
                if votes is not None:
                    shown = np.asarray(ctx.workspace("votes"))[cfg.n_init : cfg.n_init + len(votes)]
                    np.testing.assert_allclose(shown, votes, atol=1e-5)
                    self.assertEqual(ctx.workspace("votes").numpy().shape, (64,))
            self.assertEqual(cache.len(sequence), 26)
            out = np.empty_like(q)
            self.assertIs(ctx.attend_dense(batch, cache.layer(0), q, out=out), out)
            want_out, _ = attend(cfg, q.astype(np.float64), keys, values, list(range(26)))
            np.testing.assert_allclose(out, want_out, atol=1e-5)
            cache.free(sequence)
            self.assertEqual(cache.num_free_pages, 16)

    def test_borrowed_cache(self):
        """bf16, keys and values among each other in both layouts, one operation at a time."""
        cfg = config(dtype="bf16", selection_cache=1, similarity_threshold=0.5)
        for layout in ["NHD", "HND"]:
            shape = (PAGE, HKV, D) if layout == "NHD" else (HKV, PAGE, D)
            pool = np.full((16, 2, *shape), 0x7FC0, dtype=np.uint16)  # NaN
            kv = ts.KvView(pool[:, 0], pool[:, 1], layout)
            ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
            selections = ts.SelectionCache(self.device, cfg, num_layers=2, num_sequences=4)
            keys, values = np.zeros((0, HKV, D)), np.zeros((0, HKV, D))
            for block in [8, 8, 1, 1]:
                q, k, v = (to_bf16(self.draw(block, heads, D)) for heads in (HQ, HKV, HKV))
                keys = np.concatenate([keys, from_bf16(k)])
                values = np.concatenate([values, from_bf16(v)])
                given = tables(len(keys), 16)
                batch = ts.Batch(PAGE, np.array([0, block]), *given, sequence_indices=[3])
                ctx.append(batch, kv, k, v)
                ctx.pool(batch, q, selections, layer=1)
                ctx.score(batch, kv)
                ctx.vote(batch)
                ctx.top_k(batch, selections, layer=1)
                out, lse = np.empty((block, HQ, D), np.float32), np.empty((block, HQ), np.float32)
                ctx.attend(batch, kv, q, out, lse)
                _, tokens = select(cfg, from_bf16(q), keys)
                self.assertEqual(ctx.selected(), tokens)
                want_out, want_lse = attend(cfg, from_bf16(q), keys, values, tokens)
                np.testing.assert_allclose(out, want_out, atol=1e-4)
                np.testing.assert_allclose(lse, want_lse, atol=1e-4)
                rounded = ctx.attend(batch, kv, q)
                np.testing.assert_allclose(from_bf16(rounded), want_out, atol=1e-2, rtol=1e-2)
            self.assertEqual(batch.row(0).kv_len, 18)
            before = selections.stats(1).reused
            ctx.select(batch, kv, q, selections, layer=1)  # the same queries again
            self.assertEqual((selections.stats(1).reused, selections.stats(0).reused), (before + 1, 0))

    def test_parts(self):
        """Attention over two halves of a list, merged."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
        k, v, q = self.draw(16, PAGE, HKV, D), self.draw(16, PAGE, HKV, D), self.draw(1, HQ, D)
        kv, batch = ts.KvView(k, v), ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
        tokens = np.arange(0, 64, 3, dtype=np.int32)
        total = np.array([len(tokens)], dtype=np.int32)
        whole = ctx.attend_to(batch, kv, q, tokens[None], total)
        parts = []
        for ranks in np.split(np.arange(len(tokens), dtype=np.int32), [9]):
            length = np.array([len(ranks)], dtype=np.int32)
            parts.append(ctx.attend_to(batch, kv, q, tokens[ranks][None], length, ranks[None], total, lse=True))
        out = np.empty_like(q)
        ctx.merge(np.stack([out for out, _ in parts]), np.stack([lse for _, lse in parts]), out)
        np.testing.assert_allclose(out, whole, atol=1e-6)

    def test_temporaries(self):
        """Tensors that are temporaries of a call live until it returns."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=16, max_kv_tokens=64)
        batch = ts.Batch(PAGE, [0, 16], [0, 16], range(16), [PAGE])
        q, k, v = (self.draw(16, heads, D) for heads in (HQ, HKV, HKV))
        pools = self.draw(16, PAGE, HKV, D), self.draw(16, PAGE, HKV, D)
        tokens, length = np.arange(64, dtype=np.int32)[None], np.array([64], np.int32)
        parts, lses = self.draw(2, 16, HQ, D), self.draw(2, 16, HQ)
        cache_of = lambda: ts.Cache(self.device, cfg, num_pages=16, page_size=PAGE)  # noqa: E731

        def run(of):
            """What every function makes of tensors that are `of(array)`, each a temporary of the call."""
            given = [pool.copy() for pool in pools]
            kv, made, out = ts.KvView(*given), [], np.zeros((16, HQ, D), np.float32)
            ctx.append(batch, kv, of(k), of(v))
            made += [pool.copy() for pool in given]
            ctx.append_select(batch, kv, of(q), of(v), of(k))
            made += [pool.copy() for pool in given] + [ctx.selected()]
            ctx.select(batch, kv, of(2 * q))
            made.append(ctx.selected())
            ctx.attend(batch, kv, of(q), StandIn(out, "float32"))
            made.append(out.copy())
            ctx.attend_dense(batch, ts.KvView(of(pools[0]), of(pools[1])), of(q), StandIn(out, "float32"))
            made.append(out.copy())
            ctx.attend_to(batch, kv, of(q), of(tokens), of(length), out=StandIn(out, "float32"))
            made.append(out.copy())
            lists = dict(ranks=of(tokens), total_len=of(length))
            ctx.attend_to(batch, kv, of(q), of(tokens), of(length), **lists, out=StandIn(out, "float32"))
            made.append(out.copy())
            del lists
            ctx.merge(of(parts), of(lses), out)
            made.append(out.copy())
            ctx.pool(batch, of(q))
            ctx.score(batch, ts.KvView(of(pools[0]), of(pools[1])))
            ctx.vote_top_k(batch)
            made += [ctx.workspace("queries").numpy(), ctx.selected()]
            for step in ("step", "step_dense"):
                cache = cache_of()
                rows = cache.extend([(cache.create(), 16)])
                getattr(ctx, step)(cache, 0, rows, of(q), of(k), of(v), StandIn(out, "float32"))
                made.append(out.copy())
                rows = cache.extend([(cache.create(), 16)])
                ctx.append(rows, (cache, 0), of(v), of(k))
                ctx.attend_dense(rows, cache.layer(0), of(q), StandIn(out, "float32"))
                made.append(out.copy())
            reader = ts.Context.for_prefill(self.device, cfg, block_len=6, max_kv_len=16)
            pieces = cache.extend_in_pieces(reader, [(cache.create(), 16)], 6)
            reader.prefill(cache, 0, pieces, of(q), of(k), of(v), StandIn(out, "float32"))
            made.append(out.copy())
            return made

        for want, got in zip(run(lambda array: array), run(Fleeting), strict=True):
            np.testing.assert_array_equal(got, want)
        tables = ts.Batch(PAGE, *(np.array(table) for table in ([0, 1], [0, 2], [3, 4], [2])))
        self.assertEqual(tables.row(0).kv_len, 6)

    def test_what_is_held(self):
        """Objects may be dropped in any order: what needs another holds it."""
        cfg = config()
        cache = ts.Cache(self.device, cfg, num_pages=4, page_size=PAGE)
        held = weakref.ref(cache)
        layer = cache.layer(0)
        del cache
        gc.collect()
        self.assertIsNotNone(held())
        ctx = ts.Context(self.device, cfg, max_block_len=1, max_kv_tokens=64)
        ctx.attend_dense(ts.Batch(PAGE, [0, 1], [0, 1], [0], [1]), layer, self.draw(1, HQ, D))
        del layer
        gc.collect()
        self.assertIsNone(held())
        votes = np.asarray(ctx.workspace("votes"))
        held = weakref.ref(ctx)
        del ctx
        gc.collect()
        self.assertIsNotNone(held())
        votes[:] = 1
        del votes
        gc.collect()
        self.assertIsNone(held())

    def test_strides(self):
        """Keys and values in strides of their own, and behind each other in one row, in either order."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
        pages = 16
        rows, pair = np.zeros((pages, HKV, PAGE, 2 * D), np.float32), np.zeros((pages, 2, PAGE, HKV, D), np.float32)
        hnd = np.zeros((pages, HKV, PAGE, D), np.float32)
        views = [
            ts.KvView(np.zeros((pages, PAGE, HKV, D), np.float32), np.zeros((pages, PAGE, HKV, D), np.float32)),
            ts.KvView(rows[..., :D], rows[..., D:], "HND"),
            ts.KvView(rows[..., D:], rows[..., :D], "HND"),
            ts.KvView(pair[:, 1], pair[:, 0]),
            ts.KvView(np.zeros((pages, PAGE, HKV, D), np.float32), hnd.transpose(0, 2, 1, 3)),
        ]
        q, k, v = (self.draw(8, heads, D) for heads in (HQ, HKV, HKV))
        results = []
        for kv in views:
            for length in (8, 16, 24):
                batch = ts.Batch(PAGE, [0, 8], *tables(length, pages))
                ctx.append_select(batch, kv, q, k + length, v - length)
            results.append((ctx.selected(), ctx.attend(batch, kv, q)))
        for tokens, out in results:
            self.assertEqual(tokens, results[0][0])
            np.testing.assert_array_equal(out, results[0][1])
        np.testing.assert_array_equal(hnd[pages - 1].transpose(1, 0, 2), v[:PAGE] - 8)
        with self.assertRaisesRegex(ValueError, "the last strides of k and v pages must be 1"):
            ctx.score(batch, ts.KvView(rows[..., ::2], rows[..., ::2], "HND"))

    def test_fused(self):
        """Slices of a fused projection are taken as they are, and give the bits of dense tensors."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)

        def run(of, cast=lambda tensor: tensor):
            """What every function makes of `[tokens, heads, D]` that are `of(fused)`."""
            random = np.random.default_rng(9)
            cache = ts.Cache(self.device, cfg, num_pages=32, page_size=PAGE)
            sequences, kv, made = [cache.create(), cache.create()], cache.layer(0), []
            for block in (8, 8, 1, 1):
                fused = random.standard_normal((block, HQ + 2 * HKV, D)).astype(np.float32)
                q, k, v = (cast(of(part)) for part in np.split(fused, [HQ, HQ + HKV], axis=1))
                out, lse = np.empty((block, HQ, D), np.float32), np.empty((block, HQ), np.float32)
                given = dict(out=cast(out), lse=cast(lse))
                step = lambda name: getattr(ctx, name)(cache, 0, batch, q, k, v, **given)  # noqa: E731
                batch = cache.extend([(sequences[0], block)])
                step("step" if block == 8 else "step_dense")
                made += [out.copy(), lse.copy()]
                batch = cache.extend([(sequences[1], block)])
                ctx.append(batch, (cache, 0), k, v)
                ctx.pool(batch, q)
                ctx.score(batch, kv)
                ctx.vote_top_k(batch)
                ctx.attend(batch, kv, q, **given)
                made += [out.copy(), lse.copy(), ctx.selected()]
                ctx.select(batch, kv, q)
                length = np.array([len(ctx.selected())], np.int32)
                ctx.attend_to(batch, kv, q, np.array([ctx.selected()], np.int32), length, **given)
                made += [out.copy(), lse.copy()]
                ctx.attend_dense(batch, kv, q, **given)
                made += [out.copy(), lse.copy()]
            return made

        def heads_first(part):
            return np.ascontiguousarray(part.transpose(1, 0, 2)).transpose(1, 0, 2)

        want = run(np.ascontiguousarray)
        stand_in = lambda tensor: StandIn(tensor, "float32")  # noqa: E731
        for got in (run(lambda part: part), run(heads_first), run(lambda part: part, stand_in)):
            for got, want_one in zip(got, want, strict=True):
                np.testing.assert_array_equal(got, want_one)

    def test_own_results(self):
        """Logits by their index, votes and lists of one's own, and what comes too early."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
        k, v, q = self.draw(16, PAGE, HKV, D), self.draw(16, PAGE, HKV, D), self.draw(1, HQ, D)
        kv, batch = ts.KvView(k, v), ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
        with self.assertRaisesRegex(ts.Error, "`score` needs `pool` of the same batch before it") as caught:
            ctx.score(batch, kv)
        self.assertEqual(caught.exception.status, "TS_STATUS_ORDER")
        ctx.pool(batch, q)
        ctx.score(batch, kv)
        logits = ctx.workspace("logits").numpy().ravel()
        want = np.einsum("hd,nhd->nh", q[0], np.repeat(k.reshape(64, HKV, D), HQ // HKV, axis=1)) / np.sqrt(D)
        for token in (2, 17, 59):
            got = [logits[ctx.logit_index(batch, 0, token, head)] for head in range(HQ)]
            np.testing.assert_allclose(got, want[token], atol=1e-5)
        with self.assertRaisesRegex(ts.Error, "`token` must be below 64, got 64"):
            ctx.logit_index(batch, 0, 64, 0)
        votes = np.asarray(ctx.workspace("votes"))
        votes[:] = np.arange(64) % 10
        ctx.provide("votes", batch)
        ctx.top_k(batch)
        self.assertEqual(ctx.selected(), [0, 1, 9, 19, 29, 39, 49, 60, 61, 62, 63])
        other = ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
        with self.assertRaisesRegex(ts.Error, "the workspace holds the results of another batch"):
            ctx.attend(other, kv, q)
        ctx.provide("selected", other)
        tokens, length = np.array([ctx.selected()], np.int32), np.array([11], np.int32)
        np.testing.assert_array_equal(ctx.attend(other, kv, q), ctx.attend_to(batch, kv, q, tokens, length))
        with self.assertRaisesRegex(ValueError, "`name` must be one of queries"):
            ctx.provide("vote", batch)

    def test_ranks(self):
        """Two contexts that share the heads, with their products and votes added, decide as one with all heads."""
        fields = dict(selection_cache=1, similarity_threshold=0.8, max_reuse=2)
        pools = [np.zeros((16, PAGE, HKV, D), np.float32) for _ in "kv"]

        def rank(heads):
            cfg = config(num_qo_heads=heads * HQ // HKV, num_kv_heads=heads, **fields)
            ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=64)
            return ctx, ts.SelectionCache(self.device, cfg, num_layers=1, num_sequences=1)

        (whole, reuse), ranks, first = rank(HKV), [rank(1) for _ in range(HKV)], self.draw(8, HQ, D)
        length, actions, own_differ = 0, [], False
        for step, block in enumerate([8, 8, 8, *[1] * 9]):
            length += block
            q, k, v = first[:block] + 0.3 * self.draw(block, HQ, D), *(self.draw(block, HKV, D) for _ in "kv")
            q[:, HQ // 2 :] += (0.7 if step % 2 else 0) * self.draw(block, HQ // 2, D)
            batch = ts.Batch(PAGE, [0, block], *tables(length, 16), sequence_indices=[0])
            whole.append_select(batch, ts.KvView(*pools), q, k, v, reuse)
            action = whole.workspace("actions").numpy()[0]
            actions.append(action)
            parts = [q[:, HQ // HKV * head :][:, : HQ // HKV] for head in range(HKV)]
            views = [ts.KvView(*(pool[:, :, head : head + 1] for pool in pools)) for head in range(HKV)]

            def all_reduce(name):
                buffers = [np.asarray(ctx.workspace(name)) for ctx, _ in ranks]
                total = sum(buffers)
                for buffer in buffers:
                    buffer[:] = total

            for (ctx, cached), part in zip(ranks, parts):
                ctx.pool(batch, part, cached)
                own_differ |= ctx.workspace("actions").numpy()[0] != action
                ctx.pool(batch, part)
                ctx.compare(batch, cached)
            self.assertEqual(ctx.workspace("products").numpy().dtype, np.float64)
            all_reduce("products")
            for (ctx, cached), kv in zip(ranks, views):
                ctx.decide(batch, cached)
                self.assertEqual(ctx.workspace("actions").numpy()[0], action)
                ctx.score(batch, kv)
                ctx.vote(batch)
            all_reduce("votes")
            for ctx, cached in ranks:
                ctx.top_k(batch, cached)
                self.assertEqual(ctx.selected(), whole.selected())
        self.assertEqual(set(actions), {1, 2, 3})
        self.assertTrue(own_differ)

    def test_operations(self):
        """A context for some operations, and what a device supports."""
        cfg = config()
        ctx = ts.Context(self.device, cfg, operations=["vote", "score", "pool"], max_kv_tokens=64)
        q, batch = self.draw(1, HQ, D), ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
        kv = ts.KvView(self.draw(1, PAGE, HKV, D), self.draw(1, PAGE, HKV, D))
        ctx.select(batch, kv, q)
        with self.assertRaisesRegex(ts.Error, "`attend` needs a plan with the operation `attend`") as caught:
            ctx.attend(batch, kv, q)
        self.assertEqual(caught.exception.status, "TS_STATUS_MISSING")
        for wrong in ([], ["append", "step"]):
            with self.assertRaisesRegex(ValueError, "`operations` must be some of append, .*, got (none|step)"):
                ts.Context(self.device, cfg, operations=wrong)
        self.assertTrue(self.device.supports(cfg))
        wrong = config()
        wrong.raw.top_k = 0
        with self.assertRaisesRegex(ts.Error, "`top_k` must be at least 1"):
            self.device.supports(wrong)

    def test_written_len(self):
        """A layer that missed a step says so."""
        cfg = config()
        cache = ts.Cache(self.device, cfg, num_layers=2, num_pages=16, page_size=PAGE)
        ctx = ts.Context(self.device, cfg, max_block_len=8, max_kv_tokens=64)
        sequence = cache.create()
        q, k, v = (self.draw(8, heads, D) for heads in (HQ, HKV, HKV))
        missed = cache.extend([(sequence, 8)])
        blocks = missed.in_blocks(5)
        self.assertEqual((blocks.num_rows, blocks.info.max_block_len, blocks.row(1).block_len), (2, 5, 3))
        ctx.step(cache, 0, missed, q, k, v)
        self.assertEqual([cache.written_len(layer, sequence) for layer in (0, 1)], [8, 0])
        batch = cache.extend([(sequence, 8)])
        with self.assertRaisesRegex(ts.Error, "layer 1 holds the keys and values of 0 tokens") as caught:
            ctx.step(cache, 1, batch, q, k, v)
        self.assertEqual(caught.exception.status, "TS_STATUS_UNWRITTEN")
        ctx.append(missed, (cache, 1), k, v)
        ctx.step(cache, 1, batch, q, k, v)
        self.assertEqual(cache.written_len(1, sequence), 16)
        cache.extend([(sequence, 8)])
        cache.layer_mut(0)
        self.assertEqual([cache.written_len(layer, sequence) for layer in (0, 1)], [24, 16])

    def test_prefill(self):
        """Prompts piece by piece, against the definitions; a function that stops, or raises."""
        for fields in [{}, dict(positions="reassigned", rope=dict(theta=THETA))]:
            cfg = config(**fields)
            cache = ts.Cache(self.device, cfg, num_layers=2, num_pages=32, page_size=PAGE)
            ctx = ts.Context.for_prefill(self.device, cfg, block_len=6, max_kv_len=40, max_piece_len=24)
            first, second = cache.create(), cache.create()
            pieces = cache.extend_in_pieces(ctx, [(first, 37), (second, 20)], 6)
            self.assertEqual((pieces.num_pieces, pieces.num_blocks, pieces.block_len), (3, 11, 6))
            q, k, v = (self.draw(57, heads, D) for heads in (HQ, HKV, HKV))
            told = []
            out, lse = ctx.prefill(cache, 0, pieces, q, k, v, lse=True, progress=lambda *at: told.append(at))
            self.assertEqual(told, [(24, 57), (43, 57), (57, 57)])
            for begin, end in ((0, 37), (37, 57)):
                for block in range(begin, end, 6):
                    of_block, seen = slice(block, min(block + 6, end)), slice(begin, min(block + 6, end))
                    queries = q[of_block].astype(np.float64)
                    _, tokens = select(cfg, queries, k[seen].astype(np.float64))
                    want_out, want_lse = attend(cfg, queries, k[seen], v[seen], tokens)
                    np.testing.assert_allclose(out[of_block], want_out, atol=1e-5)
                    np.testing.assert_allclose(lse[of_block], want_lse, atol=1e-5)

            given = np.full_like(q, 7)
            stopped = ctx.prefill(cache, 1, pieces, q, k, v, out=given, progress=lambda done, _: done < 43)
            self.assertIs(stopped, given)
            np.testing.assert_array_equal(given[:43], out[:43])
            np.testing.assert_array_equal(given[43:], 7)
            self.assertEqual([cache.written_len(1, sequence) for sequence in (first, second)], [37, 6])
            with self.assertRaises(ZeroDivisionError):
                ctx.prefill(cache, 1, pieces, q, k, v, progress=lambda done, total: done / 0)
            np.testing.assert_array_equal(ctx.prefill(cache, 1, pieces, q, k, v), out)

            pools = [np.full((16, PAGE, HKV, D), np.nan, np.float32) for _ in "kv"]
            batch = ts.Batch(PAGE, [0, 37, 57], [0, 10, 15], range(15), [1, 4], sequence_indices=[0, 1])
            own = batch.in_pieces(ctx, 6)
            np.testing.assert_array_equal(ctx.prefill_kv(own, ts.KvView(*pools), q, k, v), out)

        with self.assertRaisesRegex(ValueError, r"`q` must have shape \(57, 4, 16\), got \(56, 4, 16\)"):
            ctx.prefill(cache, 0, pieces, q[1:], k, v)
        with self.assertRaisesRegex(ts.Error, "`max_workspace_bytes` must be at least .*, got 1000"):
            ts.Context.for_prefill(self.device, cfg, max_workspace_bytes=1000)
        with self.assertRaisesRegex(TypeError, "no field `block` in ts_prefill_config"):
            ts.Context.for_prefill(self.device, cfg, block=6)
        with self.assertRaisesRegex(ts.Error, "`max_block_len` is limited to 6, the batch needs 7"):
            cache.extend_in_pieces(ctx, [(first, 8)], 7)
        with self.assertRaisesRegex(ts.Error, "out of pages") as caught:
            cache.extend_in_pieces(ctx, [(second, 1), (cache.create(), 40), (cache.create(), 40)], 6)
        self.assertEqual((caught.exception.status, cache.len(second)), ("TS_STATUS_OUT_OF_PAGES", 20))

    def test_what_progress_may_do(self):
        """Other objects are free; those at work are neither used nor closed."""
        cfg = config(selection_cache=1)
        cache = ts.Cache(self.device, cfg, num_layers=1, num_pages=32, page_size=PAGE)
        ctx, other = (ts.Context.for_prefill(self.device, cfg, block_len=6, max_kv_len=40) for _ in range(2))
        first, second = cache.create(), cache.create()
        pieces, selections = cache.extend_in_pieces(ctx, [(first, 13)], 6), cache.selections()
        q, k, v = (self.draw(13, heads, D) for heads in (HQ, HKV, HKV))
        for name, forbidden in {
            "context": lambda: ctx.selected(0),
            "context` is at work .* must not close": ctx.close,
            "cache": lambda: cache.extend([(second, 1)]),
            "cache` is at work .* must not close": cache.close,
            "pieces` is at work .* must not close": pieces.close,
            "selections": selections.reset_stats,
        }.items():
            with self.assertRaisesRegex(RuntimeError, f"`{name}"):
                ctx.prefill(cache, 0, pieces, q, k, v, progress=lambda *_: forbidden())
        pools = [np.zeros((4, PAGE, HKV, D), np.float32) for _ in "kv"]
        own = ts.Batch(PAGE, [0, 13], [0, 4], range(4), [1]).in_pieces(other, 6)
        told = []
        def read_another(*_):
            told.append(other.prefill_kv(own, ts.KvView(*pools), q, k, v))
        out = ctx.prefill(cache, 0, pieces, q, k, v, progress=read_another)
        np.testing.assert_array_equal(told[0], out)
        for stops in (False, np.bool_(False), 0):
            told = []
            ctx.prefill(cache, 0, pieces, q, k, v, progress=lambda done, _: (told.append(done), stops)[1])
            self.assertEqual(len(told), 1)
        for closed in (pieces, ctx, cache):
            closed.close()

    def test_arguments_of_another_kind(self):
        """Objects of another class, numbers that ctypes would cut off, memory that cannot be written."""
        cfg = config()
        cache = ts.Cache(self.device, cfg, num_layers=1, num_pages=8, page_size=PAGE)
        reader = ts.Context.for_prefill(self.device, cfg, block_len=2, max_kv_len=8)
        ctx = ts.Context(self.device, cfg, max_rows=2, max_block_len=1, max_kv_tokens=64)
        sequence = cache.create()
        batch = cache.extend([(sequence, 1)])
        pieces = cache.extend_in_pieces(reader, [(cache.create(), 1)], 2)
        q, k, v = (self.draw(1, heads, D) for heads in (HQ, HKV, HKV))
        for text, wrong in {
            "`pieces` must be a Pieces, got Batch": lambda: reader.prefill(cache, 0, batch, q, k, v),
            "`batch` must be a Batch, got Pieces": lambda: ctx.step(cache, 0, pieces, q, k, v),
            "`context` must be a Context, got Cache": lambda: cache.extend_in_pieces(cache, [(sequence, 1)], 2),
            "`cache` must be a Cache, got Device": lambda: ctx.step(self.device, 0, batch, q, k, v),
            "`cache` must be a Cache, got int": lambda: ctx.step(3, 0, batch, q, k, v),
            "`device` must be a Device, got Context": lambda: ts.Cache(ctx, cfg),
            "`block_len` must be a whole number, got float": lambda: batch.in_blocks(1.5),
        }.items():
            with self.assertRaisesRegex(TypeError, text):
                wrong()
        for text, wrong in {
            "`block_len` must be from 0 to 18446744073709551615, got -1": lambda: batch.in_blocks(-1),
            "`layer` must be from 0 to .*, got -1": lambda: cache.written_len(-1, sequence),
            "`num_tokens` must be from 0 to .*, got -5": lambda: cache.extend([(sequence, -5)]),
            "`max_workspace_bytes` must be from 0 to .*, got -1": lambda: ts.Context.for_prefill(
                self.device, cfg, max_workspace_bytes=-1
            ),
            "`num_qo_heads` must be from 0 to 4294967295, got 4294967300": lambda: config(num_qo_heads=2**32 + 4),
        }.items():
            with self.assertRaisesRegex(ValueError, text):
                wrong()
        self.assertEqual(batch.in_blocks(np.int64(1)).num_rows, 1)

        constant = np.zeros_like(q)
        constant.flags.writeable = False
        with self.assertRaisesRegex(ValueError, "`out` must be memory that can be written"):
            ctx.step(cache, 0, batch, q, k, v, out=constant)
        pool = np.zeros((1, PAGE, HKV, D), np.float32)
        pool.flags.writeable = False
        kv, one = ts.KvView(pool, np.zeros_like(pool)), ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
        for write in (lambda: ctx.append(one, kv, k, v), lambda: ctx.append_select(one, kv, q, k, v)):
            with self.assertRaisesRegex(ValueError, "`kv` must be memory that can be written"):
                write()
        ctx.select(one, kv, q)
        np.testing.assert_array_equal(ctx.attend(one, kv, constant), 0)

    def test_errors(self):
        cfg = config()
        ctx = ts.Context(self.device, cfg, max_rows=1, max_block_len=1, max_kv_tokens=64)
        batch = ts.Batch(PAGE, [0, 1], [0, 1], [0], [1])
        self.assertGreater(self.device.workspace_bytes(cfg, max_kv_tokens=64), 64 * HQ * 4)
        with self.assertRaisesRegex(ts.Error, "`top_k` must be at least 1, got 0") as caught:
            config(top_k=0)
        self.assertEqual(caught.exception.status, "TS_STATUS_CONFIG")
        with self.assertRaisesRegex(TypeError, "no field `topk` in ts_config"):
            config(topk=1)
        with self.assertRaisesRegex(ValueError, "`dtype` must be one of f16, .*, got f8"):
            config(dtype="f8")
        with self.assertRaisesRegex(ValueError, r"`q` must have shape \(1, 4, 16\), got \(2, 4, 16\)"):
            ctx.pool(batch, self.draw(2, HQ, D))
        with self.assertRaisesRegex(TypeError, "`q` must be f32, got f16"):
            ctx.pool(batch, self.draw(1, HQ, D).astype(np.float16))
        with self.assertRaisesRegex(ValueError, "`q` must have adjacent elements in its last dimension"):
            ctx.pool(batch, self.draw(1, HQ, 2 * D)[:, :, ::2])
        heads = self.draw(1, HQ, D)
        for wrong in (heads[:, ::-1], np.broadcast_to(heads[:, :1], heads.shape)):
            with self.assertRaisesRegex(ValueError, "`q` must have strides above 0, its strides are"):
                ctx.pool(batch, wrong)
        part = np.zeros((1, HQ), np.dtype([("head", "<f4", D), ("flag", "u1")]))["head"]
        with self.assertRaisesRegex(ValueError, "`q` must have strides of whole elements, 4 bytes, its strides are"):
            ctx.pool(batch, part)
        with self.assertRaisesRegex(ValueError, "`out` must be contiguous"):
            kv = ts.KvView(self.draw(1, PAGE, HKV, D), self.draw(1, PAGE, HKV, D))
            ctx.attend_dense(batch, kv, heads, out=self.draw(1, HQ, 2 * D)[:, :, :D])
        with self.assertRaisesRegex(ValueError, "`indptr` must have 2 entries for 1 rows, got 3"):
            ts.Batch(PAGE, [0, 1], [0, 1, 2], [0], [1])
        with self.assertRaisesRegex(ValueError, "`indptr` must end with the number of indices, 2, got 1"):
            ts.Batch(PAGE, [0, 1], [0, 1], [0, 1], [1])
        with self.assertRaisesRegex(ts.Error, "cpu has no `capture`"):
            self.device.capture(lambda: None)
        with self.assertRaisesRegex(ValueError, "`name` must be one of queries"):
            ctx.workspace("vote")

    def test_data_ptr(self):
        """Tensors with PyTorch's methods give what NumPy's arrays give."""
        cfg = config(dtype="bf16")
        ctx = ts.Context(self.device, cfg, max_block_len=1, max_kv_tokens=64)
        pool, q = to_bf16(self.draw(16, 2, PAGE, HKV, D)), to_bf16(self.draw(1, HQ, D))
        batch = ts.Batch(PAGE, [0, 1], [0, 16], range(16), [PAGE])
        want, want_lse = ctx.attend_dense(batch, ts.KvView(pool[:, 0], pool[:, 1]), q, lse=True)
        as_bf16 = [StandIn(part, "bfloat16") for part in (pool[:, 0], pool[:, 1], q)]
        out, lse = np.empty_like(q), np.empty((1, HQ), np.float32)
        ctx.attend_dense(
            batch, ts.KvView(*as_bf16[:2]), as_bf16[2], StandIn(out, "bfloat16"), StandIn(lse, "float32")
        )
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        as_bf16[2].device = "cuda:0"
        with self.assertRaisesRegex(ValueError, "`q` must be on cpu, it is on cuda:0"):
            ctx.pool(batch, as_bf16[2])

    def test_torch(self):
        try:
            import torch
        except ImportError:
            self.skipTest("no PyTorch")
        cfg = config(dtype="bf16")
        cache = ts.Cache(self.device, cfg, num_pages=16, page_size=PAGE)
        ctx = ts.Context(self.device, cfg, max_block_len=8, max_kv_tokens=64)
        q, k, v = (torch.randn(8, heads, D, dtype=torch.bfloat16) for heads in (HQ, HKV, HKV))
        batch = cache.extend([(cache.create(), 8)])
        out, lse = ctx.step(cache, 0, batch, q, k, v, lse=True)
        as_f64 = [x.to(torch.float64).numpy() for x in (q, k, v)]
        want_out, want_lse = attend(cfg, *as_f64, list(range(8)))
        np.testing.assert_allclose(out.to(torch.float64).numpy(), want_out, atol=1e-2, rtol=1e-2)
        np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-4)
        self.assertEqual(ctx.workspace("selected").torch()[0, :8].tolist(), list(range(8)))


class Slice:
    """A part of a buffer, with strides."""

    def __init__(self, buffer, array, part):
        self.buffer = buffer  # holds the memory
        self.interface = {
            "data": (buffer.ptr + part.ctypes.data - array.ctypes.data, False),
            "shape": part.shape, "typestr": buffer.typestr, "strides": part.strides, "version": 3, "stream": None,
        }  # fmt: skip

    @property
    def __cuda_array_interface__(self):
        return self.interface


class Emulated(unittest.TestCase):
    """GPU kernels."""

    def emulated(self):
        """The device; a build without it skips the test."""
        try:
            return ts.Device.emulated()
        except ts.Error as error:
            self.skipTest(str(error))

    def decoding(self, seed, max_kv_tokens):
        """The device; on it, what a step of one query over eight pages needs: a context, the pages and the query."""
        device, random = self.emulated(), np.random.default_rng(seed)
        ctx = ts.Context(
            device, config(dtype="bf16", head_dim=64), max_rows=1, max_block_len=1, max_kv_tokens=max_kv_tokens
        )
        shapes = [(8, PAGE, HKV, 64)] * 2 + [(1, HQ, 64)]
        k, v, q = (device.to_device(to_bf16(random.standard_normal(shape))) for shape in shapes)
        return device, ctx, ts.KvView(k, v), q

    def test_fused(self):
        """Slices of a fused projection on the device."""
        device = self.emulated()
        cfg = config(dtype="bf16", head_dim=64)
        ctx = ts.Context(device, cfg, max_rows=1, max_block_len=8, max_kv_tokens=32)
        results = []
        for fused in (False, True):
            random = np.random.default_rng(6)
            kv = ts.KvView(*(device.to_device(to_bf16(np.zeros((8, PAGE, HKV, 64)))) for _ in "kv"))
            made = []
            for length, block in ((8, 8), (16, 8), (24, 8), (25, 1)):
                array = to_bf16(random.standard_normal((block, HQ + 2 * HKV, 64)))
                buffer = device.to_device(array)
                parts = np.split(array, [HQ, HQ + HKV], axis=1)
                copy = lambda part: device.to_device(np.ascontiguousarray(part))  # noqa: E731
                q, k, v = (Slice(buffer, array, part) if fused else copy(part) for part in parts)
                batch, out = ts.Batch(PAGE, [0, block], *tables(length, 8)), ts.Buffer(device, (block, HQ, 64), "<f4")
                ctx.append_select(batch, kv, q, k, v)
                ctx.attend(batch, kv, q, out)
                made += [ctx.selected(), out.numpy()]
            results.append(made)
        for dense, fused in zip(*results, strict=True):
            np.testing.assert_array_equal(dense, fused)

    def test_prefill(self):
        """Two prompts of odd lengths on the device, as the processor reads them."""
        device, cfg = self.emulated(), config(dtype="bf16", head_dim=64, n_init=2, n_local=3, top_k=5)
        results = []
        for on in (ts.Device.cpu(), device):
            random = np.random.default_rng(8)
            copy = on.to_device if on is device else lambda array: array
            q, k, v = (copy(to_bf16(random.standard_normal((26, heads, 64)))) for heads in (HQ, HKV, HKV))
            ctx = ts.Context.for_prefill(on, cfg, block_len=5, max_kv_len=20, max_piece_len=10)
            kv = ts.KvView(*(copy(to_bf16(np.zeros((8, PAGE, HKV, 64)))) for _ in "kv"))
            pieces = ts.Batch(PAGE, [0, 13, 26], [0, 4, 8], range(8), [1, 1]).in_pieces(ctx, 5)
            out, lse = copy(np.zeros((26, HQ, 64), np.float32)), copy(np.zeros((26, HQ), np.float32))
            ctx.prefill_kv(pieces, kv, q, k, v, out=out, lse=lse)
            results.append([np.asarray(x) if on.kind == "cpu" else x.numpy() for x in (out, lse)])
        for want, got in zip(*results, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-2)

    def test_select_and_capture(self):
        device = self.emulated()
        random = np.random.default_rng(3)
        cfg = config(dtype="bf16", head_dim=64)
        lists = []
        for on in [ts.Device.cpu(), device]:
            random = np.random.default_rng(3)
            copy = (lambda x: x) if on.kind == "cpu" else on.to_device
            k, v, q = (to_bf16(random.standard_normal(s)) for s in [(8, PAGE, HKV, 64)] * 2 + [(1, HQ, 64)])
            k, v, q = copy(k), copy(v), copy(q)
            ctx = ts.Context(on, cfg, max_rows=1, max_block_len=1, max_kv_tokens=32)
            batch = ts.Batch(PAGE, [0, 1], *tables(30, 8))
            ctx.select(batch, ts.KvView(k, v), q)
            lists.append(ctx.selected())
        self.assertEqual(lists[0], lists[1])
        self.assertEqual(ctx.workspace("selected").numpy()[0, : len(lists[1])].tolist(), lists[1])
        np.testing.assert_array_equal(q.numpy().shape, (1, HQ, 64))

        slot = ts.BatchSlot(device, batch, max_pages=8)
        bound = slot.put(batch)
        kv = ts.KvView(k, v)
        ctx.select(bound, kv, q)
        graph = device.capture(lambda: ctx.select(bound, kv, q))
        slot.put(ts.Batch(PAGE, [0, 1], *tables(31, 8)))
        graph.launch()
        self.assertEqual(ctx.selected()[-1], 30)
        with self.assertRaisesRegex(ZeroDivisionError, "division"):
            device.capture(lambda: 1 / 0)

    def test_graph_holds_what_it_uses(self):
        """Context, batch, pages and tensors of recorded work live as long as the graph."""
        device, ctx, kv, q = self.decoding(seed=4, max_kv_tokens=32)
        out = ts.Buffer(device, (1, HQ, 64), "<f4")
        slot = ts.BatchSlot(device, ts.Batch(PAGE, [0, 1], *tables(30, 8)), max_pages=8)
        bound = slot.put(ts.Batch(PAGE, [0, 1], *tables(30, 8)))

        def work():
            ctx.select(bound, kv, q)
            ctx.attend(bound, kv, q, out)

        work()
        want = out.numpy()
        graph = device.capture(work)
        used = [weakref.ref(object) for object in (ctx, bound, kv.k, kv.v, q)]
        del ctx, bound, kv, q, work
        gc.collect()
        self.assertNotIn(None, [ref() for ref in used])
        graph.launch()
        np.testing.assert_array_equal(out.numpy(), want)
        del graph
        gc.collect()
        self.assertEqual([ref() for ref in used], [None] * len(used))

    def test_tables_on_the_device(self):
        """Block tables and slots of tokens become a batch's, directly and in recorded work."""
        device, ctx, kv, q = self.decoding(seed=5, max_kv_tokens=64)
        like = ts.Batch(PAGE, [0, 1], *tables(30, 8))
        ctx.select(like, kv, q)
        want = ctx.selected()
        pages = np.array([[9] * 8, [*range(7, -1, -1)]], np.int32)
        slots = (PAGE * pages[:, :, None] + np.arange(PAGE, dtype=np.int32)).reshape(2, -1)
        slot = ts.BatchSlot(device, like, max_pages=16)
        rows, length = device.to_device(np.array([1], np.int32)), device.to_device(np.array([30], np.int32))
        for entries, are_slots in [(pages, False), (slots, True)]:
            bound = slot.translate(device.to_device(entries), length, 8, are_slots, rows=rows)
            ctx.select(bound, kv, q)
            self.assertEqual(ctx.selected(), want)
        self.assertEqual((slot.faults(), bound.num_rows, bound.info.max_kv_len), (0, 1, 32))
        with self.assertRaisesRegex(ts.Error, "`row` needs tables on the host"):
            bound.row(0)
        with self.assertRaisesRegex(ValueError, r"`kv_lens` must have shape \(1,\), got \(2,\)"):
            slot.translate(device.to_device(pages), device.to_device(np.zeros(2, np.int32)), 8)
        given = [device.to_device(pages)]
        # Recorded with temporaries, which the graph holds; the length is read at each launch.
        graph = device.capture(lambda: ctx.select(slot.translate(given.pop(), length, 8, rows=rows), kv, q))
        graph.launch()
        self.assertEqual(ctx.selected(), want)
        length.from_host(np.array([29], np.int32))
        graph.launch()
        self.assertEqual(ctx.selected()[-1], 28)
        slot.translate(device.to_device(pages), device.to_device(np.array([30], np.int32)), 8)  # row 0: pages beyond 8
        self.assertGreater(slot.faults(), 0)


if __name__ == "__main__":
    unittest.main()
