// The gradients of the flow-guided lookup, without atomic additions.
//
//   spread_windows      windows[e, l, p, v, u]   the share of each cell of a window; no_term: none
//                       origins[e, l, p]         the first cell of a window
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
// Threads. Lane i owns `loads` times `unit` neighbouring channels, from (i + 32 * load) * unit on,
// of 8 targets. Lanes behind the last channel compute the last ones again, and store nothing.
//
// Tensor cores (`tensor`, elements of 16 bits). Channels are the rows of a product, 8 targets its
// columns, and 16 items are added at a time. A lane owns four times as many channels, of 2 targets.
// It reads its channels of 4 items from global memory into registers, and joins those of two items
// to words of fragments. Neighbouring lanes read different items, whose units would lie in the same
// banks of level 1: so each lane reads its units in another order, and exchanges them. A share has
// 24 digits: it becomes two or three numbers of 16 bits.
//
// Launch, in blocks of `threads` threads with this dynamic shared memory, in 4-byte words:
//
//   spread_windows      samples * levels * ceil(positions / 32)     outputs * 33 + 32 * (cells + 1)
//   lookup_grad_fmap1   slices * blocks of positions * maps1        warps * (list + 72)
//   lookup_grad_levels  sum of slices * blocks of cells * maps2 * segments over the levels
//                                           warps * (list + 33) + 3 * tile_y * tile_x + 1
//   add_parts           enough to cover the levels with several segments
//   lookup_grad_coords  a warp for each position                    warps * 96
//
// A list has 336 words, or 144 with `tensor`. A block is warps_y * group_y x warps_x * group_x
// targets, and a slice 32 * loads * unit channels, or with `tensor` 8 * loads * unit, loads a
// multiple of 4. unit divides the channels, and arrays are aligned to as many elements. A map has
// fewer than 2^31 elements, and so have the windows of all samples of a level. With `tensor` the
// compute capability is at least 8.0.

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
constexpr bool tensor = false;  // multiply on tensor cores, elements of 16 bits
#endif
#include "lookup_grad.cuh"
#include "matrices.cuh"

constexpr int targets = 8, warps = warps_y * warps_x, threads = 32 * warps;
constexpr int block_y = group_y * warps_y, block_x = group_x * warps_x;
// Lanes that share out a slice, and targets of a lane.
constexpr int channel_lanes = tensor ? 8 : 32, own_targets = tensor ? 2 : targets;
constexpr int lane_channels = unit * loads, slice = channel_lanes * lane_channels;
// Lanes of tensor cores that read 32 neighbouring bytes; four times as many units are a line.
constexpr int of_sector = smaller(8, 32 / (unit * static_cast<int>(sizeof(element))));
constexpr int tile = tile_y * tile_x;
// Items whose channels are read before they are used: as many as registers hold.
constexpr int at_once = lane_channels * sizeof(element) > 16 ? 2 : 4;
constexpr int most_cells = 256;   // of a box
constexpr int far = 1 << 30;
constexpr int nowhere = 1 << 14;  // a row that no window has

static_assert(group_y * group_x == targets, "a lane's sums");
static_assert(!tensor || (sizeof(element) == 2 && loads % 4 == 0), "what tensor cores multiply");
static_assert(tile % 32 == 0 && tile <= threads, "a thread finds the window of a position");

struct GradSizes : Sizes {
  int first, behind;     // the levels whose windows are stored: from first to before behind
  int segments[levels];  // 0 of others
};

__device__ __forceinline__ int stored_levels(const GradSizes& s) { return s.behind - s.first; }

// ---- what a warp lists and adds

// The items of a warp, in shared memory. Those behind the last pass nothing to any target.
struct Items {
  int* places;    // row << 16 | column: with a target's own they say which share is the target's
  int* numbers;   // of the item in its map
  float* shares;  // of an item's targets, one after the other; or the warp's, of tensor cores

  __device__ __forceinline__ Items(float* shared, int warp)
      : places(reinterpret_cast<int*>(shared) + warp * words),
        numbers(places + at_once),
        shares(shared + warp * words + 2 * at_once) {}

