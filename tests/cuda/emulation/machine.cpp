#include "machine.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024, kSharedAlignment = 128;  // of static shared memory

}  // namespace

Machine& Machine::the() {
  static Machine machine;
  return machine;
}

void Machine::run(int blocks, int threads, const std::function<void()>& kernel) {
  ++launches;
  if (blocks <= 0 || threads <= 0 || threads % kLanes != 0)
    throw Fault{"a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                " threads"};
  kernel_ = &kernel;
  shared_.resize(kMaxSharedBytes + kSharedAlignment);
  for (int block = 0; block < blocks; ++block) {
    start_block(block, threads);
    run_block();
  }
}

void Machine::start_block(int block, int threads) {
  block_ = block;
  stretch_ = 1;
  condition_ = false;
  fault_.clear();
  shared_bytes_ = 0;
  shadow_.assign(kMaxSharedBytes / 4, Word());
  fibers_.resize(threads);
  for (Fiber& fiber : fibers_) {
    fiber.stack.resize(kStackBytes);
    fiber.state = State::ready;
    fiber.started = false;
    fiber.copies.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, &Machine::enter_fiber, 0);
  }
}

void Machine::enter_fiber() {
  Machine& machine = the();
  try {
    (*machine.kernel_)();
    if (!machine.fibers_[machine.current_].copies.empty())
      machine.fail("a thread leaves without waiting for its copies");
  } catch (const Fault& fault) {
    machine.fault_ = fault.what;
  }
  machine.fibers_[machine.current_].state = State::done;
  _longjmp(machine.scheduler_, 1);
}

// Runs a fiber until it suspends itself or ends.
void Machine::resume(Fiber& fiber) {
  if (_setjmp(scheduler_) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void Machine::suspend(State state) {
  Fiber& fiber = fibers_[current_];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
}

void Machine::run_block() {
  const size_t warps = fibers_.size() / kLanes;
  const auto all_in = [this](State state) {
    return std::all_of(fibers_.begin(), fibers_.end(),
                       [state](const Fiber& fiber) { return fiber.state == state; });
  };
  while (!all_in(State::done)) {
    bool progress = false;
    for (size_t warp = 0; warp < warps; ++warp) progress |= run_warp(warp);
    if (all_in(State::at_barrier))
      release_barrier();
    else if (!progress)
      throw Fault{"block " + std::to_string(block_) + ": some threads wait for others that never " +
                  "come to the same barrier or warp-wide operation"};
  }
}

// Runs the lanes of a warp as far as they get by themselves; returns whether there was anything to
// run.
bool Machine::run_warp(size_t warp) {
  Fiber* lanes = &fibers_[warp * kLanes];
  bool progress = false;
  for (;;) {
    bool ran = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane].state != State::ready) continue;
      ran = progress = true;
      current_ = static_cast<int>(warp * kLanes) + lane;
      resume(lanes[lane]);
      if (!fault_.empty()) throw Fault{fault_};
    }
    if (!ran) return progress;
    const bool together = std::all_of(lanes, lanes + kLanes, [lanes](const Fiber& lane) {
      return lane.state == State::at_operation && lane.operation == lanes[0].operation;
    });
    if (!together) continue;
    void* operands[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) operands[lane] = lanes[lane].operand;
    lanes[0].operation(operands);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane].state = State::ready;
  }
}

void Machine::release_barrier() {
  ++stretch_;
  released_condition_ = condition_;
  condition_ = false;
  for (Fiber& fiber : fibers_) fiber.state = State::ready;
}

bool Machine::barrier(bool condition) {
  condition_ |= condition;
  suspend(State::at_barrier);
  return released_condition_;
}

void Machine::together(WarpOperation operation, void* of_this_lane) {
  fibers_[current_].operation = operation;
  fibers_[current_].operand = of_this_lane;
  suspend(State::at_operation);
}

void Machine::fail(const std::string& what) const {
  throw Fault{"block " + std::to_string(block_) + ", thread " + std::to_string(current_) + ": " +
              what};
}

void Machine::check_alignment(const void* pointer, size_t bytes) const {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("an access to " + std::to_string(bytes) + " bytes is not aligned");
}

