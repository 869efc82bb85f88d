#include "oryx/train/step_graph.h"

#include "oryx/common/error.h"

namespace oryx {

namespace {

// Filled by a static initialiser of a build with CUDA, read-only afterwards.
detail::StepGraphsFactory& step_graphs_factory() {
  static detail::StepGraphsFactory f = nullptr;
  return f;
}

// Why a layer's pass asks the host; empty when it does not (docs/cuda.md, "What runs by which code").
std::string host_work_of(const MultiMixerLayer& layer) {
  const LayerConfig& c = layer.config();
  for (const std::string& name : layer.mixer_names()) {
    if (name == "gated_delta_net" || name == "kimi_delta_attention" || name == "mamba2" || name == "attention" || name == "sliding_window") continue;
    return fmt::format("mixer {} has no CUDA kernels", name);
  }
  if ((c.head_dim != 64 && c.head_dim != 128) || c.value_dim() != c.head_dim) {
    return fmt::format("heads of {} keys and {} values, expected 64 or 128 of both", c.head_dim, c.value_dim());
  }
  return {};
}

std::string why_not_captured(const LanguageModel& model) {
  if (model.device().is_cpu()) return "the model is on the CPU";
  if (model.compute_dtype() != at::kBFloat16) return "activations are float32 (precision=bfloat16)";
  for (int64_t i = 0; i < model.config().num_layers; ++i) {
    if (const std::string why = host_work_of(model.layer(i)); !why.empty()) return fmt::format("layer {}: {}", i, why);
  }
  return {};
}

}  // namespace

bool detail::register_step_graphs(StepGraphsFactory f) {
  step_graphs_factory() = f;
  return true;
}

std::unique_ptr<StepGraphs> make_step_graphs(LanguageModel& model, Optimizer& optimizer, const StepOptions& options, CaptureWhere where, std::string* why) {
  std::string reason = why_not_captured(model);
  if (reason.empty() && step_graphs_factory() == nullptr) reason = "this build has no CUDA";
  if (reason.empty()) {
    if (auto graphs = step_graphs_factory()(model, optimizer, options, where, &reason)) return graphs;
  }
  if (why != nullptr) *why = reason;
  return nullptr;
}

}  // namespace oryx
