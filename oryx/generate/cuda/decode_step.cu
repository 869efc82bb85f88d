// The persistent decoding kernel of decode_step.h.
//
// Warp 8 is the producer: it walks through the whole step and copies 16 KB pieces into the ring. Warps 0 to 7 walk through the same pieces and multiply them on the tensor cores, with the
// vector as two columns (its bfloat16 and the rest), so that a full ring is emptied several times faster than memory fills it. The residual stream lies in the registers of
// every multiprocessor, each warp with 256 columns. A layer:
//
//   1  u = norm(x):  k, v, gate, query, beta, decay of the group's head; exchanged within the group
//   2  convolutions, S, readout; in attention mode the head's cached tokens instead of the readout; exchanged within the group
//   3  head norm, gate, the head's columns of W_out: parts of all of x                                                        - all multiprocessors meet
//   4  h = norm(x):  silu(W_gate h) * (W_up h), a sixteenth of them; exchanged within the group
//   5  their columns of W_down: parts of all of x                                                                             - all multiprocessors meet
//
// Sums are in a fixed order or of integers: the same inputs give the same bits.
#include <cfloat>
#include <cstring>

#include "oryx/generate/cuda/decode_step_mix.cuh"
#include "oryx/generate/cuda/decode_step_ring.cuh"
#include "oryx/ops/cuda/tensor_map.h"

