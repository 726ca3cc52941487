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
// 16 bytes more; zeros for those that do not exist. Offsets are those of pixels in a map, or -1.
// VECTOR channels are copied at a time, or two through registers if that is 1.
template <int THREADS, int CHANNELS, int PIXELS, int VECTOR, typename Element>
__device__ __forceinline__ void stage_pixels(const Element* map, const int* offsets, int c,
                                             int channels, char* to, SharedAddress address,
                                             int thread) {
  constexpr int bytes = static_cast<int>(sizeof(Element)), pitch = CHANNELS + 16 / bytes;
  constexpr int unit = larger(VECTOR, 2), units = CHANNELS / unit, at_once = THREADS / units;
  static_assert(THREADS % units == 0, "a thread has the same channels of all of its pixels");
  const int k = thread % units * unit, first = thread / units;
  const bool in_map = c + k < channels;
#pragma unroll 4
  for (int n = 0; n < ceil_div(PIXELS, at_once); ++n) {
    const int i = first + n * at_once;
    if (PIXELS % at_once != 0 && i >= PIXELS) continue;
    const int offset = offsets[i];
    const int at = (i * pitch + k) * bytes;
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
