"""``deform_attn``: what public code computes, by every form of the reference, and errors that name the argument."""

import deform_corners as corners
import harness
import plain_torch
import pytest
import torch
from seeds import seeded
from threads import in_threads
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import igva_kernels as ik
from igva_kernels import registry
from igva_kernels.ops.deform_attn.cases import CASES, DeformCase
from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS
from igva_kernels.testing import measure_memory, relative_error, results

IMPLS = ["reference", *harness.quick_impls("deform_attn")]
KERNELS = pytest.mark.parametrize("impl", IMPLS[1:])
"""Not plain torch, which keeps and allocates what it likes, and is no registered operator."""
SMALL = [case for case in CASES if not case.is_large]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def draw(case=SMALL[0], dtype=torch.float32, grad=True):
    """The inputs of a case, as leaves."""
    inputs = case.draw(seeded(), dtype, "cpu")
    for tensor in (*inputs.value, inputs.sampling, inputs.logits):
        tensor.requires_grad_(grad)
    return inputs


def locations(case, inputs):
    """Where each point lies in the image, from 0 to 1, level by level, as public code computes it."""
    parts = inputs.sampling
    parts = parts.unbind(3) if isinstance(case.points, int) else parts.split(case.counts, 3)
    for level, (part, (height, width)) in enumerate(zip(parts, case.shapes, strict=True)):
        size = part.new_tensor([width, height])
        if case.reference == IMAGE:
            yield part
        elif case.reference == GRID:
            pixel = torch.arange(part.shape[1])
            centre = torch.stack([pixel % width, pixel // width], -1) + 0.5
            yield (centre[:, None, None] + part) / size
        else:
            reference = inputs.reference[:, :, None, level, None]
            step = 1 / size if case.reference == POINTS else reference[..., 2:] * 0.5 / part.shape[3]
            yield reference[..., :2] + part * step


def published(case, inputs):
    """The output and every gradient by ``ms_deform_attn_core_pytorch``."""
    value, sampling, logits = [tensor.detach() for tensor in inputs.value], inputs.sampling, inputs.logits
    leaves = {f"grad value {level}": tensor for level, tensor in enumerate(value)}
    leaves |= {"grad sampling": sampling.detach(), "grad logits": logits.detach()}
    if inputs.reference is not None:
        leaves["grad reference"] = inputs.reference.detach()

    def forward():
        given = inputs._replace(sampling=leaves["grad sampling"], reference=leaves.get("grad reference"))
        weights = leaves["grad logits"]
        weights = weights.flatten(3).softmax(-1) if case.softmax else weights.flatten(3)
        levels = value[0].split([height * width for height, width in case.shapes], 1) if case.joined else value
        return plain_torch.deform_attn_core(
            levels, case.shapes, list(locations(case, given)), weights.split(case.counts, 3)
        )

    return results(forward, leaves, inputs.grad_out)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_public_code(impl, case):
    inputs = case.draw(seeded(), torch.float32, "cpu").double()
    expected = published(case, inputs)
    actual = case.run(inputs, impl)
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert relative_error(actual[name], right) <= 1e-12, name


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(impl, corner):
    corner(impl, None if impl == "reference" else registry.operators()["deform_attn"].implementation(impl), "cpu")


def test_offsets_of_a_grid_are_not_rounded_as_positions_in_the_image_are(impl):
    """At the far end of a wide map, a position in fp32 has 11 bits of fraction left, and an offset all of them."""
    width = 8192
    value = torch.arange(float(width)).view(1, width, 1, 1)
    offset = torch.full((1, width, 1, 1, 1, 2), 2.0**-20)
    offset[..., 1] = 0
    offset.requires_grad_()
    logits = torch.ones(1, width, 1, 1, 1)
    out = ik.deform_attn(value.double(), [(1, width)], offset.double(), logits.double(), softmax=False, impl=impl)
    assert torch.equal(out[0, :-1, 0], torch.arange(width - 1) + torch.tensor(2.0**-20, dtype=torch.float64))
    value = torch.zeros(1, width, 1, 1)
    value[0, -1] = 2.0**20
    out = ik.deform_attn(value, [(1, width)], offset, logits, softmax=False, impl=impl)
    assert out[0, -2, 0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_of_a_16_bit_host_are_taken_as_they_are_and_used_in_fp32(impl, dtype):
    inputs = draw(dtype=dtype)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.sampling, inputs.logits)]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    found = []
    for sampling, logits in (narrow, wide):
        out = ik.deform_attn(inputs.value, SMALL[0].shapes, sampling, logits, impl=impl)
        assert out.dtype == dtype
        found.append([out, *torch.autograd.grad(out, [*inputs.value, sampling, logits], inputs.grad_out)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    assert found[0][2].dtype == dtype and found[1][2].dtype == torch.float32


def test_autocast_changes_nothing(impl):
    for dtype in (torch.float32, torch.bfloat16):
        case, inputs = SMALL[3], SMALL[3].draw(seeded(), dtype, "cpu")
        expected = case.run(inputs, impl)
        with torch.autocast("cpu", torch.bfloat16):
            for name, actual in case.run(inputs, impl).items():
                assert actual.dtype == expected[name].dtype and torch.equal(actual, expected[name]), name


@KERNELS
def test_nothing_but_the_arguments_is_kept_for_the_backward(impl):
    for case in SMALL:
        inputs, kept = draw(case), []
        reference = {GRID: GRID, IMAGE: None}.get(case.reference, inputs.reference)
        arguments = {t.data_ptr() for t in (*inputs.value, inputs.sampling, inputs.logits)}
        arguments |= set() if inputs.reference is None else {inputs.reference.data_ptr()}
        points = None if isinstance(case.points, int) else case.points
        value = inputs.value[0] if case.joined else inputs.value
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ik.deform_attn(
                value, case.shapes, inputs.sampling, inputs.logits, points=points, reference=reference, impl=impl
            )
        assert {t.data_ptr() for t in kept} == arguments, case.name


@KERNELS
def test_the_values_are_not_kept_where_only_they_need_a_gradient(impl):
    inputs, kept = draw(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ik.deform_attn(inputs.value, SMALL[0].shapes, inputs.sampling.detach(), inputs.logits.detach(), impl=impl)
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in inputs.value}
    (grad,) = torch.autograd.grad(out, inputs.value, inputs.grad_out)
    assert torch.equal(grad, SMALL[0].run(inputs, impl)["grad value 0"])


@pytest.mark.plain_memory
@KERNELS
def test_memory_stays_near_that_of_the_arguments_and_results(impl, restored_threads):
    torch.set_num_threads(2)  # each has some of its own
    case = DeformCase("", 1, ((16, 16),) * 4, 8, 32)
    inputs = draw(case)
    leaves = [*inputs.value, inputs.sampling, inputs.logits]
    given = sum(leaf.nbytes for leaf in leaves)
    out, memory = measure_memory(lambda: ik.deform_attn(inputs.value, case.shapes, *leaves[4:], impl=impl))
    assert memory.kept <= out.nbytes + 8192
    assert memory.peak + given <= 1.3 * (given + out.nbytes)
    grads, memory = measure_memory(lambda: torch.autograd.grad(out, leaves, inputs.grad_out))
    assert memory.peak + given + out.nbytes <= 1.3 * (given + out.nbytes + sum(grad.nbytes for grad in grads))


def tracer(impl):
    """Counts graphs. Operators are traced with their backward; plain torch's own would take seconds."""
    torch.compiler.reset()
    return CompileCounterWithBackend("eager" if impl == "reference" else "aot_eager")


@pytest.mark.plain_memory
def test_one_graph_serves_every_batch_and_number_of_queries(impl):
    counter = tracer(impl)

    def step(value, sampling, logits, reference):
        return ik.deform_attn(value, [(4, 5), (2, 3)], sampling, logits, reference=reference, impl=impl).square().sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for batch, queries in ((3, 7), (5, 11), (9, 12)):
        case = DeformCase("", batch, ((4, 5), (2, 3)), 2, 8, 2, POINTS, queries, joined=True)
        inputs = draw(case)
        leaves = [inputs.value[0], inputs.sampling, inputs.logits, inputs.reference.requires_grad_()]
        losses = [function(*leaves) for function in (compiled, step)]
        torch.testing.assert_close(*losses)
        for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.plain_memory
def test_one_graph_serves_maps_of_every_size(impl):
    counter = tracer(impl)

    def step(pixels, sampling, logits):
        height, width = pixels.shape[1:3]
        return ik.deform_attn([pixels.flatten(1, 2)], [(height, width)], sampling, logits, impl=impl).square().sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((4, 6), (7, 5), (3, 9)):
        inputs = draw(DeformCase("", 2, (shape,), 2, 8, 3))
        leaves = [inputs.value[0].detach().unflatten(1, shape).requires_grad_(), inputs.sampling, inputs.logits]
        losses = [function(*leaves) for function in (compiled, step)]
        torch.testing.assert_close(*losses)
        for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_can_be_recomputed_in_the_backward(impl, use_reentrant):
    case, inputs = SMALL[0], draw()
    expected = case.run(inputs, impl)
    value, sampling, logits = (tensor.detach().requires_grad_() for tensor in (*inputs.value, *inputs[1:3]))

    def call(value, sampling, logits):
        return ik.deform_attn(value, case.shapes, sampling, logits, impl=impl)

    checkpoint(call, value, sampling, logits, use_reentrant=use_reentrant).backward(inputs.grad_out)
    for name, leaf in {"value 0": value, "sampling": sampling, "logits": logits}.items():
        assert torch.equal(leaf.grad, expected[f"grad {name}"])


def test_threads_that_call_at_once_get_their_own_results(impl):
    drawn = [(case, case.draw(seeded(client), torch.float32, "cpu")) for client, case in enumerate(SMALL[:4])]
    expected = [case.run(inputs, impl) for case, inputs in drawn]

    def client(i):
        return [drawn[i][0].run(drawn[i][1], impl) for _ in range(5)]

    for right, found in zip(expected, in_threads(client), strict=True):
        for actual in found:
            assert all(torch.equal(actual[name], right[name]) for name in right)


def test_arguments_of_inference_mode_are_taken(impl):
    with torch.inference_mode():
        inputs = SMALL[4].draw(seeded(), torch.float32, "cpu")
    leaf = inputs.logits.clone().requires_grad_()
    options = {"points": SMALL[4].points, "reference": inputs.reference, "impl": impl}
    out = ik.deform_attn(inputs.value, SMALL[4].shapes, inputs.sampling, leaf, **options)
    (grad,) = torch.autograd.grad(out, leaf, inputs.grad_out.clone())
    assert torch.equal(grad, SMALL[4].run(inputs._make(_normal(each) for each in inputs), impl)["grad logits"])


def _normal(given):
    return [tensor.clone() for tensor in given] if isinstance(given, list) else given.clone()


def test_the_reference_has_second_derivatives_and_kernels_say_that_they_have_none(impl):
    case = DeformCase("", 1, ((2, 3),), 1, 2, 2, BOXES, 2)
    inputs = case.draw(seeded(), torch.float32, "cpu").double()
    leaves = [tensor.requires_grad_() for tensor in (*inputs.value, *inputs[1:4])]

    def call(value, sampling, logits, reference):
        return ik.deform_attn(value, case.shapes, sampling, logits, reference=reference, impl=impl)

    if impl == "reference":
        torch.autograd.gradgradcheck(call, leaves)
        return
    grads = torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only; impl='reference' can be"):
        grads[1].sum().backward()


def test_meta_tensors_have_the_shape(impl):
    meta = [torch.empty(shape, device="meta") for shape in ((2, 26, 4, 8), (1, 7, 4, 2, 3, 2), (1, 7, 4, 2, 3))]
    assert ik.deform_attn(meta[0], [(4, 5), (2, 3)], *meta[1:], reference=None).shape == (2, 7, 32)


VALUE, SAMPLING, LOGITS = torch.ones(2, 6, 2, 4), torch.zeros(2, 6, 2, 1, 3, 2), torch.zeros(2, 6, 2, 1, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shapes": torch.tensor([[2, 3]])}, TypeError, r"shapes: need a sequence of \(H, W\).*tolist\(\)"),
        ({"shapes": 6}, TypeError, r"shapes: need a sequence of \(H, W\), as Python integers, got int"),
        ({"shapes": []}, ValueError, r"shapes: need \(H, W\) of at least one level"),
        ({"shapes": [(0, 6)]}, ValueError, "shapes: .* each at least 1"),
        ({"shapes": [(2, 2)]}, ValueError, r"value: need shape \[B, 4, Hd, dh\] by shapes, .* got \[2, 6, 2, 4\]"),
        ({"value": VALUE[..., 0]}, ValueError, "value: need shape"),
        ({"value": VALUE[:, :, :0]}, ValueError, "value: need shape .* with at least one head"),
        ({"value": VALUE.int()}, TypeError, "value: need a floating tensor"),
        ({"value": [VALUE, VALUE]}, ValueError, "value: need 1 tensors, one for each level of shapes, got 2"),
        ({"value": [None]}, TypeError, r"value\[0\]: need a floating tensor"),
        (
            {"value": [VALUE, VALUE.half()], "shapes": [(2, 3), (3, 2)]}, ValueError,
            r"value\[1\]: need batch, heads, width, dtype and device of the first level, got .*float16",
        ),
        ({"sampling": None}, TypeError, "sampling: need a floating tensor"),
        ({"sampling": SAMPLING.to("meta")}, ValueError, "sampling: need device cpu as value, got meta"),
        ({"sampling": SAMPLING[:, :, :1]}, ValueError, r"sampling: need shape \[2 or 1, Q, 2, 1, 3, 2\], got"),
        ({"sampling": SAMPLING[:, :, :, 0]}, ValueError, r"sampling: need shape .* \(or points=\), got"),
        ({"sampling": SAMPLING.repeat(2, 1, 1, 1, 1, 1)}, ValueError, r"sampling: need shape \[2 or 1, Q,"),
        ({"sampling": SAMPLING[..., :1]}, ValueError, r"sampling: need shape .* 2\], got"),
        ({"logits": LOGITS[:, :5]}, ValueError, r"logits: need shape \[2 or 1, 6, 2, 1, 3\], got \[2, 5, 2, 1, 3\]"),
        ({"logits": LOGITS.long()}, TypeError, "logits: need a floating tensor"),
        ({"points": [1, 2]}, ValueError, r"points: need one number for each of the 1 levels, got \[1, 2\]"),
        ({"points": [-1]}, ValueError, "points: need one number for each"),
        ({"points": [2]}, ValueError, r"sampling: need shape \[2 or 1, Q, 2, 2, 2\]"),
        ({"reference": "pixel"}, ValueError, "reference: got 'pixel', need 'grid', None or a tensor"),
        ({"reference": torch.ones(2, 6, 1, 3)}, ValueError, r"reference: need shape .* 1 or 1, 2 or 4\], got"),
        ({"reference": torch.ones(2, 5, 1, 2)}, ValueError, r"reference: need shape \[2 or 1, 6, "),
        ({"reference": torch.ones(2, 6, 1, 2).int()}, TypeError, "reference: need 'grid', None or a tensor; "),
        ({"reference": torch.ones(2, 6, 1, 2, device="meta")}, ValueError, "reference: need device cpu"),
        (
            {"sampling": SAMPLING[:, :5], "logits": LOGITS[:, :5]}, ValueError,
            r"shapes: with reference='grid' every level needs 5 pixels, one for each query of sampling, got \[\(2,",
        ),
        ({"impl": "fast"}, ValueError, "impl: got 'fast'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(change, error, message):
    given = {"value": VALUE, "shapes": [(2, 3)], "sampling": SAMPLING, "logits": LOGITS} | change
    with pytest.raises(error, match=message):
        ik.deform_attn(**given)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"value": [torch.ones(2, 5, 2, 4)]}, "value"),
        ({"value": [torch.ones(1, 6, 2, 4)]}, "value"),
        ({"value": [torch.ones(2, 6, 3, 4)]}, "value"),
        ({"sampling": torch.zeros(2, 6, 2, 2, 2)}, "sampling"),
        ({"sampling": torch.zeros(2, 6, 2, 3, 2).half()}, "sampling"),
        ({"logits": torch.zeros(2, 6, 2, 2)}, "logits"),
        ({"points": [4]}, "sampling"),
        ({"points": [1, 2]}, "points"),
        ({"shapes": [2, 4]}, "value"),
        ({"origin": POINTS}, "reference"),
        ({"reference": torch.ones(2, 6, 1, 2)}, "reference"),
        ({"reference": torch.ones(2, 6, 1, 2), "origin": BOXES}, "reference"),
        ({"sampling": torch.zeros(2, 5, 2, 3, 2), "logits": torch.zeros(2, 5, 2, 3)}, "shapes"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
@KERNELS
def test_a_direct_call_reads_no_memory_that_is_not_its_arguments(impl, change, argument, backward):
    given = {
        "value": [VALUE], "sampling": SAMPLING[:, :, :, 0], "logits": LOGITS[:, :, :, 0], "reference": None,
        "shapes": [2, 3], "points": [3], "origin": GRID, "softmax": True,
    } | change  # fmt: skip
    operator = torch.ops.igva_kernels.deform_attn
    if backward:
        grad = torch.ones(2, given["sampling"].shape[1], 8)
        operator = torch.ops.igva_kernels.deform_attn_backward
        given = {"grad": grad, **given, "num_values": 1, "needs": [True, True, True, False]}
    with pytest.raises(ValueError, match=f"{argument}: need"):
        operator(*given.values(), impl)


@KERNELS
def test_a_backward_reads_no_more_of_the_gradient_than_it_has(impl):
    for shape in ((2, 5, 8), (1, 6, 8), (2, 6, 6), (2, 6, 16)):
        with pytest.raises(ValueError, match="grad: need"):
            torch.ops.igva_kernels.deform_attn_backward(
                torch.ones(shape), [VALUE], SAMPLING[:, :, :, 0], LOGITS[:, :, :, 0], None, [2, 3], [3], GRID, True, 1,
                [True, True, True, False], impl,
            )  # fmt: skip
