// Threads: PyTorch's OpenMP runtime if there is one, otherwise the library's own.
//
// A second pool would compete with the first: OpenMP threads keep spinning for a while after their work, so kernels on
// other threads would find the cores busy. The caller finds the runtime and passes it as two functions.
//
// A caller runs all parts that no other thread has begun. But an OpenMP region only ends once all its threads have
// arrived, and next to another busy process a thread may arrive a scheduler's time slice late: milliseconds after
// microseconds of work. So `Attendance` records how long callers wait, and leaves threads out for a while when they
// arrive late.

#include "regard.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace regard {
namespace {

constexpr int MOST_PARTS = 512;

struct Region {
  void (*body)(void*, int);
  void* data;
  int count;
  std::atomic<int64_t> ended{0};  // when the last part ended, in nanoseconds; only with several threads
  std::atomic<unsigned char> taken[MOST_PARTS];

  // Thread `first` takes its own part, whose data are likely still in its caches, then parts that no thread has begun.
  // Returns false if none was left.
  bool work(int first) {
    bool worked = false;
    for (int i = 0; i < count; ++i) {
      const int part = (first + i) % count;
      if (taken[part].load(std::memory_order_relaxed) || taken[part].exchange(1)) continue;
      body(data, part);
      worked = true;
    }
    return worked;
  }
};

// How many threads to leave out, learned from how long callers waited for threads without work. Shared by all callers;
// a lost update only delays learning.
class Attendance {
 public:
  int threads(int count) const {
    const int out = out_.load(std::memory_order_relaxed);
    return out < count ? count - out : 1;
  }

  // Records a region of `count` parts: how long the work took, and how long the caller waited afterwards, in
  // nanoseconds.
  void tell(int count, int64_t worked, int64_t waited) {
    const int out = out_.load(std::memory_order_relaxed);
    if (waited > LATE && waited > worked) {
      const int patience = patience_.load(std::memory_order_relaxed);
      if (out < count - 1) out_.store(out + 1, std::memory_order_relaxed);
      patience_.store(patience < MOST_PATIENCE ? 2 * patience : patience, std::memory_order_relaxed);
      calm_.store(0, std::memory_order_relaxed);
      return;
    }
    const int calm = calm_.load(std::memory_order_relaxed) + 1;
    if (out > 0 && calm >= patience_.load(std::memory_order_relaxed)) {
      out_.store(out - 1, std::memory_order_relaxed);  // try one more again
      calm_.store(0, std::memory_order_relaxed);
    } else {
      if (out == 0 && calm == FORGIVEN) patience_.store(1, std::memory_order_relaxed);
      calm_.store(calm, std::memory_order_relaxed);
    }
  }

 private:
  static constexpr int64_t LATE = 300000;
  static constexpr int MOST_PATIENCE = 64, FORGIVEN = 64;
  std::atomic<int> out_{0}, patience_{1}, calm_{0};
};

Attendance attendance;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

regard_fork fork_threads = nullptr;
regard_thread thread_number = nullptr;

class Pool {
 public:
  // Kernels share one pool: a second concurrent caller (another thread of the program) works alone.
  void run(Region& region) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) {
      region.work(0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < region.count - 1) {
        const int number = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, number] { serve(number); });
      }
      region_ = &region;
      wanted_ = region.count;
      ++generation_;
    }
    start_.notify_all();
    region.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    region_ = nullptr;  // threads that have not begun need not start
    done_.wait(lock, [this] { return running_ == 0; });
  }

  // In the child of a fork the workers do not exist.
  void forget() { new (this) Pool(); }

 private:
  void serve(int number) {
    long seen = 0;
    for (;;) {
      Region* region;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen && (number < wanted_ || region_ == nullptr); });
        seen = generation_;
        if (region_ == nullptr || number >= wanted_) continue;
        region = region_;
        ++running_;
      }
      region->work(number);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Region* region_ = nullptr;
  int wanted_ = 0, running_ = 0;
  long generation_ = 0;
};

// Never destroyed: its threads wait until the process ends.
Pool& pool() {
  static Pool* the_pool = [] {
    auto* made = new Pool();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
#endif
    return made;
  }();
  return *the_pool;
}

}  // namespace

void run_parts(int count, void (*body)(void*, int), void* data) {
  for (int begin = 0; begin < count; begin += MOST_PARTS) {
    struct Shifted {
      void (*body)(void*, int);
      void* data;
      int begin;
    } shifted{body, data, begin};
    Region region;
    region.body = [](void* d, int part) {
      auto* s = static_cast<Shifted*>(d);
      s->body(s->data, s->begin + part);
    };
    region.data = &shifted;
    region.count = count - begin < MOST_PARTS ? count - begin : MOST_PARTS;
    for (int i = 0; i < region.count; ++i) region.taken[i].store(0, std::memory_order_relaxed);
    const int threads = fork_threads == nullptr ? region.count : attendance.threads(region.count);
    const int64_t begun = now();
    if (threads == 1) {
      region.work(0);
      if (region.count > 1) attendance.tell(region.count, now() - begun, 0);
    } else if (fork_threads != nullptr) {
      fork_threads(
          [](void* d) {
            auto* joined = static_cast<Region*>(d);
            if (!joined->work(thread_number())) return;
            const int64_t end = now();
            int64_t last = joined->ended.load(std::memory_order_relaxed);
            while (last < end && !joined->ended.compare_exchange_weak(last, end, std::memory_order_relaxed)) {
            }
          },
          &region, static_cast<unsigned>(threads), 0);
      const int64_t ended = region.ended.load(std::memory_order_relaxed);
      attendance.tell(region.count, ended - begun, now() - ended);
    } else {
      pool().run(region);
    }
  }
}

}  // namespace regard

extern "C" void regard_set_thread_pool(regard_fork fork, regard_thread thread) {
  regard::fork_threads = thread == nullptr ? nullptr : fork;
  regard::thread_number = thread;
}
