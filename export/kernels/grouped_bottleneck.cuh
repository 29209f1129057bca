// out = base + bias (+ residual) + act(x down^T + down_bias) up^T + up_bias, every row of the batch with its own task.
//
// One block takes a tile of tokens of one row, so it reads one task's matrices straight from the bank: nothing is
// gathered, and neither the hidden activations nor the branch's output pass through device memory. Sums are float32;
// the hidden activations are rounded once, as the standard operators round them.
//
//   x         [B, N, Cin]    base, residual, out  [B, N, Cout]    task  [B] int64, rows of the bank
//   down      [T, R, Cin]    down_bias [T, R]     up [T, Cout, R]    up_bias [T, Cout]    bias [Cout]
//
// Cin and Cout are multiples of 64, R is 16, 32, 64 or 128. A task outside the bank is an error of the caller; here it adds
// nothing, so that no memory outside the bank is read.
#pragma once

#include "tile.cuh"

namespace utune {

struct Shape {
  int rows, tokens, in, out, rank, tasks;
};

template <typename T>
struct Inputs {  // on the device; null where not given: residual, bias, and both biases of the branch
  const T *x, *base, *residual;
  const int64_t* task;
  const T *down, *up, *bias, *down_bias, *up_bias;
};

constexpr int kSums = kChunk + 4;        // floats in a row of the sums on their way out

// Bytes of shared memory of a block with `tile` tokens.
inline size_t shared_bytes(int rank, int tile) {
  size_t down = (size_t)kStages * (tile + rank) * kStride * 2;
  size_t up = (size_t)2 * kChunk * (rank + kPad) * 2 + (size_t)tile * kSums * 4;
  return (size_t)tile * (rank + kPad) * 2 + (down > up ? down : up);
}

// Warps are split kAcross ways over columns and the rest over groups of 16 tokens.
template <typename T, int R, int kAcross>
__global__ void __launch_bounds__(256) grouped_bottleneck(
    const __grid_constant__ Inputs<T> given, T* __restrict__ out, const __grid_constant__ Shape s, int activation) {
  using Pair = typename Two<T>::Pair;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float2 constants[kChunk / 2];
  const int threads = blockDim.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int tile = threads / 32 / kAcross * 16;
  const int row = blockIdx.y, first = blockIdx.x * tile;
  const int group = warp / kAcross, across = warp % kAcross;  // which 16 tokens, which columns
  const int64_t number = given.task[row];
  const bool known = number >= 0 && number < s.tasks;
  const int64_t safe = known ? number : 0;

  T* hidden = reinterpret_cast<T*>(memory);  // [tile, R + kPad]
  T* buffer = hidden + (size_t)tile * (R + kPad);
  const T* x_row = given.x + (int64_t)row * s.tokens * s.in;
  const T* down_task = given.down + safe * R * s.in;
  const T* up_task = given.up + safe * s.out * R;

  // hidden = act(x down^T + down_bias)
  constexpr int kTiles = R / 8;                                // columns of 8
  constexpr int kMine = (kTiles + kAcross - 1) / kAcross;
  float sums[kMine][4] = {};
  auto fetch = [&](int step) {
    T* xs = buffer + (size_t)(step % kStages) * (tile + R) * kStride;
    T* ds = xs + (size_t)tile * kStride;
    const int column = step * kChunk;
    for (int i = thread; i < tile * 8; i += threads) {
      const int t = i / 8, c = i % 8 * 8, token = first + t;
      copy16(xs + t * kStride + c, x_row + (int64_t)(token < s.tokens ? token : 0) * s.in + column + c, token < s.tokens);
    }
    for (int i = thread; i < R * 8; i += threads) {
      const int r = i / 8, c = i % 8 * 8;
      copy16(ds + r * kStride + c, down_task + (int64_t)r * s.in + column + c, true);
    }
  };
  const int steps = s.in / kChunk;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    commit();
  }
  for (int step = 0; step < steps; ++step) {
    arrived<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit();
    const T* xs = buffer + (size_t)(step % kStages) * (tile + R) * kStride;
    const T* ds = xs + (size_t)tile * kStride;
    const T* a_at = xs + (group * 16 + lane % 16) * kStride + lane / 16 * 8;
    const T* b_at = ds + lane % 8 * kStride + lane / 8 * 8;
#pragma unroll
    for (int k = 0; k < kChunk; k += 32) {
      uint32_t a0[4], a1[4];
      load4(a0, a_at + k);
      load4(a1, a_at + k + 16);
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int n = across + j * kAcross;
        if (n < kTiles) {
          uint32_t b[4];
          load4(b, b_at + (size_t)n * 8 * kStride + k);
          multiply<T>(sums[j], a0, b[0], b[1]);
          multiply<T>(sums[j], a1, b[2], b[3]);
        }
      }
    }
  }
  arrived<0>();
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    const int n = (across + j * kAcross) * 8 + lane % 4 * 2;
    if (n < R) {
      const float2 bias = given.down_bias ? Two<T>::unpack(*reinterpret_cast<const Pair*>(given.down_bias + safe * R + n)) : float2{0.f, 0.f};
      T* at = hidden + (group * 16 + lane / 4) * (R + kPad) + n;
      *reinterpret_cast<Pair*>(at) = Two<T>::pack(act(sums[j][0] + bias.x, activation), act(sums[j][1] + bias.y, activation));
      *reinterpret_cast<Pair*>(at + 8 * (R + kPad)) =
          Two<T>::pack(act(sums[j][2] + bias.x, activation), act(sums[j][3] + bias.y, activation));
    }
  }
  __syncthreads();  // hidden is whole, and the buffer is free

  // out = base + residual + hidden up^T + up_bias, in chunks of columns
  T* ups = buffer;                                                                   // [2, kChunk, R + kPad]
  float* leaving = reinterpret_cast<float*>(buffer + (size_t)2 * kChunk * (R + kPad));  // [tile, kSums]
  uint32_t a[R / 16][4];
