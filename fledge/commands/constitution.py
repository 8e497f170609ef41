"""`fledge constitution show | revise | label | rules | agreement`: data made by principle, and whether to trust it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fledge.commands.making import add_making_arguments, show_report
from fledge.commands.running import listener_of
from fledge.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("constitution", help="revise answers and label preferences by principle")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="the principles and rules, with version and hash")
    show.add_argument("--json", action="store_true", dest="as_json", help="as JSON")
    _add_constitution(show)
    show.set_defaults(run=run_show)
    revise = _add_making(actions, "revise", "answers criticised and revised, for sft")
    revise.add_argument("--revisions", type=int, help="critiques and revisions a prompt (default: 4)")
    revise.set_defaults(run=run_revise)
    label = _add_making(actions, "label", "soft preferences between two answers, for reward and dpo")
    label.add_argument("--thinking", action="store_true", help="a chain of thought first; labels clamped to 40-60 %%")
    label.add_argument("--principles", type=int, help="drawn for each pair and averaged (default: 1)")
    rules = _add_making(actions, "rules", "answers judged rule by rule, for kto and rule reward models")
    rules.add_argument("--rules", metavar="IDS", help="with commas between (default: all)")
    for action, function in ((label, run_label), (rules, run_rules)):
        action.add_argument("--answers-by", metavar="RUN[:STAGE]", help="who answers bare prompts (default: MODEL)")
        action.add_argument("--answer-tokens", type=int, metavar="N", help="at most, of an answer (default: 256)")
        action.set_defaults(run=function)
    agreement = actions.add_parser("agreement", help="do human labels and AI labels agree?")
    agreement.add_argument("labels", type=Path, nargs="+", metavar="FILE", help="labels of people and of models")
    agreement.add_argument("--format", help="of the files (default: recognised)")
    agreement.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used")
    agreement.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")
    agreement.add_argument("--json", action="store_true", dest="as_json", help="as one JSON object")
    agreement.set_defaults(run=run_agreement)


def run_show(args: argparse.Namespace) -> int:
    """Exit code 0; `ConfigError` for a file that is no constitution."""
    from fledge.config import to_json
    from fledge.text.constitution import load

    constitution = load(args.constitution)
    if args.as_json:
        print(json.dumps({**to_json(constitution), "hash": constitution.hash}, ensure_ascii=False))
        return 0
    print(f"{constitution.label}\n\nprinciples")
    for principle in constitution.principles:
        print(f"  {principle.id:<18}{principle.en.compare}\n  {'':<18}{principle.zh.compare}")
    print("\nrules")
    for rule in constitution.rules:
        print(f"  {rule.id:<18}{rule.en}  ({rule.group})\n  {'':<18}{rule.zh}")
    return 0


def run_revise(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, prompts or settings that cannot be used."""
    from fledge.config import override
    from fledge.recipes.made_data import fitting, make_revisions, take
    from fledge.synth.constitutional import RevisionConfig
    from fledge.text.constitution import load

    config = override(RevisionConfig(), _given(args, "revisions", args.revisions))
    taken, constitution, maker = take(_wanted(args)), load(args.constitution), _maker(args)
    taken = fitting(taken, maker, config.sampling.max_tokens, config.language)
    report = make_revisions(maker, taken, constitution, args.out, config, listener_of(args))
    made = args.out / "demonstrations.jsonl"
    then = f"train on them: fledge align sft {args.model} --data {made}"
    files = {"demonstrations": made, "chains": args.out / "revisions.jsonl"}
    show_report(args, report, files, [(report["demonstrations"], then)])
    return 0


