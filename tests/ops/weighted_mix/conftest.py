import harness
import pytest


@pytest.fixture(params=harness.impls("weighted_mix"))
def impl(request):
    """Every backend that serves CPU tensors in this process, the interpreted one in a process of its own."""
    return request.param


@pytest.fixture(params=harness.impls("weighted_mix", interpreted=False))
def quick_impl(request):
    """Those that need no interpreter: for what would take minutes in one."""
    return request.param
