// The volume lookup: costs around coordinates, out of a volume that holds them all.
//
// The sum: volume_lookup.cuh; the arrays and what is a term: lookup.cuh.
//
// Threads. A block owns a tile of positions on one level, and a band of outputs_j x outputs_i of
// their outputs. It copies all cells that these read to shared memory; a warp reads whole rows of
// windows. Then a lane owns a position, and a warp some columns of outputs: it goes down a column
// and reads every row once, two cells of it.
//
//     cells      row 0   row 1   row 2         output j lies between rows j and j + 1,
//     outputs        0       1       2         each interpolated along x before
//
// Launch: samples * tiles * bands_y * bands_x * levels blocks of `threads` threads, a multiple of
// `tile`, with the tile's cells and windows in dynamic shared memory.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the volume and of cost
using accumulator = float;  // of sums and of coords
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int tile = 32;
constexpr int outputs_j = 9, outputs_i = 9;
constexpr int threads = 160;
#endif

#include "volume_lookup.cuh"

constexpr int bands_y = ceil_div(outputs_y, outputs_j), bands_x = ceil_div(outputs_x, outputs_i);
constexpr int columns = reads(outputs_i, spacing_x);
constexpr int pitch = pitch_of(reads(outputs_j, spacing_y) * columns);

static_assert(threads % tile == 0, "a column of outputs is a whole tile's");

extern "C" __global__ void __launch_bounds__(threads) volume_cost(
    const Maps volume, const accumulator* __restrict__ coords, element* __restrict__ cost,
    const Sizes s, const accumulator) {
  DYNAMIC_SHARED(accumulator, cells);  // [position][row][column]
  Window* const windows = reinterpret_cast<Window*>(cells + tile * pitch);
  const int positions = s.height * s.width;
  int rest = blockIdx.x;
  const int number = pop(rest, levels);
  const int i0 = pop(rest, bands_x) * outputs_i, j0 = pop(rest, bands_y) * outputs_j;
  const int p0 = pop(rest, ceil_div(positions, tile)) * tile, n = rest;
  const int count = smaller(tile, positions - p0);
  const Level level = level_of(s, volume, number);
  const int thread = threadIdx.x, q = thread % tile;
  if (thread < count) windows[q] = window_of(coords, s, level, n, p0 + q);
  __syncthreads();
  stage_windows<outputs_j, outputs_i>(level.map + map_at(s, level, n, p0), level, windows,
                                               count, j0, i0, cells);
  __syncthreads();

  if (q >= count) return;
  const Window w = windows[q];
#pragma unroll 1
  for (int column = thread / tile; column < outputs_i; column += threads / tile) {
    if (i0 + column >= outputs_x) return;
    const accumulator* const own = cells + q * pitch + first_read(column, spacing_x);
    const auto row = [&](int k) { return between(w.x, own[k * columns], own[k * columns + 1]); };
    element* to = cost + cost_at(s, n, number, j0, i0 + column, p0 + q);
    accumulator below = row(0);
#pragma unroll
    for (int j = 0; j < outputs_j; ++j) {
      if (j0 + j >= outputs_y) break;
      const int k = first_read(j, spacing_y);
      const accumulator above = spacing_y == 1 ? below : row(k);
      below = row(k + 1);
      *to = narrow<element>(between(w.y, above, below));
      to += (x_first ? 1 : outputs_x) * positions_of(s);
    }
  }
}
