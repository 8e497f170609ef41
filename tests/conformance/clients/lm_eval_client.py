"""lm-evaluation-harness: log-likelihoods and generation over /v1/completions, generation over chat.

The task is one of our own, on disk. Tokens are counted by the server's /tokenize, so no tokenizer is needed here.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from checks import KEY, MODEL, TEXT, URL, run

_ROWS = [{"question": "How is the weather?", "choices": ["sunny", "a fox"], "label": i % 2} for i in range(4)]
_TASK = """task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
"""
_CHOICE = """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
_ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
_SPEAKING = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "%s"
generation_kwargs: {until: ["~~"], max_gen_toks: 40, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""


def _evaluate(kind: str, path: str, task: str, **options: object) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments = {"model": MODEL, "base_url": f"{URL}/{path}", "max_length": 256, **options}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HOME=folder, HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
        Path(folder, "task.yaml").write_text(_TASK + task, encoding="utf-8")
        os.chdir(folder)
        try:
            found = lm_eval.simple_evaluate(
                kind,
                model_args=arguments,
                tasks=["own"],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                apply_chat_template="chat" in kind,
                bootstrap_iters=0,
            )
        finally:
            os.chdir(here)
    return {"samples": found["samples"]["own"], **found["results"]["own"]}


def _tokens(text: str) -> int:
    import requests

    body = {"prompt": text, "add_special_tokens": False}
    asked = requests.post(URL.replace("/v1", "/tokenize"), json=body, headers={"Authorization": f"Bearer {KEY}"})
    return int(asked.json()["count"])


def _counted(found: dict[str, Any]) -> None:
    """The server of the tests gives each token of a prompt -1, so a choice has minus as many as it has tokens."""
    for sample in found["samples"]:
        for choice, [said] in zip(_ROWS[0]["choices"], sample["resps"], strict=True):
            assert float(said[0]) < 0
            assert TEXT is None or float(said[0]) == -_tokens(" " + choice), (choice, said)


def log_likelihoods_of_token_prompts() -> None:
    _counted(_evaluate("local-completions", "completions", _CHOICE, tokenizer_backend="remote", auth_token=KEY))


def log_likelihoods_in_batches() -> None:
    options = {"tokenizer_backend": "remote", "auth_token": KEY, "batch_size": 4}
    _counted(_evaluate("local-completions", "completions", _CHOICE, **options))


def log_likelihoods_of_texts() -> None:
    options = {"tokenizer_backend": "remote", "auth_token": KEY, "tokenized_requests": False}
    _counted(_evaluate("local-completions", "completions", _CHOICE, **options))


def rolling_log_likelihoods() -> None:
    import requests

    about = requests.get(URL.replace("/v1", "/tokenizer_info"), headers={"Authorization": f"Bearer {KEY}"}).json()
    start = about["special_tokens"][about["bos_token"]]
    options = {"tokenizer_backend": "remote", "auth_token": KEY, "custom_prefix_token_id": start}
    found = _evaluate("local-completions", "completions", _ROLLING, **options)
    told = [sample["resps"][0][0] for sample in found["samples"]]
    assert all(float(value) < 0 for value in told)
    assert TEXT is None or [float(value) for value in told] == [-_tokens(_ROWS[0]["question"])] * len(_ROWS), told


def generation() -> None:
    options = {"tokenizer_backend": "remote", "auth_token": KEY}
    found = _evaluate("local-completions", "completions", _SPEAKING % TEXT, **options)
    assert TEXT is None or found["exact_match,none"] == 1.0


def chat() -> None:
    found = _evaluate("local-chat-completions", "chat/completions", _SPEAKING % TEXT, num_concurrent=2)
    assert TEXT is None or found["exact_match,none"] == 1.0


if __name__ == "__main__":
    run(globals())
