"""Strides: the registered operators of the Triton backend, all tensors at once in a layout of every kind."""

import pytest
import strides


@pytest.mark.parametrize("layout", ["column of a matrix", "expanded"])
@pytest.mark.parametrize("name", [*strides.REGISTERED, "allocate"])
def test_a_registered_operator_gives_what_it_gives_for_a_dense_copy(name, layout):
    arguments = strides.allocate_call("triton") if name == "allocate" else strides.registered_calls("triton")[name]
    strides.check_registered_at_once(name, arguments, layout)
