// The few functions of the driver that PyTorch and the tests call directly, as described in
// the CUDA Driver API reference: "Primary Context Management", "Context Management" and "Stream
// Memory Operations". The rest returns CUDA_ERROR_NOT_SUPPORTED.
#include <cstdint>

using CUresult = int;
constexpr CUresult kInvalidValue = 1, kNotSupported = 801;
#define API extern "C" __attribute__((visibility("default")))

extern "C" int cuda_standin_wait_value(void* stream, uintptr_t address, uint32_t value, bool writes);
extern "C" void* cuda_standin_current_context();
extern "C" bool cuda_standin_has_context(int device);

API CUresult cuInit(unsigned) { return 0; }
API CUresult cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
API CUresult cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = cuda_standin_has_context(device);
  return 0;
}
API CUresult cuCtxGetCurrent(void** context) {
  *context = cuda_standin_current_context();
  return 0;
}
API CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in's driver";
  return 0;
}
API CUresult cuStreamWaitValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned how) {
  return how ? kInvalidValue : cuda_standin_wait_value(stream, address, value, false);
}
API CUresult cuStreamWriteValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned) {
  return cuda_standin_wait_value(stream, address, value, true);
}

#define NOT_SUPPORTED(NAME) \
  API CUresult NAME(...) { return kNotSupported; }
NOT_SUPPORTED(cuCtxSetCurrent)
NOT_SUPPORTED(cuDeviceGetAttribute)
NOT_SUPPORTED(cuDevicePrimaryCtxRetain)
NOT_SUPPORTED(cuFuncGetAttribute)
NOT_SUPPORTED(cuFuncSetAttribute)
NOT_SUPPORTED(cuFuncSetCacheConfig)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLaunchKernel)
NOT_SUPPORTED(cuLinkAddData_v2)
NOT_SUPPORTED(cuLinkComplete)
NOT_SUPPORTED(cuLinkCreate_v2)
NOT_SUPPORTED(cuModuleGetFunction)
NOT_SUPPORTED(cuModuleLoad)
NOT_SUPPORTED(cuModuleLoadData)
NOT_SUPPORTED(cuModuleLoadDataEx)
NOT_SUPPORTED(cuModuleUnload)
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuPointerGetAttribute)
NOT_SUPPORTED(cuTensorMapEncodeTiled)
