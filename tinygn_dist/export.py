"""Write the checkpoint whole or not at all, then read it back.

Everything goes into a sibling folder which is renamed into place at the very end; a crash leaves either the old folder
or none. What the report says about the result is read from the files, not from memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import OutputConfig
from tinygn_dist.errors import UserError

_SPARE = 1.05
_LEFTOVER = ".partial-"


def claim(options: OutputConfig, source_path: str, needed_bytes: int) -> Path:
    """The output folder, checked before any work.

    Raises UserError when it is not empty (without overwrite), is the model's own folder, cannot be written, or its disk
    has less room than `needed_bytes`. Removes what a crashed run left beside it.
    """
    path = Path(options.dir).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file; name a folder")
    if path.exists() and path.resolve() == Path(source_path).expanduser().resolve():
        raise UserError(f"output {path} is the model's own folder; name another one")
    if path.exists() and any(path.iterdir()) and not options.overwrite:
        raise UserError(f"output folder {path} is not empty; name another one or pass --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from None
    free, needed = shutil.disk_usage(path.parent).free, int(needed_bytes * _SPARE)
    if free < needed:
        raise UserError(
            f"output {path} needs {needed:,} bytes, its disk has {free:,} free; make room or name another disk"
        )
    for leftover in path.parent.glob(f"{_LEFTOVER}{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return path


@contextlib.contextmanager
def draft(destination: Path, backend: Backend) -> Iterator[Path]:
    """A folder beside the destination, the same on every rank; moved into place when the context ends well, removed
    otherwise. An older destination is gone only after the new one is complete."""
    made = None
    try:
        with backend.together("making the output folder"):
            if backend.is_main:
                made = Path(tempfile.mkdtemp(prefix=f"{_LEFTOVER}{destination.name}-", dir=destination.parent))
        yield Path(backend.everyone(str(made))[0])
        with backend.together("publishing the checkpoint"):
            if made:
                _publish(made, destination)
    except BaseException:
        if made:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _publish(made: Path, destination: Path) -> None:
    made.chmod(0o755)  # made private by mkdtemp, and by safetensors for its files
    for file in made.iterdir():
        file.chmod(0o644)
    old = None
    if destination.exists():
        old = destination.with_name(f"{_LEFTOVER}{destination.name}-old-{os.getpid()}")
        os.rename(destination, old)
    os.rename(made, destination)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    folder: Path, model: nn.Module, state: Mapping[str, torch.Tensor], processor: Any, max_shard_gib: float
) -> None:
    """safetensors shards, config, generation config, tokenizer and custom code, as plain `from_pretrained` reads them.

    Raises UserError when the disk fills up while writing.
    """
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    assert not empty, f"{empty[0]} would be written empty"
    try:
        model.save_pretrained(folder, state_dict=dict(state), max_shard_size=f"{max_shard_gib}GB")
        processor.save_pretrained(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise UserError(f"writing {folder} failed: {error.strerror or error}; {free:,} bytes are free") from None


@dataclass(frozen=True)
class Disk:
    """What the safetensors files hold. num_params: distinct stored values. zeros, sizes: per tensor. matrices: the
    names of those that are matrices or stacks of them."""

    bytes: int
    num_params: int
    zeros: dict[str, int]
    sizes: dict[str, int]
    matrices: tuple[str, ...]


def read_back(folder: Path, state: Mapping[str, torch.Tensor]) -> Disk:
    """Count and compare every stored tensor. Raises RuntimeError when one differs from what was to be written."""
    zeros, sizes, matrices = {}, {}, []
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensor = stored.get_tensor(name)
                if name in state and not torch.equal(tensor, state[name].cpu()):
                    raise RuntimeError(
                        f"{file.name} holds another {name} than was written; the disk or library is at fault"
                    )
                sizes[name], zeros[name] = tensor.numel(), tensor.numel() - int(torch.count_nonzero(tensor))
                if tensor.dim() > 1 and not name.endswith("bias"):
                    matrices.append(name)
    return Disk(sum(file.stat().st_size for file in files), sum(sizes.values()), zeros, sizes, tuple(matrices))


def check_renamed(model: nn.Module, disk: Disk, state: Mapping[str, torch.Tensor]) -> None:
    """Compare, in the reloaded model, the tensors that lie on disk under other names: transformers writes fused experts
    one by one where their checkpoints always had them so. Raises RuntimeError like `read_back`."""
    reloaded = model.state_dict()
    for name in state.keys() - disk.sizes.keys():
        if not torch.equal(reloaded[name].cpu(), state[name].cpu()):
            raise RuntimeError(f"{name} was reloaded with other values than were written; the library is at fault")


def sparsity_figures(disk: Disk, targets: tuple[Target, ...], reloaded: nn.Module) -> dict[str, float | int]:
    """Zeros among the masked weights (in the model that was loaded from disk), all matrices and everything stored."""
    masked = [target.within(reloaded.get_parameter(target.parameter)) for target in targets]
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in masked)

    def share(chosen: list[str]) -> float:
        total = sum(disk.sizes[name] for name in chosen)
        return sum(disk.zeros[name] for name in chosen) / total if total else 0.0

    return {
        "targeted_weights": 1 - nonzero / sum(w.numel() for w in masked) if masked else 0.0,
        "all_weight_matrices": share(list(disk.matrices)),
        "whole_checkpoint": share(list(disk.sizes)),
        "zeros": sum(disk.zeros.values()),
    }
