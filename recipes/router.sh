#!/bin/bash
# A learned router (docs/results/2026-11-26-router.md): which tokens gain from attention, learned on frozen models, beside rules and an oracle. `oryx` in PATH.
# Associative recall with the models of recipes/which-tokens.sh, which are trained when they are missing; a few minutes on two cores.
#
#   recipes/router.sh [OUT]        default: runs/router
#
# Text as well, with models of text (of the same tokeniser, two seeds of one kind), text to fit routers on and text to test on, that none of the models has seen:
#
#   TEXT_MODELS="DIR DIR" FIT=valid.jsonl.zst TEST=passages.jsonl recipes/router.sh [OUT]
set -euo pipefail
out=${1:-runs/router}
models=()
for seed in 1 2 3; do
  m=$out/seed$seed/recall
  [ -f "$m/model.safetensors" ] || oryx demo --only recall seed=$seed --out "$out/seed$seed"
  train() { [ -f "$m/$1.safetensors" ] || oryx router train "$m" --recall "pairs=$2,queries=12,filler_symbols=0" --out "$m/$1.safetensors" --json "$m/$1.json" tokens=400000 "${@:3}"; }
  train same 60 flips=2000         # lists as long as those of the test, other ones
  train short 30                   # half as long
  train tokens 60 reads=tokens     # without hidden states
  models+=("$m")
done
oryx sweep recall "${models[@]}" --set share --out "$out/recall" \
  --option pairs=60 --option queries=12 --option filler_symbols=0 --option examples=400 --option batch_size=50 --setting shares=0.02,0.05,0.083,0.1,0.25,0.5,0.75 \
  --setting oracle=true --setting "routers={model}/same.safetensors,{model}/short.safetensors,{model}/tokens.safetensors"

[ -n "${TEXT_MODELS:-}" ] || exit 0
read -r -a models <<< "$TEXT_MODELS"
for m in "${models[@]}"; do
  train() { [ -f "$m/$1.safetensors" ] || oryx router train "$m" --data "$FIT" --precision bfloat16 --out "$m/$1.safetensors" --json "$m/$1.json" tokens=280000 "${@:2}"; }
  train hidden flips=100
  train tokens reads=tokens
done
oryx sweep perplexity "${models[@]}" --set share --out "$out/text" --precision bfloat16 --option data="$TEST" --setting parts=false --setting "without=most surprising" \
  --setting shares=0.05,0.1,0.25,0.5 --setting oracle=true --setting average=true --setting "routers={model}/hidden.safetensors,{model}/tokens.safetensors"
