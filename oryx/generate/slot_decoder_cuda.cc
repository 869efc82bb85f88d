// The decoder of slots on CUDA: over the chain of fused_chain_cuda.h, or, for models that it does not know, that of captured_chain_cuda.h, over a table of places and pages.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/CUDAEvent.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "oryx/common/error.h"
#include "oryx/common/random.h"
#include "oryx/generate/cuda/draw.h"
#include "oryx/generate/capture_graph_cuda.h"
#include "oryx/generate/captured_chain_cuda.h"
#include "oryx/generate/fused_chain_cuda.h"
#include "oryx/generate/fused_decoder.h"
#include "oryx/generate/slot_decoder.h"
#include "oryx/ops/cuda/launch.h"

namespace oryx {
namespace {

using fused::DecodeChain;
using fused::page_entry;
using fused::pages_of_bound;
using fused::pointer;

constexpr int64_t kMost = DecodeChain::kMost;

// What a step reads of its rows, as it lies in one piece of memory: it is copied to the device at once.
struct Control {
  OryxDrawRow draws[kMost];
  int32_t tokens[kMost], positions[kMost], lengths[kMost], places[kMost], below[kMost];
  int32_t active[4];
  // Then modes [layers, N].
};

// `Chain`: DecodeChain or captured::Chain.
template <typename Chain>
class CudaSlotDecoder : public SlotDecoder {
 public:
  explicit CudaSlotDecoder(const LanguageModel& model) : model_(model), layers_(model.config().num_layers), vocab_(model.config().vocab_size), chain_(model, kMost) {
    control_ = at::zeros({static_cast<int64_t>(sizeof(Control)) + chain_.mode_bytes(kMost)}, bytes());
  }

  void attach(State& slots) override {
    const c10::cuda::CUDAGuard guard(model_.device());
    state_ = &slots;
    given_ = at::zeros({slots.sequences()}, bytes().dtype(at::kInt));
    graphs_.clear(), table_rows_.clear();
    slots_.clear(), paged_ = false;
    for (int64_t i = 0; i < layers_; ++i) {
      slots_.push_back(chain_.slots_of(slots.layer(i), i, [&](const std::string& name) { return slots.row_memory(i, name); }));
      paged_ |= slots_.back().keeps_rows();
    }
    if (slots.layer(layers_).has("ids")) id_rows_ = slots.row_memory(layers_, "ids");
    grow(1);
  }

  Pending step(std::span<const Row> rows) override {
    const at::NoGradGuard no_grad;
    const c10::cuda::CUDAGuard guard(model_.device());
    TORCH_CHECK(state_ != nullptr, "slot decoder: no state is attached");
    std::vector<int64_t> counts(static_cast<size_t>(state_->sequences()), 0);
    int64_t longest = 0;
    for (const Row& row : rows) {
      if (row.id < kGiven || row.id >= vocab_) {
        fail("token id {} is outside of the model's vocabulary of {}; was the text encoded with another tokeniser?", row.id, vocab_);
      }
      TORCH_CHECK(++counts.at(static_cast<size_t>(row.slot)) == 1, "slot decoder: slot ", row.slot, " twice in a step");
      longest = std::max(longest, state_->lengths()[static_cast<size_t>(row.slot)] + 1);
    }
    state_->prepare(counts);
    if (longest > capacity_) grow(longest);
    const at::Tensor given = pinned(given_.sizes(), at::kInt);
    std::vector<at::Tensor> logits(rows.size());
    for (size_t begin = 0; begin < rows.size(); begin += kMost) {
      const auto part = rows.subspan(begin, std::min(rows.size() - begin, static_cast<size_t>(kMost)));
      launch(part);
      copy_logits(part, std::span(logits).subspan(begin, part.size()));
    }
    given.copy_(given_, /*non_blocking=*/true);
    auto done = std::make_shared<at::cuda::CUDAEvent>();
    done->record();
    state_->advance(counts);
    std::vector<int64_t> places;
    for (const Row& row : rows) places.push_back(row.slot);
    return [done, given, places, logits = std::move(logits)] {
      done->synchronize();
      Results out;
      for (const int64_t place : places) out.tokens.push_back(given.const_data_ptr<int32_t>()[place]);
      out.logits = logits;
      return out;
    };
  }

