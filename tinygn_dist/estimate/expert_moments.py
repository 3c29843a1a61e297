"""What fused experts read and add: the tokens routed to each, the inputs of its two matrices, the size of its output.

An experts module computes all its experts at once in one of several kernels, so there is no inner module to hook. A
hook on the whole module sees the tokens and the router's choice, and repeats the arithmetic expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import UnitGroup
from tinygn_dist.models.matrices import expert_weights


class Routed(NamedTuple):
    """One expert in one forward. tokens: (n,) positions in the flattened micro-batch; weights: (n,) of its routing;
    rows: (n, in) what its first matrix reads; inner: (n, width) what its second matrix reads."""

    expert: int
    tokens: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    inner: torch.Tensor


class ExpertObserver(ModelHook):
    """Calls `seen` once per expert of a fused experts module, also for experts that no token reached (n = 0)."""

    def __init__(self, seen: Callable[[Routed], None]) -> None:
        self.seen = seen

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        for routed in _routed(module, *args):
            self.seen(routed)
        return args, kwargs


class ExpertGradients(ModelHook):
    """Calls `seen(expert's matrix, what it read, gradient at its output, positions of both)` for every matrix of every
    expert, as the backward pass comes to the module. seen: (name of the parameter, expert, (n, in), (n, out), (n,))."""

    def __init__(self, seen: Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
        self.seen = seen

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self._read = [tensor.detach() for tensor in args]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        read, self._read = self._read, None
        output.register_hook(lambda grad: self._tell(module, read, grad))
        return output

    def _tell(self, module: nn.Module, read: list[torch.Tensor], grad: torch.Tensor) -> None:
        first, second = expert_weights(module)
        for routed in _routed(module, *read):
            with torch.enable_grad():
                up = _product(module, first, routed.expert, routed.rows).detach().requires_grad_()
                down = _product(module, second, routed.expert, _activated(module, up))
                out = _normed(module, down)
            back = routed.weights[:, None] * grad[routed.tokens]
            d_up, d_down = torch.autograd.grad(out, (up, down), back.to(out.dtype))
            self.seen(first, routed.expert, routed.rows, d_up, routed.tokens)
            self.seen(second, routed.expert, routed.inner, d_down, routed.tokens)


def _routed(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Iterator[Routed]:
    """hidden: (tokens, hidden). chosen, weights: (tokens, top k)."""
    first, _ = expert_weights(module)
    for expert in range(module.num_experts):
        tokens, slot = torch.where(chosen == expert)
        rows = hidden[tokens]
        inner = _activated(module, _product(module, first, expert, rows))
        yield Routed(expert, tokens, weights[tokens, slot], rows, inner)


def _product(module: nn.Module, leaf: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, leaf)[expert]
    out = rows @ (weight if module.is_transposed else weight.t())
    return out + getattr(module, f"{leaf}_bias")[expert] if module.has_bias else out


def _activated(module: nn.Module, up: torch.Tensor) -> torch.Tensor:
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def _normed(module: nn.Module, out: torch.Tensor) -> torch.Tensor:
    has_norm = getattr(module, "has_post_expert_norm", False)  # transformers 5.17 has no such experts
    return module.post_expert_norm(out) if has_norm else out


def output_mass(problem: Problem, groups: Sequence[UnitGroup]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per group of experts, (experts,) fp64: the mean over all tokens of routing weight times the norm of the expert's
    output (0 where not routed; REAP, Lasby et al. 2025, averages over the routed tokens only), and the number of tokens
    routed to each."""
    mass, reached = ([torch.zeros(g.num_units, dtype=torch.float64) for g in groups] for _ in range(2))
    total = torch.zeros(1, dtype=torch.float64)
    added: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []  # group, expert, its tokens, what it adds to each

    def observer(module: nn.Module, index: int) -> ExpertObserver:
        def seen(routed: Routed) -> None:
            out = _normed(module, _product(module, "down_proj", routed.expert, routed.inner))
            added.append((index, routed.expert, routed.tokens, routed.weights.abs() * out.norm(dim=-1)))

        return ExpertObserver(seen)

    modules = [problem.bare.get_submodule(group.output) for group in groups]
    hooks = [(module, observer(module, index)) for index, module in enumerate(modules)]
    for micro_batch, _ in problem.forwards(problem.layers_alone, hooks, "expert outputs"):
        if micro_batch.counts:
            mask, ids = micro_batch.real_tokens, micro_batch.batch["input_ids"]
            mask = torch.ones_like(ids, dtype=torch.bool).flatten() if mask is None else mask
            total += int(mask.sum())
            for index, expert, tokens, sizes in added:
                mass[index][expert] += sizes[mask[tokens]].double().sum().cpu()
                reached[index][expert] += int(mask[tokens].sum())
        added.clear()
    problem.backend.sum_over_data([*mass, *reached, total])
    return [m / total for m in mass], reached
