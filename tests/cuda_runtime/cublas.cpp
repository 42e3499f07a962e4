// The few functions of cuBLAS that multiply matrices of floats, on the stand-in's streams.
//
// They are in libcudart.so.13, which the loader searches before libcublas.so.13.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "engine.h"

using namespace standin;
#define API extern "C" __attribute__((visibility("default")))

struct Handle {
  cudaStream_t stream = nullptr;
  int math = 0, pointers = 0;
};
API int cublasCreate_v2(Handle** out) {
  *out = new Handle;
  return 0;
}
API int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return 0;
}
API int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
API int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
API int cublasSetMathMode(Handle* handle, int mode) {
  handle->math = mode;
  return 0;
}
API int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math;
  return 0;
}
API int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointers = mode;
  return 0;
}
API int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  *mode = handle->pointers;
  return 0;
}

// Matrices are in column-major order.
template <class T>
static int multiply(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,
                    const T* alpha, const T* a, int lda, int64_t stride_a, const T* b, int ldb,
                    int64_t stride_b, const T* beta, T* c, int ldc, int64_t stride_c, int count) {
  T x = *alpha, y = *beta;
  Op op;
  op.work = [=] {
    std::vector<T> column(m), left(size_t(m) * k);
    for (int64_t s = 0; s < count; s++) {
      for (int64_t l = 0; l < k; l++)
        for (int64_t i = 0; i < m; i++)
          left[l * m + i] = a[s * stride_a + (transpose_a ? l + i * lda : i + l * lda)];
      for (int64_t j = 0; j < n; j++) {
        std::fill(column.begin(), column.end(), T(0));
        for (int64_t l = 0; l < k; l++) {
          T factor = b[s * stride_b + (transpose_b ? j + l * ldb : l + j * ldb)];
          for (int64_t i = 0; i < m; i++) column[i] += left[l * m + i] * factor;
        }
        for (int64_t i = 0; i < m; i++) {
          T& to = c[s * stride_c + i + j * ldc];
          to = x * column[i] + (y != 0 ? y * to : T(0));
        }
      }
    }
    return cudaSuccess;
  };
  cudaError_t error = call("cublas gemm", kContext, [&](Lock&) {
    auto stream = find_stream(handle->stream, thread().device);
    return stream ? enqueue(stream, std::move(op)) : cudaErrorInvalidResourceHandle;
  });
  return error ? 13 : 0;  // CUBLAS_STATUS_EXECUTION_FAILED
}
#define GEMM(LETTER, T)                                                                           \
  API int cublas##LETTER##gemm_v2(Handle* h, int ta, int tb, int m, int n, int k, const T* alpha, \
                                  const T* a, int lda, const T* b, int ldb, const T* beta, T* c,  \
                                  int ldc) {                                                      \
    return multiply(h, ta, tb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);         \
  }                                                                                               \
  API int cublas##LETTER##gemmStridedBatched(                                                     \
      Handle* h, int ta, int tb, int m, int n, int k, const T* alpha, const T* a, int lda,        \
      long long int sa, const T* b, int ldb, long long int sb, const T* beta, T* c, int ldc,      \
      long long int sc, int count) {                                                              \
    return multiply(h, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc, count);  \
  }
GEMM(S, float)
GEMM(D, double)
