"""This library next to its peers on one GPU, in one process, on the same tensors and stream: see README.md."""

import argparse
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import tokenselect as ts
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import decode  # noqa: E402
import prefill  # noqa: E402
from machine import driver_version, version  # noqa: E402
from results import Results, save  # noqa: E402
from timing import REPEATS, Timer  # noqa: E402

FULL = SimpleNamespace(hq=32, hkv=8, dim=128, page=16, n_init=128, n_local=511, top_k=2048, block=512, piece=8192)
# For testing this program on the processor, with Triton's interpreter.
SMALL = SimpleNamespace(hq=8, hkv=2, dim=64, page=16, n_init=16, n_local=47, top_k=100, block=32, piece=128)


# Cached tokens, those of the queries included.
CONTEXTS = dict(decode=[32 << 10, 128 << 10, 512 << 10, 1 << 20], prefill=[128 << 10, 512 << 10, 1 << 20])
SMALL_CONTEXTS = dict(decode=[700, 1000], prefill=[700, 1000])


def heads(text):
    """Query and KV heads of `28x4`."""
    hq, hkv = map(int, text.split("x"))
    return hq, hkv


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for peers.csv and the plots")
    parser.add_argument("--only", choices=["decode", "prefill"], help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="the shortest and the longest context only")
    parser.add_argument("--heads", type=heads, help="query and KV heads, such as 28x4; 32x8 if not given")
    parser.add_argument("--local", type=int, default=0, help="prefill: tokens before a block that are always listed")
    parser.add_argument("--test-on-cpu", action="store_true", help="tiny, without a GPU, to test this program")
    return parser.parse_args()


def described(device, size, bandwidth):
    """The machine and what is measured, for the CSV."""
    gpu, driver = "processor", "none"
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(device), driver_version()
    versions = ", ".join(f"{name} {version(name)}" for name in ["tokenselect", "torch", "triton", "flashinfer"])
    commit = os.environ.get("TOKENSELECT_COMMIT", "unknown")
    shape = f"{size.hq} query and {size.hkv} KV heads of {size.dim}, prefill with {size.prefill_local} local tokens"
    how = f"copy {bandwidth / 1e12:.2f} TB/s; cold L2, medians of {REPEATS}, of pieces {prefill.PIECE_REPEATS}"
    return f"{gpu}, driver {driver}, {versions}, commit {commit}; {shape}; {how}"


def prepare(args):
    """Device, sizes and contexts of each part."""
    size, contexts = (SMALL, SMALL_CONTEXTS) if args.test_on_cpu else (FULL, CONTEXTS)
    size = SimpleNamespace(**vars(size), prefill_local=args.local)
    size.hq, size.hkv = args.heads or (size.hq, size.hkv)
    parts = [args.only] if args.only else list(contexts)
    contexts = {part: contexts[part][:: len(contexts[part]) - 1] if args.quick else contexts[part] for part in parts}
    if args.test_on_cpu:
        return torch.device("cpu"), size, contexts
    torch.cuda.init()
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is in f32
    torch.cuda.set_stream(torch.cuda.Stream())
    return torch.device("cuda:0"), size, contexts


def ours_on(device):
    """This library's device, with PyTorch's stream."""
    if device.type == "cuda":
        return ts.Device.cuda(0, stream=torch.cuda.current_stream())
    return ts.Device.cpu()


def plots(results, contexts, bandwidth, machine, folder):
    """A plot of each part."""
    try:
        import plot
    except ImportError as error:
        return results.skip("the plots", error)
    if "decode" in contexts:
        plot.decode(results, contexts["decode"], bandwidth, machine, folder)
    if "prefill" in contexts:
        plot.prefill(results, contexts["prefill"], machine, folder)


def main():
    args = arguments()
    device, size, contexts = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    ours_device = ours_on(device)
    results = Results(Timer(device))
    bandwidth = results.timer.copy_bandwidth()
    machine = described(device, size, bandwidth)
    print(machine)
    print(f"{'operation':>14} {'':>32} {'tokens':>9} {'us':>10} {'GB/s':>8} {'host us':>9}", flush=True)
    if version("flashinfer") == "none":
        results.skip("FlashInfer", ImportError("it cannot be imported"))

    slots = -(-max(map(max, contexts.values())) // size.page) * size.page
    k, v = (torch.randn(slots, size.hkv, size.dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    work = [(part, tokens) for part, lengths in contexts.items() for tokens in lengths]
    for part, tokens in work:
        compare = {"decode": decode, "prefill": prefill}[part].compare
        try:
            compare(results, ours_device, size, tokens, k, v)
        except Exception:  # what was measured so far is worth keeping
            traceback.print_exc()
            last_line = traceback.format_exc().strip().splitlines()[-1]
            results.failures.append(f"{part} over {tokens} tokens ended early: {last_line}")
        save(args.out / "peers.csv", machine, results.rows)
    plots(results, contexts, bandwidth, machine, args.out)
    for failure in results.failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
