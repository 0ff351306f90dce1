// Tasks on threads of the library's own.
//
// The thread that calls takes tasks too, and waits for no helper that has taken none: a helper that
// the machine gives no time to, as happens where other programs run, costs nothing but its help. In
// OpenMP's regions every thread is waited for, and a call of 0.2 ms then takes a time slice of 4 or
// 8. Helpers look for the next call for a moment, then sleep, so that the threads of torch's own
// OpenMP runtime find the cores free.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
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

class Helpers {
 public:
  typedef void (*Body)(void* data);

  // Runs body(data) on this thread and on up to `others` helpers; returns when all that began are
  // done. Where another thread has the helpers, this one works alone.
  void run(Body body, void* data, unsigned others) {
    std::unique_lock<std::mutex> own(busy, std::try_to_lock);
    if (!own.owns_lock()) return body(data);
    while (started < others) {
      std::thread([this] { help(); }).detach();
      started++;
    }
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
// weights do in memory; then it takes from what the others have left of theirs.
template <class Task>
void parallel(size_t count, int threads, const Task& task) {
  constexpr size_t MOST = 256;  // threads
  struct alignas(64) Range {
    std::atomic<size_t> next;
    size_t end;
  };
  const size_t wanted = std::min({count, size_t(threads), MOST});
  if (wanted <= 1) {
    for (size_t i = 0; i < count; i++) task(i);
    return;
  }
  struct Shared {
    const Task& task;
    const size_t threads;
    Range* ranges;
    std::atomic<size_t> seats{0};
  };
  Range ranges[MOST];  // those beyond `wanted` are never touched
  for (size_t i = 0; i < wanted; i++) {
    ranges[i].next = count * i / wanted;
    ranges[i].end = count * (i + 1) / wanted;
  }
  Shared shared{task, wanted, ranges};
  const auto body = [](void* data) {
    Shared& own = *static_cast<Shared*>(data);
    const size_t seat = own.seats++;
    for (size_t turn = 0; turn < own.threads; turn++) {
      Range& range = own.ranges[(seat + turn) % own.threads];
      for (size_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
        own.task(i);
    }
  };
  helpers()->run(body, &shared, unsigned(wanted) - 1);
}

}  // namespace sirius
