"""The exact k-th of scores that lie on several ranks, against gathering them: a Markdown table.

    python benchmarks/selection.py --numel 100000000 --ranks 2

Every rank holds `numel` fp32 scores. `threshold.kth_largest` finds the k-th largest of all of them (k half) from summed
histograms; the alternative gathers the scores on one rank and asks torch. Best of several runs, single thread per
rank; memory is the growth of the process's anonymous memory inside the call, sampled every few milliseconds; bytes are
what one rank hands to collectives.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinygn_dist.maths.top_k import kth_largest

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000, help="scores per rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--signed", action="store_true", help="scores of both signs; saliencies have one")
    asked = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, args=(asked, port), nprocs=asked.ranks)


def rank(number: int, asked: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=asked.ranks)
    generator, total = torch.Generator().manual_seed(number), asked.numel * asked.ranks
    scores = torch.randn(asked.numel, generator=generator)
    scores, k = scores if asked.signed else scores.abs_(), total // 2
    sent = [0]

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        sent[0] += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor)
        return tensor

    def gathered(kth: Callable[[torch.Tensor], float]) -> Callable[[], float | None]:
        def run() -> float | None:
            parts = [torch.empty_like(scores) for _ in range(asked.ranks)] if number == 0 else None
            dist.gather(scores, parts)
            found = kth(torch.cat(parts)) if number == 0 else None
            dist.barrier()
            return found

        return run

    ways = {
        "radix select, summed histograms": lambda: kth_largest([scores], k, summed)[0],
        "gather, torch.kthvalue": gathered(lambda whole: float(whole.kthvalue(total - k + 1).values)),
        "gather, torch.topk": gathered(lambda whole: float(whole.topk(k, sorted=False).values.min())),
    }
    rows, found = [], set()
    for name, way in ways.items():
        seconds, memory = [], 0
        for _ in range(asked.repeat if name.startswith("radix") else 1):
            dist.barrier()
            sent[0] = 0 if name.startswith("radix") else asked.numel * 4
            value, took, grew = measured(way)
            seconds.append(took)
            memory = max(memory, grew)
        found |= {value} - {None}
        rows.append((name, min(seconds), memory / MIB, sent[0] / MIB))
    if number == 0:
        assert len(found) == 1, f"the ways disagree: {found}"
        print(f"k = {k:,} of {total:,} on {asked.ranks} ranks: {found.pop()!r}\n")
        print("| way | s | times radix | extra MiB on rank 0 | MiB sent per rank |\n|---|---|---|---|---|")
        for name, took, grew, went in rows:
            print(f"| {name} | {took:.2f} | {took / rows[0][1]:.1f} | {grew:,.0f} | {went:,.2f} |")
    dist.destroy_process_group()


def measured(way: Callable[[], float | None]) -> tuple[float | None, float, int]:
    """(value, seconds, bytes of anonymous memory over what it was before)."""
    gc.collect()
    before, done, highest = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    value = way()
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    return value, took, max(0, highest[0] - before)


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
