"""A config can be broken in more ways than anyone lists: the shipped ones are damaged at random. Whatever the damage,
the answer is one line and exit code 2, and nothing is written; or the config is sound still."""

import copy
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import diffusers
import pytest
import yaml
from command_line import mmalign
from hypothesis import HealthCheck, given, seed, settings as examples, strategies as st

from mmalign import run as runs
from mmalign.checks import doctor
from mmalign.config.schema import Config
from mmalign.credit import CREDITS
from mmalign.learn.loss import LOSSES
from mmalign.objectives import OBJECTIVES
from mmalign.objectives.advantage import Advantage
from mmalign.objectives.masks import MASKS
from mmalign.rewards.combination import COMBINATIONS
from mmalign.sampling.kernels import KERNELS
from mmalign.sampling.plans import PLANS
from reward_models.registry import SCORERS

ROOT = Path(__file__).parents[1]
SHIPPED = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
KEYS = sorted(Config.model_fields)
KINDS = {
    "plan": PLANS, "kernel": KERNELS, "credit": CREDITS, "objective": OBJECTIVES, "loss": LOSSES, "mask": MASKS,
    "combine": COMBINATIONS, "advantage": [Advantage],
}  # fmt: skip
SETTINGS = {method: sorted({field.name for kind in kinds for field in fields(kind)}) for method, kinds in KINDS.items()}
HUGE = [10**6, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 10**400, 1e308, 1e-320, float("inf"), float("nan"), -1, 0]
TEXTS = [
    "", " ", "\0", "a\nb", "\x1b[31m", "\u202e", "é漢字🙂", "\ud800", "a" * 300, "a" * 5000, "%s {x} [/b]", "--",
    "null", "../..", "/", "~", ".", "/dev/null", "$HOME", "http://", "https://a@b/c", "sd3", "x/y", "x/y/z",
    "no_such:Thing", "os:system", ":", "a:", ":b", "shapes", "shapes.", ".strict", "shapes.strict.",
    "native", "flash", "int8", "nf4",
]  # fmt: skip
MARKS = [
    "", ":", "[", "]", "{", "}", "\t", "&a ", "*a", "- ", "'", '"', "%", "@", "\n", "\0", "\x85", "---\n", "...\n",
    "<<: ", "? ", "|", "#", "!!int ", "!!python/name:os.system ", "[" * 3000,
]  # fmt: skip
HOW = ("value", "add", "typo", "drop", "nest", "list", "scorer", "number", "swap", "setting")
numbers = st.one_of(st.sampled_from(HUGE), st.integers(), st.floats(allow_subnormal=False), st.integers(-3, 40))
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.sampled_from(TEXTS), st.text(st.characters(), max_size=8),
    st.sampled_from(KEYS), st.sampled_from(sorted(SCORERS)), st.dates(), st.binary(max_size=4),
)  # fmt: skip
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(scalars, inner, max_size=3)),
    max_leaves=8,
)


def typos(name: str) -> st.SearchStrategy[str]:
    """Names near one."""
    place = st.integers(0, len(name) - 1)
    return st.one_of(
        place.map(lambda i: name[:i] + name[i + 1 :]), place.map(lambda i: name[:i] + name[i] + name[i:]),
        st.just(name.upper()), st.just(name + "s"), st.just(name.replace("_", "-")), st.just(f" {name}"),
    )  # fmt: skip


@st.composite
def values_damaged(draw) -> tuple[str, str]:
    """A shipped config with one to three values, keys or options that do not belong."""
    name = draw(st.sampled_from(sorted(SHIPPED)))
    values = yaml.safe_load(SHIPPED[name])
    for _ in range(draw(st.integers(1, 3))):
        how = draw(
            st.sampled_from(("value", "add", "typo", "drop", "nest", "list", "scorer", "number", "swap", "setting"))
        )
        key = draw(st.sampled_from(sorted(map(str, values)) or ["seed"]))
        if how == "value":
            values[key] = draw(junk)
        elif how == "number":
            values[draw(st.sampled_from(KEYS))] = draw(numbers)
        elif how == "add":
            other = draw(st.sampled_from(KEYS))
            values[other] = draw(st.one_of(junk, options(other)))
        elif how == "typo":
            values[draw(typos(draw(st.sampled_from(KEYS))))] = draw(scalars)
        elif how == "drop":
            values.pop(key, None)
        elif how == "nest":
            values[key] = {"a": values.get(key)} if draw(st.booleans()) else [[values.get(key)]]
        elif how == "list" and isinstance(values.get(key), list):
            values[key] = values[key] * draw(st.integers(0, 3)) + draw(st.lists(scalars, max_size=2))
        elif how == "swap":
            other = draw(st.sampled_from(sorted(map(str, values)) or ["seed"]))
            values[key], values[other] = values.get(other), values.get(key)
        elif how == "setting":
            method = draw(st.sampled_from(sorted(KINDS)))
            known = values.get(method) or draw(options(method))
            known = dict(known) if isinstance(known, dict) else {"type": known}
            setting = draw(st.sampled_from(SETTINGS[method] or ["type"]))
            setting = draw(st.one_of(st.just(setting), st.just(setting), typos(setting)))
            values[method] = known | {setting: draw(st.one_of(numbers, junk))}
        elif how == "scorer":
            scorer = draw(st.sampled_from([*sorted(SCORERS), "shape", "clp", "x:Y"]))
            component = draw(st.sampled_from(("strict", "partial", "cosine", "score", "", "kilobytes", "mean")))
            values["rewards"] = {f"{scorer}.{component}": draw(st.one_of(numbers, junk))}
            values["scorers"] = {draw(st.sampled_from((scorer, "own"))): draw(junk)}
    return name, yaml.safe_dump(values, allow_unicode=draw(st.booleans()), sort_keys=False)


