// States of prompts' beginnings, kept for prompts that begin alike.
//
// A kept state is a fork (oryx/state/state.h) of a running prompt's at a multiple of `every` tokens: its recurrent
// slots are its own, its rows shared with whoever holds them too. What it may be used for is decided by equality, not
// by a hash: the same tokens in the same modes, layer by layer.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "oryx/state/state.h"

namespace oryx::serve {

class PrefixTree {
 public:
  // The beginning of a prompt in chunks of `every` tokens: each a text of its tokens and of their modes (chunk_key).
  using Keys = std::vector<std::string>;

  struct Node {
    std::map<std::string, std::unique_ptr<Node>> children;
    Node* parent = nullptr;
    std::string key;
    int64_t chunks = 0;  // from the start
    std::optional<State> state;
    std::list<Node*>::iterator place;  // among those with a state, the least recently used first
  };

  // The deepest kept state whose chunks are the first of `keys`; null when there is none. It counts as used now.
  Node* find(const Keys& keys);
  bool holds(const Keys& keys, size_t chunks) const;
  // Keeps a state behind the first `chunks` of keys, in place of one that was there.
  void keep(const Keys& keys, size_t chunks, State state);
  // Takes a node's state out of the tree.
  State take(Node* node);
  // Drops the least recently used state but `spared`; false when there is none.
  bool drop_one(const Node* spared = nullptr);

  int64_t states() const { return static_cast<int64_t>(used_.size()); }

 private:
  void prune(Node* node);

  Node root_;
  std::list<Node*> used_;
};

}  // namespace oryx::serve
