// Run a kernel: blocks one after another, the warps of a block in a random order. OPCODES_H is generated from the
// tables of opcodes by tools/ptx/build.py: numbers of opcodes, and the cases of `execute`.
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "bulk.h"
#include "copies.h"
#include "exchange.h"
#include "integers.h"
#include "products.h"
#include OPCODES_H

namespace ptx {

#define CASE(number, handler) \
  case number: handler(block, warp, i, lanes); break;
#define EACH(number, signature, parameters, expression) \
  case number: each<signature>(warp, program, i, lanes, [] parameters { return expression; }); break;

inline void execute(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const Program& program = block.program;
  switch (i.op) {
#include OPCODES_H
    default: fault(-1, "no handler for opcode %d", i.op);
  }
}

// Remember when registers were last accessed, which wgmma asks about. A copy is no access of what it copies, and as old
// as that, since assemblers give both one place; a copy of a constant is an access.
inline void stamp(const Program& program, Warp& warp, const Instruction& i) {
  const int32_t* o = program.operands + i.operands;
  int64_t when = warp.executed;
  bool copy = i.op == kCopyOpcode;
  if (copy && warp.accessed[o[1] / kLanes] >= 0) when = warp.accessed[o[1] / kLanes];
  for (int r = 0; r < (copy ? 1 : i.count); r++)
    if (int64_t& last = warp.accessed[o[r] / kLanes]; last >= 0) last = when;
}

// Let a warp run until it waits, ends or has executed this many instructions.
void run_warp(Block& block, Warp& warp, int64_t budget) {
  const Program& program = block.program;
  while (budget-- > 0 && warp.waits_for == Ask::kNothing && !warp.done()) {
    if (warp.pc >= warp.meeting) warp.choose();
    if (warp.pc >= program.length) fault(-1, "the kernel runs past its end");
    const Instruction& i = program.instructions[warp.pc];
    warp.waits_at = warp.pc++;
    uint32_t lanes = warp.active;
    if (i.guard >= 0) lanes &= i.negated ? ~warp.registers[i.guard] : warp.registers[i.guard];
    block.counts[&i - program.instructions].executed++;
    warp.executed++;
    if (lanes == 0) continue;
    if (!warp.busy_list.empty() && i.op != kProductOpcode) check_registers(block, warp, i);
    execute(block, warp, i, lanes);
    if (program.products && i.op != kProductOpcode) stamp(program, warp, i);
  }
}

void start_registers(const Program& program, Warp& warp, const int64_t* at, const int64_t* grid) {
  for (int64_t n = 0; n < program.initials; n++) {
    const Initial& initial = program.initial[n];
    warp.accessed[initial.offset / kLanes] = -1;  // constants
    for (int lane = 0; lane < kLanes; lane++) {
      uint64_t value = initial.value;
      switch (initial.kind) {
        case kThread: value = kLanes * warp.id + lane; break;
        case kLane: value = lane; break;
        case kWarp: value = warp.id; break;
        case kBlockX:
        case kBlockY:
        case kBlockZ: value = at[initial.kind - kBlockX]; break;
        case kGridX:
        case kGridY:
        case kGridZ: value = grid[initial.kind - kGridX]; break;
        case kThreads: value = program.threads; break;
      }
      if (initial.wide == 2) warp.wide(initial.offset)[lane] = value;
      else if (initial.wide == 1) warp.reg(initial.offset)[lane] = uint32_t(value);
      else warp.reg(initial.offset)[0] = value ? kAllLanes : 0;
    }
  }
}

void start_block(Block& block, uint32_t* registers, const int64_t* at, const int64_t* grid) {
  const Program& program = block.program;
  int warps = program.threads / kLanes;
  block.shared.assign(program.shared, 0xff);
  block.warps.assign(warps, Warp());
  block.warpgroups.clear();
  block.mbarriers.clear();
  block.next_agent = kFirstProducts;
  for (int g = 0; g < warps / 4; g++) block.warpgroups.push_back({block.next_agent++});
  block.bulk_agents = block.next_agent, block.next_agent += warps;
  block.shadow.reset(program.shared, program.unit, block.next_agent);  // mbarriers, which come later, read nothing
  int each = std::min<int64_t>(65536 / program.threads / 8 * 8, 255);
  block.registers_free = 65536 - each * program.threads;
  for (int w = 0; w < warps; w++) {
    Warp& warp = block.warps[w];
    warp.id = warp.clock.self = w;
    warp.registers = registers + program.words * w;
    warp.registers_per_thread = each;
    warp.local.assign(kLanes * program.local, 0xff);
    warp.local_written.assign(kLanes * program.local, 0);
    warp.busy.assign(program.words / kLanes + 1, 0);
    warp.busy_until.assign(program.words / kLanes + 1, 0);
    warp.accessed.assign(program.words / kLanes + 1, 0);
    start_registers(program, warp, at, grid);
  }
}

std::string who_waits(const Block& block) {
  std::string text = "deadlock:";
  for (const Warp& warp : block.warps) {
    if (warp.done()) continue;
    text += " warp " + std::to_string(warp.id) + " waits ";
    if (warp.barrier >= 0) text += "at barrier " + std::to_string(warp.barrier) + ",";
    else text += "for an mbarrier, a product or registers,";
    text += " instruction " + std::to_string(warp.waits_at) + ";";
  }
  for (const Warp& warp : block.warps)
    if (warp.done()) text += " warp " + std::to_string(warp.id) + " has ended;";
  return text;
}

// Turns without any event after which warps that poll are taken to wait for ever.
constexpr int kMostPolls = 100000;

// One turn of the block. Returns whether it goes on.
bool turn(Block& block, Warp*& current) {
  uint32_t ready = 0, running = 0, polling = 0;
  for (Warp& warp : block.warps) {
    if (warp.waits_for == Ask::kEvent && warp.asked_at != block.events) warp.wake();
    if (warp.waits_for == Ask::kTurn && warp.asked_at != block.events) warp.waits_for = Ask::kNothing, block.polls = 0;
    if (warp.done()) continue;
    running |= 1u << warp.id;
    if (warp.waits_for == Ask::kNothing) ready |= 1u << warp.id;
    if (warp.waits_for == Ask::kTurn) polling |= 1u << warp.id;
  }
  if (!running) return false;
  bool land = !block.bulk.empty() && (!ready || block.draw(4) == 0);
  if (land) land_bulk(block, block.draw(block.bulk.size()));
  if (!ready && !land && block.polls++ < kMostPolls) ready = polling;
  if (!ready && !land) {
    for (Warp& warp : block.warps)
      if (!warp.done()) {
        current = &warp;
        break;
      }
    throw Fault{who_waits(block), -1};
  }
  if (ready & ~block.late) ready &= ~block.late;
  if (!ready) return true;
  int skip = block.draw(__builtin_popcount(ready));
  while (skip--) ready &= ready - 1;
  current = &block.warps[__builtin_ctz(ready)];
  if (current->waits_for == Ask::kTurn) current->waits_for = Ask::kNothing;
  run_warp(block, *current, 1 + (block.draw(8) ? block.draw(4000) : block.draw(20)));
  return true;
}

}  // namespace ptx

