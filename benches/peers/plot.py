"""Speed-up over the peers and achieved bandwidth, over the length of the context."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# (Operation of the peers, peers of which the fastest counts, our operation, label).
SPEED_UPS = [
    (
        "dense",
        ["FlashInfer", "FlashInfer, tensor cores"],
        "step reused",
        "step, selection reused, against FlashInfer dense",
    ),
    ("dense", ["FlashInfer", "FlashInfer, tensor cores"], "step", "step, selected anew, against FlashInfer dense"),
    (
        "step",
        ["published, FlashInfer", "published, FlashInfer, tensor cores"],
        "step",
        "step, selected anew, against published and FlashInfer",
    ),
    ("select", ["published"], "select", "select against published"),
    ("score", ["published (Triton)"], "score", "score against published"),
    ("top_k", ["torch.topk"], "top_k", "top_k against torch.topk"),
    ("top_k", ["FlashInfer"], "top_k", "top_k against FlashInfer"),
    ("attend", ["FlashInfer", "FlashInfer, tensor cores"], "attend", "attend against FlashInfer, page size 1"),
]
BANDWIDTHS = [
    ("score", "tokenselect", "score"),
    ("select", "tokenselect", "select"),
    ("dense", "tokenselect", "dense attention"),
    ("score", "published (Triton)", "published dot product"),
    ("dense", "FlashInfer", "FlashInfer dense"),
    ("dense", "FlashInfer, tensor cores", "FlashInfer dense, tensor cores"),
]


def plot(results, contexts, bandwidth, machine, folder):
    """Writes `peers.svg` and `peers.png`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    for operation, peers, mine, label in SPEED_UPS:
        points = []
        for tokens in contexts:
            theirs = [results.us(operation, peer, tokens) for peer in peers]
            theirs = [micros for micros in theirs if micros is not None]
            ours = results.us(mine, "tokenselect", tokens)
            if theirs and ours:
                points.append((tokens, min(theirs) / ours))
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=label)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(title="Times faster", yscale="log")
    for operation, peer, label in BANDWIDTHS:
        found = [r for r in results.rows if r["operation"] == operation and r["peer"] == peer]
        if found:
            style = "-" if peer == "tokenselect" else "--"
            right.plot(
                [r["tokens"] for r in found], [r["gb_per_s"] / 1e3 for r in found], style, marker="o", label=label
            )
    right.axhline(bandwidth / 1e12, color="grey", linewidth=0.8, linestyle=":", label="copy")
    right.set(title="Bytes that must be moved, TB/s", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{n >> 10} k" if n < 1 << 20 else f"{n >> 20} M" for n in contexts])
        axes.set_xlabel("cached tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"peers.{suffix}", dpi=150)
    plt.close(figure)
