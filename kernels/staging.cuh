// Copies from global to shared memory: a block stages rectangles of words, each thread its share.
//
// A rectangle has ROWS rows of COLUMNS columns. Columns are neighbours in global memory, but in
// shared memory they are split into PHASES residue classes, so that positions which meet the same
// displacements lie side by side:
//
//   column k = phase + PHASES * m   of row r   ->   word  r * ROW_PITCH + phase * PHASE_PITCH + m
//
// A thread owns some columns and every `at_once`-th row of them, for all rectangles that a kernel
// stages. `find` works out once where the thread's words lie and which exist. Words that do not are
// never written; the kernel zeroes its buffers at the start, and so they stay zero.
//
// With ASYNCHRONOUS, copies go straight to shared memory (cp.async, compute capability 8.0 and up,
// for words that need no conversion). Without, `fetch` reads into registers and `land` stores them:
// what lies between hides the latency of global memory.
#pragma once
#include "device.cuh"

// VECTOR neighbouring elements, moved by one instruction.
template <typename T, int VECTOR>
struct alignas(sizeof(T) * VECTOR) Pack {
  T values[VECTOR];
};

__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ unsigned bits_of(Half value) { return value.bits; }
__device__ __forceinline__ unsigned bits_of(Bfloat16 value) { return value.bits; }

// Write COUNT neighbouring elements, of up to 16 bytes together, to global memory by one
// instruction. The compiler would tear the copy of a pack apart.
template <typename T, int COUNT>
__device__ __forceinline__ void store_neighbours(T* to, const T (&from)[COUNT]) {
  constexpr int words = COUNT * static_cast<int>(sizeof(T)) / 4;
  if constexpr (COUNT == 1) {
    to[0] = from[0];
  } else if constexpr (sizeof(T) == 8) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(to), "d"(from[0]), "d"(from[1])
                 : "memory");
#else
    *reinterpret_cast<Pack<T, 2>*>(to) = {from[0], from[1]};
#endif
  } else {
    constexpr int of_word = COUNT / words;
    Pack<unsigned, words> pack;
    unsigned(&v)[words] = pack.values;
#pragma unroll
    for (int k = 0; k < words; ++k) {
      v[k] = bits_of(from[of_word * k]);
      if (of_word == 2) v[k] |= bits_of(from[2 * k + of_word - 1]) << 16;
    }
#ifdef __CUDA_ARCH__
    if constexpr (words == 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
                   "r"(v[2]), "r"(v[3])
                   : "memory");
    } else if constexpr (words == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v[0]), "r"(v[1]) : "memory");
    } else {
      *reinterpret_cast<Pack<unsigned, words>*>(to) = pack;
    }
#else
    *reinterpret_cast<Pack<unsigned, words>*>(to) = pack;
#endif
  }
}

template <typename Accumulator>
constexpr int words_per_load = 16 / static_cast<int>(sizeof(Accumulator));

// Read or write 16 bytes of shared memory.
template <typename Accumulator>
__device__ __forceinline__ void load_words(Accumulator* to, const Accumulator* from) {
  constexpr int words = words_per_load<Accumulator>;
  const auto pack = *reinterpret_cast<const Pack<Accumulator, words>*>(from);
#pragma unroll
  for (int k = 0; k < words; ++k) to[k] = pack.values[k];
}
template <typename Accumulator>
__device__ __forceinline__ void store_words(Accumulator* to, const Accumulator* from) {
  constexpr int words = words_per_load<Accumulator>;
  Pack<Accumulator, words> pack;
#pragma unroll
  for (int k = 0; k < words; ++k) pack.values[k] = from[k];
  *reinterpret_cast<Pack<Accumulator, words>*>(to) = pack;
}

// Read COUNT neighbouring columns of a row in shared memory whose phases lie PHASE_PITCH words
// apart; the first column is a multiple of COUNT, and words of a phase are aligned.
template <int PHASES, int PHASE_PITCH, int COUNT, typename Accumulator>
__device__ __forceinline__ void load_columns(Accumulator (&to)[COUNT], const Accumulator* row,
                                             int column) {
  if constexpr (COUNT % PHASES == 0) {
    constexpr int of_phase = COUNT / PHASES;
#pragma unroll
    for (int phase = 0; phase < PHASES; ++phase) {
      const auto pack = *reinterpret_cast<const Pack<Accumulator, of_phase>*>(
          row + phase * PHASE_PITCH + column / PHASES);
#pragma unroll
      for (int m = 0; m < of_phase; ++m) to[m * PHASES + phase] = pack.values[m];
    }
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      to[k] = row[(column + k) % PHASES * PHASE_PITCH + (column + k) / PHASES];
    }
  }
}

