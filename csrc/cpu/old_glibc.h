// What is asked of glibc: nothing newer than 2.28, wherever the library is built, so that it loads on older systems.
#pragma once
#include <cmath>

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver log, log@GLIBC_2.17");
#endif
