// A GPU that computes nothing: as much of the CUDA runtime, the driver, cuBLAS, cuSOLVER and NCCL as PyTorch
// and Triton call, so that a program for a GPU runs where there is none. Launches are counted, no kernel runs,
// device memory is addresses without contents: what is copied back from it is zeros, a single byte
// (a truth value) 1. Some of what a GPU would refuse is refused: host pointers handed to Triton's kernels,
// waiting or pageable copies inside a captured graph, grids and shared memory past the limits.
//
// rehearse.sh builds it, with one more function returning 0 for each symbol of PyTorch's libraries that is
// not defined here, and preloads it.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <set>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

constexpr size_t MEMORY = size_t(140) << 30;  // an H200
constexpr int PROCESSORS = 132, SHARED = 227 * 1024, SHARED_PROCESSOR = 228 * 1024;

enum Place { HOST, PINNED, DEVICE };
struct Range {
  size_t bytes;
  Place place;
};
struct Event {
  double ms = -1;
  void* stream = nullptr;
};
inline std::mutex lock;
inline std::map<size_t, Range> ranges;     // by address
inline size_t used = 0;                    // bytes of the device
inline std::map<void*, size_t> capturing;  // stream -> kernels and copies so far
inline std::map<void*, size_t> graphs;     // graph -> what it holds
inline bool sends = false;                 // whether the graph now captured holds NCCL's launches
inline std::set<void*> sending;            // graphs that do and have not been destroyed
inline std::map<std::string, size_t> counts;
inline std::atomic<size_t> handles{4096};

template <class T>
T handle() {
  return (T)(handles += 16);
}

inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

inline cudaError_t refuse(const std::string& what, cudaError_t error) {
  fprintf(stderr, "rehearsal: a GPU would refuse: %s\n", what.c_str());
  return error;
}

// Count what a stream is given, also for the graph that it captures.
inline void count(const std::string& what, void* stream) {
  std::lock_guard guard(lock);
  counts[what]++;
  if (auto at = capturing.find(stream); at != capturing.end()) at->second++;
}

inline bool captures(void* stream) {
  std::lock_guard guard(lock);
  return capturing.count(stream) > 0;
}

inline bool captures() {
  std::lock_guard guard(lock);
  return !capturing.empty();
}

inline Place place(const void* p) {
  std::lock_guard guard(lock);
  auto after = ranges.upper_bound(size_t(p));
  if (after == ranges.begin()) return HOST;
  auto [begin, range] = *--after;
  return size_t(p) < begin + range.bytes ? range.place : HOST;
}

inline cudaError_t take(void** p, size_t bytes, Place where) {
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  std::lock_guard guard(lock);
  if (where == DEVICE && used + bytes > MEMORY) return cudaErrorMemoryAllocation;
  int access = where == DEVICE ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* q = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) return cudaErrorMemoryAllocation;
  ranges[size_t(q)] = {bytes, where};
  if (where == DEVICE) used += bytes;
  *p = q;
  return cudaSuccess;
}

inline cudaError_t give(void* p) {
  if (p == nullptr) return cudaSuccess;
  std::lock_guard guard(lock);
  auto at = ranges.find(size_t(p));
  if (at == ranges.end()) return refuse("freeing what was not allocated", cudaErrorInvalidValue);
  if (at->second.place == DEVICE) used -= at->second.bytes;
  munmap(p, at->second.bytes);
  ranges.erase(at);
  return cudaSuccess;
}

inline cudaError_t copy(void* to, const void* from, size_t bytes) {
  bool out = place(to) == DEVICE, in = place(from) == DEVICE;
  if (in && !out) memset(to, bytes == 1, bytes);
  if (!in && !out) memcpy(to, from, bytes);
  return cudaSuccess;
}

inline int attribute(int which) {  // the runtime and the driver number them alike
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return SHARED_PROCESSOR;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return PROCESSORS;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrClockRate: return 1755000;          // kHz
    case cudaDevAttrMemoryClockRate: return 3201000;    // kHz
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;  // bits
    default: return 1;
  }
}

inline cudaError_t launch(const std::string& name, dim3 grid, size_t shared, void* stream) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || shared > SHARED)
    return refuse(name + " with such a grid or so much shared memory", cudaErrorInvalidConfiguration);
  count(name, stream);
  return cudaSuccess;
}

inline cudaError_t wait(bool captured, const char* what) {
  if (!captured) return cudaSuccess;
  return refuse(std::string(what) + " while a graph is captured", cudaErrorStreamCaptureUnsupported);
}
