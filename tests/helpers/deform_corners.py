"""What every backend must do with positions at and beyond the edges of a map, at the kinks of bilinear interpolation,
and with numbers that are not finite; each is a test.

Most values are small whole numbers and most positions are multiples of a power of two, so that no sum is rounded: every
backend must then have the very numbers of the specification in fp64.
"""

from functools import partial

import harness
import strides
import torch
import torch.nn.functional as F
from seeds import seeded

import igva_kernels as ik
from igva_kernels import registry
from igva_kernels.ops.deform_attn.cases import DeformCase
from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS, Geometry
from igva_kernels.testing import relative_error

NAN, INF = float("nan"), float("inf")
HEIGHT, WIDTH = 2, 4
"""Of the map: powers of two, with which a position from 0 to 1 is exact."""
CENTRE, BOX = (0.25, 0.5), (0.5, 1.0)
"""A reference that is exact in pixels, (0.5, 0.5), and a box whose half is a pixel in both directions."""
ORIGINS = (GRID, IMAGE, POINTS, BOXES)

NOWHERE = [(-2, 0), (4, 1), (1, -3), (2, 2), (-INF, 0.5), (1e30, 0.25), (0, INF), (-1e30, -INF)]
"""Positions that read nothing and whose derivative is zero, one for each pixel."""
EDGES = [(-1, 0), (-0.5, -0.5), (3, 1), (3.5, 0.5), (1, -1), (0.25, -0.75), (2, 1), (0, 1.5)]
"""Positions some corners of which are outside."""


def ramp(device, width=1):
    """A map of whole numbers ``[1, 8, 1, width]``, no two of which differ by the same."""
    return torch.tensor([1.0, -2, 5, 9, -7, 3, -1, 8], device=device).view(1, -1, 1, 1).repeat(1, 1, 1, width)


def own_pixels(device):
    """The pixel (x, y) of each query on a grid."""
    query = torch.arange(HEIGHT * WIDTH, device=device)
    return torch.stack([query % WIDTH, query // WIDTH], -1).float()


def placed(positions, origin, device):
    """``sampling`` that says where each of 8 queries reads, in pixels, and the reference that it counts from."""
    positions = torch.as_tensor(positions, dtype=torch.float32, device=device)
    size, reference = torch.tensor([WIDTH, HEIGHT], device=device), None
    if origin == GRID:
        positions, reference = positions - own_pixels(device), GRID
    elif origin == IMAGE:
        positions = (positions + 0.5) / size
    else:
        positions = positions - 0.5
        place = CENTRE if origin == POINTS else (*CENTRE, *BOX)
        reference = torch.tensor(place, device=device).expand(1, len(positions), 1, -1)
    return positions.view(1, -1, 1, 1, 1, 2), reference


def step(impl, value, shapes, sampling, logits, reference, grad=None, **options):
    """The output, and the gradients of what a call is given, by name."""
    value = [value] if isinstance(value, torch.Tensor) else list(value)
    leaves = {f"value {level}": tensor.detach() for level, tensor in enumerate(value)}
    leaves |= {"sampling": sampling.detach(), "logits": logits.detach()}
    if isinstance(reference, torch.Tensor):
        reference = leaves["reference"] = reference.detach()
    for leaf in leaves.values():
        leaf.requires_grad_()
    sampling, logits, value = leaves["sampling"], leaves["logits"], list(leaves.values())[: len(value)]
    out = ik.deform_attn(value, shapes, sampling, logits, reference=reference, impl=impl, **options)
    grad = torch.ones_like(out) if grad is None else grad
    return {"output": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], grad), strict=True))


def read(impl, positions, origin, device, factor=1.0, value=None):
    """``step`` of one point of one head for each pixel, of this weight."""
    value = ramp(device) if value is None else value
    sampling, reference = placed(positions, origin, device)
    logits = torch.full(sampling.shape[:-1], factor, device=device)
    return step(impl, value, [(HEIGHT, WIDTH)], sampling, logits, reference, softmax=False)


