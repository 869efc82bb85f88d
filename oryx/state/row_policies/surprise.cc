// surprise: tokens whose value the layer's linear mixers predicted worst from what they had read before, relative to the value (TokenMeasure::kSurprise).
#include "oryx/state/row_policy.h"

namespace oryx {

namespace {

float score_by_surprise(const RowToken& token) { return token.measured; }

}  // namespace

ORYX_ROW_POLICY(surprise, "tokens whose value the recurrent state predicts worst, relative to the value", TokenMeasure::kSurprise, score_by_surprise);

}  // namespace oryx
