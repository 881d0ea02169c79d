// A few threads that run one function together, again and again, and meet at barriers inside it.
//
// Whoever waits spins for a moment, because the next step of a decode is microseconds away, and
// then gives its core away: between calls it sleeps, at a barrier it yields.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pipespec {

class Pool {
 public:
  // work(thread): what `run` runs on all threads, the caller's being number 0.
  Pool(int num_threads, std::function<void(int)> work)
      : num_threads_(num_threads), work_(std::move(work)) {
    try {
      for (int thread = 1; thread < num_threads; ++thread)
        threads_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {
      end();
      throw;
    }
  }

  ~Pool() { end(); }

  void run() {
    if (num_threads_ > 1) announce(false);
    work_(0);
    barrier();
  }

  // Returns once every thread has come here.
  void barrier() {
    if (num_threads_ == 1) return;
    const uint32_t meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      meeting_.store(meeting + 1, std::memory_order_release);
      return;
    }
    if (!spin_until([&] { return meeting_.load(std::memory_order_acquire) != meeting; }))
      while (meeting_.load(std::memory_order_acquire) == meeting) std::this_thread::yield();
  }

 private:
  static constexpr std::chrono::microseconds PATIENCE{100};

  void serve(int thread) {
    for (uint32_t done = 0;; ++done) {
      const auto is_called = [&] { return calls_.load(std::memory_order_acquire) != done; };
      if (!spin_until(is_called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, is_called);
      }
      if (is_ending_.load(std::memory_order_relaxed)) return;
      work_(thread);
      barrier();
    }
  }

  void announce(bool is_ending) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_ending_.store(is_ending, std::memory_order_relaxed);
      calls_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void end() {
    announce(true);
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  template <class Condition>
  static bool spin_until(Condition holds) {
    const auto end = std::chrono::steady_clock::now() + PATIENCE;
    do {
      for (int i = 0; i < 16; ++i) {
        if (holds()) return true;
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    } while (std::chrono::steady_clock::now() < end);
    return holds();
  }

  const int num_threads_;
  const std::function<void(int)> work_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<uint32_t> calls_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
  std::atomic<bool> is_ending_{false};
};

}  // namespace pipespec
