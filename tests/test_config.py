"""`GrailConfig`: what it refuses, with which message, and that JSON gives it back."""

import dataclasses
import functools
import itertools
import json
import re
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_hf import ALLOCATIONS, SELECTORS, Selector
from grail_hf.config import (
    ATTENTION_UNITS,
    FOLDS,
    HIDDEN_STATES,
    SOLVE_DTYPES,
    GrailConfig,
    widest_float,
)
from grail_hf.settings import choices_of

README = Path(__file__).parent.parent / "README.md"
OPTIONS_HEAD = "| option | default | what it does |\n"
FIELDS = {field.name: field for field in dataclasses.fields(GrailConfig)}
FRACTIONS = ("sparsity", "mlp_sparsity", "attention_sparsity")
NAN = float("nan")
INF = float("inf")

OUT_OF_RANGE = [
    *(
        (name, value)
        for name in (*FRACTIONS, "random_tokens")
        for value in (-0.1, 1, 1.0, 1.5, NAN, "0.3", True)
    ),
    *(
        (name, value)
        for name in ("num_samples", "seq_length", "batch_size", "multiple_of", "checkpoint_every")
        for value in (0, -1, 1.5, "4", True)
    ),
    ("seq_length", 1),
    *(("refit", value) for value in (-1, 1.5, "2", True)),
    *(("target", value) for value in ("block", None, "Dense")),
    *(("seed", value) for value in (1.5, "0", False, 2**63, -(2**63) - 1)),
    *(("ridge", value) for value in (-1e-9, INF, NAN, "1e-4", "Auto", None, True)),
    *(("attention_unit", value) for value in ("head", None)),
    *(("fold", value) for value in ("exact", True)),
    *(("solve_dtype", value) for value in ("bfloat16", torch.float64)),
    *(("hidden_states", value) for value in ("cuda", None)),
    *(("bias", value) for value in (True, "all", None, 0)),
    *(("bos", value) for value in ("yes", 1, None)),
    *(("selector", value) for value in (3, None, ["gram"])),
    *(("allocation", value) for value in (3, None, ["error"])),
    *(("device", value) for value in ("warp", 1.5)),
    *((name, value) for name in ("compensate", "rehome") for value in ("no", None)),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        GrailConfig(**({"sparsity": 0.3} | {name: value}))
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in FRACTIONS for value in (0, 0.0, 0.999)),
        *((name, 1) for name in ("num_samples", "batch_size", "multiple_of")),
        *(("checkpoint_every", value) for value in (1, "auto")),
        ("seq_length", 2),
        *(("seed", value) for value in (-1, 0)),
        *(("ridge", value) for value in (0, 10.0, "auto")),
        *(("attention_unit", value) for value in ATTENTION_UNITS),
        *(("fold", value) for value in FOLDS),
        *(("seed", value) for value in (2**63 - 1, -(2**63))),
        *(("refit", value) for value in (0, 100)),
        *(("solve_dtype", value) for value in SOLVE_DTYPES),
        *(("hidden_states", value) for value in HIDDEN_STATES),
        *(("bos", value) for value in ("auto", True, False)),
        *(("device", value) for value in (None, "cpu")),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name, value):
    total = {} if name == "sparsity" else {"sparsity": 0.3}
    assert getattr(GrailConfig(**total, **{name: value}), name) == value


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if field.metadata["choices"]]
)
def test_a_refused_choice_lists_the_choices(name):
    with pytest.raises(ValueError) as error:
        GrailConfig(**({"sparsity": 0.3} | {name: ["other"]}))
    for choice in FIELDS[name].metadata["choices"]:
        assert repr(choice) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 30}, "sparsity=30 is outside [0, 1): it is a fraction, for example "),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"multiple_of": 0}, "multiple_of=0 must be a whole number of at least 1 or 'auto'"),
        ({"seq_length": 1}, "seq_length=1 must be a whole number of at least 2"),
        ({"ridge": -1}, "ridge=-1 must be a finite number of at least 0 or 'auto'"),
        ({"target": "block"}, "target='block' must be 'self', 'dense' or 'residual'"),
        ({"rehome": 1}, "rehome=1 must be True or False"),
        ({"bias": "auto", "compensate": False}, "leave compensate=True"),
    ],
)
def test_a_refusal_names_what_is_allowed(changes, message):
    with pytest.raises(ValueError) as error:
        GrailConfig(**({"sparsity": 0.3} | changes))
    assert message in str(error.value)


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_every_setting_is_described_in_one_line(field):
    help = field.metadata["help"]
    assert help.endswith(".") and "\n" not in help and len(help) <= 100
    assert re.search(rf"^ +{field.name}: ", GrailConfig.__doc__, re.MULTILINE)
    table = {"selector": SELECTORS, "allocation": ALLOCATIONS}.get(field.name, ())
    assert choices_of(field) == (*field.metadata["choices"], *table)


