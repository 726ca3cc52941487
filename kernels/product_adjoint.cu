// The gradient of product.cu's cost with respect to one map: one body for both.
//
//   which = 1   grad[n, c, t] = scale * sum over p, q of
//                                       grad_cost[n, p, q, t] * fmap2[n, c, t + d]
//   which = 2   grad[n, c, t] = scale * sum over p, q of
//                                       grad_cost[n, p, q, t - d] * fmap1[n, c, t - d]
//
// t are positions in the map of the gradient (targets), and d = first + spacing * (p, q). A term is
// left out where a position lies outside its map, or the one in fmap1 off the lattice. The kernel
// counts displacements such that both sums read
//
//   grad[n, c, t] = scale * sum over p, q of
//                                G[p, q, t] * source[n, c, t + first + spacing * (p, q)]
//
// As they are for which = 1, and backwards for which = 2: its p is patch_y - 1 - p there
// (`cost_p`, `cost_q`). The two gradients then differ only in where G lies: at the target's lattice
// index, or at the source's. With `l1` terms are G[p, q, t] * sign(own[n, c, t] - source[...]),
// where own is the map of the gradient, and a source is 0 outside its map. Targets lie `step`
// pixels apart and split into phases as in product.cu: inside a phase target m meets the source
// column advance * m + q. Pixels that are no target get zeros from their neighbour's block.
//
// Threads. A thread owns `positions` consecutive targets m of one row and phase in `channels`
// channels. A block owns `rows` target rows of one row phase, `groups` x `positions` targets of
// every column phase, and channel_groups * channels channels. It walks over the displacement rows.
// At step j row r takes displacement row p = (j - advance * r) mod patch_y. So the rows read the
// same source row j or, where p wrapped around, source row j + patch_y (and so on, where there are
// more rows than displacements):
//
//   step       j = 0   1   2   3   4        patch_y = 5, advance = 1
//   row 0  p =     0   1   2   3   4        source row   0  1  2  3  4
//   row 1  p =     4   0   1   2   3        source row   5  1  2  3  4
//   row 2  p =     3   4   0   1   2        source row   5  6  2  3  4
//
// Every source row is staged once per block. The source rows of one step have a slot each: slot s
// of step j holds source row j + s * patch_y. Sums are added in a fixed order.
//
// Launch: samples * phases_y * blocks_y * blocks_x * blocks_c blocks of `threads` threads, with
// `shared_words` accumulators of dynamic shared memory; for which = 2 the lattice step along x
// divides spacing_x; fewer than 2^31 elements per sample.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps
using accumulator = float;  // of sums
using upstream = float;     // of grad_cost: element, or accumulator after taps_spread
constexpr bool l1 = false;  // sum absolute differences
// The layer.
constexpr int which = 1;
constexpr int patch_y = 21, patch_x = 21;
constexpr int step_y = 1, step_x = 1;          // between targets
constexpr int lattice_y = 1, lattice_x = 1;    // between lattice positions
constexpr int spacing_y = 2, spacing_x = 2;
constexpr int phases_y = 2, phases_x = 2;
constexpr int advance_y = 1, advance_x = 1;
// The tile.
constexpr int positions = 4, channels = 8;  // of a thread
constexpr int displacements = 21;           // of a row, held in registers at a time
constexpr int groups = 2;                   // of positions, per column phase
constexpr int rows = 8;
constexpr int channel_groups = 4;
constexpr int vector = 1;           // elements per load from the source
constexpr int upstream_vector = 1;  // and from grad_cost
constexpr int result_vector = 1;    // elements per store to global memory
constexpr int pitch_g = 12, pitch_rows = 508;  // words per displacement and phase; per row
constexpr int pitch_s = 36;                    // words per channel and phase of the source
constexpr bool asynchronous = true;
constexpr bool upstream_asynchronous = true;
constexpr bool ahead = true;  // fetch the next step before computing this one
constexpr int buffers = 2;    // 2 if any copy is asynchronous, else 1
constexpr int threads = 128;
constexpr int shared_words = 17344;
#endif

