"""Speed-up over the peers and achieved bandwidth, over the length of the context."""

from figures import over_context, plot_numbered, plt, write
from prefill import DENSE_PEERS, speed_up

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


# (Step, dense peers of which the fastest counts, line, label) of prefill. An A100, the paper's GPU, runs FlashInfer's FA2.
STEPS = [
    ("piece", DENSE_PEERS, "C0o-", "a block in a piece, against the fastest dense peer"),
    ("block", DENSE_PEERS, "C1s-", "a block by itself, against the fastest dense peer"),
    ("piece", ["FlashInfer FA2"], "C0o:", "a block in a piece, against FlashInfer FA2"),
    ("block", ["FlashInfer FA2"], "C1s:", "a block by itself, against FlashInfer FA2"),
]
# Cached tokens and speed-up that the paper states (arXiv:2411.02886): a chunk of 512 tokens, on an A100, over FlashInfer.
PAPER = [(1 << 20, 23.84)]


def decode(results, contexts, bandwidth, machine, folder):
    """Writes `peers.svg` and `peers.png`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    for operation, peers, mine, label in SPEED_UPS:
        points = []
        for tokens in contexts:
            theirs, ours = results.fastest(operation, peers, tokens), results.us(mine, "tokenselect", tokens)
            if theirs and ours:
                points.append((tokens, theirs / ours))
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
        over_context(axes, contexts)
    figure.suptitle(machine, fontsize=8)
    write(figure, folder, "peers")


def prefill(results, contexts, machine, folder):
    """Writes `prefill.svg` and `prefill.png`."""
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for what, peers, line, label in STEPS:
        points = [(tokens, speed_up(results, what, tokens, peers)) for tokens in contexts]
        points = [point for point in points if point[1] is not None]
        if points:
            plot_numbered(axes, points, line, label)
    plot_numbered(axes, PAPER, "k*", "TokenSelect paper, A100, against FlashInfer")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="Prefill of a block, times faster than dense attention", yscale="log")
    axes.margins(0.12)
    over_context(axes, contexts)
    figure.suptitle(machine, fontsize=6, wrap=True)
    write(figure, folder, "prefill")
