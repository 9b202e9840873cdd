"""What the tests of evaluation share: problems answered by a script and really judged, and made-up results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sapo.data import Completion, Prompt, Score, Status
from sapo.evaluation import Answered, Evaluation, Results, Sample


class ScriptedEngine:
    """Answers problem i with a fixed list of texts, and greedily with the last text of the list."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts = texts
        self.calls: list[tuple[list[int], float]] = []

    def generate(self, requests, params, should_stop=lambda: False):
        self.calls.append(([r.prompt.id for r in requests], params.temperature))
        chosen = [self.texts[r.prompt.id] if r.samples > 1 else self.texts[r.prompt.id][-1:] for r in requests]
        return [
            tuple(
                Completion((1,) * (len(t) + 1), (-0.5,) * (len(t) + 1), "length" if t == "cut" else "stop", t)
                for t in texts
            )
            for texts in chosen
        ]


class WrittenTask:
    """Problems whose answers are read from the end of the text, with a figure: the share of right characters."""

    name = "written"

    def __init__(self, *problems: tuple[str, str | None, dict[str, Any]]) -> None:
        self.problems = problems

    def train_prompt(self, index: int) -> Prompt:
        return self.held_out(1)[0]

    def held_out(self, count: int) -> list[Prompt]:
        return [Prompt(9, "written", q, answer=a, metadata=m) for q, a, m in self.problems][:count]

    def verify(self, text: str, prompt: Prompt) -> Score:
        if text == "bug":
            raise RuntimeError("no")
        if text == "?":
            return Score(0.0, Status.UNPARSEABLE, "nothing to read")
        answer = text.split()[-1]
        reference = prompt.answer or ""
        same = sum(a == b for a, b in zip(answer, reference, strict=False)) / max(len(answer), len(reference))
        return Score(float(answer == reference), answer=answer, figures={"characters": same})


class PlainPolicy:
    """Encodes nothing and shows what it was given."""

    has_chat_template = False
    tokenizer = None
    vision = None

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def show(self, token_ids: Sequence[int]) -> str:
        return f"<s>{bytes(token_ids).decode()}"

    def show_prompt(self, prompt: Prompt) -> str:
        return self.show(prompt.token_ids)


def sample(text: str, reward: float = 0.0, status: Status = Status.SCORED, **more: Any) -> Sample:
    """A judged completion of as many tokens as it has words."""
    fields = {"finish_reason": "stop", "tokens": len(text.split()) + 1, **more}
    return Sample(text=text, reward=reward, status=status, **fields)


def answered(
    number: int, *samples: Sample, prompt: str = "", groups: dict[str, str] | None = None, **more: Any
) -> Answered:
    """A problem with its judged completions."""
    prompt = prompt or f"question {number}"
    fields = {"seen": prompt, "answer": "1", **more}
    return Answered(
        id=number, prompt=prompt, groups={k: (v,) for k, v in (groups or {}).items()}, samples=samples, **fields
    )


def counted(correct: Sequence[int], samples: int, **more: Any) -> Results:
    """Results in which problem i has `correct[i]` right samples of `samples`."""
    problems = [
        answered(i, *(sample("x", float(j < c)) for j in range(samples)), **more) for i, c in enumerate(correct)
    ]
    return results(problems)


def results(problems: Sequence[Answered], **options: Any) -> Results:
    """Results of judged problems, of a model that there is none of."""
    return Results({"model": {"path": "models/none"}}, Evaluation.of("made-up", problems, **options))
