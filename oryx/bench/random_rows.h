// A state as long as one wants, without a model's having read it.
#pragma once

#include <cstdint>

#include "oryx/model/language_model.h"

namespace oryx {

// Random rows for every sequence, up to `length` tokens: what they hold changes no time.
void fill_rows(const LanguageModel& model, State& state, int64_t length);

}  // namespace oryx
