// Workspace memory of a thread. Only for isa.cpp.
#pragma once

#include <cstdint>
#include <new>

namespace {

constexpr std::align_val_t kCacheLine{64};

// Returns at least so many bytes, uninitialized and aligned to a cache line, which the thread keeps from task to task.
// A task may call this once: a second call returns the same memory.
inline char* thread_workspace(std::int64_t bytes) {
  struct Memory {
    ~Memory() { release(); }
    void release() {
      if (data) ::operator delete[](data, kCacheLine);
      data = nullptr;
      size = 0;
    }
    char* data = nullptr;
    std::int64_t size = 0;
  };
  static thread_local Memory memory;
  if (memory.size < bytes) {
    memory.release();
    memory.data = static_cast<char*>(::operator new[](static_cast<std::size_t>(bytes), kCacheLine));
    memory.size = bytes;
  }
  return memory.data;
}

// Divides a block of memory into arrays that start on cache lines of their own. An arena without memory measures how
// many bytes the arrays take.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : begin_(reinterpret_cast<std::uintptr_t>(memory)), next_(begin_) {}

  template <typename T>
  T* allocate(std::int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (static_cast<std::uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }

  std::int64_t bytes() const { return static_cast<std::int64_t>(next_ - begin_); }

 private:
  std::uintptr_t begin_, next_;
};

}  // namespace
