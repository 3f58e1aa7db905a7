// Memory in which an access outside a tensor is noticed: on the heap, exactly as large as the
// tensor, for AddressSanitizer; or between a page that cannot be accessed and bytes that are
// compared afterwards, which also sees what the sanitizers do not instrument (masked and streamed
// accesses by intrinsics).
#pragma once
#include <cstddef>
#include <vector>

namespace evenkeel::check {

enum class Place { heap, heap_shifted, before_guard, after_guard };

class Buffer {
 public:
  // `element` is the size of one value, by which `heap_shifted` is off a boundary.
  Buffer(std::size_t bytes, std::size_t element, Place place);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // False if bytes beside the tensor have changed.
  bool is_clean() const;

 private:
  std::size_t bytes_, whole_ = 0;
  char *memory_ = nullptr, *begin_ = nullptr, *end_ = nullptr;  // begin_ .. end_ can be accessed
  void* data_ = nullptr;
};

}  // namespace evenkeel::check
