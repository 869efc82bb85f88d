// The second half of byte-level BPE (Sennrich et al. 2016): merges within a piece, lowest rank first, leftmost among equals.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace oryx::bpe {

class Merges {
 public:
  // The "model" of a tokenizer.json of type BPE. Throws Error with `where` in front on what is not byte-level BPE, on a merge of unknown tokens,
  // and on an id that is out of bounds or given twice.
  Merges(const nlohmann::json& model, const std::string& where);

  // Appends the ids of one piece of raw bytes.
  void encode(std::string_view piece, std::vector<int32_t>& ids) const;
  // id -> the bytes it stands for; absent ids are "".
  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  struct Merge {
    int32_t rank, id;
  };
  static uint64_t key(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;  // bytes -> id
  std::unordered_map<uint64_t, Merge> merges_;
  std::array<int32_t, 256> bytes_{};  // id of each single byte
  bool whole_first_ = false;          // a piece that is a token is not merged at all ("ignore_merges")
};

// The bytes behind the printable characters that tokenizer.json writes them as (GPT-2's table); false on any other character.
bool bytes_of_characters(std::string_view characters, std::string* bytes);

}  // namespace oryx::bpe
