"""`fledge chat`, `complete` and `compare` on a small run made here: what they say, and what they refuse in one line."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from fledge import cli
from fledge.commands import chat, serve, speaking
from fledge.config import to_json
from fledge.errors import UserError
from fledge.files import write_json
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.gpt import GPT, GPTConfig
from fledge.models.ngram import NGram, NGramConfig
from fledge.serve.hub import ModelEntry
from fledge.serve.loading import ProcessLoader
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer
from fledge.types import Conversation

POSITIONS = 64


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the old cat sat on a mat and saw the dog", "what is it? it is a hill. über alles 中文"] * 20
    return train_tokenizer(texts, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """`small` with the stages pretrain, sft and ppo of a random model, and `counts`, whose model only counts."""
    runs = tmp_path_factory.mktemp("runs")
    for seed, stage in enumerate(("pretrain", "sft", "ppo")):
        model = GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, POSITIONS))
        model.init_weights(torch.Generator().manual_seed(seed))
        add_stage(runs / "small", stage, "gpt", model, tokenizer)
    add_stage(runs / "counts", "sft", "ngram", NGram(NGramConfig(tokenizer.vocab_size, 2)), tokenizer)
    return runs


def add_stage(run, stage, family, model, tokenizer):
    template_hash = ChatRenderer(tokenizer).hash
    info = CheckpointInfo(family, to_json(model.config), stage, tokenizer.hash, template_hash)
    save_model(run / stage / "model", model, tokenizer, info)
    write_json(run / stage / "manifest.json", {})
    write_json(run / "plan.json", {})


def fledge(*arguments, runs):
    return cli.main([*arguments, "--runs", str(runs)])


def refused(capsys, *arguments, runs):
    """What a command that must refuse says, in one line and with code 2."""
    assert fledge(*arguments, runs=runs) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture
def typed(monkeypatch):
    """Lines for standard input, which is then no terminal."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_complete_prints_the_text_and_what_follows(runs, capsys):
    assert fledge("complete", "small:sft", "the old", "--max-tokens", "8", runs=runs) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the old")
    assert len(said.out) > len("the old\n")
    assert said.err == ""


def test_complete_gives_json_whose_first_seed_is_the_streamed_one(runs, capsys):
    options = ("complete", "small", "the cat", "--max-tokens", "8", "--seed", "5")
    fledge(*options, runs=runs)
    streamed = capsys.readouterr().out
    assert fledge(*options, "-n", "3", "--json", runs=runs) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seed"] for row in rows] == [5, 6, 7]
    assert speaking.printable("the cat" + rows[0]["text"]) + "\n" == streamed
    assert all(len(row["ids"]) == len(row["logprobs"]) <= 8 for row in rows)
    assert len({row["text"] for row in rows}) > 1


def test_complete_numbers_several_completions(runs, capsys):
    assert fledge("complete", "small", "a", "-n", "2", "--max-tokens", "3", runs=runs) == 0
    out = capsys.readouterr().out
    assert "--- 1 of 2\na" in out
    assert "--- 2 of 2\na" in out


