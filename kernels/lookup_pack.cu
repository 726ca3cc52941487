// What the flow-guided lookup reads: maps whose cells have their channels side by side, and levels.
//
//   lookup_pack   packed[n, p, c] = map[n, c, p], 0 for c >= channels
//   lookup_pool   level[n, v, u, c] = mean of finer[n, y, x, c] over the pool_y x pool_x cells
//                 (y, x) of cell (v, u)
//
// Arrays are contiguous, in the order of their indices; with channel_step = 1 and position_step =
// channels, the map is one whose channels already lie side by side. A level may have fewer cells
// than finer has groups of pool_y x pool_x, not more.
//
// Threads. A block of lookup_pack owns 32 channels of 32 positions and turns them around in shared
// memory, so that neighbouring threads read and write neighbours. A thread of lookup_pool owns one
// channel of one cell and adds row by row, in `accumulator`, before it divides.
//
// Launch: samples * blocks_c * blocks_p blocks of `threads` threads with 32 * 33 accumulators of
// dynamic shared memory; of lookup_pool, as many as cover the level.

#include "device.cuh"

#ifndef CUPYCORR_CONSTANTS
using element = Half;       // of the map, and of finer
using result = Half;        // element, or accumulator, of packed and level
using accumulator = float;  // of sums
constexpr int pool_y = 2, pool_x = 2;
constexpr int threads = 256;
#endif

constexpr int side = 32, pitch = side + 1;

struct Sizes {
  int channels, padded;
  int positions, channel_step, position_step;
  int blocks_c, blocks_p;
};

extern "C" __global__ void __launch_bounds__(threads) lookup_pack(
    const element* __restrict__ map, result* __restrict__ packed, const Sizes s,
    const accumulator) {
  DYNAMIC_SHARED(accumulator, square);
  const int along = threadIdx.x % side, across = threadIdx.x / side;
  int rest = blockIdx.x;
  const int p0 = pop(rest, s.blocks_p) * side, c0 = pop(rest, s.blocks_c) * side;
  const long long sample = static_cast<long long>(rest) * s.positions;
  for (int k = across; k < side; k += threads / side) {
    const int dc = s.channel_step == 1 ? along : k, dp = s.channel_step == 1 ? k : along;
    const int c = c0 + dc, p = p0 + dp;
    accumulator value = 0;
    if (c < s.channels && p < s.positions) {
      value = widen(map[sample * s.channels + static_cast<long long>(c) * s.channel_step +
                        static_cast<long long>(p) * s.position_step]);
    }
    square[dc * pitch + dp] = value;
  }
  __syncthreads();
  for (int k = across; k < side; k += threads / side) {
    const int c = c0 + along, p = p0 + k;
    if (c >= s.padded || p >= s.positions) continue;
    packed[(sample + p) * s.padded + c] = narrow<result>(square[along * pitch + k]);
  }
}

struct Pooled {
  int channels, finer_rows, finer_columns;
  int samples, rows, columns;
};

extern "C" __global__ void __launch_bounds__(threads) lookup_pool(
    const element* __restrict__ finer, result* __restrict__ level, const Pooled s,
    const accumulator) {
  const long long output = static_cast<long long>(blockIdx.x) * threads + threadIdx.x;
  long long rest = output;
  const int c = pop(rest, s.channels), u = pop(rest, s.columns), v = pop(rest, s.rows);
  if (rest >= s.samples) return;
  accumulator sum = 0;
  for (int y = v * pool_y; y < (v + 1) * pool_y; ++y) {
    const long long row = (rest * s.finer_rows + y) * s.finer_columns;
    for (int x = u * pool_x; x < (u + 1) * pool_x; ++x) {
      sum += widen(finer[(row + x) * s.channels + c]);
    }
  }
  level[output] = narrow<result>(sum / static_cast<accumulator>(pool_y * pool_x));
}
