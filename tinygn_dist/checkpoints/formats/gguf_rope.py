"""Rotary embeddings as llama.cpp wants them: a base, a dimension, and for Llama 3 a divisor of each frequency."""

from __future__ import annotations

import math

import gguf
import numpy as np
from transformers import PretrainedConfig

from tinygn_dist.errors import Refused

_ACCEPTED = ("default", "linear", "llama3")


def add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig, head_dim: int) -> None:
    """Raises Refused for a scaling that is not one of default, linear, llama3."""
    asked = config.rope_parameters
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(asked["rope_theta"])
    if asked.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(asked["factor"])


def frequency_factors(config: PretrainedConfig, head_dim: int) -> np.ndarray | None:
    """(head_dim / 2) fp32 divisors of the frequencies, None where there are none.

    Llama 3: long wavelengths are divided by `factor`, short ones stay, and in between the frequency is a mean of both.
    Raises Refused as `add_rope` does.
    """
    asked = config.rope_parameters
    kind = asked.get("rope_type", "default")
    if kind not in _ACCEPTED:
        raise Refused(f"rotary embedding of type {kind}, accepted in GGUF files: {', '.join(_ACCEPTED)}")
    if asked.get("partial_rotary_factor", 1.0) != 1.0:
        raise Refused("only a part of each head is rotated; GGUF files of this architecture rotate all of it")
    if kind != "llama3":
        return None
    factor, low, high = asked["factor"], asked["low_freq_factor"], asked["high_freq_factor"]
    wavelength = 2 * math.pi * asked["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = asked["original_max_position_embeddings"] / wavelength
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)
