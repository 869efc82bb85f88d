// The name of the instruction set that the vector kernels of this machine are dispatched to.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "oryx/ops/selftest/target_kernels.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace oryx::ops::HWY_NAMESPACE {
const char* target_name() { return hwy::TargetName(HWY_TARGET); }
}  // namespace oryx::ops::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <string>

namespace oryx::ops {
HWY_EXPORT(target_name);
std::string cpu_target();
std::string cpu_target() { return HWY_DYNAMIC_DISPATCH(target_name)(); }
}  // namespace oryx::ops
#endif
