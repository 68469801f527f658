// The emulation as a library with a C interface, for harness.py.
#include "backward.h"
#include "forward.h"

namespace {

using Body = void (*)(const dk::ForwardParams&);
using BackwardBody = void (*)(const dk::BackwardParams&);

#ifndef DK_ONE_KERNEL
template <class Element, int D>
Body body_of(bool pair, bool dropout) {
  if (pair) return dropout ? dk::forward<Element, D, true, true> : dk::forward<Element, D, true, false>;
  return dropout ? dk::forward<Element, D, false, true> : dk::forward<Element, D, false, false>;
}
template <class Element>
BackwardBody backward_body_of(bool pair, bool dropout) {
  if (pair) return dropout ? dk::backward<Element, 64, true, true> : dk::backward<Element, 64, true, false>;
  return dropout ? dk::backward<Element, 64, false, true> : dk::backward<Element, 64, false, false>;
}
#endif

template <int D>
dk::ForwardInfo info_of() {
  using L = dk::Layout<D>;
  return {dk::kForwardAbiVersion, D, L::kRows, dk::kTile, L::kThreads, L::kSharedBytes, L::kTableMargin};
}

std::string message;

}  // namespace

extern "C" {

dk::ForwardInfo emulated_info(int head_dim) { return head_dim == 64 ? info_of<64>() : info_of<128>(); }

dk::BackwardInfo emulated_backward_info() {
  using L = dk::BackwardLayout<64>;
  return {dk::kBackwardAbiVersion, 64, L::kRows, dk::kTile, L::kThreads, L::kSharedBytes, L::kTableMargin};
}

int64_t emulated_params_bytes() { return sizeof(dk::ForwardParams); }
int64_t emulated_backward_params_bytes() { return sizeof(dk::BackwardParams); }

// Fill a tensor map as cuTensorMapEncodeTiled would; return what it would refuse, or "".
const char* emulated_map(
    dk::TensorMap* map, uint64_t address, int rank, const int64_t* elements, const int64_t* strides, const int* box) {
  emulation::MapContent content{};
  content.address = address, content.rank = rank;
  if (address % 16) return "the address of a tensor map must be a multiple of 16";
  for (int i = 0; i < rank; i++) {
    content.elements[i] = (uint32_t)elements[i], content.box[i] = box[i], content.strides[i] = strides[i];
    if (elements[i] < 1 || elements[i] > INT64_C(0xffffffff)) return "dimensions must be in 1 ... 2^32 - 1";
    if (box[i] < 1 || box[i] > 256) return "a box has 1 ... 256 elements per dimension";
    if (i > 0 && (strides[i] % 16 || strides[i] <= 0)) return "strides must be positive multiples of 16 bytes";
  }
  if (box[0] * 2 > 128 || strides[0] != 2) return "a box of the 128-byte swizzle is at most 128 bytes wide";
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &content, sizeof(content));
  return "";
}

void emulated_memory(int count, const uint64_t* begins, const uint64_t* ends, const int* writable) {
  emulation::machine.readable.clear(), emulation::machine.writable.clear();
  for (int i = 0; i < count; i++) {
    (writable[i] ? emulation::machine.writable : emulation::machine.readable).push_back({begins[i], ends[i]});
  }
}

// Make a warpgroup run only while nothing else can, in all launches that follow; none with -1.
void emulated_late(int warpgroup) { emulation::machine.make_late(warpgroup); }

// Run the blocks [first, last) of a launch; return "" or what went wrong.
const char* emulated_forward(
    const dk::ForwardParams* params, int is_bfloat16, int head_dim, int pair, int dropout, int first, int last,
    uint64_t seed) {
#ifdef DK_ONE_KERNEL  // compiles in a quarter of the time
  if (!is_bfloat16 || head_dim != 64 || pair || dropout) return "only one kernel was compiled";
  const Body body = dk::forward<dk::BFloat16, 64, false, false>;
#else
  const Body body = head_dim == 64
      ? (is_bfloat16 ? body_of<dk::BFloat16, 64> : body_of<dk::Float16, 64>)(pair, dropout)
      : (is_bfloat16 ? body_of<dk::BFloat16, 128> : body_of<dk::Float16, 128>)(pair, dropout);
#endif
  const dk::ForwardInfo info = emulated_info(head_dim);
  for (int block = first; block < last; block++) {
    message = emulation::machine.run(
        block, info.threads, info.shared_bytes, [&] { body(*params); }, seed + block);
    if (!message.empty()) {
      message = "block " + std::to_string(block) + ", " + message;
      break;
    }
  }
  return message.c_str();
}