 private:
  using Slots = typename Chain::Slots;

  at::TensorOptions bytes() const { return at::device(model_.device()).dtype(at::kByte); }
  static at::Tensor pinned(at::IntArrayRef shape, at::ScalarType dtype) { return at::empty(shape, at::device(at::kCPU).dtype(dtype).pinned_memory(true)); }

  // Room for sequences of so many tokens: the table of pages and that of angles. Captures that know the old ones go.
  void grow(int64_t tokens) {
    const int64_t page = state_->options().page_tokens;
    int64_t capacity = 64 * page;
    while (capacity < tokens) capacity *= 2;
    OryxBatchPlaces pages = pages_of_bound(*state_);
    if (pages.lasting == 0) pages.page = page, pages.most_blocks = capacity / page;
    cudaDeviceSynchronize();
    graphs_.clear(), table_rows_.clear();
    // Nothing is promised before both are there.
    const at::Tensor table = at::zeros({kMost, pages.most_blocks}, bytes().dtype(at::kInt));
    chain_.reach(capacity);
    table_ = table, pages_ = pages, capacity_ = capacity;
  }

  // The smallest batch that has a capture of its own: what products cost goes by eights that double.
  static int64_t bucket(size_t rows) { return 8 * oryx_product_tiles(static_cast<int64_t>(rows)); }

  void launch(std::span<const Row> rows) {
    const int64_t N = bucket(rows.size());
    const at::Tensor host = pinned(control_.sizes(), at::kByte);
    auto* memory = host.mutable_data_ptr<uint8_t>();
    std::memset(memory, 0, static_cast<size_t>(host.numel()));
    auto& c = *reinterpret_cast<Control*>(memory);
    uint8_t* modes = memory + sizeof(Control);
    bool attention = false, draws = false;
    for (size_t n = 0; n < rows.size(); ++n) {
      const Row& row = rows[n];
      const auto held = static_cast<int32_t>(state_->lengths()[static_cast<size_t>(row.slot)]);
      c.tokens[n] = row.id, c.positions[n] = held, c.lengths[n] = held + 1, c.places[n] = static_cast<int32_t>(row.slot);
      c.below[n] = static_cast<int32_t>(row.below > 0 ? std::min(row.below, vocab_) : vocab_);
      if (const SamplingOptions* o = row.sampling; o != nullptr && o->temperature > 0) {
        draws = true;
        c.draws[n] = {o->temperature, o->top_p, o->min_p, CounterRng(static_cast<uint64_t>(o->seed), static_cast<uint64_t>(held) + 1).uniform(), o->top_k};
      }
      for (int64_t i = 0; i < layers_; ++i) {
        const bool looks_back = chain_.write_modes(modes, N, i, static_cast<int64_t>(n), row.modes[i]);
        TORCH_CHECK(!looks_back || slots_[static_cast<size_t>(i)].keeps_rows(), "slot decoder: mode ", int{row.modes[i]}, " in layer ", i);
        attention |= looks_back;
      }
    }
    c.active[0] = static_cast<int32_t>(rows.size());
    control_.copy_(host, /*non_blocking=*/true);
    if (paged_) place_pages(rows);
    auto& graph = graphs_[{N, attention}];
    if (graph == nullptr) graph = capture(N, attention);
    graph->replay();
    if (draws) draw(static_cast<int64_t>(rows.size()));
  }

  void draw(int64_t N) {
    const at::Tensor logits = chain_.logits(N);
    const int64_t vocab = logits.stride(0);  // a row's length, a little more than the vocabulary; no more than `below` of it is looked at
    if (!weights_.defined()) weights_ = at::empty({kMost, vocab}, bytes().dtype(at::kFloat));
    const auto* c = reinterpret_cast<const Control*>(control_.const_data_ptr<uint8_t>());
    const OryxDraw a{logits.const_data_ptr(), c->draws, c->below, c->places, pointer<int32_t>(given_), pointer<float>(weights_), N, vocab};
    ops::cuda::check("oryx_draw", oryx_draw(&a, ops::cuda::stream_of(weights_)));
  }

