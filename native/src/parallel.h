// Runs the parts of a kernel on several threads.
#pragma once

namespace regard {

// Calls body(data, index) once for each index below `count`, some on the calling thread; returns when all are done.
// Bodies must not wait for each other: with a busy pool one thread may run several.
void run_parts(int count, void (*body)(void*, int), void* data);

}  // namespace regard

namespace REGARD_ISA {
namespace {

// parallel(parts, f): calls f(part) for each part in [0, parts).
template <class F>
inline void parallel(int parts, F&& f) {
  if (parts <= 1) {
    if (parts == 1) f(0);
    return;
  }
  using Function = typename RemoveReference<F>::type;
  regard::run_parts(
      parts, [](void* data, int part) { (*static_cast<Function*>(data))(part); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// parallel_tasks(threads, tasks, f): f(task) for every task; each thread takes the next task when it has finished one.
// Only for tasks whose results do not depend on the thread that runs them.
template <class F>
inline void parallel_tasks(int threads, long tasks, F&& f) {
  const int parts = tasks < threads ? static_cast<int>(tasks) : threads;
  long next = 0;
  parallel(parts, [&](int) {
    for (;;) {
      const long task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      f(task);
    }
  });
}

}  // namespace
}  // namespace REGARD_ISA
