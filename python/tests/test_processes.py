"""Processes that were forked, which have neither the threads nor the contexts of their parent."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMON = """
import multiprocessing, os, sys
import numpy as np, tokenselect as ts

def objects():
    config = ts.Config(num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype="f32", selection_cache=False)
    device = ts.Device.cpu()
    ctx = ts.Context(device, config, max_block_len=1, max_kv_tokens=64)
    pages = np.ones((8, 4, 2, 16), np.float32)
    return device, config, ctx, ts.KvView(pages, pages), ts.Batch(4, [0, 1], [0, 8], range(8), [4])

def attend(ctx, kv, batch):
    return float(ctx.attend_dense(batch, kv, np.ones((1, 4, 16), np.float32)).sum())

def told(work):
    try:
        return work()
    except ts.TokenSelectError as error:
        assert "multiprocessing" in str(error) and "spawn" in str(error), error
        assert error.status == "TS_STATUS_CLOSED"
        return str(error).split(":")[0]

def in_child(work, method="fork"):
    context = multiprocessing.get_context(method)
    child = context.Process(target=work)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        print("hangs", flush=True)
"""


def run(code: str) -> list[str]:
    """Lines that a process and its children print."""
    done = subprocess.run(
        # From 3.12 on Python warns of what these tests do.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + code],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_forked_child_is_told() -> None:
    """Objects of the parent's and new devices are refused by name, where they would wait for threads that are not there."""
    lines = run("""
device, config, ctx, kv, batch = objects()
cache = ts.Cache(device, config, num_pages=4)
buffer = ts.Buffer(device, 4, "f32")
slot_device = ts.Device.emulated()
print(attend(ctx, kv, batch), flush=True)

def work():
    print(told(lambda: attend(ctx, kv, batch)))
    print(told(ts.Device.cpu))
    print(told(cache.create))
    print(told(buffer.numpy))
    print(told(lambda: buffer.from_host(np.zeros(4, np.float32))))
    print(told(lambda: ts.Context(device, config)))
    print(told(device.synchronize))
    print(told(lambda: ctx.selected()))
    print(told(lambda: batch.row(0)))
    for each in (ctx, cache, buffer, batch, device):
        each.close()
        repr(each)
    print(told(lambda: ts.Device.emulated().name), flush=True)

in_child(work)
print(attend(ctx, kv, batch))
""")
    gone = "was made in the process that this one was forked from"
    assert lines == [
        "64.0",
        f"`context` {gone}",
        "`device` cannot be made where the process that this one was forked from made one",
        f"`cache` {gone}",
        f"`buffer` {gone}",
        f"`buffer` {gone}",
        f"`device` {gone}",
        f"`device` {gone}",
        f"`context` {gone}",
        f"`batch` {gone}",
        "emulated",
        "64.0",
    ]


def test_tensors_of_the_parents_memory() -> None:
    """Memory of the parent's is refused with the child's own objects, too."""
    lines = run("""
device = ts.Device.emulated()
buffer = device.to_device(np.zeros((1, 4, 64), np.uint16))

def work():
    own = ts.Device.emulated()
    config = ts.Config(num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype="bf16", selection_cache=False)
    ctx = ts.Context(own, config, max_block_len=1, max_kv_tokens=64)
    print(told(lambda: ctx.pool(ts.Batch(4, [0, 1], [0, 1], [0], [1]), buffer)), flush=True)

in_child(work)
""")
    assert lines == ["`buffer` was made in the process that this one was forked from"]


def test_child_of_a_parent_without_devices() -> None:
    """A parent that only imported the package has no threads that a child could miss; and the child's child is told again."""
    lines = run("""
def work():
    device, config, ctx, kv, batch = objects()
    print(attend(ctx, kv, batch), flush=True)
    in_child(lambda: print(told(lambda: attend(ctx, kv, batch)), flush=True))

in_child(work)
in_child(work)
""")
    assert lines == ["64.0", "`context` was made in the process that this one was forked from"] * 2


def test_fork_within_a_call() -> None:
    """A child that was forked while its parent was at work is told, too, and not that somebody else is at work."""
    lines = run("""
device, config, ctx, kv, batch = objects()
cache = ts.Cache(device, config, num_pages=64)
reader = ts.Context.for_prefill(device, config, block_len=4, max_kv_len=64, max_piece_len=4)
pieces = cache.extend_in_pieces(reader, [(cache.create(), 60)], 4)
q, k, v = (np.ones((60, heads, 16), np.float32) for heads in (4, 2, 2))
children = []

def fork():
    children.append(os.fork())
    if children[-1]:
        os.waitpid(children[-1], 0)
    else:
        print(told(cache.create), flush=True)

def progress(done, total):
    if not children:
        fork()  # and goes on in both

class Forking:
    array = np.zeros((1, 4, 16), np.float32)

    @property
    def __array_interface__(self):
        fork()
        return self.array.__array_interface__

def run(work):
    told_here = told(work)
    if children and not children[-1]:
        print(told_here, flush=True)
        os._exit(0)

run(lambda: reader.prefill(cache, 0, pieces, q, k, v, progress=progress))
out = np.empty((1, 4, 16), np.float32)
run(lambda: ctx.attend_dense(batch, kv, Forking(), out))
print(attend(ctx, kv, batch))
""")
    gone = "was made in the process that this one was forked from"
    assert lines == [f"`cache` {gone}", f"`context` {gone}"] * 2 + ["64.0"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(method: str, tmp_path: object) -> None:
    """What the error recommends works."""
    path = f"{tmp_path}/main.py"
    with open(path, "w") as file:
        file.write(COMMON)
        file.write(f"""
def work():
    _, _, ctx, kv, batch = objects()
    print(attend(ctx, kv, batch), flush=True)

if __name__ == "__main__":
    work()
    in_child(work, {method!r})
""")
    done = subprocess.run([sys.executable, path], cwd="/", capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["64.0", "64.0"], done.stderr


def test_exit_while_a_thread_is_at_work() -> None:
    """The interpreter ends, whatever a daemon thread is doing."""
    lines = run("""
import threading, time
device = ts.Device.cpu()
config = ts.Config(num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype="f32", selection_cache=False)
n = 2000
ctx = ts.Context(device, config, max_block_len=n, max_kv_tokens=n)
pages = np.ones((n // 4, 4, 2, 16), np.float32)
kv, batch = ts.KvView(pages, pages), ts.Batch(4, [0, n], [0, n // 4], range(n // 4), [4])
q = np.ones((n, 4, 16), np.float32)

def work():
    while True:
        ctx.attend_dense(batch, kv, q)

threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("ends", flush=True)
""")
    assert lines == ["ends"]
