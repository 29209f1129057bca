// The kernels' plain functions. The kernels for bfloat16 are an object of their own, so that two compilers share the work.
#include "../../../export/kernels/grouped_bottleneck.cuh"
#include "../../../export/kernels/normed_branch.cuh"

#define FOR(T, ...)                                                                                                       \
  __VA_ARGS__ template cudaError_t utune::run<T>(const utune::Inputs<T>&, T*, const utune::Shape&, int, int, cudaStream_t, int);         \
  __VA_ARGS__ template cudaError_t utune::run_normed<T>(const utune::NormedInputs<T>&, T*, T*, const utune::NormedShape&, int, int, int, \
                                                        cudaStream_t, int);

#ifdef BFLOAT
FOR(__nv_bfloat16)
#else
FOR(__nv_bfloat16, extern)
#include "../../../export/kernels/functions.cuh"
#endif
