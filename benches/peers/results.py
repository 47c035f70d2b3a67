"""What was measured, what was checked and what was skipped."""

import csv

from timing import REPEATS


class Results:
    """Measurements and checks."""

    def __init__(self, timer):
        self.timer, self.rows, self.failures, self.skipped = timer, [], [], []

    def measure(self, operation, peer, tokens, num_bytes, work, parts=1, repeats=REPEATS):
        """Times `work`, of which one of equal `parts` is told; a peer that fails is left out."""
        try:
            micros, host = (spent / parts for spent in self.timer(work, repeats))
        except Exception as error:  # whatever a peer raises
            return self.skip(f"{operation}, {peer}, {tokens}", error)
        num_bytes //= parts
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
        """Notes and answers whether results are right."""
        print(f"{'ok' if ok else 'CHECK FAILED'}: {what}: {found}", flush=True)
        if not ok:
            self.failures.append(f"{what}: {found}")
        return ok

    def us(self, operation, peer, tokens):
        """The median of one measurement, or None."""
        key = (operation, peer, tokens)
        found = [r["us"] for r in self.rows if (r["operation"], r["peer"], r["tokens"]) == key]
        return found[0] if found else None

    def fastest(self, operation, peers, tokens):
        """The smallest median of several peers, or None."""
        found = [self.us(operation, peer, tokens) for peer in peers]
        return min((micros for micros in found if micros is not None), default=None)


def save(path, machine, rows):
    with path.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operation", "peer", "tokens", "us", "bytes", "gb_per_s", "host_us"])
        for row in rows:
            numbers = [f"{row['us']:.2f}", row["bytes"], f"{row['gb_per_s']:.1f}", f"{row['host_us']:.1f}"]
            writer.writerow([row["operation"], row["peer"], row["tokens"], *numbers])