#include "device.cuh"
#include "staging.cuh"

struct Sizes {
  int channels, height, width;
  int lattice_height, lattice_width;
  int origin_y, origin_x;    // pixel of the first lattice position
  int target_y, target_x;    // pixel of the first target, below step
  int targets_y, targets_x;  // number of targets
  int shift_y, shift_x;      // lattice index of G[..., 0] at the first target
  int first_y, first_x;      // pixels from a target to its first source
  int blocks_y, blocks_x, blocks_c;
};

constexpr int columns = groups * positions;
constexpr int source_columns = advance_x * (columns - 1) + patch_x;
constexpr int thread_columns = advance_x * (positions - 1) + displacements;  // read at a time
constexpr int lanes = phases_x * groups;  // threads along x
constexpr int block_channels = channel_groups * channels;
constexpr int source_rows = advance_y * (rows - 1) + patch_y;  // of a block, in all steps
constexpr int slots = ceil_div(source_rows, patch_y);          // source rows of one step
constexpr int g_words = rows * pitch_rows;
constexpr int source_words = block_channels * phases_x * pitch_s;
constexpr int buffer_words = g_words + slots * source_words;
constexpr int load = words_per_load<accumulator>;  // words of a 16-byte access
constexpr int line = lanes * positions + load;     // words of a row of results, padded
// Results leave through shared memory, of so many channels of a thread at a time.
constexpr int slices = smaller(channels, shared_words / (channel_groups * rows * line));

static_assert(channel_groups * rows * lanes <= threads, "every thread has its own outputs");
static_assert(buffers * buffer_words <= shared_words && slices >= 1, "shared memory is too small");
static_assert(!(asynchronous || upstream_asynchronous) || (buffers == 2 && ahead),
              "a copy must not meet what is in use");
static_assert(slots <= 32, "a bit for each source row that is fetched");
static_assert(threads % rows == 0, "as many threads fetch each row of G");
static_assert(upstream_vector == 1 || (which == 1 && phases_x == 1), "neighbours load together");
static_assert(which == 1 || (advance_x == 1 && step_x == lattice_x), "sources are on the lattice");
static_assert(pitch_g % load == 0 && pitch_rows % load == 0 && pitch_s % load == 0 &&
                  positions % load == 0, "alignment");
static_assert(displacements >= patch_x || displacements % load == 0,
              "alignment of a thread's source columns");
static_assert(pitch_rows >= patch_x * phases_x * pitch_g, "rows overlap");
static_assert(pitch_s >= round_up(advance_x * (columns - 1) + round_up(patch_x, load), load),
              "a thread's source columns leave their row");

using Source = Share<element, accumulator, threads, asynchronous, vector, block_channels,
                     source_columns * phases_x, phases_x, phases_x * pitch_s, pitch_s, 1>;
constexpr int row_threads = threads / rows;  // that fetch a target row's G
using Upstream = Share<upstream, accumulator, row_threads, upstream_asynchronous, upstream_vector,
                       patch_x, columns * phases_x, phases_x, phases_x * pitch_g, pitch_g, 1>;

// What a block owns.
struct OfBlock {
  int c0, m0, row0, phase_y, n;  // first channel, target column and row; phase; sample
  long long sample, costs;       // offsets of the maps and of grad_cost, elements

  __device__ __forceinline__ explicit OfBlock(const Sizes& s) {
    int rest = blockIdx.x;
    c0 = pop(rest, s.blocks_c) * block_channels;
    m0 = pop(rest, s.blocks_x) * columns;
    row0 = pop(rest, s.blocks_y) * rows;
    phase_y = pop(rest, phases_y);
    n = rest;
    sample = static_cast<long long>(n) * s.channels + c0;
    costs = static_cast<long long>(n) * (patch_y * patch_x) * s.lattice_height * s.lattice_width;
  }
};

