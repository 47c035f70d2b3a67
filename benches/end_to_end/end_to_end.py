"""Whole models with this library, FlashInfer's dense attention and PyTorch's: time to first token and per output token.
See README.md."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "peers")]

from attention_ours import NAME as OURS  # noqa: E402
from attention_ours import Ours, Selection  # noqa: E402
from attention_sdpa import NAME as SDPA  # noqa: E402
from attention_sdpa import Sdpa  # noqa: E402
from clock import Budget, Clock  # noqa: E402
from machine import driver_version, version  # noqa: E402
from model import SHAPES, TINY, Model, Shape  # noqa: E402
from paged_cache import PAGE_SIZE, PagedCache  # noqa: E402
from report import GIB, Report, Row, named  # noqa: E402
from tpot import Decode  # noqa: E402
from ttft import Contestant, Memory, Prefill, positions_for, report_ttft  # noqa: E402
from verify import FLASHINFER, Maker, Verify  # noqa: E402

CONTESTANTS = ("ours", "flashinfer", "sdpa")
LENGTHS = (32 << 10, 128 << 10, 512 << 10, 1 << 20)
QUICK_LENGTHS = (128 << 10, 1 << 20)
# Kept free beside weights and cache: workspaces, activations of a piece, graphs, keys and values of one layer in order.
RESERVED_BYTES = 20 << 30


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    shape: Shape
    lengths: tuple[int, ...]
    selection: Selection
    piece: int
    dense_layers: int
    repeats: int
    dense_repeats: int
    steps: int
    verify_tokens: int
    # All pieces are run up to these lengths, of this library and of FlashInfer.
    full_ours: int
    full_dense: int


def integers(text: str) -> tuple[int, ...]:
    """Numbers between commas, in order."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def contestants(text: str) -> tuple[str, ...]:
    """Names between commas."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(CONTESTANTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(CONTESTANTS)}, got {', '.join(unknown)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for the CSV and the plot, which are named after the shape")
    add("--shape", choices=list(SHAPES), default="qwen2-7b")
    add("--lengths", type=integers, help="tokens of contexts, multiples of a piece: 131072,1048576")
    add("--only", type=contestants, default=CONTESTANTS, help="some of ours,flashinfer,sdpa")
    add("--quick", action="store_true", help="128 k and 1 M alone, fewer repetitions")
    add("--layers", type=int, help="layers that have a cache and are run, scaled to all; dense prefill: 4 if not given")
    add("--full", action="store_true", help="run all pieces of all layers at all lengths, beside integrating them")
    add("--budget", type=float, metavar="SECONDS", help="leave out what does not fit any more")
    add("--local", type=int, default=0, help="prefill: tokens before a block that are always attended to")
    add("--test-on-cpu", action="store_true", help="a tiny model without a GPU, to test this program")
    return parser.parse_args()


def sizes(args: argparse.Namespace) -> Sizes:
    """Those of the arguments."""
    if args.test_on_cpu:
        selection = Selection(n_init=16, top_k=64, local_decode=15, local_prefill=args.local, block=32)
        return Sizes(TINY, args.lengths or (512, 2048), selection, 128, 2, 2, 1, 2, 256, 512, 512)
    selection = Selection(local_prefill=args.local)
    lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
    repeats, dense_repeats, steps = (2, 1, 10) if args.quick else (3, 2, 20)
    full_ours, full_dense = (0, 0) if args.quick else (128 << 10, 32 << 10)
    return Sizes(
        SHAPES[args.shape], lengths, selection, 8192, 4, repeats, dense_repeats, steps, 4096, full_ours, full_dense
    )


def described(device: torch.device, what: Sizes, layers: int) -> str:
    """The machine and what is measured, for the CSV."""
    gpu, driver = "processor", "none"
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(device), driver_version()
    versions = ", ".join(f"{name} {version(name)}" for name in ["tokenselect", "torch", "triton", "flashinfer"])
    commit = os.environ.get("TOKENSELECT_COMMIT", "unknown")
    shape, chosen = what.shape, what.selection
    model = (
        f"{shape.name} with random weights, bf16, {layers} of {shape.num_layers} layers cached, pages of {PAGE_SIZE} "
        f"in random order, native positions"
    )
    selection = (
        f"{chosen.n_init} initial and {chosen.top_k} chosen tokens, {chosen.local_decode + 1} local in decoding, "
        f"{chosen.local_prefill} before blocks of {chosen.block} in prefill, pieces of {what.piece}"
    )
    return f"{gpu}, driver {driver}, {versions}, commit {commit}; {model}; {selection}"


class Run:
    """One model and all that is measured with it."""

    def __init__(self, args: argparse.Namespace, what: Sizes, device: torch.device) -> None:
        self.args, self.what, self.device, self.shape = args, what, device, what.shape
        self.layers = min(args.layers or self.shape.num_layers, self.shape.num_layers)
        if bad := [n for n in what.lengths if n % what.piece or n <= 0]:
            raise SystemExit(f"lengths must be multiples of {what.piece}, got {bad}")
        self.machine = described(device, what, self.layers)
        print(self.machine, flush=True)
        self.report = Report(args.out / f"{self.shape.name}.csv", self.machine, self.shape.num_layers)
        self.clock, self.budget = Clock(device), Budget(args.budget, self.report.skip)
        self.lengths = self._lengths_that_fit()
        self.flashinfer = self._flashinfer_maker() if "flashinfer" in args.only else None

    def everything(self) -> None:
        """Checks, then measures one contestant after the other."""
        with torch.inference_mode():
            self.model = Model(self.shape, self.device)
            self._note("weights are made")
            verify = Verify(self.report, self.clock, self.model, self.what.verify_tokens)
            agree = verify.run(self.flashinfer, self.what.selection)
            self._note("checked")
            if OURS not in agree:
                return
            self.cache = PagedCache(self.shape, self.layers, max(self.lengths), self.device)
            self._note(f"keys and values take {self.cache.allocated_bytes / GIB:.1f} GiB")
            self.prefill = Prefill(self.report, self.clock, self.budget, self.model, self.what.piece)
            self.decode = Decode(self.report, self.clock, self.budget, self.model, self.what.steps)
            self.decode.measure_linear(self.layers)
            self.prefill.linear(self.layers, self.what.repeats)
            self.ends = self.prefill.ends(self.what.repeats)
            for name, make in self._makers(agree).items():
                self._measure(name, make)
                self._note(f"{name} is done")

    def _measure(self, name: str, make: Callable[[], Contestant]) -> None:
        """All of one contestant, whose memory is free afterwards."""
        try:
            contestant = make()
        except Exception as error:  # whatever a peer raises
            return self._failed(name, error)
        try:
            self.decode.measure(contestant, self.lengths)
            positions, ours = positions_for(self.lengths, self.what.piece), name == OURS
            layers = contestant.num_layers
            if not ours:
                layers = min(layers, self.args.layers or self.what.dense_layers)
            repeats = self.what.repeats if ours else self.what.dense_repeats
            # cuDNN prepares a plan for each length.
            curve = self.prefill.curve(contestant, positions, layers, repeats, warm_each=isinstance(contestant, Sdpa))
            memory = None
            if not isinstance(contestant, Sdpa):  # nothing follows from one layer in order
                workspace = contestant.prefill_workspace if isinstance(contestant, Ours) else 0
                memory = Memory(self.cache.allocated_bytes, self.cache.bytes(1), workspace)
            report_ttft(self.report, name, curve, self.ends, self.lengths, memory)
            if not isinstance(contestant, Sdpa):
                self._run_all_pieces(contestant)
        except Exception as error:
            self._failed(name, error)
        finally:
            contestant.close()
            del contestant
            gc.collect()
            if self.clock.cuda:
                torch.cuda.empty_cache()

    def _run_all_pieces(self, contestant: Contestant) -> None:
        """The integration beside prompts that are really read."""
        most = self.what.full_ours if contestant.name == OURS else self.what.full_dense
        lengths = [n for n in self.lengths if self.args.full or n <= most]
        if not lengths or self.layers < self.shape.num_layers:
            return
        what = f"all pieces of {contestant.name} up to {max(lengths)}"
        integrated = {n: self.report.ms("ttft", contestant.name, n, "all") for n in lengths}
        if not self.budget.allows(what, 1.1 * (integrated[max(lengths)] or 0) / 1e3):
            return
        for tokens, millis in self.prefill.full(contestant, lengths).items():
            expected = integrated[tokens]
            note = f"; integrated {100 * (expected / millis - 1):+.1f} %" if expected else ""
            how = f"every piece of every layer, planning included{note}"
            self.report.add(Row("ttft, all pieces", contestant.name, tokens, millis, "all", self.layers, how))

    def _makers(self, agree: set[str]) -> dict[str, Callable[[], Contestant]]:
        """Who is measured, of those that agree."""
        what, model, cache = self.what, self.model, self.cache
        makers: dict[str, Callable[[], Contestant]] = {}
        if "ours" in self.args.only:
            makers[OURS] = lambda: Ours(model, cache, what.piece, what.selection)
        if self.flashinfer is not None:
            maker = self.flashinfer
            makers[FLASHINFER] = lambda: maker(model, cache, what.piece)
        if "sdpa" in self.args.only:
            makers[SDPA] = lambda: Sdpa(model, max(self.lengths), what.piece)
        return {name: make for name, make in makers.items() if name in agree}

    def _flashinfer_maker(self) -> Maker | None:
        if self.device.type != "cuda":
            self.report.skip("FlashInfer", RuntimeError("it needs a GPU"))
            return None
        try:
            from attention_flashinfer import FlashInfer
        except Exception as error:  # whatever an import raises
            self.report.skip("FlashInfer", error)
            return None
        return FlashInfer

    def _lengths_that_fit(self) -> tuple[int, ...]:
        """Lengths whose keys and values fit beside the weights in memory."""
        if self.device.type != "cuda":
            self.report.skip("CUDA graphs", RuntimeError("they need a GPU"))
            return self.what.lengths
        room = torch.cuda.mem_get_info(self.device)[0] - self.shape.weight_bytes - RESERVED_BYTES
        fit = []
        for tokens in self.what.lengths:
            needed = tokens * self.shape.cache_bytes_per_token * self.layers
            if needed <= room:
                fit.append(tokens)
            else:
                text = f"{self.layers} layers of cache take {needed / GIB:.1f} GiB, there is room for {room / GIB:.1f}"
                self.report.skip(f"contexts of {named(tokens)}", MemoryError(text))
        if not fit:
            raise SystemExit("no length fits")
        return tuple(fit)

    def _failed(self, name: str, error: Exception) -> None:
        """A peer that fails is left out; this library must not."""
        if name == OURS:
            traceback.print_exception(error)
            self.report.failures.append(f"{name} ended early: {type(error).__name__}: {error}")
        else:
            self.report.skip(name, error)

    def _note(self, what: str) -> None:
        if self.clock.cuda:
            torch.cuda.synchronize()
        print(f"[{self.budget.spent:6.1f} s] {what}", flush=True)


def plots(run: Run, folder: Path) -> None:
    """The plot, if matplotlib is there."""
    try:
        import curves

        curves.plot(run.report, run.lengths, run.machine, folder, run.shape.name)
    except Exception as error:  # measurements must not be lost for a picture
        run.report.skip("the plot", error)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = torch.device("cpu" if args.test_on_cpu else "cuda:0")
    if device.type == "cuda":
        torch.cuda.init()
        torch.backends.cuda.matmul.allow_tf32 = False  # the reference is in f32
        torch.cuda.set_stream(torch.cuda.Stream())
    run = Run(args, sizes(args), device)
    try:
        run.everything()
    except Exception as error:  # what was measured so far is worth keeping
        traceback.print_exc()
        run.report.failures.append(f"ended early: {type(error).__name__}: {error}")
    run.report.print_breakdown()
    run.report.print_tables(run.lengths)
    plots(run, args.out)
    run.report.close()
    for failure in run.report.failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if run.report.failures else 0)


if __name__ == "__main__":
    main()
