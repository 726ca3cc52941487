// What the kernels of the flow-guided lookup share: sizes, where a position looks, what is a term.
//
//   S_l[e, p](v, u) = sum over c of fmap1[index1[e], p, c] * fmap2_l[index2[e], v, u, c]
//   X = coords[e, 0, p] / pool_x^l, X0 = floor(X), a = X - X0              (Y, Y0, b likewise)
//   cost[e, l, j, i, p] = scale * sum over d, k in {0, 1} of w_d(b) * w_k(a) *
//       S_l[e, p](Y0 + (j - radius_y) * spacing_y + d, X0 + (i - radius_x) * spacing_x + k)
//   w_0(t) = 1 - t, w_1(t) = t
//
// Maps have their channels side by side; each level is an array of its own. p runs over the
// positions of a sample in their order. With x_first, cost has i before j.
//
// No terms are: cells outside of a level, corners of weight 0 (an infinity there is never
// multiplied by 0), and maps that do not exist. A coordinate that is NaN makes its outputs NaN.
//
// Whoever includes this has named the types element, accumulator (of sums and coords) and
// map_index, and the numbers levels, radius_y, spacing_y, pool_y (x likewise) and x_first.
#pragma once
#include "device.cuh"

constexpr int outputs_y = 2 * radius_y + 1, outputs_x = 2 * radius_x + 1;
constexpr int outputs = outputs_y * outputs_x;
constexpr int reach_y = radius_y * spacing_y, reach_x = radius_x * spacing_x;

struct Sizes {
  int samples, maps1, maps2;  // coords have so many, fmap1, and each level
  int channels;               // of a cell; behind the last of the map they are zeros
  int height, width;          // of the positions of a sample
  int rows[levels], columns[levels];
};

// fmap2 and its pooled levels.
struct Maps {
  const element* of_level[levels];
};

struct Level {
  const element* map;
  int rows, columns;
  accumulator pool_y, pool_x;  // pixels of level 0 per cell
};

// Sizes and maps are arguments of a kernel: an index that is known at run time only would make the
// compiler copy them to local memory.
__device__ __forceinline__ Level level_of(const Sizes& s, const Maps& maps, int level) {
  Level found{maps.of_level[0], s.rows[0], s.columns[0], 1, 1};
#pragma unroll
  for (int l = 1; l < levels; ++l) {
    if (l > level) continue;
    found = {maps.of_level[l], s.rows[l], s.columns[l], found.pool_y * pool_y,
             found.pool_x * pool_x};
  }
  return found;
}

__device__ __forceinline__ long long positions_of(const Sizes& s) {
  return static_cast<long long>(s.height) * s.width;
}

// The map that sample e reads; -1 if there is none of that number. Without indices it is its own.
__device__ __forceinline__ int map_of(const map_index* indices, int e, int maps) {
  const long long m = indices ? indices[e] : e;
  return inside<long long>(m, maps) ? static_cast<int>(m) : -1;
}

// Where output (j, i) of sample e and a level is, for position p.
__device__ __forceinline__ long long cost_at(const Sizes& s, int e, int level, int j, int i,
                                             long long p) {
  const int k = x_first ? i * outputs_y + j : j * outputs_x + i;
  return ((static_cast<long long>(e) * levels + level) * outputs + k) * positions_of(s) + p;
}

// ---- where a position looks

// A coordinate in cells: its floor, and how far it lies beyond, which weights the second corner.
struct Place {
  int cell;
  accumulator weight;
};

struct Window {
  Place y, x;
};

__device__ __forceinline__ float round_down(float value) { return floorf(value); }
__device__ __forceinline__ double round_down(double value) { return floor(value); }

// Beyond the clamp, and at both its ends, no cell that is read exists; what is left fits an int.
// NaN looks at the lower end, and keeps its weight.
__device__ __forceinline__ Place place_of(accumulator coordinate, accumulator pool, int size,
                                          int reach) {
  const accumulator scaled = coordinate / pool;
  const accumulator least = static_cast<accumulator>(-reach - 2);
  const accumulator most = static_cast<accumulator>(size) + static_cast<accumulator>(reach + 1);
  const accumulator near = !(scaled > least) ? least : scaled < most ? scaled : most;
  const accumulator below = round_down(near);
  return {static_cast<int>(below), scaled == scaled ? near - below : scaled};
}

__device__ __forceinline__ Window window_of(const accumulator* coords, const Sizes& s,
                                            const Level& level, int e, long long p) {
  const accumulator* const x = coords + 2 * e * positions_of(s) + p;
  return {place_of(x[positions_of(s)], level.pool_y, level.rows, reach_y),
          place_of(x[0], level.pool_x, level.columns, reach_x)};
}

// ---- what is a term

__device__ __forceinline__ accumulator term(accumulator weight, accumulator value) {
  return weight * (weight == 0 ? 0 : value);
}

// The value between two corners.
__device__ __forceinline__ accumulator between(const Place& at, accumulator first,
                                               accumulator second) {
  return term(1 - at.weight, first) + term(at.weight, second);
}

// The value between four: s01 lies to the right of s00, s10 below it. Every kernel interpolates in
// this order, along x and then along y.
__device__ __forceinline__ accumulator interpolate(const Window& w, accumulator s00,
                                                   accumulator s01, accumulator s10,
                                                   accumulator s11) {
  return between(w.y, between(w.x, s00, s01), between(w.x, s10, s11));
}
