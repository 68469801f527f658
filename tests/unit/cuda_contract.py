"""The CUDA backward's side of its ABI, in PyTorch: what the kernels of csrc/cuda/backward.cu make of `BackwardParams`.

Everything is read and written through the addresses, strides and tensor maps of the struct, as a device would, and
nothing outside of the memory that the launch names. Only which tiles are far is a kernel's own; the rest is the
mathematics, in float64.
"""

import ctypes
import math

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.impl.cuda.arguments import Box, TensorMap
from deberta_kernels.impl.cuda.backward_arguments import BackwardArguments, BackwardInfo

INFO = BackwardInfo(abi_version=1, head_dim=64, keys=128, queries=64, threads=384, shared_bytes=1000, table_margin=192)
TILE = 64


def encode(target: TensorMap, dtype: torch.dtype, box: Box) -> None:
    """Write a description down in the place of a tensor map."""
    assert ctypes.addressof(target) % 64 == 0
    assert box.address % 16 == 0
    assert all(stride > 0 and stride % 16 == 0 for stride in box.strides[1:])
    assert box.box == (TILE, TILE, *[1] * (len(box.sizes) - 2))
    content = (box.address, len(box.sizes), *box.sizes, *box.strides)
    for i, value in enumerate(content):
        target.opaque[i] = value


def span(x: Tensor) -> tuple[int, int]:
    """Return the addresses from the first element of x to behind the last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Module:
    """A module in the place of a loaded one: runs what a kernel promises, and notes what was launched."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.launched: list[tuple[str, int, int]] = []

    def launch(self, name: str, arguments: BackwardArguments, blocks: int, stream: int) -> None:
        """Run a kernel."""
        self.launched.append((name, blocks, stream))
        run = Run(arguments, self.dtype, "_pair" in name, "_dropout" in name)
        if "_dq_" in name:
            assert blocks == run.p.batch * run.p.heads * run.p.row_tiles
            run.convert()
        else:
            assert blocks == run.p.batch * run.p.heads * run.p.groups
            run.differentiate()


