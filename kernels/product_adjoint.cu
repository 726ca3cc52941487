// The gradient of product.cu's cost with respect to one map: one body for both.
//
//   which = 1   grad[n, c, t] = scale * sum over p, q of grad_cost[n, p, q, t] * fmap2[n, c, t + d]
//   which = 2   grad[n, c, t] = scale * sum over p, q of grad_cost[n, p, q, t - d] * fmap1[n, c, t - d]
//
// t are positions in the map of the gradient (targets), d = first + spacing * (p, q), and terms are
// left out where a position lies outside its map or the one in fmap1 off the lattice. With the
// displacements counted backwards for which = 2, i = patch_y - 1 - p and e = patch_x - 1 - q, both read
//
//   grad[n, c, t] = scale * sum over i, e of G[i, e, t] * source[n, c, t + first + spacing * (i, e)]
//
// and differ only in where G lies: at the target's lattice index, or at the source's. With
// `differences` terms are G[i, e, t] * sign(own[n, c, t] - source[...]), own being the map of the
// gradient, and a source is 0 outside of its map. Targets lie
// `step` pixels apart and split into phases as in product.cu: in one phase target m meets the
// source column advance * m + e. Pixels that are no target get zeros from their neighbour's block.
//
// Threads. A thread owns `positions` consecutive targets m of one row and phase in
// `channels` channels. A block owns `rows` target rows of one row phase, `groups` x `positions`
// targets of every column phase and channel_groups * channels channels. It walks over the
// displacement rows; at step j row r takes displacement row i = (j - advance * r) mod patch_y, so that
// rows read the same source row j, or, where that wrapped around, row j + patch_y (and so on, where
// there are more rows than displacements):
//
//   step       j = 0   1   2   3   4        patch_y = 5, advance = 1
//   row 0  i =     0   1   2   3   4        source row   0  1  2  3  4
//   row 1  i =     4   0   1   2   3        source row   5  1  2  3  4
//   row 2  i =     3   4   0   1   2        source row   5  6  2  3  4
//
// So every source row is staged once per block, those that are needed at a time in a slot each, and
// sums are added in a fixed order.
//
// Launch: samples * phases_y * blocks_y * blocks_x * blocks_c blocks of `threads` threads, with
// `shared_words` accumulators of dynamic shared memory; for which = 2 the lattice step along x
// divides spacing_x; fewer than 2^31 elements per sample.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps
using accumulator = float;  // of sums
using upstream = float;     // of grad_cost: element, or accumulator after a window spread
constexpr bool differences = false;
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
constexpr int window = advance_x * (positions - 1) + displacements;
constexpr int lanes = phases_x * groups;
constexpr int block_channels = channel_groups * channels;
constexpr int source_rows = advance_y * (rows - 1) + patch_y;  // that the block needs in all
constexpr int slots = ceil_div(source_rows, patch_y);          // of them in one step
constexpr int g_words = rows * pitch_rows;
constexpr int source_words = block_channels * phases_x * pitch_s;
constexpr int buffer_words = g_words + slots * source_words;
constexpr int load = words_per_load<accumulator>;
constexpr int line = lanes * positions + load;
constexpr int slices = smaller(channels, shared_words / (channel_groups * rows * line));

static_assert(channel_groups * rows * lanes <= threads, "every thread has its own outputs");
static_assert(buffers * buffer_words <= shared_words && slices >= 1, "shared memory is too small");
static_assert(!(asynchronous || upstream_asynchronous) || (buffers == 2 && ahead),
              "a copy must not meet what is in use");
static_assert(rows + slots <= 32, "a bit for each row that is fetched");
static_assert(which == 1 || (advance_x == 1 && step_x == lattice_x), "sources are on the lattice");
static_assert(pitch_g % load == 0 && pitch_rows % load == 0 && pitch_s % load == 0 &&
                  positions % load == 0, "alignment");
static_assert(displacements >= patch_x || displacements % load == 0, "alignment of windows");
static_assert(pitch_rows >= patch_x * phases_x * pitch_g, "rows overlap");
static_assert(pitch_s >= round_up(advance_x * (columns - 1) + round_up(patch_x, load), load),
              "a thread's window leaves its row");

