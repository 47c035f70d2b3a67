"""What was measured, checked and skipped: a line on stdout and in the CSV as soon as it is known, and tables at the
end."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_ours import NAME as OURS

COLUMNS = "metric contestant part tokens ms layers how memory_gib workspace_gib".split()
GIB = 1 << 30
# Names of what is the same for all.
EVERYBODY = "all contestants"
LINEAR = "linear part alone"


@dataclass(frozen=True)
class Row:
    """A measurement. `metric` is "ttft", "tpot", "ttft, all pieces", or for what they consist of "piece" (`tokens`
    before it) and "step"; `part` is the way of attending or what is left out; `layers` were run, and `ms` is of all."""

    metric: str
    contestant: str
    tokens: int
    ms: float
    part: str = "all"
    layers: int = 0
    how: str = ""
    memory_bytes: int | None = None
    workspace_bytes: int | None = None


class Report:
    """Rows, checks and what was skipped."""

    def __init__(self, path: Path, machine: str, num_layers: int) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self.num_layers = num_layers
        self._file = path.open("w", newline="", encoding="utf-8")
        self._file.write(f"# {machine}\n")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)
        self._file.flush()

    def add(self, row: Row) -> None:
        """Prints and writes a measurement."""
        self.rows.append(row)
        gib = ["" if n is None else f"{n / GIB:.2f}" for n in (row.memory_bytes, row.workspace_bytes)]
        fields = [row.metric, row.contestant, row.part, row.tokens, f"{row.ms:.4f}", row.layers, row.how, *gib]
        self._writer.writerow(fields)
        self._file.flush()
        memory = f"; memory {gib[0]} GiB" if gib[0] else ""
        place = f"{row.metric:>16} {row.contestant:>15} {row.part:>38} {row.tokens:>9} {row.ms:>12.3f} ms"
        print(f"{place}  ({row.how}{memory})", flush=True)

    def skip(self, what: str, error: Exception) -> None:
        """Says what is left out, and why."""
        text = f"SKIPPED {what}: {type(error).__name__}: {error}".split("\n")[0][:300]
        if text not in self.skipped:
            self.skipped.append(text)
            print(text, flush=True)

    def check(self, what: str, ok: bool, found: str) -> bool:
        """Notes and answers whether results are right."""
        print(f"{'ok' if ok else 'CHECK FAILED'}: {what}: {found}", flush=True)
        if not ok:
            self.failures.append(f"{what}: {found}")
        return ok

    def ms(self, metric: str, contestant: str, tokens: int, part: str) -> float | None:
        """One measurement, or None."""
        for row in self.rows:
            if (row.metric, row.contestant, row.tokens, row.part) == (metric, contestant, tokens, part):
                return row.ms
        return None

    def lines(self, metric: str) -> list[tuple[str, str]]:
        """Contestants and parts that have rows of a metric, in order."""
        return list(dict.fromkeys((row.contestant, row.part) for row in self.rows if row.metric == metric))

    def fastest_peer(self, metric: str, tokens: int) -> float | None:
        """The fastest dense attention of others."""
        found = [self.ms(metric, name, tokens, part) for name, part in self.lines(metric) if name != OURS]
        return min((ms for ms in found if ms is not None), default=None)

    def speed_up(self, metric: str, tokens: int, part: str) -> float | None:
        """How many times faster than the fastest dense peer this library is."""
        ours, theirs = self.ms(metric, OURS, tokens, part), self.fastest_peer(metric, tokens)
        return theirs / ours if ours and theirs else None

    def print_tables(self, lengths: Sequence[int]) -> None:
        """TTFT in seconds, TPOT in milliseconds, speed-ups, and the memory where it is known."""
        for metric, unit, divisor in (("ttft", "s", 1e3), ("tpot", "ms", 1.0)):
            print(f"\n{metric.upper()}, {unit}".ljust(52) + "".join(f"{named(n):>12}" for n in lengths))
            for name, part in self.lines(metric):
                cells = [self.ms(metric, name, tokens, part) for tokens in lengths]
                print_line(f"{name}, {part}", [None if ms is None else ms / divisor for ms in cells])
            for name, part in self.lines(metric):
                if name == OURS:
                    times = [self.speed_up(metric, tokens, part) for tokens in lengths]
                    print_line(f"times faster than the faster peer: {part}", times)
        print("\nmemory of a prompt, GiB")
        for name in dict.fromkeys(row.contestant for row in self.rows if row.memory_bytes):
            found = {row.tokens: row.memory_bytes for row in self.rows if row.contestant == name and row.memory_bytes}
            print_line(name, [found[n] / GIB if n in found else None for n in lengths])
        print(flush=True)

    def print_breakdown(self) -> None:
        """Where the time of pieces and of steps goes, as far as stages were left out."""
        for metric, whole, what in (
            ("piece", "all", "a piece"),
            ("step", "anew", "a step"),
            ("step", "dense", "a step"),
        ):
            linear = self.ms(metric, EVERYBODY, 0, LINEAR)
            for name, tokens in dict.fromkeys(
                (row.contestant, row.tokens) for row in self.rows if row.metric == metric
            ):
                total = self.ms("tpot" if metric == "step" else metric, name, tokens, whole)
                prefix = "" if metric == "piece" else f"{whole}, "
                appended = self.ms(metric, name, tokens, f"{prefix}without selection and attention")
                before = self.ms(metric, name, tokens, f"{prefix}without attention")
                if linear is None or total is None or before is None:
                    continue
                stages = [("linear part", linear)]
                stages += [("append", appended - linear), ("selection", before - appended)] if appended else []
                stages += [] if appended else [("append" if name != OURS else "append and selection", before - linear)]
                stages += [("attention", total - before)]
                told = ", ".join(f"{stage} {millis:.2f}" for stage, millis in stages)
                print(f"{what} at {tokens}, {name}: {total:.2f} ms: {told}", flush=True)

    def close(self) -> None:
        """Closes the CSV."""
        self._file.close()


def print_line(name: str, cells: Sequence[float | None]) -> None:
    """A line of a table."""
    print(name.ljust(51) + "".join(f"{'-' if cell is None else f'{cell:.2f}':>12}" for cell in cells))


def named(tokens: int) -> str:
    """A length as one says it."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20} M"
    return f"{tokens >> 10} k" if tokens % 1024 == 0 else str(tokens)
