// The gradient of a cost volume with respect to one map, summed over displacements on tensor cores:
// that of product_adjoint.cu. Elements have 16 bits, or are floats, which are rounded to TF32
// before they are multiplied.
//
//   grad[n, c, t] = scale * sum over p, q of
//                                G[p, q, t] * source[n, c, t + first + spacing * (p, q)]
//
// With `channels_last` the channels of grad and source come last.
//
// Targets t, displacements (p, q), G, phases and `advance` are those of product_adjoint.cu: inside
// a phase target m meets the source column k = advance * m + q. Pixels that are no target get zeros
// from the target before them.
//
// Tiles. Of 16 targets, a tile, and a row of the source all terms are one product of two matrices:
// the band of G, which is 0 where k - advance * m is no displacement, and the source's pixels.
//
//   column k     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//   target 0    G0 G1 G2 G3 G4                                     patch of 5, advance 1
//   target 1       G0 G1 G2 G3 G4
//   ...
//   target 7                         G0 G1 G2 G3 G4
//
// The 16 targets are 16 neighbours of a phase or, which wastes less of a small patch, 8 in each of
// two rows: row j of a tile meets row e of the source at the displacement p = e - advance_y * j.
//
// G has the type of the maps, or is float where taps_spread has summed it. A float beside maps of
// 16 bits is split into parts of 16 bits, each of what those before it leave, and all parts are
// multiplied: two of Half keep 23 of its 24 binary digits, three of Bfloat16 keep all.
//
// Threads. A warp owns row_tiles tiles below each other in 8 * channel_tiles channels, a block
// x_groups warps side by side, of each of `phases` column phases and one row phase, and
// channel_groups times as many channels. It walks over the rows of the source that its targets
// meet. Of each it stages the pixels and, for every target row, the displacement row of G that
// leads there, as [q][target]. Rows of zeros before and behind stand for what lies beside the band.
//
// What is not finite stays where it belongs. Zeros of the band meet pixels that are no terms, and
// 0 * infinity is NaN: a result that is not finite is summed anew, from its own terms only.
//
// Launch: samples * phases_y * phase_groups * blocks_y * blocks_x * blocks_c blocks of `threads`
// threads, with `shared_words` words of dynamic shared memory; compute capability 8.0 or higher;
// for which = 2 the lattice step along x divides spacing_x; fewer than 2^31 elements per sample.

#include "device.cuh"

#ifndef CUPYCORR_CONSTANTS
using element = Half;       // of maps and gradients: Half, Bfloat16 or float
using accumulator = float;  // of sums
using upstream = Half;      // of G: element, or accumulator if taps_spread comes first
// The layer.
constexpr int which = 1;
constexpr int patch_y = 21, patch_x = 21;
constexpr int step_y = 1, step_x = 1;  // between targets
constexpr int lattice_y = 1;           // between rows of lattice positions
constexpr int spacing_y = 2, spacing_x = 2;
constexpr int phases_y = 2, phases_x = 2;
constexpr int advance_y = 1, advance_x = 1;
// The tile.
constexpr int tile_rows = 2;       // of 16 targets: 1 or 2
constexpr int row_tiles = 4;       // tiles of a warp, below each other
constexpr int channel_tiles = 8;   // of 8 channels, of a warp
constexpr int x_groups = 2;        // warps side by side
constexpr int phases = 2;          // column phases of a block
constexpr int channel_groups = 2;  // warps that share the targets
constexpr int at_once = 1;         // rows of the source that are staged at a time
constexpr int buffers = 2;         // 1 only if those are all rows
constexpr bool channels_last = true;  // whether a pixel's channels lie side by side
constexpr int vector = 8;  // of those per copy, 1: through registers; or pixels per load
constexpr int source_lead = 0;       // pixels before the first, so that loads are aligned
constexpr int unit = 8;              // elements of G per copy; 1 of 16 bits: through registers
constexpr int lead = 0;              // elements of G before the first, so that copies are aligned
constexpr int result_vector = 8;     // elements per store to global memory
constexpr int threads = 256;
constexpr int shared_words = 22000;
#endif

