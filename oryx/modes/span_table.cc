#include "oryx/modes/span_table.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

namespace oryx {

std::vector<ModePiece> row_pieces(int64_t rows, int64_t tokens, ModeContext context) {
  context.prompt_length = tokens;
  std::vector<ModePiece> pieces;
  for (int64_t row = 0; row < rows; ++row) {
    pieces.push_back({row, 0, tokens, 0, context});
    ++context.sequence;
  }
  return pieces;
}

std::vector<ModePiece> packed_pieces(const at::Tensor& cu_seqlens, ModeContext context) {
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 && cu_seqlens.device().is_cpu(),
              "packed_pieces: cu_seqlens is ", cu_seqlens.sizes(), " on ", cu_seqlens.device(),
              ", expected [N + 1] on the CPU");
  const at::Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* b = bounds.const_data_ptr<int64_t>();
  std::vector<ModePiece> pieces;
  for (int64_t i = 0; i + 1 < bounds.numel(); ++i) {
    context.prompt_length = b[i + 1] - b[i];
    pieces.push_back({0, b[i], b[i + 1] - b[i], 0, context});
    ++context.sequence;
  }
  return pieces;
}

SpanTable SpanTable::build(const Schedule& schedule, const std::vector<ModePiece>& pieces, int64_t rows,
                           int64_t tokens) {
  const size_t mixers = schedule.mixers().size();
  SpanTable table;
  table.counts_.assign(mixers, 0);
  table.modes_ = at::full({rows, tokens}, -1, at::kInt);
  int32_t* modes = table.modes_.mutable_data_ptr<int32_t>();
  std::vector<std::vector<std::array<int32_t, 3>>> found(mixers);
  for (const ModePiece& p : pieces) {
    TORCH_CHECK(0 <= p.row && p.row < rows && 0 <= p.column && 0 <= p.length && p.column + p.length <= tokens,
                "SpanTable: a piece of ", p.length, " tokens at row ", p.row, ", column ", p.column, " of [", rows,
                ", ", tokens, "]");
    const int64_t shift = p.column - p.start;
    for (const ModeSpan& s : schedule.resolve(p.context, p.start, p.start + p.length)) {
      const int64_t begin = s.begin + shift, end = s.end + shift;
      int32_t* row = modes + p.row * tokens;
      TORCH_CHECK(std::all_of(row + begin, row + end, [](int32_t m) { return m < 0; }),
                  "SpanTable: pieces overlap in row ", p.row);
      std::fill(row + begin, row + end, s.mixer);
      const auto m = static_cast<size_t>(s.mixer);
      found[m].push_back({static_cast<int32_t>(p.row), static_cast<int32_t>(begin), static_cast<int32_t>(end)});
      table.counts_[m] += end - begin;
    }
    table.total_ += p.length;
  }
  for (auto& spans : found) {
    std::sort(spans.begin(), spans.end());
    at::Tensor t = at::empty({static_cast<int64_t>(spans.size()), 3}, at::kInt);
    int32_t* out = t.mutable_data_ptr<int32_t>();
    for (const auto& s : spans) out = std::copy(s.begin(), s.end(), out);
    table.spans_.push_back(std::move(t));
  }
  return table;
}

}  // namespace oryx
