// The gradients of the volume lookup: with respect to every level of the volume, and to coords.
//
//   share[n, l, p](v, u)       = sum of w_d(b) * w_k(a) * grad_cost[n, l, j, i, p] over all outputs
//                                (j, i) and corners (d, k) that read cell (v, u)
//   grad_volume_l[n, p, v, u]  = share[n, l, p](v, u), 0 outside of the window
//   grad_coords[n, 0, p]       = sum over l, j, i of grad_cost / pool_x^l *
//                                sum over d of w_d(b) * (volume_l(.., + 1) - volume_l(.., + 0))
//   grad_coords[n, 1, p]       likewise
//
// The rest: volume_lookup.cuh. A derivative at an integer is the one from the right: it reads the
// cell behind, though that has no weight in cost. A coordinate that is NaN makes both gradients NaN
// and is no term of the others.
//
// Threads. A block owns a tile of positions on all levels. Per level it copies their upstream
// gradients, and for coords the cells of their windows, to shared memory; from these it makes the
// shares of all cells that are read, and the slopes. Then it writes the tile's maps, which lie
// one behind the other, from end to end and 16 bytes at a time. A thread adds the slopes of some
// outputs of one position; at the end they are added in the order of the threads.
//
// Without `staged`, for radii that do not fit in shared memory, all is read where it lies.
//
// Launch: samples * tiles blocks of `threads` threads, a multiple of `tile`, with dynamic shared
// memory for windows, slopes and what is staged.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the volume, grad_volume and grad_cost
using accumulator = float;  // of sums, of coords and their gradient
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int tile = 16;
constexpr bool staged = true;
constexpr bool of_volume = true, of_coords = true;  // which gradients are computed
constexpr int threads = 256;
#endif

#include "volume_lookup.cuh"

constexpr int cell_pitch = pitch_of(read_y * read_x), upstream_pitch = pitch_of(outputs);
constexpr int parts = threads / tile;  // of the outputs of a position
constexpr int width = 16 / static_cast<int>(sizeof(element));

static_assert(threads % tile == 0, "every position has as many threads");

struct Grads {
  element* of_level[levels];
};

struct Slopes {
  accumulator x, y;
};

__device__ __forceinline__ element* grad_of(const Grads& grads, int level) {
  element* found = grads.of_level[0];
#pragma unroll
  for (int l = 1; l < levels; ++l) {
    if (l == level) found = grads.of_level[l];
  }
  return found;
}

// Along an axis: whether outputs read the cell that lies so far behind the window's first, and as
// which of the cells that they read.
__device__ __forceinline__ bool is_read(int offset, int spacing, int outputs) {
  if (spacing == 1) return among(offset, outputs + 1);
  return among(offset, (outputs - 1) * spacing + 2) && offset % spacing < 2;
}
__device__ __forceinline__ int read_at(int offset, int spacing) {
  return spacing == 1 ? offset : offset / spacing * 2 + offset % spacing;
}

// The output that reads cell `read` as its corner d; -1: none.
__device__ __forceinline__ int reader_of(int read, int d, int spacing, int outputs) {
  if (spacing == 1) return among(read - d, outputs) ? read - d : -1;
  return read % 2 == d ? read / 2 : -1;
}

// The share of a cell, read as (row, column); upstream(j, i) is grad_cost. Weights pass on as they
// interpolate: from the four outputs that read the cell.
template <typename Upstream>
__device__ __forceinline__ accumulator share_of(const Window& w, int row, int column,
                                                Upstream upstream) {
  accumulator of_reader[2][2];
#pragma unroll
  for (int d = 0; d < 2; ++d) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int j = reader_of(row, d, spacing_y, outputs_y);
      const int i = reader_of(column, k, spacing_x, outputs_x);
      of_reader[d][k] = j >= 0 && i >= 0 ? upstream(j, i) : 0;
    }
  }
  return interpolate(w, of_reader[0][0], of_reader[0][1], of_reader[1][0], of_reader[1][1]);
}

// Add the slopes of output (j, i); cell(row, column) is the volume's.
template <typename Cell>
__device__ __forceinline__ void add_slopes(Slopes& sum, const Window& w, const Level& level, int j,
                                           int i, accumulator upstream, Cell cell) {
  const int v = first_row(w) + j * spacing_y, u = first_column(w) + i * spacing_x;
  const int row = first_read(j, spacing_y), column = first_read(i, spacing_x);
  accumulator product[2][2];
#pragma unroll
  for (int d = 0; d < 2; ++d) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool exists = among(v + d, level.rows) && among(u + k, level.columns);
      product[d][k] = exists ? upstream * cell(row + d, column + k) : 0;
    }
  }
  sum.x += between(w.y, product[0][1] - product[0][0], product[1][1] - product[1][0]);
  sum.y += between(w.x, product[1][0] - product[0][0], product[1][1] - product[0][1]);
}

