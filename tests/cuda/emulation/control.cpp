// What the tests call beside the kernels' own C functions.
#include "device.h"

using attn_kd::cuda::device::emulated_multiprocessors;
using attn_kd::cuda::device::last_stream;
using emulation::Machine;

// Begins anew: no buffers, no counts, a GPU of so many multiprocessors.
extern "C" void emulation_reset(int multiprocessors) {
  Machine& machine = Machine::the();
  machine.forget_buffers();
  machine.bank_conflicts = machine.launches = 0;
  emulated_multiprocessors = multiprocessors;
  last_stream = nullptr;
}

extern "C" void emulation_add_buffer(const void* data, int64_t bytes, int writable) {
  Machine::the().add_buffer(data, bytes, writable != 0);
}

extern "C" int64_t emulation_bank_conflicts() { return Machine::the().bank_conflicts; }
extern "C" int64_t emulation_launches() { return Machine::the().launches; }
extern "C" void* emulation_last_stream() { return last_stream; }
