// The products of two feature maps, summed over channels: a cost volume of one tap.
//
//   cost[n, p, q, u, v] = scale * sum over c of fmap1[n, c, y, x] * fmap2[n, c, y + dy, x + dx]
//   y = origin_y + u * step_y,  dy = first_y + p * spacing_y                 (x, dx likewise)
//
// and 0 where a position lies outside its map. With `l1` a term is |fmap1 - fmap2|, and a map is 0
// outside; staged words are 0 there too, so the kernel needs no further test. Lattice positions lie
// `step` pixels apart, displacements `spacing` pixels. Arrays are contiguous, in the order of their
// indices.
//
// Phases. Along an axis, lattice position v = phases * m + r of phase r meets at displacement q the
// pixel  phase's origin + spacing * (advance * m + q),  with phases = spacing / gcd(step, spacing)
// and advance = step / gcd(step, spacing). So inside a phase position m meets column
// advance * m + q: neighbours share their columns, whatever the spacing.
//
//   fmap1 column   m     m+1   m+2         advance = 1, three displacements:
//   fmap2 column   m  m+1  m+2  m+3  m+4   position m meets m, m+1, m+2
//
// Threads. A strip is one row of positions at one vertical displacement p and one group of
// horizontal displacements. A block owns `strips` consecutive strips, numbered (row, p, group of q)
// with the last fastest, of one row phase, and on each of them `groups` x `positions` positions of
// every column phase; it stages `chunk` channels of the map rows that they need at a time. A
// thread owns `positions` consecutive positions m of one phase on one strip, for `displacements`
// consecutive q. Per channel it reads `positions` words of fmap1 and `thread_columns` of fmap2, and
// does positions * displacements multiply-adds. For small images the channels of a chunk are shared
// among `channel_groups` threads, whose sums are added in a fixed order at the end.
//
// Displacement rows that leave fmap2 have no strips if `least` is below patch_y: a lattice row has
// strips for those p whose row of fmap2 exists, and for more, so that they are `least` of them. The
// block with a row's first strip writes zeros for the others.
//
//   row   p = 0 1 2 3 4    least = 3, patch_y = 5; fmap2 has 4 rows
//   0         - - x x x    x  a strip
//   1         - x x x x    -  zeros
//   2         x x x x -
//   3         x x x - -
//
// Launch: samples * phases_y * blocks_y * blocks_x blocks of `threads` threads, with `shared_words`
// accumulators of dynamic shared memory, and `strips` integers behind them if least < patch_y; at
// least `chunk` channels, and fewer than 2^31 elements per sample in each array.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of the maps
using accumulator = float;  // of sums
using result = float;       // of cost: element, or accumulator if taps_sum follows
constexpr bool l1 = false;  // sum absolute differences
// The layer.
constexpr int patch_y = 21, patch_x = 21;
constexpr int step_y = 1, step_x = 1;
constexpr int spacing_y = 2, spacing_x = 2;
constexpr int phases_y = 2, phases_x = 2;
constexpr int advance_y = 1, advance_x = 1;
// The tile.
constexpr int positions = 8, displacements = 21;  // of a thread
constexpr int groups = 1;                         // of positions, per column phase
constexpr int strips = 63;
constexpr int least = patch_y;  // vertical displacements of a row that have strips, at least
constexpr int channel_groups = 1;
constexpr int chunk = 4;           // channels staged at a time
constexpr int vector = 1;          // elements per load from global memory
constexpr int result_vector = 1;   // elements per store to global memory
constexpr int lead = 0;            // columns of fmap2 staged before the first, to align loads
constexpr int rows1 = 4, rows2 = 24;    // rows of the maps that a block stages
constexpr int pitch1 = 12, pitch2 = 28; // words per row and phase
constexpr bool asynchronous = true;     // copy straight to shared memory
constexpr bool ahead = true;            // fetch the next chunk before computing this one
constexpr int buffers = 2;              // 2 if asynchronous, else 1
constexpr int threads = 128;
constexpr int shared_words = 11520;
constexpr int resident = 1;  // blocks per multiprocessor that registers must suffice for
#endif

#include "device.cuh"
#include "staging.cuh"

struct Sizes {
  int channels, height, width;
  int lattice_height, lattice_width;
  int origin_y, origin_x, first_y, first_x;  // pixels
  int blocks_y, blocks_x;                    // of one sample and row phase
};

