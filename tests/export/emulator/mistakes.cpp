// A small kernel that uses all of the machine, and can be told to make one mistake: the machine has to find it.
#include "../../../export/kernels/tile.cuh"

namespace utune {

enum Mistake {
  kNone, kTooFewWaits, kNoCommit, kNoBarrierAfterCopy, kNoWarpBarrier, kNoWarpBarrierBack, kWarpBarrierOnly, kNoStaticBarrier,
  kTwoWriters, kBeyondShared, kCopyBeyondShared, kBeyondInput, kCopyBeyondInput, kWritesInput, kMisaligned, kBeyondArray,
  kHalfAWarp, kHalfABlock
};

// 64 numbers in another order: through a copy in flight, a warp, the block and a static array.
__global__ void shuffled(float* in, float* out, int mistake) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float last[64];
  float *shared = reinterpret_cast<float*>(memory), *copied = shared + 64;
  const int thread = threadIdx.x;
  const auto is = [&](Mistake m) { return mistake == m; };
  float mine[2] = {};

  if (thread < 16) copy16(copied + thread * 4 + is(kCopyBeyondShared) * 4, in + thread * 4 + is(kCopyBeyondInput) * 4, true);
  if (!is(kNoCommit)) commit();
  if (is(kTooFewWaits))
    arrived<1>();
  else
    arrived<0>();
  if (is(kHalfABlock) && thread < 32) return;
  if (!is(kNoBarrierAfterCopy)) __syncthreads();
  mine[is(kBeyondArray) * 2] = copied[63 - thread];

  shared[thread] = mine[0];
  if (!is(kNoWarpBarrier)) __syncwarp();
  mine[1] = shared[thread ^ 1];
  if (!is(kNoWarpBarrierBack)) __syncwarp();
  shared[thread] = mine[1];
  if (is(kWarpBarrierOnly))
    __syncwarp();
  else
    __syncthreads();
  mine[0] = shared[63 - thread + is(kBeyondShared) * 128];
  if (is(kMisaligned)) mine[0] = reinterpret_cast<const float2*>(shared + 1)->x;

  if (is(kHalfAWarp) && thread % 2) __syncwarp();
  last[is(kTwoWriters) ? thread / 2 : thread] = __shfl_xor_sync(0xffffffff, mine[0], 2);
  if (!is(kNoStaticBarrier)) __syncthreads();
  if (is(kWritesInput)) in[thread] = mine[0];
  out[thread] = last[thread ^ 32];
  if (is(kBeyondInput)) out[thread] += in[thread + 1];
}

}  // namespace utune

extern "C" int cpu_shuffled(float* in, float* out, int mistake) {
  return utune::start(utune::shuffled, dim3(1), 64, 128 * sizeof(float), nullptr, in, out, mistake);
}
