"""Which checkpoint of supervised fine-tuning is kept: the one whose answers a reward model scores best.

Validation loss rises after the first epoch while people go on liking the answers better, so InstructGPT trained for 16
epochs and chose by reward-model score on the validation set (Ouyang et al. 2022, 2203.02155, section 3.5). Both curves
stand on the card. The prompts are held-out ones that the outcome does not measure on, so the choice does not flatter
what is reported.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Self

from safetensors.torch import load_file, save_file

from fledge.data.pack import PackedRows, PieceList
from fledge.errors import DataError
from fledge.files import write_file
from fledge.formats.checkpoint import LoadedModel, load_state
from fledge.recipes.align_data import HELD_OUT, Cut, askings_of, examples_of, pieces, read_lines
from fledge.recipes.align_models import Context, load_scorer, refuse_other_weights, scalar
from fledge.recipes.align_outcome import next_token_loss
from fledge.recipes.answers import Asked, chat_answers, score_answers
from fledge.recipes.report import Curve, Fact, Series
from fledge.rl.saving import load_trainable, trainable
from fledge.train.loop import TrainState
from fledge.train.metrics import JsonLines
from fledge.types import ChatExample, Metrics

BEST = "state-best.safetensors"  # a part of the training state, gone when that is: a stage may stop after `keep`


class Selection:
    """Looks at checkpoints while they come, one line each in `selection.jsonl`, and keeps the weights of the best.

    A context manager. A look depends on the weights and the plan alone, so a run that goes on sees what it saw.
    """

    def __init__(self, context: Context, start: LoadedModel, every: int) -> None:
        plan = context.plan.select
        assert plan is not None
        self.every = every
        self._context, self._start = context, start
        loaded = load_scorer(plan.name, context.run.parent, start, context.device)
        refuse_other_weights(loaded, plan.hash)
        self._judge = scalar(loaded)
        cut = Cut(start.renderer, context.plan.train.fit.max_length)
        plain = Cut(loaded.renderer, cut.max_length, max(1, cut.max_length - context.plan.outcome.max_tokens))
        self._asked = askings_of(context, HELD_OUT, plain)[context.plan.outcome.prompts :][: plan.prompts]
        if not self._asked:
            raise DataError(
                f"--select-by {plan.name}: no held-out prompt is left beside the {context.plan.outcome.prompts} of the "
                "outcome; raise data.held_out_share, lower outcome.prompts, or give --held-out"
            )
        chats = [example for example in examples_of(context, HELD_OUT) if isinstance(example, ChatExample)]
        found = [piece for example in chats for piece in pieces(example, cut)]
        self._held_out = PackedRows(PieceList(found), cut.max_length, context.plan.seed) if found else None
        saved = load_state(context.path)
        self._log = JsonLines(context.path / "selection.jsonl", 0 if saved is None else saved[0], stage=context.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def look(self, state: TrainState, metrics: Metrics) -> None:
        """Score the weights as they are; keep them if they are the best so far."""
        before = self._looks()
        loaded = replace(self._start, model=state.model)
        state.model.eval()
        asked = Asked([asking.conversation for asking in self._asked], self._context.plan.outcome.max_tokens)
        said = chat_answers(loaded, asked, self._context.plan.seed)
        answers = [(asking.ids, one.ids) for asking, one in zip(self._asked, said, strict=True)]
        score = float(score_answers(self._judge, answers, loaded.tokenizer.pad_id).mean())
        loss = None
        if self._held_out is not None:
            loss = next_token_loss(loaded, self._held_out, self._context.plan.train.fit)
        state.model.train()
        self._log.write({"stage": self._context.name, "step": state.step, "score": score, "loss": loss})
        if score > max((look["score"] for look in before), default=float("-inf")):
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable(state.model).items()}
            write_file(self._context.path / BEST, lambda path: save_file(weights, path))

    def keep(self) -> None:
        """Put the best weights into the model, and say on the card which they were."""
        device = next(self._start.model.parameters()).device
        best = {name: tensor.to(device) for name, tensor in load_file(self._context.path / BEST).items()}
        load_trainable(self._start.model, best)
        looks = self._looks()
        scores = [look["score"] for look in looks]
        chosen = looks[scores.index(max(scores))]
        losses = [look["loss"] for look in looks if look["loss"] is not None]
        facts = [
            Fact("kept checkpoint, by reward-model score", chosen["step"], "steps"),
            Fact("its reward-model score", chosen["score"]),
            Fact("checkpoints looked at", len(looks)),
        ]
        steps = [look["step"] for look in looks]
        curves = [Curve("Which checkpoint is kept", "step", "score", (Series.of("reward model", steps, scores),))]
        if losses:
            lowest = looks[[look["loss"] for look in looks].index(min(losses))]
            facts.append(Fact("validation loss would have kept", lowest["step"], "steps"))
            series = (Series.of("held-out conversations", steps, [look["loss"] for look in looks]),)
            curves.append(Curve("Loss that does not choose", "step", "nats a token", series))
        report = self._context.report
        self._context.report = replace(report, facts=(*report.facts, *facts), curves=(*report.curves, *curves))

    def _looks(self) -> list[dict[str, float]]:
        return read_lines(self._context.path / "selection.jsonl")
