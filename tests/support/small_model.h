#pragma once

#include "oryx/model/config.h"

namespace oryx::test {

// A model of one layer that is made, written and read in milliseconds.
inline ModelConfig small_model() {
  ModelConfig c;
  c.vocab_size = 40;
  c.num_layers = 1;
  c.layer.hidden_size = 32;
  c.layer.head_dim = 8;
  c.layer.intermediate_size = 48;
  return c;
}

}  // namespace oryx::test
