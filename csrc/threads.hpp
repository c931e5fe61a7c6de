// One pool of threads for all native kernels.
//
// Work is cut into units that share no result, so neither the number of threads nor who runs a unit changes a bit.
// Every thread has a stretch of them, which it goes through in order: what a unit fetches for the next is there when
// it comes. Who is done takes the last ones of others. Workers wait actively for a moment after a job, since the next
// one usually follows at once, and then sleep: torch's own threads find the cores free. A job never waits for a worker
// that has not begun: on a busy machine the caller does the work itself. The first exception that a unit throws ends
// the job and reaches its caller.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

namespace genssd {

class ThreadPool {
 public:
  // Calls body(unit) for every unit in 0..units - 1, on at most `threads` threads, this one included.
  template <typename Body>
  static void run(std::int64_t units, int threads, const Body& body) {
    const auto wanted = std::min<std::int64_t>(threads, units);
    if (wanted <= 1 || units >> 32) {
      for (std::int64_t unit = 0; unit < units; ++unit) body(unit);
      return;
    }
    instance().share(Job{units, [](const void* b, std::int64_t unit) { (*static_cast<const Body*>(b))(unit); }, &body},
                     static_cast<int>(wanted) - 1);
  }

 private:
  struct Job {
    std::int64_t units = 0;
    void (*call)(const void*, std::int64_t) = nullptr;
    const void* body = nullptr;
  };

  // Units begin..end - 1, both in one word.
  class alignas(64) Stretch {
   public:
    void set(std::int64_t begin, std::int64_t end) { ends_.store(word(begin, end), std::memory_order_relaxed); }

    std::optional<std::int64_t> take(bool first) {
      for (std::uint64_t ends = ends_.load(std::memory_order_relaxed);;) {
        const auto begin = static_cast<std::int64_t>(ends >> 32), end = static_cast<std::int64_t>(ends & 0xFFFFFFFFu);
        if (begin >= end) return std::nullopt;
        const std::uint64_t rest = first ? word(begin + 1, end) : word(begin, end - 1);
        if (ends_.compare_exchange_weak(ends, rest, std::memory_order_relaxed)) return first ? begin : end - 1;
      }
    }

   private:
    static std::uint64_t word(std::int64_t begin, std::int64_t end) {
      return static_cast<std::uint64_t>(begin) << 32 | static_cast<std::uint64_t>(end);
    }
    std::atomic<std::uint64_t> ends_{0};
  };

  static constexpr int kSpins = 2000;  // some tens of microseconds
  static constexpr std::uint32_t kClosed = 1u << 31;

  static ThreadPool& instance() {
    static std::atomic<ThreadPool*> pool{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
      pool = new ThreadPool;  // never destroyed: workers may outlive the interpreter's last moments
      // a forked child has no workers: it starts with a pool of its own
      pthread_atfork(nullptr, nullptr, [] { pool.store(new ThreadPool); });
    });
    return *pool.load();
  }

  void share(const Job& job, int helpers) {
    const std::lock_guard<std::mutex> one_job(caller_);
    try {
      for (; workers_ < helpers; ++workers_)
        std::thread([this, index = workers_, seen = generation_.load()] { work(index, seen); }).detach();
    } catch (const std::system_error&) {
      // the system gives no more threads: those that are there, or the caller alone, do the work
    }
    job_ = job;
    helpers_ = helpers;
    if (room_ <= helpers) stretches_.reset(new Stretch[room_ = helpers + 1]);
    for (std::int64_t i = 0; i <= helpers; ++i)
      stretches_[i].set(job.units * i / (helpers + 1), job.units * (i + 1) / (helpers + 1));
    inside_.fetch_and(~kClosed, std::memory_order_release);
    {
      const std::lock_guard<std::mutex> lock(wake_mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_units(0);
    inside_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; inside_.load(std::memory_order_acquire) != kClosed; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  void work(int index, std::uint64_t seen) {
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(wake_mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      // job_ is read only by those who came in while it was open; the caller waits until they are out
      if (!(inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed) && index < helpers_) take_units(index + 1);
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  void take_units(int mine) {
    try {
      while (const auto unit = stretches_[mine].take(true)) job_.call(job_.body, *unit);
      for (int i = 1; i <= helpers_; ++i)
        while (const auto unit = stretches_[(mine + i) % (helpers_ + 1)].take(false)) job_.call(job_.body, *unit);
    } catch (...) {
      for (int i = 0; i <= helpers_; ++i) stretches_[i].set(0, 0);
      const std::lock_guard<std::mutex> lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::mutex caller_, wake_mutex_, failure_mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::uint32_t> inside_{kClosed};  // workers at the job, and whether it takes no more
  Job job_;
  std::exception_ptr failure_;
  std::unique_ptr<Stretch[]> stretches_;
  int workers_ = 0, helpers_ = 0, room_ = 0;
};

}  // namespace genssd
