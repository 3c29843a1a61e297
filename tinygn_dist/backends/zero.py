"""DeepSpeed ZeRO. Stages 1 and 2 shard only what training adds (optimizer states, gradients); stage 3 the weights too.

The live weights have fp32 master copies in training, which each step writes over the live ones: zeros must be in both.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tinygn_dist.backends import collectives, zero_engine
from tinygn_dist.backends.base import Backend, Item
from tinygn_dist.backends.gradients import GradientSums, hooked
from tinygn_dist.backends.optimizer_state import Held
from tinygn_dist.backends.pieces import Origin, Shard, tensor_named, tensors_of, without_storage
from tinygn_dist.backends.slices import Slices, dealt_padded
from tinygn_dist.backends.zero_partitions import drop_whole, forget_models, live_run, master_run
from tinygn_dist.maths.bit_zeros import keep_only_
from tinygn_dist.models.anatomy import Matrix

_ESTIMATION = "_estimation_engine"
"""where a model keeps its engine, past nn.Module's registration, so that they go together"""


class Zero(Backend):
    """What all stages share: training is an engine's."""

    shards_weights = True
    wrappers = (DeepSpeedEngine,)
    _training: DeepSpeedEngine | None = None

    # -- training ----------------------------------------------------------------------------------------------------
    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return zero_engine.boundary(model, last)

    def backward(self, loss: torch.Tensor) -> None:
        self._training.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        zero_engine.clip(self._training, max_norm)

    def wrapped(self, model: nn.Module) -> nn.Module:
        return self._accelerator.deepspeed_engine_wrapped.engine

    def adopt(self, model: nn.Module, optimizer: Any) -> None:
        self._training = model if isinstance(model, DeepSpeedEngine) else model._orig_mod

    def after_step(self, model: nn.Module, optimizer: Any, call: Callable[[], None]) -> Any:
        return zero_engine.AroundStep(self._training, after=call)

    def before_step(self, model: nn.Module, optimizer: Any, call: Callable[[], None]) -> Any:
        return zero_engine.AroundStep(self._training, before=call)

    def pausing(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return zero_engine.without_gradient_hooks(self._training)

    def join_pieces(self, whole: torch.Tensor) -> None:
        collectives.sum_(whole)


class ZeroOptimizer(Zero):
    """Stages 1 and 2: every rank holds the whole model, and estimation runs on it bare, as with DDP."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is None:
            return model.to(self.device)
        self._dtype = model.dtype
        self._training, started = zero_engine.start(self._accelerator, model, optimizer)
        return self._training, started

    def release(self, model: nn.Module, *prepared: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
                # a copy: the live weights are views of the engine's flat buffers
                parameter.data = (parameter.data if master is None else master).to(self._dtype, copy=True)
        self._accelerator.free_memory(*prepared)
        self._training = None

    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None:
        self.shard(model, matrix).weight.copy_(piece)
        for master, run in self._masters(model, matrix):
            master.copy_(piece.reshape(-1)[run])

    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None:
        keep_only_(self.shard(model, matrix).weight, keep)
        for master, run in self._masters(model, matrix):
            keep_only_(master, keep.reshape(-1)[run].to(master.device))  # on the CPU with offload_optimizer

    def _masters(self, model: nn.Module, matrix: Matrix) -> list[tuple[torch.Tensor, slice]]:
        """The run of the matrix that lies in this rank's flat fp32 master, if any, and where it lies in the matrix."""
        mapping = getattr(self.unwrap(model).get_parameter(matrix.parameter), "_hp_mapping", None)
        if mapping is None:
            return []
        where = mapping.lp_fragment_address
        low, high = max(where.start, matrix.start), min(where.start + where.numel, matrix.start + matrix.numel)
        if high <= low:
            return []
        master = mapping.hp_fragment.detach()[low - where.start : high - where.start]
        return [(master, slice(low - matrix.start, high - matrix.start))]

    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held:
        parameter, zero = self.unwrap(model).get_parameter(name), self._training.optimizer
        group = next(i for i, ps in enumerate(zero.bit16_groups) if any(p is parameter for p in ps))
        master, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:
            return Held(master, 0, 0, 0)
        where = mapping.lp_fragment_address
        return Held(master, mapping.get_hp_fragment_address().start, where.start, where.numel)

    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        parameter = self.unwrap(model).get_parameter(name)
        parameter.data.copy_(whole.view(parameter.shape))
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            where = mapping.lp_fragment_address
            mapping.hp_fragment.detach().copy_(whole.view(-1)[where.start : where.start + where.numel])


class ZeroParameters(Zero):
    """Stage 3: rank r holds elements [r*n, (r+1)*n) of every flattened weight, which may cut a row; whole weights exist
    while a module runs. Two engines take turns with a model: one without an optimizer for estimation, whose hooks
    gather and drop weights, and the training one.

    Accelerate tells transformers about stage 3, which from then on builds every model in pieces, skeletons and the
    smaller model of a cut too; `unset_hf_deepspeed_config` takes that back: `prepare` is what shards.
    """

    splits_weights = True
    recomputes = False  # torch's checkpoint would find other shapes: a weight is empty but while its module runs

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        unset_hf_deepspeed_config()

    # -- where the model is ------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is not None:
            self._dtype = model.dtype
            model.__dict__.pop(_ESTIMATION).destroy()
            self._training, started = zero_engine.start(self._accelerator, model, optimizer)
            unset_hf_deepspeed_config()
            return self._training, started
        forget_models()
        config = self._estimation_config(model.dtype)
        with zero_engine.keeping_buffers(model):
            model.__dict__[_ESTIMATION], *_ = deepspeed.initialize(model=model, config=config)
        whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_tensor")]
        assert not whole, f"{whole[0]} is not sharded"
        return model

    def place(self, origin: Origin) -> nn.Module:
        model, run = origin.take_empty()
        config = self._estimation_config(model.dtype)
        converter = deepspeed.zero.Init(config_dict_or_path=config, dtype=model.dtype)
        for parameter in without_storage(model, self.device):
            converter._convert_to_deepspeed_param(parameter)  # its own way in would broadcast every whole weight
            parameter.partition()
        with self.together("reading the weights"), torch.no_grad():
            for name, tensor in tensors_of(model).items():
                held, low, high = self._held(tensor), 0, tensor.numel()
                if hasattr(tensor, "ds_tensor"):
                    low, high = self._slices_of(tensor, tuple(tensor.ds_shape), 0).bounds()
                held.copy_(run(name, low, high).reshape(-1))
        return self.prepare(model)

    def _estimation_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The job's stage 3 settings without what concerns an optimizer. Nothing is fetched ahead: probes leave layers
        out, so the next layer is not the one that the last forward saw. Nothing stays whole after its module ran: a
        whole copy would hide an edit of the shard."""
        asked = copy.deepcopy(self._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"])
        asked = {key: value for key, value in asked.items() if value != "auto" and key != "offload_optimizer"}
        asked |= {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
        asked |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": asked}
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return config | ({names[dtype]: {"enabled": True}} if dtype in names else {})

    def release(self, model: nn.Module, *prepared: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                master = master_run(self._training, parameter)
                drop_whole(parameter)
                held = parameter.ds_tensor if master is None else master
                parameter.ds_tensor.data = held.detach().to(self._dtype, copy=True).view(-1)
                parameter.data = parameter.data.to(self._dtype)
        self._accelerator.free_memory(*prepared)
        self._training = None
        self.prepare(model)

    def _cast(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        model.__dict__.pop(_ESTIMATION).destroy()
        super()._cast(model, dtypes)
        for name, parameter in model.named_parameters():
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtypes[name])
        self.prepare(model)

    def dealt(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        return dealt_padded(items, self.rank, self.num_ranks)

    def on_main(self, work: Callable[[], Item]) -> Item | None:
        return work()  # its forwards need every rank

    def pieces(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: self._held(tensor) for name, tensor in tensors_of(self.unwrap(model)).items()}

    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        """Flat view of what this rank holds, without the padding."""
        if not hasattr(tensor, "ds_tensor"):
            return tensor.detach().reshape(-1)
        return self._slices_of(tensor, tuple(tensor.ds_shape), 0).local(live_run(tensor))

    # -- pieces of weights -------------------------------------------------------------------------------------------
    def shard(self, model: nn.Module, matrix: Matrix) -> Shard:
        slices = self._slices(model, matrix)
        return Shard(slices.local(live_run(self.unwrap(model).get_parameter(matrix.parameter))), slices.bounds()[0])

    def gather(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> torch.Tensor:
        return self._slices(model, matrix).gather(piece.to(self.device))

    def shard_of(self, model: nn.Module, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return self._slices(model, matrix).cut(whole).to(self._shard_device(model, matrix))

    def _shard_device(self, model: nn.Module, matrix: Matrix) -> torch.device:
        """With `offload_param` not the device that computes."""
        return self.unwrap(model).get_parameter(matrix.parameter).ds_tensor.device

    def whole(self, model: nn.Module, name: str) -> torch.Tensor:
        tensor = tensor_named(self.unwrap(model), name)
        if not hasattr(tensor, "ds_tensor"):
            return tensor.detach()
        return self._slices_of(tensor, tuple(tensor.ds_shape), 0).gather(self._held(tensor))

    @contextlib.contextmanager
    def gradient_sums(
        self, model: nn.Module, matrices: Sequence[Matrix], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[GradientSums]:
        sums, bare = self._empty_sums(model, matrices, function), self.unwrap(model)

        def reduce(matrix: Matrix) -> Callable[[torch.Tensor], torch.Tensor]:
            slices, device = self._slices(model, matrix), self._shard_device(model, matrix)
            return lambda whole: slices.reduce(whole).to(device)

        with hooked(sums, [(bare.get_parameter(t.parameter), t, reduce(t)) for t in matrices]):
            yield sums
        self.agree(sums.order(), "which weights a micro-batch reaches")

    def _slices(self, model: nn.Module, matrix: Matrix) -> Slices:
        return self._slices_of(self.unwrap(model).get_parameter(matrix.parameter), matrix.stored_shape, matrix.start)

    def _slices_of(self, parameter: nn.Parameter, shape: tuple[int, ...], start: int) -> Slices:
        return Slices(shape, start, parameter.ds_tensor.ds_numel, self.rank, self.num_ranks)

    # -- combining facts ---------------------------------------------------------------------------------------------
    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return collectives.sum_(tensor)

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None:
        self._edit(model, matrix, lambda held: held.copy_(piece))

    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None:
        self._edit(model, matrix, lambda held: keep_only_(held, keep.to(held.device)))

    def _edit(self, model: nn.Module, matrix: Matrix, edit: Callable[[torch.Tensor], Any]) -> None:
        parameter, slices = self.unwrap(model).get_parameter(matrix.parameter), self._slices(model, matrix)
        for run in self._runs(parameter):
            edit(slices.local(run))
        drop_whole(parameter)

    def _runs(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """The live run of a parameter, and the master behind it when it is in training."""
        training = self._training
        known = training is not None and training.optimizer.get_param_id(parameter) in training.optimizer.grad_position
        return [live_run(parameter), *([master_run(training, parameter)] if known and parameter.requires_grad else [])]

    # -- training ----------------------------------------------------------------------------------------------------
    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held:
        parameter, zero = self.unwrap(model).get_parameter(name), self._training.optimizer
        group, low, _ = zero.grad_position[zero.get_param_id(parameter)]
        first, last = self._slices_of(parameter, tuple(parameter.ds_shape), 0).bounds()
        return Held(zero.fp32_partitioned_groups_flat[group], low, first, last - first)

    def num_elements(self, model: nn.Module, name: str) -> int:
        return self.unwrap(model).get_parameter(name).ds_numel

    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        parameter = self.unwrap(model).get_parameter(name)
        slices = self._slices_of(parameter, tuple(parameter.ds_shape), 0)
        piece = slices.cut(whole)
        for held in self._runs(parameter):
            slices.local(held).copy_(piece)
        drop_whole(parameter)
