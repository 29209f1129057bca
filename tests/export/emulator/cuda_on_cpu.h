// Enough of CUDA for g++ to compile the kernels of export/kernels as they are and to run them block by block.
//
// A thread of a block is a fiber; it runs until it meets a barrier or an instruction of the whole warp. Nothing here
// is fast, everything is strict. cuda_on_cpu.cpp is the machine: it says what ends a launch, and fault() says why.
//
//   kernel sources    g++ -fsanitize=thread,alignment,bounds: every access calls the machine, which knows whose it is
//   the machine       plain g++; it answers those calls itself, the sanitizers' own libraries are not linked
//
// Shared memory of a kernel is `extern __shared__ unsigned char memory[]` in namespace utune, and any static arrays.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // fits in front of `extern` arrays and of arrays in a function alike

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorIllegalAddress = 700
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 threadIdx, blockIdx, blockDim;  // of the fiber that runs

namespace cpu {

__half half(float x);
__nv_bfloat16 bfloat(float x);
float wide(__half x);
float wide(__nv_bfloat16 x);

cudaError_t allow(const void* kernel, size_t bytes);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*), void* arguments, size_t size);

void block_barrier();
void warp_barrier(unsigned mask);
float shuffle_xor(unsigned mask, float x, int bits);
void load_matrices(uint32_t* r, const void* row);
void multiply(bool bfloat, float* c, const uint32_t* a, uint32_t b0, uint32_t b1);
void copy16(void* to, const void* from, bool inside);
void commit();
void arrived(int left);

}  // namespace cpu

inline __half2 __floats2half2_rn(float a, float b) { return {cpu::half(a), cpu::half(b)}; }
inline float2 __half22float2(__half2 p) { return {cpu::wide(p.x), cpu::wide(p.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {cpu::bfloat(a), cpu::bfloat(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 p) { return {cpu::wide(p.x), cpu::wide(p.y)}; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <typename T>
T __ldg(const T* p) { return *p; }

inline void __syncthreads() { cpu::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { cpu::warp_barrier(mask); }
inline float __shfl_xor_sync(unsigned mask, float x, int bits) { return cpu::shuffle_xor(mask, x, bits); }

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return cpu::allow(reinterpret_cast<const void*>(kernel), (size_t)bytes);
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... given) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {given...}};
  const auto body = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); };
  return cpu::launch(reinterpret_cast<const void*>(kernel), *config, body, &call, sizeof call);
}

// The instructions that tile.cuh writes in assembly.
namespace utune {

inline void copy16(void* to, const void* from, bool inside) { cpu::copy16(to, from, inside); }
inline void commit() { cpu::commit(); }
template <int kLeft>
void arrived() { cpu::arrived(kLeft); }
inline void load4(uint32_t (&r)[4], const void* p) { cpu::load_matrices(r, p); }
template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cpu::multiply(std::is_same_v<T, __nv_bfloat16>, c, a, b0, b1);
}

}  // namespace utune
