"""How the compressed model goes on learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tinygn_dist.config.section import Section


class RecoverConfig(Section):
    steps: int = Field(0, ge=0)
    """optimizer steps of fine-tuning after compression; 0 for none"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak of a linear warm-up over a tenth of the steps, then linear decay to zero"""
    optimizer: Literal["adamw", "sgd", "nesterov", "adamw-8bit"] = "adamw"
    """sgd and nesterov have a momentum of 0.9; adamw-8bit needs the package bitsandbytes"""
    train: Literal["all", "norms-and-biases"] = "all"
    """which parameters learn; norms-and-biases are a ten-thousandth of a language model"""
    batch_size: int = Field(4, ge=1)
    """sequences per optimizer step, over all ranks"""
    seq_len: int = Field(256, ge=2)
    """tokens per training sequence"""
    distill: float = Field(0.5, ge=0, le=1)
    """share of the loss that is the divergence from the dense model's logits; the rest is the task loss"""
    temperature: float = Field(1.0, gt=0)
    """softens both distributions in the distillation term"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay (of SGD: an L2 penalty)"""
    clip_norm: float = Field(1.0, gt=0)
    """largest norm of the whole gradient"""
    train_embeddings: bool = False
    """also update token embeddings (and a head tied to them)"""
    seed: int = Field(0, ge=0)
    """order of the training windows"""
