// Parameters divided over processes: gradients are summed into one process's part each, which steps it and gives the new weights to all (ZeRO stage 1: Rajbhandari et al. 2020, arXiv 1910.02054).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "oryx/model/language_model.h"
#include "oryx/parallel/process_group.h"

namespace oryx {

// Parameters lie one behind the other in buckets, in the order in which a backward pass reaches them, each bucket cut into as many equal parts as there are processes. A bucket holds float32 sums of
// gradients, and the weights that forward passes read: the model's tensors become views of it. Bfloat16 copies and float32 parameters that have none have buckets of their own. Of a parameter with a
// copy each process keeps its part in float32: the model's parameter has a shape, but no memory, between hold_parameters() or assemble_parameters() and release_parameters().
class Shards {
 public:
  // The gradients of the model's leaves come here from now on, and their .grad is empty again after a backward pass. Model and group outlive this.
  Shards(const LanguageModel& model, ProcessGroup& group);
  ~Shards();
  Shards(const Shards&) = delete;
  Shards& operator=(const Shards&) = delete;

  // What this process steps of a parameter: views, one-dimensional.
  struct Piece {
    size_t parameter;
    at::Tensor p, g;    // float32
    at::Tensor weight;  // bfloat16 copy of p, undefined where there is none
    size_t bucket;
    int64_t at;    // in the process's part of the bucket
    int64_t from;  // in the parameter
  };
  const std::vector<Piece>& pieces() const { return pieces_; }
  size_t buckets() const { return buckets_.size(); }
  int64_t part(size_t bucket) const;  // values in a process's part

  // Before the backward passes of a step. During the last one each bucket is summed over the processes as soon as it is whole, where `early`; else reduce() does that.
  void begin(int64_t passes, bool early);
  void next_pass() { ++pass_; }
  // Behind the last pass: parameters that got no gradient count as zero. loss: this process's share of the step's.
  void end(const at::Tensor& loss);
  // Sums over the processes what is not yet; the pieces' g are final then, and loss() is the step's. Also for gradients that a captured begin() to end() has laid down again.
  void reduce();
  const at::Tensor& loss() const { return loss_; }  // float32, one value

  // The new weights of a bucket's pieces begin to go to all processes; all have them behind finish_weights().
  void gather_weights(size_t bucket);
  void finish_weights();
  ProcessGroup& group() { return group_; }

  // Whole tensors out of every process's pieces, for a checkpoint. values: float32 [part(bucket)] by bucket; take gets each parameter's, valid during the call. Every rank calls it.
  void assemble(const std::function<at::Tensor(size_t bucket)>& values, const std::function<void(size_t parameter, const at::Tensor& whole)>& take);
  // Gives the model's parameters their memory back, on rank 0 (on the CPU) with what they are. Every rank calls it.
  void assemble_parameters();
  // The same with nothing in it, on the model's device: to be filled on every rank, and taken from.
  void hold_parameters();
  void take_parameters();
  void release_parameters();

 private:
  struct Bucket {
    bool copies = false;  // of bfloat16
    std::vector<size_t> parameters;
    std::vector<int64_t> offsets;
    at::Tensor gradients, weights;  // [size * part]
    at::Tensor masters;             // float32 [part] where the weights are copies
    int64_t part = 0, open = 0;     // parameters whose gradients are not here yet
  };
  struct Hook;
  void lay_out();
  void make_bucket(Bucket& bucket);
  void arrived(size_t parameter, const at::Tensor& leaf);
  void start(Bucket& bucket);

  const LanguageModel& model_;
  ProcessGroup& group_;
  std::vector<Bucket> buckets_;
  std::vector<size_t> bucket_of_;          // by parameter
  std::vector<at::Tensor> gradients_;      // by parameter: its place in a bucket
  std::vector<char> filled_;               // by parameter, in this step
  std::vector<Piece> pieces_;
  at::Tensor loss_;
  int64_t passes_ = 1, pass_ = 0;
  size_t started_ = 0;  // buckets that are being summed: always the first ones, so that all processes sum the same
  bool early_ = false, open_ = false;
  std::optional<c10::Stream> stream_;  // of the step, on a GPU
};

}  // namespace oryx
