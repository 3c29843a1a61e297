"""How much the loss listens to each output of a linear layer: gradient energy, per token and per output feature.

To second order (empirical Fisher) a change dW of a layer costs 1/(2N) sum_t (dy_t . dW x_t)^2, with dy_t the gradient
of the summed loss at the layer's output. The solver works with the Hessian of that, each token weighted by
s_t = mean_o dy_to^2, and the rows' energy puts saliencies of different layers in units of loss (GuidedQuant, arXiv
2505.07004, uses the same energies for quantisation). Every weight has a Hessian of its own, also where several read one
input: the loss listens to queries, keys and values at different tokens. `estimate/output_probes.py` measures the energy
of a whole layer by forward passes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from tinygn_dist.estimate.backprop import gradients_of, recomputed
from tinygn_dist.estimate.expert_moments import ExpertGradients
from tinygn_dist.estimate.hooks import Observer, attached
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.sums import ChunkedStore, Moments
from tinygn_dist.models.anatomy import Matrix


@dataclass
class LossMoments:
    """This rank's sums by matrix name, not yet reduced.

    grams: (in, in) sum_t w_t x_t x_t^T, w_t from `token_weights`, of which what lies below the diagonal is still to
    be filled in (`moments.fill_below`). rows: (out,) sum_t dy_to^2 |x_t|^2.
    """

    grams: Moments = field(default_factory=Moments)
    rows: Moments = field(default_factory=Moments)


def token_weights(energy: torch.Tensor, plain: float) -> torch.Tensor:
    """(tokens,) plain + s_t / mean(s) from the gradient energies s_t of one micro-batch; 1 where no gradient arrives.
    Rounded (see `coarse`)."""
    mean = energy.mean()
    return coarse(plain + energy / mean) if mean > 0 else torch.ones_like(energy)


def coarse(values: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to eight bits. The last bits of gradients depend on the backend (autograd adds in another
    order under DeepSpeed's hooks); weights do not need them, and without them the masks are the same."""
    return values.bfloat16().float()


def loss_moments(problem: Problem, matrices: Sequence[Matrix], plain: float) -> LossMoments:
    """Sums over this rank's batches by one backward pass per micro-batch, without any weight gradient. plain: how much
    every token weighs beside its energy, whose mean is 1."""
    found = LossMoments()
    for matrix in matrices:
        out, num_inputs = matrix.shape
        found.grams.reserve(matrix.name, (num_inputs, num_inputs), problem.backend.device)
        found.rows.reserve(matrix.name, (out,), problem.backend.device)

    def seen(name: str, gone: Arrived) -> None:
        found.grams.add_gram(name, gone.rows, token_weights(gone.tokens_energy, plain))
        found.rows.add(name, gone.rows_energy)

    _each_gradient(problem, matrices, seen, of_rows=lambda rows: rows)
    return found


def output_energy(problem: Problem, matrices: Sequence[Matrix]) -> Moments:
    """(out,) sums of dy_to^2 over this rank's tokens, by matrix name, not yet reduced. One backward pass per
    micro-batch, without any weight gradient."""
    sums = Moments()
    for matrix in matrices:
        sums.reserve(matrix.name, (matrix.shape[0],), problem.backend.device)

    def arrived(name: str, gone: Arrived) -> None:
        sums.add(name, gone.rows_energy)

    _each_gradient(problem, matrices, arrived, of_rows=_ones, of_expert_rows=_ones)
    return sums


class TokenWeights:
    """What every token of this rank's micro-batches weighs in the Hessian of every matrix, kept from the model that it
    was measured on until the Gram matrices of a matrix's layer are summed: two bytes for each, on the CPU.

    rows: as of `LossMoments`, not yet reduced.
    """

    def __init__(self, problem: Problem, matrices: Sequence[Matrix], plain: float) -> None:
        """One backward pass per micro-batch, with no sum larger than a row of a matrix and, where the backend
        recomputes, no more kept of a layer than what it read."""
        self.rows, self._unknown = Moments(), plain + 1
        self._held: dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        for matrix in matrices:
            self.rows.reserve(matrix.name, (matrix.shape[0],), problem.backend.device)

        kept = ChunkedStore(torch.bfloat16)

        def seen(name: str, gone: Arrived) -> None:
            weights = kept.put(token_weights(gone.tokens_energy, plain))  # exact, see `coarse`
            self._held[name, gone.number, gone.call] = weights, None if gone.tokens is None else gone.tokens.int().cpu()
            self.rows.add(name, gone.rows_energy)

        anatomy = problem.anatomy
        layers = [problem.bare.get_submodule(anatomy.path_of(layer)) for layer in range(anatomy.num_layers)]
        with recomputed(layers if problem.backend.recomputes else ()):
            _each_gradient(problem, matrices, seen, of_rows=_lengths)

    def of(self, name: str, number: int, tokens: torch.Tensor, call: int = 0) -> torch.Tensor:
        """(n,) fp32 weights of what a matrix reads now in this rank's micro-batch `number`, the `call`-th time that its
        module runs. tokens: (n,) ascending positions in the flattened micro-batch. Tokens that did not reach an
        expert before weigh what the mean one does."""
        if (name, number, call) not in self._held:  # no gradient came there
            return torch.ones(len(tokens), device=tokens.device)
        weights, before = self._held[name, number, call]
        weights = weights.to(tokens.device).float()
        if before is None:
            return weights
        found = weights.new_full((len(tokens),), self._unknown)
        if len(before):
            before = before.to(tokens.device, tokens.dtype)
            place = torch.searchsorted(before, tokens).clamp(max=len(before) - 1)
            found = torch.where(before[place] == tokens, weights[place], found)
        return found


