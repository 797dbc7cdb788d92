"""The CUDA kernels on a GPU, beyond what every implementation must do there: sizes, and on Hopper the fused GEMM,
whose flags and ticket go through thousands of launches.

`python tests/ops/weighted_mix/test_cuda_gpu.py` is a small run of every kernel for compute-sanitizer (memcheck,
synccheck; racecheck takes the asynchronous copies of the Hopper GEMMs for races).
"""

import os

import harness
import pytest
import torch
import torch.nn.functional as F
from gpu_tools import PLAN, Block
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.ops.weighted_mix.cuda import IMPLEMENTATION as KERNELS
from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs
from igva_kernels.runtime.cuda import BACKEND
from igva_kernels.testing import capture

pytestmark = harness.on_a_gpu(BACKEND)


def switch(on):
    os.environ[gemm.SWITCH] = "1" if on else "0"
    return gemm.why_not_device(torch.cuda.current_device())


@pytest.fixture
def fused():
    reason = switch(True)
    if reason is not None:
        pytest.skip(reason)
    yield
    switch(False)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_error_rule_with_the_fused_gemms(case, fused):
    """Without them: ``tests/ops/test_every_operator.py``."""
    harness.assert_right(case, "bf16", "cuda", "cuda", seeded())


@pytest.mark.large
def test_more_elements_than_32_bits_count():
    """The last rows as if they stood alone."""
    rows, columns = 2**19 + 8, 4104
    if torch.cuda.mem_get_info()[0] < 16 * rows * columns:
        pytest.skip("needs 35 GB of free memory")
    x, weight = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randn(columns, 64, device="cuda").bfloat16()
    y, z = KERNELS.linear(x, weight, None, "gelu", True)
    grad_z, again, _ = KERNELS.linear_grad_input(y, None, z, "gelu", True, True)
    for end in (slice(8), slice(-8, None)):
        torch.testing.assert_close(again[end], F.gelu(z[end]), rtol=1e-2, atol=1e-5)
    assert torch.equal(grad_z[-8:], KERNELS.linear_grad_input(y[-8:], None, z[-8:], "gelu", False, False)[0])


@pytest.mark.parametrize("layers", [1, 11, 12, 24])
def test_a_row_with_norm_of_every_size_that_fits_a_multiprocessor(layers):
    """12 layers take 48 KB of shared memory, which needs an opt-in; 24 take 96 KB, the most that a row may take."""
    states = [torch.randn(1, 3, 1024, device="cuda") for _ in range(layers)]
    weight = torch.randn(64, layers * 1024, device="cuda") / 100
    args = (states, MixPlan.concat(range(layers), layers), None, weight)
    norm = (None, None, 1e-5)
    expected = ik.layer_mix_linear(*args, norm=norm, impl="reference")
    torch.testing.assert_close(ik.layer_mix_linear(*args, norm=norm, impl="cuda"), expected, rtol=1e-3, atol=1e-3)


# ---- the fused GEMM ----


def both_paths(call, states):
    """F and the base by the fused GEMM (an identity for a weight), and by the mix kernel."""
    row = call.plan.num_blocks * call.width
    identity = torch.eye(row, dtype=states[0].dtype, device="cuda")
    return gemm.run(call, identity, None, None, False, [])[0], KERNELS.mix(call, states[0].dtype).rows.flatten(0, 1)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("tokens", "width"), [(257, 768), (577, 1024), (729, 1152)])
def test_the_mixed_row_keeps_the_bits_of_the_mix_kernel(fused, batch, tokens, width):
    states = [torch.randn(batch, tokens, width, device="cuda").bfloat16() for _ in range(24)]
    weights = torch.rand(batch, 4, device="cuda")
    call = MixArgs(states, PLAN.compact()[1], weights, None, 1)
    assert torch.equal(*both_paths(call, states))


@pytest.mark.large
def test_the_fused_gemm_writes_more_elements_than_32_bits_count(fused):
    images, columns = 909, 4104
    if torch.cuda.mem_get_info()[0] < 4 * images * 577 * columns:
        pytest.skip("needs 9 GB of free memory")
    states = [torch.randn(images, 577, 64, device="cuda").bfloat16() for _ in range(2)]
    weight = torch.randn(columns, 128, device="cuda").bfloat16()
    out, _ = gemm.run(MixArgs(states, MixPlan.concat([0, 1], 2), None, None, 1), weight, None, None, False, [])
    last = F.linear(torch.cat([state[-1, 1:] for state in states], -1), weight)
    torch.testing.assert_close(out[-576:], last, rtol=1e-2, atol=1e-2)


