"""Settings: each out of range, of the wrong type, unknown; and the ways to build them."""

import contextlib
import dataclasses
import functools
import inspect
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    "dynamics": ["LINEAR", "", None, 1],
    "device": ["gpu", "cuda", None, 0],
    "group_correction": [0, 1, "yes", None],
    "outer_momentum": [0, 1, "yes", None],
    "averaging": [0, 1, "yes", None],
    "secant_pairs": [-1, 51, 2.0, True],
    "memory": ["4", "x", "-1x", "0x", "0.0GiB", "4 x", "1.x", "2 GiB", "2gb", 4, None],
    "snapshot_kind": ["float32", "INT8", None, 8],
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


def test_numbers_of_numpy_are_settings_too():
    config = HybridTrainerConfig(
        enabled=np.bool_(True),
        horizon=np.int64(30),
        confidence_threshold=np.float32(0.5),
        memory=np.str_("2x"),
    )
    assert config == HybridTrainerConfig(horizon=30, confidence_threshold=0.5, memory="2x")
    assert HybridTrainerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"horizon must be .*, got 7\.5"):
        HybridTrainerConfig(horizon=np.float64(7.5))


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


NAMES = [field.name for field in dataclasses.fields(HybridTrainerConfig)]
INTEGERS = {
    "warmup_steps": (1, None),
    "min_full_steps": (4, None),
    "horizon": (1, None),
    "correction_interval": (1, None),
    "snapshots": (4, 10),
}
REALS = {
    "confidence_threshold": "a number from 0 to 1",
    "divergence_sigma": "a finite number of at least 0",
}
NO_NUMBERS = [None, "50", "", b"5", [5], (5,), {}, 5j, True, False, math.nan, math.inf, -math.inf]


def refused(name, value):
    """Message with which `value` is refused, from the constructor and from a mapping alike."""
    with pytest.raises(ConfigError) as caught:
        HybridTrainerConfig(**{name: value})
    with pytest.raises(ConfigError) as again:
        HybridTrainerConfig.from_dict({name: value})
    assert str(again.value) == str(caught.value)
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(f"got {value!r}")
    return str(caught.value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_up_to_the_ends_of_their_range(name):
    least, most = INTEGERS[name]
    expected = f"an integer of at least {least}"
    if most is not None:
        expected += f" and at most {most}"
    for value in (least, 10**9 if most is None else most):
        assert getattr(HybridTrainerConfig(**{name: value}), name) == value
    outside = [least - 1, 0, -(10**9)] + ([] if most is None else [most + 1, 10**9])
    for value in [*outside, *NO_NUMBERS, least + 0.5, float(least)]:
        assert expected in refused(name, value)


@pytest.mark.parametrize("name", REALS)
def test_reals_are_finite_numbers_from_zero(name):
    # An integer too large for a float is as good as infinite.
    for value in [*NO_NUMBERS, -1e-9, -1, 10**400]:
        assert REALS[name] in refused(name, value)
    for value in (1e-300, 0.5, 1):
        assert getattr(HybridTrainerConfig(**{name: value}), name) == value


def test_the_ends_of_the_reals():
    for value in (0, 0.0, 1, 1.0):
        assert HybridTrainerConfig(confidence_threshold=value).confidence_threshold == value
    for value in (1.0000001, 60):
        assert "from 0 to 1" in refused("confidence_threshold", value)
    for value in (0, 0.0, -0.0):
        assert "a positive number" in refused("divergence_sigma", value)
    assert HybridTrainerConfig(divergence_sigma=1e300).divergence_sigma == 1e300


def test_words_are_listed():
    for value in (0, 1, None, "yes", math.nan, []):
        assert "True or False" in refused("enabled", value)
    for value in (None, "", "Raise", True, ["raise"], math.nan):
        assert "'recover' or 'raise'" in refused("on_divergence", value)


@pytest.mark.parametrize("name", ["horizn", "Horizon", "", "hybridcore", 3, None], ids=repr)
def test_an_unknown_name_is_named_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"^unknown setting ") as caught:
        HybridTrainerConfig.from_dict({"horizon": 10, name: 5})
    assert repr(name) in str(caught.value)
    for known in NAMES:
        assert known in str(caught.value)


def test_the_constructor_names_an_unknown_one_too():
    for build in (
        HybridTrainerConfig,
        functools.partial(dataclasses.replace, HybridTrainerConfig()),
    ):
        with pytest.raises(
            ConfigError, match=r"^unknown setting 'horizn'; .*'horizon'\?$"
        ) as caught:
            build(horizn=5)
        # What Python itself would have raised.
        assert isinstance(caught.value, TypeError)
    assert list(inspect.signature(HybridTrainerConfig).parameters) == NAMES
    assert HybridTrainerConfig(False, 7) == HybridTrainerConfig(enabled=False, warmup_steps=7)


def test_every_setting_is_frozen():
    config = HybridTrainerConfig()
    for name in NAMES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))
    # Slots and a frozen class together refuse a new name by one of two errors.
    with pytest.raises((AttributeError, TypeError)):
        config.brand_new = 1
    assert hash(config) == hash(HybridTrainerConfig())


