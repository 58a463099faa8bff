// The stream that torch enqueues on.
#pragma once

#include <c10/core/Device.h>

namespace attn_kd::cuda {

// A cudaStream_t.
void* current_stream(c10::Device device);

}  // namespace attn_kd::cuda
