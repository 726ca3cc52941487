// The gradients of the flow-guided lookup, plainly: any radius, spacing, levels and sizes.
//
//   plain_grad_fmap1    grad_fmap1[m, p, c]
//   plain_grad_levels   grad_fmap2_l[m, v, u, c]
//   plain_grad_coords   grad_coords[e, 0, p] = scale * sum over l, j, i of grad_cost / pool_x^l *
//                           sum over d of w_d(b) * (S_l(.., + 1) - S_l(.., + 0))
//                       grad_coords[e, 1, p] likewise
//
// The sums: lookup_grad.cuh.
//
// Threads. In the maps' gradients a thread owns one element and gathers all of its terms; it passes
// over tiles of positions whose windows do not reach its cell (bound_tiles). For coords a warp owns
// a position; its lanes share out the cells, and add what they find in their order.
//
// Launch: blocks of `threads` threads that cover the elements of fmap1, or those of all levels; or
// a warp for each position, with 2 * threads accumulators of dynamic shared memory.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps, their gradients and grad_cost
using accumulator = float;  // of sums, of coords and their gradient
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int tile_y = 8, tile_x = 16;
constexpr int threads = 256;
#endif
#include "lookup_grad.cuh"

extern "C" __global__ void __launch_bounds__(threads, 1) plain_grad_fmap1(
    const element* __restrict__ grad_cost, const Maps fmap2,
    const accumulator* __restrict__ coords, const int* __restrict__ readers1,
    const map_index* __restrict__ index2, element* __restrict__ grad_fmap1, const Sizes s,
    const accumulator scale) {
  const long long output = static_cast<long long>(blockIdx.x) * threads + threadIdx.x;
  long long rest = output;
  const int c = pop(rest, s.channels), p = pop(rest, s.height * s.width);
  if (rest >= s.maps1) return;
  const Readers readers(readers1, static_cast<int>(rest), s.maps1);
  accumulator sum = 0;
  for (int k = readers.first; k < readers.behind; ++k) {
    const int e = readers.sample(k), two = map_of(index2, e, s.maps2);
    if (two < 0) continue;
    for (int number = 0; number < levels; ++number) {
      const Level level = level_of(s, fmap2, number);
      const Window w = window_of(coords, s, level, e, p);
      const element* const map = level.map + two * cells_of(level) * s.channels + c;
      for (int row = 0; row < read_y; ++row) {
        const int v = offset_of(row, spacing_y), y = first_row(w) + v;
        if (!inside(y, level.rows)) continue;
        for (int column = 0; column < read_x; ++column) {
          const int u = offset_of(column, spacing_x), x = first_column(w) + u;
          if (!inside(x, level.columns)) continue;
          const accumulator share = share_of(w, v, u, scale, [&](int j, int i) {
            return widen(grad_cost[cost_at(s, e, number, j, i, p)]);
          });
          const long long cell = static_cast<long long>(y) * level.columns + x;
          if (is_term(share)) sum += share * widen(map[cell * s.channels]);
        }
      }
    }
  }
  grad_fmap1[output] = narrow<element>(sum);
}

extern "C" __global__ void __launch_bounds__(threads, 1) plain_grad_levels(
    const element* __restrict__ grad_cost, const element* __restrict__ fmap1,
    const accumulator* __restrict__ coords, const map_index* __restrict__ index1,
    const int* __restrict__ readers2, const Bounds* __restrict__ bounds, const Grads grads,
    const Sizes s, const accumulator scale) {
  long long output = static_cast<long long>(blockIdx.x) * threads + threadIdx.x;
  int number = 0;
#pragma unroll
  for (int l = 0; l < levels; ++l) {
    const long long of_level = static_cast<long long>(s.maps2) * s.rows[l] * s.columns[l] *
                               s.channels;
    if (l == number && output >= of_level) output -= of_level, ++number;
  }
  if (number == levels) return;
  const Level level = level_of(s, {}, number);
  long long rest = output;
  const int c = pop(rest, s.channels), x = pop(rest, level.columns), y = pop(rest, level.rows);
  const Readers readers(readers2, static_cast<int>(rest), s.maps2);
  const int tiles_x = ceil_div(s.width, tile_x), tiles = tiles_x * ceil_div(s.height, tile_y);
  accumulator sum = 0;
  for (int k = readers.first; k < readers.behind; ++k) {
    const int e = readers.sample(k), one = map_of(index1, e, s.maps1);
    if (one < 0) continue;
    const Bounds* const of_tile = bounds + (static_cast<long long>(e) * levels + number) * tiles;
    const element* const map = fmap1 + one * positions_of(s) * s.channels + c;
    for (int tile = 0; tile < tiles; ++tile) {
      if (!reaches(of_tile[tile], y, x, 1, 1)) continue;
      const int y0 = tile / tiles_x * tile_y, x0 = tile % tiles_x * tile_x;
      for (int i = 0; i < tile_y * tile_x; ++i) {
        const int py = y0 + i / tile_x, px = x0 + i % tile_x;
        if (py >= s.height || px >= s.width) continue;
        const long long p = static_cast<long long>(py) * s.width + px;
        const Window w = window_of(coords, s, level, e, p);
        const int v = y - first_row(w), u = x - first_column(w);
        if (!inside(v, span_y) || !inside(u, span_x)) continue;
        const accumulator share = share_of(w, v, u, scale, [&](int j, int i) {
          return widen(grad_cost[cost_at(s, e, number, j, i, p)]);
        });
        if (is_term(share)) sum += share * widen(map[p * s.channels]);
      }
    }
  }
  grad_of(grads, number)[output] = narrow<element>(sum);
}

extern "C" __global__ void __launch_bounds__(threads, 1) plain_grad_coords(
    const element* __restrict__ grad_cost, const element* __restrict__ fmap1, const Maps fmap2,
    const accumulator* __restrict__ coords, const map_index* __restrict__ index1,
    const map_index* __restrict__ index2, accumulator* __restrict__ grad_coords, const Sizes s,
    const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  long long rest = (static_cast<long long>(blockIdx.x) * threads + threadIdx.x) / 32;
  const int p = pop(rest, s.height * s.width);
  if (rest >= s.samples) return;  // a whole warp
  const int e = static_cast<int>(rest);
  const int one = map_of(index1, e, s.maps1), two = map_of(index2, e, s.maps2);
  Slopes own{0, 0};
  if (one >= 0 && two >= 0) {
    own = slopes_of_lane(grad_cost, fmap1, fmap2, coords, s, e, p, one, two);
  }
  const Slopes sum = add_lanes(own, shared + threadIdx.x / 32 * 64);
  store_slopes(sum, coords, grad_coords, s, e, p, scale);
}
