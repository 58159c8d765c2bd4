// Working memory of a CPU kernel: one aligned block for each thread, whose peak over all threads is on record.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace vitfast::cpu {

class ScratchMeter {
 public:
  static void add(int64_t bytes) {
    const int64_t now = current_.fetch_add(bytes) + bytes;
    int64_t seen = peak_.load();
    while (now > seen && !peak_.compare_exchange_weak(seen, now)) {
    }
  }
  static void remove(int64_t bytes) { current_.fetch_sub(bytes); }
  // The largest number of bytes that were in use at one time since the last reset.
  static int64_t peak() { return peak_.load(); }
  static void reset() { peak_.store(current_.load()); }

 private:
  static inline std::atomic<int64_t> current_{0};
  static inline std::atomic<int64_t> peak_{0};
};

class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit Scratch(int64_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment}))) {
    ScratchMeter::add(bytes_);
    if (poisoned_) std::memset(data_, 0xff, bytes);
  }
  ~Scratch() {
    ScratchMeter::remove(bytes_);
    ::operator delete(data_, std::align_val_t{kAlignment});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* data() const { return data_; }

  // For tests: new blocks are full of NaN, so that what a kernel reads without having written it is seen. Results come
  // from PyTorch then, which can fill them with NaN too.
  static void poison(bool poisoned) { poisoned_ = poisoned; }
  static bool is_poisoned() { return poisoned_; }

 private:
  static inline std::atomic<bool> poisoned_{false};

  int64_t bytes_;
  std::byte* data_;
};

// Hands out aligned pieces of a block; with no block it only counts the bytes that the pieces need.
class Arena {
 public:
  explicit Arena(std::byte* block = nullptr) : block_(block) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    const int64_t alignment = Scratch::kAlignment;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
    return piece;
  }
  int64_t used() const { return used_; }
  bool holds_memory() const { return block_ != nullptr; }

 private:
  std::byte* block_;
  int64_t used_ = 0;
};

}  // namespace vitfast::cpu
