// The products of two feature maps, summed over channels on tensor cores: a cost volume of one tap,
// as in product.cu. Elements have 16 bits, or are floats, which are rounded to TF32 before they are
// multiplied.
//
//   cost[n, p, q, u, v] = scale * sum over c of fmap1[n, c, y, x] * fmap2[n, c, y + dy, x + dx]
//   y = origin_y + u * step_y,  dy = first_y + p * spacing_y                 (x, dx likewise)
//
// and 0 where a position lies outside its map. Arrays are contiguous, in the order of their
// indices; with `channels_last` the maps' channels come last. Phases and `advance` are those of
// product.cu: position m of a phase meets the phase's column advance * m + q at displacement q. In
// shared memory a pixel is a vector of channels wherever it lies, so that products do not depend on
// steps, spacings or the width of the maps. Channels that lie apart are turned on the way there.
//
// Tiles. The tensor cores multiply 16 positions by 8 columns at a time. The 16 positions, a tile,
// are 16 neighbours of a phase or, which wastes less of a small patch, 8 in each of two rows; they
// meet 8 * column_tiles columns of a row of fmap2, of which each position uses its patch.
//
//   column       0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//   position 0   x  x  x  x  x                                     patch of 5, advance 1,
//   position 1      x  x  x  x  x                                  two rows of 8 positions,
//   ...                                                            2 column tiles
//   position 7                        x  x  x  x  x
//
// A tile meets `meeting` rows of fmap2: its row j meets row e at the vertical displacement
// p = e - advance_y * j.
//
// Threads. A block owns row_tiles tiles below each other and x_groups * x_tiles beside each other,
// of each of `phases` column phases and one row phase, and of the rows and columns that they meet
// block_rows rows and the columns of `displacements` displacements. It stages `chunk` channels of
// all these pixels at a time; channels that lie apart in `pieces`, which wait in registers while
// the chunk before is multiplied. A warp owns x_tiles neighbouring tiles, on warp_rows rows.
//
// What is not finite stays where it belongs. A sum takes the channels of its own two pixels only;
// channels behind the last are zero in both; what a pixel outside makes of infinities is cleared.
//
// Launch: samples * phases_y * phase_groups * q_groups * blocks_y * blocks_x * blocks_e blocks of
// `threads` threads, with `shared_words` words of dynamic shared memory; compute capability 8.0 or
// higher, and fewer than 2^31 elements per sample in each array.

#include "device.cuh"

#ifndef CUPYCORR_CONSTANTS
using element = Half;       // of the maps: Half, Bfloat16 or float
using accumulator = float;  // of sums
using result = Half;        // of cost: element, or accumulator if taps_sum follows
// The layer.
constexpr int patch_y = 21, patch_x = 21;
constexpr int step_y = 1, step_x = 1;
constexpr int spacing_y = 2, spacing_x = 2;
constexpr int phases_y = 2, phases_x = 2;
constexpr int advance_y = 1, advance_x = 1;
// The tile.
constexpr int tile_rows = 2;       // of 16 positions: 1 or 2
constexpr int x_tiles = 4;         // tiles of a warp, side by side
constexpr int x_groups = 1;        // warps side by side
constexpr int row_tiles = 2;       // warps below each other
constexpr int phases = 2;          // column phases of a block
constexpr int displacements = 21;  // horizontal ones of a block
constexpr int warp_rows = 2;       // rows of fmap2 of a warp
constexpr int row_groups = 2;      // warps that share the rows of fmap2 that a tile meets
constexpr int chunk = 32;          // channels staged at a time, a multiple of 32 bytes
constexpr int buffers = 2;         // 1 only if a chunk holds all channels
constexpr bool channels_last = true;  // whether a pixel's channels lie side by side
constexpr int vector = 8;  // of those per copy, 1: through registers; or pixels per load
constexpr int lead1 = 0, lead2 = 0;  // pixels before the first, so that loads are aligned
constexpr int pieces = 1;            // in which a chunk is loaded, if channels lie apart
constexpr int result_vector = 8;  // elements per store to global memory
constexpr int threads = 256;
constexpr int shared_words = 38272;
#endif

#include "matrices.cuh"

struct Sizes {
  int channels, height, width;
  int lattice_height, lattice_width;
  int origin_y, origin_x, first_y, first_x;  // pixels
  int blocks_y, blocks_x;                    // of one sample and phase
};

