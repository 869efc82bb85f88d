#include "oryx/data/bpe/merges.h"

#include <queue>

#include "oryx/common/error.h"
#include "oryx/common/utf8.h"

namespace oryx::bpe {

namespace {

constexpr int64_t kMostIds = int64_t{1} << 24;  // published vocabularies stay below 2^19

// Character -> byte: printable Latin-1 stands for itself, the others for U+0100 and up, in order.
const std::array<int16_t, 0x144>& byte_table() {
  static const auto table = [] {
    std::array<int16_t, 0x144> t;
    t.fill(-1);
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      t[static_cast<size_t>(itself ? b : next++)] = static_cast<int16_t>(b);
    }
    return t;
  }();
  return table;
}

// "a b", or ["a", "b"].
bool read_pair(const nlohmann::json& json, std::string* left, std::string* right) {
  if (json.is_array() && json.size() == 2 && json[0].is_string() && json[1].is_string()) {
    *left = json[0].get<std::string>();
    *right = json[1].get<std::string>();
    return true;
  }
  if (!json.is_string()) return false;
  const auto& text = json.get_ref<const std::string&>();
  const size_t space = text.find(' ');
  if (space == std::string::npos) return false;
  *left = text.substr(0, space);
  *right = text.substr(space + 1);
  return true;
}

}  // namespace

bool bytes_of_characters(std::string_view characters, std::string* bytes) {
  bytes->clear();
  for (size_t i = 0; i < characters.size(); ++i) {
    unsigned c = static_cast<unsigned char>(characters[i]);
    if (c >= 0x80) {  // two bytes reach U+07FF, more than the table holds
      if ((c & 0xE0) != 0xC0 || i + 1 >= characters.size()) return false;
      c = (c & 0x1F) << 6 | (static_cast<unsigned char>(characters[++i]) & 0x3F);
    }
    if (c >= byte_table().size() || byte_table()[c] < 0) return false;
    bytes->push_back(static_cast<char>(byte_table()[c]));
  }
  return true;
}

Merges::Merges(const nlohmann::json& model, const std::string& where) {
  const std::string type = model.is_object() ? model.value("type", "BPE") : "nothing";
  if (type != "BPE" || !model.contains("vocab") || !model["vocab"].is_object() || !model.contains("merges") || !model["merges"].is_array()) {
    fail("{}: model is {}, expected BPE with vocab and merges", where, shown(type));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.contains(key) && model[key].is_string() && !model[key].get_ref<const std::string&>().empty()) fail("{}: model.{} is not read", where, key);
  }
  if (model.contains("dropout") && model["dropout"].is_number() && model["dropout"] != 0.0) fail("{}: model.dropout is not read", where);
  if (model.value("byte_fallback", false)) fail("{}: model.byte_fallback is on, expected byte-level BPE; use the model's tokenizer.model", where);
  whole_first_ = model.value("ignore_merges", false);

  std::unordered_map<std::string, int32_t> by_name;
  std::string bytes;
  for (const auto& [name, value] : model["vocab"].items()) {
    const int64_t id = value.is_number_integer() ? value.get<int64_t>() : -1;
    if (id < 0 || id >= kMostIds) fail("{}: vocab: '{}' has id {}, expected 0 to {}", where, shown(name), shown(value.dump()), kMostIds - 1);
    if (static_cast<size_t>(id) >= tokens_.size()) tokens_.resize(static_cast<size_t>(id) + 1);
    std::string& token = tokens_[static_cast<size_t>(id)];
    if (!token.empty()) fail("{}: vocab: id {} is given twice, the second time to '{}'", where, id, shown(name));
    // Special tokens stand in some vocabularies as plain text.
    token = bytes_of_characters(name, &bytes) ? bytes : name;
    by_name.emplace(name, static_cast<int32_t>(id));
    ids_.emplace(token, static_cast<int32_t>(id));
  }
  for (int b = 0; b < 256; ++b) {
    const auto it = ids_.find(std::string(1, static_cast<char>(b)));
    if (it == ids_.end()) fail("{}: vocab: byte {} has no token; only byte-level BPE is read", where, b);
    bytes_[static_cast<size_t>(b)] = it->second;
  }
  int32_t rank = 0;
  std::string left, right;
  for (const auto& merge : model["merges"]) {
    if (!read_pair(merge, &left, &right)) fail("{}: merges: entry {} is {}, expected two tokens", where, rank, merge.dump().substr(0, 60));
    const auto l = by_name.find(left), r = by_name.find(right), both = by_name.find(left + right);
    if (l == by_name.end() || r == by_name.end() || both == by_name.end()) {
      fail("{}: merges: entry {} joins '{}' and '{}', which the vocabulary lacks", where, rank, shown(left), shown(right));
    }
    merges_.insert_or_assign(key(l->second, r->second), Merge{rank, both->second});
    ++rank;
  }
}

void Merges::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (whole_first_) {
    if (const auto it = ids_.find(std::string(piece)); it != ids_.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // -1: none
  };
  struct Candidate {
    int32_t rank, at;  // of the left symbol
    int32_t left, right, id;
    bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  if (piece.size() > INT32_MAX) fail("a word of {} bytes is too long for the tokeniser, at most {} are allowed; cut the text", piece.size(), INT32_MAX);
  std::vector<Symbol> symbols(piece.size());
  const auto count = static_cast<int32_t>(piece.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[static_cast<size_t>(i)] = {bytes_[static_cast<unsigned char>(piece[static_cast<size_t>(i)])], i - 1, i + 1 < count ? i + 1 : -1};
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](int32_t at) {
    const Symbol& left = symbols[static_cast<size_t>(at)];
    if (left.next < 0) return;
    const int32_t right = symbols[static_cast<size_t>(left.next)].id;
    if (const auto it = merges_.find(key(left.id, right)); it != merges_.end()) queue.push({it->second.rank, at, left.id, right, it->second.id});
  };
  for (int32_t i = 0; i + 1 < count; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(c.at)];
    // Either half may have been merged away since.
    if (left.id != c.left || left.next < 0 || symbols[static_cast<size_t>(left.next)].id != c.right) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    left.id = c.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = c.at;
    if (left.previous >= 0) offer(left.previous);
    offer(c.at);
  }
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbols[static_cast<size_t>(i)].next) ids.push_back(symbols[static_cast<size_t>(i)].id);
}

}  // namespace oryx::bpe