#include "matrices.cuh"

struct Sizes {
  int channels, height, width;
  int lattice_height, lattice_width;
  int origin_y;              // pixel of the first lattice row
  int target_y, target_x;    // pixel of the first target, below step
  int targets_y, targets_x;  // number of targets
  int shift_y, shift_x;      // lattice index of G[..., 0] at the first target
  int first_y, first_x;      // pixels from a target to its first source
  int blocks_y, blocks_x, blocks_c;
};

constexpr int tile_columns = 16 / tile_rows;
constexpr int rows = row_tiles * tile_rows;       // of targets, in a block
constexpr int columns = x_groups * tile_columns;  // of targets of a phase
constexpr int before = advance_x * (tile_columns - 1);  // rows of zeros before those of G
constexpr int element_bytes = static_cast<int>(sizeof(element));
constexpr int upstream_bytes = static_cast<int>(sizeof(upstream));
constexpr bool halves = element_bytes == 2;
constexpr int parts = element_bytes == upstream_bytes ? 1 : is_bfloat16<element> ? 3 : 2;  // of G
constexpr int depth = 32 / element_bytes;  // columns of a product
constexpr int depths = ceil_div(before + patch_x, depth);  // products in a row of the source
constexpr int unrolled = depths <= 4 ? depths : 2;
constexpr int meeting = patch_y + advance_y * (tile_rows - 1);  // rows that a tile meets
constexpr int source_rows = patch_y + advance_y * (rows - 1);   // and a block
constexpr int source_columns = advance_x * (columns - tile_columns) + depth * depths;
constexpr int met_columns = advance_x * (columns - 1) + patch_x;  // the others stay 0
constexpr int block_channels = 8 * channel_tiles * channel_groups;
constexpr int phase_groups = ceil_div(phases_x, phases);

// Where lanes read halves of 8 neighbouring rows, or floats of 4, these lie in different banks.
constexpr int pitch = block_channels + 8;  // elements of a pixel
constexpr int slot_bytes = pitch * element_bytes;
// Pixels lie in slots [phase][column], eight slots in a group. If channels lie apart, a row has the
// slots of whole runs.
constexpr int last_phase = step_x * (phases - 1);
constexpr int row_pixels = last_phase + spacing_x * (met_columns - 1) + 1;
constexpr int runs = ceil_div(source_lead + row_pixels, 8 * spacing_x);
constexpr int before_runs = channels_last ? 0 : ceil_div((source_lead + last_phase) / spacing_x, 8);
constexpr int behind_runs = larger(0, source_columns / 8 - runs);
constexpr int of_phase = channels_last ? source_columns / 8 : before_runs + runs + behind_runs;
constexpr int group_bytes = 8 * slot_bytes + (channels_last ? 0 : 32);
constexpr int pixels = 8 * phases * of_phase;
constexpr int own_columns = phases * columns;  // of G, in a row of displacements
constexpr int moved = larger(unit, 4 / upstream_bytes);  // elements that are copied together
// The columns of G that the targets need are for which = 1 the same in every row of displacements,
// for which = 2 they shift by `phases` from row to row. Rows of floats begin with the first copy
// that has one of them, rows of halves with column 0: there a lane reads two rows by one address.
constexpr bool shifts = which == 2 && upstream_bytes == 4;
constexpr int columns_g = shifts       ? own_columns + moved - 1
                          : which == 1 ? lead + own_columns
                                       : lead + phases * source_columns;