def options_table(text: str) -> dict[str, str]:
    """The defaults in a README's table of options, by option; empty without such a table."""
    _, _, rest = text.partition(OPTIONS_HEAD)
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines())
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    return {
        name: default.strip("`")
        for names, default in cells
        for name in re.findall(r"`([a-z_]+)`", names)
    }


def assert_options_exist(table: dict[str, str]) -> None:
    for name, default in table.items():
        assert name in FIELDS, f"README's table has {name}, which GrailConfig lacks"
        value = FIELDS[name].default
        assert default in (str(value), repr(value), json.dumps(value)), name


def test_a_table_of_options_is_read():
    text = (
        f"Text.\n\n{OPTIONS_HEAD}|---|---|---|\n"
        "| `sparsity` | `None` | Fraction to remove, for example `0.3`. |\n"
        "| `ridge` | `auto` | Damping of the solve. |\n"
        "| `num_samples` | `128` | Windows. |\n"
        '| `target` | `"residual"` | Of the repair. |\n\n'
        "| other | table |\n|---|---|\n| `none` | `7` |\n"
    )
    table = options_table(text)
    expected = ("None", "auto", "128", '"residual"')
    assert table == dict(zip(("sparsity", "ridge", "num_samples", "target"), expected, strict=True))
    assert_options_exist(table)
    for wrong in ({"ridge": "0.1"}, {"dampness": "auto"}):
        with pytest.raises(AssertionError):
            assert_options_exist(wrong)
    assert options_table("No table.") == {}


def test_the_table_of_options_in_the_readme_has_the_defaults():
    table = options_table(README.read_text("utf-8"))
    if not table:
        pytest.skip("README.md has no table of options")
    assert_options_exist(table)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ((), "not given"),
        (("sparsity",), None),
        (("mlp_sparsity",), "not given"),
        (("attention_sparsity",), "not given"),
        (("sparsity", "mlp_sparsity"), None),
        (("sparsity", "attention_sparsity"), None),
        (("mlp_sparsity", "attention_sparsity"), None),
        (FRACTIONS, "drop one"),
    ],
)
def test_the_sparsities_fix_what_is_removed_and_nothing_twice(given, complaint):
    """A sparsity of 0 counts as given."""
    for value in (0, 0.25):
        settings = dict.fromkeys(given, value)
        if complaint is None:
            config = GrailConfig(**settings)
            assert {name: getattr(config, name) for name in given} == settings
        else:
            with pytest.raises(ValueError, match=complaint):
                GrailConfig(**settings)


@pytest.mark.parametrize(
    ("ignore", "normal"),
    [
        ((), ()),
        (3, (3,)),
        (-1, (-1,)),
        ("self_attn", ("self_attn",)),
        ([0, "mlp"], (0, "mlp")),
        (range(2), (0, 1)),
    ],
)
def test_ignore_becomes_a_tuple(ignore, normal):
    config = GrailConfig(sparsity=0.3, ignore=ignore)
    assert config.ignore == normal
    hash(config)


