// SSD on CUDA: hands tensors to the launchers of cuda/ where they can take them, else to the chunked form.
#include <ATen/cuda/CUDAContextLight.h>
#include <torch/library.h>

#include "oryx/common/log.h"
#include "oryx/ops/cuda/launch.h"
#include "oryx/ops/ssd/cuda/ssd_cuda.h"
#include "oryx/ops/ssd/ssd_internal.h"

namespace oryx::ops {
namespace {

bool has_kernel(const at::Tensor& q, const at::Tensor& v) {
  const auto dim = [](const at::Tensor& x) { return x.dim() > 0 && (x.size(-1) == 64 || x.size(-1) == 128); };
  if (v.scalar_type() == at::kBFloat16 && dim(q) && dim(v) &&
      at::cuda::getDeviceProperties(v.device().index())->major == 9)
    return true;
  log::warn_once(
      "ssd: CUDA kernels are for bfloat16, head dimensions 64 and 128, and Hopper; other cases run by batched matrix "
      "products, slowly");
  return false;
}

// The arguments as the launchers want them; the tensors keep the memory alive.
struct Prepared {
  SsdInputs in;
  SsdSizes sizes;
  at::Tensor wanted;
  OryxSsd args{};

  Prepared(const char* op, const SsdInputs& given) : in(given), sizes(ssd_shapes(op, given)) {
    for (at::Tensor* p : {&in.q, &in.k, &in.v}) *p = p->detach().contiguous();
    for (at::Tensor* p : {&in.dt_raw, &in.dt_bias, &in.A_log, &in.D, &in.initial_state}) {
      if (p->defined()) *p = p->detach().to(at::kFloat).contiguous();
    }
    const auto device = in.v.device();
    if (in.cu_seqlens.defined()) in.cu_seqlens = in.cu_seqlens.to(device, at::kInt).contiguous();
    if (in.spans.defined()) {
      in.spans = in.spans.to(device, at::kInt).contiguous();
      wanted = at::empty({sizes.B, sizes.T}, in.v.options().dtype(at::kByte));
      if (wanted.numel() > 0) {
        cuda::check(op, oryx_ssd_wanted(in.spans.const_data_ptr<int32_t>(), static_cast<int32_t>(in.spans.size(0)),
                                        static_cast<int32_t>(sizes.B), static_cast<int32_t>(sizes.T),
                                        wanted.mutable_data_ptr<uint8_t>(), cuda::stream_of(in.v)));
      }
    }
    const auto floats = [](const at::Tensor& x) { return static_cast<const float*>(cuda::read_or_null(x)); };
    args.q = in.q.const_data_ptr(), args.k = in.k.const_data_ptr(), args.v = in.v.const_data_ptr();
    args.dt_raw = floats(in.dt_raw), args.dt_bias = floats(in.dt_bias), args.A_log = floats(in.A_log),
    args.D = floats(in.D);
    args.initial_state = floats(in.initial_state);
    args.cu_seqlens = static_cast<const int32_t*>(cuda::read_or_null(in.cu_seqlens));
    args.wanted = static_cast<const uint8_t*>(cuda::read_or_null(wanted));
    const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
    args.B = narrow(sizes.B), args.T = narrow(sizes.T), args.N = narrow(sizes.N);
    args.Hq = narrow(sizes.Hq), args.Hk = narrow(sizes.Hk), args.Hv = narrow(sizes.Hv), args.K = narrow(sizes.K),
    args.V = narrow(sizes.V);
  }
  at::Tensor workspace(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, in.v.options().dtype(at::kByte));
  }
};

at::Tensor or_undefined(const SsdOptional& t) { return t.value_or(at::Tensor()); }

std::tuple<at::Tensor, at::Tensor> ssd_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& dt_raw, const at::Tensor& dt_bias,
                                            const at::Tensor& A_log, const at::Tensor& D,
                                            const SsdOptional& initial_state, const SsdOptional& cu_seqlens,
                                            const SsdOptional& spans) {
  if (!has_kernel(q, v)) return ssd_general(q, k, v, dt_raw, dt_bias, A_log, D, initial_state, cu_seqlens, spans);
  const c10::cuda::CUDAGuard guard(v.device());
  Prepared p("ssd", {q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens),
                     or_undefined(spans)});
  const SsdSizes& s = p.sizes;
  const at::Tensor o = at::empty({s.B, s.T, s.Ho, s.V}, p.in.v.options());
  const at::Tensor state = at::empty({s.N, s.Hs, s.V, s.K}, p.in.dt_raw.options());
  p.args.o = o.mutable_data_ptr(), p.args.final_state = state.mutable_data_ptr<float>();
  const at::Tensor workspace = p.workspace(oryx_ssd_workspace(&p.args));
  cuda::check("ssd", oryx_ssd_forward(&p.args, workspace.mutable_data_ptr(), cuda::stream_of(v)));
  return {o, state};
}

