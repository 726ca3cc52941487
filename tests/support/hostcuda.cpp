// Blocks of threads as fibers: what hostcuda.h declares.
//
// With HOST_TRACE the kernel's object is compiled with -fsanitize=thread, which calls a function
// before every access to memory. These functions replace the sanitizer's own: they find
// data races in shared memory (two threads use a word between the same two barriers, of the block
// or of their warp, and one writes it), whatever the order of the threads, and keep a record of
// accesses to be counted.
#include "hostcuda.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

HostIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_bytes = 256 << 10;
constexpr size_t guard_bytes = 0;  // the sanitizer watches the end of every allocation
#else
constexpr size_t stack_bytes = 64 << 10;
constexpr size_t guard_bytes = 256;  // behind shared memory
#endif
constexpr unsigned char poison = 0xff;  // NaN in every type
constexpr int most_threads_of_any_block = 1024;

constexpr int lanes_of_warp = 32;

struct Copy {
  char* to;
  const void* from;  // null: zeros
  int bytes;
};

// What a lane shows to the others of its warp.
struct Shown {
  const char* row;
  unsigned one[4], two[2];
};

#ifdef __x86_64__
using Context = void*;  // stack pointer, with the registers that a callee saves on the stack
#else
using Context = ucontext_t;
#endif

struct Fiber {
  Context context;
  bool ended;
  const char* file;  // where it waits
  int line;
  std::vector<Copy> copies;  // queued
  bool waits_for_warp;       // not for the block
  Shown shown[2];            // in this operation of the warp, and in the one before it
  int operations;            // of the warp, so far
  int warp_barriers;         // among them
};

std::vector<Fiber> fibers;
Fiber* current;  // null while the scheduler runs
Context scheduler;
HostEntry entry;
const HostLaunch* launched;
char* stacks;
char* shared;
size_t shared_bytes;
char message[512];

// ---- fibers

#ifdef __x86_64__
// Push the registers that a callee saves, leave the stack pointer at *from, continue at `to`.
extern "C" void host_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden host_switch
.globl host_switch
.type host_switch, @function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch, .-host_switch
)");

void begin(Context& context, char* stack, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes);
  *--top = nullptr;  // the function's return address: it does not return
  *--top = reinterpret_cast<void*>(function);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
void resume(Context& context) { host_switch(&scheduler, context); }
void suspend(Context& context) { host_switch(&context, scheduler); }
#else
void begin(Context& context, char* stack, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}
void resume(Context& context) { swapcontext(&scheduler, &context); }
void suspend(Context& context) { swapcontext(&context, &scheduler); }
#endif

// Keep the first error's message. A fiber that fails is not resumed: the launch ends.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  if (!*message) {
    va_list values;
    va_start(values, format);
    const int length = vsnprintf(message, sizeof message, format, values);
    va_end(values);
    if (length >= 0 && length < static_cast<int>(sizeof message)) {
      snprintf(message + length, sizeof message - length, " (block %u, thread %u)", blockIdx.x,
               threadIdx.x);
    }
  }
  if (current) suspend(current->context);
}

bool within(const char* at, size_t bytes, const char* start, size_t size) {
  return at >= start && at + bytes <= start + size;
}

bool within_an_array(const char* at, size_t bytes) {
  for (int i = 0; i < launched->array_count; ++i) {
    const HostBytes& range = launched->arrays[i];
    if (within(at, bytes, static_cast<const char*>(range.start), range.bytes)) return true;
  }
  return false;
}

void run_thread() {
  entry(launched->arguments);
  if (!current->copies.empty()) fail("a thread ends with copies that it never waited for");
  current->ended = true;
  suspend(current->context);
}

// ---- traces

struct Access {
  int64_t offset;  // bytes from the start of the array
  int32_t block, round;
  int16_t thread, array;  // -1: shared memory
  int16_t bytes, written;
};

struct Use {  // of a word of shared memory: by its last user's warp since a barrier of that warp
  int round, thread, warp_barriers;
  bool several, written;
  bool by_warps, written_before;  // since a barrier of the block: by several warps, by any thread
};

int round_number;
#ifdef HOST_TRACE
std::vector<Access> accesses;
std::vector<Use> uses;

