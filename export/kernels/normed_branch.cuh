// A layer norm and the branch that reads it, in the passes over memory that the norm alone takes:
//
//   sum = a + bias + skip                 the residual stream
//   normed = layer_norm(sum) gamma + beta
//   carried = sum + act(normed down^T + down_bias) up^T + up_bias, every row with its own task
//
// The frozen op reads `normed`; what it gives is added to `carried`, which holds the branch already. One block takes
// some tokens of one row and keeps their sums and norms in shared memory, so the branch costs its products and
// reading its task's matrices, nothing else.
//
//   a, skip, normed, carried  [B, N, C]    bias, gamma, beta  [C]    task  [B] int64, rows of the bank
//   down  [T, R, C]    down_bias  [T, R]    up  [T, C, R]    up_bias  [T, C]
//
// C is a multiple of 64 and at most kWidest, R is 16, 32, 64 or 128. A task outside the bank adds nothing.
#pragma once

#include "tile.cuh"

namespace utune {

constexpr int kWarps = 16;
constexpr int kWidest = 2048;  // channels

struct NormedShape {
  int rows, tokens, channels, rank, tasks;
  float epsilon;
};

template <typename T>
struct NormedInputs {  // on the device; null where not given: bias, skip, and both biases of the branch
  const T *a, *bias, *skip, *gamma, *beta;
  const int64_t* task;
  const T *down, *up, *down_bias, *up_bias;
};

inline size_t normed_bytes(int channels, int rank, int groups) {
  const size_t down = (size_t)kStages * rank * kStride, up = (size_t)kStages * kChunk * (rank + kPad);
  const size_t wide = channels > rank ? channels : rank;
  return ((size_t)2 * groups * 16 * (wide + kPad) + (down > up ? down : up) + channels) * 2;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

// kGroups of 16 tokens; the warps split into as many, and those of one group share the columns.
// kPieces: pieces of 8 channels that one lane holds of a token, 32 lanes to a token.
template <typename T, int R, int kGroups, int kPieces>
__global__ void __launch_bounds__(kWarps * 32)
    normed_branch(const __grid_constant__ NormedInputs<T> in, T* __restrict__ normed, T* __restrict__ carried,
                  const __grid_constant__ NormedShape s, int activation, int tile) {
  using Pair = typename Two<T>::Pair;
  constexpr int kAcross = kWarps / kGroups, kThreads = kWarps * 32;
  extern __shared__ __align__(16) unsigned char memory[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = blockIdx.y, first = blockIdx.x * tile, count = min(tile, s.tokens - first);
  const int C = s.channels, stride = max(C, R) + kPad;  // the hidden activations take the place of the norms
  const int64_t number = in.task[row];
  const bool known = number >= 0 && number < s.tasks;
  const int64_t safe = known ? number : 0;
  T* norms = reinterpret_cast<T*>(memory);              // [kGroups * 16, stride]
  T* sums = norms + (size_t)kGroups * 16 * stride;      // the same
  T* up_bias = sums + (size_t)kGroups * 16 * stride;    // [C]
  T* buffer = up_bias + C;                              // kStages chunks of `down`, then of `up`
  const T* down_task = in.down + safe * R * C;
  const T* up_task = in.up + safe * C * R;
  const int64_t offset = ((int64_t)row * s.tokens + first) * C;

  auto fetch_down = [&](int step) {
    T* to = buffer + (size_t)(step % kStages) * R * kStride;
    for (int i = thread; i < R * 8; i += kThreads)
      copy16(to + i / 8 * kStride + i % 8 * 8, down_task + (int64_t)(i / 8) * C + step * kChunk + i % 8 * 8, true);
  };
  const int steps = C / kChunk;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch_down(step);
    commit();
  }

  const int pieces = C / 8;
  for (int p = thread; p < pieces; p += kThreads)
    *reinterpret_cast<uint4*>(up_bias + p * 8) =
        in.up_bias ? __ldg(reinterpret_cast<const uint4*>(in.up_bias + safe * C + p * 8)) : uint4{0, 0, 0, 0};

  // sum and norm, a warp to a token; what is the same for all tokens stays in registers where they suffice
  constexpr bool kHeld = kPieces <= 2;
  uint4 gammas[kHeld ? kPieces : 1], betas[kHeld ? kPieces : 1], biases[kHeld ? kPieces : 1];
  const auto piece = [&](const T* vector, int p) { return __ldg(reinterpret_cast<const uint4*>(vector + p * 8)); };
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int p = min(lane + k * 32, pieces - 1);
      gammas[k] = piece(in.gamma, p);
      betas[k] = piece(in.beta, p);
      biases[k] = in.bias ? piece(in.bias, p) : uint4{0, 0, 0, 0};
    }
  }
  uint4 next_a[kPieces], next_skip[kPieces];
  auto read = [&](int t) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int p = lane + k * 32;
      if (p < pieces && t < count) {
        next_a[k] = __ldg(reinterpret_cast<const uint4*>(in.a + offset + (int64_t)t * C + p * 8));
        if (in.skip) next_skip[k] = __ldg(reinterpret_cast<const uint4*>(in.skip + offset + (int64_t)t * C + p * 8));
      }
    }
  };
  read(warp);
  for (int t = warp; t < kGroups * 16; t += kWarps) {
    if (t >= count) {  // rows of the products that no token fills
      for (int p = lane; p < pieces; p += 32) *reinterpret_cast<uint4*>(norms + (size_t)t * stride + p * 8) = uint4{0, 0, 0, 0};
      continue;
    }
    uint4 from_a[kPieces], from_skip[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) from_a[k] = next_a[k], from_skip[k] = next_skip[k];
    read(t + kWarps);  // on its way while this token is summed up
    float x[kPieces][8];
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int p = lane + k * 32;
      if (p < pieces) {
        uint4 from_bias = uint4{0, 0, 0, 0};
        if constexpr (kHeld)
          from_bias = biases[k];
        else if (in.bias)
          from_bias = piece(in.bias, p);
        uint4 packed;
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          float2 v = Two<T>::unpack(reinterpret_cast<const Pair*>(&from_a[k])[h]);
          const float2 b = Two<T>::unpack(reinterpret_cast<const Pair*>(&from_bias)[h]);
          v.x += b.x;
          v.y += b.y;
          if (in.skip) {
            const float2 r = Two<T>::unpack(reinterpret_cast<const Pair*>(&from_skip[k])[h]);
            v.x += r.x;
            v.y += r.y;
          }
          const Pair half = Two<T>::pack(v.x, v.y);  // the norm reads what the stream holds
          reinterpret_cast<Pair*>(&packed)[h] = half;
          v = Two<T>::unpack(half);
          x[k][2 * h] = v.x;
          x[k][2 * h + 1] = v.y;
          total += v.x + v.y;
        }
        *reinterpret_cast<uint4*>(sums + (size_t)t * stride + p * 8) = packed;
      }
    }
    const float mean = warp_sum(total) / C;
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < kPieces; ++k)
      if (lane + k * 32 < pieces)
