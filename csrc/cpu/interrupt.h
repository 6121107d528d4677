#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "errors.h"

namespace oodk {

// Of one call of a long op: lets Ctrl-C end it. poll() is for every thread that works for the call,
// between steps: in the thread that made it, it throws; in the others it is then true, for them to
// end, too, whatever they have.
class Interrupt {
 public:
  bool poll() {
    if (!ended_ && std::this_thread::get_id() == owner_ && clock::now() >= next_) {
      next_ = clock::now() + kEvery;
      try {
        check_signals();
      } catch (...) {
        ended_ = true;
        throw;
      }
    }
    return ended_;
  }

 private:
  using clock = std::chrono::steady_clock;
  // Nobody notices; another Python thread that is at work gives the GIL away after 5 ms only.
  static constexpr std::chrono::milliseconds kEvery{100};
  const std::thread::id owner_ = std::this_thread::get_id();
  clock::time_point next_ = clock::now() + kEvery;
  std::atomic<bool> ended_ = false;
};

} // namespace oodk
