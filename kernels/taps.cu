// The sum over the taps, and its adjoint, for kernel_size > 1.
//
//   taps_sum     cost[e, y, x]   = scale * sum over i, j of volume[e, y * stride + i * dilation,
//                                                                    x * stride + j * dilation]
//   taps_spread  volume[e, u, v] = sum of grad_cost[e, y, x] over the i, j, y, x with
//                                  y * stride + i * dilation = u and x * stride + j * dilation = v
//
// e counts samples and displacements, (y, x) output positions, (u, v) lattice positions; stride and
// dilation are in lattice steps. The volume holds accumulators: a sum is rounded once, at its end.
// A thread owns one element of the result; threads along x are neighbours. Launch: any number of
// blocks of `threads` threads that covers the result.

#ifndef CUPYCORR_CONSTANTS
using element = float;      // of cost
using accumulator = float;  // of volume
using offset = long long;   // of arrays; int while both have fewer than 2^31 elements
constexpr int threads = 256;
constexpr int kernel_y = 3, kernel_x = 3;
constexpr int stride_y = 1, stride_x = 1;
constexpr int dilation_y = 1, dilation_x = 1;
#endif

#include "device.cuh"

struct Sizes {
  int samples, displacements;
  int cost_height, cost_width;
  int lattice_height, lattice_width;
};

extern "C" __global__ void __launch_bounds__(threads, 1) taps_sum(
    const accumulator* __restrict__ volume, element* __restrict__ cost, const Sizes s,
    const accumulator scale) {
  const offset output = static_cast<offset>(blockIdx.x) * threads + threadIdx.x;
  offset e = output;
  const int x = pop(e, s.cost_width), y = pop(e, s.cost_height);
  if (e >= static_cast<offset>(s.samples) * s.displacements) return;

  const offset first = (e * s.lattice_height + y * stride_y) * s.lattice_width + x * stride_x;
  accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kernel_y; ++i) {
#pragma unroll
    for (int j = 0; j < kernel_x; ++j) {
      sum += volume[first + static_cast<offset>(i * dilation_y) * s.lattice_width + j * dilation_x];
    }
  }
  cost[output] = narrow<element>(sum * scale);
}

extern "C" __global__ void __launch_bounds__(threads, 1) taps_spread(
    const element* __restrict__ grad_cost, accumulator* __restrict__ volume, const Sizes s,
    const accumulator scale) {
  const offset output = static_cast<offset>(blockIdx.x) * threads + threadIdx.x;
  offset e = output;
  const int v = pop(e, s.lattice_width), u = pop(e, s.lattice_height);
  if (e >= static_cast<offset>(s.samples) * s.displacements) return;

  accumulator sum = 0;
#pragma unroll
  for (int i = 0; i < kernel_y; ++i) {
    const int y = lattice_index(u, i * dilation_y, stride_y, s.cost_height);
    if (y < 0) continue;
#pragma unroll
    for (int j = 0; j < kernel_x; ++j) {
      const int x = lattice_index(v, j * dilation_x, stride_x, s.cost_width);
      if (x >= 0) sum += widen(grad_cost[(e * s.cost_height + y) * s.cost_width + x]);
    }
  }
  volume[output] = sum * scale;
}
