// Schedules of all layers: one text for every layer, or the JSON form
//
//     {"layers": {"0-3": "attention", "7": "linear", "*": "linear,attention@-256:"}}
//
// where a key is a layer, a range of layers (both ends included), several of these separated by commas, or "*" for the
// rest.
#pragma once

#include <string>
#include <vector>

#include "oryx/common/json.h"
#include "oryx/modes/schedule.h"

namespace oryx {

// One schedule a layer; layer_mixers[i] are layer i's mixers. `json` is an object as above, or a string: a schedule for
// every layer, or such an object's text (it starts with '{'). A layer with a single mixer has nothing to choose from:
// it takes the names of the other layers' mixers too.
std::vector<Schedule> parse_layer_schedules(const Json& json,
                                            const std::vector<std::vector<std::string>>& layer_mixers, const OpenHead& open = {});

}  // namespace oryx
