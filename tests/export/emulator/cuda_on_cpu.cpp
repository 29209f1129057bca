// The machine behind cuda_on_cpu.h: one block at a time, its threads as fibers, one running at any moment.
//
// What ends a launch, with the reason in fault():
//   - an access to global memory outside the ranges that the caller named, or a write to one named for reading
//   - an access beyond the bytes of shared memory that the launch asked for
//   - two threads on the same bytes of shared memory, one of them writing, and no barrier between: whatever order the
//     fibers run in, since each cell remembers who touched it since which barrier
//   - bytes of a copy in flight read or written by anyone before the thread that issued it has waited for it
//   - a misaligned access, an index outside an array
//   - threads of a warp at different instructions, or a barrier that not all threads reach
// Shared memory starts as NaN, and so do the bytes that a copy in flight will fill; it lands at the last moment.
#include "cuda_on_cpu.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

constexpr size_t kMost = 232448;  // bytes of shared memory a block may have, as compute capability 9.0
constexpr size_t kDefault = 48 * 1024;
constexpr size_t kStack = 64 * 1024;
constexpr int kLanes = 32;

namespace utune {
alignas(128) thread_local unsigned char memory[kMost];
}

dim3 threadIdx, blockIdx, blockDim;

namespace cpu {
namespace {

using Address = uintptr_t;

struct Copy { unsigned char* to; const void* from; bool inside; };

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  State state;
  bool started;
  int number;
  std::vector<std::vector<Copy>> groups;  // copies in flight; the last group is still open
};

struct Warp {
  int barriers;     // of this warp, so far
  int arrived;
  const char* what;  // the instruction its lanes meet at
  void* operands[kLanes];
};

// Who touched two bytes of shared memory since which barrier.
constexpr int kNobody = -1, kMany = -2;
struct Cell {
  int written_at = -1, writer = kNobody, writer_barriers = 0;
  int read_at = -1, reader = kNobody, reader_warp = kNobody, reader_barriers = 0;
  int in_flight = kNobody;  // the thread that issued the copy
};

struct Range { Address from, to; bool writable; };

std::vector<Range> ranges;
std::unordered_map<const void*, size_t> allowed;
std::vector<Cell> cells(kMost / 2);
std::unordered_map<Address, Cell> static_cells;
std::unique_ptr<unsigned char[]> stacks;
size_t stack_bytes = 0, shared_bytes = 0;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
jmp_buf scheduler;
int barriers = 0;  // of the block, so far
bool failed = false;
char reason[512] = "";
void (*body)(void*);
void* arguments;

void note(const char* format, va_list values) {
  int begun = std::snprintf(reason, sizeof reason, "block (%u, %u)", blockIdx.x, blockIdx.y);
  if (current) begun += std::snprintf(reason + begun, sizeof reason - begun, " thread %d", current->number);
  begun += std::snprintf(reason + begun, sizeof reason - begun, ": ");
  std::vsnprintf(reason + begun, sizeof reason - begun, format, values);
  failed = true;
}

void fail_block(const char* format, ...) {  // by the scheduler
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
}

[[noreturn]] void fail(const char* format, ...) {  // by the fiber that runs; nobody comes back to it
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void yield() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  current = &fiber;
  threadIdx.x = fiber.number;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void fiber_main() {
  body(arguments);
  current->state = kDone;
  yield();
}

__attribute__((noinline)) void begin(Fiber& fiber, int number) {
  fiber.state = kReady;
  fiber.started = false;
  fiber.number = number;
  fiber.groups.assign(1, {});
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks.get() + number * kStack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

// Memory

struct Span { Address from, to; };

Span find_statics() {  // of this library, in this thread
  Span span{reinterpret_cast<Address>(&utune::memory), 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* p) {
        Span& span = *static_cast<Span*>(p);
        const Address data = reinterpret_cast<Address>(info->dlpi_tls_data);
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS && data && span.from >= data && span.from - data < info->dlpi_phdr[i].p_memsz) {
            span = {data, data + info->dlpi_phdr[i].p_memsz};
            return 1;
          }
        return 0;
      },
      &span);
  return span;
}

Span statics;

bool ordered(int thread, int by, int by_barriers) {  // by barriers of their warp
  const int warp = thread / kLanes;
  return by / kLanes == warp && by_barriers < warps[warp].barriers;
}

// `together`: by an instruction in which the lanes of a warp read for each other.
void touch(Cell& cell, int thread, bool write, bool together, size_t at) {
  const int warp = thread / kLanes;
  if (cell.in_flight != kNobody)
    fail("%s shared byte %zu, where a copy of thread %d is in flight", write ? "writes" : "reads", at, cell.in_flight);
  if (cell.written_at == barriers && (together || cell.writer != thread) && !ordered(thread, cell.writer, cell.writer_barriers))
    fail("%s shared byte %zu, which thread %d wrote since the last barrier", write ? "writes" : "reads", at, cell.writer);
  const bool read = cell.read_at == barriers;
  if (write) {
    const bool other = cell.reader_warp != warp || (cell.reader != thread && cell.reader_barriers == warps[warp].barriers);
    if (read && other && cell.reader == kMany) fail("writes shared byte %zu, which others read since the last barrier", at);
    if (read && other) fail("writes shared byte %zu, which thread %d read since the last barrier", at, cell.reader);
    cell.written_at = barriers;
    cell.writer = thread;
    cell.writer_barriers = warps[warp].barriers;
    return;
  }
  const int reader = together ? kMany : thread;
  if (!read) {
    cell.reader = reader;
    cell.reader_warp = warp;
  } else if (cell.reader_warp != warp) {
    cell.reader = cell.reader_warp = kMany;
  } else if (cell.reader_barriers < warps[warp].barriers) {
    cell.reader = reader;
  } else if (cell.reader != reader) {
    cell.reader = kMany;
  }
  cell.read_at = barriers;
  cell.reader_barriers = warps[warp].barriers;
}

size_t shared_offset(const void* p, size_t size, const char* what) {
  const size_t offset = reinterpret_cast<Address>(p) - reinterpret_cast<Address>(utune::memory);
  if (offset >= kMost) fail("%s outside shared memory", what);
  if (offset + size > shared_bytes) fail("%s shared byte %zu, beyond the %zu of the launch", what, offset, shared_bytes);
  return offset;
}

void check_global(Address p, size_t size, bool write, const char* what) {
  for (Range& range : ranges)
    if (p >= range.from && p + size <= range.to) {
      if (write && !range.writable) fail("%s an input", what);
      if (&range != &ranges[0]) std::swap(range, ranges[0]);
      return;
    }
  fail("%s global memory outside all tensors", what);
}

void access(const void* pointer, size_t size, bool write) {
  if (!current) return;  // the host
  const Address p = reinterpret_cast<Address>(pointer), stack = reinterpret_cast<Address>(stacks.get());
  if (p - stack < stack_bytes) return;
  const char* what = write ? "writes" : "reads";
  if (p - reinterpret_cast<Address>(utune::memory) < kMost) {
    const size_t offset = shared_offset(pointer, size, what);
    for (size_t at = offset / 2; at < (offset + size + 1) / 2; ++at) touch(cells[at], current->number, write, false, at * 2);
  } else if (p >= statics.from && p < statics.to) {
    for (Address at = p / 2; at < (p + size + 1) / 2; ++at) {
      const auto [entry, first] = static_cells.try_emplace(at);
      if (first) std::memset(reinterpret_cast<void*>(at * 2), 0xff, 2);  // left over from another block
      touch(entry->second, current->number, write, false, at * 2 - statics.from);
    }
  } else {
    check_global(p, size, write, what);
  }
}

// Warps

// The lanes of a warp meet; the last to come does the work for all.
template <typename Work>
void meet(const char* what, void* operand, Work work) {
  Warp& warp = warps[current->number / kLanes];
  if (warp.arrived && warp.what != what) fail("is at %s, other lanes of its warp at %s", what, warp.what);
  warp.what = what;
  warp.operands[current->number % kLanes] = operand;
  if (++warp.arrived < kLanes) {
    current->state = kAtWarp;
    yield();
    return;
  }
  work(warp);
  warp.arrived = 0;
  Fiber* lanes = &fibers[current->number / kLanes * kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i].state = kReady;
}

void whole(unsigned mask) {
  if (mask != 0xffffffff) fail("a mask of some lanes: not emulated");
}

const char* const kBarrier = "__syncwarp";
const char* const kShuffle = "a shuffle";
const char* const kLoad = "ldmatrix";
const char* const kMultiply = "mma";

// A warp runs until all its lanes wait at the block's barrier or are done, then the next one.
void run_block(int count) {
  while (true) {
    for (int warp = 0; warp < count / kLanes; ++warp)
      for (bool moved = true; moved;) {
        moved = false;
        for (int i = warp * kLanes; i < (warp + 1) * kLanes; ++i)
          if (fibers[i].state == kReady) {
            resume(fibers[i]);
            current = nullptr;
            if (failed) return;
            moved = true;
          }
      }
    int waiting = 0, done = 0;
    for (const Fiber& fiber : fibers) waiting += fiber.state == kAtBlock, done += fiber.state == kDone;
    if (done == count) return;
    if (waiting < count) return fail_block("%d threads wait at a block's barrier and %d are done, of %d", waiting, done, count);
    ++barriers;
    for (Fiber& fiber : fibers) fiber.state = kReady;
  }
}

float table[65536];  // of halves
const bool filled = [] {
  for (int bits = 0; bits < 65536; ++bits) {
    const int exponent = bits >> 10 & 31, rest = bits & 1023;
    const float size = exponent == 31 ? (rest ? NAN : INFINITY) : exponent ? ldexpf(1024 + rest, exponent - 25) : ldexpf(rest, -24);
    table[bits] = bits & 0x8000 ? -size : size;
  }
  return true;
}();

}  // namespace

