// The flow-guided lookup: tiles of positions, which share cells that their windows have in common.
//
// The sum, the arrays and what is a term: lookup.cuh. Arrays are contiguous, in the order of their
// indices there. Floats are multiplied by the FMA units; with `tensor` elements have 16 bits and
// are multiplied by the tensor cores. Channels are summed up before the interpolation.
//
// Groups. Some neighbouring positions, 8 or with `tensor` 16, are a group. Its box is the rectangle
// of cells around their windows, inside of the level. All products of the positions and the cells
// of the box are computed, as a product of matrices: a step is 8 positions of a half-warp by 16
// cells, or 16 positions of a warp by 16 cells.
//
//     2 x 4 positions, radius 1:             a a a a . . .     the box has 5 x 7 cells; in the
//     a window has 4 x 4 cells, `a` is       a a a a . . .     order of its rows they make 3 steps
//     that of the first position             a a a a . . .
//                                            a a a a . . .
//                                            . . . . . . .
//
// Where flow is rough a box might have more than `most_cells`. Then the group falls into 2, 4 ...
// equal parts, single positions at last. Nothing else is special about it:
//
//   entry    a group or a part of it: its positions and their box
//   region   a rectangle of cells in shared memory, around the boxes of some entries
//   pass     the next entries, at most one for each half-warp or warp (a slot), as far as their
//            regions fit shared memory; a tile of smooth flow is one pass with one region
//
// A pass takes all channels of its entries and writes their outputs. So each sum takes its channels
// in their order, whatever the neighbours do, and nothing is added in two places.
//
// Shared memory. A chunk of a cell's channels is `units` units of 16 bytes. Unit u of a region's
// cell (y, x) is stored in place u ^ s of the cell, s = (x + skew * y) / (8 / units) mod units.
// With skew the columns of a box, 8 cells in the order of the box lie in different banks, over ends
// of rows too.
//
// Launch: samples * tiles_y * tiles_x * bands * levels blocks of `threads` threads with
// `shared_bytes` of dynamic shared memory; levels come first, because they share fmap1. With
// `asynchronous`, the compute capability is at least 8.0. Maps begin at multiples of 16 bytes,
// which their channels fill, and each has fewer than 2^31 units.

#include "device.cuh"

#ifndef CUPYCORR_CONSTANTS
using element = Half;       // of the maps: float, or with tensor Half or Bfloat16
using result = Half;        // of cost
using accumulator = float;  // of sums and of coords
using map_index = long long;
// The lookup.
constexpr int levels = 4, radius_y = 4, radius_x = 4, spacing_y = 1, spacing_x = 1;
constexpr int pool_y = 2, pool_x = 2;
constexpr bool x_first = false;
// The tile.
constexpr bool tensor = true;        // multiply on tensor cores
constexpr bool asynchronous = true;  // copy to shared memory past the registers
constexpr int band = 9;              // rows of outputs of a block
constexpr int group_y = 4, group_x = 4;
constexpr int tile_y = 4, tile_x = 16;
constexpr int steps = 11;      // of 16 cells, of the largest box
constexpr int units = 2;       // of a chunk: 2 or 4
constexpr int capacity = 350;  // cells of a pass
constexpr int resident = 3;    // blocks of a multiprocessor
constexpr int shared_bytes = 32848;
#endif

#include "matrices.cuh"

#include "lookup.cuh"

constexpr int group = group_y * group_x, positions = tile_y * tile_x, slots = positions / group;
constexpr int slot_threads = tensor ? 32 : 16, threads = slots * slot_threads;
constexpr int step_cells = 16, most_cells = step_cells * steps;
constexpr int fine = 6;  // from so many steps on, each number of them has a loop of its own
constexpr int bands = ceil_div(outputs_y, band);
constexpr int span_y = (band - 1) * spacing_y + 2, span_x = (outputs_x - 1) * spacing_x + 2;
constexpr int unit_bytes = 16, unit_elements = unit_bytes / static_cast<int>(sizeof(element));
constexpr int cell_bytes = units * unit_bytes;
constexpr int buffers = 2, buffer_bytes = (capacity + positions) * cell_bytes;
constexpr int cells_at_once = threads / units;  // that the block copies
// Copies of a thread: of cells, then of positions.
constexpr int cell_copies = ceil_div(capacity, cells_at_once);
constexpr int first_own = cell_copies * cells_at_once;
constexpr int copies = cell_copies + positions / cells_at_once;
// Sums leave through shared memory, of so many positions of every slot at a time. Words from
// position to position: odd, or for fragments, whose rows are written at once, 8 modulo 32.
constexpr int at_once = tensor || group_x == 8 ? 8 : 4;
constexpr int pitch = tensor ? round_up(most_cells, 32) + 8 : most_cells + 1;
constexpr int staged_bytes =
    round_up(larger(buffers * buffer_bytes, slots * at_once * pitch * 4), unit_bytes);
