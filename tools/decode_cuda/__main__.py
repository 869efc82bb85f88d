#!/usr/bin/env python3
"""The decoding kernels alone, by ctypes: checks against float64, then times against the bandwidth of a copy.

    nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC -I. -o decode.so oryx/ops/gated_delta/cuda/gated_delta_step.cu \\
        oryx/ops/ssd/cuda/ssd_step.cu oryx/ops/decode_attention/cuda/*.cu oryx/generate/cuda/*.cu
    python3 tools/decode_cuda ./decode.so [--only step,attention,model,batch,small] [--peers fla,mamba_ssm] [--no-checks] [--no-times]      (a Python with a full torch, a GPU; exit code 1 on a failure)

Errors are norms of the difference over norms. Times are medians of CUDA events behind a sleep kernel, 256 MB overwritten before each repetition where inputs could
otherwise stay in L2. Rates count every input read once and every output written once.
"""
import importlib
import sys

from common import args, failures

parts = {"step": "steps", "attention": "attention", "model": "model", "batch": "batch", "small": "small"}
wanted = [importlib.import_module(parts[name]) for name in args.only.split(",")]
for part in wanted if not args.no_checks else []:
    part.check()
for part in wanted if not args.no_times else []:
    part.times()
print("FAILED" if failures else "all good", len(failures))
sys.exit(1 if failures else 0)
