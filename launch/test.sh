#!/usr/bin/env bash
# Run the tests in .venv, after installing into it what is missing. Arguments go to pytest: bash launch/test.sh -m pure
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
wanted=$({ pwd; cat pyproject.toml constraints.txt; } | cksum)
stamp=$venv/tinygn-dist.installed # what was installed last, by the checksum of what asks for it
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into $venv ..."
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,deepspeed]'
  echo "$wanted" >"$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest "$@"
