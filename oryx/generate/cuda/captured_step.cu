// Kernels of captured_step.h. A thread has two neighbouring channels; a warp a slice under one norm.
#include "oryx/generate/cuda/captured_common.cuh"

namespace oryx::decode_cuda {
namespace {

constexpr int kPrepareThreads = 256;

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ OryxCapturedPrepare a) {
  const int64_t n = blockIdx.y;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
  launch_dependents();
  wait_for_previous();
  if (n >= active_of(a.places, a.N)) return;
  const int position = a.positions[n];
  for (int g = 0; g < a.num_channels; ++g) {
    const int64_t pairs = a.channels[g].channels / 2;
    if (i < pairs) {
      channel_pair(a, a.channels[g], n, 2 * i, position);
      return;
    }
    i -= pairs;
  }
  for (int g = 0; g < a.num_scalars; ++g) {
    if (i < a.scalars[g].heads) {
      scalar(a, a.scalars[g], n, i, position);
      return;
    }
    i -= a.scalars[g].heads;
  }
  if (i == 0) keep_mode(a, n, position);
}

constexpr int kDecayWarps = 8, kDecaySequences = 4;

// A warp a channel of a few sequences.
__global__ void __launch_bounds__(kDecayWarps * 32) channel_decays_kernel(const __grid_constant__ OryxCapturedChannelDecays a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kDecayWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  launch_dependents();
  wait_for_previous();
  if (channel >= a.H * a.K) return;
  const float* up = a.up + channel * a.V;
  const float bias = __ldg(a.dt_bias + channel), rate = -expf(__ldg(a.A_log + channel / a.K));
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kDecaySequences, end = min(a.N, first + kDecaySequences);
  for (int64_t n = first; n < end; ++n) {
    float sum = 0.0f;
    for (int64_t i = lane; i < a.V; i += 32) sum = fmaf(__ldg(up + i), __ldcg(a.f + n * a.V + i), sum);
    sum = warp_sum(sum);
    if (lane == 0) a.g[n * a.H * a.K + channel] = rate * softplus(sum + bias);
  }
}

constexpr int kReadoutWarps = 4;

__global__ void __launch_bounds__(kReadoutWarps * 32) readout_kernel(const __grid_constant__ OryxCapturedReadout a) {
  const int64_t n = blockIdx.y, first = (static_cast<int64_t>(blockIdx.x) * kReadoutWarps + threadIdx.x / 32) * a.slice;
  const int lane = threadIdx.x % 32;
  launch_dependents();
  wait_for_previous();
  const int place = a.modes[n];
  if (first >= a.width || (!a.mean && a.o[place] == nullptr)) return;
  const int begin = a.mean ? 0 : place, end = a.mean ? a.mixers : place + 1;
  float scale[kOryxCapturedMixers];
  for (int m = begin; m < end; ++m) {
    scale[m] = a.mean ? 1.0f / static_cast<float>(a.mixers) : 1.0f;
    if (a.norm == nullptr) continue;
    float squares = 0.0f;
    for (int64_t c = 2 * lane; c < a.slice; c += 64) {
      Two v = two(a.o[m], n * a.width + first + c);
      if (a.gate_first) {
        const Two g = gate_at(a, n, first + c);
        v.x *= g.x, v.y *= g.y;
      }
      squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
    }
    scale[m] *= rsqrtf(warp_sum(squares) / static_cast<float>(a.slice) + a.eps);
  }
  for (int64_t c = 2 * lane; c < a.slice; c += 64) {
    Two sum = {0.0f, 0.0f};
    for (int m = begin; m < end; ++m) {
      const Two v = two(a.o[m], n * a.width + first + c);
      sum.x = fmaf(v.x, scale[m], sum.x), sum.y = fmaf(v.y, scale[m], sum.y);
    }
    const Two g = gate_at(a, n, first + c);
    sum.x *= g.x, sum.y *= g.y;
    if (a.norm != nullptr) sum.x *= __ldg(a.norm + (first + c) % a.norm_length), sum.y *= __ldg(a.norm + (first + c + 1) % a.norm_length);
    *activation_pair(a.out, a.tiles, static_cast<int>(n), static_cast<int>(first + c)) = pack(sum.x, sum.y);
  }
}

}  // namespace
}  // namespace oryx::decode_cuda

using namespace oryx::decode_cuda;

extern "C" int oryx_captured_prepare(const OryxCapturedPrepare* a, void* stream) {
  if (a->N < 1 || a->N > 65535 || a->num_channels > kOryxCapturedChannels || a->num_scalars > kOryxCapturedScalars) return cudaErrorInvalidValue;
  int64_t items = 1;
  for (int i = 0; i < a->num_channels; ++i) {
    if (a->channels[i].channels % 2 != 0) return cudaErrorInvalidValue;
    items += a->channels[i].channels / 2;
  }
  for (int i = 0; i < a->num_scalars; ++i) items += a->scalars[i].heads;
  const dim3 grid(static_cast<unsigned>((items + kPrepareThreads - 1) / kPrepareThreads), static_cast<unsigned>(a->N));
  return launch_after(prepare_kernel, grid, kPrepareThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_captured_channel_decays(const OryxCapturedChannelDecays* a, void* stream) {
  const dim3 grid(static_cast<unsigned>((a->H * a->K + kDecayWarps - 1) / kDecayWarps), static_cast<unsigned>((a->N + kDecaySequences - 1) / kDecaySequences));
  return launch_after(channel_decays_kernel, grid, kDecayWarps * 32, 0, static_cast<cudaStream_t>(stream), *a);
}

extern "C" int oryx_captured_readout(const OryxCapturedReadout* a, void* stream) {
  if (a->N < 1 || a->N > 65535 || a->mixers > kOryxCapturedMixers || a->slice % 2 != 0 || a->width % a->slice != 0) return cudaErrorInvalidValue;
  const int64_t slices = a->width / a->slice;
  const dim3 grid(static_cast<unsigned>((slices + kReadoutWarps - 1) / kReadoutWarps), static_cast<unsigned>(a->N));
  return launch_after(readout_kernel, grid, kReadoutWarps * 32, 0, static_cast<cudaStream_t>(stream), *a);
}