def is_served(impl, device, dtype):
    operator = registry.operators()["deform_attn"]
    return operator.why_not(impl, torch.device(device), dtype) is None


def assert_equal(actual, expected):
    for name, right in expected.items():
        assert torch.equal(actual[name].double(), right.double()), name


def positions_beyond_every_side_read_nothing(impl, implementation, device):
    for origin in ORIGINS:
        found = read(impl, NOWHERE, origin, device)
        if origin == BOXES:  # an infinite offset times zero, in the gradient of the box
            assert not found.pop("reference")[..., :2].any()
        for name, result in found.items():
            assert not result.any(), (origin, name)


def positions_at_every_side_read_the_corners_that_are_inside(impl, implementation, device):
    for origin in ORIGINS:
        expected = read("reference", EDGES, origin, device, 2.0, ramp(device).double())
        assert_equal(read(impl, EDGES, origin, device, 2.0), expected)
        left_of_the_map, above_the_map = (expected["sampling"].flatten(0, -2)[query] for query in (0, 4))
        assert left_of_the_map[0] and above_the_map[1] and not expected["output"][0, [0, 4]].any()


def at_a_kink_the_derivative_is_that_to_the_right_and_below(impl, implementation, device):
    value = ramp(device)
    around = F.pad(value.view(HEIGHT, WIDTH), (1, 1, 1, 1))
    here = around[1:-1, 1:-1]
    forward = torch.stack([around[1:-1, 2:] - here, around[2:, 1:-1] - here], -1)
    backward = torch.stack([here - around[1:-1, :-2], here - around[:-2, 1:-1]], -1)
    scales = {GRID: (1, 1), IMAGE: (WIDTH, HEIGHT), POINTS: (1, 1), BOXES: (1, 1)}
    for origin in ORIGINS:
        found = read(impl, own_pixels(device), origin, device)
        assert torch.equal(found["output"].view(HEIGHT, WIDTH), here)
        assert torch.equal(found["sampling"].view(HEIGHT, WIDTH, 2), forward * torch.tensor(scales[origin]).to(device))
    # A position in fp32 would be rounded to the pixel; the offset says that it is before it.
    little = torch.full((1, HEIGHT * WIDTH, 1, 1, 1, 2), -1e-9, device=device)
    found = step(impl, value, [(HEIGHT, WIDTH)], little, torch.ones_like(little[..., 0]), GRID, softmax=False)
    assert torch.equal(found["output"].view(HEIGHT, WIDTH), here)
    assert torch.equal(found["sampling"].view(HEIGHT, WIDTH, 2), backward)


def a_nan_stays_with_its_query_and_head(impl, implementation, device):
    generator = torch.Generator().manual_seed(seeded())
    shape = (1, HEIGHT * WIDTH, 2, 1, 3, 2)
    clean = (torch.rand(shape, generator=generator) - 0.5).to(device)
    logits = torch.randn(shape[:-1], generator=generator).to(device)
    value = torch.randn(1, HEIGHT * WIDTH, 2, 3, generator=generator).to(device)
    wrong = torch.zeros(shape[1:3], dtype=torch.bool, device=device)
    wrong[3, 1] = wrong[5, 0] = wrong[6, 0] = True
    sampling, outside = clean.clone(), clean.clone()
    sampling[0, 3, 1, 0, 0, 0] = sampling[0, 5, 0, 0, 2, 1] = sampling[0, 6, 0, 0, 1] = NAN
    outside[sampling.isnan().any(-1)] = INF
    run = partial(step, impl, value, [(HEIGHT, WIDTH)])
    found, expected = run(sampling, logits, GRID), run(outside, logits, GRID)
    output, right = (result["output"].view(*wrong.shape, -1) for result in (found, expected))
    assert output[wrong].isnan().all() and torch.equal(output[~wrong], right[~wrong])
    assert found["logits"][0, wrong].isnan().all()
    assert torch.equal(found["logits"][0, ~wrong], expected["logits"][0, ~wrong])
    is_nan = sampling.isnan().any(-1)
    assert torch.equal(found["sampling"].isnan().any(-1), is_nan)
    assert torch.equal(found["sampling"][~is_nan], expected["sampling"][~is_nan])
    assert torch.equal(found["value 0"], expected["value 0"])


