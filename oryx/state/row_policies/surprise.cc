// surprise: tokens whose value the layer's linear mixers predicted worst from what they had read before, relative to the value (TokenMeasure::kSurprise).
#include "oryx/state/row_policy.h"

namespace oryx {

ORYX_ROW_POLICY(surprise, "tokens whose value the recurrent state predicts worst, relative to the value", TokenMeasure::kSurprise, score_as_measured);

}  // namespace oryx
