// The sizes of the processor's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace vitfast::cpu {

// Bytes of the first-level data cache of a core; 32 KiB where the system does not say.
inline int64_t first_level_cache_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 << 10;
}

}  // namespace vitfast::cpu
