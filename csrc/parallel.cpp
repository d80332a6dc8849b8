#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

namespace rocr {
namespace {

// Runs function(data) on a number of threads, as GCC's OpenMP runtime does.
using RunTeam = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

RunTeam find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

}  // namespace

int useful_threads(int threads, std::int64_t multiplications) {
  constexpr std::int64_t worth_a_thread = std::int64_t{1} << 21;
  return static_cast<int>(std::min<std::int64_t>(threads, 1 + multiplications / worth_a_thread));
}

void run_phases(int threads, std::int64_t phases, std::int64_t items,
                const std::function<void(int, std::int64_t, std::int64_t)>& task) {
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};
  const auto work = [&](int worker) {
    for (std::int64_t taken = next++; taken < phases * items; taken = next++) {
      const std::int64_t phase = taken / items;
      while (done.load(std::memory_order_acquire) < phase * items) std::this_thread::yield();
      task(worker, phase, taken % items);
      done.fetch_add(1, std::memory_order_release);
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int worker = 1; worker < threads && worker < items; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The system starts no more threads: the existing ones do the work.
  }
  work(0);
  for (std::thread& other : others) other.join();
}

void run_on_threads_of_torch(int threads, std::int64_t items, const std::function<void(int, std::int64_t)>& task) {
  static const RunTeam run_team = find_openmp();
  threads = static_cast<int>(std::min<std::int64_t>(threads, items));
  if (!run_team || threads < 2)
    return run_phases(threads, 1, items, [&](int worker, std::int64_t, std::int64_t item) { task(worker, item); });
  std::atomic<int> workers{0};
  std::atomic<std::int64_t> next{0};
  const std::function<void()> work = [&] {
    const int worker = workers++;
    for (std::int64_t item = next++; item < items; item = next++) task(worker, item);
  };
  run_team([](void* data) { (*static_cast<const std::function<void()>*>(data))(); },
           const_cast<std::function<void()>*>(&work), static_cast<unsigned>(threads), 0);
}

Buffer::Buffer(std::int64_t count) {
  constexpr std::size_t huge_page = std::size_t{1} << 21;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
  const std::size_t alignment = bytes < huge_page ? 64 : huge_page;
  const std::size_t rounded = (bytes + alignment) / alignment * alignment;
  data_ = static_cast<float*>(std::aligned_alloc(alignment, rounded));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == huge_page) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { std::free(data_); }

}  // namespace rocr
