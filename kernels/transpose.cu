// Exchange the last two axes of an array.
//
//   turned[n, b, a] = given[n, a, b]
//
// With a the channels and b the pixels of a map, `turned` has its channels side by side
// ("channels last"); with a the pixels, it has them apart again.
//
// Threads. A block owns a tile of `side` x `side` elements. A thread moves pairs of neighbours: it
// reads pairs along b, which a warp's other lanes continue, and writes pairs along a.
//
// Launch: samples * blocks_a * blocks_b blocks of `threads` threads, with side * (side + 2)
// elements of dynamic shared memory.

#include "device.cuh"

#ifndef CUPYCORR_CONSTANTS
using element = Half;
using accumulator = float;            // of the scale, which is not used
constexpr bool whole_reads = true;    // every pair along b lies at a multiple of its size
constexpr bool whole_writes = true;   // and every pair along a of the turned array
constexpr int threads = 256;
#endif

#include "staging.cuh"

struct Sizes {
  int size_a, size_b;
  int blocks_a, blocks_b;
};

constexpr int side = 64, pairs = side / 2;
constexpr int pitch = side + 2;  // even, for pairs, and two lanes at most read from a bank

using Pair = Pack<element, 2>;

// Read or write two neighbours, the second only if it exists.
template <bool whole>
__device__ __forceinline__ Pair read_pair(const element* from, bool second) {
  if constexpr (whole) return *reinterpret_cast<const Pair*>(from);
  Pair pair = {};
  pair.values[0] = from[0];
  if (second) pair.values[1] = from[1];
  return pair;
}
template <bool whole>
__device__ __forceinline__ void write_pair(element* to, Pair pair, bool second) {
  if constexpr (whole) {
    *reinterpret_cast<Pair*>(to) = pair;
  } else {
    to[0] = pair.values[0];
    if (second) to[1] = pair.values[1];
  }
}

extern "C" __global__ void __launch_bounds__(threads) transpose(
    const element* __restrict__ given, element* __restrict__ turned, const Sizes s,
    const accumulator) {
  DYNAMIC_SHARED(element, tile);
  const int thread = threadIdx.x;
  int rest = blockIdx.x;
  const int b0 = pop(rest, s.blocks_b) * side, a0 = pop(rest, s.blocks_a) * side, n = rest;
  const long long sample = static_cast<long long>(n) * s.size_a * s.size_b;

  const int along = thread % pairs * 2;
#pragma unroll
  for (int i = thread / pairs; i < side; i += threads / pairs) {
    const int a = a0 + i, b = b0 + along;
    if (a >= s.size_a || b >= s.size_b) continue;
    const element* const from = given + sample + static_cast<long long>(a) * s.size_b + b;
    *reinterpret_cast<Pair*>(tile + i * pitch + along) =
        read_pair<whole_reads>(from, b + 1 < s.size_b);
  }
  __syncthreads();
#pragma unroll
  for (int i = thread / pairs; i < side; i += threads / pairs) {
    const int a = a0 + along, b = b0 + i;
    if (a >= s.size_a || b >= s.size_b) continue;
    const bool second = a + 1 < s.size_a;
    Pair pair = {};
    pair.values[0] = tile[along * pitch + i];
    if (second) pair.values[1] = tile[(along + 1) * pitch + i];
    write_pair<whole_writes>(turned + sample + static_cast<long long>(b) * s.size_a + a, pair,
                             second);
  }
}
