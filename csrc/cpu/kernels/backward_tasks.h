// The way of both backward passes through their work.
#pragma once

#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::BackwardProblem;

// Where a backward pass is: at a panel of queries and a chunk of keys.
struct Block {
  int64_t b, h;  // the first head, of several
  int64_t first_key, keys, first_row, rows;
};

// A task owns a range of keys of a group of heads, in chunks whose gradients fit the caches, and
// runs every chunk over all queries, a panel at a time.
template <class Worker>
void key_range(Worker& worker, const BackwardProblem& p, int64_t b, int64_t h, int64_t split) {
  const int64_t begin = p.key_length * split / p.key_splits;
  const int64_t end = p.key_length * (split + 1) / p.key_splits;
  for (int64_t first = begin; first < end; first += worker.chunk()) {
    Block at{.b = b, .h = h, .first_key = first, .keys = min(end - first, worker.chunk())};
    worker.start_keys(at);
    for (; at.first_row < p.query_length; at.first_row += at.rows) {
      at.rows = min(p.query_length - at.first_row, Worker::kRows);
      worker.start_rows(at);
      for (int64_t key = 0; key < at.keys; key += worker.tile_keys())
        worker.tile(at, key, min(at.keys - key, worker.tile_keys()));
      worker.finish_rows(at, split * p.batch + b, first == begin);
    }
    worker.finish_keys(at);
  }
}

template <class Worker, class T>
void backward_tasks(const BackwardProblem& problem, int64_t begin, int64_t end) {
  const int64_t groups = problem.average_heads ? 1 : problem.heads;
  with_worker<Worker, T>(problem, [&](Worker& worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / problem.key_splits, split = task % problem.key_splits;
      key_range(worker, problem, group / groups, group % groups, split);
    }
  });
}

}  // namespace attn_kd::ATTN_KD_ISA
