"""tune: every job runs, and the file it writes is what a process then uses. The card and its times are made up."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from igva_kernels import registry
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime import config
from igva_kernels.runtime.backend import Backend

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from igva_kernels import tune
from igva_kernels.ops.weighted_mix.triton import cost, tuning
from igva_kernels.runtime.triton import cost as dense_cost

pytestmark = pytest.mark.interpreted


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("IGVA_KERNELS_CONFIG_DIR", str(tmp_path))
    facts = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_capability": lambda _: (9, 0),
        "get_device_name": lambda _: "Made-up Card 1",
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=4),
    }
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, fact)
    for module, small in (
        (tune, {"DEVICE": "cpu", "BATCHES": (1, 2), "ROWS": tune.ROWS[:2]}),
        (tuning, {"DEVICE": "cpu", "PATCHES": 4, "WIDTH": 32, "HIDDEN": 32}),
    ):
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    yield tmp_path
    config.of_device.cache_clear()


@pytest.fixture
def timed(card, monkeypatch):
    """Two small tiles per kernel, on a made-up clock; a third has more stages than the card has memory for."""
    rates = replace(config.shipped("sm_90").rates, sms=4, matmul_tflops=1.0)
    monkeypatch.setattr(tune, "_rates", lambda index: rates)
    tiles = [config.GemmConfig(32, 32, 32, 4, stages, 1, True, 1.0) for stages in (2, 3, 99)]
    monkeypatch.setattr(tune, "_with_neighbours", lambda given: tiles)
    ticks = iter(range(1, 10_000))

    def time_us(job):
        if job.args[0] == tiles[2]:
            raise OutOfResources(99, 1, "shared memory")
        job()
        return 5.0 + next(ticks) % 7

    monkeypatch.setattr(tune, "time_us", time_us)
    monkeypatch.setattr(tune, "wall_us", lambda job: 100.0)
    return rates


def test_a_tuned_card_uses_its_file(card, timed):
    shipped, lines = config.shipped("sm_90"), []
    path, tuned = tune.tune(log=lines.append)
    assert path == card / "Made_up_Card_1.json"
    assert tuned.to_json() == path.read_text() and tuned.faster_from == {}  # it does not measure these kernels
    assert config.of_device(0).to_json() == replace(tuned, faster_from=shipped.faster_from).to_json()
    assert tuned.status == "measured on Made-up Card 1"
    assert tuned.rates == timed
    assert set(tuned.gemms) == set(shipped.gemms)
    assert set(tuned.rows) == set(shipped.rows)
    assert all(1 <= len(tiles) <= 2 and max(tile.num_stages for tile in tiles) <= 3 for tiles in tuned.gemms.values())
    assert len(lines) >= 1 + len(tuned.rows) + len(tuned.gemms)


@pytest.mark.parametrize(
    ("times", "by_the_clock"),
    [({"slow": 7.0, "fast": 5.0}, {}), ({"slow": 5.0, "fast": 5.0}, {"slow": 400.0})],
    ids=["by its kernels", "by what a call takes the host"],
)
def test_auto_takes_the_backend_that_was_faster_on_this_card(times, by_the_clock, card, timed, monkeypatch):
    made_up = {name: Backend(name, rank, ("cuda", "cpu"), lambda *_: None) for rank, name in enumerate(times)}
    named = {name: SimpleNamespace(name=name, why_not=lambda *_: None) for name in times}
    weighted_mix = registry.operators()["weighted_mix"]
    monkeypatch.setattr(registry, "all_backends", lambda: made_up)
    monkeypatch.setattr(tune, "all_backends", lambda: made_up)
    monkeypatch.setattr(weighted_mix, "implementation", named.get)
    monkeypatch.setattr(tuning, "block", lambda implementation, batch: implementation.name)
    monkeypatch.setattr(tune, "time_us", lambda job: times.get(job, 6.0) if isinstance(job, str) else 6.0)
    monkeypatch.setattr(tune, "wall_us", lambda job: by_the_clock.get(job, 100.0))
    _, tuned = tune.tune()
    assert tuned.backends == ("fast", "slow")
    assert weighted_mix.select("auto", torch.device("cuda", 0), torch.bfloat16, ()) == "fast"


def test_a_write_that_breaks_off_leaves_the_earlier_file(card, timed, monkeypatch):
    path, _ = tune.tune()
    earlier = path.read_text()

    def write_half(self, text):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        tune.tune()
    assert path.read_text() == earlier


def test_a_file_that_does_not_know_the_fused_gemm_says_nothing_about_it(card):
    shipped = config.shipped("sm_90")
    written = json.loads(replace(shipped, status="measured on it").to_json())
    del written["faster_from"]
    (card / "Made_up_Card_1.json").write_text(json.dumps(written))
    assert config.of_device(0).status == "measured on it"
    assert config.of_device(0).faster_from == shipped.faster_from == {"weighted_mix.gemm_sm90": (9232, 2048)}


def test_a_kernel_that_was_written_later_takes_the_shipped_tiles(card):
    shipped = config.shipped("sm_90")
    rows = {name: row for name, row in shipped.rows.items() if name != "weighted_mix.layer_grads"}
    (card / "Made_up_Card_1.json").write_text(replace(shipped, status="measured on it", rows=rows).to_json())
    assert config.of_device(0).status == "measured on it"
    assert config.of_device(0).rows["weighted_mix.layer_grads"] == shipped.rows["weighted_mix.layer_grads"]


def test_a_file_of_an_earlier_version_with_kernels_and_rates_that_are_gone_is_read(card):
    shipped = config.shipped("sm_90")
    gone = {**shipped.gemms, "weighted_mix.mix_linear_mixed": shipped.gemms["linear"]}
    text = replace(shipped, gemms=gone).to_json().replace('"sms"', '"l2_gbps": 5500,\n  "sms"')
    (card / "Made_up_Card_1.json").write_text(text)
    assert "l2_gbps" in text
    assert config.of_device(0).rates == shipped.rates
    assert config.of_device(0).gemms["linear"] == shipped.gemms["linear"]


def test_a_modelled_file_with_an_efficiency_is_refused():
    with pytest.raises(ValueError, match="efficiency of 'linear': got one in a modelled configuration"):
        replace(config.shipped("sm_90"), status="modelled")


WRITTEN = config.shipped("sm_90").to_json()


@pytest.mark.parametrize(
    "text",
    ["", "{}", WRITTEN.replace("num_warps", "other"), WRITTEN.replace(f'"format": {config.FORMAT}', '"format": 1')],
)
def test_a_file_that_cannot_be_read_is_named(card, text):
    (card / "Made_up_Card_1.json").write_text(text)
    with pytest.raises(ValueError, match=r"Made_up_Card_1.json: .* `igva-kernels tune`"):
        config.of_device(0)


def test_an_operator_brings_the_tiles_of_its_own_kernels(card, timed, monkeypatch):
    """Where no file has them yet, ``tune`` starts from its module, and its kernels from their default or not at all."""
    own = config.GemmConfig(16, 16, 16, 4, 2, 1, False, 0.5)
    tried = []
    monkeypatch.setattr(tune, "_with_neighbours", lambda tiles: tried.append(tiles) or tiles)
    job = lambda batch: (lambda tile: None, (16 * batch, 16, 16))  # noqa: E731
    other = SimpleNamespace(ROW_JOBS={}, GEMM_JOBS={"other.product": job}, tiles=lambda name, shipped: (own,))
    monkeypatch.setattr(tune, "_tunings", lambda: [(None, other)])
    monkeypatch.setattr(tune, "all_backends", dict)
    with pytest.raises(NotImplementedError, match=r"Triton kernel 'other\.product'; `igva-kernels tune`"):
        config.of_device(0).gemms["other.product"]
    assert config.of_device(0).gemms.get("other.product", (own,)) == (own,)
    tune.tune()
    assert tried == [(own,)]
    (found,) = config.of_device(0).gemms["other.product"]
    assert replace(found, efficiency=0.5) == own
    assert config.of_device(0).gemms["linear"] == config.shipped("sm_90").gemms["linear"]


def test_without_a_card_it_says_so():
    with pytest.raises(RuntimeError, match="torch sees none"):
        tune.tune()


TAPS = MixPlan.concat(range(5), 5)


def products(model, batch, hidden, dtype=torch.bfloat16):
    """What every product that may be Triton's takes: a tile, or None for cuBLAS."""
    rows = batch * 576
    return {
        "linear": dense_cost.linear(model, rows, hidden, 2048, dtype, True),
        "linear_grad_input": dense_cost.linear_grad_input(model, rows, hidden, hidden, dtype, True, True),
        "mix_linear": cost.mix_linear(model, TAPS, 1024, rows, hidden, dtype, True, False),
        "mix_linear of one layer": cost.mix_linear(model, MixPlan.concat([3]), 1024, rows, hidden, dtype, True, False),
        "mix_linear with norm": cost.mix_linear(model, TAPS, 1024, rows, hidden, dtype, True, True),
    }


