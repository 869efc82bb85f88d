// Drawing a token from each row of logits on the device (draw.cu): the C interface. What is drawn is what sample_token (oryx/generate/sampling.h) draws, but for weights that are
// rounded to float32 and summed in another order: another token only where the uniform number lies within that rounding of a border.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  double temperature;      // 0: nothing is drawn for the row
  double top_p, min_p, uniform;
  int64_t top_k;           // 0: all
} OryxDrawRow;

typedef struct {
  const void* logits;      // bfloat16 [N, vocab]
  const OryxDrawRow* rows; // [N]
  const int32_t* below;    // [N] so many of a row's logits count
  const int32_t* places;   // [N]
  int32_t* likeliest;      // by place: the id of the first highest logit, which gives way to what is drawn; below 0: nothing is
  float* weights;          // [N, vocab] workspace
  int64_t N, vocab;
} OryxDraw;
int oryx_draw(const OryxDraw* a, void* stream);

#ifdef __cplusplus
}
#endif