SsdEight ssd_backward_cuda(const at::Tensor& d_o, const SsdOptional& d_final_state, const at::Tensor& q,
                           const at::Tensor& k, const at::Tensor& v, const at::Tensor& dt_raw,
                           const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                           const SsdOptional& initial_state, const SsdOptional& cu_seqlens, const SsdOptional& spans) {
  if (!has_kernel(q, v))
    return ssd_backward_general(d_o, d_final_state, q, k, v, dt_raw, dt_bias, A_log, D, initial_state, cu_seqlens,
                                spans);
  const c10::cuda::CUDAGuard guard(v.device());
  Prepared p("ssd_backward", {q, k, v, dt_raw, dt_bias, A_log, D, or_undefined(initial_state), or_undefined(cu_seqlens),
                              or_undefined(spans)});
  const SsdSizes& s = p.sizes;
  TORCH_CHECK(d_o.sizes() == at::IntArrayRef({s.B, s.T, s.Ho, s.V}), "ssd_backward: d_o is ", d_o.sizes());
  const at::Tensor up = d_o.to(at::kBFloat16).contiguous();
  const at::Tensor up_state =
      or_undefined(d_final_state).defined() ? d_final_state->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor d_q = at::empty_like(p.in.q), d_k = at::empty_like(p.in.k), d_v = at::empty_like(p.in.v),
                   d_dt_raw = at::empty_like(p.in.dt_raw);
  const at::Tensor d_dt_bias = at::empty_like(p.in.dt_bias), d_A_log = at::empty_like(p.in.A_log),
                   d_D = at::empty_like(p.in.D);
  const at::Tensor d_state = p.in.initial_state.defined() ? at::empty_like(p.in.initial_state) : at::Tensor();
  const auto floats = [](const at::Tensor& x) { return static_cast<float*>(cuda::write_or_null(x)); };
  const OryxSsdGradients grad{up.const_data_ptr(),
                              static_cast<const float*>(cuda::read_or_null(up_state)),
                              d_q.mutable_data_ptr(),
                              d_k.mutable_data_ptr(),
                              d_v.mutable_data_ptr(),
                              floats(d_dt_raw),
                              floats(d_dt_bias),
                              floats(d_A_log),
                              floats(d_D),
                              floats(d_state)};
  const at::Tensor workspace = p.workspace(oryx_ssd_backward_workspace(&p.args));
  cuda::check("ssd_backward", oryx_ssd_backward(&p.args, &grad, workspace.mutable_data_ptr(), cuda::stream_of(v)));
  const auto as = [](const at::Tensor& x, const at::Tensor& like) { return x.to(like.scalar_type()); };
  return {d_q,
          d_k,
          d_v,
          as(d_dt_raw, dt_raw),
          as(d_dt_bias, dt_bias),
          as(d_A_log, A_log),
          as(d_D, D),
          d_state.defined() ? as(d_state, *initial_state) : d_state};
}

}  // namespace

TORCH_LIBRARY_IMPL(oryx, CUDA, m) {
  m.impl("ssd", ssd_cuda);
  m.impl("ssd_backward", ssd_backward_cuda);
}

}  // namespace oryx::ops
