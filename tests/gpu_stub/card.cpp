// Two cards that aren't there: CUDA's driver API as far as Triton calls it, and PyTorch's device guard, which share one
// idea of the current device and stream. Launches are written down and do nothing.
//
// Compiled by card.py into a libcuda.so.1, against the cuda.h that Triton's wheel brings.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda.h"

namespace {

constexpr int DEVICES = 2;
thread_local int current_device = 0;
thread_local c10::StreamId current_streams[DEVICES] = {};

std::mutex mutex;
std::string launches;  // a line each: kernel, device, stream, grid, threads, shared bytes
bool reads_host = false;
std::map<CUdeviceptr, std::pair<CUdeviceptr, int>> memory;  // begin -> end, device

constexpr auto CUDA = c10::DeviceType::CUDA;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return CUDA; }
  c10::Device getDevice() const override { return {CUDA, static_cast<c10::DeviceIndex>(current_device)}; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before = getDevice();
    setDevice(to);
    return before;
  }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.index() >= 0) current_device = to.index();
  }
  c10::Stream getStream(c10::Device of) const override {
    c10::Device device(CUDA, static_cast<c10::DeviceIndex>(of.index() < 0 ? current_device : of.index()));
    return c10::Stream(c10::Stream::UNSAFE, device, current_streams[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    c10::Stream before = getStream(to.device());
    current_streams[to.device_index()] = to.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// What autograd's engine asks: whether there is an accelerator at all.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(::current_device); }
  int getNumGPUs() const override { return DEVICES; }
};
using at::RegistererCUDAHooksRegistry;
using at::CUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);  // the name under which PyTorch looks for it

}  // namespace

extern "C" {

// ---- for card.py ----

int card_device() { return current_device; }
void card_set_device(int device) { current_device = device; }
long long card_stream(int device) { return current_streams[device]; }
void card_set_stream(int device, long long stream) { current_streams[device] = stream; }

// Memory that a tensor of this card has. What lay there before is gone.
void card_own(CUdeviceptr begin, CUdeviceptr bytes, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  auto it = memory.upper_bound(begin);
  if (it != memory.begin() && std::prev(it)->second.first > begin) --it;
  while (it != memory.end() && it->first < begin + bytes) it = memory.erase(it);
  memory[begin] = {begin + bytes, device};
}

// Whether kernels may read the host's memory too.
void card_read_host(int allowed) { reads_host = allowed; }

// The launches since the last call, as lines; -1 and none taken if they don't fit.
long long card_take_launches(char* out, long long size) {
  std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<long long>(launches.size()) >= size) return -1;
  std::memcpy(out, launches.c_str(), launches.size() + 1);
  long long length = launches.size();
  launches.clear();
  return length;
}

// ---- the driver API ----

CUresult cuInit(unsigned int) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { *text = "error of the stub driver"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) { *count = DEVICES; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {  // an H200's
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { *context = reinterpret_cast<CUcontext>(1); return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(2);
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));  // a kernel stays loaded as long as the process
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 1; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(
    CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

// A kernel can't read what lies in the host's memory, or in another card's.
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute, CUdeviceptr pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  if (reads_host) {
    *static_cast<CUdeviceptr*>(out) = pointer;
    return CUDA_SUCCESS;
  }
  auto it = memory.upper_bound(pointer);
  if (it == memory.begin() || (--it)->second.first <= pointer) return CUDA_ERROR_INVALID_VALUE;
  if (it->second.second != current_device) return CUDA_ERROR_ILLEGAL_ADDRESS;
  *static_cast<CUdeviceptr*>(out) = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  auto text = [](auto number) { return " " + std::to_string(number); };
  std::lock_guard<std::mutex> lock(mutex);
  launches += reinterpret_cast<const char*>(function) + text(current_device) +
              text(reinterpret_cast<long long>(config->hStream)) + text(config->gridDimX) + text(config->gridDimY) +
              text(config->gridDimZ) + text(config->blockDimX) + text(config->sharedMemBytes) + "\n";
  return CUDA_SUCCESS;
}

}  // extern "C"