  __device__ __forceinline__ void set(int at, int row, int column, int number) const {
    places[at] = row << 16 | (column & 0xffff);
    numbers[at] = number;
  }
  __device__ __forceinline__ int row(int i) const { return places[i] >> 16; }
  __device__ __forceinline__ int column(int i) const {
    return static_cast<short>(places[i] & 0xffff);
  }

  static constexpr int at_once = 32;
  static constexpr int piece = 2 * at_once + at_once * (tensor ? 2 : targets), words = piece + 16;
};

// What a lane owns of its warp's sums.
struct Own {
  int lane;
  int start, first, count;  // channels: first of the slice, first of the lane, and all

  __device__ __forceinline__ Own(int slice_number, int lane_, int channels)
      : lane(lane_), start(slice_number * slice), first(start + lane_unit(lane_) * unit),
        count(channels) {}
  __device__ __forceinline__ int channel(int load) const { return first + apart(load) * unit; }
  __device__ __forceinline__ bool exists(int load) const { return channel(load) < count; }
  __device__ __forceinline__ int to_read(int load) const {
    return smaller(channel(load), count - unit);
  }
  __device__ __forceinline__ int target(int i) const {
    return tensor ? lane % 4 * own_targets + i : i;
  }

 private:
  static __device__ __forceinline__ int lane_unit(int lane) {
    if (!tensor) return lane;
    return lane / 4 / of_sector * (4 * of_sector) + lane / 4 % of_sector;
  }
  static __device__ __forceinline__ int apart(int load) {
    return tensor ? load / 4 * 32 + load % 4 * of_sector : 32 * load;
  }
};

// Where a warp's targets, and those of its block, begin, in which map, and which of the segments of
// a level's tiles adds to them.
struct alignas(16) Piece {
  int y, x, block_y, block_x;
  int map, segment, segments, tiles, level, rows, columns;
  int shares;  // the first of the level and sample that items are listed from
};

// It is kept in shared memory, because registers are few.
__device__ __forceinline__ Piece& piece_of(float* shared, int warp, Piece found) {
  Piece& piece = *reinterpret_cast<Piece*>(shared + warp * Items::words + Items::piece);
  found.y += warp / warps_x * group_y;
  found.x += warp % warps_x * group_x;
  if (threadIdx.x % 32 == 0) piece = found;
  __syncwarp();
  return piece;
}

using Sums = float[lane_channels][own_targets];

// Where an item's channels lie, and a unit that is `offset` bytes behind. (In C the compiler would
// take addresses apart, and compute each by four instructions.)
#ifdef CUPYCORR_HOST
using Address = const char*;
#else
using Address = unsigned long long;
#endif

__device__ __forceinline__ Address address_of(const element* map, int number, int channels) {
#ifdef CUPYCORR_HOST
  return reinterpret_cast<const char*>(map + number * channels);
#else
  Address at;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(at)
      : "r"(number), "r"(channels * static_cast<int>(sizeof(element))), "l"(map));
  return at;
#endif
}

template <int WORDS>
__device__ __forceinline__ void load_unit(unsigned (&v)[WORDS], Address from, int offset) {
  constexpr int bytes = unit * static_cast<int>(sizeof(element));
#ifdef CUPYCORR_HOST
  if constexpr (bytes == 2) {
    v[0] = bits_of(*reinterpret_cast<const element*>(from + offset));
  } else {
    const auto pack = *reinterpret_cast<const Pack<unsigned, WORDS>*>(from + offset);
    for (int k = 0; k < WORDS; ++k) v[k] = pack.values[k];
  }
#else
  const Address at = from + static_cast<unsigned>(offset);
  if constexpr (bytes == 16) {
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(at));
  } else if constexpr (bytes == 8) {
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(at));
  } else if constexpr (bytes == 4) {
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(v[0]) : "l"(at));
  } else {
    unsigned short half;
    asm("ld.global.nc.b16 %0, [%1];" : "=h"(half) : "l"(at));
    v[0] = half;
  }
#endif
}

