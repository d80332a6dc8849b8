// The functions of csrc/cuda_sm90.cuh on threads of the CPU, so that the code of the kernel runs without a GPU. Another
// thread makes the copies, late and in any order, and barriers report violations of their rules.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "meeting.h"

struct CUtensorMap {
  const std::uint16_t* keys;
  std::int64_t tokens, width, stride;
};

namespace rocr::sm90 {

using std::min;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

class Barrier {
 public:
  void init(int arrivals) { count_ = pending_ = arrivals; }
  void arrive(std::int64_t bytes) {
    std::lock_guard lock(mutex_);
    if (!count_) fail("a barrier was used before it was initialised");
    if (--pending_ < 0) fail("more arrivals at a barrier than its phase has");
    bytes_ += bytes;
    end_phase_if_complete();
  }
  void complete(std::int64_t bytes) {
    std::lock_guard lock(mutex_);
    bytes_ -= bytes;
    end_phase_if_complete();
  }
  void wait(std::uint32_t parity) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return (phase_ & 1) != parity; });
  }

 private:
  void end_phase_if_complete() {
    if (pending_ || bytes_) return;
    pending_ = count_;
    ++phase_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0, pending_ = 0;
  std::int64_t bytes_ = 0;
  std::uint32_t phase_ = 0;
};

constexpr std::uint32_t shared_window = 1024;  // where a block's shared memory starts: the system has the first 1,024

struct Block {
  std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(232448, 0xFF);  // NaN until it is written
  std::map<std::uint32_t, Barrier> barriers;
  Meeting warps[12];
};

struct Copy {
  const CUtensorMap* map;
  std::uint32_t target, barrier;
  int column, row;
  std::uint16_t mask;
};

// A pair of blocks and the thread that does their copies.
class Cluster {
 public:
  explicit Cluster(unsigned seed) : random_(seed), copier_([this] { run(); }) {}
  ~Cluster() {
    {
      std::lock_guard lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    copier_.join();
  }
  void enqueue(const Copy& copy) {
    std::lock_guard lock(mutex_);
    copies_.push_back(copy);
    wake_.notify_all();
  }
  Block blocks[2];
  Meeting everyone{768};

 private:
  void run() {
    while (true) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return ended_ || !copies_.empty(); });
      if (copies_.empty()) return;
      // Copies finish in any order.
      const std::size_t index = random_() % copies_.size();
      const Copy copy = copies_[index];
      copies_.erase(copies_.begin() + index);
      lock.unlock();
      if (random_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 100));
      for (int rank = 0; rank < 2; ++rank) {
        if (copy.mask >> rank & 1) carry_out(copy, blocks[rank]);
      }
    }
  }

  static void carry_out(const Copy& copy, Block& block) {
    for (std::uint32_t token = 0; token < 64; ++token) {
      for (std::uint32_t column = 0; column < 64; ++column) {
        const std::int64_t row = copy.row + token, at = copy.column + column;
        const bool inside = row < copy.map->tokens && at < copy.map->width;
        const std::uint16_t value = inside ? copy.map->keys[row * copy.map->stride + at] : 0;
        std::uint32_t address = copy.target + token * 128 + column * 2;
        address ^= (address >> 7 & 7) << 4;  // 128-byte swizzle: 16-byte units of a row, by the row's number modulo 8
        std::memcpy(&block.memory[address - shared_window], &value, 2);
      }
    }
    block.barriers.at(copy.barrier).complete(64 * 64 * 2);
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Copy> copies_;
  std::mt19937 random_;
  bool ended_ = false;
  std::thread copier_;
};

struct Coordinates {
  int x, y;
};
inline thread_local Coordinates threadIdx, blockIdx, gridDim;
inline thread_local Cluster* cluster;
inline thread_local Block* block;

inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const std::uint8_t*>(pointer) - block->memory.data()) + shared_window;
}
inline void* dynamic_shared() { return block->memory.data() + 16; }
inline std::uint32_t rank_in_cluster() { return blockIdx.x % 2; }
inline void synchronize_cluster() { cluster->everyone.meet(); }
inline void init_barrier(std::uint32_t barrier, std::uint32_t arrivals) { block->barriers[barrier].init(arrivals); }
inline void publish_barriers() {}
inline void arrive_expecting(std::uint32_t barrier, std::uint32_t bytes) { block->barriers.at(barrier).arrive(bytes); }
inline void arrive_at_rank(std::uint32_t barrier, std::uint32_t rank) {
  cluster->blocks[rank].barriers.at(barrier).arrive(0);
}
inline void wait_for(std::uint32_t barrier, std::uint32_t parity) { block->barriers.at(barrier).wait(parity); }
inline void load_box_everywhere(std::uint32_t target, const CUtensorMap& map, int column, int row,
                                std::uint32_t barrier, std::uint16_t mask) {
  if (target % 1024) fail("a box must start at a multiple of 1,024");
  cluster->enqueue({&map, target, barrier, column, row, mask});
}
inline void load_box(std::uint32_t target, const CUtensorMap& map, int column, int row, std::uint32_t barrier) {
  load_box_everywhere(target, map, column, row, barrier, 1u << rank_in_cluster());
}
template <int registers>
void decrease_registers_to() {}
template <int registers>
void increase_registers_to() {}
inline void add_in_memory(float* target, float value) { *target += value; }
inline void add_in_memory(float* target, float first, float second) {
  if (reinterpret_cast<std::uintptr_t>(target) % 8) fail("a pair of floats must start at a multiple of 8");
  target[0] += first;
  target[1] += second;
}

}  // namespace rocr::sm90