// What a thread owns. Rows are fastest: then neighbours read the same words of the source.
struct OfThread {
  int row, channel_group, lane, phase, group;
  bool active;
  int at_g, at_source;  // its first words of G and of the source, in a buffer

  __device__ __forceinline__ explicit OfThread(int thread) {
    row = thread % rows;
    channel_group = thread / rows % channel_groups;
    lane = thread / (rows * channel_groups);
    phase = lane / groups;
    group = lane % groups;
    active = lane < lanes;
    at_g = row * pitch_rows + phase * pitch_g + group * positions;
    at_source = g_words + (channel_group * phases_x + phase) * pitch_s +
                advance_x * positions * group;
  }
};

// The columns of a block: k counts the targets of all phases, or their source columns.
struct Columns {
  const Sizes& s;
  int source_x0, v0;  // pixel of source column 0, lattice index of target column 0

  __device__ __forceinline__ Columns(const Sizes& sizes, const OfBlock& block)
      : s(sizes),
        source_x0(s.target_x + step_x * phases_x * block.m0 + s.first_x),
        v0(s.shift_x + phases_x * block.m0) {}

  __device__ __forceinline__ bool on_lattice(int v) const { return inside(v, s.lattice_width); }
  __device__ __forceinline__ int pixel(int k) const {  // of a source column
    return source_x0 + step_x * (k % phases_x) + spacing_x * (k / phases_x);
  }
  __device__ __forceinline__ bool source_exists(int k) const {
    return inside(pixel(k), s.width) && (which == 1 || on_lattice(v0 + k));
  }
  // The displacement column of grad_cost.
  static __device__ __forceinline__ int cost_q(int q) { return which == 1 ? q : patch_x - 1 - q; }
  // The source column that target column k meets at displacement q.
  static __device__ __forceinline__ int source_of(int q, int k) {
    return k % phases_x + phases_x * (advance_x * (k / phases_x) + q);
  }
  // The lattice column of G[., q] at target column k.
  __device__ __forceinline__ int v(int q, int k) const {
    return v0 + k + (which == 1 ? 0 : phases_x * q);
  }
  // For products a word of G exists only where its source does, so that each product is of two
  // values or of two zeros.
  __device__ __forceinline__ bool g_exists(int q, int k) const {
    return on_lattice(v(q, k)) && (l1 || source_exists(source_of(q, k)));
  }
};

// The rows of a block. Source row i lies in slot i / patch_y of step i % patch_y, and target row r
// meets it at displacement i - advance_y * r.
struct Rows {
  const Sizes& s;
  int source_y0, u0;  // pixel of source row 0; lattice row of target row 0, for which = 1

  __device__ __forceinline__ Rows(const Sizes& sizes, const OfBlock& block)
      : s(sizes),
        source_y0(s.target_y + step_y * block.phase_y + spacing_y * advance_y * block.row0 +
                  s.first_y),
        u0(s.shift_y + phases_y * block.row0 + block.phase_y) {}

