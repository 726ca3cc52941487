// The cells of a position's window: all from the first corner to the last.
//
// Along an axis outputs read some of them. With a spacing of 1 neighbours share their corners.
#pragma once
#include "lookup.cuh"

constexpr int span_y = 2 * reach_y + 2, span_x = 2 * reach_x + 2;

// How many cells so many outputs read.
__host__ __device__ constexpr int reads(int outputs, int spacing) {
  return spacing == 1 ? outputs + 1 : 2 * outputs;
}

constexpr int read_y = reads(outputs_y, spacing_y), read_x = reads(outputs_x, spacing_x);

// How far the cell that is read as number `read` lies behind the first.
__device__ __forceinline__ int offset_of(int read, int spacing) {
  return spacing == 1 ? read : read / 2 * spacing + read % 2;
}

__device__ __forceinline__ int first_row(const Window& w) { return w.y.cell - reach_y; }
__device__ __forceinline__ int first_column(const Window& w) { return w.x.cell - reach_x; }
