// Vector kernels of softmax attention (forward, backward, decode). No torch headers: pointers and strides (in
// elements).
//
// A *tile* is up to max_lanes() queries of one sequence and one key head, each with its own range of visible keys;
// vector lanes run over the queries, so that maxima, sums and masks need no reduction across a vector and keys and
// values are read as they lie in memory. Scores are kept in units of log 2: the queries are scaled by scale * log2(e)
// when they are loaded.
#pragma once

#include <cstdint>

namespace oryx::ops::attention_cpu {

enum class Element { kFloat32, kBFloat16 };

struct Lane {
  int64_t row;         // of q [rows, K], o [rows, V], lse [rows]
  int64_t begin, end;  // visible keys; begin < end
};

struct Widths {
  int64_t key, value;                // K and V
  int64_t key_stride, value_stride;  // between keys (values) of one head
  float scale;
};

int64_t max_lanes();
// Width of a row of the gradient buffers: K (or V) rounded up to whole vectors.
int64_t padded(int64_t width);
// Floats of scratch (64-byte aligned) that the tile functions need.
int64_t forward_scratch(int64_t key_width, int64_t value_width);
int64_t backward_scratch(int64_t key_width, int64_t value_width);

// o rows and, if lse is not null, log2 of the softmax denominators. Lanes rise in begin and in end.
void forward_tile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                  const void* v, void* o, float* lse, float* scratch);

// Writes the dq rows (float32 [rows, K]) and adds to dk / ln 2 [keys, padded(K)] and dv [keys, padded(V)]: finish dk
// with finish_gradient.
void backward_tile(Element element, const Widths& w, const Lane* lanes, int64_t n, const void* q, const void* k,
                   const void* v, const void* o, const void* d_o, const float* lse, float* dq, float* dk, float* dv,
                   float* scratch);

constexpr float kLn2 = 0.693147180559945309417f;

// Decode: one query of every head of one sequence over a list of keys, all heads together, so that keys and values
// stream as they lie: rows of Hk heads, each row wherever it stands. q is float32 [Hq, K], already times scale *
// log2(e). Partial results: max [Hq], sum [Hq], acc [Hq, V]. Several queries of one sequence, each over the first so
// many of the keys, read (and rotate) them once, and each gets the bits that it gets alone.
struct DecodeShape {
  int64_t query_heads, key_heads, key, value;
  int64_t key_head_stride, value_head_stride;  // within a row, in elements
  // Keys that were kept before RoPE are rotated as they are read: row p of cosine and sine [positions, half] is position
  // p's. Null: they are taken as they are.
  const float *cosine, *sine;
  int64_t half;
  // And before that normalised, where there is a factor: k * norm / rms(k), by head [K], or over all heads [Hk, K].
  const float* norm;
  float norm_eps;
  bool norm_over_heads;
};
struct DecodeKeys {
  const void* const* keys;    // [count] rows
  const void* const* values;  // [count] rows
  const int32_t* positions;   // [count]; where keys are rotated
  int64_t count;
};
struct DecodeQuery {
  const float* q;
  float *max, *sum, *acc;
  int64_t keys;  // it sees the first so many, one at least
};
// `queries` rise in the keys that they see, the last one sees all.
int64_t decode_scratch(const DecodeShape& s, int64_t queries);
void decode_part(Element element, const DecodeShape& s, const DecodeQuery* queries, int64_t count, const DecodeKeys& keys, float* scratch);
// Merges the parts [parts, ...] in order into o [Hq, V] and lse [Hq] (log2; may be null).
void decode_merge(const DecodeShape& s, int64_t parts, const float* max, const float* sum, const float* acc, float* o,
                  float* lse);

}  // namespace oryx::ops::attention_cpu