__half half(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return {0x7fff};
  const float size = fabsf(x);
  if (size >= 65520.f) return {(uint16_t)(sign | 0x7c00)};
  int exponent = 0;
  frexpf(size, &exponent);  // size is in [2^(exponent - 1), 2^exponent)
  if (size == 0.f || exponent < -13) return {(uint16_t)(sign | (uint16_t)nearbyintf(ldexpf(size, 24)))};
  return {(uint16_t)(sign | (((exponent + 13) << 10) + (uint16_t)nearbyintf(ldexpf(size, 11 - exponent))))};
}

__nv_bfloat16 bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float wide(__half x) { return table[x.bits]; }

float wide(__nv_bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

cudaError_t allow(const void* kernel, size_t bytes) {
  if (bytes > kMost) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*run)(void*), void* given, size_t size) {
  const int count = config.blockDim.x;
  const auto limit = allowed.find(kernel);
  failed = false;
  reason[0] = 0;
  if (count < 1 || count > 1024 || count % kLanes || config.gridDim.x < 1 || config.gridDim.y < 1 || config.gridDim.y > 65535)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > (limit == allowed.end() ? kDefault : limit->second)) return cudaErrorInvalidValue;
  const auto add = [](const void* p, size_t bytes) {
    ranges.push_back({reinterpret_cast<Address>(p), reinterpret_cast<Address>(p) + bytes, false});
  };
  const std::vector<Range> named = ranges;
  add(given, size);
  for (const dim3* index : {&threadIdx, &blockIdx, &blockDim}) add(index, sizeof *index);
  body = run;
  arguments = given;
  shared_bytes = config.dynamicSmemBytes;
  statics = find_statics();
  if (stack_bytes < count * kStack) {
    stack_bytes = count * kStack;
    stacks.reset(new unsigned char[stack_bytes]);
  }
  ::blockDim = config.blockDim;
  for (unsigned y = 0; y < config.gridDim.y && !failed; ++y)
    for (unsigned x = 0; x < config.gridDim.x && !failed; ++x) {
      blockIdx = dim3(x, y, 0);
      threadIdx = dim3(0, 0, 0);
      barriers = 0;
      std::memset(utune::memory, 0xff, kMost);
      cells.assign(kMost / 2, Cell{});
      static_cells.clear();
      warps.assign(count / kLanes, Warp{});
      fibers.resize(count);
      for (int i = 0; i < count; ++i) begin(fibers[i], i);
      run_block(count);
    }
  ranges = named;
  return failed ? cudaErrorIllegalAddress : cudaSuccess;
}