void use_word(size_t word, bool writes) {
  Use& use = uses[word];
  const int thread = static_cast<int>(threadIdx.x), barriers = current->warp_barriers;
  if (use.round != round_number) {
    use = {round_number, thread, barriers, false, writes, false, writes};
    return;
  }
  const bool of_warp = thread / lanes_of_warp == use.thread / lanes_of_warp;
  const bool together = of_warp && barriers == use.warp_barriers;
  const bool other = thread != use.thread;
  if (use.by_warps ? writes : !of_warp ? writes || use.written_before
                            : together && ((other && (writes || use.written)) ||
                                           (use.several && writes))) {
    fail("data race: threads %d and %d use word %zu of shared memory between two barriers",
         use.thread, thread, word);
  }
  use.several = together && (use.several || other);
  use.written = writes || (together && use.written);
  use.by_warps |= !of_warp;
  use.written_before |= writes;
  use.thread = thread;
  use.warp_barriers = barriers;
}

void trace(const void* address, size_t bytes, bool writes) {
  if (!current) return;
  const char* const at = static_cast<const char*>(address);
  int array = -2;
  size_t offset = at - shared;
  if (within(at, 1, shared, shared_bytes)) {
    array = -1;
    for (size_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) use_word(word, writes);
  }
  for (int i = 0; i < launched->array_count && array == -2; ++i) {
    const HostBytes& range = launched->arrays[i];
    const char* const start = static_cast<const char*>(range.start);
    offset = at - start;
    if (within(at, bytes, start, range.bytes)) {
      array = i;
    } else if (within(at, bytes, start - launched->guard_bytes,
                      range.bytes + 2 * launched->guard_bytes)) {
      fail("an access beside array %d, at byte %td of %zu", i, at - start, range.bytes);
    }
  }
  if (array == -2 || launched->log < (array == -1 ? 2 : 1)) return;
  accesses.push_back({static_cast<int64_t>(offset), static_cast<int32_t>(blockIdx.x), round_number,
                      static_cast<int16_t>(threadIdx.x), static_cast<int16_t>(array),
                      static_cast<int16_t>(bytes), writes});
}
#else
void trace(const void*, size_t, bool) {}
#endif

// ---- blocks

bool run_until_it_waits(int thread) {
  current = &fibers[thread];
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  resume(current->context);
  current = nullptr;
  return !*message;
}

// Resume the lanes of a warp together as long as all of them wait for each other.
bool run_warp(const std::vector<int>& lanes) {
  const auto waits = [](int thread) { return fibers[thread].waits_for_warp; };
  while (lanes.size() == lanes_of_warp && std::all_of(lanes.begin(), lanes.end(), waits)) {
    const Fiber& first = fibers[lanes[0]];
    for (const int thread : lanes) {
      threadIdx.x = thread;
      if (fibers[thread].file != first.file || fibers[thread].line != first.line) {
        fail("lanes of a warp meet in %s and %s", first.file, fibers[thread].file);
        return false;
      }
    }
    for (const int thread : lanes) fibers[thread].waits_for_warp = false;
    for (const int thread : lanes) {
      if (!run_until_it_waits(thread)) return false;
    }
  }
  return true;
}

bool run_round(const std::vector<int>& sequence) {
  std::vector<std::vector<int>> warps(sequence.size() / lanes_of_warp + 1);
  for (const int thread : sequence) warps[thread / lanes_of_warp].push_back(thread);
  for (const int thread : sequence) {
    if (!run_until_it_waits(thread) || !run_warp(warps[thread / lanes_of_warp])) return false;
  }
  for (const int thread : sequence) {
    threadIdx.x = thread;
    if (!fibers[thread].waits_for_warp) continue;
    fail("not all lanes of a warp reach %s", fibers[thread].file);
    return false;
  }
  return true;
}

// Show something to the lanes of this warp; returns its first lane when all have done so. What is
// shown lasts until the operation after the next, which no lane reaches before all have read it.
const Fiber* show(const char* operation, const Shown& shown) {
  current->shown[current->operations % 2] = shown;
  current->file = operation;
  current->line = ++current->operations;
  current->waits_for_warp = true;
  suspend(current->context);
  return &fibers[threadIdx.x / lanes_of_warp * lanes_of_warp];
}