constexpr int pitch_g = 8 * (ceil_div(columns_g, 8) | 1);
constexpr int rows_g = depth * depths;  // from target row to target row, with rows of zeros
constexpr int g_elements = (before + rows * rows_g) * pitch_g;
constexpr int source_bytes = phases * of_phase * group_bytes;
constexpr int row_bytes = source_bytes + g_elements * upstream_bytes;
constexpr int buffer_bytes = at_once * row_bytes;
// Elements of G from one column of the source to the next, and from one target to the next.
constexpr int along = pitch_g + (which == 1 || shifts ? 0 : phases);
constexpr int across = (which == 1 || shifts ? phases : 0) - advance_x * pitch_g;
// Results of a tile, if channels lie apart: words of two channels, or floats of one,
// [word][row][phase][column]. Four words that a warp stores at once lie in different banks: the
// pitch is an odd number of 8 words, and floats of 8 channels are followed by 8 words more.
constexpr int targets = tile_rows * phases * columns;
constexpr int of_word = 4 / element_bytes;  // channels
constexpr int pitch_out = 8 * (targets / 8 | 1);
constexpr int words_out = block_channels / of_word * pitch_out + (halves ? 0 : block_channels);
constexpr int out_bytes = channels_last ? targets * slot_bytes : 4 * words_out;
// A lane reads two columns at a time, neighbours or 4 apart: so that lanes use different banks.
constexpr int apart = upstream_bytes == 4 || (which == 2 && phases % 2 == 0) ? 4 : 1;
// A lane reads so many neighbouring floats of a pixel at once, one for each of as many products.
constexpr int wide = halves ? 2 : smaller(4, channel_tiles);

static_assert(element_bytes <= 4, "tensor cores multiply elements of 16 bits, and TF32");
static_assert(upstream_bytes == element_bytes || upstream_bytes == 4, "what taps_spread writes");
static_assert(threads == 32 * x_groups * phases * channel_groups, "a warp for each share");
static_assert(channel_tiles % 2 == 0, "channels are loaded 16 at a time");
static_assert(buffers == 2 || at_once >= source_rows, "a copy must not meet what is in use");
static_assert(buffers * buffer_bytes + (channels_last ? 4 * pixels : 0) <= 4 * shared_words &&
                  out_bytes <= 4 * shared_words,
              "shared memory is too small");
static_assert(which == 1 || (advance_x == 1 && advance_y == 1), "sources are on the lattice");
static_assert(channel_tiles % wide == 0, "neighbouring floats are of different products");
static_assert(phases == phases_x || unit == 1, "targets of some phases lie apart");
static_assert(channels_last || vector == 1 || phases == phases_x, "the lead is that of phase 0");
static_assert(channels_last || result_vector == 1 || (phases == phases_x && step_x == 1),
              "targets are no neighbours");

using SourceRuns = Runs<element, threads, block_channels, 1, runs, spacing_x, source_lead, step_x,
                        phases, of_phase * group_bytes, group_bytes, slot_bytes, vector>;

// Where an element of a map lies.
__device__ __forceinline__ int at_pixel(int channels, int height, int width, int c, int y, int x) {
  return channels_last ? (y * width + x) * channels + c : (c * height + y) * width + x;
}

// Where a result lies, in elements; of two channels in a word the first is asked for.
__device__ __forceinline__ int at_results(int channel, int target) {
  if (channels_last) return target * pitch + channel;
  return of_word * (channel / of_word * pitch_out + (halves ? 0 : channel / 8 * 8) + target);
}

__device__ __forceinline__ bool is_finite(float value) {
  return (bits_of(value) & 0x7f800000u) != 0x7f800000u;
}
__device__ __forceinline__ bool is_finite(Half value) { return (value.bits & 0x7c00u) != 0x7c00u; }
__device__ __forceinline__ bool is_finite(Bfloat16 value) {
  return (value.bits & 0x7f80u) != 0x7f80u;
}

// Set a value's bits: those of a word, or of its lower half.
__device__ __forceinline__ void set_bits(float& value, unsigned bits) {
  value = __uint_as_float(bits);
}
template <typename Element>
__device__ __forceinline__ void set_bits(Element& value, unsigned bits) {
  value.bits = static_cast<unsigned short>(bits);
}