def a_weight_that_is_nan_shows_even_where_nothing_is_read(impl, implementation, device):
    sampling = torch.full((1, HEIGHT * WIDTH, 1, 1, 2, 2), 99.0, device=device)
    logits = torch.zeros(sampling.shape[:-1], device=device)
    logits[0, 4, 0, 0, 1] = NAN
    for softmax in (True, False):
        out = ik.deform_attn(ramp(device), [(HEIGHT, WIDTH)], sampling, logits, softmax=softmax, impl=impl)
        assert out[0].isnan().any(-1).nonzero().flatten().tolist() == [4]
        assert not out[0, 5:].any() and not out[0, :4].any()


def what_is_not_finite_is_never_hidden_by_a_gradient(impl, implementation, device):
    """A kernel may let it spread over the gradients of the levels, but not make it a number."""
    value = ramp(device, 2)
    sampling = torch.full((1, HEIGHT * WIDTH, 1, 1, 2, 2), 0.25, device=device)
    for bad in (NAN, INF):
        logits, grad = torch.zeros_like(sampling[..., 0]), torch.ones(1, HEIGHT * WIDTH, 2, device=device)
        logits[0, 2, 0, 0, 1] = bad
        found = step(impl, value, [(HEIGHT, WIDTH)], sampling, logits, GRID, grad)
        assert found["output"][0, 2].isnan().all() and found["output"][0, 3:].isfinite().all()
        assert not found["value 0"][0, 2].isfinite().any()
        logits[0, 2, 0, 0, 1], grad[0, 2] = 0, bad
        found = step(impl, value, [(HEIGHT, WIDTH)], sampling, logits, GRID, grad)
        assert not found["value 0"][0, 2].isfinite().any() and not found["sampling"][0, 2].isfinite().any()
        assert found["sampling"][0, 3:].isfinite().all()


def a_pixel_that_nobody_reads_may_be_nan(impl, implementation, device):
    """Pixel 0, at which a kernel may read in the place of what is outside, and a neighbour of what is read."""
    positions = [(2.5, 0.5), (2, 0), (9, 0), (-9, -9), (1e30, 0), (3.5, 1.5), (2.25, 1.5), (3, -1.5)]
    for bad in (NAN, INF):
        value, clean = ramp(device), ramp(device)
        value[0, 0] = value[0, 1] = value[0, 5] = bad
        for origin in ORIGINS:
            expected = read(impl, positions, origin, device, value=clean)
            assert_equal(read(impl, positions, origin, device, value=value), expected)


def many_points_may_read_one_pixel(impl, implementation, device):
    positions = torch.full((HEIGHT * WIDTH, 2), 0.5)
    positions[5] = torch.tensor([2.75, 0.5])
    for origin in ORIGINS:
        expected = read("reference", positions, origin, device, 4.0, ramp(device).double())
        assert_equal(read(impl, positions, origin, device, 4.0), expected)


def a_weight_of_zero_has_a_gradient_and_passes_none_on(impl, implementation, device):
    positions = [(0.5, 0.5)] * (HEIGHT * WIDTH)
    found = read(impl, positions, GRID, device, 0.0)
    assert not any(found[name].any() for name in ("output", "value 0", "sampling"))
    assert torch.equal(found["logits"], read(impl, positions, GRID, device, 1.0)["logits"]) and found["logits"].all()


def a_point_that_the_softmax_leaves_out_changes_nothing(impl, implementation, device):
    sampling = torch.full((1, HEIGHT * WIDTH, 1, 1, 2, 2), 0.25, device=device)
    sampling[..., 1, :] = -0.75
    logits = torch.zeros_like(sampling[..., 0])
    logits[..., 1] = -INF
    run = partial(step, impl, ramp(device), [(HEIGHT, WIDTH)])
    found, alone = run(sampling, logits, GRID), run(sampling[..., :1, :], logits[..., :1], GRID)
    for name in ("output", "value 0"):
        assert torch.equal(found[name], alone[name]), name
    for name in ("sampling", "logits"):
        assert torch.equal(found[name][:, :, :, :, :1], alone[name]), name
        assert not found[name][:, :, :, :, 1:].any(), name