constexpr int nowhere = -(1 << 20);  // a cell that no window reaches

static_assert(sizeof(accumulator) == 4 && (tensor ? sizeof(element) == 2 : sizeof(element) == 4),
              "floats, or 16 bits on tensor cores");
static_assert(group == (tensor ? 16 : 8) && group % at_once == 0, "rows of a product");
static_assert(tile_y % group_y == 0 && tile_x % group_x == 0, "a tile is made of groups");
static_assert(threads % 32 == 0, "whole warps");
static_assert(positions % cells_at_once == 0, "all threads copy positions");
static_assert(span_y * span_x <= most_cells && most_cells <= capacity, "one window must fit");
static_assert(units == 2 || units == 4, "what the places of units are made for");
static_assert(tensor <= asynchronous, "tensor cores come with cp.async");

// A rectangle of cells; without any if it has no rows.
struct alignas(16) Box {
  int y, x, rows, columns;
};

// Where a cell's chunk lies: units from the beginning of its map, bytes from that of a buffer.
struct alignas(8) Copy {
  int source, target;
};

struct alignas(16) Plan {
  Copy copies[first_own + positions];  // of a pass's cells; from `first_own` on of the slots'
  Box boxes[positions];               // of the entries
  Box regions[slots];                 // of the pass
  Window windows[positions];          // in the order of the groups, as below
  int first[positions], count[positions];  // positions of the entries
  int parts[slots];                        // entries of a group
  int region_of[slots];                    // of the pass's entries
  // Of a region: its first cell among those of the pass, and in a buffer; there rows may be longer.
  int first_cell[slots], start[slots], row_cells[slots], skew[slots];
  int regions_taken, entries, entries_taken, cells;
  int sample, level, rows, columns, j0, row0, column0;  // what the block owns
};

static_assert(staged_bytes + sizeof(Plan) <= shared_bytes, "shared memory is too small");

// Row and column, in the tile, of position i in the order of the groups.
__device__ __forceinline__ int tile_row(int i) {
  return i / group / (tile_x / group_x) * group_y + i % group / group_x;
}
__device__ __forceinline__ int tile_column(int i) {
  return i / group % (tile_x / group_x) * group_x + i % group % group_x;
}

__device__ __forceinline__ int cells_of(const Box& box) { return box.rows * box.columns; }

__device__ __forceinline__ Box around(const Box& one, const Box& two) {
  if (one.rows == 0) return two;
  if (two.rows == 0) return one;
  const int y = smaller(one.y, two.y), x = smaller(one.x, two.x);
  return {y, x, larger(one.y + one.rows, two.y + two.rows) - y,
          larger(one.x + one.columns, two.x + two.columns) - x};
}

// The cells that positions [first, first + count) read; those of weight 0 at the end are left out.
__device__ __forceinline__ Box box_of(const Plan& plan, int first, int count) {
  Box box = {};
  for (int i = first; i < first + count; ++i) {
    const Window w = plan.windows[i];
    const int y = w.y.cell + plan.j0 * spacing_y - reach_y, x = w.x.cell - reach_x;
    const int y0 = larger(y, 0), y1 = smaller(y + span_y - (w.y.weight == 0), plan.rows);
    const int x0 = larger(x, 0), x1 = smaller(x + span_x - (w.x.weight == 0), plan.columns);
    if (y0 < y1 && x0 < x1) box = around(box, {y0, x0, y1 - y0, x1 - x0});
  }
  return box;
}

