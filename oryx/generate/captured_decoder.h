// Captured decoding: the FusedDecoder of every model that the fused kernels do not know (docs/generation.md, docs/decisions/0018-captured-decoding.md). make_fused_decoder() asks it
// where those refuse.
#pragma once

#include "oryx/generate/fused_decoder.h"

namespace oryx::detail {

bool register_captured_decoder(FusedDecoderFactory factory);

}  // namespace oryx::detail