// Add `count` items, and up to `at_once` - 1 behind them. share(i) is that of item i for a target:
// lane % targets.
template <typename Share>
__device__ __forceinline__ void add_products(Sums& sums, const Items& items, int count, Share share,
                                             const element* map, const Own& own) {
#pragma unroll
  for (int k = 0; k < Items::at_once; k += 32 / targets) {
    const int i = k + own.lane / targets;
    items.shares[i * targets + own.lane % targets] = share(i);
  }
  __syncwarp();
  constexpr int bytes = sizeof(element), words = larger(1, unit * bytes / 4);
#pragma unroll 1
  for (int item = 0; item < count; item += at_once) {
    Pack<element, unit> values[at_once][loads];
    const auto numbers = *reinterpret_cast<const Pack<int, at_once>*>(items.numbers + item);
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const Address from = address_of(map, numbers.values[k], own.count);
#pragma unroll
      for (int load = 0; load < loads; ++load) {
        unsigned unit_of_item[words];
        load_unit(unit_of_item, from, own.to_read(load) * bytes);
        values[k][load] = *reinterpret_cast<const Pack<element, unit>*>(unit_of_item);
      }
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      float shares[targets];
      load_words(shares, items.shares + (item + k) * targets);
      load_words(shares + 4, items.shares + (item + k) * targets + 4);
#pragma unroll
      for (int target = 0; target < own_targets; ++target) {
#pragma unroll
        for (int c = 0; c < lane_channels; ++c) {
          sums[c][target] += shares[target] * widen(values[k][c / unit].values[c % unit]);
        }
      }
    }
  }
}

// ---- on tensor cores

// Three numbers of Bfloat16 have all 24 digits of a share, two of Half 22 or more.
constexpr int parts_of_share = is_bfloat16<element> ? 3 : 2;
constexpr bool scaled = !is_bfloat16<element>;

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}
__device__ __forceinline__ int exponent_of(float value) {
  return static_cast<int>(__float_as_uint(value) >> 23 & 0xffu) - 127;
}

// Half has few exponents. So the shares of a target, and its sums, are multiplied by a power of
// two. A share that is too large makes it smaller. Lanes keep that of target lane / 4.
struct Scale {
  float* shared;  // two words for each lane: one to pass on, and the factor

  __device__ __forceinline__ Scale(const Items& items, int lane) : shared(items.shares) {
    if constexpr (tensor && scaled) shared[32 + lane] = 0x1p126f;
  }
  __device__ __forceinline__ float factor(int lane) const { return shared[32 + lane]; }

  __device__ __forceinline__ void fit(Sums& sums, float largest, int lane) const {
    const float most = power_of_two(15 - exponent_of(factor(lane)));
    if (__ballot_sync(~0u, largest > most) == 0) return;
    shared[lane] = largest;
    __syncwarp();
    float of_lanes[4];
    load_words(of_lanes, shared + lane / 4 * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) largest = of_lanes[k] > largest ? of_lanes[k] : largest;
    __syncwarp();
    const float inverse = power_of_two(-exponent_of(factor(lane)));
    if (largest > most) {
      // The largest share is in [2^10, 2^11) now, and the next ones may be up to 2^15.
      shared[32 + lane] =
          power_of_two(larger(-112, smaller(10 - exponent_of(largest), 126)));
    }
    multiply(sums, factor(lane) * inverse, lane);
  }

  // Take the factors out of the sums.
  __device__ __forceinline__ void finish(Sums& sums, int lane) const {
    if constexpr (tensor && scaled) {
      multiply(sums, power_of_two(-exponent_of(factor(lane))), lane);
    }
  }

 private:
  __device__ __forceinline__ void multiply(Sums& sums, float ratio, int lane) const {
    shared[lane] = ratio;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < own_targets; ++i) {
      const float of_target = shared[4 * (lane % 4 * own_targets + i)];
#pragma unroll
      for (int c = 0; c < lane_channels; ++c) sums[c][i] *= of_target;
    }
    __syncwarp();
  }
};