def test_complete_reads_standard_input(runs, capsys, typed):
    typed("über".encode())
    assert fledge("complete", "small", "-", "--max-tokens", "2", "--json", runs=runs) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "über"
    typed(b"a\xff")
    assert "standard input: not UTF-8 at byte 1" in refused(capsys, "complete", "small", "-", runs=runs)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("complete", "small", ""), "empty"),
        (("complete", "smal", "a"), "did you mean 'small'"),
        (("complete", "small:sfd", "a"), "no model 'sfd'"),
        (("complete", "small", "the " * 200), "64 positions"),
        (("complete", "small", "a", "--max-tokens", "0"), "max_tokens must be at least 1"),
        (("complete", "small", "a", "--temperature", "-1"), "temperature"),
        (("complete", "small", "a", "--temperature", "nan"), "temperature"),
        (("complete", "small", "a", "--top-p", "2"), "top_p"),
        (("complete", "small", "a", "--seed", "-1"), "--seed -1"),
        (("complete", "small", "a", "-n", "0"), "-n 0"),
        (("complete", "counts", "a"), "gives no answers"),
        (("compare", "small:sft"), "nothing to ask"),
        (("compare", "small:sft", "--prompt", " "), "empty"),
        (("compare", "small:sft", "--prompt", "cat " * 90), "leaves no room"),
        (("compare", "small:sft", "small:none", "--prompt", "a"), "no model 'none'"),
        (("chat", "none"), "no run 'none'"),
        (("chat", "small", "--max-tokens", "64"), "leave it room"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(runs, capsys, arguments, complaint):
    assert complaint in refused(capsys, *arguments, runs=runs)


def test_a_text_of_megabytes_is_refused_before_it_is_encoded(runs, capsys, typed, monkeypatch):
    monkeypatch.setattr(speaking, "MAX_PROMPT_CHARS", 1000)
    typed(b"a" * 1001)
    assert "a text of 1,001 characters" in refused(capsys, "complete", "small", "-", runs=runs)
    typed(b"a" * 1001 + b"\nthe cat\n")
    assert fledge("chat", "small:sft", "--max-tokens", "4", runs=runs) == 0
    said = capsys.readouterr()
    assert "a text of 1,001 characters" in said.err
    assert said.out.count("\n") == 1


def test_compare_shows_every_prompt_and_model(runs, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("[bold]what is it?\n\nthe dog\n", encoding="utf-8")
    options = ("--prompt", "the cat", "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "6")
    assert fledge("compare", "small:sft", "small:ppo", *options, runs=runs) == 0
    out = capsys.readouterr().out
    assert out.index("the cat") < out.index("[bold]what is it?") < out.index("the dog")
    assert out.count("small:sft") == out.count("small:ppo") == 3


def test_compare_gives_json_with_one_answer_a_model_and_prompt(runs, capsys):
    models = ("small:sft", "small:ppo", "small:sft")
    options = ("--prompt", "the cat", "--prompt", "a mat", "--max-tokens", "6", "--json")
    assert fledge("compare", *models, *options, runs=runs) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "a mat"]
    for row in rows:
        assert tuple(answer["model"] for answer in row["answers"]) == models
        assert row["answers"][0] == row["answers"][2]
        assert row["answers"][0] != row["answers"][1]
    fledge("compare", "small:sft", *options, "--complete", runs=runs)
    [first, _] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["answers"][0] != rows[0]["answers"][0]


def test_compare_refuses_files_without_a_prompt(runs, capsys, tmp_path):
    for name, data, complaint in (("a", b"\n \n", "holds no prompt"), ("b", b"\xff", "not UTF-8 at byte 0")):
        (tmp_path / name).write_bytes(data)
        assert complaint in refused(capsys, "compare", "small", "--file", str(tmp_path / name), runs=runs)
    assert "No such file" in refused(capsys, "compare", "small", "--file", str(tmp_path / "c"), runs=runs)


def test_a_piped_chat_answers_every_line_and_ends_with_zero(runs, capsys, typed):
    typed(b"the cat\n\n  \nwhat is it?\xff\n")
    assert fledge("chat", "small", "--max-tokens", "5", runs=runs) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("\n") >= 2
    typed(b"")
    assert fledge("chat", "small", runs=runs) == 0
    assert capsys.readouterr().out == ""


def test_a_chat_command_that_fails_says_so_and_the_chat_goes_on(runs, capsys, typed):
    typed(b"/nonsense\n/stage none\n" + b"cat " * 90 + b"\n/stage\n/stage sft\n/help\n/quit\nthe cat\n")
    assert fledge("chat", "small", runs=runs) == 0
    said = capsys.readouterr()
    complaints = said.err.splitlines()
    assert [("no command '/nonsense'" in c, "'none'" in c, "no room" in c) for c in complaints] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    lines = said.out.splitlines()
    assert lines[0] == "pretrain, sft, ppo"
    assert lines[1].startswith("small:sft: gpt, 0.0M parameters, stage sft")
    assert "/reset" in said.out
    assert said.out.endswith(f"{chat.HELP}\n")  # nothing is answered after /quit


def opened(runs, model="small", **options) -> chat.Chat:
    asked = {"max_tokens": 6, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    asked |= {"seed": 0, "system": None, "draft": None, "compile": False, **options}
    args = SimpleNamespace(model=model, runs=runs, **asked)
    return chat.Chat(args, speaking.load_speaker(model, runs, args.draft))


def said_by(talk):
    return [(message.role, message.text) for message in talk.conversation.messages]


def test_a_chat_remembers_until_it_is_reset(runs, capsys):
    talk = opened(runs, system="be kind")
    assert talk.hear("the cat")
    answer = capsys.readouterr().out
    assert said_by(talk)[:2] == [("system", "be kind"), ("user", "the cat")]
    assert speaking.printable(said_by(talk)[2][1]) == answer[:-1]
    assert talk.hear("a mat")
    assert [role for role, _ in said_by(talk)] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.hear("/reset")
    assert said_by(talk) == [("system", "be kind")]
    assert not talk.hear("/quit")


def test_a_message_that_is_refused_leaves_the_conversation_as_it_was(runs, capsys):
    talk = opened(runs)
    talk.hear("the cat")
    before = said_by(talk)
    for line in ("cat " * 90, "/stage none", "/nothing", "\ud800"):
        with pytest.raises(UserError):
            talk.hear(line)
        assert said_by(talk) == before
    talk.hear("/stage pretrain")
    assert "not learned to chat yet" in capsys.readouterr().out
    assert said_by(talk) == before


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(runs, capsys, monkeypatch):
    talk = opened(runs, max_tokens=30)
    whole = speaking.Speaker.stream

    def interrupted(self, *arguments):
        events = whole(self, *arguments)
        yield next(events)
        yield next(events)
        raise KeyboardInterrupt

    monkeypatch.setattr(speaking.Speaker, "stream", interrupted)
    assert talk.hear("the cat")
    out = capsys.readouterr().out
    assert out.endswith(" (stopped)\n")
    assert out == f"{speaking.printable(said_by(talk)[1][1])} (stopped)\n"


def test_typed_lines_end_at_ctrl_d_and_survive_ctrl_c(monkeypatch, capsys):
    answers = iter(["one", KeyboardInterrupt(), "two", EOFError()])

    def typing(prompt):
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", typing)
    assert list(chat._typed_lines()) == ["one", "two"]
    assert "(Ctrl-D leaves)" in capsys.readouterr().out


def test_what_a_terminal_of_another_encoding_types_is_no_reason_to_stop(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO("你好\n".encode("gb18030") + b"hello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    first, second = chat._typed_lines()
    assert "\ufffd" in first
    assert second == "hello"


def test_the_oldest_exchanges_leave_first_and_the_system_stays(tokenizer):
    renderer = ChatRenderer(tokenizer)
    turns = [
        ("system", "the"),
        ("user", "a cat"),
        ("assistant", "a mat"),
        ("user", "a dog"),
        ("assistant", "a hill"),
    ]
    whole = Conversation.of(*turns, ("user", "what"))
    lengths = {}
    for room in range(len(renderer.prompt(whole)), 0, -1):
        try:
            lengths.setdefault(speaking.within(renderer, whole, room, 9), room)
        except UserError:
            break
    expected = [renderer.prompt(Conversation.of(turns[0], *turns[start:], ("user", "what"))) for start in (1, 3, 5)]
    assert list(lengths) == expected
    assert room == len(expected[-1]) - 1
    assert speaking.within(renderer, whole, None, 9) == expected[0]


def test_a_draft_model_changes_no_answer_and_must_have_the_same_tokens(runs, capsys, typed, tmp_path):
    said = []
    for options in ((), ("--draft", "small:pretrain")):
        assert fledge("complete", "small", "the cat", "-n", "2", "--max-tokens", "20", *options, runs=runs) == 0
        typed(b"hello\n/stage sft\nhello\n")
        assert fledge("chat", "small", "--max-tokens", "12", *options, runs=runs) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    talk = opened(runs, draft="small:pretrain")
    talk.hear("hello")
    assert talk.speaker.engine.stats().num_draft_tokens > 0
    capsys.readouterr()
    other = train_tokenizer(["nothing of the kind"] * 20, TokenizerConfig(vocab_size=290))
    add_stage(tmp_path / "other", "sft", "gpt", GPT(GPTConfig(other.vocab_size, 16, 1, 2, POSITIONS)), other)
    error = refused(capsys, "complete", "small", "a", "--draft", str(tmp_path / "other/sft/model"), runs=runs)
    assert "must share a tokenizer" in error
    assert "guesses no tokens" in refused(capsys, "complete", "small", "a", "--draft", "counts", runs=runs)


def test_a_draft_model_is_served_to_those_of_its_tokenizer_only(runs, tokenizer, tmp_path):
    other = train_tokenizer(["nothing of the kind"] * 20, TokenizerConfig(vocab_size=290))
    add_stage(tmp_path / "other", "sft", "gpt", GPT(GPTConfig(other.vocab_size, 16, 1, 2, POSITIONS)), other)
    small, stranger = runs / "small/ppo/model", tmp_path / "other/sft/model"
    loader = ProcessLoader(draft=runs / "small/sft/model")
    assert loader.draft_for(tokenizer) == loader.draft
    assert loader.draft_for(other) is None
    assert loader.size(small) > ProcessLoader().size(small) + (small / "model.safetensors").stat().st_size
    entries = [ModelEntry(path.name, 0, "fledge", path=path) for path in (stranger, small)]
    serve._refuse_idle_draft(loader, entries)
    with pytest.raises(UserError, match="none of the models has its tokenizer"):
        serve._refuse_idle_draft(loader, entries[:1])


def test_an_adapter_is_served_under_a_name_of_its_own_over_one_of_the_models(runs, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    own = serve.model_entries(["small"], ["big=small"], runs, [f"x=small={tmp_path / 'adapter'}"])
    assert [(entry.name, entry.target, entry.adapter is None) for entry in own] == [
        ("small", None, True),
        ("big", "small", True),
        ("x", "small", False),
    ]
    for wrong in ("x", "x=small", f"x=big={tmp_path / 'adapter'}", "x=small=nowhere", f"=small={tmp_path / 'adapter'}"):
        with pytest.raises(UserError, match="expected NAME=MODEL=FOLDER"):
            serve.model_entries(["small"], ["big=small"], runs, [wrong])
    with pytest.raises(UserError, match="two models are named 'big'"):
        serve.model_entries(["small"], ["big=small"], runs, [f"big=small={tmp_path / 'adapter'}"])


def test_control_characters_never_reach_the_terminal():
    assert speaking.printable("a\x1b[31mb\x07\r\u009b\tc\nd\u200d中") == "a[31mb\tc\nd\u200d中"


def test_an_answer_takes_half_of_what_the_model_reads_unless_asked(runs):
    speaker = speaking.load_speaker("small", runs)
    assert speaker.context == POSITIONS
    assert speaker.answer_tokens(None) == POSITIONS // 2
    assert speaker.answer_tokens(7) == 7
    unlimited = speaking.Speaker("x", speaker.loaded, None, speaker.engine)
    assert unlimited.answer_tokens(None) == speaking.MAX_ANSWER_TOKENS