class Arrived(NamedTuple):
    """What a gradient dy at a matrix's output says in one micro-batch, over real tokens."""

    number: int
    """which of this rank's micro-batches"""
    rows: torch.Tensor
    """(n, in) fp32 x, what the matrix read, or (n, 1) its lengths"""
    tokens_energy: torch.Tensor
    """(n,) fp32 mean_o dy_to^2"""
    rows_energy: torch.Tensor
    """(out,) fp32 sum_t dy_to^2 |x_t|^2"""
    tokens: torch.Tensor | None
    """(n,) positions in the flattened micro-batch of what an expert read, None elsewhere: all that are real"""
    call: int = 0
    """how often the module had run before in the same forward (layers that share one weight)"""


def _energies(rows: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both energies of (n, in) rows, or their (n, 1) lengths, and (n, out) gradients; on a CPU of some tokens at a
    time, whose squares stay in a core's cache."""
    at_once = 64 if grad.device.type == "cpu" else max(1, len(grad))
    lengths, by_row = rows.square().sum(1), grad.new_zeros(grad.shape[1])
    by_token = []
    for part, length in zip(grad.split(at_once), lengths.split(at_once), strict=True):
        squared = part.square()
        by_token.append(squared.mean(1))
        by_row.addmv_(squared.t(), length)
    return torch.cat(by_token), by_row


def _each_gradient(
    problem: Problem,
    matrices: Sequence[Matrix],
    seen: Callable[[str, Arrived], None],
    of_rows: Callable[[torch.Tensor], torch.Tensor],
    of_expert_rows: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """`seen(matrix's name, what arrived)` for every matrix and each of this rank's micro-batches that counts. of_rows:
    what of a matrix's inputs waits for the gradient, which may be all that keeps them in memory. of_expert_rows:
    what is made of those of experts, which wait anyway."""
    calls: Counter[str] = Counter()
    mask: torch.Tensor | None = None
    number, counts, wanted = 0, True, {matrix.name for matrix in matrices}

    def linear(name: str) -> Observer:
        def forward(hidden: torch.Tensor, output: Any) -> None:
            waiting, call = [of_rows(hidden.detach())], calls[name]
            calls[name] += 1
            if not output.requires_grad:  # before the layers: no gradient gets there
                return
            output.register_hook(lambda grad: arrived(name, waiting.pop(), grad, None, call))

        return Observer(forward, output=True)

    def fused(module: str) -> ExpertGradients:
        def backward(leaf: str, expert: int, x: torch.Tensor, dy: torch.Tensor, tokens: torch.Tensor) -> None:
            if (name := f"{module}.{leaf}[{expert}]") in wanted:
                arrived(name, of_expert_rows(x) if of_expert_rows else x, dy, tokens)

        return ExpertGradients(backward)

    def arrived(
        name: str, hidden: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor | None, call: int = 0
    ) -> None:
        if counts:
            real = mask if mask is None or tokens is None else mask[tokens]
            places = tokens if tokens is None or real is None else tokens[real]
            rows = _rows(hidden, real)
            seen(name, Arrived(number, rows, *_energies(rows, _rows(grad, real)), places, call))

    hooks = [
        (problem.bare.get_submodule(module), linear(matrix.name) if matrix.index is None else fused(module))
        for module, matrix in {matrix.module: matrix for matrix in matrices}.items()
    ]
    starts = [problem.bare.get_submodule(problem.anatomy.path_of(stack.first)) for stack in problem.anatomy.stacks]
    hooks += [(module, _StartOfGraph()) for module in starts or [problem.bare.get_input_embeddings()]]
    with gradients_of(problem.bare, ()), attached(hooks):
        for turn, micro_batch in enumerate(problem.micro_batches("gradient energy")):
            number, counts, mask = turn, micro_batch.counts, micro_batch.real_tokens
            problem.losses(micro_batch.batch).total.sum().backward()
            calls.clear()


def _ones(hidden: torch.Tensor) -> torch.Tensor:
    """(..., 1), beside which the energies of rows are those of their gradients alone."""
    return hidden.new_ones((*hidden.shape[:-1], 1), dtype=torch.float32)


def _lengths(hidden: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)


def _rows(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Those of real tokens; all where there is not one for each token (a pooled sequence)."""
    rows = hidden.detach().flatten(0, -2).float()
    return rows if mask is None or len(mask) != len(rows) else rows[mask]


class _StartOfGraph(Observer):
    """Lets gradients flow from what the first layer of a stack reads on, or from the embeddings' output, so that no
    weight needs one."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if args and args[0].is_floating_point():
            return (_leaf(args[0]), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = _leaf(kwargs["hidden_states"])
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return _leaf(output) if isinstance(output, torch.Tensor) else output


def _leaf(hidden: torch.Tensor) -> torch.Tensor:
    """Where a graph may start; within one as it is."""
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()
