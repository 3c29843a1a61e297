"""Tiny random models of every family, their tokenizer and their data: built in memory, the same in every process."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Sequence

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import DistributedConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Anatomy, read_anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.objective import IGNORED, Batch, add_reference, objective_of
from tinygn_dist.prune.structured.shrink import Cut
from tinygn_dist.runtime.progress import Progress

VOCAB = 128
_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attn_implementation="eager",
    **_IDS,
)
_ENCODER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, attn_implementation="eager"
)

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_DECODER, tie_word_embeddings=False),
    "llama-tied": lambda: hf.LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**_DECODER, tie_word_embeddings=False),
    "qwen3": lambda: hf.Qwen3Config(**_DECODER, head_dim=16, tie_word_embeddings=False),
    "gemma2": lambda: hf.Gemma2Config(**_DECODER, head_dim=16, sliding_window=8),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_inner=48,
        n_layer=3,
        n_head=4,
        n_positions=128,
        attn_implementation="eager",
        **_IDS,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "bert": lambda: hf.BertConfig(vocab_size=VOCAB, max_position_embeddings=128, **_ENCODER),
    "bert-classifier": lambda: hf.BertConfig(vocab_size=VOCAB, max_position_embeddings=128, num_labels=3, **_ENCODER),
    "vit": lambda: hf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **_ENCODER),
}
CAUSAL = ("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gpt2", "opt")
GROUPED_HEADS = ("llama", "llama-tied", "qwen2", "qwen3", "gemma2")
FIXED_HEADS = ("gpt2", "opt", "bert", "bert-classifier", "vit")


def task_of(family: str) -> str:
    special = {
        "bert": "feature-extraction",
        "bert-classifier": "sequence-classification",
        "vit": "image-classification",
    }
    return special.get(family, "causal-lm")


def build(family: str, **changes: object) -> nn.Module:
    """The model in eval mode, seed 0. Biases and norms are random too: a zero bias hides mistakes with biases."""
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    auto = {
        "causal-lm": hf.AutoModelForCausalLM,
        "feature-extraction": hf.AutoModel,
        "sequence-classification": hf.AutoModelForSequenceClassification,
        "image-classification": hf.AutoModelForImageClassification,
    }[task_of(family)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:  # 0.02 would leave the layers' work too small to measure
                    parameter.mul_(4)
    return model.eval()


def batches(family: str, count: int = 3, size: int = 2, length: int = 10, *, padded: bool = True) -> list[Batch]:
    """Micro-batches of random data; with `padded`, the last rows of each text batch end in padding."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(100 + number)
        if family == "vit":
            pixels = torch.randn(size, 3, 16, 16, generator=generator)
            made.append({"pixel_values": pixels, "labels": torch.randint(3, (size,), generator=generator)})
            continue
        ids = torch.randint(3, VOCAB, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[-1, length - 3 :] = 0
        batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
        labels = ids.masked_fill(mask == 0, IGNORED)
        batch["labels"] = torch.randint(3, (size,), generator=generator) if family == "bert-classifier" else labels
        made.append(batch)
    return made


def problem(family: str, backend: Backend | None = None, model: nn.Module | None = None, **data: int) -> Problem:
    """A prepared model with its anatomy, objective and data."""
    backend = backend or make_backend(DistributedConfig())
    model = backend.prepare(model if model is not None else build(family))
    bare, task = backend.unwrap(model), task_of(family)
    anatomy = read_anatomy(bare, needs_units=True)
    rows = batches(family, **data)
    if task == "feature-extraction":  # at the reference itself the distance has no slope: compare with a moved one
        rows = [{**b, "reference": b["reference"] + 0.5} for b in add_reference(model, rows, backend.device)]
    return Problem(model, anatomy, objective_of(task), rows, backend, Progress())


def tokenizer(*, chat: bool = False, special_prefix: bool = False) -> hf.PreTrainedTokenizerFast:
    """Word-level, VOCAB words of the Python documentation, no pad token."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"])
    words.train_from_iterator(texts(), trainer)
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def texts() -> list[str]:
    """Paragraphs of the reference that ships with Python."""
    topics = pydoc_data.topics.topics
    return [p for key in sorted(topics)[:12] for p in topics[key].split("\n\n") if len(p.split()) > 5]


def state_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight and buffer, non-persistent ones too."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        if a.dim()
        else torch.equal(a, other[name])
        for name, a in one.items()
    )


def positions(blocks: Sequence[int], width: int) -> list[int]:
    """Features of units that are blocks of `width`."""
    return [unit * width + i for unit in blocks for i in range(width)]


def smaller_state(state: dict[str, torch.Tensor], anatomy: Anatomy, kept: KeptUnits) -> dict[str, torch.Tensor]:
    """The state dict of the smaller model."""
    cut = Cut(anatomy, kept, {name: tensor.shape for name, tensor in state.items()})
    small = {}
    for name, tensor in state.items():
        new = name
        for stack in anatomy.stacks:
            own = [layer - stack.first for layer in kept.layers if 0 <= layer - stack.first < stack.num]
            if layer := re.match(rf"{re.escape(stack.path)}\.(\d+)\.", name):
                new = f"{stack.path}.{own.index(int(layer[1]))}.{name[layer.end() :]}" if int(layer[1]) in own else None
        if new:
            assert cut.source(new) == name
            small[new] = cut.of(name, tensor)
    return small
