"""This library next to its peers on one GPU, in one process, on the same tensors and stream: see README.md."""

import argparse
import csv
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "host" / "capi" / "python")]

from timing import REPEATS, Timer  # noqa: E402

FULL = SimpleNamespace(hq=32, hkv=8, dim=128, page=16, n_init=128, n_local=511, top_k=2048)
# For testing this program on the processor, with Triton's interpreter.
SMALL = SimpleNamespace(hq=8, hkv=2, dim=64, page=16, n_init=16, n_local=47, top_k=100)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True, type=Path, help="libtokenselect_c.so")
    parser.add_argument("--out", required=True, type=Path, help="folder for peers.csv, peers.svg and peers.png")
    parser.add_argument("--quick", action="store_true", help="32 k and 1 M tokens only")
    parser.add_argument("--test-on-cpu", action="store_true", help="tiny, without a GPU, to test this program")
    return parser.parse_args()


class Results:
    """Measurements and checks."""

    def __init__(self, timer):
        self.timer, self.rows, self.failures, self.skipped = timer, [], [], []

    def measure(self, operation, peer, tokens, num_bytes, work):
        """Times `work`; a peer that fails is left out."""
        try:
            micros, host = self.timer(work)
        except Exception as error:  # whatever a peer raises
            return self.skip(f"{operation}, {peer}, {tokens}", error)
        rate = num_bytes / micros / 1e3
        row = dict(operation=operation, peer=peer, tokens=tokens, us=micros, bytes=num_bytes)
        self.rows.append({**row, "gb_per_s": rate, "host_us": host})
        print(f"{operation:>14} {peer:>32} {tokens:>9} {micros:>10.1f} {rate:>8.0f} {host:>9.0f}", flush=True)

    def skip(self, what, error):
        text = f"SKIPPED {what}: {type(error).__name__}: {error}".split("\n")[0][:300]
        if text not in self.skipped:
            self.skipped.append(text)
            print(text, flush=True)

    def check(self, what, ok, found):
        print(f"{'ok' if ok else 'CHECK FAILED'}: {what}: {found}", flush=True)
        if not ok:
            self.failures.append(f"{what}: {found}")

    def us(self, operation, peer, tokens):
        """The median of one measurement, or None."""
        key = (operation, peer, tokens)
        found = [r["us"] for r in self.rows if (r["operation"], r["peer"], r["tokens"]) == key]
        return found[0] if found else None


def attention(q, k, v, slots):
    """Attention of one decode row over the tokens at `slots` in f32, one KV head after the other."""
    heads, dim = q.shape[1:]
    group, outputs = heads // k.shape[1], []
    for head in range(k.shape[1]):
        keys, values = k[slots, head].float(), v[slots, head].float()
        queries = q[0, head * group : (head + 1) * group].float()
        outputs.append(torch.softmax(queries @ keys.T * dim**-0.5, dim=-1) @ values)
    return torch.cat(outputs).unsqueeze(0)


def compare_outputs(results, what, got, want):
    """The largest difference, relative to the largest element: bf16 keeps 8 bits, for weights as for outputs."""
    error = (got.float() - want).abs().max() / want.abs().max()
    found = f"largest difference {error:.1e} of the largest"
    results.check(f"{what} against attention in f32", bool(error < 2e-2), found)


def compare_lists(results, what, got, want, votes, size):
    """Two lists may differ in tokens whose votes lie within a thousandth of the k-th."""
    got, want = set(got.tolist()), set(want.tolist())
    kth = torch.topk(votes, size.top_k).values[-1].item()
    differ = [abs(votes[token - size.n_init].item() / kth - 1) for token in got ^ want]
    ok = len(got) == len(want) and all(difference < 1e-3 for difference in differ)
    found = f"{len(got)} tokens, {len(differ)} differ, by up to {max(differ, default=0.0):.1e} of the k-th vote"
    results.check(what, ok, found)


