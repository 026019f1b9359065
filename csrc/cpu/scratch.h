// Memory that a kernel needs while it runs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace autofocus {

// Uninitialised memory aligned for whole vectors, with one vector of slack behind it.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kAlignment = 64;
    const int64_t bytes = (count * int64_t(sizeof(A)) + 2 * kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<A*>(std::aligned_alloc(kAlignment, bytes)));
    if (!data_) throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes to compute with");
  }
  A* get() const { return data_.get(); }
  operator A*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* data) const { std::free(data); }
  };
  std::unique_ptr<A, Free> data_;
};

}  // namespace autofocus
