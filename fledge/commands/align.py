"""`fledge align METHOD MODEL --data PATH`: one method of alignment on one model, or what is left of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fledge.commands.running import add_run_options, listener_of
from fledge.errors import ConfigError, nearest


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("align", help="align a model: preferences, rewards, demonstrations")
    parser.add_argument("method", nargs="?", metavar="METHOD", help="dpo, grpo, ...; see --list")
    parser.add_argument("model", nargs="?", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("--list", action="store_true", dest="list_methods", help="show the methods and end")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="PATH", help="files to learn from")
    parser.add_argument("--format", help="of the files (default: recognised)")
    parser.add_argument("--held-out", type=Path, metavar="PATH", help="measure on this file, not on a part of --data")
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be used instead of stopping")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank (default: all weights)")
    parser.add_argument("--lora-targets", nargs="+", metavar="NAME", help="layers to adapt, by the ends of their names")
    parser.add_argument("--soft-prompt", type=int, metavar="TOKENS", help="train a soft prompt of this length (sft)")
    parser.add_argument("--select-by", metavar="RUN[:STAGE]", help="keep the checkpoint this reward model likes (sft)")
    parser.add_argument("--safety", type=Path, nargs="+", default=[], metavar="PATH", help="safety examples (sft)")
    parser.add_argument("--members", type=int, metavar="K", help="train an ensemble of K models (reward)")
    _add_rewards(parser)
    parser.add_argument("--judge", metavar="RUN[:STAGE]", help="a gold judge, never trained against; stops the run")
    parser.add_argument("--lr", type=float, help="learning rate (default: follows from the width)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="show the plan; run nothing")
    parser.add_argument("--name", help="name of the run (default: MODEL-METHOD)")
    parser.add_argument("--tensorboard", action="store_true", help="write event files as well")
    add_run_options(parser)
    parser.set_defaults(run=run)


def _add_rewards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="RUN[:STAGE][=WEIGHT]",
        help="a reward model, or with commas between an ensemble; may be repeated",
    )
    parser.add_argument(
        "--caution", type=float, default=1.0, metavar="K", help="ensembles: mean - K x spread (default: %(default)s)"
    )
    parser.add_argument(
        "--rule-reward",
        action="append",
        default=[],
        metavar="RUN[:STAGE][=WEIGHT]",
        help="a rule reward model, asked rule by rule; may be repeated",
    )
    parser.add_argument("--rules", metavar="IDS", help="it is asked about, with commas between (default: all)")
    parser.add_argument("--constitution", type=Path, metavar="FILE", help="that holds the rules (default: fledge's)")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the rules (default: %(default)s)")
    parser.add_argument(
        "--function", action="append", default=[], metavar="FILE:NAME[=WEIGHT]", help="a Python function as reward"
    )
    parser.add_argument(
        "--verifier", action="append", default=[], metavar="NAME[=WEIGHT]", help="a verifier; may be repeated"
    )
    parser.add_argument(
        "--verifier-options", metavar="JSON", help='options of the verifiers, such as {"last_number": true}'
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for an order that cannot be carried out."""
    from fledge.config import to_json
    from fledge.recipes.align import METHODS, align, plan_of

    if args.list_methods:
        rows = {method.name: method.summary for method in METHODS}
        print(json.dumps(rows) if args.as_json else "\n".join(f"{name:<11}{what}" for name, what in rows.items()))
        return 0
    order = _order(args)
    if args.plan:
        print(json.dumps(to_json(plan_of(order)), indent=None if args.as_json else 2, ensure_ascii=False))
        return 0
    path = align(order, listener_of(args))
    if args.as_json:
        print(json.dumps({"event": "done", "run": str(path), "card": str(path / "card.html")}))
    elif args.method == "reward":
        print(f"{path.name}: its card is {path / 'card.html'}; use it: --reward {path.name}:reward")
    else:
        print(f"{path.name}: its card is {path / 'card.html'}; talk with it: fledge chat {path.name}")
    return 0


def _order(args: argparse.Namespace) -> Any:
    from fledge.recipes.align import AlignOrder
    from fledge.recipes.align_rules import RuleOrder

    if args.method is None or args.model is None:
        raise ConfigError("which method, which model? `fledge align dpo RUN:sft --data FILE`; --list shows methods")
    if args.members is not None and args.method != "reward":
        raise ConfigError(f"--members belongs to reward, which trains an ensemble; leave it out of {args.method}")
    members = () if args.members is None else (f"train.members={args.members}",)
    ruling = [_weighed(text, "--rule-reward") for text in args.rule_reward]
    ids = tuple(name.strip() for name in args.rules.split(",")) if args.rules else ()
    return AlignOrder(
        method=args.method,
        model=args.model,
        data=args.data,
        format=args.format,
        held_out=args.held_out,
        skip_bad=args.skip_bad,
        lora=args.lora,
        lora_targets=None if args.lora_targets is None else tuple(args.lora_targets),
        rewards=[_weighed(text, "--reward") for text in args.reward],
        verifiers=_verifiers(args),
        functions=[_weighed(text, "--function") for text in args.function],
        caution=args.caution,
        rules=RuleOrder(ruling, ids, args.constitution, args.language),
        judge=args.judge,
        soft_prompt=args.soft_prompt,
        select_by=args.select_by,
        safety=args.safety,
        seed=args.seed,
        lr=args.lr,
        overrides=(*members, *args.overrides),
        name=args.name,
        runs=args.runs,
        tensorboard=args.tensorboard,
    )


def _verifiers(args: argparse.Namespace) -> list[tuple[str, float, dict[str, Any]]]:
    """(name, weight, options) of each; `--verifier-options` is one object for all, and each takes what it knows."""
    from fledge.rl.verifier import OPTIONS

    options = _json_object(args.verifier_options)
    named = [_weighed(text, "--verifier") for text in args.verifier]
    known = {option for name, _ in named for option in OPTIONS.get(name, options)}
    if args.verifier_options is not None and not named:
        raise ConfigError("--verifier-options belong to a verifier; name one with --verifier")
    for option in options.keys() - known:
        whose = " and ".join(name for name, _ in named)
        near = f"; {nearest(option, sorted(known))}" if known else ""
        raise ConfigError(f"--verifier-options: '{option}' is no option of {whose}{near}")
    return [
        (name, weight, {key: value for key, value in options.items() if key in OPTIONS.get(name, options)})
        for name, weight in named
    ]


def _weighed(text: str, option: str) -> tuple[str, float]:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: '{weight}' is no weight; write NAME=0.5") from error


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--verifier-options is not JSON ({error}); write it as an object") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--verifier-options wants a JSON object, got {text}")
    return found
