// Tensor cores: products of small matrices, summed in float. Elements have 16 bits, or they are
// floats that are rounded to TF32, which keeps 11 of their 24 binary digits.
//
// A row of an operand is 8 words long: 16 elements of 16 bits, two in a word, or 8 floats. A warp
// holds a matrix in fragments, spread over its lanes. Word i of lane 4 * g + t is, with the columns
// of the second operand as its rows,
//
//   one (16 rows)   row g + 8 * (i % 2),  word t + 4 * (i / 2)
//   two (8 rows)    row g,                word t + 4 * i
//   sums (16 x 8)   row g + 8 * (i / 2),  column 2 * t + i % 2
//
// All lanes of a warp must call these functions together, and the compute capability must be at
// least 8.0.
#pragma once
#include "staging.cuh"

template <typename Element>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<Bfloat16> = true;

// Read COUNT (2 or 4) matrices of 8 rows of 16 bytes into one word of a lane each. Lane
// 8 * i + k says where row k of matrix i lies, at a multiple of 16 bytes of shared memory: rows may
// lie anywhere. (Of 2 matrices, lanes 16 and up are not asked.) With TRANSPOSED, lanes hold two
// neighbouring elements of a column per word.
template <int COUNT, bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(unsigned* fragments, SharedAddress row) {
  static_assert(COUNT == 4 || (COUNT == 2 && !TRANSPOSED), "what the kernels use of ldmatrix");
#if defined(CUPYCORR_HOST)
  host_load_matrices(fragments, COUNT, row, TRANSPOSED);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
  } else if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragments[0]), "=r"(fragments[1])
                 : "r"(row)
                 : "memory");
  }
#endif
}

// Round words of fragments to what the tensor cores multiply: floats to TF32, ties away from 0.
template <typename Element, int COUNT>
__device__ __forceinline__ void round_matrices(unsigned* fragments) {
  if constexpr (sizeof(Element) == 4) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#if defined(CUPYCORR_HOST)
      fragments[i] = host_round_to_tf32(fragments[i]);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(fragments[i]) : "f"(__uint_as_float(fragments[i])));
#endif
    }
  }
}

// Round two floats to a word of a fragment, the first in its lower half, to nearest even, and keep
// what is left of them, which floats hold exactly.
template <typename Element>
__device__ __forceinline__ unsigned split_off(float& first, float& second) {
#if defined(CUPYCORR_HOST)
  const unsigned word =
      bits_of(narrow<Element>(first)) | bits_of(narrow<Element>(second)) << 16;
#else
  unsigned word = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (is_bfloat16<Element>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
#endif
#endif
  first -= widen(Element{static_cast<unsigned short>(word)});
  second -= widen(Element{static_cast<unsigned short>(word >> 16)});
  return word;
}

// Add to sums[row][column] the product of row `row` of `one` and row `column` of `two`.
template <typename Element>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const unsigned (&one)[4],
                                                  const unsigned* two) {
#if defined(CUPYCORR_HOST)
  host_multiply_matrices(sums, one, two, [](float sum, unsigned a, unsigned b) {
    if constexpr (sizeof(Element) == 4) {
      return sum + __uint_as_float(a) * __uint_as_float(b);
    } else {
      const auto half = [](unsigned bits) {
        return widen(Element{static_cast<unsigned short>(bits)});
      };
      sum += half(a) * half(b);
      return sum + half(a >> 16) * half(b >> 16);
    }
  });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Element) == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(one[0]), "r"(one[1]), "r"(one[2]), "r"(one[3]), "r"(two[0]), "r"(two[1]));
  } else if constexpr (is_bfloat16<Element>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(one[0]), "r"(one[1]), "r"(one[2]), "r"(one[3]), "r"(two[0]), "r"(two[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(one[0]), "r"(one[1]), "r"(one[2]), "r"(one[3]), "r"(two[0]), "r"(two[1]));
  }
#endif
}

