"""Medians by CUDA events, with a cold L2. On the processor, where the scripts are only tested, by the wall."""

import statistics
import time

import torch

REPEATS = 21
FLUSH_BYTES = 512 << 20
# Long enough for the host to have put everything in the stream before the first event is reached.
SLEEP_CYCLES = 1_500_000


class Timer:
    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.flush = torch.zeros((FLUSH_BYTES if self.cuda else 64) // 8, dtype=torch.int64, device=device)

    def __call__(self, work, repeats=REPEATS):
        """Microseconds of `work()` on the device, and on the host until all of it was launched."""
        for _ in range(3):
            work()
        if not self.cuda:
            begin = time.perf_counter()
            work()
            spent = (time.perf_counter() - begin) * 1e6
            return spent, spent
        torch.cuda.synchronize()
        runs, host = [], []
        for _ in range(repeats):
            # Read, not written: written lines would be written back while the work is timed.
            self.flush.sum()
            torch.cuda._sleep(SLEEP_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launched = time.perf_counter()
            work()
            host.append((time.perf_counter() - launched) * 1e6)
            end.record()
            torch.cuda.synchronize()
            runs.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(runs), statistics.median(host)

    def copy_bandwidth(self, num_bytes=2 << 30):
        """Bytes per second that a copy reads and writes."""
        if not self.cuda:
            return 1e10
        source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=self.flush.device)
        to = torch.empty_like(source)
        return 2 * num_bytes / (self(lambda: to.copy_(source))[0] / 1e6)


def synchronize(tensor):
    """Waits until `tensor` has been computed; what went wrong on the device is raised here."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