class Ours:
    """This library over one context, `config` with a Selection Cache that always reuses."""

    def __init__(self, device, size, tokens, q, k, v, pages):
        import tokenselect as ts

        config = ts.Config(
            num_qo_heads=size.hq, num_kv_heads=size.hkv, head_dim=size.dim, dtype="bf16", n_init=size.n_init,
            n_local=size.n_local, top_k=size.top_k, selection_cache=1, similarity_threshold=-1.0, max_reuse=2**32 - 2,
        )  # fmt: skip
        self.ctx = ts.Context(device, config, max_rows=1, max_block_len=1, max_kv_tokens=pages.numel() * size.page)
        self.cached = ts.SelectionCache(device, config, num_layers=1, num_sequences=1)
        last = tokens - (pages.numel() - 1) * size.page
        self.batch = ts.Batch(size.page, [0, 1], [0, pages.numel()], pages, [last], sequence_indices=[0])
        paged = (-1, size.page, size.hkv, size.dim)
        self.q, self.kv, self.out = q, ts.KvView(k.view(paged), v.view(paged)), torch.empty_like(q)

    def score(self):
        self.ctx.score(self.batch, self.kv)

    def top_k(self):
        self.ctx.top_k(self.batch)

    def select(self):
        self.ctx.select(self.batch, self.kv, self.q)

    def select_reused(self):
        self.ctx.select(self.batch, self.kv, self.q, selection_cache=self.cached, layer=0)

    def attend(self):
        return self.ctx.attend(self.batch, self.kv, self.q, out=self.out)

    def attend_dense(self):
        return self.ctx.attend_dense(self.batch, self.kv, self.q, out=self.out)

    def step(self):
        self.select()
        self.attend()

    def step_reused(self):
        self.select_reused()
        self.attend()

    def votes(self, size, num_candidates):
        """A copy of the votes of the candidates."""
        return self.ctx.workspace("votes").torch()[size.n_init : size.n_init + num_candidates].clone()


def decoders(results, q, k, v, pages, last_page_len, what):
    """FlashInfer's decode with and without tensor cores, as far as they run: `{name: callable}`."""
    found = {}
    for name, tensor_cores in [("FlashInfer", False), ("FlashInfer, tensor cores", True)]:
        try:
            from flashinfer_peer import Decode

            decode = Decode(q, k, v, pages, last_page_len, tensor_cores)
            decode()
            synchronize(q)
            found[name] = decode
        except Exception as error:  # whatever a peer raises
            results.skip(f"{name}, {what}", error)
    return found