@pytest.mark.plain_memory
def test_ten_thousand_launches_back_to_back(fused):
    """A flag that is seen too early, or left set, shows in some of them; a launch that loses a ticket never ends."""
    states = [torch.randn(3, 65, 128, device="cuda").bfloat16() for _ in range(24)]
    sets = [torch.rand(3, 4, device="cuda") for _ in range(8)]
    calls = [MixArgs(states, PLAN.compact()[1], weights, None, 1) for weights in sets]
    identity = torch.eye(256, dtype=torch.bfloat16, device="cuda")
    wanted = [KERNELS.mix(call, torch.bfloat16).rows.flatten(0, 1) for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(10_000):
        out, _ = gemm.run(calls[i % 8], identity, None, None, False, [])
        wrong += (out != wanted[i % 8]).any()
    assert int(wrong) == 0


@pytest.mark.plain_memory
def test_replays_with_random_inputs_keep_the_bits_of_the_mix_kernel(fused):
    states = [torch.randn(2, 577, 256, device="cuda").bfloat16() for _ in range(24)]
    weights = torch.rand(2, 4, device="cuda")
    call = MixArgs(states, PLAN.compact()[1], weights, None, 1)
    graph, (one, two) = capture(lambda: both_paths(call, states))
    for _ in range(200):
        for tensor in (*states, weights):
            tensor.uniform_(-1, 1)
        one.fill_(float("nan"))
        graph.replay()
        assert torch.equal(one, two)


@pytest.mark.plain_memory
@pytest.mark.parametrize("groups", [4, 3], ids=["groups of six", "groups of eight"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_launches_on_several_streams_and_replays_beside_them_keep_the_bits(fused, batch, groups):
    """Each stream and each captured launch has counters of its own; they are all at work at once."""
    plan = MixPlan.igva(24, groups).compact()[1]
    states = [torch.randn(batch, 257, 256, device="cuda").bfloat16() for _ in range(24)]
    identity = torch.eye(512, dtype=torch.bfloat16, device="cuda")
    calls = [MixArgs(states, plan, torch.rand(batch, groups, device="cuda"), None, 1) for _ in range(4)]
    wanted = [KERNELS.mix(call, torch.bfloat16).rows.flatten(0, 1) for call in calls]
    graph, (replayed,) = capture(lambda: (gemm.run(calls[3], identity, None, None, False, [])[0],))
    streams = [torch.cuda.Stream() for _ in calls]
    wrong = torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i == 3:
                    graph.replay()
                    out = replayed
                else:
                    out, _ = gemm.run(calls[i], identity, None, None, False, [])
                wrong[i] += (out != wanted[i]).any()
    torch.cuda.synchronize()
    assert not wrong.any()


def test_a_stream_that_is_not_torchs_own_gets_counters_of_its_own(fused):
    """Its handle may belong to another stream while its work still runs."""
    block = Block("cuda", grad=False)
    expected, taken = block(), dict(gemm.counters.of_streams)
    own = torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        out = block()
    own.synchronize()
    assert torch.equal(out, expected) and gemm.counters.of_streams == taken


def sanitize():
    """Every kernel once, at odd and even sizes; small, because a sanitizer is slow."""
    for fused_gemm in (False, True):
        if switch(fused_gemm) is not None and fused_gemm:
            continue
        for width, hidden in ((128, 264), (59, 97)):
            for dtype in (torch.bfloat16, torch.float32):
                Block("cuda", width=width, hidden=hidden, dtype=dtype).step()
                states = [torch.randn(2, 5, width, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
                weight = torch.randn(hidden, 2 * width, device="cuda").to(dtype)
                norm = (torch.ones(2 * width, device="cuda").requires_grad_(), None, 1e-5)
                plan = MixPlan((((0, 0, 1.0), (1, None, 0.5)), ((2, None, 1.0),)), 3)
                index = torch.tensor([1, 0, 1], device="cuda")
                out = ik.layer_mix_linear(
                    states, plan, torch.rand(3, 1, device="cuda", requires_grad=True), weight,
                    activation="silu", norm=norm, skip_tokens=1, image_index=index, impl="cuda",
                )  # fmt: skip
                out.sum().backward()
        states = [torch.randn(2, 21, 64, device="cuda").bfloat16() for _ in range(3)]
        weight = torch.randn(72, 192, device="cuda").bfloat16()
        ik.layer_mix_linear(states, MixPlan.concat([0, 2, 1]), None, weight, activation="gelu", impl="cuda")
    call = MixArgs(states, MixPlan.concat([0, 1, 2]), None, None, 0)
    KERNELS.mix(call, torch.bfloat16, None, Keep.NOTHING)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sanitize()
