#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <filesystem>

#include "oryx/data/tokenizer.h"
#include "oryx/model/checkpoint.h"

namespace oryx::test {

// Texts of such a random model do not end by themselves, and no line of theirs does, where tokens are chosen among the likeliest (--top-k 3, --temperature 0): the
// end's and the newline's embeddings, which are their weights in the logits too, are next to nothing.
inline void make_endless(LanguageModel& model) {
  const at::NoGradGuard no_grad;
  for (const int64_t id : {int64_t{'\n'}, int64_t{make_byte_tokenizer()->eos_id()}}) {
    at::Tensor row = model.parameter("embed.weight")[id];
    row.mul_(0.01);
  }
}

// Writes a model of preset `tiny` for the byte tokeniser (--tokenizer byte) to the folder `path`; its texts are endless.
inline void save_byte_model(const std::filesystem::path& path, uint64_t seed = 1) {
  ModelConfig c = preset("tiny");
  c.vocab_size = make_byte_tokenizer()->vocab_size();
  LanguageModel model(c);
  model.initialize(seed);
  make_endless(model);
  save_model(model, path);
}

}  // namespace oryx::test
