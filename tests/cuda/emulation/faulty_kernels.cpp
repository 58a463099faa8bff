// Kernels that are wrong, each in one way, for the test that the emulation notices.
#include <string_view>

#include "device.h"

namespace {

using namespace attn_kd::cuda::device;
using Words = float[64];

void fine(float*) {
  auto& words = shared_storage<Words>();
  write_shared(&words[thread_index()], 1.f);
  barrier();
  read_shared(&words[thread_index() ^ 1]);
}

void read_without_barrier(float*) {
  auto& words = shared_storage<Words>();
  write_shared(&words[thread_index()], 1.f);
  read_shared(&words[thread_index() ^ 1]);
}

void write_after_read_without_barrier(float*) {
  auto& words = shared_storage<Words>();
  write_shared(&words[thread_index()], 1.f);
  barrier();
  read_shared(&words[thread_index() ^ 1]);
  write_shared(&words[thread_index()], 2.f);
}

void read_before_any_write(float*) { read_shared(&shared_storage<Words>()[thread_index()]); }

void copy_without_wait(float* buffer) {
  auto& words = shared_storage<Words>();
  if (thread_index() == 0) copy_async(&words[0], buffer, true);
  barrier();
  read_shared(&words[0]);
}

void copy_over_what_is_read(float* buffer) {
  auto& words = shared_storage<Words>();
  if (thread_index() == 0) write_shared(&words[0], 1.f);
  barrier();
  read_shared(&words[0]);
  if (thread_index() == 1) copy_async(&words[0], buffer, true);
  wait_for_copies();
}

void barrier_of_some(float*) {
  if (thread_index() < 40) barrier();
}

void shuffle_of_some(float*) {
  if (thread_index() % 2 == 0) shuffle_xor(1, 2);
}

void read_beyond_buffer(float* buffer) { read_global(buffer + 4 + thread_index()); }

void misaligned_copy(float* buffer) {
  copy_async(&shared_storage<Words>()[4 * thread_index() % 64], buffer + 1, true);
}

void misaligned_copy_of_zeros(float* buffer) {
  copy_async(&shared_storage<Words>()[4 * thread_index() % 64], buffer + 1, false);
}

void copy_of_zeros_from_nowhere(float*) {
  copy_async(&shared_storage<Words>()[4 * thread_index() % 64], nullptr, false);
}

void beyond_shared_memory(float*) {
  write_shared(shared_storage<Words>() + 1 + thread_index(), 1.f);
}

void write_to_input(float* buffer) { write_global(buffer + thread_index() % 4, 1.f); }

struct Named {
  std::string_view name;
  void (*kernel)(float*);
};

constexpr Named kKernels[] = {
    {"fine", fine},
    {"read_without_barrier", read_without_barrier},
    {"write_after_read_without_barrier", write_after_read_without_barrier},
    {"read_before_any_write", read_before_any_write},
    {"copy_without_wait", copy_without_wait},
    {"copy_over_what_is_read", copy_over_what_is_read},
    {"barrier_of_some", barrier_of_some},
    {"shuffle_of_some", shuffle_of_some},
    {"read_beyond_buffer", read_beyond_buffer},
    {"misaligned_copy", misaligned_copy},
    {"misaligned_copy_of_zeros", misaligned_copy_of_zeros},
    {"copy_of_zeros_from_nowhere", copy_of_zeros_from_nowhere},
    {"beyond_shared_memory", beyond_shared_memory},
    {"write_to_input", write_to_input},
};

}  // namespace

// Runs a kernel with 64 threads and a registered input of 8 floats; returns what was noticed.
extern "C" const char* emulation_run_faulty(const char* name) {
  alignas(16) static float buffer[8] = {};
  Machine::the().forget_buffers();
  Machine::the().add_buffer(buffer, sizeof buffer, false);
  last_fault.clear();
  for (const Named& named : kKernels)
    if (named.name == name) {
      launch(named.kernel, 1, 64, nullptr, static_cast<float*>(buffer));
      return last_fault.c_str();
    }
  return "no such kernel";
}