// Positions of an entry of group g: the largest equal parts whose boxes are small enough.
__device__ __forceinline__ int part_of(const Plan& plan, int g) {
  int count = group;
  for (; count > 1; count /= 2) {
    bool fits = true;
    for (int i = 0; i < group; i += count) {
      fits = fits && cells_of(box_of(plan, g * group + i, count)) <= most_cells;
    }
    if (fits) break;
  }
  return count;
}

// Cells from row to row of a region in shared memory: then skew decides the bank of a row's first
// cell. Regions too narrow for that to matter, which might outgrow a box, do without.
__device__ __forceinline__ int row_cells_of(int columns, int skew) {
  constexpr int period = 8 / units;
  return columns < 8 ? columns : columns + ((skew - columns) & (period - 1));
}
__device__ __forceinline__ int stored_cells(const Box& box, int skew) {
  return box.rows * row_cells_of(box.columns, skew);
}
__device__ __forceinline__ int swizzle(int y, int x, int skew) {
  return (x + skew * y) / (8 / units) & (units - 1);
}

// Choose the entries and regions of the next pass, which begins with entry `from`.
__device__ __forceinline__ void plan_pass(Plan& plan, int from) {
  const int most = smaller(slots, plan.entries - from);
  int taken = 0, regions = 0, stored = 0;
  Box all = {};
  for (int k = 0; k < most; ++k) all = around(all, plan.boxes[from + k]);
  const int skew = plan.boxes[from].columns;
  if (stored_cells(all, skew) <= capacity) {
    for (; taken < most; ++taken) plan.region_of[taken] = 0;
    plan.regions[0] = all, plan.skew[0] = skew, regions = 1;
  }
  // A box joins the first region that does not grow by more cells than the box has.
  for (; taken < most; ++taken) {
    const Box box = plan.boxes[from + taken];
    Box joined = box;
    int r = 0, before = 0;
    for (; r < regions; ++r) {
      joined = around(plan.regions[r], box);
      before = stored_cells(plan.regions[r], plan.skew[r]);
      if (stored_cells(joined, plan.skew[r]) <= before + cells_of(box)) break;
    }
    if (r == regions) joined = box, before = 0, plan.skew[r] = box.columns;
    const int after = stored + stored_cells(joined, plan.skew[r]) - before;
    if (after > capacity) break;
    stored = after;
    plan.regions[r] = joined;
    plan.region_of[taken] = r;
    regions = larger(regions, r + 1);
  }
  int cells = 0;
  stored = 0;
  for (int r = 0; r < regions; ++r) {
    plan.first_cell[r] = cells, plan.start[r] = stored;
    plan.row_cells[r] = row_cells_of(plan.regions[r].columns, plan.skew[r]);
    cells += cells_of(plan.regions[r]), stored += stored_cells(plan.regions[r], plan.skew[r]);
  }
  plan.regions_taken = regions, plan.entries_taken = taken, plan.cells = cells;
}

// Find out where the cells of a pass, and the positions of its slots, come from and go to.
__device__ __forceinline__ void plan_copies(Plan& plan, const Sizes& s, int from, int thread) {
  const int cell_units = s.channels / unit_elements;
  for (int cell = thread; cell < plan.cells; cell += threads) {
    int r = 0;
    while (r + 1 < plan.regions_taken && cell >= plan.first_cell[r + 1]) ++r;
    const Box region = plan.regions[r];
    const int y = (cell - plan.first_cell[r]) / region.columns;
    const int x = (cell - plan.first_cell[r]) % region.columns;
    const int at = plan.start[r] + y * plan.row_cells[r] + x;
    plan.copies[cell] = {((region.y + y) * plan.columns + region.x + x) * cell_units,
                         at * cell_bytes + swizzle(y, x, plan.skew[r]) * unit_bytes};
  }
  // Slots and positions that do not exist repeat the last ones; what comes of it is not used.
  for (int i = thread; i < positions; i += threads) {
    const int entry = from + smaller(i / group, plan.entries_taken - 1);
    const int at = plan.first[entry] + smaller(i % group, plan.count[entry] - 1);
    const int y = smaller(plan.row0 + tile_row(at), s.height - 1);
    const int x = smaller(plan.column0 + tile_column(at), s.width - 1);
    const int place = tensor ? i / (8 / units) & (units - 1) : 0;
    plan.copies[first_own + i] = {(y * s.width + x) * cell_units,
                                 (capacity + i) * cell_bytes + place * unit_bytes};
  }
}

