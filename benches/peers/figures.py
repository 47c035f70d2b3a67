"""What plots have in common."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_numbered(axes, points, line, label):
    """A line with its numbers beside it."""
    axes.plot(*zip(*points, strict=True), line, markersize=10 if "*" in line else 5, label=label)
    for tokens, times in points:
        axes.annotate(f"{times:.4g}", (tokens, times), xytext=(4, 5), textcoords="offset points", fontsize=7)


def over_context(axes, contexts):
    """Axes over the length of the context."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{n >> 10} k" if n < 1 << 20 else f"{n >> 20} M" for n in contexts])
    axes.set_xlabel("cached tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def write(figure, folder, name):
    """Lays out and saves a figure."""
    figure.tight_layout()
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
    plt.close(figure)