// Run the blocks of a launch of the backward in this order; then, where `convert` is not 0, the conversion of dq, a grid
// of that many blocks. Returns "" or what went wrong.
const char* emulated_backward(
    const dk::BackwardParams* params, int is_bfloat16, int pair, int dropout, int count, const int* blocks, int convert,
    uint64_t seed) {
#ifdef DK_ONE_KERNEL
  if (!is_bfloat16 || pair || dropout) return "only one kernel was compiled";
  const BackwardBody body = dk::backward<dk::BFloat16, 64, false, false>;
#else
  const BackwardBody body =
      (is_bfloat16 ? backward_body_of<dk::BFloat16> : backward_body_of<dk::Float16>)(pair, dropout);
#endif
  const BackwardBody last = is_bfloat16 ? dk::convert_queries<dk::BFloat16, 64> : dk::convert_queries<dk::Float16, 64>;
  const dk::BackwardInfo info = emulated_backward_info();
  for (int i = 0; i < count + convert; i++) {
    const bool converts = i >= count;
    const int block = converts ? i - count : blocks[i];
    message = emulation::machine.run(
        block, converts ? dk::kWarpgroup : info.threads, converts ? 0 : info.shared_bytes,
        [&] { (converts ? last : body)(*params); }, seed + i);
    if (message.empty()) continue;
    message = "block " + std::to_string(block) + (converts ? " of the conversion, " : ", ") + message;
    break;
  }
  return message.c_str();
}

// Return the worst number of words that met in a bank, 10,000 * stores of 2 bytes + 100 * stores of 4 + loads; counted
// anew afterwards.
int emulated_banks() {
  const emulation::BankReport banks = emulation::machine.banks;
  emulation::machine.banks = {};
  return 10000 * banks.half + 100 * banks.store + banks.load;
}

// Multiply as a warpgroup, a: (64, 64) and b: (64, 64) bfloat16 by their maps: a b^T with a in shared memory, a b^T and
// a b with a in registers, (128, 16). Writes the accumulators, (3, 128, 32).
const char* emulated_products(const dk::TensorMap* maps, const uint32_t* registers, float* accumulators) {
  message = emulation::machine.run(0, 128, 2 * 8192 + 8, [&] {
    const int t = dk::thread_index();
    const uint32_t a = dk::shared_base(), b = a + 8192, done = b + 8192;
    if (t == 0) {
      dk::barrier_init(done, 1);
      dk::barrier_arrive_expect(done, 2 * 8192);
      dk::copy_box(a, maps[0], done, 0, 0, 0);
      dk::copy_box(b, maps[1], done, 0, 0, 0);
    }
    dk::sync_block();
    dk::barrier_wait(done, 0);
    float d[3][32] = {};
    const uint32_t rows = dk::operand_start(a), columns = dk::operand_start(b);
    dk::product_fence();
    for (int k = 0; k < 4; k++) {
      const uint32_t* own = registers + 16 * t + 4 * k;
      const uint64_t inside = dk::columns_inside<64>(columns, k);
      dk::BFloat16::product<true>(d[0], dk::columns_inside<64>(rows, k), inside);
      dk::BFloat16::product<true, false>(d[1], own, inside);
      dk::BFloat16::product<true, true>(d[2], own, dk::rows_inside<64>(columns, 0, k));
    }
    dk::product_commit();
    dk::product_wait<0>();
    for (int i = 0; i < 3 * 32; i++) accumulators[(i / 32 * 128 + t) * 32 + i % 32] = d[i / 32][i % 32];
  }, 0);
  return message.c_str();
}

// Copy a (64, 64) box of 16-bit elements to shared memory; writes what lies there, (4096).
const char* emulated_copy(const dk::TensorMap* map, int x, int y, uint16_t* found) {
  message = emulation::machine.run(0, 32, 8192 + 8, [&] {
    const uint32_t tile = dk::shared_base(), done = tile + 8192;
    if (dk::thread_index() == 0) {
      dk::barrier_init(done, 1);
      dk::barrier_arrive_expect(done, 8192);
      dk::copy_box(tile, *map, done, x, y, 0);
    }
    dk::sync_block();
    dk::barrier_wait(done, 0);
    for (int i = dk::thread_index(); i < 8192 / 16; i += 32) {
      uint32_t* unit = reinterpret_cast<uint32_t*>(found) + 4 * i;
      dk::load_shared_4(tile + 16 * i, unit[0], unit[1], unit[2], unit[3]);
    }
  }, 0);
  return message.c_str();
}

float emulated_value(int is_bfloat16, int bits) {
  return is_bfloat16 ? emulation::bfloat16_value((uint16_t)bits) : emulation::float16_value((uint16_t)bits);
}
int emulated_bits(int is_bfloat16, float value) {
  return is_bfloat16 ? emulation::bfloat16_bits(value) : emulation::float16_bits(value);
}

}

#include "driver.h"