def run_label(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, prompts or settings that cannot be used."""
    from fledge.config import override
    from fledge.recipes.made_data import fitting, make_labels, take
    from fledge.synth.answering import AnswerConfig
    from fledge.synth.constitutional import LabelConfig
    from fledge.text.constitution import load

    thinking = f"thinking={'true' if args.thinking else 'false'}"
    labels = override(LabelConfig(labeler=""), (thinking, *_given(args, "principles", args.principles)))
    answers = override(AnswerConfig(), _answering(args))
    taken, constitution = take(_wanted(args)), load(args.constitution)
    judging, answering = _makers(args)
    taken = fitting(taken, answering, answers.sampling.max_tokens, labels.language)
    report = make_labels((judging, answering), taken, constitution, args.out, (labels, answers), listener_of(args))
    made = args.out / "labels.jsonl"
    then = f"learn from them: fledge align dpo {args.model} --data {made}, or fledge align reward"
    show_report(args, report, {"labels": made}, [(report["labels"], then)])
    return 0


def run_rules(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, prompts, rules or settings that cannot be used."""
    from fledge.config import override
    from fledge.recipes.made_data import fitting, make_rule_labels, take
    from fledge.synth.answering import AnswerConfig
    from fledge.synth.rules import RuleConfig
    from fledge.text.constitution import load

    named = tuple(name.strip() for name in args.rules.split(",")) if args.rules else ()
    rules = override(RuleConfig(labeler="", rules=named), (f"language={args.language}", *args.overrides))
    answers = override(AnswerConfig(), _answering(args))
    taken, constitution = take(_wanted(args)), load(args.constitution)
    for name in named:
        constitution.rule(name)  # an unknown one is refused before any answer is drawn
    judging, answering = _makers(args)
    taken = fitting(taken, answering, answers.sampling.max_tokens, rules.language)
    report = make_rule_labels((judging, answering), taken, constitution, args.out, (rules, answers), listener_of(args))
    made, ranked = args.out / "labels.jsonl", args.out / "rule_rankings.jsonl"
    # A ranking wants answers to one prompt that differ under a rule, KTO answers of both kinds.
    both_kinds = min(report["labels"] - report["labels of broken rules"], report["labels of broken rules"])
    then = [
        (report["rankings"], f"a rule reward model: fledge align reward {args.model} --data {ranked}"),
        (both_kinds, f"learn from the verdicts: fledge align kto {args.model} --data {made}"),
    ]
    show_report(args, report, {"labels": made, "rankings": ranked}, then)
    return 0


def run_agreement(args: argparse.Namespace) -> int:
    """Exit code 0; `DataError` for files in which nothing was judged twice."""
    from fledge.recipes.made_data import Wanted, measure_agreement, take

    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected 0 or more")
    found = measure_agreement(take(Wanted(args.labels, args.format, args.skip_bad)), args.seed)
    if args.as_json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print("\n".join(agreement_lines(found)))
    return 0


def agreement_lines(found: dict[str, float]) -> list[str]:
    """The figures in words, with the anchors of the literature beside them."""

    def share(name: str) -> str:
        if name not in found:
            return "not measured: nothing was judged by both"
        return f"{found[name]:.1%} [{found[f'{name}_low']:.1%}, {found[f'{name}_high']:.1%}]"

    lines = [
        f"human and AI labels agree    {share('agreement_human_ai')}",
        f"people with one another      {share('agreement_human_human')}",
        "                             (72.6 and 77.3 % among InstructGPT's labelers; Ouyang et al. 2022, section 3.4)",
        f"all labelers                 {share('agreement')}",
        f"alpha beyond chance          {found['agreement_alpha']:.3f}",
        f"judged twice or more         {found['agreement_units']:.0f} comparisons, {found['agreement_labelers']:.0f} "
        "labelers",
    ]
    for name in sorted(found):
        if name.startswith("agreement/"):
            pair = name.removeprefix("agreement/")
            figures = f"{found[name]:.1%} of {found[f'agreement_units/{pair}']:.0f}"
            lines.append(f"{pair}: {figures}, kappa {found[f'agreement_kappa/{pair}']:.3f}")
    return lines


def _add_making(actions: Any, name: str, summary: str) -> Any:
    parser = actions.add_parser(name, help=summary)
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="in any format we read")
    parser.add_argument("--format", help="of the files (default: recognised)")
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be used instead of stopping")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N rows only")
    _add_constitution(parser)
    add_making_arguments(parser)
    return parser


def _add_constitution(parser: Any) -> None:
    parser.add_argument("--constitution", type=Path, metavar="FILE", help="principles and rules (default: fledge's)")


def _given(args: argparse.Namespace, name: str, value: int | None) -> tuple[str, ...]:
    """The overrides of a config: language, seed, the option `name` if it was given, and --set."""
    own = () if value is None else (f"{name}={value}",)
    return (f"language={args.language}", f"seed={args.seed}", *own, *args.overrides)


def _answering(args: argparse.Namespace) -> tuple[str, ...]:
    longest = () if args.answer_tokens is None else (f"sampling.max_tokens={args.answer_tokens}",)
    return (f"language={args.language}", f"seed={args.seed}", *longest)


def _wanted(args: argparse.Namespace) -> Any:
    from fledge.recipes.made_data import Wanted

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: expected 1 or more")
    return Wanted(args.prompts, args.format, args.skip_bad, args.limit)


def _maker(args: argparse.Namespace, name: str | None = None) -> Any:
    from fledge.recipes.made_data import load_maker
    from fledge.train.device import default_device

    return load_maker(name or args.model, args.runs, args.style, default_device())


def _makers(args: argparse.Namespace) -> tuple[Any, Any]:
    """Who judges and who answers; one model in memory where they are the same."""
    judging = _maker(args)
    return judging, judging if args.answers_by in (None, args.model) else _maker(args, args.answers_by)
