"""Seeds that ``pytest --seed`` changes, in the processes that tests start as well."""

import os

VARIABLE = "IGVA_KERNELS_TEST_SEED"


def seeded(stream=0):
    """The seed of one of a thousand streams of random numbers."""
    return 1000 * int(os.environ.get(VARIABLE, "0")) + stream
