// The flow-guided lookup, one output per thread: any radius, spacing, levels and sizes.
//
// The sum, the arrays and what is a term: lookup.cuh. Arrays are contiguous, in the order of their
// indices there. A thread sums the products of up to four cells, each over its channels in their
// order, and interpolates between the sums. Threads of neighbouring positions are neighbours.
//
// Launch: any number of blocks of `threads` threads that covers the outputs.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps and of cost
using accumulator = float;  // of sums and of coords
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int threads = 256;
#endif

#include "lookup.cuh"

extern "C" __global__ void __launch_bounds__(threads, 1) lookup_plain(
    const element* __restrict__ fmap1, const Maps fmap2, const accumulator* __restrict__ coords,
    const map_index* __restrict__ index1, const map_index* __restrict__ index2,
    element* __restrict__ cost, const Sizes s, const accumulator scale) {
  long long rest = static_cast<long long>(blockIdx.x) * threads + threadIdx.x;
  const int p = pop(rest, s.height * s.width);
  const int i = pop(rest, outputs_x), j = pop(rest, outputs_y), number = pop(rest, levels);
  if (rest >= s.samples) return;
  const int e = static_cast<int>(rest);
  const int one = map_of(index1, e, s.maps1), two = map_of(index2, e, s.maps2);
  const Level level = level_of(s, fmap2, number);
  const Window w = window_of(coords, s, level, e, p);
  const element* const own = fmap1 + (one * positions_of(s) + p) * s.channels;
  const element* const map =
      level.map + static_cast<long long>(two) * level.rows * level.columns * s.channels;

  // The sum over channels of corner (d, k), if it is a term.
  const auto corner = [&](int d, int k) {
    const int v = w.y.cell + j * spacing_y - reach_y + d;
    const int u = w.x.cell + i * spacing_x - reach_x + k;
    accumulator sum = 0;
    if (one < 0 || two < 0 || !inside(v, level.rows) || !inside(u, level.columns)) return sum;
    const element* const cell =
        map + (static_cast<long long>(v) * level.columns + u) * s.channels;
    for (int c = 0; c < s.channels; ++c) sum += widen(own[c]) * widen(cell[c]);
    return sum;
  };
  const accumulator value =
      interpolate(w, corner(0, 0), corner(0, 1), corner(1, 0), corner(1, 1));
  cost[cost_at(s, e, number, j, i, p)] = narrow<element>(scale * value);
}
