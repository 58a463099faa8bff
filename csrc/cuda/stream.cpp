#include "stream.h"

#include <c10/util/Exception.h>

// Of torch's stable C interface, declared there for builds with CUDA alone, and here so that this
// file needs no CUDA header; a c10::Stream has no handle in torch 2.11.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace attn_kd::cuda {

void* current_stream(c10::Device device) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0,
              "attn_kd: torch has no current stream for ", device);
  return stream;
}

}  // namespace attn_kd::cuda