// Queue a copy of a unit to shared memory if it is `wanted`: of zeros, if nothing `exists`. (A
// branch in C would cost more: see staging.cuh.)
__device__ __forceinline__ void copy_unit(SharedAddress to, const void* from, bool wanted,
                                          bool exists) {
#if defined(CUPYCORR_HOST)
  if (wanted) host_copy_async(to, from, unit_bytes, exists);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "{ .reg .pred wanted; setp.ne.b32 wanted, %2, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16, %3; }" ::"r"(to),
      "l"(from), "r"(static_cast<int>(wanted)), "r"(exists ? unit_bytes : 0)
      : "memory");
#endif
}

using Unit = Pack<unsigned, 4>;

// Multiply a chunk of channels of a slot's positions by `count` steps of cells. Sums are of a step
// and a position, for this lane's cell of the step; with tensor, the fragments of two products.
template <int count>
__device__ __forceinline__ void multiply_chunk(const char* buffer, SharedAddress address, int own,
                                               const int (&at)[steps], float (&sums)[steps][8],
                                               int lane) {
  if constexpr (tensor) {
    const int row = lane % 16, place = row / (8 / units) & (units - 1);
#pragma unroll
    for (int u = 0; u < units; u += 2) {
      unsigned one[4];
      load_matrices<4>(one, address + own + row * cell_bytes +
                                ((u + lane / 16) ^ place) * unit_bytes);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        unsigned two[4];
        load_matrices<4>(two, address + (at[k] ^ u * unit_bytes));
        multiply_matrices<element>(reinterpret_cast<float(&)[4]>(sums[k][0]), one, two);
        multiply_matrices<element>(reinterpret_cast<float(&)[4]>(sums[k][4]), one, two + 2);
      }
    }
  } else {
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      float one[8][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        load_words(one[i], reinterpret_cast<const float*>(buffer + own + i * cell_bytes +
                                                          u * unit_bytes));
      }
#pragma unroll
      for (int k = 0; k < count; ++k) {
        float two[4];
        load_words(two, reinterpret_cast<const float*>(buffer + (at[k] ^ u * unit_bytes)));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[k][i] += one[i][c] * two[c];
        }
      }
    }
  }
}

// Multiply by as many steps as a warp needs, or one more if they are few: each number is a loop of
// its own, without branches.
template <int count>
__device__ __forceinline__ void multiply_steps(int needed, const char* buffer,
                                               SharedAddress address, int own,
                                               const int (&at)[steps], float (&sums)[steps][8],
                                               int lane) {
  constexpr int fewer = count > fine ? count - 1 : count - 2;
  if (needed > fewer) {
    multiply_chunk<count>(buffer, address, own, at, sums, lane);
  } else if constexpr (fewer > 0) {
    if (needed > 0) multiply_steps<fewer>(needed, buffer, address, own, at, sums, lane);
  }
}

// Write rows [j, end) of outputs, as the band counts them, of a position: its raw values are those
// of the cells of a box.
__device__ __forceinline__ void write_outputs(result* __restrict__ cost, const Plan& plan,
                                              const Sizes& s, accumulator scale, int position,
                                              const Box& box, const float* raw, int j, int end) {
  const Window w = plan.windows[position];
  const long long p = static_cast<long long>(plan.row0 + tile_row(position)) * s.width +
                      plan.column0 + tile_column(position);
  const int u0 = w.x.cell - reach_x - box.x;
  // One comparison for both ends, so that no load needs a branch.
  const auto among = [](int k, int count) {
    return static_cast<unsigned>(k) < static_cast<unsigned>(count);
  };
  for (; j < end; ++j) {
    const int v = w.y.cell + (plan.j0 + j) * spacing_y - reach_y - box.y;
    const bool exists0 = among(v, box.rows), exists1 = among(v + 1, box.rows);
    const float* const row0 = raw + v * box.columns;
    const float* const row1 = row0 + box.columns;
    const auto above = [&](int u) { return exists0 && among(u, box.columns) ? row0[u] : 0.0f; };
    const auto below = [&](int u) { return exists1 && among(u, box.columns) ? row1[u] : 0.0f; };
    result* to = cost + cost_at(s, plan.sample, plan.level, plan.j0 + j, 0, p);
    const long long next = positions_of(s) * (x_first ? outputs_y : 1);
    float s01 = above(u0), s11 = below(u0);
#pragma unroll
    for (int i = 0; i < outputs_x; ++i, to += next) {
      const int u = u0 + i * spacing_x;
      const float s00 = spacing_x == 1 ? s01 : above(u);
      const float s10 = spacing_x == 1 ? s11 : below(u);
      s01 = above(u + 1), s11 = below(u + 1);
      *to = narrow<result>(scale * interpolate(w, s00, s01, s10, s11));
    }
  }
}