namespace oryx::decode_cuda {
namespace {

// Columns of a matrix of column pieces in tiles of 16 that a group has.
template <int kColumns, int kHeads>
struct TileShare {
  int begin, count;
  __device__ explicit TileShare(int group) {
    constexpr int kTiles = kColumns / 16;
    begin = kTiles * group / kHeads, count = kTiles * (group + 1) / kHeads - begin;
  }
};

// How many of the vocabulary's pieces a multiprocessor has: one in every so many.
__device__ __forceinline__ int head_pieces(const OryxDecodeStep& a) {
  return (a.vocab_size / kRows - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
}

template <int kD, int kF>
__device__ void produce(const OryxDecodeStep& a, Shared& s, int head, int rank) {
  constexpr int H = kD / kWidth;
  constexpr int64_t kPiece = kRows * kD * 2, kTileBytes = kD * 32;  // a tile of 16 columns
  Producer out(s);
  const Seen seen(a, __ldcg(a.position));
  const int lane = threadIdx.x & 31;
  // The table of layers goes to shared memory two layers ahead, a word a lane.
  constexpr int kTableWords = sizeof(OryxDecodeLayer) / 8;
  static_assert(kTableWords <= 32 && sizeof(OryxDecodeLayer) % 8 == 0);
  const auto table_word = [&](int l) {
    uint64_t word = 0;
    if (lane < kTableWords && l < a.num_layers) asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(word) : "l"(reinterpret_cast<const uint64_t*>(a.layers + l) + lane));
    return word;
  };
  const auto keep_word = [&](int l, uint64_t word) {
    if (lane < kTableWords) reinterpret_cast<uint64_t*>(s.layers + l % kLayersAhead)[lane] = word;
    __syncwarp();
  };
  uint64_t pending = table_word(2);
  constexpr int kBlocks = H * kGroup;
  const auto columns = [&](const void* w, int tiles, int begin, int count) {
    const char* from = static_cast<const char*>(w);
    const int pairs = tiles / H / 2;  // that everyone has
    for (int i = 0; i < pairs; ++i) out.load(from + static_cast<int64_t>(i * kBlocks + static_cast<int>(blockIdx.x)) * kStageBytes, kStageBytes);
    const int64_t more = (count - 2 * pairs) * (kTileBytes / kGroup);
    out.load_all(from + 2 * pairs * H * kTileBytes + (begin - 2 * pairs * head) * kTileBytes + rank * more, more);
  };
  const auto row_piece = [&](const void* w, int index) { out.load(static_cast<const char*>(w) + index * kPiece, static_cast<int>(kPiece)); };
  for (int l = 0; l < a.num_layers; ++l) {
    if (l > 0) {
      keep_word(l + 1, pending);
      pending = table_word(l + 2);
    }
    const OryxDecodeLayer& layer = s.layers[l % kLayersAhead];
    const bool attention = s.modes[l] != 0;
    for (int section = 0; section < 4; ++section) {
      const int from = section == 3 && attention ? 4 : section;
      for (int i = 0; i < kSliceRows / kRows; ++i) row_piece(layer.w_in, (from * (kSliceRows / kRows) + i) * kBlocks + static_cast<int>(blockIdx.x));
    }
    out.load(layer.S + static_cast<int64_t>(head * kWidth + rank * kSliceRows) * kWidth, kSliceRows * kWidth * 4);
    if (attention) {
      const TokenShare share(seen, rank);
      for (int i = share.begin; i < share.end; ++i) {
        out.box(static_cast<const char*>(a.maps) + (2 * l) * kOryxDecodeMapBytes, head * kWidth, seen.row(seen.first_of(i)));
        out.box(static_cast<const char*>(a.maps) + (2 * l + 1) * kOryxDecodeMapBytes, head * kWidth, seen.row(seen.first_of(i)));
      }
    }
    const TileShare<kD, H> mixed(head);
    columns(layer.w_out, kD / 16, mixed.begin, mixed.count);
    const TileShare<kF, H> mids(head);
    constexpr int kMids = kF / 16 / H;  // pieces that everyone has
    for (int i = 0; i < kMids; ++i) row_piece(layer.w_gate_up, i * kBlocks + static_cast<int>(blockIdx.x));
    if (mids.count > kMids) row_piece(layer.w_gate_up, kMids * kBlocks + (mids.begin - kMids * head) * kGroup + rank);
    columns(layer.w_down, kF / 16, mids.begin, mids.count);
  }
  for (int i = 0; i < head_pieces(a); ++i) row_piece(a.head, i * kBlocks + static_cast<int>(blockIdx.x));
}

template <int kD, int kF>
__device__ void consume(const OryxDecodeStep& a, Shared& s, int head, int rank) {
  constexpr int H = kD / kWidth;
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const Workspace ws = carve<kD>(a.workspace, a.num_layers);
  Consumer in(s);
  const int position = __ldcg(a.position), token = __ldcg(a.token);
  const Seen seen(a, position);
  const int kept_row = seen.row(position);
  Grid grid{ws.arrived, __ldcg(ws.epoch)};
  float x[16], u[16], weight[16], narrow[16];
  uint32_t b[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t two = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(a.embed) + static_cast<int64_t>(token) * kD + first_column() + 64 * (i / 2) + 8 * (i & 1)));
    x[2 * i] = low(two), x[2 * i + 1] = high(two);
  }
  if (blockIdx.x == 0 && t == 0 && a.id_rows != nullptr && position < a.capacity) a.id_rows[kept_row] = token;
  const TileShare<kD, H> mixed(head);
  const TileShare<kF, H> mids(head);
  const int64_t own_rows = static_cast<int64_t>(rank) * (kD / kGroup) + column_row();
  const uint32_t first_number = __ldcg(ws.steps) * static_cast<uint32_t>(a.num_layers) + 1;
  for (int l = 0; l < a.num_layers; ++l) {
    const OryxDecodeLayer& layer = s.layers[l % kLayersAhead];
    const bool attention = s.modes[l] != 0;
    const bool keeps = layer.keys != nullptr && position < a.capacity;
    const uint32_t number = first_number + static_cast<uint32_t>(l);
    // 1: what depends on no activation first
    read_weights(weight, layer.norm1);
    if (warp == rank) read_narrow(layer, narrow, head, H, kD);
    const Ahead ahead = read_ahead(layer, head * kWidth + rank * kSliceRows + ((t >> 2) & 15));
    const float2 o_norm = __ldg(reinterpret_cast<const float2*>(layer.o_norm + rank * kSliceRows + 2 * warp));
    const float A_log = __ldg(layer.A_log + head), dt_bias = __ldg(layer.dt_bias + head);
    if (l > 0) {
      grid.wait();
      add_sums<kD>(x, ws, 2 * l - 1);
    }
    weighted(x, weight, u, b, s);
    row_product(in, 4 * kSliceRows / kRows, b, s.red);
    if (warp == rank) publish_narrow(u, narrow, ws.words, number, rank);
    named_barrier(1, kConsumers);
    float scale = norm_scale<kD>(s, a.norm_eps);
    publish_projected<kD>(layer, s, ws.words, number, ahead, row_total(s.red, t >> 2) * scale, head, rank, kept_row, keeps);
    // 2
    mix<kD>(a, layer, s, ws.words, number, in, head, rank, seen, kept_row, keeps, attention, scale, o_norm, A_log, dt_bias);
    if (blockIdx.x == 0 && t == 0 && layer.mode_rows != nullptr && position < a.capacity) layer.mode_rows[kept_row] = attention ? 1 : 0;
    // 3
    collect<kMixedWords>(ws.words->mixed, kMixedWords, number, s.mixed);
    float part = column_product(in, mixed.count, s.mixed);
    const float2 squares = reinterpret_cast<const float2*>(s.mixed + kWidth)[lane];
    add_part(ws.sums[0] + static_cast<int64_t>(2 * l) * kD + own_rows, part * rsqrtf(warp_sum(squares.x + squares.y) / kWidth + a.head_norm_eps));
    grid.arrive();
    // 4
    read_weights(weight, layer.norm2);
    grid.wait();
    add_sums<kD>(x, ws, 2 * l);
    weighted(x, weight, u, b, s);
    row_product(in, mids.count, b, s.red);
    named_barrier(1, kConsumers);
    scale = norm_scale<kD>(s, a.norm_eps);
    {
      const int own = 2 * mids.count, m = min(t >> 2, own - 1);
      const float gate = row_total(s.red, 2 * m) * scale, up = row_total(s.red, 2 * m + 1) * scale;
      if (t >> 2 < own && (t & 3) == 0) publish(ws.words->mids + rank * own + m, split(silu(gate) * up), number);
    }
    // 5
    collect<kMaxMids>(ws.words->mids, mids.count * 16, number, s.mids);
    part = column_product(in, mids.count, s.mids);
    add_part(ws.sums[0] + static_cast<int64_t>(2 * l + 1) * kD + own_rows, part);
    grid.arrive();
  }
  // The head, and the likeliest token.
  read_weights(weight, a.final_norm);
  grid.wait();
  add_sums<kD>(x, ws, 2 * a.num_layers - 1);
  weighted(x, weight, u, b, s);
  const int pieces = head_pieces(a), below = __ldcg(a.below);
  float best = -FLT_MAX, scale = 0.0f;
  int index = 0x7fffffff;
  const auto better = [&](float y, int id) {
    if (y > best || (y == best && id < index)) best = y, index = id;
  };
  constexpr int kTurn = kMaxPieces / 2;
  for (int begin = 0, turn = 0; begin < pieces; begin += kTurn, turn ^= 1) {  // two halves of the space for sums in turn
    float* red = s.red + turn * kTurn * kRows * kRedStride;
    const int count = min(kTurn, pieces - begin);
    row_product(in, count, b, red);
    named_barrier(1, kConsumers);
    scale = norm_scale<kD>(s, a.norm_eps);
    const int row = min(t >> 2, count * kRows - 1), id = ((begin + row / kRows) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kRows + row % kRows;
    const float y = row_total(red, row) * scale;
    if (t >> 2 < count * kRows && (t & 3) == 0) {
      a.logits[id] = y;
      if (id < below) better(y, id);
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) s.best_value[warp] = best, s.best_index[warp] = index;
  named_barrier(1, kConsumers);
  if (t == 0) {
    for (int w = 1; w < kWarps; ++w) better(s.best_value[w], s.best_index[w]);
    ws.top[blockIdx.x] = make_float2(best, __int_as_float(index));
  }
  grid.meet();
  if (blockIdx.x != 0 || warp != 0) return;
  best = -FLT_MAX, index = 0x7fffffff;
  for (int c = lane; c < static_cast<int>(gridDim.x); c += 32) {
    const float2 top = __ldcg(ws.top + c);
    better(top.x, __float_as_int(top.y));
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) better(__shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, index, d));
  if (lane == 0) {
    *a.likeliest = index;
    if (__ldcg(a.feed_back) != 0) *a.token = index;
    *a.position = position + 1;
    *ws.epoch = grid.target;
    *ws.steps += 1;
  }
}

template <int kD, int kF>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ OryxDecodeStep a) {
  static_assert(kD == kWarps * 256 && kF % 16 == 0 && (kF / 16 + kD / kWidth - 1) / (kD / kWidth) <= kMaxPieces && kMaxPieces * 16 <= kMaxMids);
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 127) & ~static_cast<uintptr_t>(127));
  for (int l = threadIdx.x; l < a.num_layers; l += kThreads) s.modes[l] = static_cast<int8_t>(__ldcg(a.modes + l));
  for (int i = threadIdx.x; i < min(2, a.num_layers) * static_cast<int>(sizeof(OryxDecodeLayer) / 8); i += kThreads) {
    reinterpret_cast<uint64_t*>(s.layers)[i] = __ldg(reinterpret_cast<const unsigned long long*>(a.layers) + i);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(smem_address(s.full + i), 1), barrier_init(smem_address(s.empty + i), kWarps * kWarpArrivals);
    barrier_init_fence();
  }
  __syncthreads();
  const int head = static_cast<int>(blockIdx.x) / kGroup, rank = static_cast<int>(blockIdx.x) % kGroup;
  if (threadIdx.x >= kConsumers) {
    produce<kD, kF>(a, s, head, rank);
    return;
  }
  consume<kD, kF>(a, s, head, rank);
}

constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + 128;

template <int kD, int kF>
int launch(const OryxDecodeStep* step, cudaStream_t stream) {
  if (step->num_layers < 1 || step->num_layers > kMaxLayers || step->vocab_size % kRows != 0) return cudaErrorInvalidValue;
  const auto kernel = decode_step_kernel<kD, kF>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes); e != cudaSuccess) return e;
  void* arguments[] = {const_cast<OryxDecodeStep*>(step)};
  return cudaLaunchCooperativeKernel(kernel, dim3(kD / kWidth * kGroup), dim3(kThreads), arguments, kSharedBytes, stream);
}

int encode_map(void* to, const void* rows, int64_t width, int64_t count) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(count)}, stride[1] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[2] = {kWidth, kTokens};
  alignas(64) CUtensorMap map;
  static_assert(sizeof(map) == kOryxDecodeMapBytes);
  if (const cudaError_t e = ops::cuda::encode_tensor_map(&map, rows, size, stride, box, CU_TENSOR_MAP_SWIZZLE_NONE); e != cudaSuccess) return e;
  memcpy(to, &map, sizeof(map));
  return cudaSuccess;
}

// Whether all multiprocessors that take part are there.
template <int kD>
bool fits() {
  int device = 0, count = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count >= kD / kWidth * kGroup;
}

}  // namespace
}  // namespace oryx::decode_cuda

