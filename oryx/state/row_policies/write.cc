// write: tokens that change the layer's recurrent states most. A token that the state predicts well changes little under the delta rule, and so does one whose value or write strength
// is small: which the relative error of `surprise` does not see (TokenMeasure::kWrite).
#include "oryx/state/row_policy.h"

namespace oryx {

ORYX_ROW_POLICY(write, "tokens that change the recurrent state most", TokenMeasure::kWrite, score_as_measured);

}  // namespace oryx