// Take from two values the next part of each, as a word.
__device__ __forceinline__ unsigned take_part(float& one, float& two) {
  if constexpr (is_bfloat16<element>) {
    const unsigned bits1 = __float_as_uint(one), bits2 = __float_as_uint(two);
    one -= __uint_as_float(bits1 & 0xffff0000u);
    two -= __uint_as_float(bits2 & 0xffff0000u);
    return join_halves(bits1, bits2, true);
  } else {
    const Half half1 = narrow<Half>(one), half2 = narrow<Half>(two);
    one -= widen(half1);
    two -= widen(half2);
    return static_cast<unsigned>(half2.bits) << 16 | half1.bits;
  }
}

__device__ __forceinline__ void exchange(unsigned& one, unsigned& two, bool really) {
  const unsigned before = one;
  one = really ? two : one;
  two = really ? before : two;
}

// Four units of four items. Lanes that read different items read different units at a time, so that
// a warp meets all banks.
struct Units {
  static constexpr int words = larger(1, unit / 2);
  unsigned values[4][4][words];  // of item, unit

  __device__ __forceinline__ void fetch(const Address (&from)[4], const int (&offsets)[4],
                                        int behind, int last) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int offset = smaller(offsets[k] + behind, last);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_unit(values[i][k], from[i], offset);
    }
  }

  __device__ __forceinline__ void arrange(int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < words; ++w) {
        auto& of = values[i];
        exchange(of[0][w], of[1][w], lane & 1);
        exchange(of[2][w], of[3][w], lane & 1);
        exchange(of[0][w], of[2][w], lane & 2);
        exchange(of[1][w], of[3][w], lane & 2);
      }
    }
  }

  // Channels c and c + 1 of the items, as rows of a fragment.
  __device__ __forceinline__ void fragment(unsigned (&one)[4], int c) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int channel = c + k % 2, i = k / 2 * 2, at = channel / unit;
      one[k] = join_halves(values[i][at][channel % unit / 2], values[i + 1][at][channel % unit / 2],
                           channel % unit % 2);
    }
  }
};

// As above, 16 items at a time: channels are the rows of a product, targets its columns. Item
// 4 * k + lane % 4 is the k-th of the lane, and its target lane / 4.
template <typename Share>
__device__ __forceinline__ void add_matrices(Sums& sums, const Scale& scale, const Items& items,
                                             int count, Share share, const element* map,
                                             const Own& own) {
  constexpr int bytes = sizeof(element);
  const int last = (own.count - unit) * bytes;
  int offsets[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) offsets[k] = own.channel(k ^ own.lane % 4) * bytes;
#pragma unroll 1
  for (int item = 0; item < count; item += 16) {
    Address from[4];
    float shares[4], largest = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = item + 4 * k + own.lane % 4;
      from[k] = address_of(map, items.numbers[i], own.count);
      shares[k] = share(i);
    }
    if constexpr (scaled) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        largest = magnitude(shares[k]) > largest ? magnitude(shares[k]) : largest;
      }
      scale.fit(sums, largest, own.lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) shares[k] *= scale.factor(own.lane);
    }
    unsigned two[parts_of_share][2];
#pragma unroll
    for (int part = 0; part < parts_of_share; ++part) {
      two[part][0] = take_part(shares[0], shares[1]);
      two[part][1] = take_part(shares[2], shares[3]);
    }
#pragma unroll
    for (int first = 0; first < loads; first += 4) {
      if (own.start + first * 8 * unit >= own.count) break;  // no lane has any
      Units units;
      units.fetch(from, offsets, first * 8 * unit * bytes, last);
      units.arrange(own.lane);
      constexpr int pairs = 2 * unit, together = smaller(pairs, 4);
#pragma unroll
      for (int pair = 0; pair < pairs; pair += together) {
        unsigned one[together][4];
#pragma unroll
        for (int k = 0; k < together; ++k) units.fragment(one[k], 2 * (pair + k));
#pragma unroll
        for (int part = 0; part < parts_of_share; ++part) {
#pragma unroll
          for (int k = 0; k < together; ++k) {
            multiply_matrices<element>(
                reinterpret_cast<float(&)[4]>(sums[first * unit + 2 * (pair + k)]), one[k],
                two[part]);
          }
        }
      }
    }
  }
}

// The target that share(i) asks for.
__device__ __forceinline__ int shared_target(int lane) {
  return tensor ? lane / 4 : lane % targets;
}