extern "C" int64_t oryx_decode_workspace(int32_t hidden_size, int32_t num_layers) { return oryx::decode_cuda::workspace_bytes(hidden_size, num_layers); }

extern "C" int oryx_decode_supports(int32_t hidden_size, int32_t num_heads, int32_t intermediate_size) {
  return hidden_size == 2048 && num_heads == 16 && intermediate_size == 5440 && oryx::decode_cuda::fits<2048>();
}

extern "C" int oryx_decode_maps(const OryxDecodeLayer* layers, int32_t num_layers, int32_t hidden_size, int64_t rows, void* to) {
  for (int l = 0; l < num_layers; ++l) {
    char* at = static_cast<char*>(to) + 2 * l * kOryxDecodeMapBytes;
    if (layers[l].keys == nullptr) continue;
    if (const int e = oryx::decode_cuda::encode_map(at, layers[l].keys, hidden_size, rows); e != 0) return e;
    if (const int e = oryx::decode_cuda::encode_map(at + kOryxDecodeMapBytes, layers[l].values, hidden_size, rows); e != 0) return e;
  }
  return 0;
}

extern "C" int oryx_decode_step(const OryxDecodeStep* step, int32_t hidden_size, int32_t intermediate_size, void* stream) {
  if (hidden_size == 2048 && intermediate_size == 5440) return oryx::decode_cuda::launch<2048, 5440>(step, static_cast<cudaStream_t>(stream));
  return cudaErrorInvalidValue;
}
