"""DSPy, which asks through LiteLLM: typed programs over chat and plain completions."""

from __future__ import annotations

import dspy
from checks import KEY, MODEL, TEXT, URL, Verdict, decided, run, said

_to = {"api_base": URL, "api_key": KEY, "cache": False, "max_tokens": 100, "num_retries": 0}


def chat() -> None:
    said(dspy.LM(f"openai/{MODEL}", **_to)("Hello")[0])


def completions() -> None:
    assert dspy.LM(f"openai/{MODEL}", model_type="text", **_to)("Once upon a time")


def responses() -> None:
    found = dspy.LM(f"openai/{MODEL}", model_type="responses", **_to)("Hello")[0]
    said(found["text"] if isinstance(found, dict) else found)


def a_typed_program() -> None:
    class Decide(dspy.Signature):
        """Decide."""

        question: str = dspy.InputField()
        answer: str = dspy.OutputField()
        sure: bool = dspy.OutputField()

    with dspy.context(lm=dspy.LM(f"openai/{MODEL}", **_to), adapter=dspy.JSONAdapter()):
        found = dspy.Predict(Decide)(question="Tea or rain?")
    decided(Verdict(answer=found.answer, sure=found.sure) if TEXT is not None else {"answer": "", "sure": True})


if __name__ == "__main__":
    run(globals())
