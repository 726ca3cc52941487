// What the lookup's gradients look up: who reads a map, and where the windows of positions lie.
//
//   list_readers   readers[m]             how many samples have a map below m, m <= maps
//                  readers[maps + 1 + k]  the samples in the order of their maps, then of their own
//   bound_tiles    bounds[e, l, tile]     the first and the last of the windows of tile_y x tile_x
//                                         positions that reach the level; none: beyond each other
//
// Maps are those of `which`: fmap1, or fmap2 and its levels. A sample whose map does not exist
// comes before all others, where no map begins; its place in the list is not written.
//
// Threads. In list_readers a thread owns a map and a sample: it counts what comes before them. In
// bound_tiles a thread owns a position.
//
// Launch: list_readers with as many blocks of `threads` threads as cover maps + 1 and the samples;
// samples * levels * tiles blocks for bound_tiles, of tile_y * tile_x threads with as many Bounds
// of dynamic shared memory.

#ifndef CUPYCORR_CONSTANTS
using element = float;
using accumulator = float;
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int which = 2;
constexpr int tile_y = 8, tile_x = 16;
constexpr int threads = 256;
#endif
#include "lookup_grad.cuh"

extern "C" __global__ void __launch_bounds__(threads) list_readers(
    const map_index* __restrict__ index, int* __restrict__ readers, const Sizes s,
    const accumulator) {
  const int own = blockIdx.x * threads + threadIdx.x;
  const int maps = which == 1 ? s.maps1 : s.maps2;
  const int own_map = own < s.samples ? map_of(index, own, maps) : -1;
  int below = 0, before = 0;  // samples of maps below number `own`; samples listed before `own`
  for (int e = 0; e < s.samples; ++e) {
    const int m = map_of(index, e, maps);  // -1, where there is none, comes before all
    below += m < own;
    before += m < own_map || (m == own_map && e < own);
  }
  if (own <= maps) readers[own] = below;
  if (own_map >= 0) readers[maps + 1 + before] = own;
}

constexpr int positions = tile_y * tile_x;

extern "C" __global__ void __launch_bounds__(positions) bound_tiles(
    const accumulator* __restrict__ coords, Bounds* __restrict__ bounds, const Sizes s,
    const accumulator) {
  DYNAMIC_SHARED(Bounds, found);
  const int thread = threadIdx.x, tiles_x = ceil_div(s.width, tile_x);
  int rest = blockIdx.x;
  const int x = pop(rest, tiles_x) * tile_x + thread % tile_x;
  const int y = pop(rest, ceil_div(s.height, tile_y)) * tile_y + thread / tile_x;
  const int number = pop(rest, levels), e = rest;

  constexpr int far = 1 << 30;
  Bounds own{far, -far, far, -far};
  if (y < s.height && x < s.width) {
    const Level level = level_of(s, {}, number);
    const Window w = window_of(coords, s, level, e, static_cast<long long>(y) * s.width + x);
    const int top = first_row(w), left = first_column(w);
    if (top < level.rows && top + span_y > 0 && left < level.columns && left + span_x > 0) {
      own = {top, top, left, left};
    }
  }
  found[thread] = own;
  for (int half = positions / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    const Bounds other = found[thread + half];
    own = {smaller(own.top, other.top), larger(own.bottom, other.bottom),
           smaller(own.left, other.left), larger(own.right, other.right)};
    found[thread] = own;
  }
  if (thread == 0) bounds[blockIdx.x] = own;
}
