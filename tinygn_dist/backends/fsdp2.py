"""FSDP2: every parameter is a DTensor of which each rank holds whole leading rows; HSDP keeps such a set per group.

Traps that shape this file (torch 2.13, Accelerate 1.15):
- Modules that stay unsharded after a forward hide their DTensors behind plain copies; edits of the one are not seen by
  the other. So everything is resharded after every forward, at the price of one more all-gather of embeddings and head.
- With the CPU offload policy shards lie in CPU memory. Whole weights that are gathered to be worked on are on the
  device.
- Edits inside an `unshard()` are thrown away: weights are written through the local shards only.
- Weights of one group that learn must have one dtype. Models that keep a few in fp32 (routers of experts) hold two in
  bf16: those few do not learn then, which estimation does not ask of them. Training is in fp32, where all are alike.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from tinygn_dist.backends import collectives
from tinygn_dist.backends.base import Backend, Item
from tinygn_dist.backends.gradients import GradientSums, hooked
from tinygn_dist.backends.optimizer_state import Held
from tinygn_dist.backends.pieces import Origin, Shard, tensor_named, tensors_of
from tinygn_dist.backends.slices import Slices, dealt_padded
from tinygn_dist.backends.wrappers import refuse_spread
from tinygn_dist.maths.bit_zeros import keep_only_
from tinygn_dist.models.anatomy import Matrix

_NOT_LEARNING = "_tinygn_not_learning"
"""where a model keeps the names of weights that would learn, were they of their group's dtype"""
_WRAPPING = ("auto_wrap_policy", "transformer_cls_names_to_wrap")