// What a block owns, and where it lies.
struct OfBlock {
  const Sizes& s;
  int c0, m0, row0, phase0, phase_y, n;
  int source_y0, source_x0;  // pixel of the first source
  int v0;                    // lattice column of G[., 0] at the first target

  __device__ __forceinline__ explicit OfBlock(const Sizes& sizes) : s(sizes) {
    int rest = blockIdx.x;
    c0 = pop(rest, s.blocks_c) * block_channels;
    m0 = pop(rest, s.blocks_x) * columns;
    row0 = pop(rest, s.blocks_y) * rows;
    phase0 = pop(rest, phase_groups) * phases;
    phase_y = pop(rest, phases_y);
    n = rest;
    source_y0 = target_y(0) + s.first_y;
    source_x0 = s.target_x + step_x * (phases_x * m0 + phase0) + s.first_x;
    v0 = s.shift_x + phases_x * m0 + phase0;
  }

  __device__ __forceinline__ int target_y(int row) const {
    return s.target_y + step_y * (phases_y * (row0 + row) + phase_y);
  }
  __device__ __forceinline__ int source_y(int e) const { return source_y0 + spacing_y * e; }
  // The lattice row of G of a target row that meets row e of the source, outside if there is none.
  __device__ __forceinline__ int u(int row, int e) const {
    if (which == 2) return lattice_index(source_y(e), s.origin_y, lattice_y, s.lattice_height);
    return s.shift_y + phases_y * (row0 + row) + phase_y;
  }
  // The row of displacements of grad_cost in which it meets row e, outside if it does not.
  static __device__ __forceinline__ int cost_p(int row, int e) {
    const int p = e - advance_y * row;
    return which == 1 ? p : patch_y - 1 - p;
  }
  // Whether there is such a row of G. (For which = 2 only rows e that count are asked for.)
  __device__ __forceinline__ bool exists(int row, int e) const {
    return inside(cost_p(row, e), patch_y) && (which == 2 || inside(u(row, e), s.lattice_height));
  }
  static __device__ __forceinline__ int cost_q(int q) { return which == 1 ? q : patch_x - 1 - q; }
  static __device__ __forceinline__ bool tile_meets(int tile, int e) {
    return inside(e - advance_y * tile_rows * tile, meeting);
  }
  // Whether a row of the source has terms.
  __device__ __forceinline__ bool counts(int e) const {
    return e < source_rows && inside(source_y(e), s.height) && (which == 1 || u(0, e) >= 0);
  }
  // The first row from e on that has terms.
  __device__ __forceinline__ int next(int e) const {
    while (e < source_rows && !counts(e)) ++e;
    return e;
  }
};

