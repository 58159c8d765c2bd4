#include "cpu/results.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <mutex>
#include <numeric>
#include <utility>

#include "cpu/scratch.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

// Of the stable ABI since PyTorch 2.11, and null before, where results come from PyTorch's allocator.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace vitfast::cpu {
namespace {

constexpr int64_t kPage = int64_t{64} << 10, kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Whether elements fill the memory from the first to the last without holes or overlaps.
bool is_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<size_t> order;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  return std::all_of(order.begin(), order.end(), [&](size_t i) {
    const bool fits = strides[i] == expected;
    expected *= sizes[i];
    return fits;
  });
}

#if defined(__linux__)

// Below this malloc has a block at hand.
constexpr int64_t kLeastBytes = int64_t{1} << 20;
constexpr int64_t kDefaultLimit = int64_t{256} << 20;

// Of those that lie in the memory as a whole. An error means that there are none, which is no error here.
void ask_for_huge_pages(void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<int64_t>(data);
  const int64_t first = round_up(begin, kHugePage), last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Memory from the system, on huge pages where whole ones fit.
struct Block {
  void* data;
  int64_t bytes;
};

Block* allocate(int64_t bytes) {
  const int64_t spare = bytes >= kHugePage ? kHugePage : 0;  // to begin on a huge page
  void* map = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(map);
  const auto address = reinterpret_cast<int64_t>(map);
  char* const data = begin + (spare == 0 ? 0 : round_up(address, kHugePage) - address);
  if (data > begin) munmap(begin, data - begin);
  if (const int64_t rest = begin + spare - data; rest > 0) munmap(data + bytes, rest);
  ask_for_huge_pages(data, bytes);
  return new Block{data, bytes};
}

void release(Block* block) {
  munmap(block->data, block->bytes);
  delete block;
}

// The blocks of freed results. It is never destroyed, for results may be freed at the very end of the program.
class Kept {
 public:
  static Kept& instance() {
    static Kept* const kept = new Kept;
    return *kept;
  }

  bool keeps() {
    const std::lock_guard lock(mutex_);
    return limit_ > 0;
  }
  int64_t bytes() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }
  int64_t set_limit(int64_t limit) {
    const std::lock_guard lock(mutex_);
    const int64_t before = std::exchange(limit_, limit);
    shrink();
    return before;
  }

  // Sizes are rounded, by an eighth at most, so that similar results share their memory. The block that was freed last
  // is the most likely to be in the caches.
  Block* take(int64_t least_bytes) {
    int64_t step = kPage;
    while (step * 16 <= least_bytes) step *= 2;
    const int64_t bytes = round_up(least_bytes, step);
    {
      const std::lock_guard lock(mutex_);
      const auto found =
          std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block* block) { return block->bytes == bytes; });
      if (found != blocks_.rend()) {
        Block* const block = *found;
        blocks_.erase(std::next(found).base());
        bytes_ -= bytes;
        return block;
      }
    }
    return allocate(bytes);
  }

  void give(Block* block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
    bytes_ += block->bytes;
    shrink();
  }

 private:
  Kept() {
    // A child process must not find the lock held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  void shrink() {
    auto end = blocks_.begin();
    for (; bytes_ > limit_ && end != blocks_.end(); ++end) {
      bytes_ -= (*end)->bytes;
      release(*end);
    }
    blocks_.erase(blocks_.begin(), end);
  }

  std::mutex mutex_;
  std::vector<Block*> blocks_;  // the oldest first
  int64_t bytes_ = 0, limit_ = kDefaultLimit;
};

// A tensor on kept memory, or nothing where that is not possible or not worth it.
bool on_kept_memory(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    Tensor* result) {
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  const int64_t bytes = count * static_cast<int64_t>(like.element_size());
  if (bytes < kLeastBytes || torch_from_blob == nullptr || Scratch::is_poisoned() || !Kept::instance().keeps()) {
    return false;
  }
  Block* const block = Kept::instance().take(bytes);
  if (block == nullptr) return false;
  int32_t dtype;
  AtenTensorHandle handle;
  if (aoti_torch_get_dtype(like.get(), &dtype) != AOTI_TORCH_SUCCESS ||
      torch_from_blob(
          block->data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype,
          aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
          [](void*, void* context) { Kept::instance().give(static_cast<Block*>(context)); },
          block) != AOTI_TORCH_SUCCESS) {
    release(block);
    return false;
  }
  *result = Tensor(handle);
  return true;
}

#endif

// A tensor from PyTorch's allocator, not written yet.
Tensor on_new_memory(Tensor tensor) {
#if defined(__linux__)
  ask_for_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
#endif
  return tensor;
}

}  // namespace

Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes) {
#if defined(__linux__)
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  if (Tensor result; on_kept_memory(like, sizes, strides, &result)) return result;
#endif
  return on_new_memory(torch::stable::new_empty(like, sizes));
}

Tensor new_result_like(const Tensor& like) {
#if defined(__linux__)
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < like.dim(); ++i) {
    sizes.push_back(like.size(i));
    strides.push_back(like.stride(i));
  }
  if (Tensor result; is_dense(sizes, strides) && on_kept_memory(like, sizes, strides, &result)) return result;
#endif
  return on_new_memory(torch::stable::empty_like(like));
}

int64_t keep_result_bytes(int64_t limit) {
#if defined(__linux__)
  return Kept::instance().set_limit(limit);
#else
  return 0;
#endif
}

int64_t kept_result_bytes() {
#if defined(__linux__)
  return Kept::instance().bytes();
#else
  return 0;
#endif
}

}  // namespace vitfast::cpu
