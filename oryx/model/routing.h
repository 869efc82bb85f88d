// Which mixer each token of a batch takes, in the forms that a layer needs: spans for the operators, indices for projections.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace oryx {

// The tokens of a batch that one mixer answers for.
struct TokenSet {
  bool all = true;
  int64_t count = 0;                // tokens
  std::optional<at::Tensor> spans;  // [n, 3] int32 (row, begin, end); absent: all
  at::Tensor index;                 // [count] int64 into the flat [B * T] tokens; undefined: all, or see mask
  at::Tensor mask;                  // [B, T] bool: true at the set's tokens; in place of index where the number of tokens is the device's alone (a captured step)
};

struct RoutedSpan {
  int32_t row, begin, end;  // tokens [begin, end) of batch row `row`
  int32_t mixer;            // index into the routing's mixer names
};

class Routing {
 public:
  // Every token in one mixer.
  Routing(int64_t B, int64_t T, const std::string& mixer);
  // `spans` cover every token of every row exactly once, sorted by (row, begin).
  Routing(int64_t B, int64_t T, std::vector<std::string> mixers, std::vector<RoutedSpan> spans);

  // A routing of which only token sets are known, and those on one device alone: by the layers' mixers, a set for each of them. tokens() gives them; nothing else of it
  // may be asked for but rows() and length().
  using LayerSets = std::map<std::vector<std::string>, std::vector<TokenSet>>;
  Routing(int64_t B, int64_t T, LayerSets sets, at::Device device);

  // What mixer `m` of a layer with these mixers answers for. A token whose mixer the layer lacks goes to the layer's first.
  // Spans and index stand on `device`.
  const TokenSet& tokens(const std::vector<std::string>& layer_mixers, size_t m, at::Device device = at::kCPU) const;
  // The place of each token's mixer in such a layer's list: [B, T] int8 on `device`.
  const at::Tensor& places(const std::vector<std::string>& layer_mixers, at::Device device = at::kCPU) const;
  // Share of the batch's tokens that the schedule puts in `mixer`.
  double share(const std::string& mixer) const;
  int64_t rows() const { return B_; }
  int64_t length() const { return T_; }
  const std::vector<std::string>& mixers() const { return mixers_; }
  const std::vector<RoutedSpan>& spans() const { return spans_; }

 private:
  std::vector<TokenSet> split(const std::vector<std::string>& layer_mixers) const;

  int64_t B_, T_;
  std::vector<std::string> mixers_;
  std::vector<RoutedSpan> spans_;
  // Layers of one kind share their token sets.
  mutable std::map<std::pair<std::string, std::vector<std::string>>, std::vector<TokenSet>> cache_;
  mutable std::map<std::pair<std::string, std::vector<std::string>>, at::Tensor> places_;
};

}  // namespace oryx