void block_barrier() {
  current->state = kAtBlock;
  yield();
}

void warp_barrier(unsigned mask) {
  whole(mask);
  meet(kBarrier, nullptr, [](Warp& warp) { ++warp.barriers; });
}

float shuffle_xor(unsigned mask, float x, int bits) {
  whole(mask);
  struct Lane { float x; int from; float result; } mine{x, current->number % kLanes ^ bits, 0.f};
  meet(kShuffle, &mine, [](Warp& warp) {
    for (void* p : warp.operands) {
      Lane& lane = *static_cast<Lane*>(p);
      lane.result = static_cast<Lane*>(warp.operands[lane.from])->x;
    }
  });
  return mine.result;
}

// ldmatrix.x4: lane 8 j + i names row i of matrix j, eight numbers of 16 bits; of each matrix a lane gets the numbers
// lane % 4 * 2 and the next of row lane / 4.
void load_matrices(uint32_t* r, const void* row) {
  struct Lane { uint32_t* r; const unsigned char* row; } mine{r, static_cast<const unsigned char*>(row)};
  const size_t offset = shared_offset(row, 16, "ldmatrix reads");
  if (offset % 16) fail("ldmatrix of a misaligned row, shared byte %zu", offset);
  for (size_t at = offset / 2; at < offset / 2 + 8; ++at) touch(cells[at], current->number, false, true, at * 2);
  meet(kLoad, &mine, [](Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < 4; ++j) {
        const Lane& source = *static_cast<Lane*>(warp.operands[j * 8 + lane / 4]);
        std::memcpy(&static_cast<Lane*>(warp.operands[lane])->r[j], source.row + lane % 4 * 4, 4);
      }
  });
}

