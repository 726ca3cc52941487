// What the kernels of the volume lookup share: tiles of positions, and the cells of their windows.
//
//   cost[n, l, j, i, p] = sum over d, k in {0, 1} of w_d(b) * w_k(a) *
//       volume_l[n, p](Y0 + (j - radius_y) * spacing_y + d, X0 + (i - radius_x) * spacing_x + k)
//
// Each position has a map of its own: a level is volume_l[n, p, v, u], contiguous. The rest is as
// in lookup.cuh. Of its sizes, those of maps and channels are not used.
//
// A tile is `tile` neighbouring positions of a sample. Their cells are read side by side, outputs
// are moved position by position; shared memory turns the one into the other. Whoever includes this
// has also named `tile`, and the `threads` of a block.
#pragma once
#include "lookup_windows.cuh"
#include "staging.cuh"

constexpr int warp = 32;

// Which of the cells that are read an output reads first.
__device__ __forceinline__ int first_read(int output, int spacing) {
  return spacing == 1 ? output : 2 * output;
}

// An int holds the cells of a tile.
__device__ __forceinline__ int cells_of(const Level& level) { return level.rows * level.columns; }

// As `inside`, by one comparison.
__device__ __forceinline__ bool among(int position, int size) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(size);
}

// Where the map of position p of sample n begins.
__device__ __forceinline__ long long map_at(const Sizes& s, const Level& level, int n, int p) {
  return (n * positions_of(s) + p) * cells_of(level);
}

// A pitch of shared memory: odd, so that neighbouring positions lie in different banks.
__host__ __device__ constexpr int pitch_of(int words) { return words | 1; }

// Copy the cells that outputs_j x outputs_i outputs from (j0, i0) on read, of each of `count`
// positions, to rows of `cells`. Where there is no cell, a row has 0. `maps` is the first
// position's map.
//
// A warp copies whole windows. A lane's cells lie at the same places in all of them: these are
// found once, for up to `ahead` cells. So many loads of a lane are under way, of several positions
// if their windows are small.
template <int outputs_j, int outputs_i>
__device__ __forceinline__ void stage_windows(const element* maps, const Level& level,
                                              const Window* windows, int count, int j0, int i0,
                                              accumulator* cells) {
  constexpr int rows = reads(outputs_j, spacing_y), columns = reads(outputs_i, spacing_x);
  constexpr int of_window = rows * columns, pitch = pitch_of(of_window), ahead = 4;
  constexpr int places = smaller(ahead, ceil_div(of_window, warp)), together = ahead / places;
  for (int first = threadIdx.x % warp; first < of_window; first += places * warp) {
    int down[places], across[places], offset[places];
#pragma unroll
    for (int k = 0; k < places; ++k) {
      const int at = first + k * warp;
      down[k] = j0 * spacing_y + offset_of(at / columns, spacing_y);
      across[k] = i0 * spacing_x + offset_of(at % columns, spacing_x);
      offset[k] = down[k] * level.columns + across[k];
    }
#pragma unroll 1
    for (int q = threadIdx.x / warp * together; q < count; q += threads / warp * together) {
      element fetched[together][places];
#pragma unroll
      for (int m = 0; m < together; ++m) {
        const int own = smaller(q + m, count - 1);
        const int top = first_row(windows[own]), left = first_column(windows[own]);
        const element* const window =
            maps + own * cells_of(level) + (top * level.columns + left);
#pragma unroll
        for (int k = 0; k < places; ++k) {
          const bool exists = first + k * warp < of_window && among(top + down[k], level.rows) &&
                              among(left + across[k], level.columns);
          fetched[m][k] = {};
          if (exists) fetched[m][k] = window[offset[k]];
        }
      }
#pragma unroll
      for (int m = 0; m < together; ++m) {
#pragma unroll
        for (int k = 0; k < places; ++k) {
          const int at = first + k * warp;
          if (q + m < count && at < of_window) cells[(q + m) * pitch + at] = widen(fetched[m][k]);
        }
      }
    }
  }
}
