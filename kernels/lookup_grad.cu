// The gradients of the flow-guided lookup, without atomic additions.
//
//   spread_windows      windows[e, l, p, v, u]   the share of each cell of a window; no_term: none
//   lookup_grad_fmap1   grad_fmap1[m, p, c]
//   lookup_grad_levels  grad_fmap2_l[m, v, u, c], or the part of it that a segment finds
//   add_parts           grad_fmap2_l             of levels with several segments
//   lookup_grad_coords  grad_coords
//
// The sums, and what a share is: lookup_grad.cuh. The maps' gradients are products of small
// matrices. A warp owns 8 targets, group_y x group_x neighbours, and its lanes their channels. It
// lists what its targets are passed something from, 32 at a time, and adds
//
//   sum[target][c] += share[item][target] * source[item][c]
//
//                        target            item                       listed from
//   lookup_grad_fmap1    position of fmap1 cell of a level            the box around 8 windows
//   lookup_grad_levels   cell of a level   position whose window      tiles of positions, in order
//                                          reaches one of 8 cells
//
// Where flow is rough, and the box would have more than most_cells, windows are listed one by one.
// Coarse levels have few cells, and many positions for each: there segment s of S takes the tiles
// s, s + S, s + 2 S ... So every sum has one owner and one order.
//
// Where the windows of all levels would take too much memory, those of some levels are stored at a
// time; `running` then keeps the sums of fmap1 between them.
//
// An item that is no term for some of the 8 targets has the share -0 there. That changes no sum,
// unless the source is infinite: a sum that is not finite is added up anew, from its terms alone.
//
// For coords a warp owns a position. Its lanes own channels: each multiplies its own part of a
// cell's product by the cell's slopes, and the lanes' sums are added last.
//
// Threads. Lane i owns `loads` times `unit` neighbouring channels, from (i + 32 * load) * unit on.
// Lanes behind the last channel compute the last ones again, and store nothing.
//
// Launch, in blocks of `threads` threads with this dynamic shared memory, in 4-byte words:
//
//   spread_windows      samples * levels * ceil(positions / 32)     outputs * 33 + 32 * (cells + 1)
//   lookup_grad_fmap1   slices * blocks of positions * maps1        warps * 342
//   lookup_grad_levels  sum of slices * blocks of cells * maps2 * segments over the levels
//                                           warps * (321 + tile_y * tile_x) + 2 * tile_y * tile_x
//   add_parts           enough to cover the levels with several segments
//   lookup_grad_coords  a warp for each position                    warps * 96
//
// A block is warps_y * group_y x warps_x * group_x targets, and a slice 32 * loads * unit channels.
// unit divides the channels, and arrays are aligned to as many elements. A map has fewer than 2^31
// elements.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps, their gradients and grad_cost
using accumulator = float;  // of all else
using map_index = long long;
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
constexpr int group_y = 2, group_x = 4, warps_y = 4, warps_x = 2;
constexpr int unit = 4, loads = 2;
constexpr int tile_y = 8, tile_x = 16;
constexpr int resident = 2;
#endif
#include "lookup_grad.cuh"
#include "staging.cuh"

constexpr int targets = 8, warps = warps_y * warps_x, threads = 32 * warps;
constexpr int block_y = group_y * warps_y, block_x = group_x * warps_x;
constexpr int lane_channels = unit * loads, slice = 32 * lane_channels;
constexpr int tile = tile_y * tile_x;
// Items whose channels are read before they are used: as many as registers hold.
constexpr int at_once = lane_channels * sizeof(element) > 16 ? 2 : 4;
constexpr int most_cells = 256;   // of a box
constexpr int far = 1 << 30;

static_assert(group_y * group_x == targets, "a lane's sums");
static_assert(tile % 32 == 0 && tile <= threads, "a thread finds the window of a position");

struct GradSizes : Sizes {
  int first, behind;     // the levels whose windows are stored: from first to before behind
  int segments[levels];  // 0 of others
};

__device__ __forceinline__ int stored_levels(const GradSizes& s) { return s.behind - s.first; }

// ---- what a warp lists and adds

// 32 items of a warp, in shared memory.
struct Items {
  float* shares;  // of an item's targets, one after the other
  int* at;        // the item's first element in its map

  __device__ __forceinline__ Items(float* shared, int warp)
      : shares(shared + warp * 32 * (targets + 1)),
        at(reinterpret_cast<int*>(shares + 32 * targets)) {}

