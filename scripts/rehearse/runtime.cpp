// The CUDA runtime of the rehearsal; see device.h.
#include "device.h"

#include <dlfcn.h>

namespace {
struct Launch {  // of <<<...>>>, kept between the two calls that nvcc makes of it
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

thread_local Launch pushed;
thread_local int current = 0;  // device

int devices() {
  const char* asked = getenv("REHEARSAL_DEVICES");
  return asked == nullptr ? 1 : atoi(asked);
}

cudaError_t launch_own(dim3 grid, size_t shared, cudaStream_t stream) {
  return launch("kernels of PyTorch", grid, shared, stream);
}

struct Report {  // at the end, as JSON: what was launched how often, and how much each graph holds
  ~Report() {
    const char* path = getenv("REHEARSAL_REPORT");
    if (path == nullptr || counts.empty()) return;
    FILE* file = fopen(path, "w");
    if (file == nullptr) {
      fprintf(stderr, "rehearsal: cannot write %s\n", path);
      return;
    }
    const char* between = "";
    fprintf(file, "{\n \"launches\": {");
    for (auto& [name, times] : counts) {
      fprintf(file, "%s\n  \"%s\": %zu", between, name.c_str(), times);
      between = ",";
    }
    fprintf(file, "\n },\n \"graphs\": [");
    between = "";
    for (auto& [graph, size] : graphs) {
      fprintf(file, "%s%zu", between, size);
      between = ", ";
    }
    fprintf(file, "]\n}\n");
    fclose(file);
  }
} report;
}  // namespace

// ---- the runtime: memory and copies ----
API cudaError_t cudaMalloc(void** p, size_t n) { return take(p, n, DEVICE); }
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return take(p, n, DEVICE); }
API cudaError_t cudaFree(void* p) { return give(p); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return give(p); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return take(p, n, PINNED); }
API cudaError_t cudaFreeHost(void* p) { return give(p); }
API cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  std::lock_guard guard(lock);
  ranges[size_t(p)] = {n, PINNED};
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  std::lock_guard guard(lock);
  ranges.erase(size_t(p));
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = MEMORY, *available = MEMORY - used;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  static const cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost,
                                         cudaMemoryTypeDevice};
  Place where = place(p);
  *a = {types[where], 0, where == HOST ? nullptr : (void*)p, where == PINNED ? (void*)p : nullptr};
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  if (cudaError_t error = wait(captures(), "cudaMemcpy")) return error;
  return copy(to, from, n);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
  static const char* names[] = {"pageable memory", "pinned memory", "the device"};
  Place a = place(from), b = place(to);
  if (a == HOST || b == HOST)
    if (cudaError_t error = wait(captures(stream), "a copy of pageable memory")) return error;
  count(std::string("copy from ") + names[a] + " to " + names[b], stream);
  return copy(to, from, n);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t rows, cudaMemcpyKind, cudaStream_t stream) {
  if (cudaError_t error = wait(captures(stream), "a copy in rows")) return error;
  count("copy in rows", stream);
  for (size_t i = 0; i < rows; i++) copy((char*)to + i * pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
  count("memset", stream);
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static void* one = nullptr;
  if (one == nullptr) take(&one, 1 << 16, DEVICE);
  *p = one;
  return cudaSuccess;
}

// ---- the runtime: the device ----
API cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
API cudaError_t cudaGetDeviceCount(int* count) { return *count = devices(), cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return refuse("a device that is not there", cudaErrorInvalidDevice);
  return current = device, cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* yes, int, int) { return *yes = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
  return *least = 0, *most = -5, cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int n, int) {
  return snprintf(id, n, "0000:01:00.0"), cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "a rehearsal of an H200");
  p->major = 9, p->multiProcessorCount = PROCESSORS, p->totalGlobalMem = MEMORY, p->warpSize = 32;
  p->sharedMemPerBlock = 48 * 1024, p->sharedMemPerBlockOptin = SHARED;
  p->sharedMemPerMultiprocessor = SHARED_PROCESSOR, p->l2CacheSize = 50 << 20;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->textureAlignment = 512, p->memoryBusWidth = 6144, p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  *a = {};
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t,
                                                                       unsigned) {
  return *n = 2, cudaSuccess;
}
API const char* cudaGetErrorString(cudaError_t) { return "refused in a rehearsal"; }
API const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfARehearsal"; }

// ---- the runtime: streams, events, graphs ----
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = handle<cudaStream_t>(), cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait(captures(s), "cudaStreamSynchronize"); }
API cudaError_t cudaStreamQuery(cudaStream_t s) { return wait(captures(s), "cudaStreamQuery"); }
API cudaError_t cudaDeviceSynchronize() { return wait(captures(), "cudaDeviceSynchronize"); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  return *e = (cudaEvent_t) new Event, cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete (Event*)e, cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return *(Event*)e = {now(), s}, cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  return cudaEventRecord(e, s);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  return wait(captures(((Event*)e)->stream), "cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  double begin = ((Event*)from)->ms, end = ((Event*)to)->ms;
  if (begin < 0 || end < 0) return refuse("times of an event never recorded", cudaErrorInvalidResourceHandle);
  return *ms = end - begin, cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  if (s == nullptr) return refuse("capturing the default stream", cudaErrorStreamCaptureUnsupported);
  std::lock_guard guard(lock);
  return capturing[s] = 0, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  *graph = handle<cudaGraph_t>();
  std::lock_guard guard(lock);
  graphs[*graph] = capturing[s];
  capturing.erase(s);
  if (sends) sending.insert(*graph);
  sends = false;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  *status = captures(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                         const cudaGraphEdgeData**, size_t*) {
#else
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                            size_t*) {
#endif
  if (id) *id = 1;
  return cudaStreamIsCapturing(s, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return *mode = cudaStreamCaptureModeGlobal, cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  return *ready = (cudaGraphExec_t)graph, cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  std::lock_guard guard(lock);
  return sending.erase(graph), cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* nodes) {
  std::lock_guard guard(lock);
  return *nodes = graphs[graph], cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  count("graph of " + std::to_string(graphs[graph]), stream);
  return cudaSuccess;
}

// ---- the runtime: launches ----
API void** __cudaRegisterFatBinary(void*) {
  static void* module;
  return &module;
}
API char __cudaInitModule(void**) { return 1; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  return pushed = {grid, block, shared, stream}, 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t*)stream = pushed.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  return *kernel = (cudaKernel_t)host, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3, void**, size_t shared,
                                   cudaStream_t stream) {
  return launch_own(grid, shared, stream);
}
API cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t shared, cudaStream_t stream) {
  return launch_own(grid, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void*, dim3 grid, dim3, void**, size_t shared,
                                            cudaStream_t stream) {
  return launch_own(grid, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch_own(config->gridDim, config->dynamicSmemBytes, config->stream);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { return f(data), cudaSuccess; }

// ---- the runtime: the driver's functions by name ----
static int nothing() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  void* own = dlsym(RTLD_DEFAULT, name);
  *f = own ? own : (void*)nothing;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