  // The slot of the source row that target row r meets at step j: how often p wrapped around.
  static __device__ __forceinline__ int slot(int j, int r) {
    const int behind = advance_y * r - j;
    if (behind <= 0) return 0;
    return slots > 2 ? ceil_div(behind, patch_y) : 1;
  }
  __device__ __forceinline__ int pixel(int i) const { return source_y0 + spacing_y * i; }
  // The lattice row of source row i; -1 where there is none.
  __device__ __forceinline__ int lattice_row(int i) const {
    return lattice_index(pixel(i), s.origin_y, lattice_y, s.lattice_height);
  }
  __device__ __forceinline__ bool source_exists(int i) const {
    return i < source_rows && inside(pixel(i), s.height);
  }
  // Whether source row i has terms. For l1 it has some, with zeros, where it lies outside.
  __device__ __forceinline__ bool source_counts(int i) const {
    return i < source_rows && (l1 || inside(pixel(i), s.height)) &&
           (which == 1 || lattice_row(i) >= 0);
  }
  __device__ __forceinline__ bool target_counts(int r) const {
    return which == 2 || inside(u0 + phases_y * r, s.lattice_height);
  }
  // The displacement row of grad_cost, and its lattice row, that target row r needs at step j.
  __device__ __forceinline__ int cost_p(int j, int r) const {
    const int p = j + slot(j, r) * patch_y - advance_y * r;
    return which == 1 ? p : patch_y - 1 - p;
  }
  __device__ __forceinline__ int cost_u(int j, int r) const {
    return which == 1 ? u0 + phases_y * r : lattice_row(j + slot(j, r) * patch_y);
  }
  // Whether target row r has terms at step j.
  __device__ __forceinline__ bool counts(int j, int r) const {
    return target_counts(r) && source_counts(j + slot(j, r) * patch_y);
  }
  // The first step from j on that has terms.
  __device__ __forceinline__ int next_step(int j) const {
    for (; j < patch_y; ++j) {
      bool some = false;
#pragma unroll
      for (int i = 0; i < slots; ++i) some = some || source_counts(j + i * patch_y);
      if (some) break;
    }
    return j;
  }
};

// The copies of one step to shared memory: G of every target row, by as many threads each, and the
// source rows.
struct Staging {
  Upstream share_g;
  Source share_source;
  Upstream::Fetched fetched_g;
  Source::Fetched fetched_source[slots];
  int row;               // whose G this thread fetches
  bool ragged = false;   // some words of its copies of G do not exist
  bool g_fetched = false;
  unsigned fetched = 0;  // bit of a slot: its source row

  __device__ __forceinline__ void find(int thread, accumulator* shared, const Columns& columns,
                                       int plane, int lattice, int channels_left) {
    row = thread / row_threads;
    share_source.find(
        thread, shared, g_words, [&](int c, int k) { return c * plane + columns.pixel(k); },
        [&](int c, int k) { return c < channels_left && columns.source_exists(k); });
    share_g.find(
        thread % row_threads, shared, row * pitch_rows,
        [&](int q, int k) { return Columns::cost_q(q) * lattice + columns.v(q, k); },
        [&](int q, int k) {
          const bool first = columns.g_exists(q, k);
          const bool last = columns.g_exists(q, k + upstream_vector - 1);
          ragged = ragged || first != last;
          return first || last;
        });
  }

  // Fetch step j to the buffer that begins at word `buffer`. Rows that do not exist are neither
  // fetched nor used. (For l1 terms with a source row outside count; `land` zeroes its slot.)
  __device__ __forceinline__ void fetch(int j, int buffer, const Rows& r, const Sizes& s,
                                        const upstream* grad_cost, const element* source) {
    const int plane = s.height * s.width, lattice = s.lattice_height * s.lattice_width;
    const int next_q = which == 1 ? lattice : phases_x - lattice;  // from G[., q] to G[., q + 1]
    g_fetched = r.counts(j, row);
    share_g.fetch(grad_cost + (r.cost_p(j, row) * patch_x * lattice +
                               r.cost_u(j, row) * s.lattice_width),
                  0, next_q, fetched_g, buffer, 0, g_fetched);
    fetched = 0;
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) {
      const int i = j + slot * patch_y;
      if (!r.source_exists(i)) continue;
      fetched |= 1u << slot;
      share_source.fetch(source + r.pixel(i) * s.width, 0, plane, fetched_source[slot],
                         buffer + slot * source_words, 0);
    }
  }

  // Store what was fetched last.
  __device__ __forceinline__ void land(int j, accumulator* buffer, int thread,
                                       const Columns& columns) {
    if (g_fetched) share_g.land(fetched_g, buffer, 0);
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) {
      accumulator* const words = buffer + slot * source_words;
      if (fetched >> slot & 1) {
        share_source.land(fetched_source[slot], words, 0);
      } else if (l1 && j + slot * patch_y < source_rows) {
        share_source.erase(words);
      }
    }
    if (asynchronous || upstream_asynchronous) wait_for_copies();
    if (upstream_vector == 1 || !ragged || !g_fetched) return;
    share_g.trim(thread % row_threads, buffer,
                 [&](int q, int k) { return columns.g_exists(q, k); });
  }
};

