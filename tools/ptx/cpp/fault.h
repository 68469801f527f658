// What stops a kernel. Thrown where it is noticed; caught around the instruction, which knows line, block and warp.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

namespace ptx {

struct Fault {
  std::string what;
  int lane;  // -1: the whole warp
};

[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] inline void fault(int lane, const char* format, ...) {
  char text[400];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Fault{text, lane};
}

inline int first_lane(uint32_t lanes) { return lanes ? __builtin_ctz(lanes) : -1; }

}  // namespace ptx
