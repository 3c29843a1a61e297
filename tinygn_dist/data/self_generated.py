"""Calibration text written by the model itself, so that nothing needs downloading (Ji et al. 2024, arXiv 2410.17711).

Sequences are sampled from the start token and filtered by the model's own perplexity: the least likely quarter, which
tends to be degenerate, is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import DataConfig
from tinygn_dist.data.sources import BETWEEN_TEXTS, Rows
from tinygn_dist.models.objective import causal_lm
from tinygn_dist.runtime.progress import Progress

_SURPLUS = 4 / 3
_BATCH = 8


def write_rows(model: nn.Module, tokenizer: Any, options: DataConfig, backend: Backend, progress: Progress) -> Rows:
    """Enough rows for the asked calibration and evaluation sequences. Batches are shared over the ranks, each with a
    seed of its own, so the text does not depend on the number of ranks."""
    wanted = options.num_samples + options.eval_samples
    num_batches = -(-int(wanted * _SURPLUS + 1) // _BATCH)
    start = next(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if t is not None)
    bare, written = backend.unwrap(model), []
    mine = backend.dealt(range(num_batches))
    with torch.no_grad(), progress.bar("writing text", len(mine)) as advance, torch.random.fork_rng():
        for number, real in mine:
            torch.manual_seed(options.seed * 100_003 + number)
            prompt = torch.full((_BATCH, 1), start, device=backend.device)
            tokens = bare.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=0.95,
                min_new_tokens=options.seq_len,
                max_new_tokens=options.seq_len,
                pad_token_id=start,
            )
            losses = causal_lm(model, {"input_ids": tokens, "labels": tokens})
            mean = (losses.total / losses.count).tolist()
            if real:
                texts = tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
                written += [(number, loss, text) for loss, text in zip(mean, texts, strict=True)]
            advance()
    everything = sorted(row for part in backend.everyone(written) for row in part)
    fine = sorted(everything, key=lambda row: row[1])[: max(wanted, int(len(everything) / _SURPLUS))]
    return Rows([text for _, _, text in sorted(fine)], None, "text sampled from the model itself", BETWEEN_TEXTS)
