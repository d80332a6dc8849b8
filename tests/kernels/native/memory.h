// Memory whose borders the processor itself watches: on either side lies a page that may not be touched. Sanitizers
// do not see what tile loads and masked vector loads read; the processor does.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

constexpr std::size_t page = 4096;

class Guarded {
 public:
  // `bytes` that end (or, if not at_end, begin) at a forbidden page; the address is a multiple of `alignment`.
  explicit Guarded(std::size_t bytes, bool at_end = true, std::size_t alignment = 1) {
    const std::size_t inside = (bytes + alignment + page - 1) / page * page;
    length_ = inside + 2 * page;
    void* mapped = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED || mprotect(static_cast<char*>(mapped) + page, inside, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    start_ = static_cast<char*>(mapped);
    char* first = start_ + page;
    data_ = at_end ? first + (inside - bytes) / alignment * alignment : first;
  }
  ~Guarded() { munmap(start_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  char *start_, *data_;
  std::size_t length_;
};