def empty_tensors_give_what_plain_torch_gives(impl, implementation, device):
    for case in (
        DeformCase("no image", 0, ((2, 3),), 2, 4, 2),
        DeformCase("no query", 2, ((2, 3),), 2, 4, 2, BOXES, 0),
        DeformCase("no channel", 2, ((2, 3),), 2, 0, 2),
        DeformCase("no point", 2, ((2, 3), (3, 2)), 2, 4, (0, 0)),
    ):
        inputs = case.draw(seeded(), torch.float32, device)
        expected = case.run(inputs, "reference")
        for name, actual in case.run(inputs, impl).items():
            assert torch.equal(actual, expected[name]), (case.name, name)


SMALL = (
    DeformCase("one pixel", 2, ((1, 1),), 2, 4, 2),
    DeformCase("one channel, one row, one column", 2, ((1, 4), (4, 1)), 2, 1, 2),
    DeformCase("levels without points", 1, ((2, 3), (3, 2), (1, 6)), 2, 5, (2, 0, 3), BOXES, 4),
    DeformCase("more points than a vector has lanes", 1, ((2, 2), (1, 3)), 1, 8, (40, 33), IMAGE, 3),
    DeformCase("a head of three channels in boxes", 1, ((3, 2), (2, 2)), 2, 3, (1, 2), BOXES, 3, softmax=False),
)


def small_and_uneven_shapes_obey_the_error_rule(impl, implementation, device):
    for case in SMALL:
        harness.assert_right(case, "bf16", impl, device, seeded())


def fp64_is_computed_in_fp64(impl, implementation, device):
    if not is_served(impl, device, torch.float64):
        return
    for case in (SMALL[1], SMALL[4]):
        inputs = case.draw(seeded(), torch.float32, device).double()
        expected = case.run(inputs, "reference")
        for name, actual in case.run(inputs, impl).items():
            assert actual.dtype == torch.float64 and relative_error(actual, expected[name]) <= 1e-12, (case.name, name)


def every_image_and_head_has_gradients_as_exact_as_if_it_were_alone(impl, implementation, device):
    """Losses of very different weight: a sum in fixed point would lose the smaller."""
    case = DeformCase("", 2, ((2, 4),), 2, 4, 2)
    inputs = case.draw(seeded(), torch.float32, device)
    scale = torch.tensor([[1.0, 2.0**-30], [2.0**-40, 2.0**20]], device=device)
    scaled = inputs._replace(grad_out=(inputs.grad_out.unflatten(2, (2, -1)) * scale[:, None, :, None]).flatten(2))
    together, alone = case.run(scaled, impl), case.run(inputs, impl)
    grads = together["grad value 0"] / scale[:, None, :, None]
    assert relative_error(grads, alone["grad value 0"]) <= 1e-6


def only_what_is_needed_is_computed(impl, implementation, device):
    case = DeformCase("", 1, ((2, 3), (3, 2)), 2, 4, 2, POINTS, 3)
    inputs = case.draw(seeded(), torch.float32, device)
    everything = case.run(inputs, impl)
    for only in ([name] for name in everything if name != "output"):
        (alone,) = case.run(inputs, impl, only).values()
        assert torch.equal(alone, everything[only[0]]), only
    if implementation is None:
        return
    geometry = Geometry(case.shapes, case.counts, case.reference, case.softmax)
    rows = [tensor.flatten(2) for tensor in (inputs.sampling, inputs.logits, inputs.reference)]
    grads = [torch.full_like(level, NAN) for level in inputs.value]
    gradient = partial(implementation.attend_grad, inputs.grad_out)
    assert gradient(None, *rows, geometry, grads, (False, False), False) == (None, None)
    of_sampling, none = gradient(inputs.value, *rows, geometry, None, (True, False), False)
    also_none, of_logits = gradient(inputs.value, *rows, geometry, None, (False, True), False)
    assert none is None and also_none is None
    results = {"sampling": of_sampling, "logits": of_logits, "value 0": grads[0], "value 1": grads[1]}
    for name, result in results.items():
        expected = everything[f"grad {name}"]
        assert torch.equal(result.view(expected.shape), expected), name


