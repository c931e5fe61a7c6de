// One pool of threads for all native kernels.
//
// Work is divided into tasks that share no result, so neither the number of threads nor which thread runs a task
// changes a bit. Every thread has a range of consecutive tasks and runs them in order: what a task prefetches for the
// next is there when it comes. A thread whose range is done steals tasks from the end of the other ranges. Workers
// spin for a moment after a job, since the next one usually follows at once, and then sleep, which leaves the cores to
// torch's own threads. A job never waits for a worker that has not begun: on a busy machine the caller does the work
// itself. The first exception that a task throws ends the job and is thrown to its caller.
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
  // Calls body(task) for every task in 0..tasks - 1, on at most `threads` threads, this one included.
  template <typename Body>
  static void run(std::int64_t tasks, int threads, const Body& body) {
    const auto used = std::min<std::int64_t>(threads, tasks);
    if (used <= 1 || tasks >> 32) {  // a range has 32 bits for each end
      for (std::int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    instance().execute(
        Job{tasks, [](const void* b, std::int64_t task) { (*static_cast<const Body*>(b))(task); }, &body},
        static_cast<int>(used) - 1);
  }

 private:
  struct Job {
    std::int64_t tasks = 0;
    void (*call)(const void*, std::int64_t) = nullptr;
    const void* body = nullptr;
  };

  // The tasks begin..end - 1 that are not taken yet. Both ends are in one word, so that they change together.
  class alignas(64) TaskRange {
   public:
    void set(std::int64_t begin, std::int64_t end) { ends_.store(word(begin, end), std::memory_order_relaxed); }

    // Takes the first or the last task, or none where the range is empty.
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

  static constexpr int kSpins = 2000;                 // some tens of microseconds
  static constexpr std::uint32_t kClosed = 1u << 31;  // the bit of active_

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

  void execute(const Job& job, int helpers) {
    const std::lock_guard<std::mutex> one_job(job_mutex_);
    try {
      for (; workers_ < helpers; ++workers_)
        std::thread([this, index = workers_, seen = generation_.load()] { work(index, seen); }).detach();
    } catch (const std::system_error&) {
      // the system starts no more threads: the workers so far, or the caller alone, do the work
    }
    job_ = job;
    helpers_ = helpers;
    if (num_ranges_ <= helpers) ranges_.reset(new TaskRange[num_ranges_ = helpers + 1]);
    for (std::int64_t i = 0; i <= helpers; ++i)
      ranges_[i].set(job.tasks * i / (helpers + 1), job.tasks * (i + 1) / (helpers + 1));
    active_.fetch_and(~kClosed, std::memory_order_release);
    {
      const std::lock_guard<std::mutex> lock(wake_mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run_tasks(0);
    active_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; active_.load(std::memory_order_acquire) != kClosed; ++spins)
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
      // job_ is read only by workers that joined while it was open; the caller waits until they have left
      if (!(active_.fetch_add(1, std::memory_order_acq_rel) & kClosed) && index < helpers_) run_tasks(index + 1);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  void run_tasks(int own) {
    try {
      while (const auto task = ranges_[own].take(true)) job_.call(job_.body, *task);
      for (int i = 1; i <= helpers_; ++i)
        while (const auto task = ranges_[(own + i) % (helpers_ + 1)].take(false)) job_.call(job_.body, *task);
    } catch (...) {
      for (int i = 0; i <= helpers_; ++i) ranges_[i].set(0, 0);
      const std::lock_guard<std::mutex> lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::mutex job_mutex_, wake_mutex_, failure_mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::uint32_t> active_{kClosed};  // the number of workers at the job, and whether it is closed to others
  Job job_;
  std::exception_ptr failure_;
  std::unique_ptr<TaskRange[]> ranges_;
  int workers_ = 0, helpers_ = 0, num_ranges_ = 0;
};

}  // namespace genssd