constexpr int columns = groups * positions;  // positions of one phase in a block
constexpr int columns2 = lead + advance_x * (columns - 1) + patch_x;
constexpr int thread_columns = lead + advance_x * (positions - 1) + displacements;  // of fmap2
constexpr int q_groups = ceil_div(patch_x, displacements);
constexpr int row_strips = patch_y * q_groups;
constexpr int lanes = phases_x * groups;  // threads along x
constexpr int words1 = rows1 * phases_x * pitch1;
constexpr int channel_words = words1 + rows2 * phases_x * pitch2;
constexpr int buffer_words = chunk * channel_words;
constexpr int load = words_per_load<accumulator>;  // words of a 16-byte access
constexpr int line = lanes * positions + load;     // words of a strip of results, padded
// Results leave through shared memory, of so many displacements of a thread at a time: in equal
// parts of as many as fit.
constexpr int fitting = smaller(displacements, shared_words / (channel_groups * strips * line));
constexpr int slices = ceil_div(displacements, ceil_div(displacements, larger(1, fitting)));

constexpr bool trimmed = least < patch_y;

static_assert(!trimmed || !l1, "a distance to what lies outside is not 0");
static_assert(channel_groups * strips * lanes <= threads, "every thread has its own outputs");
static_assert(buffers * buffer_words <= shared_words && fitting >= 1, "shared memory is too small");
static_assert(!asynchronous || (buffers == 2 && ahead), "a copy must not meet what is in use");
static_assert(pitch1 % load == 0 && pitch2 % load == 0 && positions % load == 0, "alignment");
static_assert(q_groups == 1 || displacements % load == 0, "alignment of a thread's columns");
static_assert(pitch2 >= advance_x * positions * (groups - 1) + displacements * (q_groups - 1) +
                            round_up(thread_columns, load), "a thread's columns leave their row");

// The vertical displacements of lattice rows that have strips.
struct Displacements {
  int before, extent;  // of the first row: those with rows above fmap2 and in it, of any number

  // y2 is the pixel row that the first lattice row meets at p = 0.
  __device__ __forceinline__ Displacements(int y2, int height)
      : before(quotient(-y2)), extent(larger(least, quotient(height - y2) - before)) {}

  __device__ __forceinline__ int first(int row) const {
    return smaller(larger(before - advance_y * row, 0), patch_y - least);
  }
  __device__ __forceinline__ int count(int row) const {
    return smaller(larger(before + extent - advance_y * row, least), patch_y) - first(row);
  }

 private:
  static __device__ __forceinline__ int quotient(int a) {  // a / spacing_y, rounded up
    return a > 0 ? ceil_div(a, spacing_y) : a / spacing_y;
  }
};

template <int ROWS, int COLUMNS, int PITCH>
using Map = Share<element, accumulator, threads, asynchronous, vector, ROWS, COLUMNS * phases_x,
                  phases_x, phases_x * PITCH, PITCH, chunk>;

