"""The peer of one_shot.py, run by the Python of its own environment: SparseGPT of llm-compressor, block by block.

    python llm_compressor.py DENSE_FOLDER TOKENS.json OUTPUT_FOLDER 50%|2:4

tokens: a JSON list of sequences of token ids. Prints one JSON line: seconds and CPU seconds of calibration and solving,
and the process's peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(dense: str, tokens: str, output: str, pattern: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    rows = json.loads(Path(tokens).read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    share, mask = (0.5, pattern) if ":" in pattern else (float(pattern.rstrip("%")) / 100, "0:0")
    recipe = SparseGPTModifier(sparsity=share, mask_structure=mask, targets=["Linear"], ignore=["re:.*lm_head"])
    used, begun = time.process_time(), time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows)),
        shuffle_calibration_samples=False,
    )
    used, took = time.process_time() - used, time.perf_counter() - begun
    model.save_pretrained(output, save_compressed=False)
    tokenizer.save_pretrained(output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"cpu_seconds": used, "seconds": took, "peak_gib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
