"""Self-Instruct as a whole: what is kept, the yield report, resuming after a kill, and the seeds."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import Scripted, said

from fledge.data import interchange
from fledge.data.records import Intake
from fledge.data.self_instruct import read_tasks
from fledge.errors import ConfigError, DataError, RunError
from fledge.synth.generating import Ask
from fledge.synth.instruct_filters import reason_against
from fledge.synth.instruct_texts import CHINESE, ENGLISH, Wording
from fledge.synth.rouge import rouge_l, tokens_of
from fledge.synth.seeds import seed_tasks
from fledge.synth.self_instruct import SelfInstructConfig, self_instruct
from fledge.types import Completion

SHARED = Path(__file__).parents[3] / "shared/data/self-instruct-seed-tasks.jsonl"
CONFIG = SelfInstructConfig(target=12, requests=2, batch=3, patience=5)
WORDS = """river stone candle harbour tailor orchard violin glacier market lantern bridge sparrow praise describe defend
recall measure imagine repair question compare celebrate yellow hollow distant gentle broken early winter copper"""


def proposal(ask: Ask) -> str:
    """Three tasks that follow from the seed of the draw: one new, one too short, one about a picture."""
    words = random.Random(ask.params.seed).sample(WORDS.split(), 7)
    return f" {' '.join(words)}\nTask 10: Too short\nTask 11: Describe the picture of a {words[0]}."


def model_reply(ask: Ask) -> str | Completion:
    if ask.prompt.startswith(ENGLISH.propose):
        return proposal(ask)
    instruction = ask.prompt.rstrip().rsplit("Task: ", 1)[1].split("\n")[0]
    if ask.prompt.startswith(ENGLISH.decide):
        return "Yes" if "candle" in instruction else "No" if len(instruction) % 3 else "Perhaps"
    if ask.prompt.startswith(ENGLISH.output_first):
        return "Class label: good\nfine\nClass label: bad\npoor\nClass label: none of them"
    return said("Example 1\nInput: 1\nOutput: one\nExample 2\nInput: 2\nOutput: tw", "length")


def test_tasks_are_new_sound_and_reported_filter_by_filter(tmp_path: Path) -> None:
    model = Scripted(model_reply)
    seeds = seed_tasks()
    made = self_instruct(model, seeds, tmp_path, CONFIG)
    assert len(made.tasks) == 12
    known = [tokens_of(seed.instruction) for seed in seeds]
    for task in made.tasks:
        tokens = tokens_of(task.instruction)
        assert all(rouge_l(tokens, other) < 0.7 for other in known)
        assert reason_against(task.instruction, "en") is None
        assert task.instruction[0].isupper()
        known.append(tokens)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == made.report
    counts = report["instructions"]
    assert counts["kept"] == 12
    assert counts["dropped"]["too short"] == counts["dropped"]["needs more than text"] == report["rounds"] * 2
    assert counts["proposed"] == counts["kept"] + sum(counts["dropped"].values()) == report["rounds"] * 6
    assert sum(report["kinds"].values()) == 12
    other = 12 - report["kinds"]["classification"]
    assert report["instances"]["kept"] == other + 3 * report["kinds"]["classification"]
    assert report["instances"]["dropped"]["unreadable or cut off"] == other
    back = read_tasks(tmp_path / "tasks.jsonl", Intake())
    assert [(t.instruction, t.instances, t.is_classification) for t in back] == [
        (t.instruction, t.instances, t.is_classification) for t in made.tasks
    ]
    assert len(list(interchange.read(tmp_path / "tasks.jsonl"))) == report["instances"]["kept"]


def test_prompts_show_six_seeds_and_two_made_and_sample_as_the_paper_does(tmp_path: Path) -> None:
    model = Scripted(model_reply)
    seeds = seed_tasks()
    made = self_instruct(model, seeds, tmp_path, CONFIG)
    last = [ask for ask in model.asked if ask.prompt.startswith(ENGLISH.propose)][-1]
    shown = [line.split(": ", 1)[1] for line in last.prompt.splitlines()[2:-1]]
    own = {task.instruction for task in seeds}
    assert sum(line in own for line in shown) == 6
    assert sum(line in {task.instruction for task in made.tasks} for line in shown) == 2
    params = last.params
    assert (params.temperature, params.top_p, params.presence_penalty) == (0.7, 0.5, 2.0)
    first = model.asked[0]
    assert len([line for line in first.prompt.splitlines() if line.startswith("Task")]) == 9


@pytest.mark.parametrize("lives", [0, 3, 9, 20, 31, 40])
def test_a_killed_run_ends_with_the_same_tasks_and_asks_nothing_twice(lives: int, tmp_path: Path) -> None:
    whole = Scripted(model_reply)
    expected = self_instruct(whole, seed_tasks(), tmp_path / "whole", CONFIG)
    dying = Scripted(model_reply, dies_after=lives)
    killed = False
    try:
        self_instruct(dying, seed_tasks(), tmp_path / "killed", CONFIG)
    except KeyboardInterrupt:
        killed = True
    assert killed == (lives < len(whole.asked))
    with (tmp_path / "killed/instructions.jsonl").open("a") as file:
        file.write('{"round": 99, "ke')  # a line that the kill cut off
    again = Scripted(model_reply)
    assert self_instruct(again, seed_tasks(), tmp_path / "killed", CONFIG) == expected
    assert len(dying.asked) + len(again.asked) == len(whole.asked)
    assert (tmp_path / "killed/tasks.jsonl").read_bytes() == (tmp_path / "whole/tasks.jsonl").read_bytes()


def test_other_seeds_or_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    self_instruct(Scripted(model_reply), seed_tasks(), tmp_path, CONFIG)
    with pytest.raises(RunError, match="config differ"):
        self_instruct(Scripted(model_reply), seed_tasks(), tmp_path, replace(CONFIG, target=13))
    with pytest.raises(RunError, match="seeds differ"):
        self_instruct(Scripted(model_reply), seed_tasks()[1:], tmp_path, CONFIG)


def test_a_model_that_repeats_itself_is_given_up_after_the_patience(tmp_path: Path) -> None:
    model = Scripted(lambda ask: " Name all the rivers of the continent." if ENGLISH.propose in ask.prompt else "")
    made = self_instruct(model, seed_tasks(), tmp_path, CONFIG)
    assert made.tasks == ()
    assert made.report["rounds"] == 6  # one that gave the instruction, five that gave none
    assert made.report["instructions"]["dropped"] == {"too similar": 11}
    assert made.report["tasks"] == {"with instances": 0, "dropped without one": 1}


def test_chinese_tasks_are_proposed_decided_and_made_in_chinese(tmp_path: Path) -> None:
    verbs, nouns = "赞美描述回忆想象比较", "河流蜡烛港口果园冰川市场"

    def reply(ask: Ask) -> str:
        wording: Wording = CHINESE
        n = ask.params.seed
        if ask.prompt.startswith(wording.propose):
            v, m = 2 * (n % 5), 2 * (n // 5 % 6)
            return f"请{verbs[v : v + 2]}一次与{nouns[m : m + 2]}有关的{n}号往事。\n任务 10：看图片说话，写一句。"
        if ask.prompt.startswith(wording.decide):
            return "否"
        return "例 1\n输入：甲\n输出：乙"

    config = replace(CONFIG, language="zh", target=3)
    made = self_instruct(Scripted(reply), seed_tasks(language="zh"), tmp_path, config)
    assert len(made.tasks) == 3
    assert all(task.instruction.startswith("请") for task in made.tasks)
    assert made.tasks[0].instances[0].output == "乙"
    assert made.report["instructions"]["dropped"]["needs more than text"] > 0


def test_too_few_seeds_and_senseless_counts_are_refused(tmp_path: Path) -> None:
    seeds = seed_tasks()
    with pytest.raises(DataError, match="both kinds"):
        self_instruct(Scripted(), [t for t in seeds if not t.is_classification], tmp_path, CONFIG)
    with pytest.raises(DataError, match="shows 6 seed tasks, got 2"):
        self_instruct(Scripted(), [seeds[0], seeds[-1]], tmp_path, CONFIG)
    with pytest.raises(ConfigError):
        SelfInstructConfig(target=0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_our_seeds_are_varied_and_pass_our_own_filters(language: str) -> None:
    seeds = seed_tasks(language=language)  # type: ignore[arg-type]
    assert len(seeds) >= 30
    assert sum(task.is_classification for task in seeds) >= 8
    assert all(task.instances and all(case.output for case in task.instances) for task in seeds)
    for n, task in enumerate(seeds):
        assert reason_against(task.instruction, language) is None, task.instruction  # type: ignore[arg-type]
        others = [tokens_of(other.instruction) for other in seeds[:n]]
        assert all(rouge_l(tokens_of(task.instruction), other) < 0.7 for other in others), task.instruction


def test_our_seeds_are_at_least_sixty() -> None:
    assert len(seed_tasks()) + len(seed_tasks(language="zh")) >= 60


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared data are not on this machine")
def test_the_papers_seeds_can_be_used_instead(tmp_path: Path) -> None:
    seeds = seed_tasks(SHARED)
    assert len(seeds) == 175
    assert sum(task.is_classification for task in seeds) == 26
    made = self_instruct(Scripted(model_reply), seeds, tmp_path, replace(CONFIG, target=4))
    assert len(made.tasks) == 4