#pragma unroll
        for (int h = 0; h < 8; ++h) squares += (x[k][h] - mean) * (x[k][h] - mean);
    const float inverse = rsqrtf(warp_sum(squares) / C + s.epsilon);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int p = lane + k * 32;
      if (p < pieces) {
        const uint4 g = kHeld ? gammas[kHeld ? k : 0] : piece(in.gamma, p);
        const uint4 b = kHeld ? betas[kHeld ? k : 0] : piece(in.beta, p);
        uint4 packed;
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const float2 w = Two<T>::unpack(reinterpret_cast<const Pair*>(&g)[h]), v = Two<T>::unpack(reinterpret_cast<const Pair*>(&b)[h]);
          reinterpret_cast<Pair*>(&packed)[h] =
              Two<T>::pack((x[k][2 * h] - mean) * inverse * w.x + v.x, (x[k][2 * h + 1] - mean) * inverse * w.y + v.y);
        }
        *reinterpret_cast<uint4*>(norms + (size_t)t * stride + p * 8) = packed;
        *reinterpret_cast<uint4*>(normed + offset + (int64_t)t * C + p * 8) = packed;
      }
    }
  }

  // hidden = act(normed down^T + down_bias)
  const int group = warp / kAcross, across = warp % kAcross;
  constexpr int kTiles = R / 8, kMine = (kTiles + kAcross - 1) / kAcross;
  float hiddens[kMine][4] = {};
  const T* a_at = norms + (size_t)(group * 16 + lane % 16) * stride + lane / 16 * 8;
  for (int step = 0; step < steps; ++step) {
    arrived<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) fetch_down(step + kStages - 1);
    commit();
    const T* b_at = buffer + (size_t)(step % kStages) * R * kStride + lane % 8 * kStride + lane / 8 * 8;