extern "C" __global__ void __launch_bounds__(threads, resident) lookup_tiled(
    const element* __restrict__ fmap1, const Maps fmap2, const accumulator* __restrict__ coords,
    const map_index* __restrict__ index1, const map_index* __restrict__ index2,
    result* __restrict__ cost, const Sizes s, const accumulator scale) {
  DYNAMIC_SHARED(char, shared);
  Plan& plan = *reinterpret_cast<Plan*>(shared + staged_bytes);
  const SharedAddress address = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, slot = thread / slot_threads;

  // What this block owns. Where a map does not exist, neither does any cell.
  int rest = blockIdx.x;
  const int number = pop(rest, levels), j0 = pop(rest, bands) * band;
  const int column0 = pop(rest, ceil_div(s.width, tile_x)) * tile_x;
  const int row0 = pop(rest, ceil_div(s.height, tile_y)) * tile_y, e = rest;
  const int number1 = map_of(index1, e, s.maps1), number2 = map_of(index2, e, s.maps2);
  Level level = level_of(s, fmap2, number);
  const element* const map1 = fmap1 + number1 * positions_of(s) * s.channels;
  const element* const map2 =
      level.map + static_cast<long long>(number2) * level.rows * level.columns * s.channels;
  if (number1 < 0 || number2 < 0) level.rows = 0;
  if (thread == 0) {
    plan.sample = e, plan.level = number, plan.rows = level.rows, plan.columns = level.columns;
    plan.j0 = j0, plan.row0 = row0, plan.column0 = column0;
  }
  for (int i = thread; i < positions; i += threads) {
    const int y = row0 + tile_row(i), x = column0 + tile_column(i);
    Window w{{nowhere, 0}, {nowhere, 0}};
    if (y < s.height && x < s.width) {
      w = window_of(coords, s, level, e, static_cast<long long>(y) * s.width + x);
    }
    plan.windows[i] = w;
  }
  __syncthreads();
  int part = group;
  if (thread < slots) {
    part = part_of(plan, thread);
    plan.parts[thread] = group / part;
  }
  __syncthreads();
  if (thread < slots) {
    int entry = 0;
    for (int g = 0; g < thread; ++g) entry += plan.parts[g];
    for (int i = thread * group; i < (thread + 1) * group; i += part, ++entry) {
      plan.boxes[entry] = box_of(plan, i, part);
      plan.first[entry] = i, plan.count[entry] = part;
    }
    if (thread == slots - 1) plan.entries = entry;
  }
  __syncthreads();

#pragma unroll 1
  for (int from = 0; from < plan.entries;) {
    if (thread == 0) plan_pass(plan, from);
    __syncthreads();
    plan_copies(plan, s, from, thread);
    __syncthreads();
    const int taken = plan.entries_taken;

    // Copies of chunk c: this thread's unit of some cells, and of some positions.
    const int unit = thread % units, cell0 = thread / units;
    Unit fetched[asynchronous ? 1 : copies];
    const auto fetch = [&](int c) {
      const bool exists = (c * units + unit) * unit_elements < s.channels;
      const Unit* const from1 = reinterpret_cast<const Unit*>(map1) + c * units + unit;
      const Unit* const from2 = reinterpret_cast<const Unit*>(map2) + c * units + unit;
      const int buffer = c % buffers * buffer_bytes;
#pragma unroll
      for (int k = 0; k < copies; ++k) {
        if (k < cell_copies && k * cells_at_once >= plan.cells) continue;
        const int cell = cell0 + k * cells_at_once;
        const bool wanted = k >= cell_copies || cell < plan.cells;
        const Copy own = plan.copies[wanted ? cell : 0];
        const Unit* const source = (k < cell_copies ? from2 : from1) + own.source;
        if constexpr (asynchronous) {
          copy_unit(address + buffer + (own.target ^ unit * unit_bytes), source, wanted, exists);
        } else {
          fetched[k] = {};
          if (wanted && exists) fetched[k] = *source;
        }
      }
    };
    const auto land = [&](int c) {
      if constexpr (asynchronous) {
        wait_for_copies();
      } else {
#pragma unroll
        for (int k = 0; k < copies; ++k) {
          const int cell = cell0 + k * cells_at_once;
          if (k < cell_copies && cell >= plan.cells) continue;
          const int target = plan.copies[cell].target ^ unit * unit_bytes;
          *reinterpret_cast<Unit*>(shared + c % buffers * buffer_bytes + target) = fetched[k];
        }
      }
    };

    // Where this lane's cells of each step lie in a buffer. Two slots of a warp take equal steps.
    const auto steps_of = [&](int which) {
      return which < taken ? ceil_div(cells_of(plan.boxes[from + which]), step_cells) : 0;
    };
    const int needed = tensor ? steps_of(slot) : larger(steps_of(slot), steps_of(slot ^ 1));
    int at[steps];
    {
      const int entry = smaller(slot, taken - 1), r = plan.region_of[entry];
      const Box box = plan.boxes[from + entry], region = plan.regions[r];
      const int first = tensor ? lane / 16 * 8 + lane % 8 : thread % 16;
      const int half = tensor ? lane / 8 % 2 : 0;  // of a row of a matrix, two units long
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        // Behind the last cell, and in an empty box, any will do: its sums are not used.
        const int cell = larger(0, smaller(step_cells * k + first, cells_of(box) - 1));
        const int y = cell / larger(1, box.columns) + box.y - region.y;
        const int x = cell % larger(1, box.columns) + box.x - region.x;
        const int place = box.rows ? plan.start[r] + y * plan.row_cells[r] + x : 0;
        at[k] = place * cell_bytes + (swizzle(y, x, plan.skew[r]) ^ half) * unit_bytes;
      }
    }

    // A thread that passes the barrier of chunk c knows that all have finished with chunk c - 1,
    // whose buffer is the one that the next fetch fills.
    float sums[steps][8] = {};
    const int chunks = plan.cells ? ceil_div(s.channels, units * unit_elements) : 0;
    if (chunks > 0) fetch(0);
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      land(c);
      __syncthreads();
      if (c + 1 < chunks) fetch(c + 1);
      const int buffer = c % buffers * buffer_bytes;
      multiply_steps<steps>(needed, shared + buffer, address + buffer,
                            (capacity + slot * group) * cell_bytes, at, sums, lane);
    }

    // Sums to shared memory, of some positions of every slot at a time, and outputs from there.
    float* const values = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int round = 0; round < group / at_once; ++round) {
      __syncthreads();
      float* const to = values + slot * at_once * pitch;
#pragma unroll
      for (int k = 0; k < steps; ++k) {
        if (k >= needed) continue;
        if constexpr (tensor) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = step_cells * k + 8 * i + lane % 4 * 2;
            *reinterpret_cast<Pack<float, 2>*>(to + lane / 4 * pitch + column) = {
                sums[k][4 * i + 2 * round], sums[k][4 * i + 2 * round + 1]};
          }
        } else {
#pragma unroll
          for (int i = 0; i < at_once; ++i) {
            to[i * pitch + step_cells * k + thread % 16] = sums[k][round * at_once + i];
          }
        }
      }
      __syncthreads();
      // Lanes are neighbouring positions; threads that have one in common share its rows.
      constexpr int owners = slots * at_once, shares = threads / owners;
      const int owner = thread % owners, share = thread / owners;
      const int of_slot = owner / at_once, i = round * at_once + owner % at_once;
      if (of_slot >= taken || i >= plan.count[from + of_slot]) continue;
      const int position = plan.first[from + of_slot] + i;
      if (plan.windows[position].y.cell == nowhere) continue;
      const int rows = smaller(band, outputs_y - plan.j0);
      write_outputs(cost, plan, s, scale, position, plan.boxes[from + of_slot],
                    values + owner * pitch, rows * share / shares, rows * (share + 1) / shares);
    }
    __syncthreads();  // before the next pass is planned
    from += taken;
  }
}
