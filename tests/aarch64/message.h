// What travels between proxy.cpp, in the process of the tests, and worker.cpp, on the emulated processor: one page of
// memory that both have mapped, and behind it copies of the tensors, each between two pages that the worker forbids.
#pragma once
#include <cstdint>

constexpr int64_t kPage = 4096;
constexpr int64_t kFirstArea = 16 * kPage;
constexpr int64_t kSharedBytes = (int64_t)1 << 36;  // memory is taken when it is written
constexpr int kMostPointers = 40, kParamWords = 128,
              kExtra = 120;  // word kExtra and on: arguments that are no struct's

enum Function : int64_t {
  kDescribe,
  kForwardCall,
  kBackwardCall,
  kPrepareCall,
  kPreparedBytesCall,
  kLinearCall,
  kDropoutCall,
  kChecksumCall,
  kGemmRateCall,
};

struct Pointer {
  int64_t word, offset;  // params[word] is the address of this byte of the shared memory
};

struct Message {
  int64_t function, variant;
  int64_t params[kParamWords];
  int64_t pointers, guards;
  Pointer pointer[kMostPointers];
  int64_t guard[2 * kMostPointers];  // pages that must not be touched
  int64_t result;
  double rate;
  int64_t has_team;
  // Answers to kDescribe.
  int64_t abi_version, variants, runs[16];
  char name[16][32];
  char layouts[8192];
};
static_assert(sizeof(Message) <= kFirstArea, "");
