"""The best constant answer: how many problems one answer would get right, whatever was asked.

A pass rate means little where a constant does as well: on counting the letters of words, "0" may be right nine times in
ten. The task's own verifier judges: every distinct reference answer is written as a completion and judged on every
problem. Verifiers expect answers in a spelling of their own (in a box, after hashes); the spelling that makes the most
reference answers right is used. A task whose reference answers are right in no spelling, such as one judged by running
tests, has no best constant: None, not 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sapo.data import Completion, Prompt
from sapo.errors import Interrupted
from sapo.evaluation.figures import ConstantAnswer
from sapo.tasks import Task, score_groups
from sapo.utils.rewards import is_right

SPELLINGS = ("{answer}", "\\boxed{{answer}}", "#### {answer}", "#{answer}", "<answer>{answer}</answer>")

PROBED = 8
"""Problems on which the spellings are compared."""

MOST_JUDGEMENTS = 5000
"""Largest number of judgements, constants times problems. Above it only the most frequent answers are judged: a
verifier may take milliseconds for each."""

AT_ONCE = 32
"""Problems judged between two checks of `should_stop`."""


def best_constant(
    task: Task,
    prompts: Sequence[Prompt],
    *,
    threshold: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> ConstantAnswer | None:
    """Find the reference answer that is right on the most problems; None where none can be judged.

    >>> from sapo.tasks.generated.arithmetic import ArithmeticTask
    >>> task = ArithmeticTask(operation="modular_chain", terms=1, modulus=3)
    >>> best_constant(task, [Prompt(i, "t", "?", answer=a) for i, a in enumerate("0120")])
    ConstantAnswer(answer='0', share=0.5, judged=3, distinct=3)

    Raises:
        Interrupted: when `should_stop` says so.
    """
    answered = [p for p in prompts if p.answer is not None and p.answer.strip()]
    if not answered:
        return None
    spelling = _spelling(task, answered, threshold)
    if spelling is None:
        return None
    # References are the same if the verifier reads the same answer: "70" and "the sum is 70 #### 70".
    own = _judge(task, [(p, [_spell(spelling, p)]) for p in answered])
    text_of: dict[str, str] = {}
    count: Counter[str] = Counter()
    for prompt, (completion,) in zip(answered, own, strict=True):
        name = completion.score.answer or str(prompt.answer).strip()
        text_of.setdefault(name, completion.text)
        count[name] += 1
    candidates = [name for name, _ in count.most_common(max(1, MOST_JUDGEMENTS // len(prompts)))]
    texts = [text_of[name] for name in candidates]
    right = Counter(dict.fromkeys(candidates, 0))
    for first in range(0, len(prompts), AT_ONCE):
        if should_stop():
            raise Interrupted
        for judged in _judge(task, [(p, texts) for p in prompts[first : first + AT_ONCE]]):
            for name, completion in zip(candidates, judged, strict=True):
                right[name] += is_right(completion.score.reward, threshold)
    best, hits = right.most_common(1)[0]  # most_common keeps the order: on a tie, the more frequent reference
    return ConstantAnswer(best, hits / len(prompts), judged=len(candidates), distinct=len(count))


def _spelling(task: Task, prompts: Sequence[Prompt], threshold: float) -> str | None:
    probes = [(p, [_spell(spelling, p) for spelling in SPELLINGS]) for p in prompts[:PROBED]]
    hits = dict.fromkeys(SPELLINGS, 0)
    for judged in _judge(task, probes):
        for spelling, completion in zip(SPELLINGS, judged, strict=True):
            hits[spelling] += is_right(completion.score.reward, threshold)
    best = max(SPELLINGS, key=hits.__getitem__)  # on a tie the first, which is the plainest
    return best if hits[best] else None


def _spell(spelling: str, prompt: Prompt) -> str:
    # replace() and not format(): the answers hold braces of their own.
    return spelling.replace("{answer}", str(prompt.answer).strip())


def _judge(task: Task, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[tuple[Completion, ...]]:
    return score_groups([(task, p, [Completion((), (), "stop", text) for text in texts]) for p, texts in questions])
