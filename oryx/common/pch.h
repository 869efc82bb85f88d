// The precompiled header: what nearly every file needs and is slow to read. Nothing may rely on it being there;
// each file still includes what it uses. What few files need stays out: GCC instantiates the pending templates of this header in every file that reads
// it (torch/library.h and autograd's custom_function.h alone would add 1.3 s to each).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>
