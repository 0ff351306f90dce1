// Runs tasks on the library's own threads.
//
// The calling thread runs tasks too, and does not wait for helpers that have not started one: a helper
// that is not scheduled, because other programs run, costs only its help. OpenMP waits for every
// thread of a region, so that a call of 0.2 ms then takes a time slice of 4 or 8 ms. Helpers spin for
// the next call for a moment and then sleep, so that torch's OpenMP threads find the cores free.
//
// A helper that can't be started is left out. An exception in any task ends the call: the remaining
// tasks are skipped, and the caller gets the exception when no task runs any more.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace sirius {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int MOST_THREADS = 256;  // threads of a call at most

// The number of threads that a call gets if it asks for `threads`.
inline int bounded(int threads) { return std::max(1, std::min(threads, MOST_THREADS)); }

class Helpers {
 public:
  typedef void (*Body)(void* data);  // throws nothing

  // Runs body(data) on this thread and on up to `others` helpers; returns when all that have begun are
  // done. While another thread uses the helpers, this one works alone.
  void run(Body body, void* data, unsigned others) {
    std::unique_lock<std::mutex> own(busy, std::try_to_lock);
    if (!own.owns_lock()) return body(data);
    while (started < others && start()) started++;
    job = body, job_data = data, seats = int(others);
    number++;
    open = true;
    if (sleepers > 0) {
      std::lock_guard<std::mutex> lock(sleep);
      wake.notify_all();
    }
    body(data);
    open = false;
    // A helper increments `working` before it reads `open`: either it is counted here, or it reads false.
    for (unsigned turns = 0; working > 0; turns++) turns < 4096 ? relax() : std::this_thread::yield();
  }

 private:
  // Returns false if the system can't start another thread; the next call tries again.
  bool start() {
    try {
      std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  void help() {
    typedef std::chrono::steady_clock Clock;
    for (;;) {
      const auto begin = Clock::now();
      for (unsigned turns = 1; !open; turns++) {
        relax();
        if (turns % 64 == 0 && Clock::now() - begin > std::chrono::microseconds(LINGER)) {
          std::unique_lock<std::mutex> lock(sleep);
          sleepers++;
          wake.wait(lock, [this] { return bool(open); });
          sleepers--;
        }
      }
      const unsigned own = number;
      if (working++ < seats && open) job(job_data);
      working--;
      while (open && number == own) relax();  // no task is left; wait until this job is closed
    }
  }

  static constexpr int LINGER = 100;  // µs of spinning: about torch's time between two of our kernels
  std::mutex busy, sleep;
  std::condition_variable wake;
  std::atomic<bool> open{false};
  std::atomic<int> working{0}, sleepers{0};
  std::atomic<int> seats{0};
  std::atomic<unsigned> number{0};  // of the job
  unsigned started = 0;
  Body job = nullptr;
  void* job_data = nullptr;
};

// Never destroyed, because helpers may still run when the process tears down its statics. A forked
// process has none of its parent's threads, and starts its own.
inline Helpers*& helpers() {
  static Helpers* own = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { helpers() = new Helpers; });
#endif
    return new Helpers;
  }();
  return own;
}

// Runs task(0) … task(count - 1), each once, on `threads` threads; a task must not depend on its
// thread. Each thread runs a contiguous range of tasks, whose weights are contiguous in memory; then it
// steals tasks from other threads' ranges. Throws the exception of the first task that fails.
template <class Task>
void parallel(size_t count, int threads, const Task& task) {
  struct alignas(64) Range {
    std::atomic<size_t> next;
    size_t end;
  };
  const size_t wanted = std::min(count, size_t(bounded(threads)));
  if (wanted <= 1) {
    for (size_t i = 0; i < count; i++) task(i);
    return;
  }
  struct Shared {
    const Task& task;
    const size_t threads;
    Range* ranges;
    std::atomic<size_t> seats{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};  // of the thread that set `failed`
  };
  Range ranges[MOST_THREADS];  // only the first `wanted` are used
  for (size_t i = 0; i < wanted; i++) {
    ranges[i].next = count * i / wanted;
    ranges[i].end = count * (i + 1) / wanted;
  }
  Shared shared{task, wanted, ranges};
  const auto body = [](void* data) {
    Shared& own = *static_cast<Shared*>(data);
    const size_t seat = own.seats++;
    try {
      for (size_t turn = 0; turn < own.threads; turn++) {
        Range& range = own.ranges[(seat + turn) % own.threads];
        for (size_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          own.task(i);
      }
    } catch (...) {
      if (!own.failed.exchange(true)) own.failure = std::current_exception();
      for (size_t i = 0; i < own.threads; i++) own.ranges[i].next = own.ranges[i].end;
    }
  };
  helpers()->run(body, &shared, unsigned(wanted) - 1);
  if (shared.failed) std::rethrow_exception(shared.failure);
}

}  // namespace sirius
