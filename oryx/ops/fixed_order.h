// libtorch's operators choose by a flag of the process between adding in a fixed order and adding as it comes.
#pragma once

#include <ATen/Context.h>

namespace oryx::ops {

// Within its life libtorch adds in a fixed order, and refuses, in every thread, what it has no fixed order for: held around a single operator.
class FixedOrder {
 public:
  FixedOrder() { context_.setDeterministicFillUninitializedMemory(false), context_.setDeterministicAlgorithms(true, false); }
  FixedOrder(const FixedOrder&) = delete;
  FixedOrder& operator=(const FixedOrder&) = delete;
  ~FixedOrder() { context_.setDeterministicAlgorithms(on_, warns_), context_.setDeterministicFillUninitializedMemory(fills_); }

 private:
  at::Context& context_ = at::globalContext();
  const bool on_ = context_.deterministicAlgorithms(), warns_ = context_.deterministicAlgorithmsWarnOnly(), fills_ = context_.deterministicFillUninitializedMemory();
};

}  // namespace oryx::ops
