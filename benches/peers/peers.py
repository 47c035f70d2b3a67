"""This library next to its peers on one GPU, in one process, on the same tensors and stream: see README.md."""

import argparse
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "host" / "capi" / "python")]

import decode  # noqa: E402
from results import Results, save  # noqa: E402
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
            decode.compare(results, ours_device, size, tokens, k, v)
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


if __name__ == "__main__":
    main()
