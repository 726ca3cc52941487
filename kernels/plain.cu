// The cost volume and its gradients, one output per thread: every geometry, any size.
//
//   cost[n, p, q, y, x]    = sum over c, i, j of fmap1[n, c, Y, X] * fmap2[n, c, Y + dy, X + dx]
//   grad_fmap1[n, c, Y, X] = sum over p, q, i, j of
//                                    grad_cost[n, p, q, y, x] * fmap2[n, c, Y + dy, X + dx]
//   grad_fmap2[n, c, Y, X] = sum over p, q, i, j of
//                                    grad_cost[n, p, q, y, x] * fmap1[n, c, Y - dy, X - dx]
//
//   Y = y * stride - padding + i * dilation                                  (X likewise)
//   dy = first_displacement + p * dilation_patch                             (dx likewise)
//
// A term is left out where a position lies outside its map. With `l1` maps are 0 outside, and a
// term is left out where both positions lie outside:
//
//   cost[n, p, q, y, x]    = sum over c, i, j of |fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx]|
//   grad_fmap1[n, c, Y, X] = sum over p, q, i, j of grad_cost[n, p, q, y, x] * s,
//                            s = sign(fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx])
//   grad_fmap2[n, c, Y, X] = sum over p, q, i, j of grad_cost[n, p, q, y, x] * s,
//                            s = sign(fmap2[n, c, Y, X] - fmap1[n, c, Y - dy, X - dx])
//   tangent[n, p, q, y, x] = sum over c, i, j of
//                                    (tangent1[n, c, Y, X] - tangent2[n, c, Y + dy, X + dx]) * s,
//                            s = sign(fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx])
//
// All arrays are contiguous, in the order of their indices above. A thread owns one output and
// gathers all its terms. Threads along x are neighbours: a warp reads and writes full lines.
// Launch: any number of blocks of `threads` threads that covers the outputs.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of all arrays
using accumulator = float;  // of sums
using offset = long long;   // of arrays; int while all of them have fewer than 2^31 elements
constexpr bool l1 = false;  // sum absolute differences
constexpr int threads = 256;
#endif

#include "device.cuh"

struct Sizes {
  int samples, channels, height, width;
  int cost_height, cost_width;
  int kernel_y, kernel_x, patch_y, patch_x, stride_y, stride_x, padding_y, padding_x;
  int dilation_y, dilation_x, spacing_y, spacing_x;  // spacing: dilation_patch
  int first_y, first_x;                              // first_displacement
};

__device__ __forceinline__ offset row_of_map(const Sizes& s, int n, int c, int y) {
  return ((static_cast<offset>(n) * s.channels + c) * s.height + y) * s.width;
}

__device__ __forceinline__ offset row_of_cost(const Sizes& s, int n, int p, int q, int y) {
  const offset displacement = (static_cast<offset>(n) * s.patch_y + p) * s.patch_x + q;
  return (displacement * s.cost_height + y) * s.cost_width;
}

// What a map holds; 0 outside.
__device__ __forceinline__ accumulator value(const element* map, offset at, bool exists) {
  return exists ? widen(map[at]) : accumulator(0);
}

// Compute one output of the cost volume's shape. For every term call
// add(sum, offset1, exists1, offset2, exists2): where its positions lie in the maps, and whether
// they exist.
template <typename Add>
__device__ __forceinline__ void gather(element* __restrict__ cost, const Sizes& s,
                                       const accumulator scale, Add add) {
  const offset output = static_cast<offset>(blockIdx.x) * threads + threadIdx.x;
  offset rest = output;
  const int x = pop(rest, s.cost_width), y = pop(rest, s.cost_height);
  const int q = pop(rest, s.patch_x), p = pop(rest, s.patch_y);
  if (rest >= s.samples) return;
  const int n = static_cast<int>(rest);
  const int dy = s.first_y + p * s.spacing_y, dx = s.first_x + q * s.spacing_x;
  const offset plane = static_cast<offset>(s.height) * s.width;

  accumulator sum = 0;
  for (int i = 0; i < s.kernel_y; ++i) {
    const int y1 = y * s.stride_y - s.padding_y + i * s.dilation_y, y2 = y1 + dy;
    const bool row1 = inside(y1, s.height), row2 = inside(y2, s.height);
    if (l1 ? !row1 && !row2 : !row1 || !row2) continue;
    for (int j = 0; j < s.kernel_x; ++j) {
      const int x1 = x * s.stride_x - s.padding_x + j * s.dilation_x, x2 = x1 + dx;
      const bool exists1 = row1 && inside(x1, s.width), exists2 = row2 && inside(x2, s.width);
      if (l1 ? !exists1 && !exists2 : !exists1 || !exists2) continue;
      offset one = exists1 ? row_of_map(s, n, 0, y1) + x1 : 0;
      offset two = exists2 ? row_of_map(s, n, 0, y2) + x2 : 0;
      for (int c = 0; c < s.channels; ++c, one += plane, two += plane) {
        add(sum, one, exists1, two, exists2);
      }
    }
  }
  cost[output] = narrow<element>(sum * scale);
}