def synchronize(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()


def flashinfer_top_k(results, votes, k):
    """FlashInfer's top-k, if it runs and chooses the same votes."""
    try:
        from flashinfer_peer import top_k

        chosen = votes[top_k(votes, k)].sort().values
    except Exception as error:  # whatever a peer raises
        return results.skip("FlashInfer top_k", error)
    results.check("FlashInfer top_k against torch.topk", *same(chosen, torch.topk(votes, k).values.sort().values))
    return lambda votes: top_k(votes, k)


def same(got, want):
    differ = int((got != want).sum())
    return differ == 0, f"{differ} votes differ"


def fastest(results, make):
    """The launch shape with which the published dot product is fastest."""
    from published import CHOICES

    times = {}
    for choice in CHOICES if results.timer.cuda else CHOICES[:1]:
        try:
            times[choice] = results.timer(make(choice).score)[0]
        except Exception as error:  # one that does not compile
            results.skip(f"paged_dot with {choice}", error)
    return min(times, key=times.get)


def compare(results, device, ours_device, size, tokens, k, v):
    """All measurements over one context."""
    from published import Published

    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(1, size.hq, size.dim, generator=generator).bfloat16().to(device)
    num_pages = -(-tokens // size.page)
    pages = torch.randperm(num_pages, generator=generator).int()
    k, v = k[: num_pages * size.page], v[: num_pages * size.page]
    offsets = torch.arange(size.page, dtype=torch.int32)
    slots = (pages[:, None] * size.page + offsets).flatten()[:tokens].to(device)
    last = tokens - (num_pages - 1) * size.page
    num_candidates = tokens - 1 - size.n_local - size.n_init

    ours = Ours(ours_device, size, tokens, q, k, v, pages)
    make = lambda choice: Published(q, k, slots, size.n_init, num_candidates, size.top_k, choice)  # noqa: E731
    published = make(fastest(results, make))

    # The same answers first.
    ours.select()
    votes, chosen = ours.votes(size, num_candidates), torch.tensor(ours.ctx.selected(0))
    theirs = published.select()
    reference = published.vote()
    error = ((votes - reference).abs().max() / reference.max()).item()
    results.check(f"votes over {tokens} tokens", error < 1e-3, f"largest difference {error:.1e} of the largest")
    compare_lists(results, f"lists over {tokens} tokens", chosen, theirs, reference, size)
    chosen_slots = slots[chosen.to(device)].contiguous()
    want = attention(q, k, v, chosen_slots.long())
    compare_outputs(results, "attend", ours.attend(), want)
    as_tokens = (-1, 1, size.hkv, size.dim)
    sparse = decoders(results, q, k.view(as_tokens), v.view(as_tokens), chosen_slots, 1, "page size 1")
    for name, decode in sparse.items():
        compare_outputs(results, f"{name} over the list", decode(), want)
    want = attention(q, k, v, slots.long())
    compare_outputs(results, "attend_dense", ours.attend_dense(), want)
    paged = (-1, size.page, size.hkv, size.dim)
    dense = decoders(results, q, k.view(paged), v.view(paged), pages.to(device), last, f"page size {size.page}")
    for name, decode in dense.items():
        compare_outputs(results, f"{name} over all tokens", decode(), want)
    radix = flashinfer_top_k(results, votes, size.top_k)
    ours.select_reused()
    ours.step_reused()
    stats = ours.cached.stats()
    results.check("reuse of a selection", (stats.scored, stats.reused) == (1, 1), f"{stats.scored}, {stats.reused}")

    # Bytes: inputs read once, outputs written once.
    token = 2 * size.hkv * size.dim
    vectors = 2 * 2 * size.hq * size.dim
    listed = size.n_init + size.top_k + size.n_local + 1
    keys = num_candidates * token
    measure = results.measure
    ours.select()
    measure("score", "tokenselect", tokens, keys + 4 * num_candidates * size.hq, ours.score)
    measure("score", "published (Triton)", tokens, keys + 4 * num_candidates * size.hq, published.score)
    ours.select()  # votes to choose from
    measure("top_k", "tokenselect", tokens, 4 * (num_candidates + listed), ours.top_k)
    in_torch = lambda: torch.topk(votes, size.top_k, sorted=False)  # noqa: E731
    measure("top_k", "torch.topk", tokens, 4 * (num_candidates + size.top_k), in_torch)
    measure("select", "tokenselect", tokens, keys + 4 * listed, ours.select)
    measure("select", "published", tokens, keys + 4 * listed, published.select)
    if radix:
        measure("top_k", "FlashInfer", tokens, 4 * (num_candidates + size.top_k), lambda: radix(votes))
        with_radix = lambda: published.select(radix)  # noqa: E731
        measure("select", "published, FlashInfer top_k", tokens, keys + 4 * listed, with_radix)
    ours.select()
    measure("attend", "tokenselect", tokens, 2 * listed * token + vectors, ours.attend)
    for name, decode in sparse.items():
        measure("attend", name, tokens, 2 * listed * token + vectors, decode)
    measure("dense", "tokenselect", tokens, 2 * tokens * token + vectors, ours.attend_dense)
    for name, decode in dense.items():
        measure("dense", name, tokens, 2 * tokens * token + vectors, decode)
    step = keys + (2 * listed - size.top_k) * token + vectors
    measure("step", "tokenselect", tokens, step, ours.step)
    for name, decode in sparse.items():

        def published_step(decode=decode):
            # `plan` has kept this tensor, so that the next run reads the list that was just made.
            torch.index_select(slots, 0, published.select(), out=chosen_slots)
            decode()

        measure("step", f"published, {name}", tokens, step, published_step)
    measure("step reused", "tokenselect", tokens, 2 * listed * token + vectors, ours.step_reused)
    stats = ours.cached.stats()
    results.check("every timed step has reused", stats.scored == 1, f"{stats.scored} scored, {stats.reused} reused")


def version(module):
    try:
        return str(__import__(module).__version__)
    except Exception:  # whatever an import raises
        return "none"


def driver_version():
    """The driver's version, or that of CUDA it brings."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"for CUDA {torch._C._cuda_getDriverVersion()}"


def described(device, bandwidth):
    """The machine, for the CSV."""
    gpu, driver = "processor", "none"
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(device), driver_version()
    versions = ", ".join(f"{name} {version(name)}" for name in ["torch", "triton", "flashinfer"])
    commit = os.environ.get("TOKENSELECT_COMMIT", "unknown")
    how = f"copy {bandwidth / 1e12:.2f} TB/s; cold L2, medians of {REPEATS}"
    return f"{gpu}, driver {driver}, {versions}, commit {commit}; {how}"


def main():
    args = arguments()
    if not args.library.exists():
        sys.exit(f"there is no {args.library}")
    os.environ["TOKENSELECT_LIBRARY"] = str(args.library.resolve())
    if args.test_on_cpu:
        device, size, contexts = torch.device("cpu"), SMALL, [700, 1000]
    else:
        device, size, contexts = torch.device("cuda:0"), FULL, [32 << 10, 128 << 10, 512 << 10, 1 << 20]
        contexts = [contexts[0], contexts[-1]] if args.quick else contexts
        torch.cuda.init()
        torch.backends.cuda.matmul.allow_tf32 = False  # the reference is in f32
        torch.cuda.set_stream(torch.cuda.Stream())
    args.out.mkdir(parents=True, exist_ok=True)

    import tokenselect as ts  # after TOKENSELECT_LIBRARY is set

    if device.type == "cuda":
        ours_device = ts.Device.cuda(0, stream=torch.cuda.current_stream().cuda_stream)
    else:
        ours_device = ts.Device.cpu()
    results = Results(Timer(device))
    bandwidth = results.timer.copy_bandwidth()
    machine = described(device, bandwidth)
    print(machine)
    print(f"{'operation':>14} {'':>32} {'tokens':>9} {'us':>10} {'GB/s':>8} {'host us':>9}", flush=True)
    if version("flashinfer") == "none":
        results.skip("FlashInfer", ImportError("it cannot be imported"))

    slots = -(-contexts[-1] // size.page) * size.page
    k, v = (torch.randn(slots, size.hkv, size.dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    for tokens in contexts:
        try:
            compare(results, device, ours_device, size, tokens, k, v)
        except Exception:  # what was measured so far is worth keeping
            traceback.print_exc()
            results.failures.append(f"{tokens} tokens ended early: {traceback.format_exc().strip().splitlines()[-1]}")
        save(args.out / "peers.csv", machine, results.rows)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        results.skip("the plot", error)
    else:
        from plot import plot

        plot(results, contexts, bandwidth, machine, args.out)
    for failure in results.failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if results.failures else 0)


def save(path, machine, rows):
    with path.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operation", "peer", "tokens", "us", "bytes", "gb_per_s", "host_us"])
        for row in rows:
            numbers = [f"{row['us']:.2f}", row["bytes"], f"{row['gb_per_s']:.1f}", f"{row['host_us']:.1f}"]
            writer.writerow([row["operation"], row["peer"], row["tokens"], *numbers])


if __name__ == "__main__":
    main()
