#include "oryx/serve/prefix_tree.h"

namespace oryx::serve {

PrefixTree::Node* PrefixTree::find(const Keys& keys) {
  Node *at = &root_, *best = nullptr;
  for (const std::string& key : keys) {
    const auto it = at->children.find(key);
    if (it == at->children.end()) break;
    at = it->second.get();
    if (at->state) best = at;
  }
  if (best != nullptr) used_.splice(used_.end(), used_, best->place);
  return best;
}

bool PrefixTree::holds(const Keys& keys, size_t chunks) const {
  const Node* at = &root_;
  for (size_t i = 0; i < chunks; ++i) {
    const auto it = at->children.find(keys[i]);
    if (it == at->children.end()) return false;
    at = it->second.get();
  }
  return at->state.has_value();
}

void PrefixTree::keep(const Keys& keys, size_t chunks, State state) {
  Node* at = &root_;
  for (size_t i = 0; i < chunks; ++i) {
    auto& child = at->children[keys[i]];
    if (child == nullptr) {
      child = std::make_unique<Node>();
      child->parent = at;
      child->key = keys[i];
      child->chunks = at->chunks + 1;
    }
    at = child.get();
  }
  if (at->state) used_.erase(at->place);
  at->state.emplace(std::move(state));
  at->place = used_.insert(used_.end(), at);
}

State PrefixTree::take(Node* node) {
  State state = std::move(*node->state);
  used_.erase(node->place);
  node->state.reset();
  prune(node);
  return state;
}

bool PrefixTree::drop_one(const Node* spared) {
  for (Node* node : used_) {
    if (node == spared) continue;
    (void)take(node);
    return true;
  }
  return false;
}

// Removes nodes that lead nowhere.
void PrefixTree::prune(Node* node) {
  while (node != &root_ && !node->state && node->children.empty()) {
    Node* parent = node->parent;
    const std::string key = node->key;  // erase() destroys it
    parent->children.erase(key);
    node = parent;
  }
}

}  // namespace oryx::serve
