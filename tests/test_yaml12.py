"""One reader of YAML 1.2: for configs, for what replaces a key of them, and for a scorer's settings."""

import math
from operator import attrgetter

import pytest
from command_line import mmalign
from corpus import tables as corpus
from hypothesis import given, strategies as st

from mmalign.config import load as configs, yaml12
from mmalign.errors import BadInput

plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1),
        st.floats(-9e18, 9e18, allow_nan=False), st.sampled_from(corpus.TEXTS), st.sampled_from(sorted(corpus.WORDS)),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\u2028"), max_size=12),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip


def same(one, two) -> bool:
    """Equal, and of the same kinds: 1 is neither 1.0 nor true."""
    return repr(one) == repr(two)


@pytest.mark.parametrize(("word", "value"), corpus.WORDS.items())
def test_words_are_those_of_the_core_schema(word, value):
    assert same(yaml12.parsed(word), value)
    assert same(configs.parse(word, "x"), value)


@pytest.mark.parametrize("text", corpus.NO_YAML)
def test_what_is_no_plain_value_is_one_line(text):
    with pytest.raises(ValueError, match=r"\S") as error:
        yaml12.parsed(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@given(plain)
def test_what_is_written_reads_back(value):
    assert same(yaml12.parsed(yaml12.written(value)), value)


@given(st.integers(-(10**15), 10**15), st.integers(0, 5))
def test_leading_zeros_change_no_number(number, zeros):
    assert same(yaml12.parsed(f"{'-' * (number < 0)}{'0' * zeros}{abs(number)}"), number)


@given(st.floats(-1e15, 1e15), st.sampled_from(("{!r}", "{:e}", "{:E}", "{:.3f}", "{:+.1e}")))
def test_numbers_in_any_notation(number, notation):
    word = notation.format(number)
    value = yaml12.parsed(word)
    assert type(value) is float
    assert value == float(word)
    assert math.copysign(1, value) == math.copysign(1, float(word))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=010", "seed", 10), ("kernel.noise=7e-1", "kernel.noise", 0.7),
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("loss.clip=2e-4", "loss.clip", 2e-4), ("advantage.scale=batch", "advantage.scale", "batch"),
        ("credit.baseline=prompt", "credit.baseline", "prompt"), ("plan.children=3", "plan.children", 3),
        ("guidance=4", "guidance", 4.0), ("held_out=~", "held_out", None), ("offload=true", "offload", True),
    ],
)  # fmt: skip
def test_overrides_are_yaml_12(tmp_path, settings, override, key, value):
    (tmp_path / "c.yaml").write_text(configs.dump(configs.build(settings, "x")))
    assert same(attrgetter(key)(configs.load(tmp_path / "c.yaml", [override])), value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("guidance=no", "guidance: Input should be a valid number, got 'no'"),
        ("guidance=true", "guidance: Input should be a valid number, got True"),
        ("guidance='2'", "guidance: Input should be a valid number, got '2'"),
        ("seed=true", "seed: Input should be a valid integer, got True"),
        ("seed=1.0", "seed: Input should be a valid integer, got 1.0"),
        ("offload=on", "offload: Input should be a valid boolean, got 'on'"),
        ("offload=1", "offload: Input should be a valid boolean, got 1"),
        (
            "kernel.noise=false",
            "noise: Input should be a valid number or Input should be a valid array, got false",
        ),
        ("plan.steps=[true]", "plan: steps: Input should be a valid integer or "),
        ("rewards={jpeg_size.kilobytes: true}", "got True"),
        (
            "rewards={jpeg_size.kilobytes: {start: true, end: 1}}",
            "start.float: Input should be a valid number, got True",
        ),
        ("at_least={jpeg_size.kilobytes: {bound: true}}", "bound: Input should be a valid number, got True"),
        ("out=~nobody-of-that-name/x", "there is no home folder '~nobody-of-that-name'"),
        ("batch=[", "override 'batch=[': not YAML"),
    ],
)
def test_a_truth_is_no_number_and_a_text_neither(tmp_path, settings, override, says):
    (tmp_path / "c.yaml").write_text(configs.dump(configs.build(settings, "x")))
    with pytest.raises(BadInput) as error:
        configs.load(tmp_path / "c.yaml", [override])
    assert says in str(error.value)


@pytest.mark.parametrize("key", ["model", "prompts", "held_out", "reference", "cache", "out"])
def test_a_config_names_the_home_folder(tmp_path, monkeypatch, settings, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(configs.build(settings | {key: "~/x"}, "test"), key) == str(tmp_path / "x")


def test_so_does_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    arguments = ["--rewards", "image_stats", "--out", "~/s.jsonl", "--html", "~/pages/p.html", "--cache", "~/c.sqlite"]
    assert mmalign("score", "~/pictures", *arguments).returncode == 0
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"pictures", "s.jsonl", "pages", "c.sqlite"}
    refused = mmalign("score", "~nobody-of-that-name/pictures", "--rewards", "image_stats")
    assert (refused.returncode, "there is no home folder" in refused.stderr) == (2, True)


@pytest.mark.parametrize("value", ["[", "{a: 1, a: 2}", "!!python/name:os.system", "[&a 1, *a]", "[" * 3000])
def test_a_scorers_setting_is_the_same_yaml(tmp_path, value):
    result = mmalign("score", tmp_path, "--rewards", "image_stats", "--set", f"image_stats.x={value}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
