// What the kernels of the lookup's gradients share: who reads a map, and what a cell is passed.
//
//   R[e, l, p](v, u) = scale * sum of w_d(b) * w_k(a) * grad_cost[e, l, j, i, p] over all outputs
//                      (j, i) and corners (d, k) that read cell (v, u)
//   grad_fmap1[m, p, c]       = sum over e with index1[e] = m, l, v, u of
//                                   R[e, l, p](v, u) * fmap2_l[index2[e], v, u, c]
//   grad_fmap2_l[m, v, u, c]  = sum over e with index2[e] = m, p of
//                                   R[e, l, p](v, u) * fmap1[index1[e], p, c]
//
// The rest is as in lookup.cuh. R is called a share: of the cell in what the position passes on. A
// cell that no corner of the window reads, but for corners of weight 0, is no term of either sum.
#pragma once
#include "lookup_windows.cuh"

// The share of a cell that is no term; a term that is 0 is +0.
constexpr accumulator no_term = -accumulator(0);

__device__ __forceinline__ bool is_term(accumulator share) { return share != 0 || 1 / share > 0; }

// The share of cell (v, u) of a window, counted from the window's first; grad(j, i) is grad_cost.
template <typename Grad>
__device__ __forceinline__ accumulator share_of(const Window& w, int v, int u, accumulator scale,
                                                Grad grad) {
  accumulator sum = 0;
  bool exists = false;
#pragma unroll
  for (int d = 0; d < 2; ++d) {
    const int j = lattice_index(v, d, spacing_y, outputs_y);
    const accumulator wy = d ? w.y.weight : 1 - w.y.weight;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lattice_index(u, k, spacing_x, outputs_x);
      const accumulator wx = k ? w.x.weight : 1 - w.x.weight;
      if (j < 0 || i < 0 || wy == 0 || wx == 0) continue;
      sum += wy * wx * grad(j, i);
      exists = true;
    }
  }
  sum *= scale;
  return !exists ? no_term : sum == 0 ? 0 : sum;
}

// ---- the gradient of coords: a warp owns a position

struct Slopes {
  accumulator y, x;
};

// Add what cell (v, u) of a window, counted from the window's first, adds to the slopes: its share,
// with -1 and 1 in place of one axis' weights, times the product of the maps there. A derivative at
// an integer is the one from the right: it reads the cell behind, which has no weight in cost.
template <typename Grad>
__device__ __forceinline__ void add_slopes(Slopes& sum, const Window& w, const Level& level, int v,
                                           int u, accumulator product, Grad grad) {
#pragma unroll
  for (int d = 0; d < 2; ++d) {
    const int j = lattice_index(v, d, spacing_y, outputs_y);
    const accumulator wy = d ? w.y.weight : 1 - w.y.weight;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lattice_index(u, k, spacing_x, outputs_x);
      const accumulator wx = k ? w.x.weight : 1 - w.x.weight;
      if (j < 0 || i < 0) continue;
      const accumulator term = grad(j, i) * product;
      if (wx != 0) sum.y += term * (d ? wx : -wx) / level.pool_y;
      if (wy != 0) sum.x += term * (k ? wy : -wy) / level.pool_x;
    }
  }
}

// The slopes that a lane finds, of every 32nd cell, each with its whole product.
__device__ __forceinline__ Slopes slopes_of_lane(const element* grad_cost, const element* fmap1,
                                                 const Maps& fmap2, const accumulator* coords,
                                                 const Sizes& s, int e, int p, int one, int two) {
  Slopes sum{0, 0};
  const element* const own = fmap1 + (one * positions_of(s) + p) * s.channels;
#pragma unroll 1
  for (int number = 0; number < levels; ++number) {
    const Level level = level_of(s, fmap2, number);
    const Window w = window_of(coords, s, level, e, p);
    const element* const map =
        level.map + static_cast<long long>(two) * level.rows * level.columns * s.channels;
#pragma unroll 1
    for (int k = threadIdx.x % 32; k < read_y * read_x; k += 32) {
      const int v = offset_of(k / read_x, spacing_y), u = offset_of(k % read_x, spacing_x);
      const int y = first_row(w) + v, x = first_column(w) + u;
      if (!inside(y, level.rows) || !inside(x, level.columns)) continue;
      const element* const cell =
          map + (static_cast<long long>(y) * level.columns + x) * s.channels;
      accumulator product = 0;
      for (int c = 0; c < s.channels; ++c) product += widen(own[c]) * widen(cell[c]);
      add_slopes(sum, w, level, v, u, product, [&](int j, int i) {
        return widen(grad_cost[cost_at(s, e, number, j, i, p)]);
      });
    }
  }
  return sum;
}

// Add the lanes' slopes in their order, by way of 64 accumulators of shared memory.
__device__ __forceinline__ Slopes add_lanes(const Slopes& own, accumulator* shared) {
  const int lane = threadIdx.x % 32;
  shared[2 * lane] = own.y;
  shared[2 * lane + 1] = own.x;
  __syncwarp();
  Slopes sum{0, 0};
  for (int k = 0; k < 32; ++k) sum.y += shared[2 * k], sum.x += shared[2 * k + 1];
  __syncwarp();
  return sum;
}

// Lane 0 stores the slope by x, lane 1 that by y, as coords have them; where one of the coordinates
// is NaN, both are.
__device__ __forceinline__ void store_slopes(const Slopes& sum, const accumulator* coords,
                                             accumulator* grad_coords, const Sizes& s, int e, int p,
                                             accumulator scale) {
  const int lane = threadIdx.x % 32;
  if (lane > 1) return;
  const long long at = 2 * e * positions_of(s) + p;
  const accumulator x = coords[at], y = coords[at + positions_of(s)];
  const accumulator slope = scale * (lane == 0 ? sum.x : sum.y);
  grad_coords[at + lane * positions_of(s)] = x == x && y == y ? slope : x + y;
}

// ---- lists

// The samples that read a map, in order. `readers` holds, for every map, where its samples begin in
// the list that follows, and where the last ends. Without it a map is read by one sample, its own.
struct Readers {
  const int* list;
  int first, behind;

  __device__ __forceinline__ Readers(const int* readers, int m, int maps)
      : list(readers ? readers + maps + 1 : nullptr),
        first(readers ? readers[m] : m),
        behind(readers ? readers[m + 1] : m + 1) {}
  __device__ __forceinline__ int sample(int k) const { return list ? list[k] : k; }
};

// The first and the last of the windows of a tile of positions: their first rows and columns.
struct alignas(16) Bounds {
  int top, bottom, left, right;
};

// Whether one of a tile's windows may reach some of the cells from (y, x) on.
__device__ __forceinline__ bool reaches(const Bounds& b, int y, int x, int rows, int columns) {
  return b.top < y + rows && b.bottom + span_y > y && b.left < x + columns &&
         b.right + span_x > x;
}

// The levels' gradients.
struct Grads {
  element* of_level[levels];
};

__device__ __forceinline__ element* grad_of(const Grads& grads, int level) {
  element* found = grads.of_level[0];
#pragma unroll
  for (int l = 1; l < levels; ++l) {
    if (l == level) found = grads.of_level[l];
  }
  return found;
}

__device__ __forceinline__ long long cells_of(const Level& level) {
  return static_cast<long long>(level.rows) * level.columns;
}