using Tile = accumulator[channels][positions];  // a value for each of a thread's targets

// Read the map's values at a thread's targets, which l1 compares with the sources.
__device__ __forceinline__ void load_own(Tile& own, const element* map, const OfBlock& block,
                                         const OfThread& thread, const Sizes& s) {
  const int y = s.target_y + step_y * (phases_y * (block.row0 + thread.row) + block.phase_y);
#pragma unroll
  for (int c = 0; c < channels; ++c) {
    const int channel = c * channel_groups + thread.channel_group;
#pragma unroll
    for (int m = 0; m < positions; ++m) {
      const int column = phases_x * (block.m0 + thread.group * positions + m) + thread.phase;
      const int x = s.target_x + step_x * column;
      if (!thread.active || block.c0 + channel >= s.channels) continue;
      if (!inside(y, s.height) || !inside(x, s.width)) continue;
      own[c][m] = widen(map[channel * s.height * s.width + y * s.width + x]);
    }
  }
}

// Add the terms of step j to a thread's sums; `buffer` holds what the step needs.
__device__ __forceinline__ void add_terms(Tile& sums, const Tile& own, int j,
                                          const accumulator* buffer, const OfThread& thread) {
  const accumulator* const g = buffer + thread.at_g;
  const accumulator* const source =
      buffer + thread.at_source + Rows::slot(j, thread.row) * source_words;
#pragma unroll
  for (int q0 = 0; q0 < patch_x; q0 += displacements) {
    accumulator held[displacements][positions];  // G
#pragma unroll
    for (int q = 0; q < displacements; ++q) {
      if (q0 + q >= patch_x) continue;
#pragma unroll
      for (int m = 0; m < positions; m += load) {
        load_words(&held[q][m], g + (q0 + q) * phases_x * pitch_g + m);
      }
    }
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      accumulator two[round_up(thread_columns, load)];
#pragma unroll
      for (int k = 0; k < thread_columns; k += load) {
        if (q0 + k < advance_x * (positions - 1) + patch_x) {
          load_words(two + k, source + c * channel_groups * phases_x * pitch_s + q0 + k);
        }
      }
#pragma unroll
      for (int q = 0; q < displacements; ++q) {
        if (q0 + q >= patch_x) continue;
#pragma unroll
        for (int m = 0; m < positions; ++m) {
          add_slope<l1>(sums[c][m], held[q][m], own[c][m], two[advance_x * m + q]);
        }
      }
    }
  }
}

