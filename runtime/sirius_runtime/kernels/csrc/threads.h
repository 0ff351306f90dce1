// Tasks on threads of the library's own.
//
// The thread that calls takes tasks too, and waits for no helper that has taken none: a helper that
// the machine gives no time to, as happens where other programs run, costs nothing but its help. In
// OpenMP's regions every thread is waited for, and a call of 0.2 ms then takes a time slice of 4 or
// 8. Helpers look for the next call for a moment, then sleep, so that the threads of torch's own
// OpenMP runtime find the cores free.
//
// A helper that can't be started is done without. What a task throws ends the call, on whatever
// thread it was thrown: the others' tasks are left, and the caller gets it when none runs any more.
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

constexpr int MOST_THREADS = 256;  // that work at once, whatever is asked for

// As many threads as a call may have where so many are asked for.
inline int bounded(int threads) { return std::max(1, std::min(threads, MOST_THREADS)); }

class Helpers {
 public:
  typedef void (*Body)(void* data);  // throws nothing

  // Runs body(data) on this thread and on up to `others` helpers; returns when all that began are
  // done. Where another thread has the helpers, this one works alone.
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
    // A helper counts itself before it looks whether the job is open: seen here, or it sees this.
    for (unsigned turns = 0; working > 0; turns++) turns < 4096 ? relax() : std::this_thread::yield();
  }

 private:
  // Returns false where there is no room for another thread; asked again at the next call.
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
      while (open && number == own) relax();  // no task is left: what others have is the last
    }
  }

  static constexpr int LINGER = 100;  // µs: about what torch does between two kernels of a layer
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

// Never destroyed: helpers outlive whatever the process tears down when it ends. A forked process
// has none of its parent's threads, and starts its own.
inline Helpers*& helpers() {
  static Helpers* own = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { helpers() = new Helpers; });
#endif
    return new Helpers;
  }();
  return own;
}

// Runs task(0) … task(count - 1), each once, on `threads` threads; a task must not depend on who runs
// it. Each thread goes through a range of its own, so that its tasks follow one another, as their
// weights do in memory; then it takes from what the others have left of theirs. Throws what the first
// task to fail has thrown.
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
  Range ranges[MOST_THREADS];  // those beyond `wanted` are never touched
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