def positions_in_pixels_have_their_gradient_in_pixels(impl, implementation, device):
    if implementation is None:
        return
    for origin in ORIGINS:
        sampling, reference = placed(EDGES, origin, device)
        geometry = Geometry(((HEIGHT, WIDTH),), (1,), origin, False)
        rows = [sampling.flatten(2), torch.ones(1, HEIGHT * WIDTH, 1, device=device)]
        rows += [reference.flatten(2) if isinstance(reference, torch.Tensor) else None]
        grad, needs = torch.ones(1, HEIGHT * WIDTH, 1, device=device), (True, False)
        found, _ = implementation.attend_grad(grad, [ramp(device)], *rows, geometry, None, needs, True)
        expected = read("reference", EDGES, GRID, device)["sampling"]
        assert torch.equal(found.view(expected.shape), expected), origin


def levels_and_arguments_may_have_any_strides(impl, implementation, device):
    case = DeformCase("", 2, ((2, 3), (3, 2)), 2, 4, 2, POINTS, 4)
    inputs = case.draw(seeded(), torch.float32, device)
    layouts = list(strides.LAYOUTS.values())
    for at in range(0, len(layouts), 2):
        first, second = layouts[at], layouts[(at + 1) % len(layouts)]
        moved = inputs._replace(
            value=[first(inputs.value[0]), second(inputs.value[1])], sampling=second(inputs.sampling),
            logits=first(inputs.logits), reference=second(inputs.reference), grad_out=first(inputs.grad_out),
        )  # fmt: skip
        dense = moved._replace(
            value=[level.contiguous() for level in moved.value], sampling=moved.sampling.contiguous(),
            logits=moved.logits.contiguous(), reference=moved.reference.contiguous(),
            grad_out=moved.grad_out.contiguous(),
        )  # fmt: skip
        expected = case.run(dense, impl)
        for name, actual in case.run(moved, impl).items():
            assert torch.equal(actual, expected[name]), name


def the_batch_of_sampling_logits_and_reference_may_be_one(impl, implementation, device):
    case = DeformCase("", 2, ((2, 3), (1, 2)), 2, 4, 2, BOXES, 3)
    inputs = case.draw(seeded(), torch.float32, device)
    given = [tensor[:1] for tensor in (inputs.sampling, inputs.logits, inputs.reference)]
    for tensors in (given, [tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in given]):
        found = step(impl, inputs.value, case.shapes, *tensors, inputs.grad_out)
        if tensors is given:
            ones = found
    assert torch.equal(ones["output"], found["output"])
    for name in ("sampling", "logits", "reference"):
        torch.testing.assert_close(ones[name], found[name].sum(0, keepdim=True))


CORNERS = (
    positions_beyond_every_side_read_nothing,
    positions_at_every_side_read_the_corners_that_are_inside,
    at_a_kink_the_derivative_is_that_to_the_right_and_below,
    a_nan_stays_with_its_query_and_head,
    a_weight_that_is_nan_shows_even_where_nothing_is_read,
    what_is_not_finite_is_never_hidden_by_a_gradient,
    a_pixel_that_nobody_reads_may_be_nan,
    many_points_may_read_one_pixel,
    a_weight_of_zero_has_a_gradient_and_passes_none_on,
    a_point_that_the_softmax_leaves_out_changes_nothing,
    empty_tensors_give_what_plain_torch_gives,
    small_and_uneven_shapes_obey_the_error_rule,
    fp64_is_computed_in_fp64,
    every_image_and_head_has_gradients_as_exact_as_if_it_were_alone,
    only_what_is_needed_is_computed,
    positions_in_pixels_have_their_gradient_in_pixels,
    levels_and_arguments_may_have_any_strides,
    the_batch_of_sampling_logits_and_reference_may_be_one,
)
