// Threads and memory for one call. Nothing outlives the call, so a process may fork between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace rocr {

inline std::int64_t divide_up(std::int64_t dividend, std::int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// The number of threads, at most `threads`, for which the work outweighs the cost of starting them.
int useful_threads(int threads, std::int64_t multiplications);

// Runs task(worker, phase, item) once for every item of every phase, on at most `threads` threads. A phase
// begins when all items of the previous phase are done. The calling thread is worker 0. The task must not
// throw.
void run_phases(int threads, std::int64_t phases, std::int64_t items,
                const std::function<void(int worker, std::int64_t phase, std::int64_t item)>& task);

// As run_phases with one phase, on the threads of torch's OpenMP runtime where that is loaded: they spin for milliseconds
// after each of torch's operations, and other threads would have to share the cores with them. As torch's own
// operations, it may not be called in a child that was forked after a call.
void run_on_threads_of_torch(int threads, std::int64_t items,
                             const std::function<void(int worker, std::int64_t item)>& task);

// Uninitialized floats that start at a cache line, on huge pages where the system has them.
class Buffer {
 public:
  explicit Buffer(std::int64_t count);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace rocr
