// The driver and the libraries of the rehearsal; see device.h.
#include "device.h"

static thread_local cudaStream_t cublas_stream;

// ---- the driver ----
API CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* devices) { return *devices = 1, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = (CUcontext)16, CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)16, CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = "refused in a rehearsal", CUDA_SUCCESS;
}
API CUresult cuModuleLoadData(CUmodule* module, const void*) {
  return *module = handle<CUmodule>(), CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return *module = handle<CUmodule>(), CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* module, const char*) {
  return *module = handle<CUmodule>(), CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  return *function = (CUfunction) new std::string(name), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                            : 0;
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  return *n = 2, CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr p) {
  if (place((void*)p) == HOST) {
    refuse("a pointer of the host in a kernel", cudaErrorInvalidValue);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = p;
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned,
                            unsigned shared, CUstream stream, void**, void**) {
  return launch(*(std::string*)f, {x, y, z}, shared, stream) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ);
  return launch(*(std::string*)f, grid, c->sharedMemBytes, c->hStream) ? CUDA_ERROR_INVALID_VALUE
                                                                       : CUDA_SUCCESS;
}
// ---- cuBLAS: its types are numbers and pointers ----
static int product(const char* name, void* stream) { return count(name, stream), 0; }
API int cublasCreate_v2(void** h) { return *h = handle<void*>(), 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
API int cublasSetStream_v2(void*, cudaStream_t stream) { return cublas_stream = stream, 0; }
API int cublasGemmEx() { return product("cublasGemmEx", cublas_stream); }
API int cublasGemmStridedBatchedEx() { return product("cublasGemmStridedBatchedEx", cublas_stream); }
API int cublasSgemm_v2() { return product("cublasSgemm", cublas_stream); }
API int cublasSgemmStridedBatched() { return product("cublasSgemmStridedBatched", cublas_stream); }
API size_t cublasLtGetVersion() { return 130000; }
API int cublasLtMatmulDescCreate(void** d, int, int) { return *d = handle<void*>(), 0; }
API int cublasLtMatmulPreferenceCreate(void** d) { return *d = handle<void*>(), 0; }
API int cublasLtMatrixLayoutCreate(void** d, int, uint64_t, uint64_t, int64_t) {
  return *d = handle<void*>(), 0;
}
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result,
                                       int* found) {
  return memset(result, 0, 96), *found = 1, 0;
}
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                       const void*, void*, void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return product("cublasLtMatmul", stream);
}

// ---- of cuDNN that it is too old for attention; of cuSOLVER that it wants no workspace ----
API size_t cudnnGetVersion() { return 8000; }
API int cusolverDnXpotrf_bufferSize(void*, void*, int, int64_t, int, const void*, int64_t, int,
                                    size_t* device, size_t* host) {
  return *device = *host = 0, 0;
}
API int cusolverDnSpotrf_bufferSize(void*, int, int, void*, int, int* size) { return *size = 0, 0; }
API int cusolverDnDpotrf_bufferSize(void*, int, int, void*, int, int* size) { return *size = 0, 0; }

// ---- NCCL: nothing is sent ----
static int sent(const char* name, void* stream) {
  sends |= captures();
  return count(name, stream), 0;
}
static int leave(const char* name) {
  std::lock_guard guard(lock);
  if (!sending.empty())
    refuse(std::string(name) + " before the graphs that hold launches of it", cudaErrorUnknown);
  return 0;
}
API int ncclCommDestroy(void*) { return leave("ncclCommDestroy"); }
API int ncclCommAbort(void*) { return leave("ncclCommAbort"); }
API int ncclGetVersion(int* version) { return *version = 22700, 0; }
API int ncclGetUniqueId(void* id) { return memset(id, 1, 128), 0; }
API int ncclCommInitRankConfig(void** communicator, ...) { return *communicator = handle<void*>(), 0; }
API int ncclCommGetAsyncError(void*, int* state) { return *state = 0, 0; }
API int ncclAllReduce(const void*, void*, size_t, int, int, void*, cudaStream_t stream) {
  return sent("ncclAllReduce", stream);
}
API int ncclAllGather(const void*, void*, size_t, int, void*, cudaStream_t stream) {
  return sent("ncclAllGather", stream);
}
API int ncclBroadcast(const void*, void*, size_t, int, int, void*, cudaStream_t stream) {
  return sent("ncclBroadcast", stream);
}
