"""What a random direction costs per element: counter-based signs beside torch's own generators. A Markdown table.

    python benchmarks/signs.py [--numel 16777216] [--threads 1]

Least of several runs, on the CPU, of one tensor. Every sign can be made on its own from (seed, tensor, index), which no
sequential generator can. `shard` makes an eighth of the tensor from its middle, as a rank does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from tinygn_dist.maths.counter_rng import key_of, signs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    key, count, piece = key_of(0, "weight"), asked.numel, asked.numel // 8
    ways = {
        "signs, counter-based": (lambda: signs(0, count, key), count),
        "signs, counter-based, a shard": (lambda: signs(4 * piece + 3, 5 * piece + 3, key), piece),
        "torch.randn": (lambda: torch.randn(count), count),
        "torch.randint(2) * 2.0 - 1": (lambda: torch.randint(2, (count,)) * 2.0 - 1, count),
    }
    taken = {name: least(work, asked.runs) / numel for name, (work, numel) in ways.items()}
    print("| way | ns per element | of torch.randn |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {1e9 * seconds:.2f} | {seconds / taken['torch.randn']:.2f} |")


def least(work: Callable[[], torch.Tensor], runs: int) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(runs):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
