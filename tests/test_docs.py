"""The pages in docs/ and the READMEs against the code: tables, metric names, commands, links.

A table that repeats what the code says is compared with it row by row; when such a test fails after a change, its
message shows the rows that the page should have.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fledge import cli
from fledge.config import override
from fledge.data.catalogue import SOURCES
from fledge.data.interchange import FORMATS
from fledge.data.multiple_choice import BENCHMARKS
from fledge.errors import UserError
from fledge.evals import agreement, bits_per_byte, generation, multiple_choice, reward_accuracy, win_rate
from fledge.models.labels import Labels
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.presets import count_parameters, presets
from fledge.models.scalar import ScalarModel
from fledge.objectives.kto import KTO, mismatch
from fledge.objectives.multi_label import LabelledIds, MultiLabel
from fledge.objectives.next_token import NextToken
from fledge.objectives.preference import Preference, PreferenceIds
from fledge.objectives.ranking import KWiseRanking, RankedIds
from fledge.recipes.chats import SHARES
from fledge.recipes.plan import RingPlan, scale_of
from fledge.recipes.raise_ import RECIPES, ring_of
from fledge.recipes.runs import Cost
from fledge.registry import FAMILIES
from fledge.rl.actors import Actors, PolicyPair
from fledge.rl.ensemble import EnsembleScorer
from fledge.rl.feedme import FeedME, FeedMEConfig
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.ppo import PPO, PPOConfig, PretrainMix, World
from fledge.rl.rewards import Part, Records, RewardSum
from fledge.rl.rollout import RewardModelScorer, naive_sampler
from fledge.synth.constitutional import Candidates, LabelConfig, label
from fledge.synth.generating import Ask
from fledge.synth.rules import Answered, RuleConfig, judge
from fledge.text import constitution
from fledge.text.report import Fit, fit_metrics
from fledge.text.subwords import SPECIAL_TOKENS
from fledge.train.loop import TrainState, fit, train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Completion, Conversation, Piece, Provenance, Ranking

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = sorted(ROOT.glob("README*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *READMES)}

CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND_LINE = re.compile(r"^(?:\$ )?(?:\S*/)?(fledge [^#\n]+)")


# Reading tables.


def rows_under(page: str, *columns: str) -> list[tuple[str, ...]]:
    """The rows of the table on `page` whose header begins with `columns`, backticks and escapes removed."""
    lines = iter(TEXTS[DOCS / page].splitlines())
    for line in lines:
        if line.startswith("|") and cells(line)[: len(columns)] == columns:
            next(lines)
            return list(table_body(lines))
    raise AssertionError(f"docs/{page} has no table that begins with the columns {columns}")


def table_body(lines: Iterator[str]) -> Iterator[tuple[str, ...]]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield cells(line)


def cells(line: str) -> tuple[str, ...]:
    parts = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return tuple(part.replace("\\|", "|").strip().strip("`") for part in parts)


def assert_rows(page: str, columns: Sequence[str], expected: Sequence[Sequence[object]]) -> None:
    """The table's first cells are `expected`, in order."""
    wanted = [tuple(map(str, row)) for row in expected]
    found = [row[: len(wanted[0])] for row in rows_under(page, *columns)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert found == wanted, f"docs/{page} should have these rows:\n{text}"


# Tables that repeat a literal table of the code.


def test_models_page_has_every_row_of_the_registry_with_its_year_and_paper() -> None:
    rows = [(f.name, f.year, f.kind, f.paper, f.module.replace(".", "/") + ".py") for f in FAMILIES]
    assert_rows("models.md", ("family", "year", "kind", "paper", "file"), rows)


def test_models_page_has_every_published_size_with_its_parameters() -> None:
    rows = [
        (name, family, f"{count_parameters(family, c):,}", c.num_layers, c.width, c.num_heads, c.max_positions)
        for name, (family, c) in presets().items()
    ]
    assert_rows("models.md", ("size", "family", "parameters"), rows)


def test_models_page_has_every_hugging_face_layout() -> None:
    rows = [
        (family.name, make.model_type, make.architecture)
        for family in FAMILIES
        for make in (importlib.import_module(family.module).PUBLISHED if family.published else ())
    ]
    assert_rows("models.md", ("family", "model_type", "architecture"), rows)


def test_corpus_page_has_every_source_of_the_catalogue() -> None:
    rows = [(s.name, s.kind, s.language, f"{s.megabytes:g}", s.licence, f"fledge/data/{s.module}.py") for s in SOURCES]
    assert_rows("corpus.md", ("name", "kind", "language"), rows)


def test_evaluation_page_has_every_benchmark() -> None:
    rows = [(b.name, f"{b.num_questions:,}", b.num_choices, f"{b.chance:.1%}".replace("%", " %")) for b in BENCHMARKS]
    assert_rows("evaluation.md", ("benchmark", "questions", "choices", "chance"), rows)


def test_data_formats_page_has_every_format_in_the_order_of_recognition() -> None:
    rows = [(f.name, f.what, f"fledge/data/{f.module}.py") for f in FORMATS]
    assert_rows("data-formats.md", ("format", "what"), rows)


@pytest.mark.parametrize("page", ["data-formats.md", "self-instruct.md", "constitutional-ai.md"])
def test_examples_on_the_pages_of_made_and_labelled_data_run(page: str, tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", TEXTS[DOCS / page], re.DOTALL)
    assert programs
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_tokenizer_page_has_every_special_token_with_its_id() -> None:
    assert_rows("tokenizer.md", ("id", "token"), list(enumerate(SPECIAL_TOKENS)))


def test_sft_page_has_the_share_of_every_part_of_the_conversations() -> None:
    assert_rows("sft.md", ("part", "share of the training conversations"), list(SHARES.items()))


def test_running_page_has_every_recipe_and_every_stage() -> None:
    assert_rows("running.md", ("recipe", "what it is"), [(recipe.name, recipe.summary) for recipe in RECIPES])
    assert_rows(
        "running.md",
        ("stage", "reads"),
        [(stage.name, ", ".join(stage.needs)) for stage in ring_of(RECIPES[1].build(None))],
    )


def test_running_page_has_every_option_of_raise() -> None:
    options = {option for row in rows_under("running.md", "option", "meaning") for option in [row[0]]}
    assert options == set(raise_options())


def raise_options() -> set[str]:
    parser: Any = cli._parser(["raise"])
    raising = parser._subparsers._group_actions[0].choices["raise"]
    names = (action.option_strings[-1] for action in raising._actions if action.option_strings)
    return set(names) - {"--help"}


def test_pretraining_page_has_what_the_dial_decides() -> None:
    rows = []
    for depth in (1, 2, 4, 6, 8, 12, 16, 20):
        s = scale_of(depth)
        rows.append((depth, s.width, s.num_heads, s.row_length, s.rows, f"{s.tokens:,}", f"{s.lr:.3f}"))
    assert_rows("pretraining.md", ("depth", "width", "heads"), rows)


def test_pretraining_page_has_the_rate_of_every_role() -> None:
    config = OptimConfig.by_role()
    found = {row[0]: (row[2], row[3]) for row in rows_under("pretraining.md", "role", "what", "method")}
    rules = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert found == {role: (rule.method, f"{rule.lr:g}") for role, rule in rules.items()}


def test_pretraining_page_has_the_length_of_every_text_stage_of_every_recipe() -> None:
    rows = []
    for recipe in RECIPES:
        plan = recipe.build(None)
        for name, part in (("pretrain", plan.pretrain), ("code", plan.code), ("sft", plan.sft)):
            f = part.fit  # type: ignore[attr-defined]
            rate = f"{f.optim.matrix.lr:.3g}"
            rows.append((recipe.name, name, f"{f.steps:,}", f.rows, f.row_length, f"{f.tokens:,}", rate))
    assert_rows("pretraining.md", ("recipe", "stage", "steps"), rows)


def test_code_page_has_the_defaults_of_the_mix() -> None:
    plan = recipe_plan("pocket").code
    settings = {
        "code.code_share": plan.code_share,
        "code.fim.rate": plan.fim.rate,
        "code.fim.spm_share": plan.fim.spm_share,
    }
    found = {row[0]: row[1] for row in rows_under("code.md", "setting", "default")}
    assert found == {name: f"{value:g}" for name, value in settings.items()}


def test_ppo_page_has_every_knob_with_its_default() -> None:
    adamw = "AdamW 3e-4, eps 1e-5, no decay"
    assert PPOConfig().policy_optim == PPOConfig().value_optim == OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5)
    knobs = {name: adamw if isinstance(value, OptimConfig) else shown(value) for name, value in leaves(PPOConfig())}
    found = {row[0]: row[1] for row in rows_under("ppo.md", "knob", "default")}
    assert found == knobs


def test_ppo_page_has_what_the_recipes_set_otherwise() -> None:
    defaults = dict(leaves(PPOConfig()))
    plans = [dict(leaves(recipe.build(None).ppo)) for recipe in RECIPES]
    differing = [name for name in defaults if any(plan[name] != defaults[name] for plan in plans)]
    rows = [(name, *(shown(rate_of(plan[name])) for plan in plans)) for name in differing]
    assert_rows("ppo.md", ("knob", *(recipe.name for recipe in RECIPES)), rows)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("kl.beta", 0.02), ...; optimizers are leaves."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, OptimConfig):
            yield from leaves(value, f"{field.name}.")
        else:
            yield prefix + field.name, value


def rate_of(value: Any) -> Any:
    return value.matrix.lr if isinstance(value, OptimConfig) else value


def shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def recipe_plan(name: str, depth: int | None = None) -> RingPlan:
    [recipe] = [row for row in RECIPES if row.name == name]
    return recipe.build(depth)


# Commands.


class Quoted(NamedTuple):
    page: str
    line: str


def quoted_commands() -> list[Quoted]:
    """Commands in code spans and in code blocks, fenced or indented."""
    found = []
    for path, text in TEXTS.items():
        is_fenced = False
        for line in text.splitlines():
            is_fenced ^= line.strip().startswith("```")
            match = COMMAND_LINE.match(line.strip()) if is_fenced or line.startswith("    ") else None
            spans = [match[1]] if match else CODE_SPAN.findall(line)
            found += [Quoted(path.name, span.strip()) for span in spans if re.match(r"fledge [a-z-]", span)]
    return sorted(set(found))


def parsed(line: str) -> Any:
    """What the real parser makes of a quoted command; `fledge eval --json`, without its model, is completed."""
    words = shlex.split(line)[1:]
    words = ["2" if word == "N" else word for word in words]
    for _ in range(3):
        try:
            return cli._parser(words).parse_args(words)
        except UserError as error:
            if "arguments are required" not in str(error):
                raise
            words.insert(1, "RUN")
    raise UserError(f"cannot parse '{line}'")


@pytest.mark.parametrize("quoted", quoted_commands(), ids=lambda quoted: f"{quoted.page}: {quoted.line}")
def test_quoted_command_is_one_that_the_parser_takes(quoted: Quoted) -> None:
    words = shlex.split(quoted.line)[1:]
    if len(words) == 1 and not words[0].startswith("-"):  # a mention
        assert words[0] in {name for name, _, _ in cli.COMMANDS}
        return
    if words == ["--version"]:
        return
    args = parsed(quoted.line)
    if words[0] == "raise" and args.recipe in {recipe.name for recipe in RECIPES}:
        override(recipe_plan(args.recipe, args.depth), args.overrides)


def test_quoted_settings_are_leaves_of_a_plan() -> None:
    spans = {span for text in TEXTS.values() for span in CODE_SPAN.findall(text) if span.startswith("--set ")}
    settings = [word for span in spans for word in shlex.split(span)[1:] if not word.startswith("a.b=")]
    assert settings
    override(recipe_plan("pocket"), settings)


@pytest.mark.parametrize(
    "page", ["ppo.md", "pretraining.md", "code.md", "sft.md", "reward.md", "tokenizer.md", "corpus.md"]
)
def test_dotted_names_of_settings_exist(page: str) -> None:
    names = re.findall(
        r"`((?:corpus|tokenizer|pretrain|code|sft|rankings|reward|ppo|evaluation)(?:\.\w+)+)`", TEXTS[DOCS / page]
    )
    for name in names:
        if name.endswith((".py", ".json", ".jsonl", ".md")) or (page == "ppo.md" and name.startswith("reward.")):
            continue  # a file; or a knob, told without the "ppo." before it
        value: Any = recipe_plan("pocket")
        for key in name.split("."):
            assert hasattr(value, key), f"docs/{page}: a plan has no {name}"
            value = getattr(value, key)


# Links and files.


@pytest.mark.parametrize("path", list(TEXTS), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(TEXTS[path]):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{path.name}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_index() -> None:
    linked = set(LINK.findall(TEXTS[DOCS / "index.md"]))
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} - {"index.md"} <= linked


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_readme_leads_to_the_pages(path: Path) -> None:
    linked = set(LINK.findall(TEXTS[path]))
    assert "docs/index.md" in linked or {f"docs/{page.name}" for page in PAGES} <= linked


@pytest.mark.parametrize("path", [page for page in PAGES if page.name != "architecture.md"], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    """architecture.md also names what is yet to come."""
    for name in re.findall(r"`((?:fledge|tests|bench)/[\w/.*]*|\w+/\w+\.py)`", TEXTS[path]):
        places = [base for base in (ROOT, ROOT / "fledge") if list(base.glob(name.rstrip("/")))]
        assert places, f"{path.name} names {name}, which does not exist"


def test_glossary_is_sorted_without_doubles_and_every_term_has_a_chinese_one() -> None:
    rows = rows_under("glossary.md", "term")
    terms = [row[0].lower() for row in rows]
    assert len(set(terms)) == len(terms)
    assert [row[0] for row in rows if not re.search(r"[\u4e00-\u9fff]", row[1])] == []
    assert terms == sorted(terms)


# Metrics: every name that the code gives stands on the page, and every name on the page is given by the code.


def documented() -> dict[str, re.Pattern[str]]:
    names: set[str] = set()
    lines = iter(TEXTS[DOCS / "metrics.md"].splitlines())
    for line in lines:
        if line.startswith("| name |"):
            next(lines)
            names |= {row[0] for row in table_body(lines)}
    return {name: re.compile(re.sub(r"<\w+>", ".+", re.escape(name))) for name in names}


def small_pocket() -> Pocket:
    model = Pocket(PocketConfig(vocab_size=16, width=8, num_layers=1, num_heads=1, table_rows=8))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def small_reward_model(trunk: Pocket) -> ScalarModel:
    return ScalarModel.from_trunk("pocket", trunk, generator=torch.Generator().manual_seed(1))


PIECE = Piece(np.arange(5, dtype=np.int32), np.ones(5, np.float32))
NEXT_TOKEN = NextToken(8, pad_id=1)


def language_step() -> set[str]:
    model, names = small_pocket(), set[str]()
    state = TrainState(model, OptimizerSet(model, OptimConfig.by_role()), Schedule("constant", 1))
    fit(state, lambda step: [(NEXT_TOKEN, NEXT_TOKEN.collate([(PIECE,)]))], 1, [(1, lambda _, m: names.update(m))])
    return names


def ranking_step() -> set[str]:
    model, objective = small_reward_model(small_pocket()), KWiseRanking(8, pad_id=1)
    batch = objective.collate([RankedIds((2,), ((3,), (4,)), (1, 2))])
    return set(train_step(model, OptimizerSet(model, OptimConfig.adamw(1e-3)), [(objective, batch)]))


def ppo_round() -> set[str]:
    config = PPOConfig(rounds=1, episodes=8, minibatch=8, warmup_rounds=0, prompt_length=2, response_length=2)
    policy = small_pocket()
    reward_model = small_reward_model(policy)
    world = World(
        prompts=[[2, 3]],
        pad_id=1,
        stop_ids=frozenset((4,)),
        end_id=4,
        sampler=naive_sampler(pad_id=1, stop_ids=frozenset((4,)), decode=lambda ids: ""),
        scorer=RewardModelScorer(reward_model),
        pretrain=PretrainMix(NEXT_TOKEN, lambda step, rows: NEXT_TOKEN.collate([(PIECE,)] * rows)),
    )
    return set(PPO(config, Actors.start(policy, reward_model), world).round().metrics)


def group_round() -> set[str]:
    """With every part of a reward that has figures of its own."""
    policy = small_pocket()
    model = RewardModelScorer(small_reward_model(policy))
    scorer = RewardSum([Part.model("part", EnsembleScorer([model, model]))], Records({}), str, frozenset())
    config = GRPOConfig(rounds=1, prompts=2, group=4, minibatch=8, warmup_rounds=0, prompt_length=2, response_length=2)
    return set(GRPO(config, PolicyPair.start(policy), small_world(scorer)).round().metrics)


def feedme_round() -> set[str]:
    policy = small_pocket()
    world = small_world(RewardModelScorer(small_reward_model(policy)))
    config = FeedMEConfig(prompts=1, samples=2, steps=1, rows=2, prompt_length=2, response_length=2)
    return set(FeedME(config, policy, world, [((2, 3), (5, 4))]).round().metrics)


def small_world(scorer: Any) -> World:
    sampler = naive_sampler(pad_id=1, stop_ids=frozenset((4,)), decode=lambda ids: "")
    return World([[2, 3]], pad_id=1, stop_ids=frozenset((4,)), end_id=4, sampler=sampler, scorer=scorer)


def preference_step() -> set[str]:
    model, objective = small_pocket(), Preference(8, pad_id=1, reference=small_pocket())
    batch = objective.collate([PreferenceIds((2,), (3,), (4,))])
    return set(train_step(model, OptimizerSet(model, OptimConfig.adamw(1e-3)), [(objective, batch)]))


def kto_step() -> set[str]:
    model, objective = small_pocket(), KTO(8, pad_id=1, reference=small_pocket())
    batch = objective.collate(mismatch([((2,), (3,), True), ((5,), (6,), False)], max_length=8))
    return set(train_step(model, OptimizerSet(model, OptimConfig.adamw(1e-3)), [(objective, batch)]))


def label_step() -> set[str]:
    model = Labels(small_pocket(), 2, generator=torch.Generator().manual_seed(0))
    objective = MultiLabel(8, 1, [1.0, 1.0])
    batch = objective.collate([LabelledIds((2, 3), (True, None))])
    return set(train_step(model, OptimizerSet(model, OptimConfig.adamw(1e-3)), [(objective, batch)]))


class _Scorer:
    """Every token has log-probability -1."""

    row_length: int | None = None

    def logprobs(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Any]:
        firsts = first or [1] * len(sequences)
        return [np.full(len(ids) - start, -1.0) for ids, start in zip(sequences, firsts, strict=True)]


class _Letters:
    """One token a letter."""

    end_of_text_id = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


class _Question(NamedTuple):
    context: str
    question: str
    choices: tuple[str, ...]
    answer: int


def language_eval() -> set[str]:
    documents = {"prose": ["some text"], "stdlib": ["pass"]}
    return set(bits_per_byte.evaluate(_Scorer(), documents, _Letters(), code_sources=["stdlib"]))


def choice_eval() -> set[str]:
    asked = [_Question("", "One?", ("yes", "no"), 0), _Question("", "Two?", ("yes", "no"), 1)]
    return set(multiple_choice.evaluate(_Scorer(), asked, asked, _Letters(), num_shots=1, seed=0))


def answer_eval() -> set[str]:
    said = [Completion("a b", (5, 6, 4), (-1.0, -1.0, -1.0), "stop")]
    kl = generation.kl_estimates([np.array([-1.0])], [np.array([-2.0])])
    return set(generation.describe(said)) | set(kl)


def win_eval() -> set[str]:
    ours, theirs = ["long answer", "b"], ["a", "other"]
    scored = win_rate.evaluate_scores(([1.0, 0.0], [0.0, 1.0]), ours, theirs, seed=0, num_resamples=10)
    pairwise = win_rate.evaluate_pairwise(lambda p, a, b: [0.5] * len(p), ours, ours, theirs, seed=0, num_resamples=10)
    return set(scored) | set(pairwise)


def reward_eval() -> set[str]:
    def ranking(source: str) -> Ranking:
        return Ranking(
            Conversation.of(("user", "Hello")),
            ("Hi there", "Hi thera", "no"),
            (1, 2, 3),
            (True, True, True),
            ("human", "sft", "base"),
            Provenance(source, "0", "MIT"),
        )

    rankings = [ranking("here"), ranking("there")]
    return set(reward_accuracy.evaluate(lambda given: [[2.0, 1.0, 0.0] for _ in given], rankings, seed=0))


def tokenizer_report() -> set[str]:
    return set(fit_metrics([Fit("wikipedia", 10, {"this": 4})]))


def written_in_recipes() -> set[str]:
    """Names that a recipe adds itself: beside `**...metrics`, by `metrics["name"] =`, or as progress of a stage."""
    names: set[str] = set()
    for path in sorted((ROOT / "fledge/recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= set(_added_names(node))
    return names - {"stage"}  # says whose line it is


def _added_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and _is_metrics(node.value):
        yield from _strings([node.slice])
    elif isinstance(node, ast.Dict) and any(
        k is None and _is_metrics(v) for k, v in zip(node.keys, node.values, strict=True)
    ):
        yield from _strings(node.keys)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
        yield from (name for part in node.args if isinstance(part, ast.Dict) for name in _strings(part.keys))


def _is_metrics(node: ast.AST) -> bool:
    return ast.unparse(node).split(".")[-1] == "metrics"


def _strings(nodes: Sequence[ast.AST | None]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def cost_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(Cost)}


def agreement_eval() -> set[str]:
    judged = [{"ann": 1.0, "bo": 1.0, "judge": 0.0}, {"ann": 0.0, "bo": 1.0, "judge": 0.0}]
    return set(agreement.evaluate(judged, is_ai=lambda name: name == "judge", seed=0, num_resamples=10))


class _EvenJudge:
    """Finds everything equally likely."""

    def generate(self, asks: Sequence[Ask]) -> list[Completion]:
        return [Completion("", (), (), "stop") for _ in asks]

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[0.0 for _ in several] for several in continuations]


def made_labels() -> set[str]:
    prompt, origin = Conversation.of(("user", "Hello")), Provenance("here", "0", "MIT")
    candidates = [Candidates(prompt, ("Hi", "Go"), origin)]
    labelled = label(_EvenJudge(), candidates, constitution.load(), LabelConfig("even"))
    judged = judge(_EvenJudge(), [Answered(prompt, "Hi", origin)], constitution.load(), RuleConfig("even"))
    return set(labelled.metrics) | set(judged.metrics)


MAKERS: tuple[Callable[[], set[str]], ...] = (
    *(agreement_eval, made_labels),
    *(language_step, ranking_step, ppo_round, written_in_recipes, group_round, preference_step),
    *(kto_step, label_step, feedme_round),
    *(language_eval, choice_eval, answer_eval, win_eval, reward_eval, tokenizer_report, cost_fields),
)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_metric_that_the_code_gives_stands_on_the_metrics_page(make: Callable[[], set[str]]) -> None:
    names, patterns = make(), documented().values()
    assert names
    missing = {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}
    assert not missing, f"docs/metrics.md lacks {sorted(missing)}"


def test_every_metric_on_the_metrics_page_is_given_by_the_code() -> None:
    given = set[str]().union(*(make() for make in MAKERS))
    unknown = {name for name, pattern in documented().items() if not any(map(pattern.fullmatch, given))}
    assert not unknown, f"docs/metrics.md speaks of {sorted(unknown)}, which nothing gives"