  // Lanes are targets here, 8 for each of 4 items; share(i) is that of item i for the lane's.
  template <typename Share>
  __device__ __forceinline__ void fill(int lane, Share share) const {
#pragma unroll
    for (int k = 0; k < 32; k += 4) {
      const int i = k + lane / targets;
      shares[i * targets + lane % targets] = share(i);
    }
    __syncwarp();
  }
};
constexpr int item_words = warps * 32 * (targets + 1);

// A lane's channels.
struct Channels {
  int first, count;  // first: of the slice and lane
  __device__ __forceinline__ Channels(int slice_number, int lane, int channels)
      : first(slice_number * slice + lane * unit), count(channels) {}
  __device__ __forceinline__ int of(int load) const { return first + 32 * unit * load; }
  __device__ __forceinline__ bool exist(int load) const { return of(load) < count; }
  __device__ __forceinline__ int to_read(int load) const {
    return smaller(of(load), count - unit);
  }
};

using Sums = float[targets][lane_channels];

// Add `count` items, and up to `at_once` - 1 behind them.
__device__ __forceinline__ void add(Sums& sums, const Items& items, int count, const element* map,
                                    const Channels& channels) {
  const element* from[loads];
#pragma unroll
  for (int load = 0; load < loads; ++load) from[load] = map + channels.to_read(load);
#pragma unroll 1
  for (int item = 0; item < count; item += at_once) {
    Pack<element, unit> values[at_once][loads];
    const auto at = *reinterpret_cast<const Pack<int, at_once>*>(items.at + item);
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
#pragma unroll
      for (int load = 0; load < loads; ++load) {
        values[k][load] =
            *reinterpret_cast<const Pack<element, unit>*>(from[load] + at.values[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      float share[targets];
      load_words(share, items.shares + (item + k) * targets);
      load_words(share + 4, items.shares + (item + k) * targets + 4);
#pragma unroll
      for (int target = 0; target < targets; ++target) {
#pragma unroll
        for (int c = 0; c < lane_channels; ++c) {
          sums[target][c] += share[target] * widen(values[k][c / unit].values[c % unit]);
        }
      }
    }
  }
}

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// Store a target's channels, if all of them are finite; returns whether they are.
template <typename Result>
__device__ __forceinline__ bool store(Result* to, const float (&sums)[lane_channels],
                                      const Channels& channels) {
  bool finite = true;
#pragma unroll
  for (int c = 0; c < lane_channels; ++c) {
    finite &= is_finite(sums[c]) || !channels.exist(c / unit);
  }
  if (!finite) return false;
#pragma unroll
  for (int load = 0; load < loads; ++load) {
    if (!channels.exist(load)) continue;
    Result values[unit];
#pragma unroll
    for (int k = 0; k < unit; ++k) values[k] = narrow<Result>(sums[load * unit + k]);
    store_neighbours(to + channels.of(load), values);
  }
  return true;
}

// Load the sums of a warp as far as they are; at(i) is as below.
template <typename At>
__device__ __forceinline__ void resume(Sums& sums, const float* running, const Channels& channels,
                                       At at) {
#pragma unroll
  for (int i = 0; i < targets; ++i) {
    if (at(i) < 0) continue;
#pragma unroll
    for (int c = 0; c < lane_channels; ++c) {
      sums[i][c] = running[at(i) * channels.count + channels.to_read(c / unit) + c % unit];
    }
  }
}

// Store the sums of a warp. at(i) is the number of target i in grad, -1 where there is none;
// own(i, c, sum) adds the terms of its channel c alone to a sum: to 0, or to what `before` holds.
template <typename Result, typename At, typename Own>
__device__ __forceinline__ void store_all(Result* grad, const Sums& sums, const Channels& channels,
                                          At at, Own own, const float* before) {
  unsigned again = 0;
#pragma unroll
  for (int i = 0; i < targets; ++i) {
    if (at(i) < 0) continue;
    if (!store(grad + at(i) * channels.count, sums[i], channels)) again |= 1u << i;
  }
#pragma unroll 1
  for (int i = 0; again >> i != 0; ++i) {
    if ((again >> i & 1u) == 0) continue;
#pragma unroll 1
    for (int k = 0; k < lane_channels; ++k) {
      if (!channels.exist(k / unit)) continue;
      const int c = channels.of(k / unit) + k % unit;
      const long long to = at(i) * channels.count + c;
      grad[to] = narrow<Result>(own(i, c, before ? before[to] : 0));
    }
  }
}

__device__ __forceinline__ const float* window_at(const float* windows, const GradSizes& s, int e,
                                                  int level, long long p) {
  const long long of_level = static_cast<long long>(e) * stored_levels(s) + level - s.first;
  return windows + (of_level * positions_of(s) + p) * (span_y * span_x);
}

// ---- the shares of all windows; a block owns 32 positions of a level, its warps rows of windows

extern "C" __global__ void __launch_bounds__(threads) spread_windows(
    const element* __restrict__ grad_cost, const accumulator* __restrict__ coords,
    float* __restrict__ windows, const GradSizes s, const accumulator scale) {
  DYNAMIC_SHARED(float, upstream);
  constexpr int cells = span_y * span_x, pitch = 33, cell_pitch = cells + 1;  // both odd
  float* const shares = upstream + outputs * pitch;
  const int thread = threadIdx.x, lane = thread % 32, area = s.height * s.width;
  int rest = blockIdx.x;
  const int p0 = pop(rest, ceil_div(area, 32)) * 32;
  const int number = s.first + pop(rest, stored_levels(s)), e = rest;
  const int here = smaller(32, area - p0), p = p0 + smaller(lane, here - 1);
  for (int k = thread / 32; k < outputs; k += warps) {
    const long long at = cost_at(s, e, number, k / outputs_x, k % outputs_x, p);
    upstream[k * pitch + lane] = scale * widen(grad_cost[at]);
  }
  const Window w = window_of(coords, s, level_of(s, {}, number), e, p);
  const accumulator before = 1 - w.x.weight, behind = w.x.weight;
  __syncthreads();
  for (int v = thread / 32; v < span_y; v += warps) {
    // What a row of the window gets from each column of outputs, as first and as second corner.
    const int above = lattice_index(v, 0, spacing_y, outputs_y);
    const int below = lattice_index(v, 1, spacing_y, outputs_y);
    const bool is_first = above >= 0 && w.y.weight != 1, is_second = below >= 0 && w.y.weight != 0;
    float columns[outputs_x];
#pragma unroll
    for (int i = 0; i < outputs_x; ++i) {
      columns[i] = 0;
      const float* const of_column = upstream + i * pitch + lane;
      if (is_first) columns[i] += (1 - w.y.weight) * of_column[above * outputs_x * pitch];
      if (is_second) columns[i] += w.y.weight * of_column[below * outputs_x * pitch];
    }
#pragma unroll
    for (int u = 0; u < span_x; ++u) {
      const int left = lattice_index(u, 0, spacing_x, outputs_x);
      const int right = lattice_index(u, 1, spacing_x, outputs_x);
      const bool is_left = left >= 0 && before != 0, is_right = right >= 0 && behind != 0;
      float sum = 0;
      if (is_left) sum += before * columns[larger(left, 0)];
      if (is_right) sum += behind * columns[larger(right, 0)];
      const bool exists = (is_first || is_second) && (is_left || is_right);
      shares[lane * cell_pitch + v * span_x + u] = !exists ? no_term : sum == 0 ? 0 : sum;
    }
  }
  __syncthreads();
  float* const to = const_cast<float*>(window_at(windows, s, e, number, p0));
  for (int at = thread; at < here * cells; at += threads) {
    to[at] = shares[at / cells * cell_pitch + at % cells];
  }
}

// ---- fmap1

// A window: its first cell, and the rows and columns of it that exist. It may be none.
struct Reach {
  int y, x;
  int top, behind, left, right;
};

__device__ __forceinline__ Reach reach_of(const accumulator* coords, const Sizes& s,
                                          const Level& level, int e, int y, int x) {
  constexpr Reach none{far, far, far, -far, far, -far};
  if (y >= s.height || x >= s.width) return none;
  const Window w = window_of(coords, s, level, e, static_cast<long long>(y) * s.width + x);
  const int row = first_row(w), column = first_column(w);
  const Reach found{row, column, larger(row, 0), smaller(row + span_y, level.rows),
                    larger(column, 0), smaller(column + span_x, level.columns)};
  return found.top < found.behind && found.left < found.right ? found : none;
}

extern "C" __global__ void __launch_bounds__(threads, resident) lookup_grad_fmap1(
    const float* __restrict__ windows, const Maps fmap2, const accumulator* __restrict__ coords,
    const int* __restrict__ readers1, const map_index* __restrict__ index2,
    float* __restrict__ running, element* __restrict__ grad_fmap1, const GradSizes s,
    const accumulator) {
  DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Items items(shared, warp);
  Reach* const reach = reinterpret_cast<Reach*>(shared + item_words) + warp * (targets + 1);
  int rest = blockIdx.x;
  const Channels channels(pop(rest, ceil_div(s.channels, slice)), lane, s.channels);
  const int x0 = pop(rest, ceil_div(s.width, block_x)) * block_x + warp % warps_x * group_x;
  const int y0 = pop(rest, ceil_div(s.height, block_y)) * block_y + warp / warps_x * group_y;
  const int m = rest;
  const auto position = [&](int i) {
    return static_cast<long long>(y0 + i / group_x) * s.width + x0 + i % group_x;
  };
  if (y0 >= s.height || x0 >= s.width) return;
  const auto at = [&](int i) {
    const bool exists = y0 + i / group_x < s.height && x0 + i % group_x < s.width;
    return exists ? m * positions_of(s) + position(i) : -1;
  };

  Sums sums = {};
  if (s.first > 0) resume(sums, running, channels, at);
  const Readers readers(readers1, m, s.maps1);
#pragma unroll 1
  for (int k = readers.first; k < readers.behind; ++k) {
    const int e = readers.sample(k), two = map_of(index2, e, s.maps2);
    if (two < 0) continue;
#pragma unroll 1
    for (int number = s.first; number < s.behind; ++number) {
      const Level level = level_of(s, fmap2, number);
      const element* const map = level.map + two * cells_of(level) * s.channels;
      const int target = lane % targets;
      const float* const window = window_at(windows, s, e, number, position(target));
      __syncwarp();
      if (lane < targets) {
        reach[lane] =
            reach_of(coords, s, level, e, y0 + lane / group_x, x0 + lane % group_x);
      }
      __syncwarp();
      Reach all = reach[0];
#pragma unroll
      for (int i = 1; i < targets; ++i) {
        all.top = smaller(all.top, reach[i].top);
        all.behind = larger(all.behind, reach[i].behind);
        all.left = smaller(all.left, reach[i].left);
        all.right = larger(all.right, reach[i].right);
      }
      if (all.top >= all.behind) continue;
      if (lane == 0) reach[targets] = all;
      __syncwarp();
      const bool together = (all.behind - all.top) * static_cast<long long>(
                                all.right - all.left) <= most_cells;
#pragma unroll 1
      for (int entry = together ? targets : 0; entry < (together ? targets + 1 : targets);
           ++entry) {
        const Reach &box = reach[entry], &own = reach[target];
        const int columns = box.right - box.left;
        const int cells = box.top < box.behind ? (box.behind - box.top) * columns : 0;
        const bool listed = entry == targets || entry == target;
#pragma unroll 1
        for (int first = 0; first < cells; first += 32) {
          const int cell = smaller(first + lane, cells - 1);
          const int row = cell / columns, column = cell % columns;
          items.at[lane] = row << 16 | column;
          __syncwarp();
          items.fill(lane, [&](int i) {
            const int v = box.top - own.y + (items.at[i] >> 16);
            const int u = box.left - own.x + (items.at[i] & 0xffff);
            const bool reads = first + i < cells && listed && inside(v, span_y) &&
                               inside(u, span_x);
            return reads ? window[v * span_x + u] : no_term;
          });
          items.at[lane] =
              ((box.top + row) * level.columns + box.left + column) * s.channels;
          __syncwarp();
          add(sums, items, smaller(cells - first, 32), map, channels);
          __syncwarp();
        }
      }
    }
  }

  const auto own_terms = [&](int i, int c, float sum) {
#pragma unroll 1
    for (int k = readers.first; k < readers.behind; ++k) {
      const int e = readers.sample(k), two = map_of(index2, e, s.maps2);
      if (two < 0) continue;
#pragma unroll 1
      for (int number = s.first; number < s.behind; ++number) {
        const Level level = level_of(s, fmap2, number);
        const Reach own = reach_of(coords, s, level, e, y0 + i / group_x, x0 + i % group_x);
        const float* const window = window_at(windows, s, e, number, position(i));
#pragma unroll 1
        for (int y = own.top; y < own.behind; ++y) {
#pragma unroll 1
          for (int x = own.left; x < own.right; ++x) {
            const float share = window[(y - own.y) * span_x + x - own.x];
            const long long cell = (static_cast<long long>(two) * level.rows + y) *
                                       level.columns + x;
            if (is_term(share)) sum += share * widen(level.map[cell * s.channels + c]);
          }
        }
      }
    }
    return sum;
  };
  const float* const before = s.first > 0 ? running : nullptr;
  if (s.behind < levels) {
    store_all(running, sums, channels, at, own_terms, before);
  } else {
    store_all(grad_fmap1, sums, channels, at, own_terms, before);
  }
}

// ---- the levels of fmap2

// Tiles of the positions of all samples that read a map, numbered through.
struct Tiles {
  Readers readers;
  int across, of_sample, width;

  __device__ __forceinline__ Tiles(const int* readers2, int m, const Sizes& s)
      : readers(readers2, m, s.maps2), across(ceil_div(s.width, tile_x)),
        of_sample(across * ceil_div(s.height, tile_y)), width(s.width) {}
  __device__ __forceinline__ int count() const {
    return (readers.behind - readers.first) * of_sample;
  }
  __device__ __forceinline__ int sample(int number) const {
    return readers.sample(readers.first + number / of_sample);
  }
  __device__ __forceinline__ Bounds bounds(const Bounds* all, int number, int level) const {
    const long long of = static_cast<long long>(sample(number)) * levels + level;
    return all[of * of_sample + number % of_sample];
  }
  // The row and column of a tile's position i; its number is row * width + column.
  __device__ __forceinline__ int row(int number, int i) const {
    return number % of_sample / across * tile_y + i / tile_x;
  }
  __device__ __forceinline__ int column(int number, int i) const {
    return number % of_sample % across * tile_x + i % tile_x;
  }
};

__device__ __forceinline__ int pieces_of(const GradSizes& s, int level) {
  return ceil_div(s.channels, slice) * ceil_div(s.columns[level], block_x) *
         ceil_div(s.rows[level], block_y) * s.segments[level] * s.maps2;
}

__device__ __forceinline__ long long elements_of(const GradSizes& s, int level) {
  return static_cast<long long>(s.maps2) * s.rows[level] * s.columns[level] * s.channels;
}

// Coarse levels come first: they have the most to do for each cell.
extern "C" __global__ void __launch_bounds__(threads, resident) lookup_grad_levels(
    const float* __restrict__ windows, const element* __restrict__ fmap1,
    const accumulator* __restrict__ coords, const map_index* __restrict__ index1,
    const int* __restrict__ readers2, const Bounds* __restrict__ bounds,
    float* __restrict__ parts, const Grads grads, const GradSizes s, const accumulator) {
  DYNAMIC_SHARED(float, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Items items(shared, warp);
  int* const places = reinterpret_cast<int*>(shared + item_words);  // y, then x
  int* const listed = places + 2 * tile + warp * tile;
  int* const hits = places + 2 * tile + warps * tile;
  int* const counts = hits + threads;

  int rest = blockIdx.x, number = levels - 1, segments = 1;
#pragma unroll
  for (int l = levels - 1; l >= 0; --l) {
    if (l != number) continue;
    segments = s.segments[l];
    if (rest < pieces_of(s, l)) continue;
    rest -= pieces_of(s, l);
    if (segments > 1) parts += segments * elements_of(s, l);
    --number;
  }
  const Level level = level_of(s, {}, number);
  const Channels channels(pop(rest, ceil_div(s.channels, slice)), lane, s.channels);
  const int block_x0 = pop(rest, ceil_div(level.columns, block_x)) * block_x;
  const int block_y0 = pop(rest, ceil_div(level.rows, block_y)) * block_y;
  const int segment = pop(rest, segments), m = rest;
  const int x0 = block_x0 + warp % warps_x * group_x, y0 = block_y0 + warp / warps_x * group_y;
  const int y = y0 + lane % targets / group_x, x = x0 + lane % targets % group_x;  // of the lane
  const bool owns = y0 < level.rows && x0 < level.columns;
  const Tiles tiles(readers2, m, s);

  Sums sums = {};
#pragma unroll 1
  for (int first = segment; first < tiles.count(); first += threads * segments) {
    // The next tiles that reach the block's cells, in order.
    const int own = first + thread * segments;
    const bool hit = own < tiles.count() && reaches(tiles.bounds(bounds, own, number), block_y0,
                                                    block_x0, block_y, block_x);
    const unsigned votes = __ballot_sync(~0u, hit);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int k = 0; k < warps; ++k) {
      before += k < warp ? counts[k] : 0;
      all += counts[k];
    }
    if (hit) hits[before + __popc(votes & ((1u << lane) - 1))] = own;
#pragma unroll 1
    for (int h = 0; h < all; ++h) {
      __syncthreads();
      const int hit_tile = hits[h], e = tiles.sample(hit_tile);
      if (thread < tile) {
        const Reach found = reach_of(coords, s, level, e, tiles.row(hit_tile, thread),
                                     tiles.column(hit_tile, thread));
        places[thread] = found.y;
        places[tile + thread] = found.x;
      }
      __syncthreads();
      const int one = map_of(index1, e, s.maps1);
      if (one < 0) continue;
      const element* const map = fmap1 + one * positions_of(s) * s.channels;
      const float* const window = window_at(windows, s, e, number, 0);
      const int p0 = tiles.row(hit_tile, 0) * s.width + tiles.column(hit_tile, 0);
      const auto position = [&](int i) { return p0 + i / tile_x * s.width + i % tile_x; };
      // Its windows that reach the warp's cells.
      int count = 0;
#pragma unroll
      for (int i = lane; i < tile; i += 32) {
        const int top = places[i], left = places[tile + i];
        const bool reads = owns && top < y0 + group_y && top + span_y > y0 &&
                           left < x0 + group_x && left + span_x > x0;
        const unsigned of_lanes = __ballot_sync(~0u, reads);
        if (reads) listed[count + __popc(of_lanes & ((1u << lane) - 1))] = i;
        count += __popc(of_lanes);
      }
      __syncwarp();
#pragma unroll 1
      for (int next = 0; next < count; next += 32) {
        const int own_item = listed[smaller(next + lane, count - 1)];
        items.at[lane] = own_item;
        __syncwarp();
        items.fill(lane, [&](int i) {
          const int at = items.at[i];
          const int v = y - places[at], u = x - places[tile + at];
          const bool reads = next + i < count && inside(v, span_y) && inside(u, span_x);
          const long long before = static_cast<long long>(position(at)) * (span_y * span_x);
          return reads ? window[before + v * span_x + u] : no_term;
        });
        items.at[lane] = position(own_item) * s.channels;
        __syncwarp();
        add(sums, items, smaller(count - next, 32), map, channels);
        __syncwarp();
      }
    }
    __syncthreads();
  }

  const auto own_terms = [&](int i, int c, float sum) {
    const int v = y0 + i / group_x, u = x0 + i % group_x;
#pragma unroll 1
    for (int k = segment; k < tiles.count(); k += segments) {
      if (!reaches(tiles.bounds(bounds, k, number), v, u, 1, 1)) continue;
      const int e = tiles.sample(k), one = map_of(index1, e, s.maps1);
      if (one < 0) continue;
#pragma unroll 1
      for (int j = 0; j < tile; ++j) {
        const int row = tiles.row(k, j), column = tiles.column(k, j);
        const Reach found = reach_of(coords, s, level, e, row, column);
        if (!inside(v - found.y, span_y) || !inside(u - found.x, span_x)) continue;
        const long long p = static_cast<long long>(row) * s.width + column;
        const float* const window = window_at(windows, s, e, number, p);
        const float share = window[(v - found.y) * span_x + u - found.x];
        const long long position = one * positions_of(s) + p;
        if (is_term(share)) sum += share * widen(fmap1[position * s.channels + c]);
      }
    }
    return sum;
  };
  const auto at = [&](int i) {
    const int v = y0 + i / group_x, u = x0 + i % group_x;
    const bool exists = v < level.rows && u < level.columns;
    return exists ? m * cells_of(level) + static_cast<long long>(v) * level.columns + u : -1;
  };
  if (segments > 1) {
    parts += segment * (s.maps2 * cells_of(level) * s.channels);
    store_all(parts, sums, channels, at, own_terms, nullptr);
  } else {
    store_all(grad_of(grads, number), sums, channels, at, own_terms, nullptr);
  }
}

extern "C" __global__ void __launch_bounds__(threads) add_parts(const float* __restrict__ parts,
                                                                const Grads grads,
                                                                const GradSizes s,
                                                                const accumulator) {
  long long at = static_cast<long long>(blockIdx.x) * threads + threadIdx.x;
  int number = levels - 1, segments = 1;
  long long elements = 0;
#pragma unroll
  for (int l = levels - 1; l >= 0; --l) {
    if (l != number) continue;
    segments = s.segments[l];
    elements = segments > 1 ? elements_of(s, l) : 0;
    if (at < elements) continue;
    at -= elements;
    parts += segments * elements;
    --number;
  }
  if (number < 0) return;
  float sum = 0;
  for (int k = 0; k < segments; ++k) sum += parts[k * elements + at];
  grad_of(grads, number)[at] = narrow<element>(sum);
}

// ---- coords

extern "C" __global__ void __launch_bounds__(threads, resident) lookup_grad_coords(
    const element* __restrict__ grad_cost, const element* __restrict__ fmap1, const Maps fmap2,
    const accumulator* __restrict__ coords, const map_index* __restrict__ index1,
    const map_index* __restrict__ index2, accumulator* __restrict__ grad_coords,
    const GradSizes s, const accumulator scale) {
  DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const slopes = shared + warp * 96;  // y and x of 32 cells, one after the other
  int* const at = reinterpret_cast<int*>(slopes + 64);
  long long rest = static_cast<long long>(blockIdx.x) * warps + warp;
  const int p = pop(rest, s.height * s.width);
  if (rest >= s.samples) return;
  const int e = static_cast<int>(rest);
  const int one = map_of(index1, e, s.maps1), two = map_of(index2, e, s.maps2);
  Slopes sum{0, 0};
#pragma unroll 1
  for (int part = 0; one >= 0 && two >= 0 && part < ceil_div(s.channels, slice); ++part) {
    const Channels channels(part, lane, s.channels);
    float own[lane_channels];
#pragma unroll
    for (int c = 0; c < lane_channels; ++c) own[c] = 0;
    const element* const position = fmap1 + (one * positions_of(s) + p) * s.channels;
#pragma unroll
    for (int load = 0; load < loads; ++load) {
      if (!channels.exist(load)) continue;
#pragma unroll
      for (int k = 0; k < unit; ++k) own[load * unit + k] = widen(position[channels.of(load) + k]);
    }
#pragma unroll 1
    for (int number = 0; number < levels; ++number) {
      const Level level = level_of(s, fmap2, number);
      const Window w = window_of(coords, s, level, e, p);
      const element* const map = level.map + two * cells_of(level) * s.channels;
#pragma unroll 1
      for (int first = 0; first < read_y * read_x; first += 32) {
        // A cell that does not exist has no slopes; the first of the map stands for it.
        const int k = first + lane;
        const int v = offset_of(k / read_x, spacing_y), u = offset_of(k % read_x, spacing_x);
        const int y = first_row(w) + v, x = first_column(w) + u;
        const bool exists =
            k < read_y * read_x && inside(y, level.rows) && inside(x, level.columns);
        Slopes found{0, 0};
        if (exists) {
          add_slopes(found, w, level, v, u, 1, [&](int j, int i) {
            return widen(grad_cost[cost_at(s, e, number, j, i, p)]);
          });
        }
        slopes[2 * lane] = found.y;
        slopes[2 * lane + 1] = found.x;
        at[lane] = exists ? (y * level.columns + x) * s.channels : 0;
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < smaller(32, read_y * read_x - first); ++i) {
          float product = 0;
#pragma unroll
          for (int load = 0; load < loads; ++load) {
            const auto values = *reinterpret_cast<const Pack<element, unit>*>(
                map + at[i] + channels.to_read(load));
#pragma unroll
            for (int c = 0; c < unit; ++c) {
              product += own[load * unit + c] * widen(values.values[c]);
            }
          }
          sum.y += slopes[2 * i] * product;
          sum.x += slopes[2 * i + 1] * product;
        }
        __syncwarp();
      }
    }
  }
  sum = add_lanes(sum, slopes);
  if (one >= 0 && two >= 0 && !(is_finite(sum.y) && is_finite(sum.x))) {
    sum = add_lanes(slopes_of_lane(grad_cost, fmap1, fmap2, coords, s, e, p, one, two), slopes);
  }
  store_slopes(sum, coords, grad_coords, s, e, p, scale);
}
