// CUDA C for a host compiler: what the kernels use of it, and how they are launched.
//
// The threads of a block are fibers of one thread of the processor, blocks run one after another
// (hostcuda.cpp). Between two barriers a fiber runs without interruption, and in which order they
// do is the caller's choice. What no processor would notice is an error here:
//
//   - a barrier that not all threads of a block reach, or at different lines
//   - shared memory that is used before it is written: a block starts with NaN everywhere
//   - asynchronous copies without a wait: the target is NaN until the wait, which makes the copy
//   - copies and vectors that are not aligned, and copies from or to elsewhere
//   - operations of a warp that not all of its lanes reach together
//
// Of banks, caches, registers and time it knows nothing.
#pragma once
#include <math.h>
#include <stddef.h>

#include <utility>

#define CUPYCORR_HOST 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() host_barrier(__FILE__, __LINE__)
#define __syncwarp() host_warp_barrier()
#define __ballot_sync(lanes, vote) host_ballot(vote)
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(host_shared_memory())

struct HostIndex {
  unsigned x, y, z;
};
extern HostIndex threadIdx, blockIdx, blockDim, gridDim;

void* host_shared_memory();
void host_barrier(const char* file, int line);
void host_copy_async(void* to, const void* from, int bytes, bool exists = true);
void host_wait_for_copies();
// Operations of a warp: every lane calls them (fragments as in kernels/matrices.cuh).
void host_warp_barrier();
unsigned host_ballot(bool vote);
void host_load_matrices(unsigned* fragments, int count, const void* row, bool transposed);
void host_multiply_matrices(float* sums, const unsigned* one, const unsigned* two,
                            float (*added)(float sum, unsigned, unsigned));
unsigned host_round_to_tf32(unsigned bits);

inline float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---- launching

// Memory: an argument's value, or an array that arguments point to.
struct HostBytes {
  void* start;
  size_t bytes;
};

struct HostLaunch {
  int blocks, threads, shared_bytes;
  int order;  // of the fibers: 0 ascending, 1 descending, 2 shuffled anew after every barrier
  int argument_count, array_count;
  const HostBytes* arguments;
  const HostBytes* arrays;  // that arguments point to
  int guard_bytes;          // before and behind each array, not to be touched
  int log;                  // of accesses in a trace: 0 none, 1 to arrays, 2 to shared memory, too
};

using HostEntry = void (*)(const HostBytes* arguments);

// Run all blocks; returns what went wrong, or null.
const char* host_launch(HostEntry entry, const HostLaunch& launch, int most_threads,
                        const size_t* argument_bytes, int argument_count);

template <auto kernel, typename... Arguments, size_t... i>
void host_call(void (*)(Arguments...), const HostBytes* arguments, std::index_sequence<i...>) {
  kernel(*static_cast<const Arguments*>(arguments[i].start)...);
}

template <auto kernel, typename... Arguments>
const char* host_launch(void (*)(Arguments...), const HostLaunch& launch, int most_threads) {
  const size_t bytes[] = {sizeof(Arguments)...};
  const HostEntry entry = [](const HostBytes* arguments) {
    host_call<kernel>(kernel, arguments, std::index_sequence_for<Arguments...>());
  };
  return host_launch(entry, launch, most_threads, bytes, sizeof...(Arguments));
}

// Export a kernel as launch_<kernel>; most_threads is what its __launch_bounds__ says.
#define HOST_KERNEL(kernel, most_threads)                                                      \
  extern "C" __attribute__((visibility("default"))) const char* launch_##kernel(               \
      const HostLaunch* launch) {                                                              \
    return host_launch<&kernel>(&kernel, *launch, most_threads);                               \
  }
