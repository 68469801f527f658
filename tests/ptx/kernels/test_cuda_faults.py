"""Faults put into the source of the CUDA forward: each must be an error of the machine, not only a wrong number."""

import pytest
import torch
from ptx.drivers import cuda_driver
from ptx.errors import PtxError

from deberta_kernels.impl import cuda, torch_tiled
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.cuda_launches import with_gaps
from tests.ptx.kernels.problems import BF16, SHORT

PLAIN = Case(batch=1, heads=1, nq=300, dtype=BF16, **SHORT)
HOLES = Case(batch=1, heads=1, nq=100, dtype=BF16, mask="holes")
RACE = "race: .* nothing orders the two"

FAULTS = {
    "no barrier between stores and loads of a frame": (
        "frames_.store_p2c(p2c_high, p2c_low);\n      sync_consumer();", "frames_.store_p2c(p2c_high, p2c_low);",
        RACE + "|nobody wrote", PLAIN,
    ),
    "no barrier between loads and stores of a frame": (
        "sync_consumer();  // every warp has read the frame of the tile before", "", RACE, PLAIN,
    ),
    "lanes of a warp out of step": ("    sync_warp();  // every lane has loaded", "    //", RACE, PLAIN),
    "lanes that still read what a stage says": (
        "    sync_warp();  // every lane has read what the stage", "    //", RACE, PLAIN,
    ),
    "a stage released before its products are done": (
        "product_wait<0>();\n      release_stage_before();", "release_stage_before();\n      product_wait<0>();",
        "race: tile copy .* which a product of warpgroup . read", PLAIN,
    ),
    "a table block released too early": (
        "product_wait<kFewRegisters || kFirst ? 0 : 1>();\n      release_slot();",
        "release_slot();\n      product_wait<kFewRegisters || kFirst ? 0 : 1>();",
        "race: tile copy .* which a product of warpgroup . read", PLAIN,
    ),
    "scores read before the products are done": (
        "product_wait<kFirst ? 0 : 1>();\n    attend", "product_wait<1>();\n    attend",
        "reads a register of the wgmma at line", PLAIN,
    ),
    "no wait for a table block": (
        "    wait_slot(low);\n", "", "race: wgmma operand .* which a copy for the mbarrier .* wrote", PLAIN,
    ),
    "a producer that does not wait for its stage": (
        "    barrier_wait(shared_ + L::kStageEmpty + stage_.entry * 8, stage_.parity ^ 1);\n", "",
        RACE + "|more arrivals", PLAIN,
    ),
    "a stage that nobody releases": (
        "barrier_arrive(shared_ + L::kStageEmpty + before_ * 8)", "(void)0", "deadlock", PLAIN,
    ),
    "no fence before tensor cores read a store": (
        "  fence_async();\n  sync_threads(", "  sync_threads(", r"a fence\.proxy\.async is missing", HOLES,
    ),
    "no barrier after masked values are zeroed": ("  sync_threads(kConsumersBarrier, kThreads);\n", "", RACE, HOLES),
    "shared memory out of range": (
        "kRings + consumer * 2 * L::kFrameBytes", "kRings + consumer * 20 * L::kFrameBytes",
        "store out of range: 2 bytes at byte .* of shared memory", PLAIN,
    ),
    "a store behind the last row": (
        "if (rows_[h] >= place_.nq) continue;", "", "store out of range: .* of memory range", PLAIN,
    ),
    "lanes that meet in different places": (
        "x = larger(x, shuffle_xor(x, 1));",
        "if (thread_index() & 1) x = larger(x, shuffle_xor(x, 1)); else sync_warp();", "divergence at a barrier", PLAIN,
    ),
    "an operand that changes under its product": (
        "if (kAdding) {\n", 'if (kAdding) {\n      asm volatile("xor.b32 %0, %0, 1;" : "+r"(weights_[3]));\n',
        "a register of the wgmma at line", PLAIN,
    ),
    "a product without a fence": (
        "float score[32];\n    product_fence();", "float score[32];", r"accessed after the last wgmma\.fence", PLAIN,
    ),
}  # fmt: skip


