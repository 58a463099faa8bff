// A GPU's thread block on one CPU thread, for running CUDA kernels where there is no GPU.
//
// The threads of a block are fibers. One runs until it needs the others: at a barrier those of the
// block, in a warp-wide operation (a shuffle, ldmatrix, mma) the 32 lanes of its warp, the last of
// which to arrive lets the operation happen for all. Blocks run one after the other.
//
// Memory is checked as no GPU does. A Fault is thrown for
//  - an access outside the shared memory or the registered buffers, or not aligned to its size;
//  - shared memory that is read before it is written, or accessed by two threads, at least one of
//    which writes, without a barrier between them; an asynchronous copy counts as a write at any
//    time from its beginning to its thread's wait;
//  - a read of a buffer for results (kernels use the read-only path), or a second write to one of
//    its bytes;
//  - barriers and warp-wide operations that not all threads concerned arrive at.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulation {

struct Fault {
  std::string what;
};

inline constexpr int kLanes = 32;

class Machine {
 public:
  static Machine& the();  // there is one

  // Runs `kernel` by all threads of all blocks.
  void run(int blocks, int threads, const std::function<void()>& kernel);

  // Registers memory that kernels may read or, once, write. As long as there is none, anything
  // goes.
  void add_buffer(const void* data, int64_t bytes, bool writable);
  void forget_buffers() { buffers_.clear(); }

  // What follows is for the threads of a running kernel.
  int thread() const { return current_; }
  int block() const { return block_; }

  void* shared_memory(size_t bytes);
  void read_shared(const void* from, size_t bytes);
  void write_shared(const void* to, size_t bytes);
  void read_global(const void* from, size_t bytes);
  void write_global(const void* to, size_t bytes);

  // 16 bytes, zeros where !valid.
  void begin_copy(void* to, const void* from, bool valid);
  void finish_copies();

  // Returns whether the condition holds for any thread.
  bool barrier(bool condition);

  // What the lanes of a warp do together, given what each has brought.
  using WarpOperation = void (*)(void* const (&of_lanes)[kLanes]);
  void together(WarpOperation operation, void* of_this_lane);

  int64_t bank_conflicts = 0;  // of ldmatrix: eight rows that do not lie in different banks
  int64_t launches = 0;

 private:
  enum class State { ready, at_operation, at_barrier, done };

  struct Copy {
    void* to;
    const void* from;
  };

  struct Fiber {
    ucontext_t start;  // of its stack; from then on jumps, which cost no system call
    jmp_buf resume;
    bool started = false;
    std::vector<char> stack;
    State state = State::done;
    WarpOperation operation = nullptr;
    void* operand = nullptr;
    std::vector<Copy> copies;
  };

  struct Word {  // of shared memory: who accessed it last, and in which stretch between barriers
    uint32_t write_stretch = 0, read_stretch = 0;
    int16_t writer = -1, reader = -1;
    bool many_readers = false, being_copied = false;
  };

  struct Buffer {
    const char *begin, *end;
    bool writable;
    std::vector<bool> written;
  };

  static void enter_fiber();
  void start_block(int block, int threads);
  void run_block();
  bool run_warp(size_t warp);
  void release_barrier();
  void resume(Fiber& fiber);
  void suspend(State state);
  [[noreturn]] void fail(const std::string& what) const;
  void check_alignment(const void* pointer, size_t bytes) const;
  Word* words(const void* pointer, size_t bytes);
  void mark_written(Word& word);
  Buffer* buffer_of(const void* pointer, size_t bytes);

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
  int current_ = 0, block_ = 0;
  uint32_t stretch_ = 1;
  bool condition_ = false, released_condition_ = false;
  std::string fault_;
  std::vector<char> shared_;
  size_t shared_bytes_ = 0;
  std::vector<Word> shadow_;
  std::vector<Buffer> buffers_;
};

}  // namespace emulation