#pragma unroll
    for (int k = 0; k < kChunk; k += 32) {
      uint32_t a0[4], a1[4];
      load4(a0, a_at + step * kChunk + k);
      load4(a1, a_at + step * kChunk + k + 16);
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int n = across + j * kAcross;
        if (n < kTiles) {
          uint32_t b[4];
          load4(b, b_at + (size_t)n * 8 * kStride + k);
          multiply<T>(hiddens[j], a0, b[0], b[1]);
          multiply<T>(hiddens[j], a1, b[2], b[3]);
        }
      }
    }
  }
  arrived<0>();
  __syncthreads();  // the norms are read, and the buffer is free
  auto fetch_up = [&](int chunk) {
    T* to = buffer + (size_t)(chunk % kStages) * kChunk * (R + kPad);
    for (int i = thread; i < kChunk * (R / 8); i += kThreads)
      copy16(to + i / (R / 8) * (R + kPad) + i % (R / 8) * 8, up_task + (int64_t)(chunk * kChunk + i / (R / 8)) * R + i % (R / 8) * 8, true);
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < steps) fetch_up(chunk);
    commit();
  }
  T* hidden = norms;  // [kGroups * 16, R + kPad], where the norms were
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    const int n = (across + j * kAcross) * 8 + lane % 4 * 2;
    if (n < R) {
      const float2 bias = in.down_bias ? Two<T>::unpack(*reinterpret_cast<const Pair*>(in.down_bias + safe * R + n)) : float2{0.f, 0.f};
      T* at = hidden + (size_t)(group * 16 + lane / 4) * (R + kPad) + n;
      *reinterpret_cast<Pair*>(at) = Two<T>::pack(act(hiddens[j][0] + bias.x, activation), act(hiddens[j][1] + bias.y, activation));
      *reinterpret_cast<Pair*>(at + 8 * (R + kPad)) =
          Two<T>::pack(act(hiddens[j][2] + bias.x, activation), act(hiddens[j][3] + bias.y, activation));
    }
  }
  __syncthreads();

  // carried = sum + hidden up^T + up_bias, 64 columns at a time, summed up in place
  uint32_t a[R / 16][4];
#pragma unroll
  for (int k = 0; k < R / 16; ++k)
    load4(a[k], hidden + (size_t)(group * 16 + lane % 16) * (R + kPad) + k * 16 + lane / 16 * 8);
  constexpr int kOwn = (8 + kAcross - 1) / kAcross;
  auto leave = [&](int chunk) {  // these columns are summed up by all warps
    for (int i = thread; i < count * 8; i += kThreads)
      *reinterpret_cast<uint4*>(carried + offset + (int64_t)(i / 8) * C + chunk * kChunk + i % 8 * 8) =
          *reinterpret_cast<const uint4*>(sums + (size_t)(i / 8) * stride + chunk * kChunk + i % 8 * 8);
  };
  for (int chunk = 0; chunk < steps; ++chunk) {
    arrived<kStages - 2>();
    __syncthreads();
    if (chunk + kStages - 1 < steps) fetch_up(chunk + kStages - 1);
    commit();
    if (chunk) leave(chunk - 1);
    const T* up_at = buffer + (size_t)(chunk % kStages) * kChunk * (R + kPad);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int n = (across + j * kAcross) * 8;
      if (n >= kChunk) break;
      float c[4] = {};
      if constexpr (R % 32 == 0) {
#pragma unroll
        for (int k = 0; k < R; k += 32) {
          uint32_t b[4];
          load4(b, up_at + (size_t)(n + lane % 8) * (R + kPad) + k + lane / 8 * 8);
          multiply<T>(c, a[k / 16], b[0], b[1]);
          multiply<T>(c, a[k / 16 + 1], b[2], b[3]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < R; k += 16) {
          const uint32_t* at = reinterpret_cast<const uint32_t*>(up_at + (size_t)(n + lane / 4) * (R + kPad) + k + lane % 4 * 2);
          multiply<T>(c, a[k / 16], at[0], at[4]);
        }
      }
      if (known) {
        const int column = chunk * kChunk + n + lane % 4 * 2;
        const float2 bias = Two<T>::unpack(*reinterpret_cast<const Pair*>(up_bias + column));
        Pair* low = reinterpret_cast<Pair*>(sums + (size_t)(group * 16 + lane / 4) * stride + column);
        Pair* high = reinterpret_cast<Pair*>(sums + (size_t)(group * 16 + lane / 4 + 8) * stride + column);
        const float2 x = Two<T>::unpack(*low), y = Two<T>::unpack(*high);
        *low = Two<T>::pack(x.x + c[0] + bias.x, x.y + c[1] + bias.y);
        *high = Two<T>::pack(y.x + c[2] + bias.x, y.y + c[3] + bias.y);
      }
    }
  }
  __syncthreads();
  leave(steps - 1);
}

