// Which rows of a map a matrix holds, where they are not all of them, and what they are multiplied by.
#pragma once

#include <cstdint>

namespace vitfast::cpu {

struct RowTable {
  const int64_t* index = nullptr;  // of the rows in the map; null where they follow each other
  const float* scale = nullptr;    // null for 1
  int64_t first = 0;               // without an index, the first of them

  int64_t row(int64_t i) const { return index == nullptr ? first + i : index[i]; }
  float factor(int64_t i) const { return scale == nullptr ? 1.0f : scale[i]; }
  // Without so many of the first rows.
  RowTable from(int64_t count) const {
    return {index == nullptr ? nullptr : index + count, scale == nullptr ? nullptr : scale + count, first + count};
  }
};

}  // namespace vitfast::cpu
