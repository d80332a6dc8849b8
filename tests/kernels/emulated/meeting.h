// Threads that wait for each other.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

// Each call of meet() waits until all threads have called it.
class Meeting {
 public:
  explicit Meeting(int count = 32) : count_(count) {}
  void meet() {
    std::unique_lock lock(mutex_);
    const std::uint64_t round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      done_.notify_all();
    } else {
      done_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  const int count_;
  int arrived_ = 0;
  std::uint64_t round_ = 0;
};
