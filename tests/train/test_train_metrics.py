"""Metrics on disk survive a kill; accounting agrees with arithmetic done by hand and with torch's own counter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fledge.errors import ConfigError, RunError
from fledge.models.pocket import Pocket, PocketConfig
from fledge.train.metrics import JsonLines, TensorBoard, flops_per_token, measured_peak


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_torn_last_line_and_steps_that_will_come_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLines(path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 1 / step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    writer = JsonLines(path, from_step=3)
    writer.write({"step": 4, "loss": 0.5})
    writer.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    assert lines(path)[-1]["loss"] == 0.5


def test_every_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.write({"step": 1, "text": "ü"})
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "text": "ü"}]
    writer.close()


def test_nan_becomes_null_because_json_has_no_nan(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.write({"step": 1, "loss": float("nan"), "norm": float("inf")})
    writer.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "norm": None}]


def test_other_stages_in_the_same_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonLines(path)
    for stage in ("base", "sft"):
        for step in (1, 2, 3):
            writer.write({"stage": stage, "step": step})
    writer.close()
    JsonLines(path, 1, stage="sft").close()
    assert [(line["stage"], line["step"]) for line in lines(path)] == [
        ("base", 1),
        ("base", 2),
        ("base", 3),
        ("sft", 1),
    ]


def test_what_follows_a_line_torn_in_the_middle_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    JsonLines(path, from_step=9).close()
    assert lines(path) == [{"step": 1}]


def test_flops_by_hand_and_by_torchs_counter() -> None:
    """Forward and backward of one row, counted by torch, equal the formula to the last product."""
    config = PocketConfig(40, width=16, num_layers=2, num_heads=2, table_rows=0)
    model = Pocket(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    by_hand = 6 * (2 * (4 * 16 * 16 + 2 * 16 * 64) + 40 * 16) + 12 * 2 * 16 * 32
    assert flops_per_token(sizes, model.roles(), config, 32) == by_hand
    # The plain arithmetic of attention: torch's counter does not know the fused kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.next_logprobs(torch.zeros(1, 32, dtype=torch.int64)).sum().backward()
    assert counter.get_total_flops() == 32 * by_hand


def test_a_tied_head_counts_as_a_product_too() -> None:
    config = PocketConfig(40, width=16, num_layers=1, num_heads=2, table_rows=0)
    untied = flops_per_token({"m": 100, "h": 640}, {"m": "matrix", "h": "head"}, config, 8)
    tied = flops_per_token({"m": 100, "e": 640}, {"m": "matrix", "e": "embedding"}, config, 8)
    assert tied == untied


def test_the_measured_peak_is_a_rate() -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), ((64, 2), (128, 1))) < 1e14


def test_tensorboard_files_hold_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = TensorBoard(tmp_path)
    writer.write({"loss": 1.5}, 3)
    writer.close()
    assert any(path.name.startswith("events") and path.stat().st_size > 0 for path in tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.close()
    writer._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    for act in (lambda: writer.write({"step": 1}), writer.close):
        with pytest.raises(RunError, match=r"m\.jsonl: the disk is full.*Free some space and run the same command"):
            act()


def test_without_tensorboard_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match="--tensorboard needs the package tensorboard: pip install"):
        TensorBoard(tmp_path)