# Of the backward. All results are kept apart where a launch is deterministic: a block then visits its keys in turn.
KEYS_IN_TURN = Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, dtype=BF16, mask="holes")
BACKWARD_FAULTS = {
    "the last stage released while a lane reads it": (
        "sync_warp();  // every lane has read the visit", "", RACE, KEYS_IN_TURN,
    ),
    "a stage released before its products are done": (
        "product_wait<0>();\n    sums_.add_to_queries(dq, first_query(), turn());\n    release_stage();",
        "release_stage();\n    product_wait<0>();\n    sums_.add_to_queries(dq, first_query(), turn());",
        "race: .* which a product of warpgroup . read|" + RACE, PLAIN,
    ),
    "gradients stored while a warp loads its bias": (
        "sums_.sync_consumer();  // every warp has loaded its bias from what the gradients overwrite", "", RACE, PLAIN,
    ),
    "sums stored while products read what they overwrite": (
        "sums_.sync_consumer();  // every warp's products have read what the sums overwrite", "",
        RACE + "|race: .* which a product of warpgroup . read", PLAIN,
    ),
    "no wait for a table block": (
        "const RingCounter<L::kSlots> low = high_.next();\n    wait_slot(low);",
        "const RingCounter<L::kSlots> low = high_.next();",
        "race: wgmma operand .* which a copy for the mbarrier .* wrote|nobody wrote", PLAIN,
    ),
    "an operand that changes under its product": (
        "product_wait<1>();\n    score_gradients(score, dp, draws, ds);",
        'asm volatile("xor.b32 %0, %0, 1;" : "+r"(weights[3]));\n'
        "    product_wait<1>();\n    score_gradients(score, dp, draws, ds);",
        "a register of the wgmma at line", PLAIN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors(name):
    old, new, message, case = FAULTS[name]
    problem = inputs.problem(case)
    with cuda_driver.installed(cuda_driver.Device(changes=((old, new),))), pytest.raises(PtxError, match=message):
        cuda.forward(problem)


def test_a_load_outside_of_the_inputs_is_an_error():
    """The kernel trusts the addresses that it is given; the machine does not."""
    problem = inputs.problem(PLAIN)
    with cuda_driver.installed(cuda_driver.Device()) as device:
        allowed = device.launch

        def without_queries(*arguments):
            device.memory = [(x, writes) for x, writes in device.memory if x is not problem.q]
            allowed(*arguments)

        device.launch = without_queries
        with pytest.raises(PtxError, match="load out of range"):
            cuda.forward(problem)


@pytest.mark.parametrize("name", BACKWARD_FAULTS)
def test_faults_of_the_backward_are_errors(name):
    old, new, message, case = BACKWARD_FAULTS[name]
    problem = inputs.problem(case)
    out, lse = torch_tiled.forward(problem)
    device = cuda_driver.Device(changes=((old, new),))
    torch.use_deterministic_algorithms(case is KEYS_IN_TURN)
    try:
        with cuda_driver.installed(device), pytest.raises(PtxError, match=message):
            cuda.backward(problem, inputs.dout(case, problem), None, out, lse, (True,) * 5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_block_is_not_passed_on_before_its_copy():
    """The second consumer still reads what lay there before, and it falls behind."""
    wait, after, before = (
        "    wait_slot(high_);\n",
        "    // Not before that",
        "    {\n      // What the first tile needs",
    )
    device = cuda_driver.Device(changes=((wait + after, after), (before, wait + before)))
    device.late = (8, 9, 10, 11)
    problem = with_gaps(Case(batch=1, heads=1, nq=128, nk=384, dtype=BF16), (192, 256))
    with cuda_driver.installed(device), pytest.raises(PtxError, match=r"race|more arrivals"):
        cuda.forward(problem)
