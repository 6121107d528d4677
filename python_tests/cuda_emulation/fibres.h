// Blocks of CUDA threads as fibres of one system thread.
//
// A fibre runs until it has to wait for others (a barrier, a shuffle, a vote), or pauses at an
// atomic, so that what lies between two such points happens in one order of the threads out of many.
// The order is drawn from a seed: a kernel that lacks a barrier gives different results for
// different seeds.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#define __sanitizer_start_switch_fiber(fake, stack, bytes) ((void)(fake))
#define __sanitizer_finish_switch_fiber(fake, stack, bytes) ((void)(fake))
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

constexpr int kWarp = 32;

// Not filled with zeros, so that only what a fibre uses of it takes memory.
class Stack {
 public:
  char* data() const {
    return memory_.get();
  }
  static constexpr size_t size() {
    return 64 << 10;
  }

 private:
  std::unique_ptr<char[]> memory_ = std::make_unique_for_overwrite<char[]>(size());
};

// Where a fibre goes on. swapcontext asks the kernel for the signal mask and clears what
// AddressSanitizer knows of the stack, each time: it would take most of a run.
#if defined(__x86_64__)
struct Context {
  void* stack = nullptr; // the registers that a call preserves, then where to return to

  void start(Stack& memory, void (*function)()) {
    void** top = reinterpret_cast<void**>(
        reinterpret_cast<uintptr_t>(memory.data() + memory.size()) & ~uintptr_t(15));
    *--top = nullptr; // function's caller
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i)
      *--top = nullptr;
    stack = top;
  }
};

asm(R"(
  .text
  .p2align 4
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulation_switch_stack(void** from, void** to);

inline void go_on(Context& from, Context& to) {
  emulation_switch_stack(&from.stack, &to.stack);
}
#else
struct Context {
  ucontext_t context;

  void start(Stack& memory, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory.data();
    context.uc_stack.ss_size = memory.size();
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
};

inline void go_on(Context& from, Context& to) {
  swapcontext(&from.context, &to.context);
}
#endif

// What a thread waits at, and what it brings there.
struct Meeting {
  const char* name = nullptr; // nullptr: it is not waiting
  unsigned mask = 0; // lanes that take part; 0: the whole block
  uint64_t value = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int batch;
};

struct Thread {
  int id = 0; // in its block
  bool done = false;
  Meeting meeting;
  std::array<uint64_t, kWarp> met{}; // what the lanes of the warp brought
  int trues = 0; // threads of the block that brought a value other than 0
  std::vector<Copy> copies; // under way
  int batch = 0; // of copies

  Context context;
  void* fake_stack = nullptr;
  Stack stack;
};

inline Thread* current = nullptr;

class Block {
 public:
  // Sets out to run body() in every thread.
  void begin(int threads, const std::function<void()>& body) {
    body_ = &body;
    threads_.resize(size_t(threads));
    order_.clear();
    for (int i = 0; i < threads; ++i) {
      prepare(threads_[size_t(i)], i);
      order_.push_back(&threads_[size_t(i)]);
    }
  }

  // Every thread that can goes on until it has to wait, in the order of their ids if `shuffled` is
  // false. False: all have ended.
  bool step(std::mt19937& random, bool shuffled) {
    if (shuffled)
      std::shuffle(order_.begin(), order_.end(), random);
    for (Thread* t : order_)
      if (!t->done && !t->meeting.name)
        resume(*t);
    return release();
  }

  // Called in a thread: lets others, also of other blocks, go on for a while.
  static void pause() {
    leave(&current->fake_stack);
  }

  // Called in a thread: waits until all that take part are there.
  static void meet(const char* name, unsigned mask, uint64_t value) {
    current->meeting = {name, mask, value};
    leave(&current->fake_stack);
  }

 private:
  static void prepare(Thread& t, int id) {
    ASAN_UNPOISON_MEMORY_REGION(t.stack.data(), t.stack.size());
    t.id = id;
    t.done = false;
    t.meeting = {};
    t.copies.clear();
    t.context.start(t.stack, &Block::enter);
  }

  static void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
    (*body_)();
    current->done = true;
    leave(nullptr); // for good
  }

  static void resume(Thread& t) {
    void* fake_stack = nullptr;
    current = &t;
    __sanitizer_start_switch_fiber(&fake_stack, t.stack.data(), t.stack.size());
    go_on(scheduler_, t.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  static void leave(void** fake_stack) {
    __sanitizer_start_switch_fiber(fake_stack, scheduler_stack_, scheduler_bytes_);
    go_on(current->context, scheduler_);
    __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack_, &scheduler_bytes_);
  }

  // Lets those go on who have all met. False: every thread has ended.
  bool release() {
    bool progress = false;
    for (size_t i = 0; i < threads_.size(); ++i)
      if (threads_[i].meeting.name && threads_[i].meeting.mask)
        progress |= release_lanes(i / kWarp * kWarp, threads_[i].meeting);
    for (const Thread& t : threads_)
      progress |= !t.done && !t.meeting.name; // has paused
    return progress || release_block();
  }

  bool release_lanes(size_t first, const Meeting meeting) {
    const auto lane = [&](int i) -> Thread* {
      return meeting.mask >> i & 1 ? &threads_.at(first + size_t(i)) : nullptr;
    };
    std::array<uint64_t, kWarp> met;
    met.fill(~uint64_t(0));
    for (int i = 0; i < kWarp; ++i)
      if (const Thread* t = lane(i)) {
        if (t->meeting.name != meeting.name || t->meeting.mask != meeting.mask)
          return false;
        met[size_t(i)] = t->meeting.value;
      }
    for (int i = 0; i < kWarp; ++i)
      if (Thread* t = lane(i)) {
        t->met = met;
        t->meeting = {};
      }
    return true;
  }

  bool release_block() {
    size_t there = 0, ended = 0;
    int trues = 0;
    const char* const name = threads_[0].meeting.name;
    for (const Thread& t : threads_) {
      ended += t.done;
      there += !t.done && !t.meeting.mask && t.meeting.name == name;
      trues += t.meeting.value != 0;
    }
    if (ended == threads_.size())
      return false;
    if (there < threads_.size())
      throw std::runtime_error("deadlock: " + std::to_string(there) + " of " +
          std::to_string(threads_.size()) + " threads at the same barrier, " +
          std::to_string(ended) + " ended");
    for (Thread& t : threads_) {
      t.trues = trues;
      t.meeting = {};
    }
    return true;
  }

  static inline Context scheduler_;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_bytes_ = 0;
  static inline const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Thread*> order_;
};

} // namespace emulation
