// Temporary memory of a kernel call.
#pragma once

#include <stddef.h>

namespace regard {

// Aligned to 64 bytes, kept for the next call up to a limit, filled with NaN on request. nullptr when out of memory.
void* take_memory(size_t bytes);
void give_memory(void* memory);

struct Workspace {
  explicit Workspace(size_t bytes) : memory(take_memory(bytes)) {}
  ~Workspace() { give_memory(memory); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  explicit operator bool() const { return memory != nullptr; }

  // The next `count` elements, aligned to 64 bytes.
  template <class T>
  T* take(size_t count) {
    T* found = reinterpret_cast<T*>(static_cast<char*>(memory) + used);
    used += bytes_of<T>(count);
    return found;
  }
  template <class T>
  static size_t bytes_of(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

  void* memory;
  size_t used = 0;
};

}  // namespace regard
