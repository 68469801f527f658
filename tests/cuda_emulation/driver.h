// libcuda's C interface over the emulated device: what the package calls, checked as the driver would and written down.
// Handles are pointers to `Kernel` or constants. One device of compute capability 9.0.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace driver {

enum Which { kForward, kBackward, kConversion };
struct Kernel {
  Which which;
  bool is_bfloat16;
  int head_dim;
  bool pair, dropout;
  unsigned shared;
};

inline std::string log, error, failing;
inline int failing_status = 0, contexts = 0, capability = 90, device_count = 1;
inline int device_context, loaded_module;

// Note a call; return the status that a test wants it to have.
inline int called(const char* name, const std::string& text = "") {
  log += std::string(name) + (text.empty() ? "" : " ") + text + "\n";
  error = "made to fail";
  return failing == name ? failing_status : 0;
}
inline int invalid(const std::string& why) {
  error = why;
  return 1;
}
template <class... Values>
std::string text(const char* format, Values... values) {
  char buffer[200];
  std::snprintf(buffer, sizeof(buffer), format, values...);
  return buffer;
}

// Return what the name of a kernel says, or one without a head size.
inline Kernel named(const char* name) {
  char dtype[5] = "", suffix[40] = "";
  int head_dim = 0;
  const auto is = [&](const char* format) { return std::sscanf(name, format, dtype, &head_dim, suffix) >= 2; };
  Which which = kForward;
  if (is("disentangled_backward_dq_%4[a-z0-9]_d%d%39s")) which = kConversion;
  else if (is("disentangled_backward_%4[a-z0-9]_d%d%39s")) which = kBackward;
  else if (!is("disentangled_forward_%4[a-z0-9]_d%d%39s")) head_dim = 0;
  return {which, !std::strcmp(dtype, "bf16"), head_dim, std::strstr(suffix, "_pair") != nullptr,
          std::strstr(suffix, "_dropout") != nullptr, 0};
}

// Run a launch as the driver would, whose parameters are copied before it returns.
inline const char* run(const Kernel& kernel, const void* parameters, int blocks) {
  if (kernel.which == kForward) {
    alignas(64) dk::ForwardParams copied;
    std::memcpy(&copied, parameters, sizeof(copied));
    return emulated_forward(
        &copied, kernel.is_bfloat16, kernel.head_dim, kernel.pair, kernel.dropout, 0, blocks, 0);
  }
  alignas(64) dk::BackwardParams copied;
  std::memcpy(&copied, parameters, sizeof(copied));
  const bool converts = kernel.which == kConversion;
  std::vector<int> all(converts ? 0 : blocks);
  for (size_t i = 0; i < all.size(); i++) all[i] = (int)i;
  return emulated_backward(
      &copied, kernel.is_bfloat16, kernel.pair, kernel.dropout, (int)all.size(), all.data(), converts ? blocks : 0, 0);
}

}  // namespace driver

extern "C" {

void emulated_driver(const char* failing, int status, int capability, int devices) {
  driver::failing = failing, driver::failing_status = status;
  driver::capability = capability, driver::device_count = devices;
  driver::log.clear();
}
const char* emulated_driver_log() { return driver::log.c_str(); }
int emulated_driver_contexts() { return driver::contexts; }

int cuInit(unsigned flags) { return driver::called("cuInit", driver::text("%u", flags)); }
int cuDriverGetVersion(int* version) { return *version = 13020, driver::called("cuDriverGetVersion"); }
int cuGetErrorString(int, const char** text) { return *text = driver::error.c_str(), 0; }
int cuDeviceGetCount(int* count) { return *count = driver::device_count, driver::called("cuDeviceGetCount"); }
int cuDeviceGet(int* device, int number) { return *device = number + 40, driver::called("cuDeviceGet"); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 40 || (attribute != 75 && attribute != 76)) return driver::invalid("no such device or attribute");
  *value = attribute == 75 ? driver::capability / 10 : driver::capability % 10;
  return driver::called("cuDeviceGetAttribute");
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device != 40) return driver::invalid("no such device");
  return *context = &driver::device_context, driver::called("cuDevicePrimaryCtxRetain");
}
int cuCtxPushCurrent_v2(void* context) {
  if (context != &driver::device_context) return driver::invalid("no such context");
  driver::contexts++;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = &driver::device_context, driver::contexts--;
  return 0;
}
int cuModuleLoadData(void** module, const char* image) {
  if (driver::contexts == 0) return driver::invalid("no context is current");
  if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return driver::invalid("device kernel image is invalid");
  return *module = &driver::loaded_module, driver::called("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &driver::loaded_module) return driver::invalid("no such module");
  const driver::Kernel kernel = driver::named(name);
  if (kernel.head_dim == 0) return driver::invalid("named symbol not found");
  *function = new driver::Kernel(kernel);  // never freed: as many as a test loads
  return driver::called("cuModuleGetFunction", name);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return driver::invalid("no such attribute");
  static_cast<driver::Kernel*>(function)->shared = value;
  return driver::called("cuFuncSetAttribute");
}

int cuTensorMapEncodeTiled(
    dk::TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
    const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  const int status = driver::called(
      "cuTensorMapEncodeTiled", driver::text("%d, %u dimensions, %d %d %d", type, rank, swizzle, promotion, fill));
  if (reinterpret_cast<uintptr_t>(map) % 64) return driver::invalid("a tensor map lies on a 64-byte boundary");
  if ((type != 6 && type != 9) || rank < 3 || rank > 5 || interleave != 0 || swizzle != 3 || fill != 0) {
    return driver::invalid("no such tensor map");
  }
  int64_t all_sizes[5], all_strides[5] = {2};
  int all_box[5];
  for (uint32_t i = 0; i < rank; i++) {
    if (steps[i] != 1) return driver::invalid("element strides are 1");
    all_sizes[i] = (int64_t)sizes[i], all_box[i] = (int)box[i];
    if (i > 0) all_strides[i] = (int64_t)strides[i - 1];
  }
  const char* refused =
      emulated_map(map, reinterpret_cast<uint64_t>(address), (int)rank, all_sizes, all_strides, all_box);
  return *refused ? driver::invalid(refused) : status;
}

int cuLaunchKernel(
    void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
    unsigned shared, void* stream, void** parameters, void** extra) {
  const int status = driver::called(
      "cuLaunchKernel", driver::text("grid %u %u %u, block %u %u %u, shared %u, stream %ld", x, y, z, threads, threads_y,
                                     threads_z, shared, reinterpret_cast<long>(stream)));
  if (status) return status;
  const driver::Kernel& kernel = *static_cast<driver::Kernel*>(function);
  int expected_threads = dk::kWarpgroup, expected_shared = 0;
  if (kernel.which == driver::kForward) {
    const dk::ForwardInfo info = emulated_info(kernel.head_dim);
    expected_threads = info.threads, expected_shared = info.shared_bytes;
  } else if (kernel.which == driver::kBackward) {
    const dk::BackwardInfo info = emulated_backward_info();
    expected_threads = info.threads, expected_shared = info.shared_bytes;
  }
  if (driver::contexts == 0) return driver::invalid("no context is current");
  if (y * z * threads_y * threads_z != 1 || (int)threads != expected_threads) return driver::invalid("no such block");
  if (shared != kernel.shared || (int)shared != expected_shared) return driver::invalid("no such shared memory");
  if (extra != nullptr) return driver::invalid("nothing extra is expected");
  const char* wrong = driver::run(kernel, parameters[0], (int)x);
  return *wrong ? driver::invalid(wrong) : 0;
}

}
