"""Forward-only recovery of a compressed model: the loss of held-out text before and after, with its standard error.

    tinygn compress --model smollm2-135m --pattern channels --prune.counts '{channels: 308}' --data text.txt --output
    pruned python benchmarks/descent.py --model pruned --data text.txt --evaluation held-out.txt
        --set train=norms-and-biases clip_norm=100 probe_step=0.00390625

Trains as `tinygn compress` does, on windows of the data, for `--seconds` or until these are used up once. The change is
that of the same held-out sequences, so its error is of their differences.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace

import torch
from prepared import add_arguments, problem_of

from tinygn_dist.config import RecoverConfig
from tinygn_dist.estimate.probes import measure
from tinygn_dist.maths import confidence
from tinygn_dist.train.forward_only.loop import ForwardOnly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, windows=640, seq_len=256)
    parser.add_argument("--evaluation", required=True, help="a second dataset")
    parser.add_argument("--held-out", type=int, default=24, help="sequences of it")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, and directions")
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the section `recover`")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problem = problem_of(asked)
    apart = argparse.Namespace(**{**vars(asked), "data": asked.evaluation, "windows": asked.held_out})
    held_out = replace(problem, batches=problem_of(apart, problem.backend).batches)
    options = {"optimizer": "zo-sgd", "directions": asked.batch, "batch_size": asked.batch}
    options = RecoverConfig.model_validate(options | dict(word.split("=", 1) for word in asked.set))
    training = ForwardOnly(
        problem.model, problem.anatomy.matrices, zeros(problem), problem.objective, options, problem.backend
    )
    before, began, steps = measure(held_out, []), time.monotonic(), 0
    while time.monotonic() - began < asked.seconds and (steps + 1) * asked.batch <= len(problem.batches):
        training.step(problem.batches[steps * asked.batch :][: asked.batch], steps, 1.0)
        steps += 1
    after = measure(held_out, [])
    change, error = confidence.ratio_mean((after.base - before.base)[None], before.counts)
    losses = (float(seen.base.sum() / seen.counts.sum()) for seen in (before, after))
    print("{} steps, rate {}, held-out loss {:.4f} -> {:.4f}, ".format(steps, training.rate, *losses), end="")
    print(f"change {float(change):+.5f} +- {float(error):.5f}")


def zeros(problem) -> dict[str, torch.Tensor]:
    """Masks of the matrices that have zeros."""
    weights = {t.name: problem.backend.shard(problem.model, t).weight for t in problem.anatomy.matrices}
    return {name: weight != 0 for name, weight in weights.items() if not weight.all()}


if __name__ == "__main__":
    main()