template <typename T, int R, int kGroups, int kPieces>
cudaError_t launch_normed(const NormedInputs<T>& in, T* normed, T* carried, const NormedShape& s, int activation, cudaStream_t stream) {
  const size_t bytes = normed_bytes(s.channels, R, kGroups);
  auto kernel = normed_branch<T, R, kGroups, kPieces>;
  static thread_local size_t allowed = 0;
  if (bytes > allowed) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (status != cudaSuccess) return status;
    allowed = bytes;
  }
  const int tiles = (s.tokens + kGroups * 16 - 1) / (kGroups * 16);
  const int tile = (s.tokens + tiles - 1) / tiles;
  return start(kernel, dim3(tiles, s.rows), kWarps * 32, bytes, stream, in, normed, carried, s, activation, tile);
}

// The most tokens to a block that shared memory holds, since every block reads its task's matrices; fewer where the
// rows are too few to keep all processors busy. `forced` groups of 16 tokens measure a size.
template <typename T, int R, int kPieces>
cudaError_t choose_normed(const NormedInputs<T>& in, T* normed, T* carried, const NormedShape& s, int activation, int processors,
                          int shared, cudaStream_t stream, int forced) {
  const auto blocks = [&](int groups) { return s.rows * ((s.tokens + groups * 16 - 1) / (groups * 16)); };
  const auto fits = [&](int groups) { return normed_bytes(s.channels, R, groups) <= (size_t)shared; };
  int groups = 1;
  for (int more : {2, 4})
    if (fits(more) && (forced || blocks(more / 2) > processors)) groups = more;
  if (forced) groups = forced;
  switch (groups) {
    case 4: return launch_normed<T, R, 4, kPieces>(in, normed, carried, s, activation, stream);
    case 2: return launch_normed<T, R, 2, kPieces>(in, normed, carried, s, activation, stream);
    default: return launch_normed<T, R, 1, kPieces>(in, normed, carried, s, activation, stream);
  }
}

template <typename T, int R>
cudaError_t size_normed(const NormedInputs<T>& in, T* normed, T* carried, const NormedShape& s, int activation, int processors,
                        int shared, cudaStream_t stream, int forced) {
  if (s.channels <= 512) return choose_normed<T, R, 2>(in, normed, carried, s, activation, processors, shared, stream, forced);
  if (s.channels <= 768) return choose_normed<T, R, 3>(in, normed, carried, s, activation, processors, shared, stream, forced);
  if (s.channels <= 1280) return choose_normed<T, R, 5>(in, normed, carried, s, activation, processors, shared, stream, forced);
  if (s.channels <= kWidest) return choose_normed<T, R, 8>(in, normed, carried, s, activation, processors, shared, stream, forced);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t run_normed(const NormedInputs<T>& in, T* normed, T* carried, const NormedShape& s, int activation, int processors, int shared,
                       cudaStream_t stream, int forced = 0) {
  switch (s.rank) {
    case 16: return size_normed<T, 16>(in, normed, carried, s, activation, processors, shared, stream, forced);
    case 32: return size_normed<T, 32>(in, normed, carried, s, activation, processors, shared, stream, forced);
    case 64: return size_normed<T, 64>(in, normed, carried, s, activation, processors, shared, stream, forced);
    case 128: return size_normed<T, 128>(in, normed, carried, s, activation, processors, shared, stream, forced);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace utune
