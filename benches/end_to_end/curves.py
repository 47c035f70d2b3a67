"""TTFT, TPOT and the speed-ups, over the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attention_ours import NAME as OURS
from figures import over_context, plot_numbered, plt, write
from report import Report

TITLES = {"ttft": "Time to first token, s", "tpot": "Time per output token, ms"}
SPEED_UPS = [
    ("ttft", "all", "C0o-", "TTFT"),
    ("tpot", "anew", "C1s-", "TPOT, selected anew"),
    ("tpot", "reused", "C2^-", "TPOT, selection reused"),
    ("tpot", "default policy", "C3d:", "TPOT, dense where faster"),
]


def plot(report: Report, lengths: Sequence[int], machine: str, folder: Path, name: str) -> None:
    """Writes `name` as `.svg` and `.png`."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5))
    for axis, (metric, title) in zip(axes, TITLES.items(), strict=False):
        for contestant, part in report.lines(metric):
            if part == "default policy":
                continue
            found = [(n, report.ms(metric, contestant, n, part)) for n in lengths]
            points = [(n, ms / 1e3 if metric == "ttft" else ms) for n, ms in found if ms is not None]
            label = contestant if part == "all" else f"{contestant}, {part}"
            axis.plot(*zip(*points, strict=True), "o-" if contestant == OURS else "s--", label=label)
        axis.set(title=title, yscale="log")
    for metric, part, line, label in SPEED_UPS:
        found = [(n, report.speed_up(metric, n, part)) for n in lengths]
        if points := [(n, times) for n, times in found if times is not None]:
            plot_numbered(axes[2], points, line, label)
    axes[2].axhline(1, color="grey", linewidth=0.8)
    axes[2].set(title="Times faster than the faster dense peer", yscale="log")
    axes[2].margins(0.12)
    for axis in axes:
        over_context(axis, lengths)
    figure.suptitle(machine, fontsize=6, wrap=True)
    write(figure, folder, name)