#pragma unroll
  for (int k = 0; k < R / 16; ++k) load4(a[k], hidden + (group * 16 + lane % 16) * (R + kPad) + k * 16 + lane / 16 * 8);
  auto fetch_up = [&](int chunk) {
    T* to = ups + (size_t)(chunk % 2) * kChunk * (R + kPad);
    for (int i = thread; i < kChunk * (R / 8); i += threads) {
      const int c = i / (R / 8), r = i % (R / 8) * 8;
      copy16(to + c * (R + kPad) + r, up_task + (int64_t)(chunk * kChunk + c) * R + r, true);
    }
  };
  const int chunks = s.out / kChunk;
  constexpr int kOwn = 8 / kAcross;     // columns of 8 in a chunk
  constexpr int kEach = 4 / kAcross;    // pieces of 8 columns that a thread carries out: tile * 8 / threads
  fetch_up(0);
  commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint4 from_base[kEach], from_residual[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * threads, token = first + i / 8, c = chunk * kChunk + i % 8 * 8;
      if (token < s.tokens) {
        const int64_t at = ((int64_t)row * s.tokens + token) * s.out + c;
        from_base[e] = __ldg(reinterpret_cast<const uint4*>(given.base + at));
        if (given.residual) from_residual[e] = __ldg(reinterpret_cast<const uint4*>(given.residual + at));
      }
    }
    arrived<0>();
    __syncthreads();  // this chunk is there, and the sums of the one before have left
    if (chunk + 1 < chunks) fetch_up(chunk + 1);
    commit();
    const T* b_at = ups + (size_t)(chunk % 2) * kChunk * (R + kPad) + lane % 8 * (R + kPad) + lane / 8 * 8;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int n = (across + j * kAcross) * 8;
      float c[4] = {};
      if constexpr (R % 32 == 0) {
#pragma unroll
        for (int k = 0; k < R; k += 32) {
          uint32_t b[4];
          load4(b, b_at + (size_t)n * (R + kPad) + k);
          multiply<T>(c, a[k / 16], b[0], b[1]);
          multiply<T>(c, a[k / 16 + 1], b[2], b[3]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < R; k += 16) {
          const uint32_t* at = reinterpret_cast<const uint32_t*>(
              ups + (size_t)(chunk % 2) * kChunk * (R + kPad) + (size_t)(n + lane / 4) * (R + kPad) + k + lane % 4 * 2);
          multiply<T>(c, a[k / 16], at[0], at[4]);
        }
      }
      float* at = leaving + (group * 16 + lane / 4) * kSums + n + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = float2{c[0], c[1]};
      *reinterpret_cast<float2*>(at + 8 * kSums) = float2{c[2], c[3]};
    }
    if (thread < kChunk / 2) {  // bias + up_bias of these columns, the same for all tokens
      const int c = chunk * kChunk + thread * 2;
      float2 sum{0.f, 0.f};
      if (given.bias) sum = Two<T>::unpack(*reinterpret_cast<const Pair*>(given.bias + c));
      if (given.up_bias) {
        const float2 w = Two<T>::unpack(*reinterpret_cast<const Pair*>(given.up_bias + safe * s.out + c));
        sum.x += w.x;
        sum.y += w.y;
      }
      constants[thread] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * threads, token = first + i / 8, c = i % 8 * 8;
      if (token < s.tokens) {
        const float4* sum = reinterpret_cast<const float4*>(leaving + i / 8 * kSums + c);
        const float4 low = sum[0], high = sum[1];
        const float u[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint4 result;
        Pair* to = reinterpret_cast<Pair*>(&result);
        const Pair* b = reinterpret_cast<const Pair*>(&from_base[e]);
        const Pair* r = reinterpret_cast<const Pair*>(&from_residual[e]);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          float2 y = Two<T>::unpack(b[p]);
          if (known) {
            const float2 w = constants[c / 2 + p];
            y.x += u[2 * p] + w.x;
            y.y += u[2 * p + 1] + w.y;
          }
          if (given.residual) {
            const float2 w = Two<T>::unpack(r[p]);
            y.x += w.x;
            y.y += w.y;
          }
          to[p] = Two<T>::pack(y.x, y.y);
        }
        *reinterpret_cast<uint4*>(out + ((int64_t)row * s.tokens + token) * s.out + chunk * kChunk + c) = result;
      }
    }
  }
}

