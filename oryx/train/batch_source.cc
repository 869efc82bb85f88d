#include "oryx/train/batch_source.h"

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "oryx/common/error.h"

namespace oryx {

TrainBatch TextBatches::next() {
  const Batch b = loader_.next();
  TrainBatch out;
  out.input_ids = b.input_ids.view({1, -1});
  out.targets = b.targets.view({1, -1});
  out.cu_seqlens = b.cu_seqlens;
  out.pieces = packed_pieces(b.cu_seqlens, {});
  return out;
}

Json TextBatches::position() const { return Json(nlohmann::json(loader_.position())); }

void TextBatches::seek(const Json& position) { loader_.seek(nlohmann::json(position).get<LoaderPosition>()); }

TrainBatch RecallBatches::next() {
  const RecallBatch b = recall_batch(options_, seed_, index_, batch_size_);
  index_ += static_cast<uint64_t>(batch_size_);
  ModeContext context;
  context.prompt_length = b.input_ids.size(1);
  return {b.input_ids, b.targets, {}, row_pieces(b.input_ids.size(0), b.input_ids.size(1), context)};
}

void RecallBatches::seek(const Json& position) {
  if (!position.contains("index") || !position["index"].is_number_unsigned()) fail("the data position {} is not one of associative recall", position.dump());
  index_ = position["index"].get<uint64_t>();
}

}  // namespace oryx