void* Machine::shared_memory(size_t bytes) {
  if (bytes > kMaxSharedBytes) fail(std::to_string(bytes) + " bytes of shared memory");
  shared_bytes_ = bytes;
  void* begin = shared_.data();
  size_t space = shared_.size();
  return std::align(kSharedAlignment, bytes, begin, space);
}

Machine::Word* Machine::words(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes);
  const auto* begin = static_cast<const char*>(shared_memory(shared_bytes_));
  const ptrdiff_t at = static_cast<const char*>(pointer) - begin;
  if (at < 0 || at + bytes > shared_bytes_) fail("an access outside of the shared memory");
  return &shadow_[at / 4];
}

void Machine::read_shared(const void* from, size_t bytes) {
  Word* word = words(from, bytes);
  for (size_t i = 0; i < bytes / 4; ++i, ++word) {
    if (word->being_copied) fail("a read of shared memory that is being copied to");
    if (word->write_stretch == 0) fail("a read of shared memory that nobody has written");
    if (word->write_stretch == stretch_ && word->writer != current_)
      fail("a read of shared memory that thread " + std::to_string(word->writer) +
           " has written since the last barrier");
    if (word->read_stretch != stretch_) word->many_readers = false;
    if (word->read_stretch == stretch_ && word->reader != current_) word->many_readers = true;
    word->read_stretch = stretch_;
    word->reader = static_cast<int16_t>(current_);
  }
}

void Machine::mark_written(Word& word) {
  if (word.being_copied) fail("a write to shared memory that is being copied to");
  if (word.write_stretch == stretch_ && word.writer != current_)
    fail("a write to shared memory that thread " + std::to_string(word.writer) +
         " has written since the last barrier");
  if (word.read_stretch == stretch_ && (word.many_readers || word.reader != current_))
    fail("a write to shared memory that another thread has read since the last barrier");
  word.write_stretch = stretch_;
  word.writer = static_cast<int16_t>(current_);
}

void Machine::write_shared(const void* to, size_t bytes) {
  Word* word = words(to, bytes);
  for (size_t i = 0; i < bytes / 4; ++i) mark_written(word[i]);
}

void Machine::begin_copy(void* to, const void* from, bool valid) {
  Word* word = words(to, 16);
  if (from == nullptr) fail("a copy from no address");
  check_alignment(from, 16);
  if (valid) read_global(from, 16);
  for (size_t i = 0; i < 4; ++i) {
    mark_written(word[i]);
    word[i].being_copied = true;
  }
  fibers_[current_].copies.push_back({to, valid ? from : nullptr});
}

void Machine::finish_copies() {
  for (const Copy& copy : fibers_[current_].copies) {
    Word* word = words(copy.to, 16);
    for (size_t i = 0; i < 4; ++i) {
      word[i].being_copied = false;
      mark_written(word[i]);
    }
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  fibers_[current_].copies.clear();
}

void Machine::add_buffer(const void* data, int64_t bytes, bool writable) {
  const auto* begin = static_cast<const char*>(data);
  buffers_.push_back({begin, begin + bytes, writable, std::vector<bool>(writable ? bytes : 0)});
}

// nullptr where anything goes.
Machine::Buffer* Machine::buffer_of(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes);
  if (buffers_.empty()) return nullptr;
  const auto* begin = static_cast<const char*>(pointer);
  for (Buffer& buffer : buffers_)
    if (begin >= buffer.begin && begin + bytes <= buffer.end) return &buffer;
  fail("an access outside of the registered buffers");
}

void Machine::read_global(const void* from, size_t bytes) {
  const Buffer* buffer = buffer_of(from, bytes);
  if (buffer && buffer->writable) fail("a read of a buffer for results");
}

void Machine::write_global(const void* to, size_t bytes) {
  Buffer* buffer = buffer_of(to, bytes);
  if (!buffer) return;
  if (!buffer->writable) fail("a write to a read-only buffer");
  const ptrdiff_t at = static_cast<const char*>(to) - buffer->begin;
  for (size_t i = 0; i < bytes; ++i) {
    if (buffer->written[at + i]) fail("a second write to a result");
    buffer->written[at + i] = true;
  }
}

}  // namespace emulation