// Write up to COUNT rows of a thread's values, from row `first` on, `pitch` words apart.
template <int COUNT, int ROWS, int COLUMNS, typename Accumulator>
__device__ __forceinline__ void store_rows(Accumulator* to, int pitch,
                                           const Accumulator (&values)[ROWS][COLUMNS], int first) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    if (first + k >= ROWS) continue;
#pragma unroll
    for (int m = 0; m < COLUMNS; m += words_per_load<Accumulator>) {
      store_words(to + k * pitch + m, &values[smaller(first + k, ROWS - 1)][m]);
    }
  }
}

// Zero the words [0, count) of shared memory; count is a multiple of words_per_load.
template <int THREADS, typename Accumulator>
__device__ __forceinline__ void clear(Accumulator* shared, int count, int thread) {
  constexpr int words = words_per_load<Accumulator>;
  Accumulator zeros[words] = {};
  for (int i = thread * words; i < count; i += THREADS * words) store_words(shared + i, zeros);
}

// An address in shared memory. Making one costs instructions, so a share keeps its own.
#ifdef CUPYCORR_HOST
using SharedAddress = char*;
#else
using SharedAddress = unsigned;
#endif
__device__ __forceinline__ SharedAddress shared_address(void* pointer) {
#ifdef CUPYCORR_HOST
  return static_cast<char*>(pointer);
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
#endif
}

// Queue a copy of BYTES (4, 8 or 16) from global to shared memory, if it `exists`; both addresses
// are multiples. A branch in C would cost more: the compiler guards every block with copies.
template <int BYTES>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool exists) {
#if defined(CUPYCORR_HOST)
  if (exists) host_copy_async(to, from, BYTES);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (BYTES == 16) {
    asm volatile(
        "{ .reg .pred exists; setp.ne.b32 exists, %2, 0;\n"
        "@exists cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to),
        "l"(from), "r"(static_cast<int>(exists))
        : "memory");
  } else {
    asm volatile(
        "{ .reg .pred exists; setp.ne.b32 exists, %2, 0;\n"
        "@exists cp.async.ca.shared.global [%0], [%1], %3; }" ::"r"(to),
        "l"(from), "r"(static_cast<int>(exists)), "n"(BYTES)
        : "memory");
  }
#endif
}
// Queue such a copy, or, where nothing exists to be copied, one of zeros: then `from` is not read.
template <int BYTES>
__device__ __forceinline__ void copy_async_or_zero(SharedAddress to, const void* from,
                                                   bool exists) {
#if defined(CUPYCORR_HOST)
  host_copy_async(to, from, BYTES, exists);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                 "r"(exists ? BYTES : 0)
                 : "memory");
  }
#endif
}
// Wait for this thread's queued copies. Other threads see them after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#if defined(CUPYCORR_HOST)
  host_wait_for_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <typename Element, typename Accumulator, int THREADS, bool ASYNCHRONOUS, int VECTOR,
          int ROWS, int COLUMNS, int PHASES, int ROW_PITCH, int PHASE_PITCH, int SLABS>
struct Share {
  static constexpr int units = ceil_div(COLUMNS, VECTOR);  // copies of a row
  static constexpr int across = ceil_div(units, THREADS);  // copies of a thread, of one row
  // Rows that the block copies at once, and rows of a thread in all.
  static constexpr int at_once = across > 1 ? 1 : THREADS / units;
  static constexpr int rows = ceil_div(ROWS, at_once);
  static constexpr int mask_words = ceil_div(rows, 32);
  static_assert(PHASE_PITCH * PHASES >= round_up(COLUMNS, VECTOR), "columns overlap");
  static_assert(!ASYNCHRONOUS || VECTOR == 1 || PHASES == 1, "a copy must not be torn apart");

  int from[across];                      // first unit in global memory, elements
  int to[across];                        // and in shared memory, words from its beginning
  SharedAddress address[across];         // of that word
  unsigned exists[across][mask_words];   // bit i: row i of the share

  // What is on its way, in registers; unused with ASYNCHRONOUS.
  struct Fetched {
    Pack<Element, VECTOR> packs[SLABS][across][rows];
  };