class FSDP2(Backend):
    """The model is sharded from `prepare` on, for estimation and training alike."""

    shards_weights = splits_weights = True
    steps_plain_tensors = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        mesh, parallel = accelerator.torch_device_mesh, accelerator.parallelism_config
        hybrid = parallel is not None and parallel.dp_replicate_enabled
        self._shard_group = mesh["dp_shard"].get_group() if hybrid else None  # None: all ranks
        self._replica_group = mesh["dp_replicate"].get_group() if hybrid else None
        self._wrapping = {name: getattr(accelerator.state.fsdp_plugin, name) for name in _WRAPPING}
        self._offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        if self._offloads and self.device.type == "cpu":  # the default pins memory for a device that is not there
            accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        if accelerator.mixed_precision == "bf16":
            # Accelerate's own policy returns losses in bf16, which no difference of losses survives, and adds
            # gradients in bf16
            accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )

    # -- where the model is ------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is not None:
            # over DTensors already: nothing for Accelerate to map from old parameters to new ones
            return model, self._accelerator.prepare_optimizer(optimizer)
        for name, asked in self._wrapping.items():  # settled by the first model, which need not be of this class
            setattr(self._accelerator.state.fsdp_plugin, name, asked)
        with _embeddings_in_one_group(model):
            fsdp2_prepare_model(self._accelerator, model)
        model.set_reshard_after_forward(True)
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"{whole[0]} is not sharded"
        _let_one_dtype_learn(model)
        return model

    def place(self, origin: Origin) -> nn.Module:
        model, run = origin.take_empty()
        if self._accelerator.mixed_precision != "no":  # Accelerate would copy them to fp32, which are masters then
            model._apply(lambda tensor: tensor.float() if tensor.is_meta else tensor)
        self.prepare(model)
        where = torch.device("cpu") if self._offloads else self.device
        model._apply(lambda tensor: torch.empty_like(tensor, device=where) if tensor.is_meta else tensor)
        model.tie_weights()
        with self.together("reading the weights"), torch.no_grad():
            for name, tensor in tensors_of(model).items():
                piece, (low, high) = self.local(tensor.detach()), self._bounds(tensor)
                piece.copy_(run(name, low, high).view(piece.shape))
        return model

    def _bounds(self, tensor: torch.Tensor) -> tuple[int, int]:
        return self._slices_of(tensor).bounds() if isinstance(tensor, DTensor) else (0, tensor.numel())

    def release(self, model: nn.Module, *prepared: Any) -> None:
        self._accelerator.free_memory(*prepared)

    def _cast(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        for name in model.__dict__.pop(_NOT_LEARNING):
            model.get_parameter(name).requires_grad_(True)
        wanted = {id(t): dtypes[name] for name, t in [*model.named_parameters(), *model.named_buffers()]}
        model._apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))
        _let_one_dtype_learn(model)
        for group in _groups(model):  # what FSDP2 keeps between forwards was made for the old dtype
            for parameter in group.fsdp_params:
                parameter.all_gather_outputs = []
                parameter.__dict__.pop("_unsharded_param", None)
            group.lazy_init()

    def dealt(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        return dealt_padded(items, self.rank, self.num_ranks)

    def on_main(self, work: Callable[[], Item]) -> Item | None:
        return work()  # its forwards need every rank

    def pieces(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: self.local(tensor.detach()).reshape(-1) for name, tensor in tensors_of(self.unwrap(model)).items()
        }

    # -- pieces of weights -------------------------------------------------------------------------------------------
    def shard(self, model: nn.Module, matrix: Matrix) -> Shard:
        slices = self._slices(model, matrix)
        run = self.unwrap(model).get_parameter(matrix.parameter).detach().to_local().view(-1)
        return Shard(slices.local(run).view(-1, matrix.stored_shape[1]), slices.bounds()[0])

    def gather(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> torch.Tensor:
        return self._slices(model, matrix).gather(piece.to(self.device))

    def shard_of(self, model: nn.Module, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return self._as_piece(self._slices(model, matrix).cut(whole), matrix)

    def _as_piece(self, run: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows, where the shards lie: with the offload policy not on the device."""
        return run.view(-1, matrix.stored_shape[1]).to("cpu" if self._offloads else run.device)

    def whole(self, model: nn.Module, name: str) -> torch.Tensor:
        tensor = tensor_named(self.unwrap(model), name).detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @contextlib.contextmanager
    def gradient_sums(
        self, model: nn.Module, matrices: Sequence[Matrix], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[GradientSums]:
        sums = self._empty_sums(model, matrices, function)
        with hooked(sums, list(self._unsharded(model, matrices))):
            yield sums
        self.agree(sums.order(), "which weights a micro-batch reaches")
        for tensor in sums.moments.tensors():  # the shard axis is summed already
            if self._replica_group is not None:
                collectives.sum_(tensor, group=self._replica_group)

    def _unsharded(
        self, model: nn.Module, matrices: Sequence[Matrix]
    ) -> Iterator[tuple[nn.Parameter, Matrix, Callable[[torch.Tensor], torch.Tensor]]]:
        """The plain parameters that take part in the forward, which stay the same objects, and how to reduce each."""
        wanted: dict[str, list[tuple[Matrix, Slices]]] = {}
        for matrix in matrices:
            wanted.setdefault(matrix.parameter, []).append((matrix, self._slices(model, matrix)))
        bare = self.unwrap(model)
        for module in reversed(list(self.running(model).modules())):  # the innermost around a weight gathers it
            inside = {id(parameter) for parameter in module.parameters()} if isinstance(module, FSDPModule) else ()
            names = [name for name in wanted if id(bare.get_parameter(name)) in inside]
            if not names:
                continue
            module.unshard()
            for name in names:
                parameter = bare.get_parameter(name)
                if not isinstance(parameter, DTensor):
                    for matrix, slices in wanted.pop(name):
                        yield parameter, matrix, lambda whole, s=slices, t=matrix: self._as_piece(s.reduce(whole), t)
            module.reshard()

    def _slices(self, model: nn.Module, matrix: Matrix) -> Slices:
        return replace(
            self._slices_of(self.unwrap(model).get_parameter(matrix.parameter)),
            shape=matrix.stored_shape,
            start=matrix.start,
        )

    # -- combining facts ---------------------------------------------------------------------------------------------
    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return collectives.sum_(tensor, group=self._shard_group)

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None:
        self.shard(model, matrix).weight.copy_(piece)

    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None:
        keep_only_(self.shard(model, matrix).weight, keep)  # the shards are the fp32 masters

    # -- training ----------------------------------------------------------------------------------------------------
    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def adopt(self, model: nn.Module, optimizer: Any) -> None:
        """Weights must not stay whole after a forward: see the traps above."""
        self.refuse_spread(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def refuse_spread(self, model: nn.Module) -> None:
        refuse_spread(self.running(model), rows_are_ours=True)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def place_added(self, model: nn.Module, added: Sequence[nn.Module]) -> None:
        """One group for each unit of the model that is sharded by itself: what is added to it is gathered at once."""
        waiting, plugin, mesh = set(added), self._accelerator.state.fsdp_plugin, self._accelerator.torch_device_mesh
        if mesh is not None:
            mesh = mesh[tuple(self._accelerator.parallelism_config.fsdp_dim_names)]
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        policy = replace(policy, output_dtype=None)  # inside a unit nothing is cast back
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in reversed(units):  # inner ones first
            mine = [module for module in unit.modules() if module in waiting]
            waiting.difference_update(mine)
            if mine:
                fully_shard(
                    mine, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=plugin.cpu_offload
                )
        assert not waiting, "added outside of what is sharded"
        self._begin_anew(model)

    def added_are_gone(self, model: nn.Module) -> None:
        self._begin_anew(model)

    def _begin_anew(self, model: nn.Module) -> None:
        """The first forward settles which module is the root and what groups it has; let the next one do so again."""
        for state in {module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)}:
            state._is_root = None
            state._state_ctx = type(state._state_ctx)()

    def join_pieces(self, whole: torch.Tensor) -> None:
        collectives.sum_(whole, group=self._shard_group)

    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held:
        parameter = self.unwrap(model).get_parameter(name)
        slices = self._slices_of(parameter)
        low, high = slices.bounds()
        return Held(parameter, 0, low, high - low)

    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        parameter = self.unwrap(model).get_parameter(name)
        parameter.detach().to_local().view(-1).copy_(self._slices_of(parameter).cut(whole))

    def _slices_of(self, parameter: nn.Parameter) -> Slices:
        """Of a whole parameter."""
        group, shape = self._shard_group, tuple(parameter.shape)
        num_ranks = dist.get_world_size(group)
        length = -(-shape[0] // num_ranks) * math.prod(shape[1:])
        return Slices(shape, 0, length, dist.get_rank(group), num_ranks, group)


def _groups(model: nn.Module) -> Iterator[FSDPParamGroup]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups


def _let_one_dtype_learn(model: nn.Module) -> None:
    """In every group the dtype that most of its numbers have."""
    names, still = {id(parameter): name for name, parameter in model.named_parameters()}, []
    for group in _groups(model):
        sizes: Counter[torch.dtype] = Counter()
        learning = [each.sharded_param for each in group.fsdp_params if each.sharded_param.requires_grad]
        for parameter in learning:
            sizes[parameter.dtype] += parameter.numel()
        for parameter in learning:
            if parameter.dtype != sizes.most_common(1)[0][0]:
                parameter.requires_grad_(False)
                still.append(names[id(parameter)])
    model.__dict__[_NOT_LEARNING] = still


@contextlib.contextmanager
def _embeddings_in_one_group(model: nn.Module) -> Iterator[None]:
    """Accelerate gives the input embedding, with a head tied to it, a group of its own, and torch refuses a weight that
    two groups see. Where other modules have the weight too (both stacks of an encoder-decoder), or a model has no input
    embedding, it is kept from looking: all of them then lie in the root's group."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # of images
        embedding = head = None
    weight = getattr(embedding, "weight", None)
    holders = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    hidden = ("get_input_embeddings", "get_output_embeddings")
    if weight is not None and all(module is embedding or module is head for module in holders):
        hidden = ()
    try:
        for name in hidden:
            setattr(model, name, lambda: None)
        yield
    finally:
        for name in hidden:
            delattr(model, name)
