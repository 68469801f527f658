"""Faults put into the kernels' source: each must be an error of the emulated device, not only a wrong number."""

import ctypes

import pytest
import torch

from deberta_kernels.impl.cuda.arguments import ForwardParams
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.cuda_emulation import harness

PLAIN = Case(batch=1, heads=1, nq=300, dtype=torch.bfloat16, position_buckets=16, max_relative_positions=64)
HOLES = Case(batch=1, heads=1, nq=100, dtype=torch.bfloat16, mask="holes")

FAULTS = {
    "no barrier between stores and loads of a frame": (
        "frames_.store_p2c(p2c_high, p2c_low);\n      sync_consumer();", "frames_.store_p2c(p2c_high, p2c_low);",
        "reads what another is writing|nobody wrote", PLAIN,
    ),
    "no barrier between loads and stores of a frame": (
        "sync_consumer();  // every warp has read the frame of the tile before", "", "still be reading", PLAIN,
    ),
    "lanes of a warp out of step": ("    sync_warp();  // every lane has loaded", "    //", "still be reading", PLAIN),
    "a stage released before its products are done": (
        "product_wait<0>();\n      release_stage_before();", "release_stage_before();\n      product_wait<0>();",
        "still be reading", PLAIN,
    ),
    "a table block released too early": (
        "product_wait<kFewRegisters || kFirst ? 0 : 1>();\n      release_slot();",
        "release_slot();\n      product_wait<kFewRegisters || kFirst ? 0 : 1>();", "still be reading", PLAIN,
    ),
    "scores read before the products are done": (
        "product_wait<kFirst ? 0 : 1>();\n    attend", "product_wait<1>();\n    attend", "accumulators changed", PLAIN,
    ),
    "no wait for a table block": ("    wait_slot(low);\n", "", "reads what another is writing", PLAIN),
    "a producer that does not wait for its stage": (
        "    barrier_wait(shared_ + L::kStageEmpty + stage_.entry * 8, stage_.parity ^ 1);\n", "",
        "no barrier between|more arrivals", PLAIN,
    ),
    "a stage that nobody releases": (
        "barrier_arrive(shared_ + L::kStageEmpty + before_ * 8)", "(void)0", "deadlock", PLAIN,
    ),
    "no fence before tensor cores read a store": ("    fence_async();\n", "", "no fence made visible", HOLES),
    "no barrier after masked values are zeroed": (
        "  sync_threads(kConsumersBarrier, kThreads);\n", "", "reads what another is writing|still be reading", HOLES,
    ),
    "shared memory out of range": (
        "kRings + consumer * 2 * L::kFrameBytes", "kRings + consumer * 20 * L::kFrameBytes", "out of range", PLAIN,
    ),
    "a store behind the last row": ("if (rows_[h] >= place_.nq) continue;", "", "outside of the outputs", PLAIN),
    "lanes that meet in different places": (
        "x = larger(x, shuffle_xor(x, 1));",
        "if (thread_index() & 1) x = larger(x, shuffle_xor(x, 1)); else sync_warp();",
        "of another lane", PLAIN,
    ),
    "an operand that changes under its product": (
        "if (kAdding) {\n", "if (kAdding) {\n      weights_[3] ^= 1;\n", "an operand changed", PLAIN,
    ),
    "a product without a fence": (
        "float score[32];\n    product_fence();", "float score[32];", "without a fence", PLAIN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors(name):
    old, new, message, case = FAULTS[name]
    launch = harness.Launch(inputs.problem(case), harness.library(((old, new),)))
    with pytest.raises(harness.EmulationError, match=message):
        launch.run()


def test_a_load_outside_of_the_inputs_is_an_error():
    launch = harness.Launch(inputs.problem(PLAIN), harness.library())
    launch.params.q_stride_n *= 2
    with pytest.raises(harness.EmulationError, match="load outside of the inputs"):
        launch.run()


def test_arguments_have_the_size_that_the_kernel_expects():
    size = ctypes.sizeof(ForwardParams)
    assert size <= harness.library().emulated_params_bytes() < size + 64