extern "C" __global__ void __launch_bounds__(threads, 1) plain_cost(
    const element* __restrict__ fmap1, const element* __restrict__ fmap2,
    element* __restrict__ cost, const Sizes s, const accumulator scale) {
  gather(cost, s, scale,
         [&](accumulator& sum, offset one, bool exists1, offset two, bool exists2) {
           sum += similarity<l1>(value(fmap1, one, exists1), value(fmap2, two, exists2));
         });
}

// The change of an l1 cost with tangents of the maps. (That of products is a sum of two costs.)
extern "C" __global__ void __launch_bounds__(threads, 1) plain_tangent(
    const element* __restrict__ fmap1, const element* __restrict__ fmap2,
    const element* __restrict__ tangent1, const element* __restrict__ tangent2,
    element* __restrict__ tangent, const Sizes s, const accumulator scale) {
  gather(tangent, s, scale,
         [&](accumulator& sum, offset one, bool exists1, offset two, bool exists2) {
           const accumulator along =
               value(tangent1, one, exists1) - value(tangent2, two, exists2);
           add_slope<true>(sum, along, value(fmap1, one, exists1), value(fmap2, two, exists2));
         });
}

// The gradient of the map number `which`.
template <int which>
__device__ __forceinline__ void gradient(const element* __restrict__ grad_cost,
                                         const element* __restrict__ fmap1,
                                         const element* __restrict__ fmap2,
                                         element* __restrict__ grad_fmap, const Sizes& s,
                                         const accumulator scale) {
  const element* const own = which == 1 ? fmap1 : fmap2;
  const element* const other = which == 1 ? fmap2 : fmap1;
  const offset output = static_cast<offset>(blockIdx.x) * threads + threadIdx.x;
  offset rest = output;
  const int x = pop(rest, s.width), y = pop(rest, s.height), c = pop(rest, s.channels);
  if (rest >= s.samples) return;
  const int n = static_cast<int>(rest);

  const accumulator here = l1 ? widen(own[output]) : accumulator(0);
  accumulator sum = 0;
  for (int p = 0; p < s.patch_y; ++p) {
    const int dy = s.first_y + p * s.spacing_y, other_y = which == 1 ? y + dy : y - dy;
    if (!l1 && !inside(other_y, s.height)) continue;
    for (int q = 0; q < s.patch_x; ++q) {
      const int dx = s.first_x + q * s.spacing_x, other_x = which == 1 ? x + dx : x - dx;
      const bool exists = inside(other_y, s.height) && inside(other_x, s.width);
      if (!l1 && !exists) continue;
      const int y1 = which == 1 ? y : other_y, x1 = which == 1 ? x : other_x;
      accumulator upstream = 0;  // of all outputs that compare this pair of positions
      bool compared = false;
      for (int i = 0; i < s.kernel_y; ++i) {
        const int oy = lattice_index(y1, i * s.dilation_y - s.padding_y, s.stride_y, s.cost_height);
        if (oy < 0) continue;
        for (int j = 0; j < s.kernel_x; ++j) {
          const int ox =
              lattice_index(x1, j * s.dilation_x - s.padding_x, s.stride_x, s.cost_width);
          if (ox < 0) continue;
          upstream += widen(grad_cost[row_of_cost(s, n, p, q, oy) + ox]);
          compared = true;
        }
      }
      if (!compared) continue;
      const offset at = exists ? row_of_map(s, n, c, other_y) + other_x : 0;
      add_slope<l1>(sum, upstream, here, value(other, at, exists));
    }
  }
  grad_fmap[output] = narrow<element>(sum * scale);
}

extern "C" __global__ void __launch_bounds__(threads, 1) plain_grad_fmap1(
    const element* __restrict__ grad_cost, const element* __restrict__ fmap1,
    const element* __restrict__ fmap2, element* __restrict__ grad_fmap1, const Sizes s,
    const accumulator scale) {
  gradient<1>(grad_cost, fmap1, fmap2, grad_fmap1, s, scale);
}

extern "C" __global__ void __launch_bounds__(threads, 1) plain_grad_fmap2(
    const element* __restrict__ grad_cost, const element* __restrict__ fmap1,
    const element* __restrict__ fmap2, element* __restrict__ grad_fmap2, const Sizes s,
    const accumulator scale) {
  gradient<2>(grad_cost, fmap1, fmap2, grad_fmap2, s, scale);
}
