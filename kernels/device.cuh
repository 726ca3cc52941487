// What every kernel shares: storage types, rounding, index arithmetic, copies to shared memory.
//
// Storage is float, double, Half or Bfloat16 (`element`); sums are float or double (`accumulator`).
// The sources use no header, so that the run-time compiler needs no include path, and no CUDA
// built-in beyond those that tests/hostcuda.h declares, so that a host compiler builds them too.
//
// Launch bounds say that one block per multiprocessor is enough: else the compiler spills a few
// registers to fit one more block.
#pragma once

// The dynamic shared memory of a block, as `name`, an array of T.
#ifndef CUPYCORR_HOST
#define DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char bytes_of_block[]; \
  T* const name = reinterpret_cast<T*>(bytes_of_block)
#endif

struct Half { unsigned short bits; };
struct Bfloat16 { unsigned short bits; };

// ---- one rounding, at the store; exact widening, at the load

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | magnitude);
  // Moving the exponent by multiplication is exact, and normalizes subnormal numbers.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
#endif
}

__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(double value, double& result) { result = value; }
// To nearest even. Adding half a unit in the last place carries into the exponent by itself.
__device__ __forceinline__ void narrow(float value, Bfloat16& result) {
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const unsigned rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  result.bits = static_cast<unsigned short>(is_nan ? bits >> 16 | 0x40u : rounded >> 16);
}
__device__ __forceinline__ void narrow(float value, Half& result) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 0.5 has units of 2^-24
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  result.bits = static_cast<unsigned short>(sign | half);
#endif
}
template <typename T, typename Accumulator>
__device__ __forceinline__ T narrow(Accumulator value) {
  T result;
  narrow(value, result);
  return result;
}

// ---- what two values add to a sum: their product, or with `differences` the distance between them

__device__ __forceinline__ float magnitude(float value) { return fabsf(value); }
__device__ __forceinline__ double magnitude(double value) { return fabs(value); }

template <bool differences, typename Accumulator>
__device__ __forceinline__ Accumulator similarity(Accumulator one, Accumulator two) {
  return differences ? magnitude(one - two) : one * two;
}

// Add what `upstream` passes on to `own`: upstream * other, or upstream * sign(own - other). The sign
// of 0 and of NaN is 0, which not even an infinite `upstream` changes.
template <bool differences, typename Accumulator>
__device__ __forceinline__ void add_slope(Accumulator& sum, Accumulator upstream, Accumulator own,
                                          Accumulator other) {
  if constexpr (differences) {
    if (own > other) sum += upstream;
    if (own < other) sum -= upstream;
  } else {
    sum += upstream * other;
  }
}

// ---- index arithmetic

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a < b ? b : a; }

// Split off the fastest index.
template <typename Index>
__device__ __forceinline__ int pop(Index& rest, int size) {
  const int last = static_cast<int>(rest % size);
  rest /= size;
  return last;
}

template <typename Index>
__device__ __forceinline__ bool inside(Index position, Index size) {
  return 0 <= position && position < size;
}

// The index of a pixel on the lattice origin + i * step, i < count; -1 where it is not on it.
__device__ __forceinline__ int lattice_index(int pixel, int origin, int step, int count) {
  const int distance = pixel - origin;
  if (distance < 0 || distance % step) return -1;
  return distance / step < count ? distance / step : -1;
}