// Mirrored in tools/ptx/machine.py.
struct PtxLaunch {
  ptx::Program program;
  int64_t grid[3];
  const int64_t* blocks;  // which to run, in this order
  int64_t block_count;
  const ptx::Range* ranges;
  int64_t range_count;
  const uint8_t* parameters;
  int64_t parameter_bytes;
  uint64_t seed;
  uint64_t late;  // warps
  ptx::Count* counts;
  int64_t excused;  // writes of what is there already, by several at once
};
struct PtxError {
  int64_t instruction, block;
  int32_t warp, lane;
  char what[600];
};

namespace ptx {

void report(PtxError& error, const Block& block, const Warp* warp, int64_t number, const std::string& what, int lane) {
  error.block = number, error.warp = warp ? warp->id : -1, error.lane = lane;
  error.instruction = warp ? warp->waits_at : -1;
  snprintf(error.what, sizeof error.what, "%s", what.c_str());
}

std::string words(const Block& block, const Conflict& c) {
  std::string text = "race: " + std::string(c.access.verb) + " of shared memory at byte " + std::to_string(c.byte) +
                     ", which " + block.agent_name(c.agent);
  if (c.agent < int(block.warps.size()) && c.lane < kLanes) text += " lane " + std::to_string(c.lane);
  text += std::string(" ") + c.did;
  return text + (c.fence ? "; a fence.proxy.async is missing between the two" : ", and nothing orders the two");
}

std::string words(const Block&, const BusyRegister& busy) {
  return std::string(busy.writes ? "writes" : "reads") + " a register of the wgmma at instruction " +
         std::to_string(busy.by) + ", which is in flight";
}

// Run one block; returns whether it went well.
bool run_block(Block& block, int64_t number, PtxError& error) {
  Warp* current = nullptr;
  try {
    while (turn(block, current)) {}
    current = nullptr;
    check_nothing_in_flight(block);
    return true;
  } catch (const Fault& f) {
    report(error, block, current, number, f.what, f.lane);
  } catch (const Conflict& c) {
    report(error, block, current, number, words(block, c), c.access.lane);
  } catch (const BusyRegister& b) {
    report(error, block, current, number, words(block, b), -1);
  }
  return false;
}

}  // namespace ptx

// Sizes of what Python fills in, in this order.
extern "C" const int64_t ptx_sizes[] = {sizeof(PtxLaunch),     sizeof(PtxError),   sizeof(ptx::Instruction),
                                        sizeof(ptx::Initial),  sizeof(ptx::Range), sizeof(ptx::Count),
                                        sizeof(ptx::TensorMap)};
extern "C" const uint16_t ptx_unwritten = ptx::kUnwritten;

// Returns 0, or 1 with the error filled in.
extern "C" int ptx_run(PtxLaunch* launch, PtxError* error) {
  using namespace ptx;
  const Program& program = launch->program;
  GlobalMemory global(launch->ranges, launch->range_count);
  std::vector<uint8_t> parameters(launch->parameters, launch->parameters + launch->parameter_bytes);
  // Registers start with a NaN that no computation yields.
  std::vector<uint32_t> file(program.words * (program.threads / kLanes) + 16, 0x7fc1dead);
  uint32_t* registers = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(file.data()) + 63) & ~uintptr_t(63));
  for (int64_t n = 0; n < launch->block_count; n++) {
    int64_t number = launch->blocks[n], x = launch->grid[0], y = launch->grid[1];
    int64_t at[3] = {number % x, number / x % y, number / x / y};
    Block block(program, global, parameters, launch->counts, launch->seed * 1000003 + number);
    block.late = uint32_t(launch->late);
    global.start_block(number);
    start_block(block, registers, at, launch->grid);
    if (!run_block(block, number, *error)) return 1;
    launch->excused += block.shadow.excused;
  }
  launch->excused += global.excused;
  return 0;
}
