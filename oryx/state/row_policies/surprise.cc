// surprise: tokens whose value the layer's linear mixers predicted worst from what they had read before, the mean over these mixers (Mixer::surprise).
#include "oryx/state/row_policy.h"

namespace oryx {

namespace {

float score_by_surprise(const RowToken& token) { return token.surprise; }

}  // namespace

ORYX_ROW_POLICY(surprise, "tokens whose value the recurrent state predicts worst", true, score_by_surprise);

}  // namespace oryx