  void place_pages(std::span<const Row> rows) {
    std::vector<int64_t> now{state_->pages_version()};
    for (const Row& row : rows) now.push_back(row.slot);
    if (now == table_rows_) return;
    const at::Tensor host = pinned({static_cast<int64_t>(rows.size()), pages_.most_blocks}, at::kInt);
    auto* to = host.mutable_data_ptr<int32_t>();
    for (const Row& row : rows) {
      std::fill(to, to + pages_.most_blocks, 0);
      for (const RowStore::NumberedPage& page : state_->numbered_pages(row.slot)) {
        const int64_t entry = page_entry(pages_, page.index);
        if (entry < pages_.most_blocks) to[entry] = page.number;  // what is reserved beyond the table is not read before it has grown
      }
      to += pages_.most_blocks;
    }
    table_.narrow(0, 0, static_cast<int64_t>(rows.size())).copy_(host, /*non_blocking=*/true);
    table_rows_ = std::move(now);
  }

  fused::ChainStep<Slots> chain_step(int64_t N) const {
    auto* memory = control_.mutable_data_ptr<uint8_t>();
    auto* c = reinterpret_cast<Control*>(memory);
    fused::ChainStep<Slots> s;
    s.N = N, s.capacity = capacity_, s.slots = &slots_, s.id_rows = id_rows_;
    s.tokens = c->tokens, s.positions = c->positions, s.lengths = c->lengths, s.likeliest = pointer<int32_t>(given_), s.below = c->below;
    s.modes = memory + sizeof(Control);
    s.places = pages_, s.bound = state_->options().bound;
    s.places.active = c->active, s.places.places = c->places, s.places.blocks = paged_ ? pointer<int32_t>(table_) : nullptr;
    return s;
  }

  std::unique_ptr<ops::cuda::CapturedGraph> capture(int64_t N, bool attention) {
    const auto s = chain_step(N);
    if (attention) chain_.allocate(chain_step(kMost));  // once, for all sizes: others' captures know its place
    return fused::capture_graph(model_.device(), [&] { chain_.launch(s, attention); });
  }

  void copy_logits(std::span<const Row> rows, std::span<at::Tensor> to) const {
    const auto wanted = std::count_if(rows.begin(), rows.end(), [](const Row& row) { return row.logits; });
    if (wanted == 0) return;
    const at::Tensor all = chain_.logits(static_cast<int64_t>(rows.size())), host = pinned({wanted, vocab_}, all.scalar_type());
    const bool whole = wanted == static_cast<int64_t>(rows.size());
    if (whole) host.copy_(all, /*non_blocking=*/true);
    int64_t next = 0;
    for (size_t n = 0; n < rows.size(); ++n) {
      if (!rows[n].logits) continue;
      to[n] = host[next++];
      if (!whole) to[n].copy_(all[static_cast<int64_t>(n)], /*non_blocking=*/true);
    }
  }

  const LanguageModel& model_;
  int64_t layers_, vocab_;
  Chain chain_;
  std::vector<Slots> slots_;
  State* state_ = nullptr;
  bool paged_ = false;
  int64_t capacity_ = 0;
  OryxBatchPlaces pages_ = {};  // how the table is laid out
  at::Tensor control_, given_, weights_, table_, id_rows_;
  std::vector<int64_t> table_rows_;  // what the table of pages was made for
  std::map<std::pair<int64_t, bool>, std::unique_ptr<ops::cuda::CapturedGraph>> graphs_;  // by rows and whether anybody attends
};

std::unique_ptr<SlotDecoder> make_cuda_slot_decoder(const LanguageModel& model, const StateOptions& state, std::string* why) {
  *why = fused::device_refusal(model.device());
  if (!why->empty()) return nullptr;
  if (detail::fused_refusal(model, state).empty() && DecodeChain::refusal(model).empty()) return std::make_unique<CudaSlotDecoder<DecodeChain>>(model);
  *why = captured::refusal(model);
  if (!why->empty()) return nullptr;
  return std::make_unique<CudaSlotDecoder<captured::Chain>>(model);
}

const bool registered = detail::register_slot_decoder(make_cuda_slot_decoder);

}  // namespace
}  // namespace oryx