using Source = Share<element, accumulator, threads, asynchronous, vector, block_channels,
                     source_columns * phases_x, phases_x, phases_x * pitch_s, pitch_s, 1>;
using Upstream = Share<upstream, accumulator, threads, upstream_asynchronous, 1,
                       patch_x, columns * phases_x, phases_x, phases_x * pitch_g, pitch_g, 1>;

extern "C" __global__ void __launch_bounds__(threads, 1) product_gradient(
    const upstream* __restrict__ grad_cost, const element* __restrict__ fmap1,
    const element* __restrict__ fmap2, element* __restrict__ grad, const Sizes s,
    const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  const int thread = threadIdx.x;
  const element* const source = which == 1 ? fmap2 : fmap1;
  const int plane = s.height * s.width, lattice = s.lattice_height * s.lattice_width;

  // What this block owns.
  int rest = blockIdx.x;
  const int c0 = pop(rest, s.blocks_c) * block_channels, m0 = pop(rest, s.blocks_x) * columns;
  const int row0 = pop(rest, s.blocks_y) * rows;
  const int phase_y = pop(rest, phases_y), n = rest;

  // What this thread owns. Rows are fastest: then neighbours read the same words of the source.
  const int row = thread % rows, channel_group = thread / rows % channel_groups;
  const int lane = thread / (rows * channel_groups), phase = lane / groups, group = lane % groups;
  const bool active = lane < lanes;
  const int at_g = row * pitch_rows + phase * pitch_g + group * positions;
  const int at_source = g_words + (channel_group * phases_x + phase) * pitch_s +
                        advance_x * positions * group;

  // Pixels and lattice indices of the sources.
  const int source_y0 =
      s.target_y + step_y * phase_y + spacing_y * advance_y * row0 + s.first_y;
  const int source_x0 = s.target_x + step_x * phases_x * m0 + s.first_x;
  const int v0 = s.shift_x + phases_x * m0;
  const auto pixel_x = [&](int k) {  // of column k, in pixel order
    return source_x0 + step_x * (k % phases_x) + spacing_x * (k / phases_x);
  };
  const auto on_lattice = [&](int v) { return inside(v, s.lattice_width); };
  const auto column_exists = [&](int k) {
    return inside(pixel_x(k), s.width) && (which == 1 || on_lattice(v0 + k));
  };
  const long long sample = static_cast<long long>(n) * s.channels + c0;
  const long long costs = static_cast<long long>(n) * (patch_y * patch_x) * lattice;

  Source share_source;
  share_source.find(
      thread, shared, g_words, [&](int c, int k) { return c * plane + pixel_x(k); },
      [&](int c, int k) { return c0 + c < s.channels && column_exists(k); });

  // G[i, e] of the targets' columns k: lattice index v, displacement q. For products a word exists
  // only where its source does, so that each is of two values or of two zeros.
  const auto source_column = [&](int e, int k) {
    return k % phases_x + phases_x * (advance_x * (k / phases_x) + e);
  };
  const auto g_column = [&](int e, int k) { return v0 + k + (which == 1 ? 0 : phases_x * e); };
  const auto g_patch = [&](int e) { return which == 1 ? e : patch_x - 1 - e; };
  const int g_row = which == 1 ? lattice : phases_x - lattice;  // from one e to the next
  Upstream share_g;
  share_g.find(
      thread, shared, 0, [&](int e, int k) { return g_patch(e) * lattice + g_column(e, k); },
      [&](int e, int k) {
        return on_lattice(g_column(e, k)) && (differences || column_exists(source_column(e, k)));
      });

  // The displacement row of target row r at step j, and whether its terms exist: the pixel row of
  // the source, and the lattice row u of G.
  const auto displacement_row = [&](int j, int r) {
    int i = j - advance_y * r;
    if (slots > 2) i %= patch_y;  // else it is not below -patch_y
    return i < 0 ? i + patch_y : i;
  };
  const auto source_row = [&](int j, int r) {
    return source_y0 + spacing_y * (advance_y * r + displacement_row(j, r));
  };
  const auto lattice_row = [&](int j, int r) {
    if (which == 2) return lattice_index(source_row(j, r), s.origin_y, lattice_y, s.lattice_height);
    const int u = s.shift_y + phases_y * (row0 + r) + phase_y;
    return inside(u, s.lattice_height) ? u : -1;
  };
  const auto row_exists = [&](int j, int r) {
    return (differences || inside(source_row(j, r), s.height)) && lattice_row(j, r) >= 0;
  };
  const auto slot_row = [&](int j, int slot) { return source_y0 + spacing_y * (j + slot * patch_y); };
  const auto slot_needed = [&](int j, int slot) { return j + slot * patch_y < source_rows; };
  const auto slot_exists = [&](int j, int slot) {
    return slot_needed(j, slot) && inside(slot_row(j, slot), s.height);
  };
  const auto slot_counts = [&](int j, int slot) {  // for which = 1 a target's G counts by itself
    if (!differences) return slot_exists(j, slot);
    return slot_needed(j, slot) &&
           (which == 1 || lattice_index(slot_row(j, slot), s.origin_y, lattice_y,
                                        s.lattice_height) >= 0);
  };
  const auto step_exists = [&](int j) {  // for any row
    bool exists = false;
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) exists = exists || slot_counts(j, slot);
    return exists;
  };
  const auto next_step = [&](int j) {
    while (j < patch_y && !step_exists(j)) ++j;
    return j;
  };

  // Rows that do not exist are neither fetched nor used; but differences from a source row outside
  // of its map are, and its slot may still hold another row.
  Upstream::Fetched fetched_g[rows];
  Source::Fetched fetched_source[slots];
  unsigned fetched_rows = 0;  // bit r: row r of G; bit rows + slot: a row of the source
  const auto fetch = [&](int j, int buffer) {  // to the buffer that begins at this word
    fetched_rows = 0;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!row_exists(j, r)) continue;
      fetched_rows |= 1u << r;
      const int i = displacement_row(j, r), p = which == 1 ? i : patch_y - 1 - i;
      const upstream* const base =
          grad_cost + costs + p * patch_x * lattice + lattice_row(j, r) * s.lattice_width;
      share_g.fetch(base, 0, g_row, fetched_g[r], buffer + r * pitch_rows, 0);
    }
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) {
      if (!slot_exists(j, slot)) continue;
      const int y = slot_row(j, slot);
      fetched_rows |= 1u << (rows + slot);
      share_source.fetch(source + sample * plane + y * s.width, 0, plane, fetched_source[slot],
                         buffer + slot * source_words, 0);
    }
  };
  const auto land = [&](int j, int buffer) {  // what was fetched last
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (fetched_rows >> r & 1) share_g.land(fetched_g[r], shared + buffer + r * pitch_rows, 0);
    }
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) {
      accumulator* const words = shared + buffer + slot * source_words;
      if (fetched_rows >> (rows + slot) & 1) {
        share_source.land(fetched_source[slot], words, 0);
      } else if (differences && slot_needed(j, slot)) {
        share_source.erase(words);
      }
    }
    if (asynchronous || upstream_asynchronous) wait_for_copies();
  };

  // This thread's targets: differences need their values.
  accumulator own[channels][positions] = {};
  if constexpr (differences) {
    const element* const map = (which == 1 ? fmap1 : fmap2) + sample * plane;
    const int y = s.target_y + step_y * (phases_y * (row0 + row) + phase_y);
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      const int channel = c * channel_groups + channel_group;
#pragma unroll
      for (int m = 0; m < positions; ++m) {
        const int column = phases_x * (m0 + group * positions + m) + phase;
        const int x = s.target_x + step_x * column;
        if (!active || c0 + channel >= s.channels) continue;
        if (!inside(y, s.height) || !inside(x, s.width)) continue;
        own[c][m] = widen(map[channel * plane + y * s.width + x]);
      }
    }
  }

  accumulator sums[channels][positions] = {};
  const auto multiply = [&](int j, int buffer) {
    const accumulator* const g = shared + buffer + at_g;
    const int slot = (advance_y * row + displacement_row(j, row) - j) / patch_y;
    const accumulator* const words = shared + buffer + at_source + slot * source_words;
#pragma unroll
    for (int e0 = 0; e0 < patch_x; e0 += displacements) {
      accumulator held[displacements][positions];
#pragma unroll
      for (int e = 0; e < displacements; ++e) {
        if (e0 + e >= patch_x) continue;
#pragma unroll
        for (int m = 0; m < positions; m += load) {
          load_words(&held[e][m], g + (e0 + e) * phases_x * pitch_g + m);
        }
      }
#pragma unroll
      for (int c = 0; c < channels; ++c) {
        accumulator two[round_up(window, load)];
#pragma unroll
        for (int k = 0; k < window; k += load) {
          if (e0 + k < advance_x * (positions - 1) + patch_x) {
            load_words(two + k, words + c * channel_groups * phases_x * pitch_s + e0 + k);
          }
        }
#pragma unroll
        for (int e = 0; e < displacements; ++e) {
          if (e0 + e >= patch_x) continue;
#pragma unroll
          for (int m = 0; m < positions; ++m) {
            add_slope<differences>(sums[c][m], held[e][m], own[c][m], two[advance_x * m + e]);
          }
        }
      }
    }
  };

  // One or two buffers, as in product.cu.
  clear<threads>(shared, buffers * buffer_words, thread);
  __syncthreads();
  int buffer = 0, j = next_step(0);
  if (ahead && j < patch_y) fetch(j, buffer);
