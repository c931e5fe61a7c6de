// Memory that a thread keeps from unit to unit. Only for isa_*.cpp.
#pragma once

#include <cstdint>
#include <new>

namespace {

constexpr std::align_val_t kCacheLine{64};

// So many bytes, aligned to a cache line; they hold anything. A unit calls this once.
inline char* scratch(std::int64_t bytes) {
  struct Memory {
    ~Memory() { release(); }
    void release() {
      if (held) ::operator delete[](held, kCacheLine);
      held = nullptr;
      size = 0;
    }
    char* held = nullptr;
    std::int64_t size = 0;
  };
  static thread_local Memory memory;
  if (memory.size < bytes) {
    memory.release();
    memory.held = static_cast<char*>(::operator new[](static_cast<std::size_t>(bytes), kCacheLine));
    memory.size = bytes;
  }
  return memory.held;
}

// Hands out pieces of a block of memory, each on cache lines of its own. Over no memory it measures what they take.
class Pieces {
 public:
  explicit Pieces(char* memory = nullptr) : begin_(reinterpret_cast<std::uintptr_t>(memory)), next_(begin_) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (static_cast<std::uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  std::int64_t bytes() const { return static_cast<std::int64_t>(next_ - begin_); }

 private:
  std::uintptr_t begin_, next_;
};

}  // namespace
