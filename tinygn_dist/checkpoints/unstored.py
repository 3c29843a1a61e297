"""What a model has that its files do not say, or say otherwise: buffers that no file holds, and ties that the stored
values contradict.

transformers builds a class without storage and fills in the files; of custom code, buffers that are in no file come out
as whatever the memory held. They are taken from a plain build of the class, which every backend makes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.backends.pieces import hollow, tensor_named
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.errors import Refused

_SEEDS = (0, 1)


def unstored_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The non-persistent buffers."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


def set_unstored_buffers(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Every non-persistent buffer as the class itself makes it. build: a model of the same class, config and dtype.

    Raises Refused for one that is random, or that the class computes from its weights.
    """
    if not unstored_buffers(model):
        return
    one, other = (_built(build, seed) for seed in _SEEDS)
    for name in unstored_buffers(model):
        if name not in one:
            continue  # made by the loader
        if one[name].is_meta:
            raise Refused(
                f"{type(model).__name__} computes its buffer {name} from its weights when it is built, and no file "
                "holds it; register it with persistent=True and save the checkpoint again"
            )
        if not torch.equal(_bits(one[name]), _bits(other[name])):
            raise Refused(
                f"{type(model).__name__} fills its buffer {name} at random and no file holds it, so no two loads are "
                "the same model; register it with persistent=True and save the checkpoint again"
            )
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = one[name]


def _built(build: Callable[[], nn.Module], seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return unstored_buffers(hollow(build))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def stored_apart(
    config: PretrainedConfig, skeleton: Callable[[PretrainedConfig], nn.Module], stored: StoredTensors
) -> tuple[str, ...]:
    """The names that a class ties to others by its config, and under which the files hold other values than under
    those. Stock loading keeps such values apart. skeleton: a model of a config, on the meta device."""
    names = set(stored.names)
    if not _may_differ(config, stored):
        return ()
    pairs = [pair for pair in _tied(skeleton(config)).items() if names.issuperset(pair)]
    return tuple(one for one, other in pairs if not _same(stored, one, other))


def keep_apart(model: nn.Module, names: Collection[str]) -> nn.Module:
    """The model with these parameters on their own, now and whenever it ties its weights. Where nothing else is tied
    its config says so, which every engine understands; T5's cannot."""
    if not names:
        return model
    if set(_tied(model)) <= set(names):
        for section in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            if getattr(section, "tie_word_embeddings", False):
                section.tie_word_embeddings = False
    model._tied_weights_keys = {a: b for a, b in (model._tied_weights_keys or {}).items() if a not in names}
    for name in names:
        model.all_tied_weights_keys.pop(name, None)
        path, _, leaf = name.rpartition(".")
        tied = getattr(model.get_submodule(path), leaf)
        own = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
        setattr(model.get_submodule(path), leaf, own)
    return model


def kept_apart(model: nn.Module) -> tuple[str, ...]:
    """The names that `keep_apart` was given."""
    return tuple(sorted(set(type(model)._tied_weights_keys or {}) - set(model._tied_weights_keys or {})))


def apart_in(bare: nn.Module, plain: nn.Module) -> tuple[str, ...]:
    """The names under which a live model holds a tensor of its own, where its class by its config ties them."""
    pairs = _tied(plain).items()
    return tuple(one for one, other in pairs if tensor_named(bare, one) is not tensor_named(bare, other))


def _tied(model: nn.Module) -> Mapping[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _may_differ(config: PretrainedConfig, stored: StoredTensors) -> bool:
    """Whether two stored matrices have a row for each token: without them no head can differ from an embedding."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return sum(stored.shape(name)[:1] == (vocabulary,) and len(stored.shape(name)) > 1 for name in stored.names) > 1


def _same(stored: StoredTensors, one: str, other: str) -> bool:
    if stored.shape(one) != stored.shape(other):
        return False
    return torch.equal(stored.whole(one), stored.whole(other))