def with_efficiency(efficiency):
    shipped = config.shipped("sm_90")
    tiles = {name: tuple(replace(t, efficiency=efficiency) for t in ts) for name, ts in shipped.gemms.items()}
    return replace(shipped, gemms=tiles)


SHIPPED = sorted(path.stem for path in config.SHIPPED.glob("*.json"))
MEASURED = {"NVIDIA_H100_80GB_HBM3", "sm_90"}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_product_that_nobody_measured_on_such_a_card_displaces_cublas(name):
    model = config.shipped(name)
    chosen = [
        tile
        for batch in (1, 2, 3, 4, 8, 16, 32, 64, 128)
        for hidden in (512, 1024, 2048, 4096)
        for tile in products(model, batch, hidden).values()
    ]
    assert (model.status == "modelled") == (name not in MEASURED)
    if name in MEASURED:
        assert any(chosen)
    else:
        assert not any(chosen)


def test_a_measured_file_says_nothing_of_the_kernels_that_it_lacks(card, monkeypatch):
    """A card whose architecture is modelled, tuned before there was a kernel: that one stays cuBLAS's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    fast = with_efficiency(0.97)
    measured = replace(fast, gemms={"linear": fast.gemms["linear"]})
    (card / "Made_up_Card_1.json").write_text(measured.to_json())
    found = products(config.of_device(0), 64, 4096)
    assert found["linear"] is not None
    assert found["linear_grad_input"] is found["mix_linear"] is None


def test_choices_follow_what_was_measured():
    """More to save than to lose: fused; a kernel that is too slow: cuBLAS."""
    fast, slow = with_efficiency(0.97), with_efficiency(0.5)
    assert all(products(fast, 64, 4096).values())
    assert not any(products(slow, 64, 4096).values())
    # cuBLAS computes products without an activation and products in fp32; no GEMM mixes layers itself.
    assert not any(products(fast, 64, 4096, torch.float32).values())
    rows, dtype = 64 * 576, torch.bfloat16
    assert dense_cost.linear(fast, rows, 4096, 2048, dtype, False) is None
    for plan in (MixPlan.igva(), MixPlan.igva().reduced()[1]):
        assert cost.mix_linear(fast, plan, 1024, rows, 256, dtype, True, False) is None