template <typename Share>
__device__ __forceinline__ void add(Sums& sums, const Scale& scale, const Items& items, int count,
                                    Share share, const element* map, const Own& own) {
  if constexpr (tensor) {
    add_matrices(sums, scale, items, count, share, map, own);
  } else {
    add_products(sums, items, count, share, map, own);
  }
}

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// Store the channels of a lane's target i, if all of them are finite; returns whether they are.
template <typename Result>
__device__ __forceinline__ bool store(Result* to, const Sums& sums, int i, const Own& own) {
  bool finite = true;
#pragma unroll
  for (int c = 0; c < lane_channels; ++c) {
    finite &= is_finite(sums[c][i]) || !own.exists(c / unit);
  }
  if (!finite) return false;
#pragma unroll
  for (int load = 0; load < loads; ++load) {
    if (!own.exists(load)) continue;
    Result values[unit];
#pragma unroll
    for (int k = 0; k < unit; ++k) values[k] = narrow<Result>(sums[load * unit + k][i]);
    store_neighbours(to + own.channel(load), values);
  }
  return true;
}

// Add the sums of the levels before; at(target) is as below.
template <typename At>
__device__ __forceinline__ void resume(Sums& sums, const float* running, const Own& own, At at) {
#pragma unroll
  for (int i = 0; i < own_targets; ++i) {
    const long long from = at(own.target(i));
    if (from < 0) continue;
#pragma unroll
    for (int c = 0; c < lane_channels; ++c) {
      sums[c][i] += running[from * own.count + own.to_read(c / unit) + c % unit];
    }
  }
}

// Store the sums of a warp. at(target) is the target's number in grad, -1 where there is none;
// terms(target, c, sum) adds the terms of its channel c alone to a sum: to 0, or to what `before`
// holds.
template <typename Result, typename At, typename Terms>
__device__ __forceinline__ void store_all(Result* grad, const Sums& sums, const Own& own, At at,
                                          Terms terms, const float* before) {
  unsigned again = 0;
#pragma unroll
  for (int i = 0; i < own_targets; ++i) {
    const long long to = at(own.target(i));
    if (to >= 0 && !store(grad + to * own.count, sums, i, own)) again |= 1u << i;
  }
#pragma unroll 1
  for (int i = 0; again >> i != 0; ++i) {
    if ((again >> i & 1u) == 0) continue;
#pragma unroll 1
    for (int k = 0; k < lane_channels; ++k) {
      if (!own.exists(k / unit)) continue;
      const int c = own.channel(k / unit) + k % unit, target = own.target(i);
      const long long to = at(target) * own.count + c;
      grad[to] = narrow<Result>(terms(target, c, before ? before[to] : 0));
    }
  }
}

// The number of a stored window.
__device__ __forceinline__ int window_number(const GradSizes& s, int e, int level, int p) {
  return (e * stored_levels(s) + level - s.first) * s.height * s.width + p;
}

// The first row and column of a window.
struct alignas(8) Origin {
  int y, x;
};

// ---- the shares of all windows; a block owns 32 positions of a level, its warps rows of windows

extern "C" __global__ void __launch_bounds__(threads) spread_windows(
    const element* __restrict__ grad_cost, const accumulator* __restrict__ coords,
    float* __restrict__ windows, Origin* __restrict__ origins, const GradSizes s,
    const accumulator scale) {
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
  if (thread < here) origins[window_number(s, e, number, p)] = {first_row(w), first_column(w)};
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
  float* const to = windows + window_number(s, e, number, p0) * cells;
  for (int at = thread; at < here * cells; at += threads) {
    to[at] = shares[at / cells * cell_pitch + at % cells];
  }
}

// ---- fmap1

// A window: its first cell, and the rows and columns of it that exist. It may be none.
struct alignas(16) Reach {
  int y, x;
  int top, behind, left, right;
  int shares;  // its first
};