constexpr int tile_columns = 16 / tile_rows;
constexpr int rows1 = row_tiles * tile_rows;                  // of positions, in a block
constexpr int columns1 = x_groups * x_tiles * tile_columns;   // of positions of a phase
constexpr int span = advance_x * tile_columns;                // columns from tile to tile
constexpr int column_tiles = ceil_div(advance_x * (tile_columns - 1) + displacements, 8);
constexpr int warp_column_tiles = (x_tiles - 1) * span / 8 + column_tiles;
constexpr int meeting = patch_y + advance_y * (tile_rows - 1);
// Of those, in a block: equal shares. Its last warps may also have rows that belong to the others.
constexpr int blocks_e = ceil_div(meeting, row_groups * warp_rows);
constexpr int block_rows = ceil_div(meeting, blocks_e);
constexpr int rows2 = advance_y * tile_rows * (row_tiles - 1) + block_rows;
constexpr int columns2 = span * (x_groups * x_tiles - 1) + 8 * column_tiles;
constexpr int met_columns = advance_x * (columns1 - 1) + displacements;  // the others stay 0
constexpr int phase_groups = ceil_div(phases_x, phases);
constexpr int q_groups = ceil_div(patch_x, displacements);

constexpr int element_bytes = static_cast<int>(sizeof(element));
constexpr int unit = 16 / element_bytes;  // elements of a row of ldmatrix
constexpr int depth = 2 * unit;           // of a product of matrices
// An odd number of 16-byte units: then neighbouring pixels lie in different banks.
constexpr int pitch = chunk + unit;  // elements of a pixel
constexpr int slot_bytes = pitch * element_bytes;
// Pixels lie in slots [phase][row][column], eight slots in a group. If channels lie apart, a row
// has the slots of whole runs, and what a tile reads behind them counts for nothing.
constexpr int period1 = spacing_x * advance_x, period2 = spacing_x;  // pixels
constexpr int last_phase = step_x * (phases - 1);
constexpr int runs1 = ceil_div(lead1 + last_phase + period1 * (columns1 - 1) + 1, 8 * period1);
constexpr int runs2 = ceil_div(lead2 + last_phase + period2 * (met_columns - 1) + 1, 8 * period2);
constexpr int groups1 = channels_last ? columns1 / 8 : runs1;  // of a row
constexpr int groups2 = channels_last ? columns2 / 8 : runs2;
constexpr int before1 = channels_last ? 0 : ceil_div((lead1 + last_phase) / period1, 8);
constexpr int before2 = channels_last ? 0 : ceil_div((lead2 + last_phase) / period2, 8);
constexpr int behind2 = larger(0, columns2 / 8 - groups2);
constexpr int of_phase1 = before1 + rows1 * groups1;  // groups
constexpr int of_phase2 = before2 + rows2 * groups2 + behind2;
constexpr int group_bytes = 8 * slot_bytes + (channels_last ? 0 : 32);
constexpr int pixels1 = 8 * phases * of_phase1, pixels2 = 8 * phases * of_phase2;
constexpr int buffer_bytes = phases * (of_phase1 + of_phase2) * group_bytes;
constexpr int offsets_begin = buffers * buffer_bytes;  // of pixels, if channels lie side by side
constexpr int strips = rows1 * row_groups;  // rows of results, per row of a warp
constexpr int line = phases * columns1 + 4;  // words of a row of results; odd multiples of 4
// Results leave through shared memory, of so many horizontal displacements at a time.
constexpr int slices = smaller(displacements, shared_words / (strips * line));
constexpr int run = result_vector > 1 ? result_vector : 4;  // results of a thread, side by side

static_assert(element_bytes <= 4, "tensor cores multiply elements of 16 bits, and TF32");
static_assert(threads == 32 * row_tiles * row_groups * phases * x_groups, "a warp for each share");
static_assert(block_rows >= warp_rows, "a warp has more rows than a block");
static_assert(chunk % depth == 0 && 4 * depth % chunk == 0, "chunks are multiples of a matrix");
static_assert(slices >= 1 && offsets_begin + (channels_last ? 4 * (pixels1 + pixels2) : 0) <=
                                 4 * shared_words,
              "shared memory is too small");
static_assert(phases == phases_x || result_vector == 1, "results of some phases lie apart");
static_assert(channels_last || chunk == depth, "channels are turned as many as are multiplied");
static_assert(channels_last || vector == 1 || phases == phases_x, "leads are those of phase 0");

template <int ROWS, int RUNS, int PERIOD, int LEAD, int OF_PHASE>
using RunsOf = Runs<element, threads, chunk, ROWS, RUNS, PERIOD, LEAD, step_x, phases,
                    OF_PHASE * group_bytes, group_bytes, slot_bytes, vector>;
using Runs1 = RunsOf<rows1, runs1, period1, lead1, of_phase1>;
using Runs2 = RunsOf<rows2, runs2, period2, lead2, of_phase2>;