// Copy G of all target rows that meet row e of the source to shared memory. A thread has the same
// columns of all of them.
__device__ __forceinline__ void stage_g(const upstream* grad_cost, int e, upstream* to,
                                        SharedAddress address, const OfBlock& block, int thread) {
  const Sizes& s = block.s;
  const int lattice = s.lattice_height * s.lattice_width;
  // Offsets of displacement rows, which grow evenly. Where there is no row they may overflow.
  const unsigned next_p = (which == 1 ? 1 : -1) * patch_x * lattice;
  const unsigned first = OfBlock::cost_p(0, e) * (patch_x * static_cast<unsigned>(lattice)) +
                         block.u(0, e) * s.lattice_width;
  const unsigned next = (which == 1 ? phases_y * s.lattice_width : 0) - advance_y * next_p;
  constexpr int units = ceil_div(own_columns + (which == 1 ? lead : moved - 1), moved);
  constexpr int copies = patch_x * units;
#pragma unroll 1
  for (int n = 0; n < ceil_div(copies, threads); ++n) {
    const int i = thread + n * threads, q = i / units, begin = lead + (which == 1 ? 0 : phases * q);
    const int column = (begin / moved + i % units) * moved, k = column - lead;
    if (i >= copies || column >= begin + own_columns) continue;
    int offset[moved];  // in a displacement row
    bool on_lattice[moved];
#pragma unroll
    for (int j = 0; j < moved; ++j) {
      const int at = k + j;
      const int v =
          block.v0 + (phases == phases_x ? at : phases_x * (at / phases) + at % phases);
      on_lattice[j] = inside(v, s.lattice_width);
      offset[j] = OfBlock::cost_q(q) * lattice + v;
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (!OfBlock::tile_meets(row / tile_rows, e)) continue;
      const bool row_exists = block.exists(row, e);
      const int from = static_cast<int>(first + row * next) + offset[0];
      const int at = (before + row * rows_g + q) * pitch_g +
                     (shifts ? column - begin / moved * moved : column);
      if constexpr (unit == moved) {
        const bool exists = row_exists && on_lattice[0];
        copy_async_or_zero<unit * upstream_bytes>(
            address + at * upstream_bytes, grad_cost + (exists ? from : 0), exists);
      } else {
        Pack<upstream, moved> pack = {};
#pragma unroll
        for (int j = 0; j < moved; ++j) {
          if (row_exists && on_lattice[j]) pack.values[j] = grad_cost[from + offset[j] - offset[0]];
        }
        *reinterpret_cast<Pack<upstream, moved>*>(to + at) = pack;
      }
    }
  }
}

