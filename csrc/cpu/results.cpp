#include "cpu/results.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <iterator>
#include <mutex>
#include <numeric>
#include <optional>
#include <unordered_map>
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

constexpr int64_t kDefaultLimit = int64_t{256} << 20;

#if defined(__linux__)

// Below this malloc has a block at hand.
constexpr int64_t kLeastBytes = int64_t{1} << 20;
constexpr int64_t kGranule = int64_t{64} << 10;  // a multiple of every system's pages, so that their rest can go
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t bytes_of(const Tensor& like, int64_t elements) { return elements * static_cast<int64_t>(like.element_size()); }

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Asks for huge pages where whole ones lie in the memory. An error means that there are none, which is no error here.
void ask_for_huge_pages(void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<int64_t>(data);
  const int64_t first = round_up(begin, kHugePage), last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Memory from the system, from the beginning of a huge page on if it holds one; null if there is none.
void* allocate(int64_t bytes) {
  const int64_t spare = bytes >= kHugePage ? kHugePage : 0;
  void* map = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(map);
  const auto address = reinterpret_cast<int64_t>(map);
  char* const data = begin + (spare == 0 ? 0 : round_up(address, kHugePage) - address);
  if (data > begin) munmap(begin, data - begin);
  if (const int64_t rest = begin + spare - data; rest > 0) munmap(data + bytes, rest);
  ask_for_huge_pages(data, bytes);
  return data;
}

// The memory of results: of those that live, and of freed ones. It is never destroyed, for results may be freed at the
// very end of a program.
class ResultMemory {
 public:
  static ResultMemory& instance() {
    static ResultMemory* const memory = new ResultMemory;
    return *memory;
  }

  int64_t kept_bytes() {
    const std::lock_guard lock(mutex_);
    return kept_bytes_;
  }
  int64_t set_limit(int64_t limit) {
    std::vector<Block> surplus;
    int64_t before;
    {
      const std::lock_guard lock(mutex_);
      before = std::exchange(limit_, limit);
      surplus = take_surplus();
    }
    release(surplus);
    return before;
  }

  // Null if results of this size are not kept, or no memory is left. Sizes are rounded, by an eighth at most, so that
  // similar results share their memory. The block that was freed last is the most likely to be in the caches.
  void* take(int64_t least_bytes) {
    int64_t step = kGranule;
    while (step * 16 <= least_bytes) step *= 2;
    const int64_t bytes = round_up(least_bytes, step);
    void* data = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (bytes > limit_) return nullptr;
      const auto found =
          std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& block) { return block.bytes == bytes; });
      if (found != kept_.rend()) {
        data = found->data;
        kept_.erase(std::next(found).base());
        kept_bytes_ -= bytes;
      }
    }
    if (data == nullptr) data = allocate(bytes);
    if (data == nullptr) return nullptr;
    const std::lock_guard lock(mutex_);
    in_use_[data] = bytes;
    return data;
  }

  void give(void* data) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      const auto found = in_use_.find(data);
      kept_.push_back({data, found->second});
      kept_bytes_ += found->second;
      in_use_.erase(found);
      surplus = take_surplus();
    }
    release(surplus);
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  ResultMemory() {
    // A child process must not find the lock held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // What is kept beyond the limit, the oldest first.
  std::vector<Block> take_surplus() {
    auto end = kept_.begin();
    for (; kept_bytes_ > limit_ && end != kept_.end(); ++end) kept_bytes_ -= end->bytes;
    std::vector<Block> surplus(kept_.begin(), end);
    kept_.erase(kept_.begin(), end);
    return surplus;
  }
  // Without the lock: the system may take its time.
  static void release(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) munmap(block.data, block.bytes);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
  std::unordered_map<void*, int64_t> in_use_;
  int64_t kept_bytes_ = 0, limit_ = kDefaultLimit;
};

// Made before any thread that forks.
[[maybe_unused]] const ResultMemory& kMade = ResultMemory::instance();

std::optional<Tensor> on_kept_memory(const Tensor& like, int64_t bytes, const std::vector<int64_t>& sizes,
                                     const std::vector<int64_t>& strides) {
  // Poisoned: PyTorch fills its memory with NaN in tests, which shows what was not written.
  if (torch_from_blob == nullptr || Scratch::is_poisoned()) return std::nullopt;
  int32_t dtype;
  if (aoti_torch_get_dtype(like.get(), &dtype) != AOTI_TORCH_SUCCESS) return std::nullopt;
  void* const data = ResultMemory::instance().take(bytes);
  if (data == nullptr) return std::nullopt;
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(),
      -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* freed, void*) { ResultMemory::instance().give(freed); }, nullptr);
  // After an error it is not known whether the deleter ran: nothing may be done with the memory.
  if (error != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Tensor(handle);
}

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

std::optional<Tensor> kept_result(const Tensor& like, const std::vector<int64_t>& sizes) {
  const int64_t bytes =
      bytes_of(like, std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>()));
  if (bytes < kLeastBytes) return std::nullopt;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return on_kept_memory(like, bytes, sizes, strides);
}

std::optional<Tensor> kept_result_like(const Tensor& like) {
  const int64_t bytes = bytes_of(like, like.numel());
  if (bytes < kLeastBytes) return std::nullopt;
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < like.dim(); ++i) {
    sizes.push_back(like.size(i));
    strides.push_back(like.stride(i));
  }
  if (!is_dense(sizes, strides)) return std::nullopt;
  return on_kept_memory(like, bytes, sizes, strides);
}

Tensor on_new_memory(Tensor tensor) {
  ask_for_huge_pages(tensor.data_ptr(), bytes_of(tensor, tensor.numel()));
  return tensor;
}

#else

std::optional<Tensor> kept_result(const Tensor&, const std::vector<int64_t>&) { return std::nullopt; }
std::optional<Tensor> kept_result_like(const Tensor&) { return std::nullopt; }
Tensor on_new_memory(Tensor tensor) { return tensor; }

#endif

}  // namespace

Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes) {
  if (std::optional<Tensor> result = kept_result(like, sizes)) return *result;
  return on_new_memory(torch::stable::new_empty(like, sizes));
}

Tensor new_result_like(const Tensor& like) {
  if (std::optional<Tensor> result = kept_result_like(like)) return *result;
  return on_new_memory(torch::stable::empty_like(like));
}

#if defined(__linux__)
int64_t keep_result_bytes(int64_t limit) { return ResultMemory::instance().set_limit(limit); }
int64_t kept_result_bytes() { return ResultMemory::instance().kept_bytes(); }
#else
int64_t keep_result_bytes(int64_t limit) {
  static std::atomic<int64_t> limit_in_force = kDefaultLimit;
  return limit_in_force.exchange(limit);
}
int64_t kept_result_bytes() { return 0; }
#endif

}  // namespace vitfast::cpu