@pytest.mark.parametrize("entry", [1.5, None, True, ("mlp",)])
def test_an_ignore_entry_is_an_index_or_a_pattern(entry):
    with pytest.raises(ValueError) as error:
        GrailConfig(sparsity=0.3, ignore=[0, entry])
    assert repr(entry) in str(error.value)


def test_a_config_is_frozen():
    config = GrailConfig(sparsity=0.3)
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 0.5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float64), ("float64", torch.float64), ("float32", torch.float32)],
)
def test_the_solve_dtype_is_a_dtype_of_torch(name, dtype):
    assert GrailConfig(sparsity=0.3, solve_dtype=name).solve_torch_dtype == dtype


@pytest.mark.parametrize(("lacking", "expected"), [(True, "float32"), (False, "float64")])
def test_an_automatic_dtype_is_the_device_s(lacking, expected, monkeypatch):
    """What is asked for stays; the device that lacks float64 refuses it as MPS does."""
    device = torch.device("mps")

    def ones(*shape, dtype, device):
        assert device.type == "mps"
        if lacking and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.full(shape, 1.0, dtype=dtype)

    widest_float.cache_clear()
    monkeypatch.setattr(torch, "ones", ones)
    try:
        assert GrailConfig(sparsity=0.3).resolved_on(device).solve_dtype == expected
        for asked in ("float32", "float64"):
            config = GrailConfig(sparsity=0.3, solve_dtype=asked)
            assert config.resolved_on(device) is config
    finally:
        widest_float.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        *(((major, 0), None, "float64") for major in (6, 7, 8, 9, 10)),
        *((pair, None, "float32") for pair in ((6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (12, 0))),
        *((pair, "6.4", "float64") for pair in ((9, 0), (9, 4), (9, 5))),
        *((pair, "6.4", "float32") for pair in ((10, 3), (11, 0), (12, 0))),
    ],
)
def test_an_automatic_dtype_is_float64_only_where_that_is_fast(
    capability, hip, expected, monkeypatch
):
    """P100, V100, A100, H100, B200 and Instinct, not GeForce, RTX, T4, L4, B300 or Radeon."""
    device = torch.device("cuda:99")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: capability}.get)
    assert GrailConfig(sparsity=0.3).resolved_on(device).solve_dtype == expected
    asked = GrailConfig(sparsity=0.3, solve_dtype="float64")
    assert asked.resolved_on(device) is asked


def test_a_device_that_is_not_here_is_taken_to_have_float64():
    absent = torch.device("cuda:99")
    assert GrailConfig(sparsity=0.3).resolved_on(absent).solve_dtype == "float64"
    assert GrailConfig(sparsity=0.3).resolved_on(torch.device("cpu")).solve_dtype == "float64"


fraction = st.floats(0, 1, exclude_max=True)
names = st.text(string.printable, max_size=12)


@st.composite
def configs(draw) -> GrailConfig:
    """Any config that passes the checks."""
    given = draw(
        st.sampled_from([("sparsity",), FRACTIONS[:2], FRACTIONS[1:], (FRACTIONS[0], FRACTIONS[2])])
    )
    count = st.integers(1, 10**6)
    return GrailConfig(
        **{name: draw(fraction) for name in given},
        selector=draw(names),
        compensate=draw(st.booleans()),
        fold=draw(st.sampled_from(FOLDS)),
        ridge=draw(st.floats(0, allow_infinity=False, allow_nan=False) | st.just("auto")),
        num_samples=draw(count),
        seq_length=draw(st.integers(2, 10**6)),
        bos=draw(st.sampled_from([True, False, "auto"])),
        batch_size=draw(count),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        multiple_of=draw(count),
        checkpoint_every=draw(count | st.just("auto")),
        attention_unit=draw(st.sampled_from(ATTENTION_UNITS)),
        ignore=tuple(draw(st.lists(st.integers() | names, max_size=4))),
        rehome=draw(st.booleans()),
        device=draw(st.sampled_from([None, "cpu"])),
        solve_dtype=draw(st.sampled_from(SOLVE_DTYPES)),
    )


