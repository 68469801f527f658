"""A kernel without one of its barriers: all are missed but the one that does nothing."""

from ptx.mutations import mutants, try_mutant, without

from tests.ptx.small_kernels import Run

BODY = """
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p2, %r1, 0;
    @%p2 mbarrier.init.shared::cta.b64 [memory+512], 32;
    bar.sync 0;
    shl.b32 %r5, %r2, 2;
    @%p1 st.shared.b32 [%r5], %r1;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [memory+512];
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p9, [memory+512], 0;
    @!%p9 bra again;
    ld.shared.b32 %r6, [%r5];
    bar.sync 1;
    st.global.b32 [%rd2], %r6;
"""


def test_what_orders_nothing_is_told_from_what_does():
    run = Run(BODY, out=64, threads=64, shared=1024)
    source, found = run.machine.program.source, {}

    def again():
        run.again()
        return ""

    for mutant in mutants(run.machine):
        found[source[mutant.line - 1].strip()] = try_mutant(run.machine, mutant, [again])
    assert list(found) == [
        "bar.sync 0;",
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [memory+512];",
        "mbarrier.try_wait.parity.shared::cta.b64 %p9, [memory+512], 0;",
        "bar.sync 1;",
    ]
    first, arrival, wait, last = found.values()
    assert "mbarrier" in first
    assert arrival.startswith("deadlock")
    assert "race" in wait or "nobody wrote" in wait
    assert last == ""


def test_a_mutant_is_whole_again_afterwards():
    run = Run(BODY, out=64, threads=64, shared=1024)
    before = run.machine.program.instructions.copy()
    for mutant in mutants(run.machine):
        with without(run.machine, mutant):
            assert (before != run.machine.program.instructions).any()
        assert (before == run.machine.program.instructions).all()
