"""What people run on a Llava, run on three models: a plain Llava, a patched one, the reference model.

Each test says with ``client_row`` which cell of docs/compatibility.md it stands for.
"""

import pytest
from compatibility import MODELS


@pytest.fixture
def client_row(record_property):
    """``client_row("bitsandbytes 4 bit", "patched")``: the outcome of this test goes into that row and column.

    Called first, so that a test that is skipped has its place. A third argument is what the cell says instead of "yes"
    if the test passes: "refused", where the right answer is an error.
    """

    def record(client: str, model: str, passed: str = "yes") -> None:
        assert model in MODELS, f"model: got {model!r}, need one of {MODELS}"
        for name, value in (("client", client), ("model", model), ("passed", passed)):
            record_property(name, value)

    return record
