#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

namespace evenkeel::check {
namespace {

constexpr std::align_val_t line{64};
constexpr unsigned char beside = 0xa5, unwritten = 0xff;  // of floats, the latter is NaN

std::size_t pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

Buffer::Buffer(std::size_t bytes, std::size_t element, Place place) : bytes_(bytes) {
  if (bytes == 0) return;
  if (place == Place::heap || place == Place::heap_shifted) {
    const std::size_t shift = place == Place::heap ? 0 : element;
    memory_ = begin_ = static_cast<char*>(::operator new(bytes + shift, line));
    end_ = begin_ + bytes + shift;
    data_ = begin_ + shift;
  } else {
    const std::size_t guard = pages(1), inside = pages(bytes);
    whole_ = inside + guard;
    void* got = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(got);
    begin_ = memory_ + (place == Place::after_guard ? guard : 0);
    end_ = begin_ + inside;
    if (mprotect(begin_, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = place == Place::after_guard ? begin_ : end_ - bytes;
  }
  std::memset(begin_, beside, static_cast<std::size_t>(end_ - begin_));
  std::memset(data_, unwritten, bytes);
}

Buffer::~Buffer() {
  if (whole_) {
    munmap(memory_, whole_);
  } else if (memory_) {
    ::operator delete(memory_, line);
  }
}

bool Buffer::is_clean() const {
  if (!data_) return true;
  const char* data = static_cast<const char*>(data_);
  auto all_beside = [](const char* from, const char* to) {
    for (; from < to; ++from)
      if (static_cast<unsigned char>(*from) != beside) return false;
    return true;
  };
  return all_beside(begin_, data) && all_beside(data + bytes_, end_);
}

}  // namespace evenkeel::check
