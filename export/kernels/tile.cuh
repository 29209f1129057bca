// What the kernels of this folder share: element types, activations, copies in flight, products of 16 x 8 x 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace utune {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kTanh, kSigmoid, kActivationCount };

constexpr int kChunk = 64;               // columns of one step, in both products
constexpr int kPad = 8;                  // halves behind each row in shared memory: rows start in different banks
constexpr int kStride = kChunk + kPad;   // halves
constexpr int kStages = 3;               // copies in flight

template <typename T>
struct Two;
template <>
struct Two<__half> {
  using Pair = __half2;
  static __device__ Pair pack(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ float2 unpack(Pair p) { return __half22float2(p); }
};
template <>
struct Two<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ Pair pack(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ float2 unpack(Pair p) { return __bfloat1622float2(p); }
};

__device__ inline float act(float x, int kind) {
  switch (kind) {
    case kRelu: return fmaxf(x, 0.f);
    case kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case kGeluTanh: return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kTanh: return tanhf(x);
    case kSigmoid: return 1.f / (1.f + __expf(-x));
    default: return x;
  }
}

template <typename... Parameters, typename... Given>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes, cudaStream_t stream, const Given&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

#ifdef __CUDACC__  // elsewhere cuda_runtime.h is the tests' (tests/export/emulator), which brings these

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ inline void copy16(void* to, const void* from, bool inside) {  // outside, zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0));
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;\n"); }
template <int kLeft>
__device__ inline void arrived() { asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft)); }

__device__ inline void load4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}

template <typename T>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace utune