// Sum a result from its own terms, of channel c of target (t_y, t_x).
__device__ __forceinline__ accumulator sum_terms(const upstream* grad_cost, const element* source,
                                                 int row, int t_x, int c, const OfBlock& block) {
  const Sizes& s = block.s;
  accumulator sum = 0;
#pragma unroll 1
  for (int e = advance_y * row; e < advance_y * row + patch_y; ++e) {
    const int y = block.source_y(e), u = block.u(row, e), p = OfBlock::cost_p(row, e);
    if (!block.counts(e) || !block.exists(row, e)) continue;
#pragma unroll 1
    for (int q = 0; q < patch_x; ++q) {
      const int x = s.target_x + step_x * t_x + s.first_x + spacing_x * q;
      const int v = s.shift_x + t_x + (which == 1 ? 0 : phases_x * q);
      if (!inside(x, s.width) || !inside(v, s.lattice_width)) continue;
      const int displacement = p * patch_x + OfBlock::cost_q(q);
      const upstream g = grad_cost[(displacement * s.lattice_height + u) * s.lattice_width + v];
      sum += widen(g) * widen(source[at_pixel(s.channels, s.height, s.width, c, y, x)]);
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(threads, 1) tensor_gradient(
    const upstream* __restrict__ grad_cost, const element* __restrict__ source,
    element* __restrict__ grad, const Sizes s, const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  char* const bytes = reinterpret_cast<char*>(shared);
  int* const offsets = reinterpret_cast<int*>(bytes + buffers * buffer_bytes);
  const SharedAddress address = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32;
  const OfBlock block(s);
  const long long n = block.n;
  grad_cost += n * (patch_y * patch_x * s.lattice_height * s.lattice_width);
  source += n * (s.height * s.width * s.channels);
  grad += n * (s.height * s.width * s.channels);

  // What this warp owns.
  int warp = thread / 32;
  const int x_group = pop(warp, x_groups), phase = pop(warp, phases);
  const int channel0 = warp * 8 * channel_tiles;
  const bool owns = block.c0 + channel0 < s.channels;

  // Columns of the source; G's rows of zeros, which no copy writes.
  SourceRuns row_runs;
  if constexpr (channels_last) {
    for (int i = thread; i < pixels; i += threads) {
      const int column = i % source_columns, of_phase = i / source_columns;
      const int x = block.source_x0 + step_x * of_phase + spacing_x * column;
      offsets[i] = column < met_columns && inside(x, s.width) ? x * s.channels : -1;
    }
  } else {
    row_runs.find(thread, block.source_x0, row_pixels, s.width, 1, [](int) { return 0; });
  }
  for (int i = 0; i < buffers * at_once; ++i) {
    clear<threads>(shared + (i * row_bytes + source_bytes) / 4, g_elements * upstream_bytes / 4,
                   thread);
    // Slots behind those of runs.
    constexpr int unfilled = before_runs + behind_runs;
    for (int f = 1; f <= (channels_last ? 0 : phases); ++f) {
      clear<threads>(shared + (i * row_bytes + (f * of_phase - unfilled) * group_bytes) / 4,
                     unfilled * group_bytes / 4, thread);
    }
  }
  __syncthreads();

  const auto copy_row = [&](int e, int begin) {
    if constexpr (channels_last) {
      const element* const row = source + block.source_y(e) * s.width * s.channels;
      stage_pixels<threads, block_channels, pitch, pixels, vector>(
          row, offsets, block.c0, s.channels, bytes + begin, address + begin, thread);
    }
    const int begin_g = begin + source_bytes;
    stage_g(grad_cost, e, reinterpret_cast<upstream*>(bytes + begin_g), address + begin_g, block,
            thread);
  };
  SourceRuns::Fetched fetched[SourceRuns::count];
  const auto fetch_runs = [&](int e) {
    const element* const row = source + block.source_y(e) * s.width;
#pragma unroll
    for (int n = 0; n < SourceRuns::count; ++n) {
      row_runs.fetch(row, block.c0, s.channels, s.height * s.width, n, fetched[n]);
    }
  };
  const auto land_runs = [&](int begin) {
#pragma unroll
    for (int n = 0; n < SourceRuns::count; ++n) {
      row_runs.land(bytes + begin + before_runs * group_bytes, n, fetched[n]);
    }
  };

  // The pixel that this lane points to: that of row `slot` of a matrix of 8 columns, of which the
  // lane also reads 2 * (lane % 4) and the next of G, for target lane / 4 of its tile. Of floats it
  // reads columns lane % 4 and 4 more, of both.
  const auto column_of = [](int slot) { return apart == 1 ? slot : slot / 2 + slot % 2 * apart; };
  const int group = phase * of_phase + before_runs + advance_x * x_group * tile_columns / 8;
  const int at_source =
      halves ? (group + lane / 8 % 2) * group_bytes + column_of(lane % 8) * slot_bytes +
                   (channel0 + lane / 16 * 8) * element_bytes
             : group * group_bytes + lane % 4 * slot_bytes +
                   (channel0 + lane / 4 * wide) * element_bytes;
  const int q0 = column_of(lane % 4 * 2) - lane / 4;
  // Elements before the first target's; every fourth row has equally many.
  const int lead_g = shifts ? (lead + phases * q0) & (moved - 1) : lead;
  const int at_g = lead_g + phase + phases * x_group * tile_columns + before * pitch_g +
                   lane / 4 * across + column_of(lane % 4 * 2) * along;

  accumulator sums[row_tiles][channel_tiles][4] = {};
  const auto multiply_row = [&](int e, int begin) {
    const upstream* const g =
        reinterpret_cast<const upstream*>(bytes + begin + source_bytes) + at_g;
#pragma unroll unrolled
    for (int d = 0; d < depths; ++d) {
      unsigned two[channel_tiles][2];
#pragma unroll
      for (int n = 0; n < channel_tiles; n += wide) {
        const int at = at_source + begin + d * depth / 8 * group_bytes + 8 * n * element_bytes;
        if constexpr (halves) {
          load_matrices<4, true>(two[n], address + at);
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const auto pack = *reinterpret_cast<const Pack<unsigned, wide>*>(
                bytes + at + k * apart * slot_bytes);
#pragma unroll
            for (int i = 0; i < wide; ++i) two[n + i][k] = pack.values[i];
          }
#pragma unroll
          for (int i = 0; i < wide; ++i) round_matrices<element, 2>(two[n + i]);
        }
      }
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        if (!OfBlock::tile_meets(i, e)) continue;
        unsigned one[parts][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          constexpr int lower = tile_rows == 2 ? rows_g * pitch_g : 8 * across;
          const upstream* const from = g + i * tile_rows * rows_g * pitch_g + k % 2 * lower +
                                       (depth * d + k / 2 * (depth / 2)) * along;
          if constexpr (!halves) {
            one[0][k] = bits_of(from[0]);
          } else if constexpr (parts == 1) {
            one[0][k] = bits_of(from[0]) | bits_of(from[apart * along]) << 16;
          } else {
            float first = widen(from[0]), second = widen(from[apart * along]);
#pragma unroll
            for (int part = 0; part < parts; ++part) {
              one[part][k] = split_off<element>(first, second);
            }
          }
        }
        round_matrices<element, 4>(one[0]);
#pragma unroll
        for (int part = 0; part < parts; ++part) {
#pragma unroll
          for (int n = 0; n < channel_tiles; ++n) {
            multiply_matrices<element>(sums[i][n], one[part], two[n]);
          }
        }
      }
    }
  };

  // Queue copies of the rows from e on.
  const auto copy = [&](int e, int begin) {
#pragma unroll 1
    for (int i = 0; i < at_once; ++i) {
      if (block.counts(e + i)) copy_row(e + i, begin + i * row_bytes);
    }
  };

  // A thread that passes the barrier of a step knows that all have finished with the step before,
  // whose buffer is the one that the next copies fill.
  int begin = 0, e = block.next(0);
  if (e < source_rows) copy(e, begin);
#pragma unroll 1
  for (int i = 0; i < (channels_last ? 0 : at_once); ++i) {
    if (!block.counts(e + i)) continue;
    fetch_runs(e + i);
    land_runs(begin + i * row_bytes);
  }
#pragma unroll 1
  while (e < source_rows) {
    const int next = block.next(e + at_once), other = (buffers - 1) * buffer_bytes - begin;
    wait_for_copies();
    __syncthreads();
    if (next < source_rows) copy(next, other);
#pragma unroll 1
    for (int i = 0; i < at_once; ++i) {
      const bool more = !channels_last && block.counts(next + i);
      if (more) fetch_runs(next + i);
      if (owns && block.counts(e + i)) multiply_row(e + i, begin + i * row_bytes);
      if (more) land_runs(other + i * row_bytes);
    }
    begin = other;
    e = next;
  }

  // Results leave through shared memory, so that neighbouring threads write neighbouring channels,
  // or neighbouring pixels.
  element* const rounded = reinterpret_cast<element*>(shared);
#pragma unroll 1
  for (int tile = 0; tile < row_tiles; ++tile) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      if (i != tile) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = lane / 4 + 8 * half;  // target in its tile
        const int column = x_group * tile_columns + own % tile_columns;
        const int target =
            channels_last ? (own / tile_columns * columns + column) * phases + phase
                          : (own / tile_columns * phases + phase) * columns + column;
        // Neighbouring channels: two of a product, or one of each of `wide` products.
#pragma unroll
        for (int n = 0; n < 2 * channel_tiles / wide; ++n) {
          const int c = channel0 + (halves ? 8 * n : n / 2 * 8 * wide + n % 2 * wide) +
                        lane % 4 * 2 * (halves ? 1 : wide);
          Pack<element, wide> pack;
#pragma unroll
          for (int k = 0; k < wide; ++k) {
            const int own_product = halves ? n : n / 2 * wide + k;
            const accumulator sum = sums[i][own_product][2 * half + (halves ? k : n % 2)];
            pack.values[k] = narrow<element>(sum * scale);
          }
          if constexpr (halves || channels_last) {
            *reinterpret_cast<Pack<element, wide>*>(rounded + at_results(c, target)) = pack;
          } else {
#pragma unroll
            for (int k = 0; k < wide; ++k) rounded[at_results(c + k, target)] = pack.values[k];
          }
        }
      }
    }
    __syncthreads();
    // A thread has some channels of a target, or a word's channels of some targets.
    constexpr int pairs = channels_last ? 1 : of_word;
    constexpr int units = (channels_last ? block_channels : phases * columns) / result_vector;
    constexpr int others = channels_last ? targets : block_channels / pairs * tile_rows;