extern "C" __global__ void __launch_bounds__(threads, resident) product_cost(
    const element* __restrict__ fmap1, const element* __restrict__ fmap2,
    result* __restrict__ cost, const Sizes s, const accumulator scale) {
  DYNAMIC_SHARED(accumulator, shared);
  const int thread = threadIdx.x;
  const int plane = s.height * s.width;

  // What this block owns.
  int rest = blockIdx.x;
  const int m0 = pop(rest, s.blocks_x) * columns, strip0 = pop(rest, s.blocks_y) * strips;
  const int phase_y = pop(rest, phases_y), n = rest;
  const int first_y1 = s.origin_y + step_y * phase_y;
  const Displacements displaced(first_y1 + s.first_y, s.height);
  int row0 = strip0 / row_strips, skipped = strip0 % row_strips / q_groups;  // p's before strip0
  if (trimmed) {
    row0 = 0;
    skipped = strip0 / q_groups;
    while (skipped >= displaced.count(row0)) skipped -= displaced.count(row0++);
  }
  // A block inside one row stages only the rows of its own displacements.
  const int p0 = trimmed ? displaced.first(row0) : rows1 == 1 ? skipped : 0;
  // Strip `at` of the block, numbered as if all displacements had strips.
  const auto numbered = [&](int at) {
    if (!trimmed) return strip0 + at;
    int row = row0, p = skipped + (strip0 % q_groups + at) / q_groups;
    while (p >= displaced.count(row)) p -= displaced.count(row++);
    return (row * patch_y + displaced.first(row) + p) * q_groups + (strip0 + at) % q_groups;
  };

  // What this thread owns.
  const int lane = thread % lanes, phase = lane / groups, group = lane % groups;
  const int own_strip = thread / lanes % strips, strip = numbered(own_strip);
  const int channel_group = thread / (lanes * strips);
  const int row = strip / row_strips, p = strip % row_strips / q_groups, q_group = strip % q_groups;
  // Rows behind the last have the fewest strips, and so would read behind what is staged.
  const bool active = channel_group < channel_groups &&
                      (!trimmed || phases_y * row + phase_y < s.lattice_height);
  const int at1 = ((row - row0) * phases_x + phase) * pitch1 + group * positions;
  const int at2 = words1 + ((advance_y * (row - row0) + p - p0) * phases_x + phase) * pitch2 +
                  advance_x * positions * group + displacements * q_group;

  // Pixels of the staged rows and columns.
  const int last_row = trimmed ? numbered(strips - 1) / row_strips : row0 + rows1 - 1;
  const int y1 = first_y1 + spacing_y * advance_y * row0;
  const int y2 = y1 + s.first_y + spacing_y * p0;
  const int x1 = s.origin_x + step_x * phases_x * m0;
  const int x2 = x1 + s.first_x - spacing_x * lead;
  using Map1 = Map<rows1, columns, pitch1>;
  using Map2 = Map<rows2, columns2, pitch2>;
  Map1 share1;
  Map2 share2;
  const auto pixel_y1 = [&](int r) { return y1 + spacing_y * advance_y * r; };
  const auto pixel_x1 = [&](int k) { return x1 + step_x * k; };
  const auto pixel_y2 = [&](int r) { return y2 + spacing_y * r; };
  const auto pixel_x2 = [&](int k) {
    return x2 + step_x * (k % phases_x) + spacing_x * (k / phases_x);
  };
  share1.find(
      thread, shared, 0, [&](int r, int k) { return pixel_y1(r) * s.width + pixel_x1(k); },
      [&](int r, int k) {
        return (!trimmed || r <= last_row - row0) && inside(pixel_y1(r), s.height) &&
               inside(pixel_x1(k), s.width);
      });
  share2.find(
      thread, shared, words1, [&](int r, int k) { return pixel_y2(r) * s.width + pixel_x2(k); },
      [&](int r, int k) { return inside(pixel_y2(r), s.height) && inside(pixel_x2(k), s.width); });

  const long long sample = static_cast<long long>(n) * s.channels * plane;
  typename Map1::Fetched fetched1;
  typename Map2::Fetched fetched2;
  // The last chunk begins early enough to be a whole one; channels that it repeats count once.
  const auto first_channel = [&](int c) { return smaller(c, s.channels - chunk); };
  // A buffer is given by its first word.
  const auto fetch = [&](int c, int buffer) {
    const long long base = sample + static_cast<long long>(first_channel(c)) * plane;
    share1.fetch(fmap1 + base, plane, spacing_y * advance_y * s.width, fetched1, buffer,
                 channel_words);
    share2.fetch(fmap2 + base, plane, spacing_y * s.width, fetched2, buffer, channel_words);
  };
  const auto land = [&](int buffer) {
    share1.land(fetched1, shared + buffer, channel_words);
    share2.land(fetched2, shared + buffer, channel_words);
    if (asynchronous) wait_for_copies();
  };

  accumulator sums[displacements][positions] = {};
  const auto multiply = [&](int c, int buffer) {
    int k = c - first_channel(c) + channel_group;
    const accumulator* words = shared + buffer + k * channel_words;
#pragma unroll 1
    for (; k < chunk; k += channel_groups, words += channel_groups * channel_words) {
      accumulator one[positions], two[round_up(thread_columns, load)];
#pragma unroll
      for (int i = 0; i < positions; i += load) {
        load_words(one + i, words + at1 + i);
      }
#pragma unroll
      for (int i = 0; i < thread_columns; i += load) {
        load_words(two + i, words + at2 + i);
      }
#pragma unroll
      for (int q = 0; q < displacements; ++q) {
#pragma unroll
        for (int m = 0; m < positions; ++m) {
          sums[q][m] += similarity<l1>(one[m], two[lead + advance_x * m + q]);
        }
      }
    }
  };

  // With two buffers, a thread that passes the barrier of chunk c knows that all have finished with
  // chunk c - 1, whose buffer is the one that the next fetch fills. With one, what is fetched waits
  // in registers until all have finished.
  clear<threads>(shared, buffers * buffer_words, thread);
  int* const numbers = reinterpret_cast<int*>(shared + shared_words);  // of the block's strips
  if (trimmed && channel_group == 0 && lane == 0) numbers[own_strip] = strip;
  __syncthreads();
  int buffer = 0;
  if (ahead) fetch(0, buffer);
  constexpr int units = lanes * positions / result_vector;  // stores of a strip's line
  const int cost_plane = s.lattice_height * s.lattice_width;
  result* const costs = cost + static_cast<long long>(n) * (patch_y * patch_x) * cost_plane;
  if (trimmed) {
    result zeros[result_vector];
#pragma unroll
    for (int m = 0; m < result_vector; ++m) zeros[m] = narrow<result>(accumulator(0));
    const bool begun = skipped > 0 || strip0 % q_groups > 0;  // row 0, in another block
    for (int r = row0 + begun; r <= last_row; ++r) {
      const int u = phases_y * r + phase_y, before = displaced.first(r) * patch_x;
      const int present = displaced.count(r) * patch_x;
      if (u >= s.lattice_height) break;
#pragma unroll 1
      for (int i = thread; i < (patch_y * patch_x - present) * units; i += threads) {
        const int k = i / units, v = phases_x * m0 + i % units * result_vector;
        if (v >= s.lattice_width) continue;
        store_neighbours(costs + (k < before ? k : k + present) * cost_plane +
                             u * s.lattice_width + v, zeros);
      }
    }
  }
#pragma unroll 1
  for (int c = 0; c < s.channels; c += chunk) {
    const int other = buffers == 1 ? 0 : buffer_words - buffer;
    if (!ahead) fetch(c, buffer);
    if (buffers == 1) __syncthreads();
    land(buffer);
    __syncthreads();
    if (ahead && c + chunk < s.channels) fetch(c + chunk, other);
    if (active) multiply(c, buffer);
    buffer = other;
  }

  // Lines leave through shared memory, so that neighbouring threads write neighbouring words. One
  // store fills a place of a strip, at one displacement; a thread serves a place at many of them.
  constexpr int places = strips * units;
  constexpr int sharers = larger(1, threads / places);  // threads that serve a place
#pragma unroll
  for (int q0 = 0; q0 < displacements; q0 += slices) {
    __syncthreads();
    if (active) {
      store_rows<slices>(shared + (channel_group * slices * strips + own_strip) * line +
                             lane * positions,
                         strips * line, sums, q0);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < places * sharers; i += threads) {
      const int at = i % places / units, column = i % units * result_vector;
      const int out = trimmed ? numbers[at] : strip0 + at, out_row = out / row_strips;
      const int out_p = out % row_strips / q_groups, out_q = out % q_groups * displacements + q0;
      const int u = phases_y * out_row + phase_y, v = phases_x * m0 + column;
      if (u >= s.lattice_height || v >= s.lattice_width) continue;
      const int y = s.origin_y + step_y * u, y_other = y + s.first_y + spacing_y * out_p;
      const int x = s.origin_x + step_x * v, x_other = x + s.first_x + spacing_x * out_q;
      const bool row_counts = inside(y, s.height) && inside(y_other, s.height);
      const accumulator* const source = shared + at * line;
      result* const to = costs + (out_p * patch_x + out_q) * cost_plane + u * s.lattice_width + v;
      const int first = sharers == 1 ? 0 : i / places;
      const int count = smaller(slices, smaller(displacements - q0, patch_x - out_q));
      accumulator not_finite = 0;  // NaN if some sum is not finite
      const auto store = [&](int k, result* target, bool anywhere) {
        accumulator values[result_vector], more[result_vector];
        load_columns<phases_x, columns>(values, source + k * strips * line, column);
#pragma unroll
        for (int g = 1; g < channel_groups; ++g) {
          load_columns<phases_x, columns>(more, source + (g * slices + k) * strips * line, column);
#pragma unroll
          for (int m = 0; m < result_vector; ++m) values[m] += more[m];
        }
        result rounded[result_vector];
#pragma unroll
        for (int m = 0; m < result_vector; ++m) {
          const bool counts = anywhere || (row_counts && inside(x + step_x * m, s.width) &&
                                           inside(x_other + step_x * m + spacing_x * k, s.width));
          not_finite += values[m] * accumulator(0);
          rounded[m] = narrow<result>(counts ? values[m] * scale : accumulator(0));
        }
        store_neighbours(target, rounded);
      };
      result* next = to + first * cost_plane;
#pragma unroll
      for (int k = first; k < count; k += sharers, next += sharers * cost_plane) {
        store(k, next, true);
      }
      // Outside, even 0 * infinity counts for nothing. What is finite is 0 there already.
      if (l1 || not_finite == 0) continue;
#pragma unroll 1
      for (int k = first; k < count; k += sharers) store(k, to + k * cost_plane, false);
    }
  }
}