__device__ __forceinline__ Reach reach_of(const Origin* origins, const GradSizes& s, int number,
                                          int rows, int columns, int e, int y, int x) {
  constexpr Reach none{far, far, far, -far, far, -far, 0};
  if (y >= s.height || x >= s.width) return none;
  const int w = window_number(s, e, number, y * s.width + x);
  const Origin first = origins[w];
  const Reach found{first.y, first.x, larger(first.y, 0), smaller(first.y + span_y, rows),
                    larger(first.x, 0), smaller(first.x + span_x, columns),
                    w * (span_y * span_x)};
  return found.top < found.behind && found.left < found.right ? found : none;
}

extern "C" __global__ void __launch_bounds__(threads, resident) lookup_grad_fmap1(
    const float* __restrict__ windows, const Origin* __restrict__ origins, const Maps fmap2,
    const int* __restrict__ readers1, const map_index* __restrict__ index2,
    float* __restrict__ running, element* __restrict__ grad_fmap1, const GradSizes s,
    const accumulator) {
  DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Items items(shared, warp);
  Reach* const reach =
      reinterpret_cast<Reach*>(shared + warps * Items::words) + warp * (targets + 1);
  int rest = blockIdx.x;
  const Own own(pop(rest, ceil_div(s.channels, slice)), lane, s.channels);
  const int x0 = pop(rest, ceil_div(s.width, block_x)) * block_x;
  const int y0 = pop(rest, ceil_div(s.height, block_y)) * block_y;
  const Piece& piece = piece_of(shared, warp, {y0, x0, y0, x0, rest});
  const auto y = [&](int i) { return piece.y + i / group_x; };
  const auto x = [&](int i) { return piece.x + i % group_x; };
  if (piece.y >= s.height || piece.x >= s.width) return;
  const auto at = [&](int i) {
    const bool exists = y(i) < s.height && x(i) < s.width;
    return exists ? piece.map * positions_of(s) + y(i) * s.width + x(i) : -1;
  };

  Sums sums = {};
  const Scale scale(items, lane);
  const Readers readers(readers1, piece.map, s.maps1);
#pragma unroll 1
  for (int k = 0; k < (readers.behind - readers.first) * stored_levels(s); ++k) {
    const int e = readers.sample(readers.first + k / stored_levels(s));
    const int number = s.first + k % stored_levels(s), two = map_of(index2, e, s.maps2);
    if (two < 0) continue;
    const Level level = level_of(s, fmap2, number);
    __syncwarp();
    if (lane < targets) {
      reach[lane] = reach_of(origins, s, number, level.rows, level.columns, e, y(lane), x(lane));
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
    const element* const map = level.map + two * cells_of(level) * s.channels;
    const int target = shared_target(lane);
    const bool together = (all.behind - all.top) * static_cast<long long>(
                              all.right - all.left) <= most_cells;
    int entry = together ? targets : 0;
#pragma unroll 1
    do {
      const Reach &box = reach[entry], &read = reach[target];
      const int columns = box.right - box.left;
      const int cells = box.top < box.behind ? (box.behind - box.top) * columns : 0;
      const bool passes = entry == targets || entry == target;
      const int above = box.top - read.y, before = box.left - read.x;
#pragma unroll 1
      for (int first = 0; first < cells; first += Items::at_once) {
        const int cell = smaller(first + lane, cells - 1);
        const int row = cell / columns, column = cell % columns;
        items.set(lane, first + lane < cells ? row : nowhere, column,
                  (box.top + row) * level.columns + box.left + column);
        __syncwarp();
        const auto share = [&](int i) {
          const int v = items.row(i) + above, u = items.column(i) + before;
          const bool reads = passes && inside(v, span_y) && inside(u, span_x);
          return reads ? windows[read.shares + v * span_x + u] : no_term;
        };
        add(sums, scale, items, smaller(cells - first, Items::at_once), share, map, own);
        __syncwarp();
      }
    } while (++entry < targets);
  }
  scale.finish(sums, lane);
  if (s.first > 0) resume(sums, running, own, at);

  const auto own_terms = [&](int i, int c, float sum) {
#pragma unroll 1
    for (int k = readers.first; k < readers.behind; ++k) {
      const int e = readers.sample(k), two = map_of(index2, e, s.maps2);
      if (two < 0) continue;
#pragma unroll 1
      for (int number = s.first; number < s.behind; ++number) {
        const Level level = level_of(s, fmap2, number);
        const Reach read = reach_of(origins, s, number, level.rows, level.columns, e, y(i), x(i));
#pragma unroll 1
        for (int y = read.top; y < read.behind; ++y) {
#pragma unroll 1
          for (int x = read.left; x < read.right; ++x) {
            const float share = windows[read.shares + (y - read.y) * span_x + x - read.x];
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
    store_all(running, sums, own, at, own_terms, before);
  } else {
    store_all(grad_fmap1, sums, own, at, own_terms, before);
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
    const float* __restrict__ windows, const Origin* __restrict__ origins,
    const element* __restrict__ fmap1, const map_index* __restrict__ index1,
    const int* __restrict__ readers2, const Bounds* __restrict__ bounds,
    float* __restrict__ parts, const Grads grads, const GradSizes s, const accumulator) {
  DYNAMIC_SHARED(float, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Items items(shared, warp);
  // Of a tile's positions: rows and columns of their windows, and numbers.
  int* const places = reinterpret_cast<int*>(shared + warps * Items::words);
  int* const hits = places + 3 * tile;  // numbers of tiles, and -1
  int* const counts = hits + threads + 1;

  int rest = blockIdx.x, number = levels - 1, segments = 1;
#pragma unroll
  for (int l = levels - 1; l >= 0; --l) {
    if (l != number) continue;
    segments = s.segments[l];
    if (rest < pieces_of(s, l)) continue;
    rest -= pieces_of(s, l);
    --number;
  }
  const Level level = level_of(s, {}, number);
  const Own own(pop(rest, ceil_div(s.channels, slice)), lane, s.channels);
  const int x0 = pop(rest, ceil_div(level.columns, block_x)) * block_x;
  const int y0 = pop(rest, ceil_div(level.rows, block_y)) * block_y;
  const int first_tile = pop(rest, segments);
  const Tiles tiles(readers2, rest, s);
  Piece& piece = piece_of(shared, warp, {y0, x0, y0, x0, rest, first_tile, segments,
                                         tiles.count(), number, level.rows, level.columns, 0});

  Sums sums = {};
  const Scale scale(items, lane);
  int waiting = 0;  // items that are listed
#pragma unroll 1
  for (int first = first_tile; first < piece.tiles; first += threads * piece.segments) {
    // The next tiles that reach the block's cells, in order.
    const int next = first + thread * piece.segments;
    const bool hit =
        next < piece.tiles && reaches(tiles.bounds(bounds, next, piece.level), piece.block_y,
                                      piece.block_x, block_y, block_x);
    const unsigned votes = __ballot_sync(~0u, hit);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int k = 0; k < warps; ++k) {
      before += k < warp ? counts[k] : 0;
      all += counts[k];
    }
    if (hit) hits[before + __popc(votes & ((1u << lane) - 1))] = next;
    if (thread == 0) hits[all] = -1;
    __syncthreads();
#pragma unroll 1
    for (int h = 0; hits[h] >= 0; ++h) {
      const int hit_tile = hits[h], e = tiles.sample(hit_tile);
      if (thread < tile) {
        const int row = tiles.row(hit_tile, thread), column = tiles.column(hit_tile, thread);
        const Reach found =
            reach_of(origins, s, piece.level, piece.rows, piece.columns, e, row, column);
        places[thread] = found.y;
        places[tile + thread] = found.x;
        places[2 * tile + thread] = row * s.width + column;
      }
      __syncthreads();
      const int one = map_of(index1, e, s.maps1);
      const element* const map = fmap1 + one * positions_of(s) * s.channels;
      if (lane == 0) piece.shares = window_number(s, e, piece.level, 0) * (span_y * span_x);
      const auto share = [&](int i) {
        const int v = items.row(i) + shared_target(lane) / group_x;
        const int u = items.column(i) + shared_target(lane) % group_x;
        if (!inside(v, span_y) || !inside(u, span_x)) return no_term;
        return windows[piece.shares + items.numbers[i] * (span_y * span_x) + v * span_x + u];
      };
      // List its windows that reach the warp's cells. A list ends with the tiles of a sample.
      const bool ends = hits[h + 1] < 0 || tiles.sample(hits[h + 1]) != e;
#pragma unroll 1
      for (int i = lane; one >= 0 && i < tile; i += 32) {
        const auto v = [&] { return piece.y - places[i]; };
        const auto u = [&] { return piece.x - places[tile + i]; };
        const bool reads = inside(v() + group_y - 1, span_y + group_y - 1) &&
                           inside(u() + group_x - 1, span_x + group_x - 1) &&
                           piece.y < piece.rows && piece.x < piece.columns;
        const unsigned of_lanes = __ballot_sync(~0u, reads);
        int to = reads ? waiting + __popc(of_lanes & ((1u << lane) - 1)) : -1;
        waiting += __popc(of_lanes);
        const auto list = [&] {
          if (inside(to, Items::at_once)) items.set(to, v(), u(), places[2 * tile + i]);
        };
        list();
        const bool last = ends && i + 32 >= tile;
#pragma unroll 1
        while (waiting >= Items::at_once || (last && waiting > 0)) {
          const int count = smaller(waiting, Items::at_once);
          __syncwarp();
          if (lane >= count) items.set(lane, nowhere, 0, items.numbers[count - 1]);
          __syncwarp();
          add(sums, scale, items, count, share, map, own);
          __syncwarp();
          waiting -= count;
          to -= count;
          list();
        }
      }
      __syncthreads();
    }
  }

  const auto own_terms = [&](int i, int c, float sum) {
    const int v = piece.y + i / group_x, u = piece.x + i % group_x;
#pragma unroll 1
    for (int k = piece.segment; k < tiles.count(); k += piece.segments) {
      if (!reaches(tiles.bounds(bounds, k, piece.level), v, u, 1, 1)) continue;
      const int e = tiles.sample(k), one = map_of(index1, e, s.maps1);
      if (one < 0) continue;
#pragma unroll 1
      for (int j = 0; j < tile; ++j) {
        const int row = tiles.row(k, j), column = tiles.column(k, j);
        const Reach found =
            reach_of(origins, s, piece.level, piece.rows, piece.columns, e, row, column);
        if (!inside(v - found.y, span_y) || !inside(u - found.x, span_x)) continue;
        const float share = windows[found.shares + (v - found.y) * span_x + u - found.x];
        const long long position = one * positions_of(s) + row * s.width + column;
        if (is_term(share)) sum += share * widen(fmap1[position * s.channels + c]);
      }
    }
    return sum;
  };
  scale.finish(sums, lane);
  const auto at = [&](int i) {
    const int v = piece.y + i / group_x, u = piece.x + i % group_x;
    const bool exists = v < piece.rows && u < piece.columns;
    const long long row = static_cast<long long>(piece.map) * piece.rows + v;
    return exists ? row * piece.columns + u : -1;
  };
  if (piece.segments > 1) {
#pragma unroll
    for (int l = levels - 1; l > 0; --l) {
      if (l > piece.level && s.segments[l] > 1) parts += s.segments[l] * elements_of(s, l);
    }
    const long long cells = static_cast<long long>(piece.rows) * piece.columns;
    parts += piece.segment * (s.maps2 * cells * s.channels);
    store_all(parts, sums, own, at, own_terms, nullptr);
  } else {
    store_all(grad_of(grads, piece.level), sums, own, at, own_terms, nullptr);
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
    const Own own(part, lane, s.channels);
    float values1[lane_channels];
#pragma unroll
    for (int c = 0; c < lane_channels; ++c) values1[c] = 0;
    const element* const position = fmap1 + (one * positions_of(s) + p) * s.channels;
#pragma unroll
    for (int load = 0; load < loads; ++load) {
      if (!own.exists(load)) continue;
#pragma unroll
      for (int k = 0; k < unit; ++k) {
        values1[load * unit + k] = widen(position[own.channel(load) + k]);
      }
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
                map + at[i] + own.to_read(load));
#pragma unroll
            for (int c = 0; c < unit; ++c) {
              product += values1[load * unit + c] * widen(values.values[c]);
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
