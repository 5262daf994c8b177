"""Settings: each out of range, of the wrong type, unknown; and the ways to build them."""

import dataclasses
import math

import pytest

from hybridcore import ConfigError, HybridTrainerConfig

BAD = {
    "enabled": [1, "yes", None],
    "warmup_steps": [0, -1, 1.5, True, "100", None],
    "min_full_steps": [3, -5, 50.0, True],
    "horizon": [0, -75, 7.5, None],
    "correction_interval": [0, 1.0, "15"],
    "confidence_threshold": [-0.1, 1.1, math.nan, math.inf, "0.6", True],
    "divergence_sigma": [0.0, -1.0, math.nan, math.inf, None],
    "snapshots": [3, 11, 6.0, True],
    "on_divergence": ["ignore", None, True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_values_name_setting_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        HybridTrainerConfig(**{name: value})
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(f"got {value!r}")


def test_every_setting_is_checked():
    assert {f.name for f in dataclasses.fields(HybridTrainerConfig)} == set(BAD)


def test_the_specification_s_defaults():
    config = HybridTrainerConfig()
    assert (config.warmup_steps, config.min_full_steps, config.horizon) == (100, 50, 75)
    assert (config.correction_interval, config.confidence_threshold) == (15, 0.60)
    assert config.divergence_sigma == 2.2
    assert HybridTrainerConfig.memory_saver().horizon == 15


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HybridTrainerConfig().horizon = 3


def test_round_trips(tmp_path):
    config = HybridTrainerConfig(horizon=30, on_divergence="raise", confidence_threshold=0.5)
    assert HybridTrainerConfig.from_dict(config.to_dict()) == config
    lines = 'horizon = 30\non_divergence = "raise"\nconfidence_threshold = 0.5\n'
    path = tmp_path / "settings.toml"
    for text in (lines, "[hybridcore]\n" + lines):
        path.write_text(text)
        assert HybridTrainerConfig.from_toml(path) == config


def test_unknown_and_broken(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown setting 'horizons'; known settings: .*horizon"):
        HybridTrainerConfig.from_dict({"horizons": 3})
    path = tmp_path / "settings.toml"
    path.write_text("horizon = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        HybridTrainerConfig.from_toml(path)


@pytest.mark.parametrize("snapshots", range(4, 11))
@pytest.mark.parametrize("full", [4, 5, 24, 50, 333])
def test_a_bank_fits_between_two_jumps_where_it_can(snapshots, full):
    config = HybridTrainerConfig(snapshots=snapshots, min_full_steps=full)
    assert config.snapshot_interval >= 1
    if full >= snapshots:
        assert config.snapshot_interval * (snapshots - 1) < full