#pragma unroll 1
  while (j < patch_y) {
    const int next = next_step(j + 1), other = (buffers - 1) * buffer_words - buffer;
    if (!ahead) fetch(j, buffer);
    if (buffers == 1) __syncthreads();
    land(j, buffer);
    __syncthreads();
    if (ahead && next < patch_y) fetch(next, other);
    if (active && row_exists(j, row)) multiply(j, buffer);
    buffer = other;
    j = next;
  }

  // Lines leave through shared memory: whole pixel rows, zeros between the targets included. The
  // first target of an axis brings the pixels before it along.
  const int left = m0 == 0 ? 0 : s.target_x + step_x * phases_x * m0;
  const int right = smaller(s.width, s.target_x + step_x * phases_x * (m0 + columns));
  const int units = ceil_div(larger(0, right - left), result_vector);
#pragma unroll
  for (int k0 = 0; k0 < channels; k0 += slices) {
    __syncthreads();
    if (active) {
      store_rows<slices>(shared + (channel_group * rows + row) * line + lane * positions,
                         channel_groups * rows * line, sums, k0);
    }
    __syncthreads();
    for (int i = thread; i < slices * channel_groups * rows * units; i += threads) {
      const int x = left + i % units * result_vector, at = i / units;  // at: (channel, row)
      const int channel = k0 * channel_groups + at / rows, c = c0 + channel;
      const int t = phases_y * (row0 + at % rows) + phase_y, y = s.target_y + step_y * t;
      if (channel >= block_channels || c >= s.channels || t >= s.targets_y) continue;
      Pack<element, result_vector> pack, zeros;
#pragma unroll
      for (int k = 0; k < result_vector; ++k) {
        const int distance = x + k - s.target_x, column = distance / step_x - phases_x * m0;
        // Off the lattice of fmap1 there are no terms, though 0 * infinity may have been added.
        const bool is_target = distance >= 0 && distance % step_x == 0 &&
                               (which == 2 || on_lattice(v0 + column));
        const accumulator sum =
            is_target ? shared[at * line + column % phases_x * columns + column / phases_x]
                      : accumulator(0);
        pack.values[k] = narrow<element>(sum * scale);
        zeros.values[k] = narrow<element>(accumulator(0));
      }
      const int bottom = smaller(s.height, y + step_y);
      for (int to = t == 0 ? 0 : y; to < bottom; ++to) {
        *reinterpret_cast<Pack<element, result_vector>*>(
            grad + (sample + channel) * plane + to * s.width + x) = to == y ? pack : zeros;
      }
    }
  }
}
