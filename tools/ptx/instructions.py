"""The opcodes that are more than an expression of one lane: how each becomes settings and operands of its handler.

A handler is a function of cpp/, which documents what settings and operands it wants. Titles are those of the PTX ISA.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from ptx.assembler import Assembler, Encoded
from ptx.errors import UnknownOpcode
from ptx.opcodes import OPCODES
from ptx.parser import Statement

__all__ = ["HANDLERS", "encode"]

Encoder = Callable[[Assembler, list[str], "re.Match[str]"], Encoded]
_ENCODERS: list[tuple[re.Pattern[str], str, Encoder]] = []
# Handlers of cpp/, in the order of their numbers behind the scalar opcodes.
HANDLERS = (
    "do_nothing", "do_branch", "do_return", "do_trap", "do_barrier", "do_warp_barrier", "do_load", "do_store",
    "do_atomic", "do_atomic_vector", "do_shuffle", "do_vote", "do_redux", "do_elect", "do_join", "do_part",
    "do_matrix", "do_mma", "do_copy", "do_copy_commit", "do_copy_wait", "do_product", "do_product_fence",
    "do_product_commit", "do_product_wait", "do_mbarrier_init", "do_mbarrier_fence", "do_proxy_fence",
    "do_mbarrier_arrive",
    "do_mbarrier_wait", "do_mbarrier_test", "do_setmaxnreg", "do_tile_copy", "do_bulk_sum", "do_bulk_commit",
    "do_bulk_wait",
)  # fmt: skip


def _encodes(section: str, pattern: str) -> Callable[[Encoder], Encoder]:
    def register(encoder: Encoder) -> Encoder:
        _ENCODERS.append((re.compile(pattern), section, encoder))
        return encoder

    return register


def encode(assembler: Assembler, statement: Statement) -> Encoded:
    """Return a statement as the machine wants it; for a scalar opcode the handler is the opcode.

    Raises:
        UnknownOpcode: neither table has it.
        PtxSyntaxError: its operands are not what the tables expect.
    """
    assembler.statement = statement
    operands = statement.operands
    if (opcode := OPCODES.get(statement.opcode)) and not any(text.startswith("{") for text in operands):
        if len(operands) != len(opcode.types):
            raise assembler.fail(f"expected {len(opcode.types)} operands")
        places = [assembler.register(text, kind) for text, kind in zip(operands, opcode.types, strict=True)]
        return Encoded(statement.opcode, places, results=1)
    for pattern, _, encoder in _ENCODERS:
        if found := pattern.fullmatch(statement.opcode):
            encoded = encoder(assembler, operands, found)
            encoded.target = statement.target
            return encoded
    raise _unknown(statement)


def _unknown(statement: Statement) -> UnknownOpcode:
    opcode, name = statement.opcode, statement.opcode.split(".")[0]
    forms = [known for known in OPCODES if known.split(".")[0] == name]
    table = "opcodes.py" if forms else None
    if table is None and any(name in re.split(r"\W+", section) for _, section, _ in _ENCODERS):
        table = "instructions.py"
    nearest = difflib.get_close_matches(opcode, forms, 3, 0)
    return UnknownOpcode(opcode, nearest, table, statement.line, " ".join((opcode, *statement.operands)))


# ---- Control Flow Instructions


@_encodes("Control Flow Instructions: bra", r"bra(\.uni)?")
def _branch(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_branch")


@_encodes("Control Flow Instructions: ret, exit", r"ret(\.uni)?|exit")
def _return(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_return")


@_encodes("Miscellaneous Instructions: trap", r"trap")
def _trap(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_trap")


# Other fences order what happens between blocks, which this machine runs one after another.
@_encodes(
    "membar, fence, prefetch, nanosleep, griddepcontrol",
    r"(membar|fence\.(acq_rel|sc)|prefetch|nanosleep|griddepcontrol)\b.*",
)
def _nothing(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_nothing")


# ---- Data Movement and Conversion Instructions


def _number_or_register(a: Assembler, text: str) -> tuple[int, list[int]]:
    return (int(text, 0), []) if re.fullmatch(r"\d+", text) else (-1, [a.register(text, "u32")])


@_encodes("Data Movement and Conversion Instructions: mov (vectors)", r"mov\.b(32|64)")
def _vector_move(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    whole, part, size = f"u{m[1]}", "u16" if m[1] == "32" else "u32", int(m[1]) // 16
    if o[1].startswith("{"):
        return Encoded("do_join", [a.register(o[0], whole), *a.vector(o[1], part)], 1, [size])
    return Encoded("do_part", [*a.vector(o[0], part), a.register(o[1], whole)], 2, [size])


_SPACES = {"global": 0, "shared": 1, "param": 2, None: 3, "local": 4}
_ACCESS = (
    r"(ld|st)(?:\.volatile|\.weak|\.relaxed\.\w+)?(?:\.(global|shared|param|local)(?:::cta)?)?(?:\.nc)?"
    r"(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?(?:\.L\d(?:::\w+)+)*(?:\.v([24]))?\.([busf])(8|16|32|64)"
)


@_encodes("Data Movement and Conversion Instructions: ld, ld.global.nc, st", _ACCESS)
def _access(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    load = m[1] == "ld"
    data, address = (o[0], o[1]) if load else (o[1], o[0])
    first = data.strip("{}").split(",")[0].strip()
    wide = a.is_wide(first) or m[5] == "64"
    # An address is a register of 64 bits, or of 32 in shared memory; a symbol is a number that fits both.
    narrow = m[2] in ("shared", "param", "local") and not a.address_is_wide(address)
    place, offset = a.address(address, not narrow)
    places = a.vector(data, m[4] + "64" if wide else m[4] + m[5])
    settings = [_SPACES[m[2]], len(places), int(m[5]) // 8, int(m[4] == "s"), int(wide), int(not narrow)]
    operands = [*places, place] if load else [place, *places]
    return Encoded("do_load" if load else "do_store", operands, len(places) if load else 0, settings, offset)


_ATOMIC = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "exch": 6, "cas": 7}
_ATOMIC_TYPES = {"u32": 0, "b32": 0, "s32": 1, "u64": 2, "b64": 2, "s64": 3, "f32": 4, "f64": 5}


@_encodes(
    "Parallel Synchronization and Communication Instructions: atom, red",
    r"(atom|red)(?:\.(?:relaxed|acq_rel|acquire|release))?(?:\.(?:gpu|cta|sys))?"
    r"\.(global|shared)(?:::cta)?(?:\.(?:gpu|cta|sys))?(?:\.relaxed)?\.(add|min|max|and|or|xor|exch|cas)\.(\w+)",
)
def _atomic(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    result = m[1] == "atom"
    places = [a.register(o[0], m[4])] if result else []
    shared = m[2] == "shared"
    wide = not shared or a.address_is_wide(o[result])
    address, offset = a.address(o[result], wide)
    places += [address, *(a.register(text, m[4]) for text in o[1 + result :])]
    settings = [_ATOMIC[m[3]], _ATOMIC_TYPES[m[4]], int(result), int(shared), int(wide)]
    return Encoded("do_atomic", places, int(result), settings, offset)


@_encodes(
    "Parallel Synchronization and Communication Instructions: atom, red (vectors)",
    r"(atom|red)\.global(?:\.gpu)?(?:\.relaxed)?(?:\.gpu)?\.add\.v([24])\.f32",
)
def _atomic_vector(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    result = m[1] == "atom"
    results = a.vector(o[0], "f32") if result else []
    address, offset = a.address(o[result], True)
    places = [*results, address, *a.vector(o[1 + result], "f32")]
    return Encoded("do_atomic_vector", places, len(results), [int(m[2]), int(result)], offset)


# ---- Data Movement and Conversion Instructions: Asynchronous copy


@_encodes("cp.async", r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L\d(?:::\w+)+)*")
def _copy(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    target, offset = a.address(o[0], False)
    source, source_offset = a.address(o[1], True)
    size = [a.register(o[3], "u32")] if len(o) > 3 else []
    return Encoded("do_copy", [target, source, *size], 0, [int(o[2], 0), source_offset, len(size)], offset)


@_encodes("cp.async.commit_group", r"cp\.async\.commit_group")
def _copy_commit(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_copy_commit")


@_encodes("cp.async.wait_group, cp.async.wait_all", r"cp\.async\.wait_(group|all)")
def _copy_wait(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_copy_wait", settings=[int(m[1] == "all")], offset=int(o[0]) if o else 0)


@_encodes(
    "cp.async.bulk.tensor",
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::(?:cluster|cta)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes",
)
def _tile_copy(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    target, target_offset = a.address(o[0], False)
    found = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*(\{.*\})\s*\]", o[1], re.S)
    if not found:
        raise a.fail(f"{o[1]} is no tensor map with coordinates")
    source, source_offset = a.address(f"[{found[1]}]", True)
    barrier, barrier_offset = a.address(o[2], False)
    places = [target, source, *a.vector(found[2], "s32"), barrier]
    if len(places) != int(m[1]) + 3:
        raise a.fail(f"expected {m[1]} coordinates")
    return Encoded("do_tile_copy", places, 0, [int(m[1]), target_offset, source_offset, barrier_offset])


@_encodes("cp.reduce.async.bulk", r"cp\.reduce\.async\.bulk\.global\.shared::cta\.bulk_group\.add\.f32")
def _bulk_sum(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    target, offset = a.address(o[0], True)
    source, source_offset = a.address(o[1], False)
    return Encoded("do_bulk_sum", [target, source, a.register(o[2], "u32")], 0, [source_offset], offset)


@_encodes("cp.async.bulk.commit_group", r"cp\.async\.bulk\.commit_group")
def _bulk_commit(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_bulk_commit")


@_encodes("cp.async.bulk.wait_group", r"cp\.async\.bulk\.wait_group(?:\.read)?")
def _bulk_wait(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_bulk_wait", offset=int(o[0]))


# ---- Parallel Synchronization and Communication Instructions


@_encodes("bar, barrier", r"bar(?:rier)?(?:\.cta)?\.(sync|arrive)(?:\.aligned)?")
def _barrier(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    number, first = _number_or_register(a, o[0])
    threads, second = _number_or_register(a, o[1]) if len(o) > 1 else (0, [])
    return Encoded("do_barrier", [*first, *second], 0, [number, threads, int(m[1] == "sync")])


@_encodes("bar.warp.sync", r"bar\.warp\.sync")
def _warp_barrier(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_warp_barrier", [a.register(o[0], "u32")])


@_encodes("shfl.sync", r"shfl\.sync\.(bfly|up|down|idx)\.b32")
def _shuffle(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    result, _, predicate = o[0].partition("|")
    places = [a.register(result, "b32"), *([a.register(predicate, "pred")] if predicate else [])]
    results = len(places)
    places += [a.register(text, "b32") for text in o[1:]]
    return Encoded("do_shuffle", places, results, [("bfly", "up", "down", "idx").index(m[1]), results - 1])


@_encodes("vote.sync", r"vote\.sync\.(ballot\.b32|any\.pred|all\.pred|uni\.pred)")
def _vote(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    kind = ("ballot", "any", "all", "uni").index(m[1].split(".")[0])
    negated = o[1].startswith("!")
    places = [
        a.register(o[0], "pred" if kind else "b32"),
        a.register(o[1].lstrip("!"), "pred"),
        a.register(o[2], "b32"),
    ]
    return Encoded("do_vote", places, 1, [kind, int(negated)])


@_encodes("redux.sync", r"redux\.sync\.(add|min|max|and|or|xor)\.([usb])32")
def _redux(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    operation = ("add", "min", "max", "and", "or", "xor").index(m[1])
    return Encoded("do_redux", [a.register(text, "b32") for text in o], 1, [operation, int(m[2] == "s")])


@_encodes("elect.sync", r"elect\.sync")
def _elect(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    number, _, predicate = o[0].partition("|")
    return Encoded("do_elect", [a.register(number, "b32"), a.register(predicate, "pred"), a.register(o[1], "b32")], 2)


@_encodes("mbarrier.init", r"mbarrier\.init(?:\.shared(?:::cta)?)?\.b64")
def _mbarrier_init(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    place, offset = a.address(o[0], False)
    return Encoded("do_mbarrier_init", [place, a.register(o[1], "u32")], offset=offset)


@_encodes(
    "mbarrier.arrive, mbarrier.expect_tx",
    r"mbarrier(\.arrive)?(\.expect_tx)?(?:\.release\.cta|\.relaxed\.cta)?(?:\.shared(?:::cta)?)?\.b64",
)
def _mbarrier_arrive(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    if m[1] and o[0] != "_":
        raise a.fail("mbarrier.arrive that returns a state is not known here")
    o = o[bool(m[1]) :]
    if not (m[1] or m[2]) or (not m[2] and len(o) > 1):
        raise a.fail("only mbarrier.arrive, mbarrier.arrive.expect_tx and mbarrier.expect_tx are known here")
    place, offset = a.address(o[0], False)
    places = [place, *([a.register(o[1], "u32")] if m[2] else [])]
    return Encoded("do_mbarrier_arrive", places, 0, [int(bool(m[1])), int(bool(m[2]))], offset)


@_encodes(
    "mbarrier.test_wait, mbarrier.try_wait",
    r"mbarrier\.(test|try)_wait\.parity(?:\.acquire\.cta)?(?:\.shared(?:::cta)?)?\.b64",
)
def _mbarrier_wait(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    place, offset = a.address(o[1], False)
    handler = "do_mbarrier_test" if m[1] == "test" else "do_mbarrier_wait"
    return Encoded(handler, [a.register(o[0], "pred"), place, a.register(o[2], "u32")], 1, offset=offset)


@_encodes("fence.mbarrier_init", r"fence\.mbarrier_init\.release\.cluster")
def _mbarrier_fence(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_mbarrier_fence")


@_encodes("fence.proxy.async", r"fence\.proxy\.async(?:\.shared::cta|\.global)?")
def _proxy_fence(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_proxy_fence")


@_encodes("Miscellaneous Instructions: setmaxnreg", r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def _setmaxnreg(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_setmaxnreg", settings=[int(m[1] == "inc"), int(o[0])])


# ---- Warp Level Matrix Multiply-Accumulate Instructions


@_encodes("ldmatrix, stmatrix", r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _matrix(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    load = m[1] == "ld"
    data, address = (o[0], o[1]) if load else (o[1], o[0])
    place, offset = a.address(address, False)
    places = a.vector(data, "b32")
    if len(places) != int(m[2]):
        raise a.fail(f"expected {m[2]} matrices")
    operands = [*places, place] if load else [place, *places]
    settings = [len(places), int(bool(m[3])), int(load)]
    return Encoded("do_matrix", operands, len(places) if load else 0, settings, offset)


_ELEMENTS = {"bf16": 0, "f16": 1, "tf32": 2}


@_encodes(
    "mma.sync",
    r"mma\.sync\.aligned\.(?:m16n8k16\.row\.col\.f32\.(?P<half>bf16|f16)\.(?P=half)\.f32|"
    r"m16n8k8\.row\.col\.f32\.(?P<single>tf32)\.tf32\.f32)",
)
def _mma(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    places = [place for text in o for place in a.vector(text, "b32")]
    if len(places) != 14:
        raise a.fail("expected 4, 4, 2 and 4 registers")
    return Encoded("do_mma", places, 4, [_ELEMENTS[m["half"] or m["single"]]])


# ---- Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions


@_encodes(
    "wgmma.mma_async",
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)"
    r"(?:k16\.f32\.(?P<half>bf16|f16)\.(?P=half)|k8\.f32\.(?P<single>tf32)\.tf32)",
)
def _product(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    results = a.vector(o[0], "b32")
    columns, registers = int(m["n"]), o[1].startswith("{")
    if columns % 8 or not 8 <= columns <= 256:
        raise a.fail("the columns of a product are a multiple of 8, from 8 to 256")
    if len(results) != columns // 2:
        raise a.fail(f"expected {columns // 2} registers of the result")
    if o[4:6] != ["1", "1"]:
        raise a.fail("products of negated operands are not known here")
    number, predicate = (int(o[3], 0), []) if re.fullmatch(r"-?\d+", o[3]) else (-1, [a.register(o[3], "pred")])
    transposed = [0, 0] if m["single"] else [0, int(o[6])] if registers else [int(o[6]), int(o[7])]
    first = a.vector(o[1], "b32") if registers else [a.register(o[1], "b64")]
    places = [*results, *first, a.register(o[2], "b64"), *predicate]
    number = int(number != 0) if not predicate else -1
    settings = [columns, int(registers), *transposed, _ELEMENTS[m["half"] or m["single"]], number]
    return Encoded("do_product", places, len(results), settings)


@_encodes("wgmma.fence", r"wgmma\.fence\.sync\.aligned")
def _product_fence(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_product_fence")


@_encodes("wgmma.commit_group", r"wgmma\.commit_group\.sync\.aligned")
def _product_commit(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_product_commit")


@_encodes("wgmma.wait_group", r"wgmma\.wait_group\.sync\.aligned")
def _product_wait(a: Assembler, o: list[str], m: re.Match[str]) -> Encoded:
    return Encoded("do_product_wait", offset=int(o[0]))
