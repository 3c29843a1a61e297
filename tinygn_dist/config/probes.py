"""How removals are measured: on which sequences, how many forwards, and when probing stops."""

from __future__ import annotations

from pydantic import Field

from tinygn_dist.config.section import Section


class ProbeConfig(Section):
    """A removal probe is one forward pass without a unit; its score is the change in loss."""

    samples: int = Field(8, ge=1)
    """calibration sequences per probe. Where several mixes are tried, at most so many held-out sequences measure each
    mix, and layers and heads are probed on as few as make 512 tokens. Layers that a feed-forward can absorb are
    compared on up to 32 held-out sequences"""
    adaptive: bool = True
    """stop probing a unit as soon as it is clear whether it goes (successive elimination): on 16 sequences about half
    the forwards, for 95 % of the units that all of them would choose"""
    greedy: bool = False
    """remove heads, channels and experts one at a time, anywhere in the model, and probe the best candidates again
    after each (layers are always removed so): units that can replace each other look free when probed alone"""
    forwards: int | None = Field(None, ge=1)
    """stop after about this many forwards (of one micro-batch each, over all ranks, those for fitting included) and
    choose by what is known"""
    minutes: float | None = Field(None, gt=0)
    """the same after so many minutes; the result then depends on the speed of the machines"""
    channels: int = Field(256, ge=1)
    """channels per removal probe"""
    step: float | None = Field(None, gt=0, lt=1)
    """step of a gate derivative (a gate is 1); by default measured for each group of units from the loss's noise and
    curvature"""