// Where a slot lies, in bytes.
__device__ __forceinline__ constexpr int at_slot(int slot) {
  return slot / 8 * group_bytes + slot % 8 * slot_bytes;
}

// The first row of fmap2 of a warp, of those of its block; whether row r from there is another's.
__device__ __forceinline__ constexpr int first_row(int row_group) {
  return smaller(row_group * warp_rows, block_rows - warp_rows);
}
__device__ __forceinline__ constexpr bool is_others(int row_group, int r) {
  return block_rows % warp_rows != 0 && first_row(row_group) + r < row_group * warp_rows;
}

extern "C" __global__ void __launch_bounds__(threads, 1) tensor_cost(
    const element* __restrict__ fmap1, const element* __restrict__ fmap2,
    result* __restrict__ cost, const Sizes s, const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  char* const bytes = reinterpret_cast<char*>(shared);
  int* const offsets = reinterpret_cast<int*>(bytes + offsets_begin);
  const SharedAddress address = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32;

  // What this block owns.
  int rest = blockIdx.x;
  const int e0 = pop(rest, blocks_e) * block_rows;
  const int m0 = pop(rest, s.blocks_x) * columns1, row0 = pop(rest, s.blocks_y) * rows1;
  const int q0 = pop(rest, q_groups) * displacements;
  const int phase0 = pop(rest, phase_groups) * phases;
  const int phase_y = pop(rest, phases_y), n = rest;

  // What this warp owns.
  int warp = thread / 32;
  const int x_group = pop(warp, x_groups), phase = pop(warp, phases);
  const int row_group = pop(warp, row_groups), row_tile = warp;

  // Pixels of the staged rows and columns.
  const int y1 = s.origin_y + step_y * phase_y + spacing_y * advance_y * row0;
  const int y2 = y1 + s.first_y + spacing_y * e0;
  const int x1 = s.origin_x + step_x * phase0 + spacing_x * advance_x * m0;
  const int x2 = x1 + s.first_x + spacing_x * q0;
  const int plane = s.height * s.width;
  Runs1 one;
  Runs2 two;
  if constexpr (channels_last) {
    for (int i = thread; i < pixels1 + pixels2; i += threads) {
      const bool first = i < pixels1;
      int at = first ? i : i - pixels1;
      const int column = pop(at, first ? columns1 : columns2), row = pop(at, first ? rows1 : rows2);
      const int y = first ? y1 + spacing_y * advance_y * row : y2 + spacing_y * row;
      const int x = step_x * at + (first ? x1 + period1 * column : x2 + period2 * column);
      const bool is_met = first || column < met_columns;
      const bool exists = is_met && inside(y, s.height) && inside(x, s.width);
      offsets[i] = exists ? (y * s.width + x) * s.channels : -1;
    }
    __syncthreads();
  } else {
    one.find(thread, x1, last_phase + period1 * (columns1 - 1) + 1, s.width, s.height,
             [&](int row) { return y1 + spacing_y * advance_y * row; });
    two.find(thread, x2, last_phase + period2 * (met_columns - 1) + 1, s.width, s.height,
             [&](int row) { return y2 + spacing_y * row; });
    // Slots behind the last row that no run fills.
    constexpr int unfilled = (before2 + behind2) * group_bytes / 16;
    for (int i = thread; i < buffers * phases * unfilled; i += threads) {
      int at = i;
      const int word = pop(at, unfilled) * 4, of_phase = pop(at, phases);
      const accumulator zeros[4] = {};
      store_words(shared + (at * buffer_bytes + phases * of_phase1 * group_bytes +
                            ((of_phase + 1) * of_phase2 - before2 - behind2) * group_bytes) / 4 +
                      word,
                  zeros);
    }
    if (unfilled > 0) __syncthreads();
  }

  const long long sample = static_cast<long long>(n) * plane * s.channels;
  const element* const map1 = fmap1 + sample;
  const element* const map2 = fmap2 + sample;
  constexpr int begin2 = phases * of_phase1 * group_bytes;
  const auto buffer = [&](int c) { return c / chunk % buffers * buffer_bytes; };
  const auto copy = [&](int c) {
    const int begin = buffer(c);
    stage_pixels<threads, chunk, pitch, pixels1, vector>(map1, offsets, c, s.channels,
                                                         bytes + begin, address + begin, thread);
    stage_pixels<threads, chunk, pitch, pixels2, vector>(map2, offsets + pixels1, c, s.channels,
                                                         bytes + begin + begin2,
                                                         address + begin + begin2, thread);
  };
  // Runs of both maps, in pieces.
  constexpr int runs = Runs1::count + Runs2::count, of_piece = ceil_div(runs, pieces);
  Runs1::Fetched fetched1[Runs1::count];
  Runs2::Fetched fetched2[Runs2::count];
  const auto fetch = [&](int c, int piece) {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      if (i / of_piece != piece) continue;
      if (i < Runs1::count) {
        one.fetch(map1, c, s.channels, plane, i, fetched1[i]);
      } else {
        two.fetch(map2, c, s.channels, plane, i - Runs1::count, fetched2[i - Runs1::count]);
      }
    }
  };
  const auto land = [&](int c, int piece) {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      if (i / of_piece != piece) continue;
      char* const to = bytes + buffer(c);
      if (i < Runs1::count) {
        one.land(to + before1 * group_bytes, i, fetched1[i]);
      } else {
        two.land(to + begin2 + before2 * group_bytes, i - Runs1::count,
                 fetched2[i - Runs1::count]);
      }
    }
  };

  // Rows of fmap2 of this warp that exist and that its tiles meet: bit r is row r.
  const int e_own = e0 + first_row(row_group);  // the first, as its tiles count them
  const int row2 = advance_y * tile_rows * row_tile + first_row(row_group);  // as staged
  unsigned rows_exist = 0;
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    const bool exists = !is_others(row_group, r) && e_own + r < meeting &&
                        inside(y2 + spacing_y * (row2 + r), s.height);
    rows_exist |= static_cast<unsigned>(exists) << r;
  }

  // The row of a matrix that this lane points to: a position, or a column.
  const int position = lane % 16;
  const int row1 = row_tile * tile_rows + position / tile_columns;
  const int slot1 = 8 * (phase * of_phase1 + before1 + row1 * groups1) +
                    x_group * x_tiles * tile_columns + position % tile_columns;
  const int slot2 = 8 * (phase * of_phase2 + before2 + row2 * groups2) + x_group * x_tiles * span +
                    lane / 16 * 8 + lane % 8;
  const SharedAddress at1 = address + at_slot(slot1) + lane / 16 * 16;
  const SharedAddress at2 = address + begin2 + at_slot(slot2) + lane / 8 % 2 * 16;

  // Read the columns of row r of this warp, as many channels of them as are multiplied at a time.
  const auto load_row = [&](unsigned* two, int begin, int r) {
#pragma unroll
    for (int t = 0; t < warp_column_tiles; t += 2) {
      const SharedAddress at = at2 + begin + (r * groups2 + t) * group_bytes;
      if (t + 1 < warp_column_tiles) {
        load_matrices<4>(two + 2 * t, at);
        round_matrices<element, 4>(two + 2 * t);
      } else {
        load_matrices<2>(two + 2 * t, at);
        round_matrices<element, 2>(two + 2 * t);
      }
    }
  };

  accumulator sums[warp_rows][x_tiles][column_tiles][4] = {};
  const auto multiply = [&](int c, bool more) {
    const int end = smaller(chunk, s.channels - c);
#pragma unroll 1
    for (int k = 0; k < end; k += depth) {
      const int begin = buffer(c) + k * element_bytes;
      unsigned first[x_tiles][4], second[2][2 * round_up(warp_column_tiles, 2)];
#pragma unroll
      for (int i = 0; i < x_tiles; ++i) {
        load_matrices<4>(first[i], at1 + begin + i * tile_columns / 8 * group_bytes);
        round_matrices<element, 4>(first[i]);
      }
      load_row(second[0], begin, 0);
#pragma unroll
      for (int r = 0; r < warp_rows; ++r) {
        if constexpr (!channels_last) {
#pragma unroll
          for (int piece = 0; piece < pieces; ++piece) {
            if (!more || r != piece * warp_rows / pieces) continue;
            if (piece > 0) land(c + chunk, piece - 1);
            fetch(c + chunk, piece);
          }
        }
        if (r + 1 < warp_rows) load_row(second[(r + 1) % 2], begin, r + 1);
        if (!(rows_exist >> r & 1)) continue;
#pragma unroll
        for (int i = 0; i < x_tiles; ++i) {
#pragma unroll
          for (int t = 0; t < column_tiles; ++t) {
            multiply_matrices<element>(sums[r][i][t], first[i],
                                       second[r % 2] + 2 * (i * span / 8 + t));
          }
        }
      }
    }
    if (!channels_last && more) land(c + chunk, pieces - 1);
  };

  // A thread that passes the barrier of chunk c knows that all have finished with chunk c - 1,
  // whose buffer is the one that the next fetch fills. Where no row exists, all results are 0.
  const long long last = y2 + static_cast<long long>(spacing_y) * (rows2 - 1);
  const bool some = y2 < s.height && last >= 0;
  const int channels = some ? s.channels : 0;
  if (some && channels_last) copy(0);
  if (some && !channels_last) {
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      fetch(0, piece);
      land(0, piece);
    }
  }
