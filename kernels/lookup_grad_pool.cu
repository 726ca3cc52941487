// The adjoint of lookup_pool for all levels: the gradient of a map from those of its levels.
//
//   grad[n, c, y, x] = g_0[n, y, x, c],
//   g_l[n, v, u, c]  = grad_l[n, v, u, c] +
//                          g_{l+1}[n, v / pool_y, u / pool_x, c] / (pool_y * pool_x)
//
// The last term is left out where level l + 1 has no such cell. Arrays are contiguous, in the order
// of their indices. A block owns 32 channels of 32 pixels, adds them from the coarsest level on,
// and turns them around in shared memory, so that both sides move neighbours.
//
// Launch: maps2 * ceil(channels / 32) * ceil(pixels / 32) blocks of `threads` threads with 32 * 33
// accumulators of dynamic shared memory.

#ifndef CUPYCORR_CONSTANTS
using element = float;
using accumulator = float;  // of sums
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int threads = 256;
#endif
#include "lookup.cuh"

extern "C" __global__ void __launch_bounds__(threads) pool_adjoint(
    const Maps grads, element* __restrict__ grad, const Sizes s, const accumulator) {
  DYNAMIC_SHARED(accumulator, square);
  constexpr int side = 32, pitch = side + 1;
  const int along = threadIdx.x % side, across = threadIdx.x / side;
  const int pixels = s.rows[0] * s.columns[0];
  int rest = blockIdx.x;
  const int p0 = pop(rest, ceil_div(pixels, side)) * side;
  const int c0 = pop(rest, ceil_div(s.channels, side)) * side, n = rest;
  for (int k = across; k < side && p0 + k < pixels; k += threads / side) {
    const int c = c0 + along;
    if (c >= s.channels) continue;
    // The levels' cells of a pixel, from the finest to the last that exists.
    accumulator values[levels];
    int v = (p0 + k) / s.columns[0], u = (p0 + k) % s.columns[0], count = 0;
#pragma unroll
    for (int l = 0; l < levels; ++l) {
      values[l] = 0;
      if (count < l || v >= s.rows[l] || u >= s.columns[l]) continue;
      const long long row = static_cast<long long>(n) * s.rows[l] + v;
      values[l] = widen(grads.of_level[l][(row * s.columns[l] + u) * s.channels + c]);
      v /= pool_y, u /= pool_x;
      ++count;
    }
    accumulator sum = 0;
#pragma unroll
    for (int l = levels - 1; l >= 0; --l) {
      if (l < count) sum = values[l] + sum / static_cast<accumulator>(pool_y * pool_x);
    }
    square[k * pitch + along] = sum;
  }
  __syncthreads();
  for (int k = across; k < side && c0 + k < s.channels; k += threads / side) {
    const int p = p0 + along;
    if (p >= pixels) continue;
    grad[(static_cast<long long>(n) * s.channels + c0 + k) * pixels + p] =
        narrow<element>(square[along * pitch + k]);
  }
}
