"""Snapshots on a GPU: every one is what was counted up to one of the recorder's commits, on a stream that never waits.

    python -m tests.gpu.snapshots

Steps are committed as fast as they can be launched, by replayed graphs and by kernels, while another thread reads. The
control reads the counters themselves on a stream of its own, which is torn.
"""

import json
import sys
import threading
import time

import numpy as np
import torch

from moescope.profiler.profile import LayerInfo
from moescope.profiler.snapshots import Snapshots
from moescope.profiler.staged import StagedRecorder, cell_of

LAYERS, EXPERTS, K, DOMAINS = 48, 128, 8, 16
SECONDS = 8.0


def run(rows: int) -> dict[str, object]:
    """Read snapshots while forwards of `rows` rows are counted; the row says what was seen."""
    recorder = StagedRecorder(
        [LayerInfo(index, EXPERTS, K) for index in range(LAYERS)],
        scoring="softmax",
        scales=[1.0] * LAYERS,
        capacity=max(rows, 512),
        domains=DOMAINS,
        device="cuda",
    )
    recorder.warm_up()
    snapshots = Snapshots(recorder)
    rng = np.random.default_rng(rows)
    kinds = [
        torch.from_numpy(np.argsort(rng.random((LAYERS, rows, EXPERTS)), axis=-1)[..., :K].astype(np.int32)).cuda()
        for _ in range(5)
    ]
    cells = np.array([cell_of(row % DOMAINS, row % 2, row % 16) for row in range(rows)], np.int32)
    tokens = np.bincount(cells, minlength=DOMAINS * 32)
    one = np.zeros((5, DOMAINS * 32, LAYERS, EXPERTS), np.int64)
    for kind, ids in enumerate(kinds):
        for slot, chosen in enumerate(ids.cpu().numpy()):
            np.add.at(one[kind], (cells[:, None], slot, chosen), 1)
    steps, stop, done = 0, threading.Event(), threading.Event()
    longest = 0.0

    def engine() -> None:
        nonlocal steps, longest
        with torch.cuda.stream(torch.cuda.Stream()):
            placed = recorder.place(cells)
            while not stop.is_set():
                began = time.perf_counter()
                recorder.ids[:, :rows].copy_(kinds[steps % 5])
                recorder.weights[:, :rows].fill_(1 / K)
                recorder.commit(placed, tokens)
                steps += 1
                if steps % 7 == 0:
                    snapshots.take(DOMAINS, steps)
                longest = max(longest, time.perf_counter() - began)
                if steps % 200 == 0:
                    torch.cuda.current_stream().synchronize()  # a real engine waits for its tokens, too
        done.set()

    def matches(counts: np.ndarray, at: int) -> bool:
        return bool(np.array_equal(counts, sum(one[kind] * len(range(kind, at, 5)) for kind in range(5))))

    thread = threading.Thread(target=engine)
    thread.start()
    read, torn, control, side = 0, 0, 0, torch.cuda.Stream()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if snapshots.waiting:
            with snapshots.read() as (sums, at):
                torn += not matches(sums.cells.reshape(DOMAINS * 32, LAYERS, EXPERTS), at)
            read += 1
        if read % 20 == 19:
            with torch.cuda.stream(side):
                seen = recorder.buffers()["counts"].to("cpu", non_blocking=False).numpy()
            total = seen.sum(axis=(0, 2))
            control += len(set(total.tolist())) > 1  # layers that disagree about T
    stop.set()
    thread.join()
    torch.cuda.synchronize()
    recorder.peek()
    return {
        "rows": rows,
        "steps": steps,
        "snapshots": read,
        "torn": torn,
        "torn without snapshots": control,
        "longest host step ms": round(longest * 1e3, 2),
        "ok": torn == 0 and read > 20,
    }


def main() -> None:
    """Run both sizes and print their rows."""
    rows = [run(size) for size in (64, 4096)]
    for row in rows:
        print(json.dumps(row), flush=True)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
