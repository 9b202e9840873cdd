"""What the laws say of whole families of losses, as a table on the screen and as a page of markdown."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import date
from importlib import metadata

from sapo.conformance.laws import BROKEN, HELD, LAWS, Verdict, judge
from sapo.conformance.subjects import Subject, function_subject

MARKS = {"held": "held", "broken": "**broken**", "does not apply": "–"}

PREAMBLE = (
    "Each loss is held against the objective it is named after, with the settings and the normaliser of the second",
    "table. A broken law comes with the smallest case found that breaks it: `A` is the advantage of a response,",
    "`log r` the log-ratio of each of its tokens, log pi - log pi_old; responses of a mini-batch stand between `|`.",
    "Losses are called as functions, with what their trainers would hand them. A trainer may keep a case from arising:",
    "TRL's log-probabilities are 0 at padded places, and its micro-batches have equal numbers of responses.",
)


@dataclass(frozen=True)
class Report:
    """A family of losses, judged.

    Report("trl", "1.16.0", (subject,), ((verdict, ...),)): verdicts of each subject in the order of the laws.
    """

    family: str
    version: str
    subjects: tuple[Subject, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    ours: bool
    """Whether a broken law is a fault of whoever ran this: of sapo itself or of a user's own loss."""

    @property
    def broken(self) -> int:
        """How many laws are broken, over all subjects."""
        return sum(v.status == BROKEN for verdicts in self.verdicts for v in verdicts)

    def names(self) -> list[str]:
        """The subjects without their family's name."""
        return [s.name.removeprefix(f"{self.family} ") for s in self.subjects]


def judge_family(name: str) -> Report:
    """Judge a family of `peers.FAMILIES` by its name.

    Raises:
        ConfigError: it is not installed.
    """
    from sapo.conformance.peers import FAMILIES

    family = FAMILIES[name]
    subjects = tuple(family.load())
    return Report(name, family.version(), subjects, tuple(tuple(judge(s)) for s in subjects), name == "sapo")


def judge_function(path: str, *, objective: str, normalizer: str | None, hyper: dict[str, object]) -> Report:
    """Judge a user's loss, `module:function`: see `subjects.function_subject`.

    Raises:
        ConfigError: as there.
    """
    subject = function_subject(path, objective=objective, normalizer=normalizer, hyper=hyper)
    return Report(path, "", (subject,), (tuple(judge(subject)),), ours=True)


def counterexamples(report: Report) -> list[str]:
    """One line for each way in which a law is broken, with the losses that break it so."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, verdicts in zip(report.names(), report.verdicts, strict=True):
        for v in verdicts:
            if v.status == BROKEN:
                example = f"{v.counterexample}: {v.detail}" if v.counterexample else v.detail
                found.setdefault((v.law, example), []).append(name)
    order = {law: place for place, law in enumerate(LAWS)}
    ordered = sorted(found.items(), key=lambda item: order[item[0][0]])
    return [f"{law} ({', '.join(names)}): {example}" for (law, example), names in ordered]


def markdown(reports: list[Report], command: str) -> str:
    """The page docs/conformance.md: laws, tables and counter-examples, with the versions they hold for."""
    lines = [
        "# Conformance",
        "",
        f"Written by `{command}` on {date.today().isoformat()}, Python {platform.python_version()}, "
        f"torch {metadata.version('torch')}. Do not edit: run it again.",
        "",
        *PREAMBLE,
        "",
        "## The laws",
        "",
        *(f"- `{name}`: {' '.join((law.__doc__ or '').split())}" for name, law in LAWS.items()),
    ]
    for report in reports:
        names = report.names()
        lines += ["", f"## {report.family} {report.version}".rstrip(), ""]
        lines += ["| law | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for place, law in enumerate(LAWS):
            marks = [MARKS[verdicts[place].status] for verdicts in report.verdicts]
            lines.append(f"| `{law}` | " + " | ".join(marks) + " |")
        lines += ["", "| loss | held against | normaliser | call |", "|---|---|---|---|"]
        for name, s in zip(names, report.subjects, strict=True):
            lines.append(f"| {name} | `{s.objective!r}` | `{s.normalizer}` | `{s.call}` |")
        examples = [line.replace("|", "\\|") for line in counterexamples(report)]
        lines += ["", *(f"- {line}" for line in examples)] if examples else ["", "No law is broken."]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """One line: how many verdicts of each kind."""
    everything = [v.status for verdicts in report.verdicts for v in verdicts]
    held, broken = everything.count(HELD), everything.count(BROKEN)
    name = f"{report.family} {report.version}".rstrip()
    rest = len(everything) - held - broken
    return f"{name}: {held} held, {broken} broken" + (f", {rest} do not apply" if rest else "")