// Copy CHANNELS channels of PIXELS pixels, from channel c on, to shared memory, where a pixel takes
// PITCH elements; zeros for those that do not exist. Offsets are those of pixels in a map, or -1.
// VECTOR channels are copied at a time, or two through registers if that is 1.
template <int THREADS, int CHANNELS, int PITCH, int PIXELS, int VECTOR, typename Element>
__device__ __forceinline__ void stage_pixels(const Element* map, const int* offsets, int c,
                                             int channels, char* to, SharedAddress address,
                                             int thread) {
  constexpr int bytes = static_cast<int>(sizeof(Element));
  constexpr int unit = larger(VECTOR, 2), units = CHANNELS / unit, at_once = THREADS / units;
  static_assert(THREADS % units == 0, "a thread has the same channels of all of its pixels");
  const int k = thread % units * unit, first = thread / units;
  const bool in_map = c + k < channels;
#pragma unroll 4
  for (int n = 0; n < ceil_div(PIXELS, at_once); ++n) {
    const int i = first + n * at_once;
    if (PIXELS % at_once != 0 && i >= PIXELS) continue;
    const int offset = offsets[i];
    const int at = (i * PITCH + k) * bytes;
    const bool exists = in_map && offset >= 0;
    const Element* const from = map + (exists ? offset + c + k : 0);
    if constexpr (VECTOR > 1) {
      copy_async_or_zero<VECTOR * bytes>(address + at, from, exists);
    } else {
      Pack<Element, unit> pack = {};
      if (exists) pack.values[0] = from[0];
      if (exists && c + k + 1 < channels) pack.values[1] = from[1];
      *reinterpret_cast<Pack<Element, unit>*>(to + at) = pack;
    }
  }
}

// Read COUNT neighbouring elements, of up to 16 bytes together, if they exist; zeros if not. A
// branch in C would cost more.
template <typename Element, int COUNT, int WORDS>
__device__ __forceinline__ Pack<unsigned, WORDS> load_or_zero(const Element* from, bool exists) {
  Pack<unsigned, WORDS> pack = {};
  unsigned(&v)[WORDS] = pack.values;
  constexpr int bytes = COUNT * static_cast<int>(sizeof(Element));
#ifdef CUPYCORR_HOST
  if constexpr (bytes < 4) {
    if (exists) v[0] = bits_of(from[0]);
  } else {
    if (exists) pack = *reinterpret_cast<const Pack<unsigned, WORDS>*>(from);
  }
#else
  const int there = exists;
  if constexpr (bytes == 16) {
    asm volatile("{ .reg .pred exists; setp.ne.b32 exists, %5, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@exists ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v[0]), "=&r"(v[1]), "=&r"(v[2]), "=&r"(v[3])
        : "l"(from), "r"(there));
  } else if constexpr (bytes == 8) {
    asm volatile("{ .reg .pred exists; setp.ne.b32 exists, %3, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0;\n"
        "@exists ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
        : "=&r"(v[0]), "=&r"(v[1])
        : "l"(from), "r"(there));
  } else if constexpr (bytes == 4) {
    asm volatile("{ .reg .pred exists; setp.ne.b32 exists, %2, 0;\n"
        "mov.b32 %0, 0; @exists ld.global.nc.b32 %0, [%1]; }"
        : "=&r"(v[0])
        : "l"(from), "r"(there));
  } else {
    unsigned short half;
    asm volatile("{ .reg .pred exists; setp.ne.b32 exists, %2, 0;\n"
        "mov.b16 %0, 0; @exists ld.global.nc.b16 %0, [%1]; }"
        : "=&h"(half)
        : "l"(from), "r"(there));
    v[0] = half;
  }
#endif
  return pack;
}

// Join the lower or the upper halves of two words.
__device__ __forceinline__ unsigned join_halves(unsigned one, unsigned two, bool upper) {
#ifdef CUPYCORR_HOST
  return upper ? one >> 16 | (two & 0xffff0000u) : (one & 0xffffu) | two << 16;
#else
  unsigned joined;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(joined) : "r"(one), "r"(two), "r"(upper ? 0x7632 : 0x5410));
  return joined;
#endif
}

// The channels and pixels of a map whose channels lie apart, exchanged on the way to shared memory.
//
// A run is 8 * PERIOD neighbouring pixels of a row. A thread reads it from as many channels as fill
// a word, and stores a word for each pixel that counts. It keeps the run in registers from `fetch`
// to `land`: what lies between hides the latency of global memory.
//
//   pixels     lead          first column            PERIOD 2, two phases, lead 2
//   phase      .   .   0   1   0   1   0   1  ...
//   slot       -1  -1  0   0   1   1   2   2  ...
//
// The pixels of a phase, PERIOD apart, have slots side by side, in one row after another. Eight
// slots are a group; GROUP_BYTES are 32 more than the slots need, so that the words that a warp
// stores, of 8 pairs of channels in 4 runs, lie in different banks.
template <typename Element, int THREADS, int CHANNELS, int ROWS, int RUNS, int PERIOD, int LEAD,
          int STEP, int PHASES, int PHASE_BYTES, int GROUP_BYTES, int SLOT_BYTES, int VECTOR>
