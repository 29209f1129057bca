// The kernels of this folder as plain functions, for tests and measurements.
#pragma once

#include "grouped_bottleneck.cuh"
#include "normed_branch.cuh"

extern "C" {

// The kernels by themselves, on device pointers, null where an input is not given; `forced` tiles of so many times 16
// tokens, 0 for their own choice. They return a cudaError_t.
int utune_grouped_bottleneck(int bfloat, const void* x, const void* base, const void* residual, const int64_t* task, const void* down,
                             const void* up, const void* bias, const void* down_bias, const void* up_bias, void* out, int rows,
                             int tokens, int in, int outs, int rank, int tasks, int activation, int processors, void* stream, int forced) {
  const utune::Shape s{rows, tokens, in, outs, rank, tasks};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    const auto as = [](const void* p) { return static_cast<const T*>(p); };
    const utune::Inputs<T> given{as(x), as(base), as(residual), task, as(down), as(up), as(bias), as(down_bias), as(up_bias)};
    return utune::run<T>(given, static_cast<T*>(out), s, activation, processors, static_cast<cudaStream_t>(stream), forced);
  };
  return bfloat ? call(__nv_bfloat16{}) : call(__half{});
}

int utune_normed_branch(int bfloat, const void* a, const void* bias, const void* skip, const void* gamma, const void* beta,
                        const int64_t* task, const void* down, const void* up, const void* down_bias, const void* up_bias, void* normed,
                        void* carried, int rows, int tokens, int channels, int rank, int tasks, float epsilon, int activation,
                        int processors, int shared, void* stream, int forced) {
  const utune::NormedShape s{rows, tokens, channels, rank, tasks, epsilon};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    const auto as = [](const void* p) { return static_cast<const T*>(p); };
    const utune::NormedInputs<T> in{as(a), as(bias), as(skip), as(gamma), as(beta), task, as(down), as(up), as(down_bias), as(up_bias)};
    return utune::run_normed<T>(in, static_cast<T*>(normed), static_cast<T*>(carried), s, activation, processors, shared,
                                static_cast<cudaStream_t>(stream), forced);
  };
  return bfloat ? call(__nv_bfloat16{}) : call(__half{});
}
}
