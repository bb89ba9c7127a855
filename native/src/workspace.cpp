#include "workspace.h"

#include "regard.h"

#include <atomic>
#include <mutex>
#include <new>
#include <vector>

#include <stdlib.h>
#include <string.h>

namespace regard {
namespace {

// A fresh large block costs a page fault for every 4 KiB, which would slow short kernels down; so some blocks are kept.
constexpr size_t MOST_KEPT = size_t{64} << 20;
constexpr size_t HEADER = 64;

struct Kept {
  std::mutex mutex;
  std::vector<void*> blocks;
  size_t bytes = 0;
  size_t used = 0, peak = 0;  // requested by kernels; a kept block may be larger, left by another kernel
};

Kept& kept() {
  static Kept* all = new Kept();  // never destroyed: other threads may outlive static objects
  return *all;
}

std::atomic<int> poison{0};

size_t& size_of(void* block) { return *static_cast<size_t*>(block); }
size_t& asked_of(void* block) { return static_cast<size_t*>(block)[1]; }

}  // namespace

void* take_memory(size_t bytes) {
  bytes = bytes == 0 ? 64 : (bytes + 63) / 64 * 64;
  void* block = nullptr;
  {
    Kept& all = kept();
    std::lock_guard<std::mutex> lock(all.mutex);
    size_t best = all.blocks.size();
    for (size_t i = 0; i < all.blocks.size(); ++i) {
      const size_t size = size_of(all.blocks[i]);
      if (size >= bytes && (best == all.blocks.size() || size < size_of(all.blocks[best]))) best = i;
    }
    if (best < all.blocks.size()) {
      block = all.blocks[best];
      all.blocks[best] = all.blocks.back();
      all.blocks.pop_back();
      all.bytes -= size_of(block);
    }
  }
  if (block == nullptr) {
    block = ::operator new(HEADER + bytes, std::align_val_t(64), std::nothrow);
    if (block == nullptr) return nullptr;
    size_of(block) = bytes;
  }
  {
    Kept& all = kept();
    std::lock_guard<std::mutex> lock(all.mutex);
    asked_of(block) = bytes;
    all.used += bytes;
    if (all.used > all.peak) all.peak = all.used;
  }
  char* memory = static_cast<char*>(block) + HEADER;
  if (poison.load(std::memory_order_relaxed)) memset(memory, 0xff, size_of(block));
  return memory;
}

void give_memory(void* memory) {
  if (memory == nullptr) return;
  void* block = static_cast<char*>(memory) - HEADER;
  Kept& all = kept();
  std::vector<void*> dropped;
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    all.blocks.push_back(block);
    all.bytes += size_of(block);
    all.used -= asked_of(block);
    while (all.bytes > MOST_KEPT) {
      void* oldest = all.blocks.front();
      all.blocks.erase(all.blocks.begin());
      all.bytes -= size_of(oldest);
      dropped.push_back(oldest);
    }
  }
  for (void* old : dropped) ::operator delete(old, std::align_val_t(64));
}

}  // namespace regard

extern "C" int64_t regard_workspace_peak(int reset) {
  regard::Kept& all = regard::kept();
  std::lock_guard<std::mutex> lock(all.mutex);
  const size_t found = all.peak;
  if (reset) all.peak = all.used;
  return static_cast<int64_t>(found);
}

extern "C" void regard_set_poison(int poison) { regard::poison.store(poison); }