struct Runs {
  static constexpr int bytes = static_cast<int>(sizeof(Element));
  static constexpr int of_word = 4 / bytes;  // channels
  static constexpr int lanes = 8;            // with neighbouring words
  static constexpr int at_once = THREADS / lanes;
  static constexpr int units = ROWS * RUNS * (CHANNELS / (lanes * of_word));
  static constexpr int count = ceil_div(units, at_once);  // runs of a thread
  static constexpr int pixels = 8 * PERIOD, loads = pixels / VECTOR;
  static constexpr int words = ceil_div(VECTOR * bytes, 4);  // of a load
  static_assert(pixels % VECTOR == 0 && CHANNELS % (lanes * of_word) == 0, "whole runs");

  // What is on its way.
  struct Fetched {
    Pack<unsigned, words> packs[of_word][loads];
  };

  int x[count], offset[count];  // of a run: pixel, where its row exists; element in its channel
  int thread;
  unsigned end;  // pixels from here on are not needed

  // Find this thread's runs. The first column is at pixel `first`, and `columns` pixels are needed;
  // row(i) is the y of row i, outside of the map if there is none.
  template <typename Row>
  __device__ __forceinline__ void find(int thread_, int first, int columns, int width, int height,
                                       Row row) {
    thread = thread_;
    end = larger(0, smaller(width, first + columns));
#pragma unroll
    for (int n = 0; n < count; ++n) {
      int rest = thread / lanes + n * at_once;
      const int run = pop(rest, RUNS), y = row(pop(rest, ROWS));
      const bool exists = rest * lanes * of_word < CHANNELS && inside(y, height);
      x[n] = exists ? first - LEAD + run * pixels : width;
      offset[n] = exists ? y * width + x[n] : 0;
    }
  }

  // The first channel of a run.
  __device__ __forceinline__ int channel(int n) const {
    constexpr int of_rows = ROWS * RUNS;
    const int group = CHANNELS == lanes * of_word ? 0 : (thread / lanes + n * at_once) / of_rows;
    return (group * lanes + thread % lanes) * of_word;
  }

  // Where pixel j of a run goes, in bytes from its group; -1 if it is of no phase.
  static __device__ constexpr int phase(int j) {
    for (int f = 0; f < PHASES; ++f) {
      if ((LEAD + STEP * f) % PERIOD == j % PERIOD) return f;
    }
    return -1;
  }
  static __device__ constexpr int place(int j) {
    const int f = phase(j), slot = (j - LEAD - STEP * f) / PERIOD + 64;  // above 0
    return f * PHASE_BYTES + (slot / 8 - 8) * GROUP_BYTES + slot % 8 * SLOT_BYTES;
  }
  static __device__ constexpr bool counts(int load) {
    for (int k = 0; k < VECTOR; ++k) {
      if (phase(load * VECTOR + k) >= 0) return true;
    }
    return false;
  }

  // Read run n of channels c and up.
  __device__ __forceinline__ void fetch(const Element* map, int c, int channels, int plane, int n,
                                        Fetched& fetched) const {
    const int first = c + channel(n);
    const Element* const from = map + (first * plane + offset[n]);
#pragma unroll
    for (int k = 0; k < of_word; ++k) {
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        if (!counts(i)) continue;
        const bool exists = first + k < channels && static_cast<unsigned>(x[n] + i * VECTOR) < end;
        fetched.packs[k][i] =
            load_or_zero<Element, VECTOR, words>(from + k * plane + i * VECTOR, exists);
      }
    }
  }

  // Store what was fetched of run n; `to` is where the first group lies.
  __device__ __forceinline__ void land(char* to, int n, const Fetched& fetched) const {
    const int unit = thread / lanes + n * at_once;
    if (units % at_once != 0 && unit >= units) return;
    char* const group =
        to + (CHANNELS == lanes * of_word ? unit : unit % (ROWS * RUNS)) * GROUP_BYTES +
        channel(n) * bytes;
#pragma unroll
    for (int j = 0; j < pixels; ++j) {
      if (phase(j) < 0) continue;
      const int i = j / VECTOR, k = j % VECTOR;
      unsigned word = fetched.packs[0][i].values[k * bytes / 4];
      if constexpr (of_word == 2) {
        const unsigned other = fetched.packs[of_word - 1][i].values[k / 2];
        word = join_halves(word, other, k % 2);
      }
      *reinterpret_cast<unsigned*>(group + place(j)) = word;
    }
  }
};
