// Decode attention on CUDA: hands tensors to the launchers of cuda/. Nothing here waits for the device.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "oryx/common/error.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/decode_attention/cuda/decode_attention.h"
#include "oryx/ops/decode_attention/decode_attention_internal.h"
#include "oryx/ops/rope/rope_rows_cuda.h"

namespace oryx::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor decode_cuda(const at::Tensor& q_in, const at::Tensor& keys_in, const at::Tensor& values_in, const at::Tensor& lengths_in, const OptionalTensor& blocks_in,
                       const OptionalTensor& wanted_in, double theta, int64_t rotary_dim, int64_t window, std::optional<double> scale) {
  const DecodeRope rope{theta, rotary_dim};
  check_decode_attention(q_in, keys_in, values_in, lengths_in, blocks_in, wanted_in, rope, window, scale);
  const c10::cuda::CUDAGuard guard(q_in.device());
  if (q_in.scalar_type() == at::kDouble) return decode_attention_naive(q_in, keys_in, values_in, lengths_in, blocks_in, wanted_in, rope, window, scale);
  const auto here = [&](const at::Tensor& x) { return x.to(q_in.device()).contiguous(); };
  const auto rows = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor q = q_in.contiguous(), keys = rows(keys_in), values = rows(values_in), lengths = here(lengths_in);
  const at::Tensor blocks = blocks_in ? here(*blocks_in) : at::Tensor(), wanted = wanted_in ? here(*wanted_in) : at::Tensor();
  const int64_t N = q.size(0), Hq = q.size(1), K = q.size(2), Hk = keys.size(2), V = values.size(3);
  const int64_t page = blocks.defined() ? keys.size(1) : 0, most = blocks.defined() ? blocks.size(1) : 0;
  const int64_t capacity = blocks.defined() ? page * most : keys.size(1), rotated = rotary_dim > 0 ? rotary_dim : K;
  at::Tensor o = at::empty({N, Hq, V}, q.options());
  if (N == 0 || capacity == 0) return o.zero_();
  const at::Tensor table = theta > 0 ? rope_rows_on(q.device(), capacity, theta, rotated) : at::Tensor();
  OryxDecodeAttention a{};
  a.q = q.const_data_ptr(), a.keys = keys.const_data_ptr(), a.values = values.const_data_ptr(), a.o = o.mutable_data_ptr();
  a.lengths = lengths.const_data_ptr<int32_t>();
  if (blocks.defined()) a.blocks = blocks.const_data_ptr<int32_t>();
  if (wanted.defined()) a.wanted = reinterpret_cast<const uint8_t*>(wanted.const_data_ptr<bool>());
  if (table.defined()) a.rope = table.const_data_ptr<float>(), a.rotated = rotated;
  a.N = N, a.Hq = Hq, a.Hk = Hk, a.K = K, a.V = V, a.capacity = capacity, a.page = page, a.most_blocks = most;
  a.key_row = keys.stride(0), a.key_token = keys.stride(1), a.key_head = keys.stride(2);
  a.value_row = values.stride(0), a.value_token = values.stride(1), a.value_head = values.stride(2);
  a.window = window, a.q_row = Hq * K, a.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(K))));
  if (q.scalar_type() == at::kBFloat16 && oryx_decode_attention_supports(&a) != 0) {
    const at::Tensor workspace = at::empty({oryx_decode_attention_workspace(&a)}, q.options().dtype(at::kByte));
    cuda::check("decode_attention", oryx_decode_attention(&a, workspace.mutable_data_ptr(), cuda::stream_of(q)));
    return o;
  }
  const at::Tensor workspace = at::empty({oryx_decode_attention_general_workspace(&a)}, q.options().dtype(at::kByte));
  cuda::check("decode_attention", oryx_decode_attention_general(&a, cuda::kernel_dtype("decode_attention", q), workspace.mutable_data_ptr(), cuda::stream_of(q)));
  return o;
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) { m.impl("decode_attention", decode_cuda); }

}  // namespace oryx::ops