@given(configs())
@settings(max_examples=25, deadline=None)
def test_json_gives_the_config_back(config):
    assert GrailConfig.from_json(config.to_json()) == config
    assert GrailConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()  # Plain JSON types throughout.
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(GrailConfig)}


def test_a_device_object_survives_json():
    config = GrailConfig(sparsity=0.3, device=torch.device("cpu"))
    assert GrailConfig.from_json(config.to_json()) == config


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="'sparsty'") as error:
        GrailConfig.from_dict({"sparsty": 0.3})
    for field in dataclasses.fields(GrailConfig):
        assert field.name in str(error.value)


def test_the_old_name_of_a_setting_is_understood():
    """In an earlier `grail.json`, and in a call, where it wins over the config as any other."""
    expected = GrailConfig(sparsity=0.3, solve_dtype="float32")
    assert GrailConfig.from_dict({"sparsity": 0.3, "dtype": "float32"}) == expected
    assert GrailConfig.from_json('{"sparsity": 0.3, "dtype": "float32"}') == expected
    assert GrailConfig.resolve(GrailConfig(sparsity=0.3), dtype="float32") == expected
    assert "dtype" not in expected.to_dict()


def test_a_dict_is_checked_like_keywords():
    with pytest.raises(ValueError, match="ridge=-1"):
        GrailConfig.from_dict({"sparsity": 0.3, "ridge": -1})


def mine(group, stats, power=1):
    """A selector of the user's."""
    return stats.energy**power


class Scorer:
    """One that is an object, and cannot be copied."""

    def __call__(self, group, stats):
        return stats.energy

    def score(self, group, stats):
        return stats.energy

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (mine, f"{__name__}:mine"),
        (functools.partial(functools.partial(mine, power=2)), f"{__name__}:mine"),
        (Scorer(), f"{__name__}:Scorer"),
        (Selector(functools.partial(mine, power=2)), f"{__name__}:mine"),
        (Scorer().score, f"{__name__}:Scorer.score"),
    ],
)
def test_a_selector_may_be_a_function_and_json_gives_its_name(function, name):
    config = GrailConfig(sparsity=0.3, selector=function)
    assert config.selector is function
    assert config.selector_name == name
    assert json.loads(config.to_json()) == config.to_dict()
    read = GrailConfig.from_json(config.to_json())
    assert read == dataclasses.replace(config, selector=name)
    assert read.selector == read.selector_name == name


def test_overrides_leave_a_selector_that_is_a_function():
    config = GrailConfig.resolve(GrailConfig(sparsity=0.3, selector=mine), seed=3)
    assert config.selector is mine
    assert GrailConfig.resolve(config, selector="wanda").selector == "wanda"
    assert GrailConfig.resolve(None, sparsity=0.3, selector=mine).selector is mine


def test_overrides_win_over_the_config():
    config = GrailConfig(sparsity=0.3, seed=7)
    expected = GrailConfig(sparsity=0.5, seed=7)
    assert GrailConfig.resolve(config, sparsity=0.5) == expected
    assert GrailConfig.resolve({"sparsity": 0.3, "seed": 7}, sparsity=0.5) == expected
    assert GrailConfig.resolve(None, sparsity=0.5, seed=7) == expected
    assert config.sparsity == 0.3
    with pytest.raises(ValueError, match="'widht'"):
        GrailConfig.resolve(config, widht=3)


@pytest.mark.parametrize("other", [{"target": "self"}, {"compensate": False}])
def test_a_refit_needs_a_target_of_the_dense_model(other):
    assert GrailConfig(sparsity=0.3, refit=2).refit_steps == 2
    assert GrailConfig(sparsity=0.3, refit=2, **other).refit_steps == 0
