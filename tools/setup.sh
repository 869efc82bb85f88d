#!/usr/bin/env bash
# Installs what a build needs and nothing more. Idempotent: what is there is left alone, a second run takes under a second.
#
#   tools/setup.sh [cpu|cuda]
#
# Debian packages are installed when run as root; otherwise the one command to run is printed and the script stops.
# libtorch comes from the PyPI wheel into .deps/ (CPU use only needs three of its wheels, about 0.5 GB);
# TORCH_DIR=/path/to/site-packages/torch uses an existing one instead. For `cuda` the wheels that libtorch_cuda loads (cuBLAS, cuDNN, NCCL ...: 2 GB
# more) come too, and nvcc where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.11.0
PACKAGES=(build-essential cmake ninja-build ccache pkg-config python3-venv
          libhwy-dev libsentencepiece-dev sentencepiece libpcre2-dev libutf8proc-dev libcli11-dev nlohmann-json3-dev libzstd-dev libcpp-httplib-dev
          libgtest-dev libgmock-dev libbenchmark-dev)

PRESET=${1:-cpu}
say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

stamp=.deps/torch-$TORCH_VERSION.ok
fetch_torch() {
  say "fetching libtorch $TORCH_VERSION into .deps/ (about 0.5 GB)"
  mkdir -p .deps
  [ -x .deps/venv/bin/python ] || python3 -m venv .deps/venv || die "python3 -m venv failed: install python3-venv"
  # --no-deps: the wheel's CUDA companions (3 GB) are not needed to link and run on a CPU, but for these two small ones.
  .deps/venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile \
      "torch==$TORCH_VERSION" 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cupti==13.0.*' \
    || die "pip could not fetch torch==$TORCH_VERSION: no network? Set TORCH_DIR to an existing .../site-packages/torch of that version"
  ls .deps/venv/lib/python3*/site-packages/torch/lib/libtorch_cpu.so >/dev/null 2>&1 || die "the torch wheel holds no libtorch_cpu.so"
  touch "$stamp"
}

missing=()
if command -v dpkg-query >/dev/null 2>&1; then
  for p in "${PACKAGES[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
  done
else
  say "no dpkg here: this script knows Debian 12 and Ubuntu 24.04; install the equivalents of: ${PACKAGES[*]}"
fi

if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    say "these packages are missing: ${missing[*]}"
    say "run this, then the same make command again:"
    printf '  sudo apt-get update && sudo apt-get install -y --no-install-recommends %s\n' "${missing[*]}" >&2
    exit 1
  fi
  # Both are downloads for the most part: libtorch comes while the packages do, if Python can make its environment yet.
  fetching=
  trap '[ -z "$fetching" ] || kill -- "-$fetching" 2>/dev/null || true' EXIT
  if [ -z "${TORCH_DIR:-}" ] && [ ! -f "$stamp" ] && python3 -c 'import ensurepip' 2>/dev/null; then
    set -m  # a process group of its own, which the trap ends whole
    fetch_torch &
    fetching=$!
    set +m
  fi
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt_log=$(mktemp)
  apt() { apt-get "$@" >"$apt_log" 2>&1 || { grep '^E:' "$apt_log" | head -n 2 >&2; die "apt-get $1 failed: no network? Missing packages: ${missing[*]}"; }; }
  apt update -qq
  apt install -y -qq --no-install-recommends "${missing[@]}"
  rm -f "$apt_log"
  if [ -n "$fetching" ]; then
    wait "$fetching" || exit 1
    fetching=
  fi
fi

if [ -n "${TORCH_DIR:-}" ]; then
  [ -f "$TORCH_DIR/lib/libtorch_cpu.so" ] || die "TORCH_DIR=$TORCH_DIR holds no lib/libtorch_cpu.so; name the folder 'torch' inside site-packages"
elif [ ! -f "$stamp" ]; then
  fetch_torch
fi

# What libtorch_cuda loads, in the versions that the wheel itself asks for; without these a CUDA build links here, but runs only where they are.
if [ "$PRESET" = cuda ] && [ -z "${TORCH_DIR:-}" ]; then
  wheels=()
  cuda_stamp=.deps/cuda-$TORCH_VERSION.ok
  if [ ! -f "$cuda_stamp" ]; then
    mapfile -t wheels < <(sed -n 's/^Requires-Dist: \(\(nvidia-\|cuda-toolkit\)[^;]*\).*/\1/p' .deps/venv/lib/python3*/site-packages/torch-"$TORCH_VERSION".dist-info/METADATA | tr -d ' ')
    [ ${#wheels[@]} -gt 0 ] || die "the torch wheel does not say which CUDA libraries it wants"
  fi
  if ! PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null && ! compgen -G '.deps/venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc' >/dev/null; then
    wheels+=('nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*')
  fi
  if [ ${#wheels[@]} -gt 0 ]; then
    say "fetching CUDA's libraries into .deps/ (about 2 GB)"
    pip_log=$(mktemp)  # pip also reports the Python packages that torch would want to be imported
    .deps/venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile "${wheels[@]}" >"$pip_log" 2>&1 \
      || { grep '^ERROR:' "$pip_log" | head -n 2 >&2; die "pip could not fetch ${wheels[*]}: no network? Set TORCH_DIR to a full torch $TORCH_VERSION, and PATH to nvcc 13.0"; }
    rm -f "$pip_log"
    touch "$cuda_stamp"
  fi
fi
