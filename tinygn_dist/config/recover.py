"""How the compressed model goes on learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tinygn_dist.config.section import Section


class RecoverConfig(Section):
    steps: int = Field(0, ge=0)
    """optimizer steps of fine-tuning after compression; 0 for none"""
    learning_rate: float | None = Field(None, gt=0)
    """peak of a linear warm-up over a tenth of the steps, then linear decay to zero; by default 1e-4 (lora 5e-4), and
    with zo-* measured in the first steps: what 32 directions together do to the loss of 16 other sequences"""
    optimizer: Literal["adamw", "sgd", "nesterov", "adamw-8bit", "zo-sgd", "zo-nesterov", "zo-adam"] = "adamw"
    """sgd and nesterov have a momentum of 0.9; adamw-8bit needs the package bitsandbytes; zo-* never backpropagate:
    slopes of the loss along random directions, which move the layers' matrices (the kept weights), or norms and biases,
    relative to their rms, and so does the learning rate"""
    directions: int = Field(4, ge=1)
    """zo-*: random directions per step, each probed with two forwards on its own share of the batch"""
    probe_step: float | None = Field(None, ge=1e-6, le=0.25)
    """zo-*: relative step of a weight probe; by default measured from the loss's noise and curvature"""
    train: Literal["all", "lora", "norms-and-biases"] = "all"
    """which parameters learn; norms-and-biases are a ten-thousandth of a language model; lora adds a low-rank update to
    each matrix of the layers, masked as the matrix is and merged at the end, so the optimizer's state is small"""
    lora_rank: int = Field(16, ge=1)
    """rank of lora's updates"""
    batch_size: int = Field(4, ge=1)
    """sequences per optimizer step, over all ranks"""
    seq_len: int = Field(256, ge=2)
    """tokens per training sequence"""
    distill: float = Field(0.5, ge=0, le=1)
    """share of the loss that is the divergence from the dense model's logits; the rest is the task loss"""
    temperature: float = Field(1.0, gt=0)
    """softens both distributions in the distillation term"""
    distill_hidden: float = Field(0.0, ge=0)
    """weight of the distance from the dense model's hidden states after each layer, which must be as many; 1 is
    common"""
    teacher_cache_gib: float | None = Field(None, gt=0)
    """write the dense model's logits to disk before training, within so many GiB, instead of keeping it in memory"""
    teacher_top_k: int = Field(64, ge=1)
    """how many of the most probable tokens of each prediction are written; the others count as one"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay (of SGD: an L2 penalty)"""
    clip_norm: float = Field(1.0, gt=0)
    """largest norm of the whole gradient"""
    seed: int = Field(0, ge=0)
    """order of the training windows"""
    evaluate_every: int = Field(0, ge=0)
    """optimizer steps from one evaluation on held-out training sequences to the next; one more after every mask update,
    at the start and at the end; 0 for none"""
    evaluate_samples: int = Field(16, ge=1)
    """training sequences held out for these evaluations, the last ones"""
    keep_best: bool = False
    """end with the weights of the best evaluation among those with the final masks or units"""

    @model_validator(mode="after")
    def _fits_together(self) -> RecoverConfig:
        if self.forward_only and self.directions > self.batch_size:
            raise ValueError(
                f"directions {self.directions} of a batch of {self.batch_size}, accepted: at most batch_size, because "
                "each is probed on sequences of its own"
            )
        if self.distill_hidden and self.teacher_cache_gib is not None:
            raise ValueError("teacher_cache_gib holds logits, not the hidden states that distill_hidden needs; use one")
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best without evaluate_every, which says how often the model is evaluated; set both")
        if self.forward_only and self.train == "lora":
            raise ValueError(
                f"optimizer {self.optimizer} has no low-rank updates, accepted: train all or norms-and-biases"
            )
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate where it is not measured."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.train == "lora" else 1e-4

    @property
    def taught(self) -> bool:
        """Whether training looks at the dense model."""
        return self.steps > 0 and (self.distill > 0 or self.distill_hidden > 0)

    @property
    def saved_on_the_way(self) -> bool:
        """Whether a checkpoint holds all there is to know about the training: adamw-8bit quantises its state in blocks
        of what a rank holds, which fit no other sharding."""
        return self.optimizer != "adamw-8bit"

    @property
    def forward_only(self) -> bool:
        """Whether training never backpropagates."""
        return self.optimizer.startswith("zo-")