template <typename T, int R, int kAcross>
cudaError_t launch_tile(const Inputs<T>& given, T* out, const Shape& s, int activation, int groups, cudaStream_t stream) {
  const int tile = groups * 16;
  const size_t bytes = shared_bytes(R, tile);
  auto kernel = grouped_bottleneck<T, R, kAcross>;
  static thread_local size_t allowed = 0;
  if (bytes > allowed) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (status != cudaSuccess) return status;
    allowed = bytes;
  }
  const dim3 grid((s.tokens + tile - 1) / tile, s.rows);
  return start(kernel, grid, groups * kAcross * 32, bytes, stream, given, out, s, activation);
}

// Few rows: small tiles whose columns four warps share. Many rows: the fewest tiles that cover the tokens evenly, since
// every tile reads the task's matrices again; `forced` of these tests and measures a size.
template <typename T, int R>
cudaError_t launch(const Inputs<T>& given, T* out, const Shape& s, int activation, int processors, cudaStream_t stream, int forced) {
  const int sixteens = (s.tokens + 15) / 16, most = R > 64 ? 4 : 8;
  const int tiles = (sixteens + most - 1) / most;
  const bool few = forced ? forced == 1 : s.rows * tiles * 2 <= processors;
  if (few) return launch_tile<T, R, 4>(given, out, s, activation, 1, stream);
  return launch_tile<T, R, 1>(given, out, s, activation, forced ? forced : (sixteens + tiles - 1) / tiles, stream);
}

template <typename T>
cudaError_t run(const Inputs<T>& given, T* out, const Shape& s, int activation, int processors, cudaStream_t stream, int forced = 0) {
  switch (s.rank) {
    case 16: return launch<T, 16>(given, out, s, activation, processors, stream, forced);
    case 32: return launch<T, 32>(given, out, s, activation, processors, stream, forced);
    case 64: return launch<T, 64>(given, out, s, activation, processors, stream, forced);
    case 128: return launch<T, 128>(given, out, s, activation, processors, stream, forced);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace utune