VALID = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "warmup_steps": st.integers(1, 10**6),
        "min_full_steps": st.integers(4, 10**6),
        "horizon": st.integers(1, 10**6),
        "correction_interval": st.integers(1, 10**6),
        "confidence_threshold": st.floats(0.0, 1.0),
        "divergence_sigma": st.floats(1e-6, 1e6),
        "snapshots": st.integers(4, 10),
        "secant_pairs": st.integers(0, 50),
        "on_divergence": st.sampled_from(["recover", "raise"]),
    },
)


@settings(deadline=None, derandomize=True, database=None)
@given(VALID)
def test_a_dictionary_round_trip_keeps_everything(chosen):
    before = dict(chosen)
    config = HybridTrainerConfig.from_dict(chosen)
    assert chosen == before
    as_dict = config.to_dict()
    assert list(as_dict) == NAMES
    assert {name: as_dict[name] for name in chosen} == chosen
    assert HybridTrainerConfig.from_dict(as_dict) == config
    as_dict["horizon"] = None
    assert config.horizon is not None


def test_memory_saver_differs_in_four_settings():
    saver = HybridTrainerConfig(horizon=15, snapshots=4, secant_pairs=0, memory="1x")
    assert HybridTrainerConfig.memory_saver() == saver


def test_toml_without_settings_or_beside_others(tmp_path):
    path = tmp_path / "settings.toml"
    for text in ("", "[hybridcore]\n", "title = 'other'\n[tool]\nhorizon = 0\n[hybridcore]\n"):
        path.write_text(text)
        assert HybridTrainerConfig.from_toml(str(path)) == HybridTrainerConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"horizon = ", r"settings\.toml is not valid TOML: "),
        (b"horizon = 1\nhorizon = 2", r"settings\.toml is not valid TOML: "),
        (b"\xff\xfe\x00h", r"settings\.toml is not valid TOML: "),
        (b"horizon = 0", r"toml: horizon must be an integer of at least 1, got 0$"),
        (b"horizon = 7.0", r"toml: horizon must be an integer of at least 1, got 7\.0$"),
        (b"horizon = true", r"toml: horizon must be an integer of at least 1, got True$"),
        (b"divergence_sigma = nan", r"toml: divergence_sigma must be a .*, got nan$"),
        (b"divergence_sigma = inf", r"toml: divergence_sigma must be a .*, got inf$"),
        (b"[hybridcore]\nhorizn = 3", r"toml: unknown setting 'horizn'; known"),
        (b"[other]\nhorizon = 3", r"toml: unknown setting 'other'; known settings: .*horizon"),
        (b"hybridcore = 3", r"toml: hybridcore must be a table of settings, got 3$"),
    ],
)
def test_a_bad_file_is_refused_clearly(tmp_path, text, message):
    path = tmp_path / "settings.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        HybridTrainerConfig.from_toml(path)


def test_a_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        HybridTrainerConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("snapshot", "snapshots"),
        ("horizn", "horizon"),
        ("warm_up_steps", "warmup_steps"),
        ("Averaging", "averaging"),
        ("secant-pairs", "secant_pairs"),
    ],
)
def test_a_misspelled_setting_is_told_the_nearest(given_name, meant):
    with pytest.raises(ConfigError, match=f"'{given_name}';.*; did you mean '{meant}'\\?"):
        HybridTrainerConfig.from_dict({given_name: 1})


@pytest.mark.parametrize("settings", [None, 5, "enabled", [("enabled", True)]])
def test_what_is_no_mapping_is_refused(settings):
    with pytest.raises(ConfigError, match="settings must be a mapping"):
        HybridTrainerConfig.from_dict(settings)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


CHOSEN = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=12) | st.integers(), VALUES, max_size=4
)
FILES = st.binary(max_size=99) | st.text("ab=[]{}\"'.,0123456789\n_:-+T#", max_size=99)


@settings(deadline=None)
@given(CHOSEN)
def test_any_settings_are_taken_or_refused(chosen):
    with contextlib.suppress(ConfigError):
        config = HybridTrainerConfig.from_dict(chosen)
        assert HybridTrainerConfig.from_dict(config.to_dict()) == config


@settings(deadline=None)
@given(FILES)
def test_any_file_is_taken_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.suppress(ConfigError):
        HybridTrainerConfig.from_toml(path)


@pytest.mark.parametrize("text", ["horizon = " + "9" * 5000, "a = " + "[" * 5000 + "]" * 5000])
def test_what_python_cannot_parse_is_refused(tmp_path, text):
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(ConfigError, match="not valid TOML"):
        HybridTrainerConfig.from_toml(tmp_path / "settings.toml")


def test_memory_is_bytes_or_copies_of_a_model_that_is_not_small():
    for memory, weights, expected in (
        ("4x", 1e9, 4e9),
        ("1.5x", 1e9, 1.5e9),
        ("4x", 1000, 2**28),
        ("2GiB", 1e9, 2**31),
        ("800MB", 1000, 8e8),
        ("512B", 1000, 512),
    ):
        assert HybridTrainerConfig(memory=memory).memory_limit(weights) == expected


def test_settings_of_an_earlier_version_mean_the_same():
    config = HybridTrainerConfig(horizon=30)
    settings = config.to_dict()
    assert not config.differences(settings)
    del settings["memory"]
    assert not config.differences(settings)
    assert config.differences(settings | {"memory": "1x"}) == ["memory is '1x' there and '4x' here"]
    for bad in (settings | {"invented": 1}, None):
        (told,) = config.differences(bad)
        assert "not known here" in told