#pragma unroll 1
  for (int c = 0; c < channels; c += chunk) {
    const bool more = c + chunk < channels;
    if (channels_last) wait_for_copies();
    __syncthreads();
    if (channels_last && more) copy(c + chunk);
    multiply(c, more);
  }

  // A strip is a row of positions on a row of fmap2. Its results leave through shared memory, so
  // that neighbouring threads write neighbouring elements.
  const int own_strip = (row_tile * row_groups + row_group) * tile_rows;
  const int own_column = phase * columns1 + x_group * x_tiles * tile_columns;
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
#pragma unroll 1
    for (int slice = 0; slice < displacements; slice += slices) {
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = lane / 4 + 8 * half;  // position in its tile
        const int column = own % tile_columns;
        const int q = lane % 4 * 2 - advance_x * column - slice;
        accumulator* const to =
            shared + ((own_strip + own / tile_columns) * slices + q) * line + own_column + column;
#pragma unroll
        for (int t = 0; t < column_tiles; ++t) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (!inside(q + 8 * t + k, slices)) continue;
#pragma unroll
            for (int i = 0; i < x_tiles; ++i) {
              to[(8 * t + k) * line + i * tile_columns] = sums[r][i][t][2 * half + k];
            }
          }
        }
      }
      __syncthreads();
      constexpr int units = phases * columns1 / run;
      for (int i = thread; i < strips * slices * units; i += threads) {
        int at = i;
        const int k0 = pop(at, units) * run, out_slice = pop(at, slices);
        const int strip = at, q = q0 + slice + out_slice, j = strip % tile_rows;
        const int group = strip / tile_rows % row_groups;
        const int e = e0 + first_row(group) + r, p = e - advance_y * j;
        const int row = row0 + strip / (tile_rows * row_groups) * tile_rows + j;
        const int u = phases_y * row + phase_y;
        if (slice + out_slice >= displacements || q >= patch_x || !inside(p, patch_y) ||
            u >= s.lattice_height || is_others(group, r)) {
          continue;
        }
        accumulator values[run];
        const accumulator* const from = shared + (strip * slices + out_slice) * line;
        if constexpr (run % (4 * phases) == 0) {
#pragma unroll
          for (int k = 0; k < run; k += 4 * phases) {
#pragma unroll
            for (int f = 0; f < phases; ++f) {
              accumulator four[4];
              load_words(four, from + f * columns1 + (k0 + k) / phases);
#pragma unroll
              for (int m = 0; m < 4; ++m) values[k + m * phases + f] = four[m];
            }
          }
        } else {
#pragma unroll
          for (int k = 0; k < run; ++k) {
            values[k] = from[(k0 + k) % phases * columns1 + (k0 + k) / phases];
          }
        }
        const auto column = [&](int k) {
          return phases_x * (m0 + (k0 + k) / phases) + phase0 + (k0 + k) % phases;
        };
        // A sum with a pixel outside is 0, or NaN after 0 * infinity, which counts for nothing.
        bool finite = true;
#pragma unroll
        for (int k = 0; k < run; ++k) finite = finite && values[k] - values[k] == accumulator(0);
        if (!finite) {
          const int y = s.origin_y + step_y * u, y_other = y + s.first_y + spacing_y * p;
          const bool row_counts = inside(y, s.height) && inside(y_other, s.height);
#pragma unroll
          for (int k = 0; k < run; ++k) {
            const int x = s.origin_x + step_x * column(k), x_other = x + s.first_x + spacing_x * q;
            if (!(row_counts && inside(x, s.width) && inside(x_other, s.width))) values[k] = 0;
          }
        }
        result rounded[run];
#pragma unroll
        for (int k = 0; k < run; ++k) rounded[k] = narrow<result>(values[k] * scale);
        const int displacement = p * patch_x + q;
        result* const to =
            cost +
            static_cast<long long>(n) * (patch_y * patch_x) * s.lattice_height * s.lattice_width +
            (displacement * s.lattice_height + u) * s.lattice_width;
        if constexpr (result_vector == run) {
          if (column(0) < s.lattice_width) store_neighbours(to + column(0), rounded);
        } else {
#pragma unroll
          for (int k = 0; k < run; ++k) {
            if (column(k) < s.lattice_width && phase0 + (k0 + k) % phases < phases_x) {
              to[column(k)] = rounded[k];
            }
          }
        }
      }
    }
  }
}