void run_block(const HostLaunch& launch, uint32_t& random) {
  memset(shared, poison, shared_bytes + guard_bytes);
  std::vector<int> sequence(launch.threads);
  for (int i = 0; i < launch.threads; ++i) {
    sequence[i] = launch.order == 1 ? launch.threads - 1 - i : i;
    fibers[i].ended = false;
    fibers[i].copies.clear();
    fibers[i].waits_for_warp = false;
    fibers[i].operations = fibers[i].warp_barriers = 0;
    begin(fibers[i].context, stacks + i * stack_bytes, run_thread);
  }
  for (;;) {
    for (int i = launch.threads - 1; launch.order == 2 && i > 0; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(sequence[i], sequence[(random >> 8) % (i + 1)]);
    }
    ++round_number;
    if (!run_round(sequence)) return;
    const Fiber& first = fibers[0];
    for (int i = 1; i < launch.threads; ++i) {
      const Fiber& other = fibers[i];
      threadIdx.x = i;
      if (other.ended != first.ended) {
        const Fiber& waits = first.ended ? other : first;
        return fail("a thread ended, others wait at %s:%d", waits.file, waits.line);
      }
      if (!first.ended && (other.line != first.line || strcmp(other.file, first.file))) {
        return fail("threads wait at different barriers, %s:%d and %s:%d", first.file, first.line,
                    other.file, other.line);
      }
    }
    if (first.ended) break;
  }
  for (size_t i = 0; i < guard_bytes; ++i) {
    if (static_cast<unsigned char>(shared[shared_bytes + i]) != poison) {
      return fail("a write behind shared memory, at byte %zu of %zu", shared_bytes + i,
                  shared_bytes);
    }
  }
}

}  // namespace

void* host_shared_memory() { return shared; }

void host_barrier(const char* file, int line) {
  current->file = file;
  current->line = line;
  suspend(current->context);
}

void host_warp_barrier() {
  show("a barrier of a warp", {nullptr, {}, {}});
  ++current->warp_barriers;
}

unsigned host_ballot(bool vote) {
  const int which = current->operations % 2;
  const Fiber* const lanes = show("a vote", {nullptr, {vote}, {}});
  unsigned votes = 0;
  for (int i = 0; i < lanes_of_warp; ++i) votes |= lanes[i].shown[which].one[0] << i;
  return votes;
}

void host_copy_async(void* to, const void* from, int bytes, bool exists) {
  char* const target = static_cast<char*>(to);
  const size_t offset = target - shared;
  if (bytes != 4 && bytes != 8 && bytes != 16) return fail("a copy of %d bytes", bytes);
  if (!exists) from = nullptr;
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    return fail("a copy of %d bytes from %p to %p, which is not aligned", bytes, from, to);
  }
  if (!within(target, bytes, shared, shared_bytes)) {
    return fail("a copy to byte %zu of %zu of shared memory", offset, shared_bytes);
  }
  if (exists && !within_an_array(static_cast<const char*>(from), bytes)) {
    return fail("a copy from %p, which is in no array", from);
  }
  if (exists) trace(from, bytes, false);
  trace(to, bytes, true);
  memset(target, poison, bytes);
  current->copies.push_back({target, from, bytes});
}

void host_wait_for_copies() {
  for (const Copy& copy : current->copies) {
    for (int i = 0; i < copy.bytes; ++i) {
      if (static_cast<unsigned char>(copy.to[i]) != poison) {
        return fail("a write to shared memory where a copy is on its way");
      }
    }
    if (copy.from) {
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      memset(copy.to, 0, copy.bytes);
    }
  }
  current->copies.clear();
}

void host_load_matrices(unsigned* fragments, int count, const void* row, bool transposed) {
  constexpr int rows = 8, row_bytes = 16;
  const int lane = threadIdx.x % lanes_of_warp;
  const char* const at = static_cast<const char*>(row);
  if (lane < rows * count) {
    if (reinterpret_cast<uintptr_t>(row) % row_bytes) return fail("a row that is not aligned");
    if (!within(at, row_bytes, shared, shared_bytes)) {
      return fail("a row at byte %td of %zu of shared memory", at - shared, shared_bytes);
    }
    trace(row, row_bytes, false);
  }
  const int which = current->operations % 2;
  const Fiber* const lanes = show("a load of matrices", {at, {}, {}});
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < 2; ++k) {
      const int down = lane / 4, across = lane % 4 * 2 + k, of_row = transposed ? across : down;
      memcpy(reinterpret_cast<char*>(&fragments[i]) + 2 * k,
             lanes[rows * i + of_row].shown[which].row + 2 * (transposed ? down : across), 2);
    }
  }
}

