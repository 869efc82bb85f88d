#!/bin/bash
# Which tokens deserve attention, and which keys and values are worth keeping: the demo's recall model, trained from three seeds, under many schedules and policies of kept rows
# (docs/results/2026-11-26-which-tokens.md). `oryx` in PATH; about five minutes on two cores. What is trained already is not trained again.
#
#   recipes/which-tokens.sh [OUT]        default: runs/which-tokens
set -euo pipefail
out=${1:-runs/which-tokens}
models=()
for seed in 1 2 3; do
  [ -f "$out/seed$seed/recall/model.safetensors" ] || oryx demo --only recall seed=$seed --out "$out/seed$seed"
  models+=("$out/seed$seed/recall")
done
oryx sweep recall "${models[@]}" --set share,kv,switches --out "$out/sweep" \
  --option pairs=60 --option queries=12 --option filler_symbols=0 --option examples=400 --option batch_size=50 --setting rows=16,32,48,64,80,96,120