#pragma unroll 1
    for (int at = thread; at < others * units; at += threads) {
      int rest = at;
      const int first = pop(rest, units) * result_vector;
      int k = first, j, channel = first;  // the first target in its row, the row, the channel
      if constexpr (channels_last) {
        k = pop(rest, phases * columns);
        j = rest;
      } else {
        j = pop(rest, tile_rows);
        channel = pairs * rest;
      }
      const int f = k % phases, m = k / phases, row = tile * tile_rows + j, c = block.c0 + channel;
      const int t_y = phases_y * (block.row0 + row) + block.phase_y;
      const int t_x = phases_x * (block.m0 + m) + block.phase0 + f;
      if (c >= s.channels || t_y >= s.targets_y || t_x >= s.targets_x) continue;
      if (phases < phases_x && block.phase0 + f >= phases_x) continue;
      element* const from =
          rounded + at_results(channel, j * phases * columns + (channels_last ? k : 0));
      const auto result = [&](int i) -> element& {  // one channel after another, or target
        if (channels_last) return from[i];
        const int target = k + i / pairs;
        return from[pairs * (target % phases * columns + target / phases) + i % pairs];
      };
      element values[pairs][result_vector];
      const auto load = [&] {
        if constexpr (channels_last) {
          const auto pack = *reinterpret_cast<const Pack<element, result_vector>*>(from);
#pragma unroll
          for (int i = 0; i < result_vector; ++i) values[0][i] = pack.values[i];
        } else {
          constexpr int part = smaller(result_vector, 4 * phases);
#pragma unroll
          for (int i = 0; i < result_vector; i += part) {
            unsigned both[part];
            load_columns<phases, columns>(both, reinterpret_cast<const unsigned*>(from), k + i);
#pragma unroll
            for (int n = 0; n < part; ++n) {
              set_bits(values[0][i + n], both[n]);
              if (halves) set_bits(values[pairs - 1][i + n], both[n] >> 16);
            }
          }
        }
      };
      load();
      bool finite = true;
#pragma unroll
      for (int i = 0; i < pairs * result_vector; ++i) {
        finite = finite && is_finite(values[i % pairs][i / pairs]);
      }
      if (!finite) {
#pragma unroll 1
        for (int i = 0; i < pairs * result_vector; ++i) {
          const int x = t_x + (channels_last ? 0 : i / pairs);
          const int own = c + (channels_last ? i : i % pairs);
          if (is_finite(result(i)) || own >= s.channels) continue;
          result(i) = narrow<element>(sum_terms(grad_cost, source, row, x, own, block) * scale);
        }
        load();
      }
      // The first target of an axis brings the pixels before it along.
      const int y = block.target_y(row), x = s.target_x + step_x * t_x;
      const int top = step_y > 1 && t_y == 0 ? 0 : y, left = step_x > 1 && t_x == 0 ? 0 : x;
      const int bottom = step_y > 1 ? smaller(s.height, y + step_y) : y + 1;
      const int right = step_x > 1 ? smaller(s.width, x + step_x) : x + 1;
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
        if (c + pair >= s.channels) continue;
        for (int to_y = top; to_y < bottom; ++to_y) {
          for (int to_x = left; to_x < right; ++to_x) {
            element written[result_vector];
#pragma unroll
            for (int i = 0; i < result_vector; ++i) {
              written[i] = to_y == y && to_x == x ? values[pair][i] : element{0};
            }
            store_neighbours(
                grad + at_pixel(s.channels, s.height, s.width, c + pair, to_y, to_x), written);
          }
        }
      }
    }
  }
}