void host_multiply_matrices(float* sums, const unsigned* one, const unsigned* two,
                            float (*added)(float sum, unsigned, unsigned)) {
  const int lane = threadIdx.x % lanes_of_warp, which = current->operations % 2;
  const Fiber* const lanes =
      show("a product of matrices", {nullptr, {one[0], one[1], one[2], one[3]}, {two[0], two[1]}});
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 8; ++word) {
      const Shown& a = lanes[row % 8 * 4 + word % 4].shown[which];
      const Shown& b = lanes[column * 4 + word % 4].shown[which];
      sums[i] = added(sums[i], a.one[row / 8 + word / 4 * 2], b.two[word / 4]);
    }
  }
}

unsigned host_round_to_tf32(unsigned bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

const char* host_launch(HostEntry function, const HostLaunch& launch, int most_threads,
                        const size_t* argument_bytes, int argument_count) {
  *message = 0;
  current = nullptr;
  threadIdx = blockIdx = {0, 0, 0};
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  gridDim = {static_cast<unsigned>(launch.blocks), 1, 1};
  if (most_threads > most_threads_of_any_block) most_threads = most_threads_of_any_block;
  if (launch.threads < 1 || launch.threads > most_threads) {
    fail("%d threads, of a kernel for up to %d", launch.threads, most_threads);
    return message;
  }
  if (launch.argument_count != argument_count) {
    fail("%d arguments, of a kernel that takes %d", launch.argument_count, argument_count);
    return message;
  }
  for (int i = 0; i < argument_count; ++i) {
    if (launch.arguments[i].bytes == argument_bytes[i]) continue;
    fail("argument %d has %zu bytes instead of %zu", i, launch.arguments[i].bytes,
         argument_bytes[i]);
    return message;
  }

  entry = function;
  launched = &launch;
  shared_bytes = launch.shared_bytes;
  const size_t shared_total = shared_bytes + guard_bytes;
  shared = static_cast<char*>(malloc(shared_total ? shared_total : 1));
  stacks = static_cast<char*>(aligned_alloc(4096, launch.threads * stack_bytes));
  fibers.assign(launch.threads, Fiber());
#ifdef HOST_TRACE
  accesses.clear();
  uses.assign(shared_bytes / 4 + 4, Use());
#endif
  uint32_t random = 1;
  for (int block = 0; block < launch.blocks && !*message; ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    threadIdx.x = 0;
    run_block(launch, random);
  }
  free(shared);
  free(stacks);
  current = nullptr;
  return *message ? message : nullptr;
}

// ---- called by what compilers insert

// -fsanitize=undefined: all that it finds, with where that was written.
struct Source {
  const char* file;
  uint32_t line, column;
};
#define HOST_UNDEFINED(name, what)                                          \
  extern "C" void __ubsan_handle_##name(const Source* at, uintptr_t value) { \
    fail("%s (%#zx) at %s:%u", what, value, at->file, at->line);            \
  }
HOST_UNDEFINED(type_mismatch_v1, "an access that is not aligned")
HOST_UNDEFINED(add_overflow, "overflow of a sum")
HOST_UNDEFINED(sub_overflow, "overflow of a difference")
HOST_UNDEFINED(mul_overflow, "overflow of a product")
HOST_UNDEFINED(negate_overflow, "overflow of a negation")
HOST_UNDEFINED(divrem_overflow, "division by zero, or its overflow")
HOST_UNDEFINED(shift_out_of_bounds, "a shift out of bounds")
HOST_UNDEFINED(out_of_bounds, "an index out of bounds")
HOST_UNDEFINED(pointer_overflow, "overflow of a pointer")
HOST_UNDEFINED(load_invalid_value, "a value that its type does not have")

#ifdef HOST_TRACE
extern "C" __attribute__((visibility("default"))) const void* traced_accesses(int64_t* count) {
  *count = static_cast<int64_t>(accesses.size());
  return accesses.data();
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* at, size_t bytes) { trace(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { trace(at, bytes, true); }
#define HOST_TRACED(bytes)                                                  \
  void __tsan_read##bytes(void* at) { trace(at, bytes, false); }            \
  void __tsan_write##bytes(void* at) { trace(at, bytes, true); }            \
  void __tsan_unaligned_read##bytes(void* at) { trace(at, bytes, false); }  \
  void __tsan_unaligned_write##bytes(void* at) { trace(at, bytes, true); }
HOST_TRACED(1)
HOST_TRACED(2)
HOST_TRACED(4)
HOST_TRACED(8)
HOST_TRACED(16)
}
#endif