def options(key: str) -> st.SearchStrategy:
    """Values that a key takes: alone they are sound, beside others they may not be."""
    if key in KINDS:
        return st.sampled_from([getattr(kind, "type", "group") for kind in KINDS[key]])
    annotation = str(Config.model_fields[key].annotation)
    words = [word.strip("'\" ") for word in annotation.partition("Literal[")[2].partition("]")[0].split(",")]
    return st.sampled_from([word for word in words if word] or [True, 1, 0.5, [0, 1], "shapes"])


@st.composite
def text_damaged(draw) -> tuple[str, str]:
    """A shipped config with characters lost, added or doubled."""
    name = draw(st.sampled_from(sorted(SHIPPED)))
    text = SHIPPED[name]
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(text)))
        size = draw(st.integers(0, 12))
        put = draw(st.one_of(st.sampled_from(MARKS), st.text(max_size=3)))
        text = text[:place] + put + text[place + size :]
    return name, text


class Sound(Exception):
    """The session is open; a run would begin."""


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What the command line makes of a config's text. The model is read from disk once and copied, and the clip scorer
    that the shipped configs watch is left out, for both take seconds."""
    patch, folder, tally = pytest.MonkeyPatch(), tmp_path_factory.mktemp("broken"), Counter()
    opened, read = runs.open_session, diffusers.StableDiffusion3Pipeline.from_pretrained
    remaining = {}

    def copied(model, **settings):
        known = repr((model, sorted(settings.items(), key=repr)))
        if known not in remaining:
            remaining[known] = read(model, **settings)
        pipe = remaining[known]  # only the transformer is changed, by its adapter
        return type(pipe)(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})

    def stopped(*args):
        opened(*args)
        raise Sound

    patch.setattr(runs, "open_session", stopped)
    patch.setattr(doctor, "open_session", stopped)
    patch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", copied)
    patch.chdir(folder)

    def answer(damaged: tuple[str, str], command: str = "train") -> str:
        name, text = damaged
        path = folder / name
        text = re.sub(r"^scorers: \{clip: .*\n", "", text.replace("watch: [clip]", "watch: [jpeg_size]"), flags=re.M)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            result = mmalign(command, path)
        except Sound:
            kind = "sound"
        else:
            kind = "broken"
            assert result.returncode == 2, result.stderr
            lines = result.stderr.splitlines()
            assert len(lines) == 1, lines
            assert lines[0].startswith("mmalign: ")
            assert len(lines[0]) < 3000
            assert result.stdout == ""
        assert [item.name for item in folder.iterdir()] == [name]
        path.unlink()
        tally[kind] += 1
        return kind

    yield answer, tally
    patch.undo()


damaged = st.one_of(values_damaged(), values_damaged(), text_damaged())
commands = st.sampled_from(("train", "train", "doctor"))
alike = examples(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_the_shipped_configs_are_sound(answered):
    answer, _ = answered
    for name, text in SHIPPED.items():
        if (ROOT / yaml.safe_load(text)["model"]).is_dir():  # the weights of the others are not here
            assert answer((name, text)) == "sound"


@pytest.mark.slow
@examples(alike, max_examples=60, derandomize=True)
@given(damaged=damaged, command=commands)
def test_broken_configs_are_refused_in_one_line(answered, damaged, command):
    answered[0](damaged, command)


@pytest.mark.slow
def test_a_thousand_broken_configs(answered):
    answer, tally = answered
    rounds = 0
    while tally["broken"] < 1000:
        rounds += 1

        @seed(rounds)
        @examples(alike, max_examples=250)
        @given(damaged=damaged, command=commands)
        def more(damaged, command):
            answer(damaged, command)

        more()
    print(dict(tally))