  // Find this thread's share of rectangles in `shared`, where the first begins at word `begin`.
  // offset(row, column) is where an element lies, exists(row, column) whether it does. From row to
  // row offsets must grow evenly.
  template <typename Offset, typename Exists>
  __device__ __forceinline__ void find(int thread, Accumulator* shared, int begin, Offset offset,
                                       Exists exists_at) {
    const int first = across > 1 ? 0 : thread / units;
#pragma unroll
    for (int i = 0; i < across; ++i) {
      const int unit = across > 1 ? thread + i * THREADS : thread % units, column = unit * VECTOR;
      from[i] = offset(first, column);
      to[i] = begin + first * ROW_PITCH + column % PHASES * PHASE_PITCH + column / PHASES;
      address[i] = shared_address(shared + to[i]);
#pragma unroll
      for (int word = 0; word < mask_words; ++word) exists[i][word] = 0;
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        const int row = first + k * at_once;
        if (first < at_once && unit < units && row < ROWS && exists_at(row, column)) {
          exists[i][k / 32] |= 1u << k % 32;
        }
      }
    }
  }

  // Read SLABS rectangles that lie `slab` elements apart, their rows `row` elements, if they are
  // `present`. In shared memory the first lies `shift` words behind that of `find`, the others
  // every `slab_words` words.
  __device__ __forceinline__ void fetch(const Element* base, int slab, int row, Fetched& fetched,
                                        int shift, int slab_words, bool present = true) const {
    constexpr int word = static_cast<int>(sizeof(Accumulator));
#pragma unroll
    for (int i = 0; i < across; ++i) {
      const Element* source = base + from[i];
      const SharedAddress target = address[i] + shift * word;
#pragma unroll
      for (int k = 0; k < rows; ++k, source += at_once * row) {
        const bool copied = present && (exists[i][k / 32] >> k % 32 & 1);
        if (SLABS > 1 && !copied) continue;  // one branch for many copies
        const Element* element = source;
#pragma unroll
        for (int s = 0; s < SLABS; ++s, element += slab) {
          if constexpr (ASYNCHRONOUS) {
            copy_async<sizeof(Element) * VECTOR>(
                target + (s * slab_words + k * at_once * ROW_PITCH) * word, element, copied);
          } else if (copied) {
            fetched.packs[s][i][k] = *reinterpret_cast<const Pack<Element, VECTOR>*>(element);
          }
        }
      }
    }
  }

  // Zero the words of copies, with PHASES = 1, that do not exist though the copies do.
  template <typename Exists>
  __device__ __forceinline__ void trim(int thread, Accumulator* shared, Exists exists_at) const {
    const int first = across > 1 ? 0 : thread / units;
#pragma unroll
    for (int i = 0; i < across; ++i) {
      const int column = (across > 1 ? thread + i * THREADS : thread % units) * VECTOR;
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        if (!(exists[i][k / 32] >> k % 32 & 1)) continue;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          if (exists_at(first + k * at_once, column + v)) continue;
          shared[to[i] + k * at_once * ROW_PITCH + v] = 0;
        }
      }
    }
  }

  // Store zeros in place of what a fetch and `land` would store.
  __device__ __forceinline__ void erase(Accumulator* shared) const {
#pragma unroll
    for (int i = 0; i < across; ++i) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        if (!(exists[i][k / 32] >> k % 32 & 1)) continue;
        const Accumulator zeros[VECTOR] = {};
        put(shared + to[i] + k * at_once * ROW_PITCH, zeros);
      }
    }
  }

  // Store what was fetched last.
  __device__ __forceinline__ void land(const Fetched& fetched, Accumulator* shared,
                                       int slab_words) const {
#pragma unroll
    for (int i = 0; i < (ASYNCHRONOUS ? 0 : across); ++i) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        if (!(exists[i][k / 32] >> k % 32 & 1)) continue;
        Accumulator* const target = shared + to[i] + k * at_once * ROW_PITCH;
#pragma unroll
        for (int s = 0; s < SLABS; ++s) {
          Accumulator words[VECTOR];
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) words[v] = widen(fetched.packs[s][i][k].values[v]);
          put(target + s * slab_words, words);
        }
      }
    }
  }

 private:
  // Store neighbouring columns; VECTOR and the column are multiples of PHASES, or VECTOR is 1.
  static __device__ __forceinline__ void put(Accumulator* target, const Accumulator* words) {
    constexpr int load = words_per_load<Accumulator>;
    if constexpr (PHASES == 1 && VECTOR % load == 0) {
#pragma unroll
      for (int v = 0; v < VECTOR; v += load) store_words(target + v, words + v);
    } else {
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) target[v % PHASES * PHASE_PITCH + v / PHASES] = words[v];
    }
  }
};
