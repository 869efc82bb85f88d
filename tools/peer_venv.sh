#!/usr/bin/env bash
# Makes the Python that comparisons with peers run in: .deps/peer-venv, apart from the venv that the build links against (whose
# torch lacks its companions and does not import). About 6 GB with torch's CUDA libraries. Idempotent.
#
#   tools/peer_venv.sh && .deps/peer-venv/bin/python tools/compare_llama_step.py
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.11.0  # that of tools/setup.sh: ratios compare code, not versions of libtorch
VENV=.deps/peer-venv
stamp=$VENV/torch-$TORCH_VERSION.ok
[ -f "$stamp" ] && exit 0
mkdir -p .deps
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV" || { echo "peer_venv: error: python3 -m venv failed: install python3-venv" >&2; exit 1; }
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION" transformers safetensors numpy \
  || { echo "peer_venv: error: pip could not fetch torch==$TORCH_VERSION and transformers: no network?" >&2; exit 1; }
"$VENV/bin/python" -c "import torch, transformers; assert torch.__version__.split('+')[0] == '$TORCH_VERSION'"
touch "$stamp"