class Run:
    """One launch."""

    def __init__(self, arguments: BackwardArguments, dtype: torch.dtype, pair: bool, has_dropout: bool) -> None:
        self.p, self.dtype, self.pair, self.has_dropout = arguments.params, dtype, pair, has_dropout
        self.spans = [(*span(x), writable) for x, writable in arguments.memory]
        self.head_dim = INFO.head_dim

    # ---- Memory

    def at(self, address: int, dtype: torch.dtype, shape: tuple, strides: tuple | None = None, write=False) -> Tensor:
        """Return the memory at an address as a tensor; strides in elements, contiguous by default."""
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        stop = address + count * dtype.itemsize
        assert any(a <= address and stop <= b and (may_write or not write) for a, b, may_write in self.spans)
        data = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(data, dtype=dtype).as_strided(shape, strides)

    def mapped(self, name: str) -> Tensor:
        """Return what a tensor map describes, its dimensions outermost first."""
        content = list(getattr(self.p, name).opaque)
        rank = content[1]
        sizes, strides = content[2 : 2 + rank], content[2 + rank : 2 + 2 * rank]
        assert rank, f"the map of {name} was not filled"
        shape, strides = tuple(sizes[::-1]), tuple(s // 2 for s in strides[::-1])
        return self.at(content[0], self.dtype, shape, strides).double()

    def strided(self, name: str, length: int) -> Tensor:
        p = self.p
        strides = (*(getattr(p, f"{name}_stride_{axis}") for axis in "bhn"), 1)
        return self.at(getattr(p, name), self.dtype, (self.samples, p.heads, length, self.head_dim), strides).double()

    def floats(self, name: str, *shape: int, write: bool = False) -> Tensor:
        return self.at(getattr(self.p, name), torch.float32, shape, write=write)

    @property
    def packed(self) -> bool:
        return self.p.cu_seqlens != 0

    @property
    def samples(self) -> int:
        return 1 if self.packed else self.p.batch

    # ---- The kernel

    def differentiate(self) -> None:
        p, d = self.p, self.head_dim
        bounds = [0, p.nq]
        if self.packed:
            bounds = self.at(p.cu_seqlens, torch.int32, (p.batch + 1,)).tolist()
        q, dout = self.mapped("q"), self.mapped("dout")
        k, v = self.strided("k", p.nk), self.strided("v", p.nk)
        dk, dv = (
            self.at(getattr(p, x), self.dtype, (self.samples, p.nk, p.heads, d), write=True) for x in ("dk", "dv")
        )
        for batch in range(p.batch):
            sample = 0 if self.packed else batch
            rows = slice(bounds[batch], bounds[batch + 1]) if self.packed else slice(0, p.nq)
            keys = rows if self.packed else slice(0, p.nk)
            for head in range(p.heads):
                of = [x[sample, head, at] for x, at in ((q, rows), (dout, rows), (k, keys), (v, keys))]
                found = self.one_head(batch, head, rows, *of)
                for target, value in zip((dk, dv), found, strict=True):
                    target[sample, keys, head] = value.to(self.dtype)

    def one_head(self, batch: int, head: int, rows: slice, q: Tensor, dout: Tensor, k: Tensor, v: Tensor) -> tuple:
        p, scale = self.p, self.p.scale
        sample, nq, nk = 0 if self.packed else batch, len(q), len(k)
        lse2, out_dot_dout = (
            self.floats(name, self.samples, p.heads, p.nq)[sample, head, rows].double()
            for name in ("lse2", "out_dot_dout")
        )
        prefix = min(p.prefix, nk)
        assert self.block_of(nk - 1, prefix) < p.key_blocks
        a, b, near, far = self.biases(batch, head, rows, q, nk, prefix)
        score = p.qk_scale * ((q[:, None] * (k + a)).sum(-1) + (k * b).sum(-1))
        for side, pairs in enumerate(far):  # the constant of q . a, and q + b rounded, as the tensors say
            if pairs.any():
                at = side * self.samples + sample
                other = self.mapped("q_far")[at, head, rows]
                constants = self.floats("far_constants", 2, self.samples, p.heads, p.nq)[side, sample, head, rows]
                score = torch.where(pairs, p.qk_scale * (other @ k.T) + constants.double()[:, None], score)
        score = score.masked_fill(~self.allowed(batch, head, nq, nk), -math.inf)
        weight = torch.exp2(score - lse2[:, None])
        kept = self.kept(batch, head, nq, nk)
        ds = weight * (kept * (dout @ v.T) - out_dot_dout[:, None])
        dk = scale * (ds[..., None] * (q[:, None] + b)).sum(0)
        dv = (weight * kept).T @ dout
        if p.dmean:
            dv = dv + self.floats("dmean", p.batch, p.heads, self.head_dim)[batch, head].double()
        self.add_queries(batch, head, (ds[..., None] * (k + a)).sum(1))
        for which, values in enumerate((q[:, None].expand(-1, nk, -1), k.expand(nq, -1, -1))):
            self.add_tables(batch, head, which, ds, values, near, far, prefix)
        return dk, dv

    @staticmethod
    def block_of(key: int, prefix: int) -> int:
        """Return the number of the block that holds a key: blocks of the prefix come first."""
        if key < prefix:
            return key // INFO.keys
        return -(-prefix // INFO.keys) + (key - prefix // 16 * 16) // INFO.keys

    def biases(self, batch: int, head: int, rows: slice, q: Tensor, nk: int, prefix: int) -> tuple:
        """Return the rows of both tables per pair, (nq, nk, D), and which pairs lie in near tiles; far on each side."""
        p, nq = self.p, len(q)
        none = torch.zeros(nq, nk, dtype=torch.bool)
        if prefix == nk:
            zero = torch.zeros(nq, nk, self.head_dim, dtype=torch.float64)
            return zero, zero, none, (none, none)
        assert p.table_rows % TILE == 0
        assert (p.prefix % 16 - p.table_offset) % TILE == 0  # a near tile then covers two whole blocks
        x = torch.arange(nk)[None] - prefix - torch.arange(nq)[:, None]
        with_position = (torch.arange(nk) >= prefix)[None]
        first = prefix // 16 * 16
        block = (
            (torch.arange(nk) - first) // INFO.keys * INFO.keys + first - prefix
        )  # of its first key, less the prefix
        tile = torch.arange(nq)[:, None] // TILE * TILE
        low = with_position & (block[None] - tile - (TILE - 1) >= -p.low_end)
        high = with_position & (block[None] + INFO.keys - 1 - tile <= -p.high_start)
        near = with_position & ~low & ~high
        at = p.table_offset + torch.where(near, x, 0)
        at = torch.where(low, p.table_rows - 1, torch.where(high, 0, at))
        assert int(at[near].min()) >= 0 if near.any() else True
        assert int(at[near].max()) < p.table_rows if near.any() else True
        tables = [self.mapped(name)[head] for name in ("pos_key", "pos_query")]
        given = [self.at(getattr(p, f"{name}_rows"), self.dtype, (p.heads, p.table_rows, self.head_dim))[head].double()
                 for name in ("pos_key", "pos_query")]  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(tables, given, strict=True))
        a, b = (table[at] * with_position[..., None] for table in tables)
        return a, b, near, (low, high)

    def allowed(self, batch: int, head: int, nq: int, nk: int) -> Tensor:
        p = self.p
        found = torch.ones(nq, nk, dtype=torch.bool)
        if p.key_mask:
            found &= self.at(p.key_mask, torch.bool, (p.batch, nk), (p.key_mask_stride_b, 1))[batch]
        assert bool(p.pair_mask) == self.pair
        if p.pair_mask:
            strides = tuple(getattr(p, f"pair_mask_stride_{axis}") for axis in "bhmn")
            found &= self.at(p.pair_mask, torch.bool, (p.batch, p.heads, nq, nk), strides)[batch, head]
        return found

    def kept(self, batch: int, head: int, nq: int, nk: int) -> Tensor:
        """Return what each probability is multiplied by."""
        p = self.p
        if not self.has_dropout:
            return torch.ones(nq, nk, dtype=torch.float64)
        at, rate = range(batch * p.heads + head, batch * p.heads + head + 1), p.dropout_threshold / 65536
        keep = dropout.keep_mask(self.at(p.seed, torch.int64, (1,)), rate, at, range(nq), range(nk))[0]
        return keep.double() * p.keep_scale

    # ---- Sums

    def query_tiles(self, batch: int) -> Tensor:
        """Return the sums of one sample's queries, (tiles, H, 64, D)."""
        p = self.p
        first, count = batch * p.row_tiles, p.row_tiles
        if self.packed:
            bounds = self.at(p.cu_seqlens, torch.int32, (p.batch + 1,)).tolist()
            first, count = bounds[batch] // TILE + batch, -(-(bounds[batch + 1] - bounds[batch]) // TILE)
        size = p.heads * TILE * self.head_dim
        shape = (count, p.heads, TILE, self.head_dim)
        return self.at(p.dq_sums + 4 * first * size, torch.float32, shape, write=True)

    def add_queries(self, batch: int, head: int, values: Tensor) -> None:
        tiles = self.query_tiles(batch)
        for i in range(0, len(values), TILE):
            part = values[i : i + TILE].float()
            tiles[i // TILE, head, : len(part)] += part

    def convert(self) -> None:
        p = self.p
        dq = self.at(p.dq, self.dtype, (self.samples, p.nq, p.heads, self.head_dim), write=True)
        for batch in range(p.batch):
            sums, start, stop = self.query_tiles(batch).transpose(1, 2).flatten(0, 1), 0, p.nq
            if self.packed:
                start, stop = self.at(p.cu_seqlens, torch.int32, (p.batch + 1,))[batch : batch + 2].tolist()
            dq[0 if self.packed else batch, start:stop] = (sums[: stop - start] * p.scale).to(self.dtype)

    def add_tables(
        self, batch: int, head: int, which: int, ds: Tensor, values: Tensor, near: Tensor, far: tuple, prefix: int
    ) -> None:
        """Add to the sums of one table: of distances, by blocks in the order of accumulators, and of far tiles."""
        p, d = self.p, self.head_dim
        nq, nk = ds.shape
        consumers = INFO.keys // TILE
        first = prefix // 16 * 16
        number = (torch.arange(nk) - first) // TILE
        row = p.table_offset + torch.arange(nk)[None] - prefix - torch.arange(nq)[:, None]
        for consumer in range(consumers):
            mine = near & (number % consumers == consumer)[None]
            sums = torch.zeros(p.table_rows, d, dtype=torch.float64)
            sums.index_add_(0, row[mine], ds[mine][:, None] * values[mine])
            if not mine.any():
                continue
            at = p.dtables + 4 * (batch * p.dtables_stride_b + consumer * p.dtables_stride_consumer)
            target = self.at(at, torch.float32, (2, p.heads, p.table_rows // TILE, TILE * d), write=True)
            target[which, head] += _as_accumulators(sums.view(-1, TILE, d)).float()
        for side, pairs in enumerate(far):
            if pairs.any():
                blocks = p.batch * p.key_blocks * consumers
                target = self.floats("far_sums", 2, 2, p.heads, blocks, d, write=True)
                index = (batch * p.key_blocks - (-prefix // INFO.keys)) * consumers + number
                parts = (ds * pairs)[..., None] * values
                target[which, side, head].index_add_(0, index.clamp(min=0), parts.sum(0).float())


def _as_accumulators(blocks: Tensor) -> Tensor:
    """Put (n, 64, D) into the order that a warpgroup holds it in: thread by thread within 4 registers."""
    d = blocks.shape[2]
    places = torch.empty(TILE, d, dtype=torch.long)
    for row in range(TILE):
        for column in range(d):
            w, h, g = row // 16, row % 16 // 8, row % 8
            panel, n, t, e = column // 64, column % 64 // 8, column % 8 // 2, column % 2
            register, thread = 32 * panel + 4 * n + 2 * h + e, 32 * w + 4 * g + t
            places[row, column] = register // 4 * 512 + thread * 4 + register % 4
    found = torch.empty(len(blocks), TILE * d, dtype=blocks.dtype)
    found[:, places.flatten()] = blocks.flatten(1)
    return found