// Write a block's sums through shared memory, so that whole pixel rows leave at a time, with the
// zeros between the targets. The first target of an axis brings the pixels before it along.
__device__ __forceinline__ void store_sums(const Tile& sums, accumulator* shared, element* grad,
                                           const OfBlock& block, const OfThread& own, int thread,
                                           const Columns& columns_of, const Sizes& s,
                                           accumulator scale) {
  constexpr int before = step_x - 1;  // pixels before the first target, at most
  constexpr int units = ceil_div(lanes * positions * step_x + before, result_vector);
  constexpr int places = rows * units;                  // a store of a row, in each channel
  constexpr int sharers = larger(1, threads / places);  // threads that serve a place
  const int plane = s.height * s.width, m0 = block.m0;
  const int first_x = s.target_x + step_x * phases_x * m0, left = m0 == 0 ? 0 : first_x;
  const int right = smaller(s.width, first_x + step_x * phases_x * columns);
#pragma unroll
  for (int k0 = 0; k0 < channels; k0 += slices) {
    __syncthreads();
    if (own.active) {
      store_rows<slices>(shared + (own.channel_group * rows + own.row) * line +
                             own.lane * positions,
                         channel_groups * rows * line, sums, k0);
    }
    __syncthreads();
    const int first = k0 * channel_groups;
    const int count = smaller(smaller(slices * channel_groups, block_channels - first),
                              s.channels - block.c0 - first);
#pragma unroll 1
    for (int i = thread; i < places * sharers; i += threads) {
      const int row = i % places / units, x = first_x - before + i % units * result_vector;
      const int t = phases_y * (block.row0 + row) + block.phase_y, y = s.target_y + step_y * t;
      if (x < left || x >= right || t >= s.targets_y) continue;
      const int column = larger(0, (x - first_x) / step_x);
      bool is_target[result_vector];
#pragma unroll
      for (int k = 0; k < result_vector; ++k) {
        // Off the lattice of fmap1 there are no terms, though 0 * infinity may have been added.
        is_target[k] = x >= first_x && (x - first_x) % step_x == 0 &&
                       (which == 2 || columns_of.on_lattice(columns_of.v0 + column + k));
      }
      element* to = grad + (first + i / places) * plane + x;
#pragma unroll 4
      for (int c = i / places; c < count; c += sharers, to += sharers * plane) {
        accumulator values[result_vector];
        load_columns<phases_x, columns>(values, shared + (c * rows + row) * line, column);
        element rounded[result_vector], zeros[result_vector];
#pragma unroll
        for (int k = 0; k < result_vector; ++k) {
          rounded[k] = narrow<element>(is_target[k] ? values[k] * scale : accumulator(0));
          zeros[k] = narrow<element>(accumulator(0));
        }
        store_neighbours(to + y * s.width, rounded);
#pragma unroll
        for (int below = y + 1; below < y + step_y; ++below) {
          if (below < s.height) store_neighbours(to + below * s.width, zeros);
        }
        if (step_y == 1 || t > 0) continue;
#pragma unroll 1
        for (int above = 0; above < y; ++above) store_neighbours(to + above * s.width, zeros);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(threads, 1) product_gradient(
    const upstream* __restrict__ grad_cost, const element* __restrict__ fmap1,
    const element* __restrict__ fmap2, element* __restrict__ grad, const Sizes s,
    const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  const int thread = threadIdx.x, plane = s.height * s.width;
  const OfBlock block(s);
  const OfThread own_part(thread);
  const Columns columns_of(s, block);
  const Rows rows_of(s, block);
  const element* const source = (which == 1 ? fmap2 : fmap1) + block.sample * plane;

  Staging staging;
  staging.find(thread, shared, columns_of, plane, s.lattice_height * s.lattice_width,
               s.channels - block.c0);
  Tile own = {}, sums = {};
  if constexpr (l1) {
    const element* const map = (which == 1 ? fmap1 : fmap2) + block.sample * plane;
    load_own(own, map, block, own_part, s);
  }

  // One or two buffers, as in product.cu.
  clear<threads>(shared, buffers * buffer_words, thread);
  __syncthreads();
  const auto fetch = [&](int j, int buffer) {
    staging.fetch(j, buffer, rows_of, s, grad_cost + block.costs, source);
  };
  int buffer = 0, j = rows_of.next_step(0);
  if (ahead && j < patch_y) fetch(j, buffer);
#pragma unroll 1
  while (j < patch_y) {
    const int next = rows_of.next_step(j + 1), other = (buffers - 1) * buffer_words - buffer;
    if (!ahead) fetch(j, buffer);
    if (buffers == 1) __syncthreads();
    staging.land(j, shared + buffer, thread, columns_of);
    __syncthreads();
    if (ahead && next < patch_y) fetch(next, other);
    if (own_part.active && rows_of.counts(j, own_part.row)) {
      add_terms(sums, own, j, shared + buffer, own_part);
    }
    buffer = other;
    j = next;
  }
  store_sums(sums, shared, grad + block.sample * plane, block, own_part, thread, columns_of, s,
             scale);
}
