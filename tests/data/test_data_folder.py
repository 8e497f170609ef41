"""The user's folder: text, code and chats in any language; every kind of bad input is refused by name or counted."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fledge.data.corpus import Ingredient, write_corpus
from fledge.data.filters import example_text
from fledge.data.folder import as_dialogue, content_hash, contents, examples, num_bytes, path_examples
from fledge.data.jsonl import file_examples
from fledge.data.reading import Drops, lines, text_blocks
from fledge.errors import DataError
from fledge.types import ChatExample, TextExample

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    """The one line with which reading `path` is refused."""
    with pytest.raises(DataError) as caught:
        list(path_examples(path, "user"))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_text_code_chats_and_chinese_are_found_below_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufeff天下大势，分久必合\r\n合久必分\r\n")
    write(tmp_path / "deep/code.py", "import os\n\n\ndef f():\n    return os\n")
    write(tmp_path / "deep/README", "Read me.")
    write(tmp_path / "chat.jsonl", json.dumps(CHAT) + "\n\n" + json.dumps({"text": "plain"}) + "\n")
    write(tmp_path / "talk.md", "User: who are you?\nAssistant: A bird.\n\nOf the woods.\n")
    write(tmp_path / "picture.png", b"\x89PNG\0")
    write(tmp_path / ".git/config.txt", "hidden")
    drops = Drops()
    found = {example.provenance.id: example for example in path_examples(tmp_path, "mine", drops=drops)}
    assert set(found) == {"a.txt", "deep/code.py", "deep/README", "chat.jsonl:1", "chat.jsonl:3", "talk.md"}
    assert example_text(found["a.txt"]) == "天下大势，分久必合\n合久必分\n"
    assert isinstance(found["chat.jsonl:1"], ChatExample)
    assert example_text(found["talk.md"]) == "who are you?\nA bird.\n\nOf the woods."
    assert drops.counts == {"not a text file by its name": 1, "hidden folder or one that tools make": 1}
    assert all(example.provenance.source == "mine" for example in found.values())


def test_the_folder_is_a_source_with_sides(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / f"{number}.txt", f"document {number}")
    sides = [{example_text(e) for e in examples(split, cache=tmp_path, seed=0)} for split in ("train", "validation")]
    assert len(sides[0] | sides[1]) == 60
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["is empty"]),
        ("a.txt", b"ELF\0\1\2", ["NUL byte at byte 3", "binary or UTF-16"]),
        ("a.txt", "hällo".encode("latin-1"), ["not valid UTF-8: byte 0xe4 at byte 1", "iconv"]),
        ("a.txt", "中文".encode("gb18030"), ["not valid UTF-8", "GB18030"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["line 2 is not JSON"]),
        ("a.jsonl", b'["text"]\n', ["line 1 is a JSON list"]),
        ("a.jsonl", b'{"text": 3}\n', ["line 1: text is a int", "expected a string"]),
        ("a.jsonl", b'{"body": "x"}\n', ["line 1 has the keys body", '"text"']),
        ("a.jsonl", b'{"messages": "x"}\n', ["messages is a str", "expected a list"]),
        ("a.jsonl", b'{"messages": [{"role": "boss", "content": "x"}]}\n', ["role 'boss'", "user"]),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', ["messages[0]", '"content"']),
        ("a.jsonl", b"\xff\xfe\n", ["line 1 is not valid UTF-8"]),
        ("a.jsonl", b'{"text": "\0"}\n', ["line 1 has a NUL byte"]),
        ("a.parquet", b"PAR1 not really", ["is not a sound Parquet file"]),
        ("a.parquet", b"", ["is not a sound Parquet file"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_or_counted(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    path = write(tmp_path / "data" / name, content)
    said = refusal(path)
    for part in [str(path), *parts]:
        assert part in said
    write(tmp_path / "data" / "good.txt", "good")
    bad = Drops()
    found = list(path_examples(tmp_path / "data", "user", drops=bad, bad=bad))
    assert "good" in [example_text(example) for example in found]
    assert bad.counts.total() == 1


def test_an_empty_file_in_a_folder_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "__init__.py", "")
    write(tmp_path / "a.py", "x = 1\n")
    drops = Drops()
    assert len(list(path_examples(tmp_path, "user", drops=drops))) == 1
    assert drops.counts == {"empty file": 1}


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    assert "holds no text" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "nowhere")
    write(tmp_path / "a.png", b"\0")
    assert "1 x not a text file by its name" in refusal(tmp_path)


def test_links_in_a_circle_and_links_to_nowhere_end_and_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "sub/a.txt", "text")
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    drops = Drops()
    assert len(list(path_examples(tmp_path, "user", drops=drops))) == 1
    assert drops.counts == {"folder met before (a link)": 1, "link that leads nowhere": 2}
    assert "does not exist" in refusal(tmp_path / "self.txt")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is not a regular file" in refusal(tmp_path / "pipe.txt")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "secret")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode keeps out
    assert f"cannot read {path}: Permission denied" in refusal(path)


def test_a_folder_that_may_not_be_read_is_refused_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")
    locked = write(tmp_path / "locked/b.txt", "secret").parent
    whole = os.scandir

    def scandir(path: str) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"cannot read {locked}: Permission denied" in refusal(tmp_path)
    for reads in (content_hash, contents):
        with pytest.raises(DataError, match="Permission denied"):
            reads(tmp_path)
    bad = Drops()
    assert len(list(path_examples(tmp_path, "user", bad=bad))) == 1
    assert bad.first == {"folder that cannot be read": str(locked)}


def test_runs_and_models_of_ours_are_not_read_as_text(tmp_path: Path) -> None:
    """`fledge raise --text .` finds its own run folder there from the second time on."""
    write(tmp_path / "a.txt", "text")
    before, size = content_hash(tmp_path), num_bytes(tmp_path)
    for name in ("plan.json", ".lock", "metrics.jsonl", "card.html", "corpus/documents/train.jsonl"):
        write(tmp_path / "runs/pocket" / name, '{"stage": "corpus"}')
    for name in ("run.json", "model.safetensors", "tokenizer.json"):
        write(tmp_path / "runs/smollm2" / name, "{}")
    assert (content_hash(tmp_path), num_bytes(tmp_path)) == (before, size) == (content_hash(tmp_path), 4)
    drops = Drops()
    assert len(list(path_examples(tmp_path, "user", drops=drops))) == 1
    assert drops.counts == {"run or model of fledge": 2}
    write(tmp_path / "notes/plan.json", '{"monday": "rest"}')
    assert len(list(path_examples(tmp_path, "user"))) == 2


def test_a_line_of_a_record_file_beyond_the_limit_is_refused_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n' + "x" * 200 + "\n")
    with pytest.raises(DataError, match="line 2 is longer than 100 bytes"):
        list(lines(path, max_bytes=100))
    assert [number for number, _ in lines(path, max_bytes=201)] == [1, 2]


def test_a_text_of_one_endless_line_is_read_in_pieces_and_nothing_is_lost(tmp_path: Path) -> None:
    content = "三国 words without an end " * 150_000
    path = write(tmp_path / "long.txt", content)
    found = list(path_examples(path, "user"))
    assert len(found) > 3
    assert "".join(example_text(example) for example in found) == content


@pytest.mark.slow
def test_a_line_of_200_megabytes_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"word " * 200_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(len(example_text(example)) for example in path_examples(path, "user"))
    assert total == path.stat().st_size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    record = tmp_path / "long.jsonl"
    path.rename(record)
    assert "line 1 is longer than" in refusal(record)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 1000])
def test_blocks_join_to_the_text_wherever_they_are_cut(tmp_path: Path, block_bytes: int) -> None:
    path = write(tmp_path / "a.txt", "\ufeffé\r\n三国\r\r\n👩‍👧 end".encode())
    if block_bytes >= 3:
        assert "".join(text_blocks(path, block_bytes)) == "é\n三国\n\n👩‍👧 end"
    broken = write(tmp_path / "b.txt", "三国".encode() + b"\xe4\xb8")
    with pytest.raises(DataError, match="byte 0xe4 at byte 6"):
        list(text_blocks(broken, block_bytes))


def test_parquet_and_jsonl_read_the_same_records(tmp_path: Path) -> None:
    records = [
        {"prompt": "2 + 2?", "completion": "4"},
        {
            "prompt": [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}],
            "completion": [{"role": "assistant", "content": "4"}],
        },
    ]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    found = [example.conversation for example in file_examples(jsonl, "user") if isinstance(example, ChatExample)]
    assert [message.role for message in found[1].messages] == ["system", "user", "assistant"]
    pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "plain"}, {"text": "more"}]), tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_pylist([CHAT]), tmp_path / "c.parquet")
    parquet = [next(iter(path_examples(tmp_path / f"{name}.parquet", "user"))) for name in "abc"]
    assert isinstance(parquet[0], ChatExample)
    assert parquet[0].conversation == found[0]
    assert isinstance(parquet[1], TextExample)
    assert example_text(parquet[2]) == "hi\nhello"
    pq.write_table(pa.Table.from_pylist([{"body": "x"}]), tmp_path / "d.parquet")
    assert "has the columns body" in refusal(tmp_path / "d.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": 1}]), tmp_path / "e.parquet")
    assert "row 0: text is a int" in refusal(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("User: a\nAssistant: b\nUser: c", ["user", "assistant", "user"]),
        ("用户：你好\n助手：你好！", ["user", "assistant"]),
        ("**Human:** a\n**Assistant:** b", ["user", "assistant"]),
        ("Preface.\nUser: a\nAssistant: b", None),
        ("User: only one side", None),
        ("The user: a person.", None),
    ],
)
def test_transcripts_are_conversations_and_other_texts_are_not(text: str, roles: list[str] | None) -> None:
    conversation = as_dialogue(text)
    assert (conversation and [message.role for message in conversation.messages]) == roles


def test_the_content_hash_changes_with_names_and_contents_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    first = content_hash(tmp_path)
    os.utime(path, (0, 0))
    assert content_hash(tmp_path) == first
    write(path, "two")
    second = content_hash(tmp_path)
    path.rename(tmp_path / "b.txt")
    assert len({first, second, content_hash(tmp_path)}) == 3
    assert content_hash(tmp_path / "b.txt")


def test_program_code_and_everything_else_are_told_apart_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def tell():\n    return 'a long enough function'\n")
    (tmp_path / "b.md").write_text("A page about something else entirely.")
    assert contents(tmp_path) == {"code", "other"}
    code = [example.provenance.id for example in path_examples(tmp_path, "own", only="code")]
    other = [example.provenance.id for example in path_examples(tmp_path, "own", only="other")]
    assert (code, other) == (["a.py"], ["b.md"])


def test_files_whose_names_are_no_utf8_are_read_and_written_down(tmp_path: Path) -> None:
    """Archives made on a Chinese Windows unpack to names in GBK."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("文章.txt", "记录.jsonl", "图.pdf"):
        content = b'{"text": "A record with enough text."}\n' if name.endswith("jsonl") else b"A text long enough. " * 9
        (folder / os.fsdecode(name.encode("gbk"))).write_bytes(content)
    ingredient = Ingredient("user", str(folder))
    corpus = write_corpus([ingredient], tmp_path / "corpus", cache=tmp_path, seed=0)
    found = sorted(example.provenance.id for example in corpus.examples("all"))
    assert [name.rpartition(".")[2] for name in found] == ["jsonl:1", "txt"]
    assert all("\ufffd" in name for name in found)
    [facts] = corpus.yields["user"]["unusable"].values()
    assert facts["first"].endswith(".pdf")
