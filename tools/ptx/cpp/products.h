// wgmma: products that a warpgroup asks for and the tensor cores compute beside it, from shared memory by descriptors.
// A product is computed here as soon as its four warps have asked. That is early; what would make a difference later is
// an error now: registers of a product in flight may not be touched, and what it reads counts as being read until the
// wait.
#pragma once
#include "matrices.h"

namespace ptx {

// A product is 32 bytes deep: 16 halves, or 8 numbers of tf32.
constexpr int kMaxColumns = 256, kMaxDepth = 16;

// Settings: columns, whether a comes from registers, whether a and b are transposed, element type, whether there is a
// number instead of a predicate for accumulating (-1: a predicate). Operands: d, a (4 registers or a descriptor), the
// descriptor of b, the predicate.
struct ProductShape {
  int columns;
  bool registers, transpose_a, transpose_b;
  int element;
  int accumulate;
  int results() const { return columns / 2; }
  int firsts() const { return registers ? 4 : 1; }
};
inline ProductShape shape_of(const Block& block, const Instruction& i) {
  const int32_t* s = block.settings(i);
  return {s[0], s[1] != 0, s[2] != 0, s[3] != 0, s[4], s[5]};
}

// A matrix descriptor: rows of 128, 64 or 32 bytes whose 16-byte pieces are swizzled, eight rows together, or matrices
// of 8 x 8 elements one by one. `lead` and `stride` are the distances between neighbours in the two directions.
struct Descriptor {
  uint32_t start, lead, stride, row_bytes, swizzle;
  explicit Descriptor(uint64_t bits) {
    start = (bits & 0x3fff) << 4, lead = (bits >> 16 & 0x3fff) << 4, stride = (bits >> 32 & 0x3fff) << 4;
    if (bits >> 49 & 7) fault(-1, "a matrix descriptor with a base offset, which this machine does not know");
    constexpr uint32_t kRows[4] = {16, 128, 64, 32}, kSwizzles[4] = {0, 7, 3, 1};
    row_bytes = kRows[bits >> 62], swizzle = kSwizzles[bits >> 62];
  }
  // Where a piece of 8 elements lies: row `row`, elements 8 * piece and on along the inner dimension; or transposed,
  // inner element `inner`, rows 8 * piece and on.
  uint32_t piece(int row, int piece) const {
    return swizzled((row / 8) * stride + (row % 8) * row_bytes + piece * (swizzle ? 16 : lead));
  }
  uint32_t transposed_piece(int inner, int piece) const {
    int pieces = row_bytes / 16;
    if (!swizzle) return swizzled(piece * stride + (inner / 8) * lead + (inner % 8) * 16);
    return swizzled((piece / pieces) * lead + (inner / 8) * stride + (inner % 8) * row_bytes + piece % pieces * 16);
  }
  uint32_t swizzled(uint32_t offset) const {
    uint32_t at = start + offset;
    return at ^ (at >> 7 & swizzle) << 4;
  }
};

using Convert = float (*)(uint32_t);

// Read rows of elements of type T and hand each out: store(row, k, value).
template <class T, Convert kFrom, class Store>
inline void read_operand(Block& block, const Access& access, uint64_t bits, int rows, bool transposed, Store store) {
  constexpr int kPiece = 16 / sizeof(T), kDepth = 2 * kPiece;
  Descriptor descriptor(bits);
  int outer = transposed ? kDepth : rows, pieces = (transposed ? rows : kDepth) / kPiece;
  for (int x = 0; x < outer; x++)
    for (int p = 0; p < pieces; p++) {
      uint32_t at = transposed ? descriptor.transposed_piece(x, p) : descriptor.piece(x, p);
      check_shared(block, at, 16, -1, access.verb);
      block.shadow.read(at, 16, access);
      T values[kPiece];
      memcpy(values, &block.shared[at], 16);
      for (int j = 0; j < kPiece; j++)
        transposed ? store(kPiece * p + j, x, kFrom(values[j])) : store(x, kPiece * p + j, kFrom(values[j]));
    }
}

// Operands in the order in which lanes want them: a[warp][row / 8][k][row % 8], b[2 * (column / 8) + column %
// 2][k][...].
struct ProductOperands {
  float a[4][2][kMaxDepth][8];
  float b[kMaxColumns / 4][kMaxDepth][4];
};

template <class T, Convert kFrom>
inline void read_operands(Block& block, int group, const Product& product, const Access& access, ProductOperands& to) {
  ProductShape shape = shape_of(block, *product.instruction);
  const int32_t* o = block.operands(*product.instruction) + shape.results();
  if (shape.registers) {
    for (int w = 0; w < 4; w++)
      for (int r = 0; r < 4; r++)
        for (int lane = 0; lane < kLanes; lane++) {
          uint32_t pair = block.warps[4 * group + w].reg(o[r])[lane];
          if (sizeof(T) == 4) {
            to.a[w][r % 2][lane % 4 + 4 * (r / 2)][lane / 4] = kFrom(pair);
            continue;
          }
          int k = 2 * (lane % 4) + 8 * (r / 2);
          to.a[w][r % 2][k][lane / 4] = kFrom(pair & 0xffff), to.a[w][r % 2][k + 1][lane / 4] = kFrom(pair >> 16);
        }
  } else {
    read_operand<T, kFrom>(block, access, product.first, 64, shape.transpose_a,
                           [&](int row, int k, float x) { to.a[row / 16][row / 8 % 2][k][row % 8] = x; });
  }
  read_operand<T, kFrom>(block, access, product.second, shape.columns, shape.transpose_b,
                         [&](int column, int k, float x) { to.b[2 * (column / 8) + column % 2][k][column % 8 / 2] = x; });
}

// Register 2 * pair + ... of lane l holds rows l / 4 and l / 4 + 8, columns 8 * (pair / 2) + 2 * (l % 4) + pair % 2.
template <int kDepth>
inline void multiply(Block& block, int group, const Product& product, const ProductOperands& from) {
  ProductShape shape = shape_of(block, *product.instruction);
  const int32_t* results = block.operands(*product.instruction);
  static thread_local float a[4][2][kDepth][kLanes];
  for (int w = 0; w < 4; w++)
    for (int half = 0; half < 2; half++)
      for (int k = 0; k < kDepth; k++)
        for (int lane = 0; lane < kLanes; lane++) a[w][half][k][lane] = from.a[w][half][k][lane / 4];
  for (int pair = 0; pair < shape.columns / 4; pair++) {
    float b[kDepth][kLanes];
    for (int k = 0; k < kDepth; k++)
      for (int lane = 0; lane < kLanes; lane += 4) memcpy(&b[k][lane], from.b[pair][k], sizeof from.b[pair][k]);
    for (int w = 0; w < 4; w++)
      for (int half = 0; half < 2; half++) {
        float* d =
            reinterpret_cast<float*>(block.warps[4 * group + w].reg(results[4 * (pair / 2) + 2 * half + pair % 2]));
        float sum[kLanes];
        for (int lane = 0; lane < kLanes; lane++) sum[lane] = product.accumulate ? d[lane] : 0.0f;
        for (int k = 0; k < kDepth; k++)
          for (int lane = 0; lane < kLanes; lane++)
            sum[lane] = __builtin_fmaf(a[w][half][k][lane], b[k][lane], sum[lane]);
        memcpy(d, sum, sizeof sum);
      }
  }
}

inline void compute(Block& block, int number, Product& product) {
  Warpgroup& group = block.warpgroups[number];
  // All lanes take part, so what each of them has written and fenced need not be known to the others.
  Known past = product.known.generic;
  past.join(product.known.async);
  Access access{record_of(group.agent, kSeveralLanes, uint32_t(group.started + 1)),
                ~0u,
                &past,
                &product.known.async,
                -1,
                "wgmma operand"};
  static thread_local ProductOperands operands;
  switch (shape_of(block, *product.instruction).element) {
    case kBf16: read_operands<uint16_t, from_bf16>(block, number, product, access, operands); break;
    case kF16: read_operands<uint16_t, from_f16>(block, number, product, access, operands); break;
    default:
      read_operands<uint32_t, from_tf32>(block, number, product, access, operands);
      return multiply<8>(block, number, product, operands);
  }
  multiply<16>(block, number, product, operands);
}

// ---- Registers in flight: d may be touched by products alone, a may be read

inline void hold_registers(Block& block, Warp& warp, const Instruction& i, const ProductShape& shape) {
  const int32_t* o = block.operands(i);
  int mark = int(&i - block.program.instructions) + 1, held = shape.results() + (shape.registers ? 4 : 0);
  for (int r = 0; r < held; r++) {
    bool result = r < shape.results();
    int32_t slot = o[r] / kLanes;
    if (warp.accessed[slot] > warp.fenced)
      fault(-1, "wgmma uses a register that was accessed after the last wgmma.fence");
    if (result ? warp.busy[slot] < 0 : warp.busy[slot] > 0)
      fault(-1, "wgmma uses a register of another product in flight");
    if (warp.busy[slot] == 0) warp.busy_list.push_back(slot);
    warp.busy[slot] = result ? mark : -mark;
    warp.busy_until[slot] = warp.product + 1;
  }
}

inline void check_registers(const Block& block, const Warp& warp, const Instruction& i) {
  const int32_t* o = block.operands(i);
  for (int r = 0; r < i.count; r++) {
    int32_t mark = warp.busy[o[r] / kLanes];
    if (mark > 0 || (mark < 0 && r < i.results)) throw BusyRegister{std::abs(mark) - 1, r < i.results};
  }
}

inline uint64_t descriptor_of(const Warp& warp, int32_t offset) {
  const uint64_t* values = warp.wide(offset);
  if (!std::equal(values + 1, values + kLanes, values)) fault(-1, "lanes of a warp disagree about a matrix descriptor");
  return values[0];
}

inline void do_product(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "wgmma")) return;
  int number = warp.id / 4;
  if (number >= int(block.warpgroups.size())) fault(-1, "wgmma needs four warps of a warpgroup");
  Warpgroup& group = block.warpgroups[number];
  ProductShape shape = shape_of(block, i);
  const int32_t* o = block.operands(i) + shape.results();
  hold_registers(block, warp, i, shape);
  uint64_t first = shape.registers ? 0 : descriptor_of(warp, o[0]), second = descriptor_of(warp, o[shape.firsts()]);
  uint32_t accumulate = shape.accumulate >= 0 ? shape.accumulate : warp.reg(o[shape.firsts() + 1])[0] & 1;
  size_t index = warp.product++ - group.started;
  if (index == group.asked.size()) group.asked.push_back({&i, first, second, accumulate, 0, warp.clock.known});
  Product& product = group.asked[index];
  if (product.instruction != &i || product.first != first || product.second != second ||
      product.accumulate != accumulate)
    fault(-1, "the warps of a warpgroup ask for different products");
  product.known.meet(warp.clock.known);
  if (++product.warps < 4) return;
  compute(block, number, product);
  group.asked.erase(group.asked.begin());
  group.started++;
  block.events++;
}

inline void do_product_fence(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "wgmma.fence")) return;
  warp.fenced = warp.executed;
}

inline void do_product_commit(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "wgmma.commit_group")) return;
  warp.product_groups.push_back(warp.product);
}

inline void do_product_wait(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "wgmma.wait_group")) return;
  if (int64_t(warp.product_groups.size()) <= i.offset) return;
  Warpgroup& group = block.warpgroups[warp.id / 4];
  size_t finished = warp.product_groups.size() - i.offset;
  int64_t last = warp.product_groups[finished - 1];
  if (group.started < last) return block.execute_later(warp, i);
  warp.product_groups.erase(warp.product_groups.begin(), warp.product_groups.begin() + finished);
  warp.clock.known.finished_quarter(warp.id, uint32_t(last));
  size_t kept = 0;
  for (int32_t slot : warp.busy_list) {
    if (warp.busy_until[slot] > last) warp.busy_list[kept++] = slot;
    else warp.busy[slot] = 0;
  }
  warp.busy_list.resize(kept);
}

}  // namespace ptx