// mma.m16n8k16, c += a b. With g = lane / 4 and t = lane % 4 a lane holds
//   a  [16, 16]   rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8, 2 t + 8 and the next one each
//   b  [16, 8]    column g at rows 2 t, 2 t + 8 and the next one each
//   c  [16, 8]    row g at columns 2 t and the next, row g + 8 likewise
void multiply(bool bfloat, float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  struct Lane { bool bfloat; float* c; const uint32_t* a; uint32_t b[2]; } mine{bfloat, c, a, {b0, b1}};
  meet(kMultiply, &mine, [](Warp& warp) {
    float left[16][16], right[16][8];
    const auto number = [&](const Lane& lane, uint32_t pair, int which) {
      const uint16_t bits = pair >> 16 * which;
      return lane.bfloat ? wide(__nv_bfloat16{bits}) : wide(__half{bits});
    };
    for (int i = 0; i < kLanes; ++i) {
      const Lane& lane = *static_cast<Lane*>(warp.operands[i]);
      const int g = i / 4, t = i % 4;
      for (int which = 0; which < 2; ++which) {
        for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][2 * t + r / 2 * 8 + which] = number(lane, lane.a[r], which);
        for (int r = 0; r < 2; ++r) right[2 * t + r * 8 + which][g] = number(lane, lane.b[r], which);
      }
    }
    for (int m = 0; m < 16; ++m) {
      float sums[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sums[n] += left[m][k] * right[k][n];
      for (int n = 0; n < 8; ++n) static_cast<Lane*>(warp.operands[m % 8 * 4 + n / 2])->c[m / 8 * 2 + n % 2] += sums[n];
    }
  });
}

// A copy counts as a write where it is issued and where it lands; between the two nobody may touch its bytes.
void copy16(void* to, const void* from, bool inside) {
  const size_t offset = shared_offset(to, 16, "a copy writes");
  if (offset % 16 || reinterpret_cast<Address>(from) % 16) fail("a misaligned copy to shared byte %zu", offset);
  if (inside) check_global(reinterpret_cast<Address>(from), 16, false, "a copy reads");
  for (size_t at = offset / 2; at < offset / 2 + 8; ++at) {
    touch(cells[at], current->number, true, false, at * 2);
    cells[at].in_flight = current->number;
  }
  std::memset(to, 0xff, 16);
  current->groups.back().push_back({static_cast<unsigned char*>(to), from, inside});
}

void commit() { current->groups.emplace_back(); }

void arrived(int left) {
  auto& groups = current->groups;
  while ((int)groups.size() - 1 > left) {
    for (const Copy& copy : groups.front()) {
      for (size_t at = (copy.to - utune::memory) / 2, end = at + 8; at < end; ++at) {
        cells[at].in_flight = kNobody;
        touch(cells[at], current->number, true, false, at * 2);
      }
      copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cpu

extern "C" {

// What a test calls: the tensors of the next launches, and why the last one ended.
void cpu_reach(const void* from, size_t bytes, int writable) {
  cpu::ranges.push_back({reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(from) + bytes, writable != 0});
}
void cpu_forget() { cpu::ranges.clear(); }
const char* cpu_fault() { return cpu::reason; }
void cpu_round(int bfloat, const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = bfloat ? cpu::bfloat(from[i]).bits : cpu::half(from[i]).bits;
}
void cpu_widen(int bfloat, const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = bfloat ? cpu::wide(__nv_bfloat16{from[i]}) : cpu::wide(__half{from[i]});
}

// What code compiled with -fsanitize=thread,alignment,bounds calls.
#define ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* p) { cpu::access(p, bytes, false); }         \
  void __tsan_write##bytes(void* p) { cpu::access(p, bytes, true); }         \
  void __tsan_unaligned_read##bytes(void* p) { cpu::access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { cpu::access(p, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { cpu::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { cpu::access(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct Place { const char* file; uint32_t line, column; };
void __ubsan_handle_type_mismatch_v1_abort(Place* place, void*) {
  cpu::fail("a misaligned access at %s:%u", place->file, place->line);
}
void __ubsan_handle_out_of_bounds_abort(Place* place, void*) {
  cpu::fail("an index outside its array at %s:%u", place->file, place->line);
}
}
