// Threads: PyTorch's OpenMP runtime where there is one, otherwise a few of our own.
//
// A second pool would compete with the first: OpenMP threads go on spinning for a while after their work, so kernels on
// threads of their own would find the cores busy. The runtime is found by the caller and given as two functions.

#include "regard.h"

#include <atomic>
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
  std::atomic<unsigned char> taken[MOST_PARTS];

  // Thread `first` takes its own part, which is likely still in its caches, and then what nobody has begun.
  void work(int first) {
    for (int i = 0; i < count; ++i) {
      const int part = (first + i) % count;
      if (!taken[part].load(std::memory_order_relaxed) && !taken[part].exchange(1)) body(data, part);
    }
  }
};

regard_fork fork_threads = nullptr;
regard_thread thread_number = nullptr;

class Pool {
 public:
  // The kernels are not re-entered: a second caller (another thread of the program) works alone.
  void run(Region& region) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return region.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < region.count - 1) {
        const int number = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, number] { serve(number); });
      }
      region_ = &region;
      wanted_ = region.count;
      running_ = region.count - 1;
      ++generation_;
    }
    start_.notify_all();
    region.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    region_ = nullptr;
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
    if (region.count == 1) {
      region.work(0);
    } else if (fork_threads != nullptr) {
      fork_threads([](void* d) { static_cast<Region*>(d)->work(thread_number()); }, &region,
                   static_cast<unsigned>(region.count), 0);
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