// Write the maps of a tile. at(q, row, column) is the share of a cell of position q that is read.
// A thread writes units of 16 bytes; from one to its next it goes on by `stride` cells.
template <typename Share>
__device__ __forceinline__ void write_maps(element* maps, const Level& level,
                                           const Window* windows, int count, Share at) {
  constexpr int stride = threads * width;
  const int cells = cells_of(level), total = count * cells;
  const int columns_on = stride % level.columns, rows_on = stride / level.columns % level.rows;
  const int positions_on = stride / cells;
  // Cells of other tiles in the unit that holds the first.
  const int before =
      static_cast<int>(reinterpret_cast<unsigned long long>(maps) / sizeof(element) % width);
  int first = threadIdx.x * width - before;
  int rest = first + width * cells;  // not negative, as `first` may be
  int u = pop(rest, level.columns), v = pop(rest, level.rows), q = rest - width;

  const auto value_at = [&](int of, int y, int x) {
    const int row = y - first_row(windows[of]), column = x - first_column(windows[of]);
    if (!is_read(row, spacing_y, outputs_y) || !is_read(column, spacing_x, outputs_x)) {
      return element{};
    }
    return narrow<element>(at(of, read_at(row, spacing_y), read_at(column, spacing_x)));
  };
  for (; first < total; first += stride) {
    element values[width] = {};
    if (among(q, count) && u + width <= level.columns) {  // all in a row
      if (among(v - first_row(windows[q]), span_y)) {
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] = value_at(q, v, u + k);
      }
    } else {
      int x = u, y = v, of = q;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (among(of, count)) values[k] = value_at(of, y, x);
        if (++x < level.columns) continue;
        x = 0;
        if (++y < level.rows) continue;
        y = 0;
        ++of;
      }
    }
    if (first >= 0 && first + width <= total) {
      store_neighbours(maps + first, values);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (among(first + k, total)) maps[first + k] = values[k];
      }
    }
    u += columns_on;
    v += rows_on;
    q += positions_on;
    if (u >= level.columns) u -= level.columns, ++v;
    if (v >= level.rows) v -= level.rows, ++q;
  }
}

extern "C" __global__ void __launch_bounds__(threads, 1) volume_gradients(
    const element* __restrict__ grad_cost, const Maps volume,
    const accumulator* __restrict__ coords, const Grads grad_volume,
    accumulator* __restrict__ grad_coords, const Sizes s, const accumulator) {
  DYNAMIC_SHARED(Window, windows);  // [level][position]
  Slopes* const slopes = reinterpret_cast<Slopes*>(windows + levels * tile);
  accumulator* const upstreams =
      reinterpret_cast<accumulator*>(slopes + of_coords * tile * parts);
  accumulator* const cells = upstreams + tile * upstream_pitch;
  accumulator* const shares = cells + of_coords * tile * cell_pitch;
  const int positions = s.height * s.width;
  int rest = blockIdx.x;
  const int p0 = pop(rest, ceil_div(positions, tile)) * tile, n = rest;
  const int count = smaller(tile, positions - p0);
#pragma unroll 1
  for (int k = threadIdx.x; k < levels * tile; k += threads) {
    const int q = k % tile, number = k / tile;
    if (q < count) windows[k] = window_of(coords, s, level_of(s, volume, number), n, p0 + q);
  }
  __syncthreads();

  const int own = threadIdx.x % tile, part = threadIdx.x / tile;
  Slopes sum{0, 0};
#pragma unroll 1
  for (int number = 0; number < levels; ++number) {
    const Level level = level_of(s, volume, number);
    const Window* const of_level = windows + number * tile;
    const element* const from = grad_cost + cost_at(s, n, number, 0, 0, p0);
    const auto read = [&](int q, int k) { return widen(from[k * positions_of(s) + q]); };
    const element* const maps = level.map + map_at(s, level, n, p0);
    if constexpr (staged) {
#pragma unroll 4
      for (int k = part; k < outputs && own < count; k += parts) {
        upstreams[own * upstream_pitch + k] = read(own, k);
      }
      if constexpr (of_coords) {
        stage_windows<outputs_y, outputs_x>(maps, level, of_level, count, 0, 0, cells);
      }
      __syncthreads();
    }
    const auto upstream = [&](int q, int j, int i) {
      const int k = x_first ? i * outputs_y + j : j * outputs_x + i;
      return staged ? upstreams[q * upstream_pitch + k] : read(q, k);
    };
    const auto share = [&](int q, int row, int column) {
      return share_of(of_level[q], row, column, [&](int j, int i) { return upstream(q, j, i); });
    };
    if constexpr (of_coords) {
      Slopes of_maps{0, 0};
      for (int k = part; k < outputs && own < count; k += parts) {
        const int j = k / outputs_x, i = k % outputs_x;
        const Window& w = of_level[own];
        add_slopes(of_maps, w, level, j, i, upstream(own, j, i), [&](int row, int column) {
          if (staged) return cells[own * cell_pitch + row * read_x + column];
          const int v = first_row(w) + offset_of(row, spacing_y);
          const int u = first_column(w) + offset_of(column, spacing_x);
          return widen(maps[own * cells_of(level) + v * level.columns + u]);
        });
      }
      sum.x += of_maps.x / level.pool_x;
      sum.y += of_maps.y / level.pool_y;
    }
    if constexpr (of_volume) {
      element* const to = grad_of(grad_volume, number) + map_at(s, level, n, p0);
      if constexpr (staged) {
        for (int k = part; k < read_y * read_x && own < count; k += parts) {
          shares[own * cell_pitch + k] = share(own, k / read_x, k % read_x);
        }
        __syncthreads();
        write_maps(to, level, of_level, count, [&](int q, int row, int column) {
          return shares[q * cell_pitch + row * read_x + column];
        });
      } else {
        write_maps(to, level, of_level, count, share);
      }
    } else if constexpr (staged) {
      __syncthreads();  // before the next level is staged
    }
  }
  if constexpr (of_coords) {
    slopes[threadIdx.x] = sum;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= count) return;
    Slopes all{0, 0};
    for (int k = 0; k < parts; ++k) {
      all.x += slopes[k * tile + own].x;
      all.y += slopes[k * tile + own].y;
    }
    const long long x = 2 * n * positions_of(s) + p0 + own, y = x + positions_of(s);
    const bool exists = coords[x] == coords[x] && coords[y] == coords[y];
    grad_coords[x] = exists ? all.x : coords[x] + coords[y];
    grad_coords[y] = exists ? all.y : coords[x] + coords[y];
  }
}
