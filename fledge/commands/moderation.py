"""`fledge moderation train | card | check`: the model behind /v1/moderations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fledge.commands.running import add_run_options, listener_of
from fledge.errors import UserError

DEFAULT_NAME = "moderation"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("moderation", help="train and show the model behind /v1/moderations")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train one on a model of yours, set its thresholds, measure it")
    train.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    train.add_argument("--data", type=Path, nargs="+", default=[], metavar="PATH", help="labelled texts of your own")
    train.add_argument("--only-own", action="store_true", help="learn from --data alone")
    train.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    train.add_argument("--plan", action="store_true", help="show the plan; run nothing")
    train.add_argument("--name", default=DEFAULT_NAME, help="name of the run (default: %(default)s)")
    add_run_options(train)
    train.set_defaults(run=run_train)
    card = actions.add_parser("card", help="precision, recall, and what it cannot do")
    card.set_defaults(run=run_card)
    check = actions.add_parser("check", help="what it says of a text")
    check.add_argument("text", metavar="TEXT")
    check.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    check.set_defaults(run=run_check)
    for one in (card, check):
        one.add_argument("--model", metavar="RUN", default=DEFAULT_NAME, help="(default: %(default)s)")
        one.add_argument("--runs", type=Path, default=Path("runs"), help="where runs live (default: %(default)s)")


def run_train(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for an order that cannot be carried out."""
    from fledge.config import to_json
    from fledge.recipes.moderation import ModerationOrder, plan_of, train_moderation

    order = ModerationOrder(
        model=args.model,
        data=tuple(args.data),
        is_only_own=args.only_own,
        seed=args.seed,
        overrides=tuple(args.overrides),
        name=args.name,
        runs=args.runs,
    )
    if args.plan:
        print(json.dumps(to_json(plan_of(order)), indent=None if args.as_json else 2, ensure_ascii=False))
        return 0
    folder = train_moderation(order, listener_of(args))
    if args.as_json:
        print(json.dumps({"event": "done", "folder": str(folder), "card": str(folder / "card.md")}))
    else:
        print(
            f"{folder.parent.name}: its card is {folder / 'card.md'}; serve with it: --moderation {folder.parent.name}"
        )
    return 0


def run_card(args: argparse.Namespace) -> int:
    from fledge.commands.serving import moderation_folder

    folder = moderation_folder(args.model, args.runs)
    if folder is None or not (folder / "card.md").is_file():
        raise UserError(f"no moderation model '{args.model}' in {args.runs}; make one: fledge moderation train RUN")
    print((folder / "card.md").read_text(encoding="utf-8"))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Exit code 0, whatever is found; `UserError` if there is no model."""
    from fledge.commands.serving import moderation_folder
    from fledge.infer.process import EngineProcess
    from fledge.safety.classifier import read_classifier

    folder = moderation_folder(args.model, args.runs)
    if folder is None:
        raise UserError(f"no moderation model '{args.model}' in {args.runs}; make one: fledge moderation train RUN")
    classifier = read_classifier(folder)
    engine = EngineProcess(folder / "model")
    try:
        rows = classifier.rows(args.text)
        verdict = classifier.verdict(args.text, engine.embed(rows))
    finally:
        engine.close()
    if args.as_json:
        print(json.dumps({"flagged": verdict.flagged, "scores": verdict.scores}))
        return 0
    for name, score in sorted(verdict.scores.items(), key=lambda item: -item[1]):
        print(f"{score:.4f}  {name}{'  flagged' if name in verdict.flagged else ''}")
    return 0
