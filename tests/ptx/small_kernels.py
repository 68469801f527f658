"""Small kernels for the tests of the PTX machine: a body is written, what stands around it is added."""

import numpy as np
from ptx.drivers.unwritten import pattern
from ptx.machine import Machine, Memory

_REGISTERS = """
    .reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<400>; .reg .b64 %rd<200>; .reg .f32 %f<400>; .reg .f64 %fd<40>;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %laneid;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd2, %rd1, %rd3;
"""


def module(body, inputs=(), threads=32):
    """Return a module with one kernel.

    In the body, %rd1 is the output, %rd2 the output's word of this thread, %r1 the thread, %r2 the lane, %rd3 4 times
    the thread. Inputs have names and are parameters; shared memory is `memory`.
    """
    parameters = ", ".join(f".param .u64 {name}" for name in ("out", *inputs))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{{_REGISTERS}
{body}
    ret;
}}
"""


class Run:
    """One kernel, run.

    Attributes:
        out: what it wrote.
        machine: with its counts.
        again: runs it once more.
    """

    def __init__(
        self,
        body,
        out=32,
        dtype=np.uint32,
        threads=32,
        shared=0,
        grid=(1,),
        seed=0,
        late=(),
        granule=4,
        defined=True,
        **inputs,
    ):
        self.out = np.zeros(out, dtype) if isinstance(out, int) else out
        if not defined:
            self.out.view(np.uint16)[...] = pattern()
        self.machine = Machine(module(body, inputs, threads), shared_bytes=shared)
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        memory = [Memory(self.out.ctypes.data, self.out.nbytes, granule)]
        memory += [Memory(x.ctypes.data, x.nbytes, min(x.itemsize, 4), writable=False) for x in arrays.values()]
        addresses = np.array([self.out.ctypes.data, *(x.ctypes.data for x in arrays.values())], np.uint64).tobytes()

        self._arrays = arrays  # which must outlive the launches
        self.again = lambda: self.machine.launch(grid, addresses, memory, seed=seed, late=late)
        self.again()

    def count(self, opcode):
        """Return the counts of the instructions whose opcode begins so."""
        rows = [i for i, name in enumerate(self.machine.program.opcodes) if name.startswith(opcode)]
        names = ("executed", "wavefronts", "needed", "sectors", "bytes")
        return dict(zip(names, self.machine.counts[rows].sum(0).tolist(), strict=True))


def load(name, register, kind="b32"):
    """Return instructions that load an input's element of this thread."""
    size = int(kind[1:]) // 8
    return f"""
    ld.param.u64 %rd90, [{name}];
    mul.wide.u32 %rd91, %r1, {size};
    add.s64 %rd90, %rd90, %rd91;
    ld.global.{kind} {register}, [%rd90];
"""
