#!/bin/sh
# Runs the fuzzers of the readers of foreign bytes, one after another: tools/fuzz.sh SECONDS [READER ...]
# What they learn grows in build/asan/corpus/READER; what they find is left in build/asan/finds/READER. Exits non-zero when there is a find.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:?usage: tools/fuzz.sh SECONDS [READER ...]}
shift
[ $# -gt 0 ] || set -- $(ls tests/corpus)
found=0
for reader; do
  mkdir -p "build/asan/corpus/$reader" "build/asan/finds/$reader"
  dictionary=tests/fuzz/$reader.dict
  echo "== $reader, $seconds s"
  # Inputs of 64 KiB reach everything; a reader that takes 10 s or 2 GiB over one is a find too. libtorch keeps globals, which are no leaks.
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1 ORYX_FUZZ_READER="$reader" build/asan/fuzz_readers -max_total_time="$seconds" -max_len=65536 -timeout=10 \
    -rss_limit_mb=2048 -malloc_limit_mb=1024 -print_final_stats=1 -verbosity=0 $([ -f "$dictionary" ] && echo -dict="$dictionary") \
    -artifact_prefix="build/asan/finds/$reader/" "build/asan/corpus/$reader" "tests/corpus/$reader" || found=1
done
exit $found
