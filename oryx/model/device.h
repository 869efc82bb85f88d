// The device that a user names.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace oryx {

// "cpu", "cuda" (the first GPU) or "cuda:N". Throws Error for anything else, and where this build or machine lacks it.
at::Device parse_device(const std::string& text);

}  // namespace oryx
