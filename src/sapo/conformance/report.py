"""Reports of the laws on families of losses, for a table on the screen and a page of markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata

from sapo.conformance.laws import LAWS, judge
from sapo.conformance.objective_laws import OBJECTIVE_LAWS, judge_objective
from sapo.conformance.search import BROKEN, HELD, Verdict
from sapo.conformance.subjects import Subject, function_subject, is_objective, objective_subject
from sapo.errors import ConfigError
from sapo.utils.names import did_you_mean

MARKS = {"held": "held", "broken": "**broken**", "does not apply": "–"}

PREAMBLE = (
    "Each loss is compared with the objective it is named after, with the settings and the normalizer of the second",
    "table. A broken law comes with the smallest case found that breaks it: `A` is the advantage of a response,",
    "`log r` the log-ratio of each of its tokens, log pi - log pi_old; `|` separates the responses of a mini-batch.",
    "Losses are called as functions, with the arguments that their trainers pass. A trainer may exclude a case:",
    "TRL's log-probabilities are 0 at padded places, and its micro-batches have equal numbers of responses.",
)


@dataclass(frozen=True)
class Report:
    """The verdicts on a family of losses.

    Report("trl", "1.16.0", (subject,), ((verdict, ...),)): verdicts of each subject in the order of the laws.
    """

    family: str
    version: str
    subjects: tuple[Subject, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    ours: bool
    """True where a broken law is a fault: of sapo itself or of a user's own loss."""
    laws: tuple[str, ...] = field(default_factory=lambda: tuple(LAWS))
    """Names of the laws, in the order of the verdicts."""

    @property
    def broken(self) -> int:
        """Return the number of broken laws, over all subjects."""
        return sum(v.status == BROKEN for verdicts in self.verdicts for v in verdicts)

    def names(self) -> list[str]:
        """Return the names of the subjects without that of their family."""
        return [s.name.removeprefix(f"{self.family} ") for s in self.subjects]


def check_subjects(names: Sequence[str], *, objective: str, normalizer: str | None) -> None:
    """Refuse names that nothing can be judged by, before the first is judged, which takes seconds.

    Raises:
        ConfigError: no such family, one that is not installed, no such module, function or class; one named twice; or
            an objective or normalizer that is none.
    """
    from sapo.conformance.peers import FAMILIES
    from sapo.objectives import NORMALIZERS, find_objective
    from sapo.objectives.checks import unknown_option
    from sapo.utils.plugins import import_named

    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"each subject is judged once; got {name!r} twice; leave one out")
        if ":" not in name and name not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(
                f"a subject is one of {known}, module:function or module:Class; got {name!r}"
                f"{did_you_mean(name, FAMILIES) or '; choose one of these'}"
            )
        if ":" in name:
            import_named(name, what="subject", noun="function or class", error=ConfigError)
    try:
        find_objective(objective)
        if normalizer is not None and normalizer not in NORMALIZERS:
            raise unknown_option("normalizer", normalizer, NORMALIZERS)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    """Judge a user's loss, `module:function`, or a user's objective, `module:Class`.

    Args:
        path: module and function or class.
        objective, normalizer: what a function claims to be; a class says so itself.
        hyper: settings.

    Raises:
        ConfigError: as in `subjects.function_subject`, or a class that is no complete objective.
    """
    if is_objective(path):
        try:
            judged, subject = judge_objective(path, hyper), objective_subject(path, hyper)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return Report(path, "", (subject,), (judged.verdicts,), ours=True, laws=(*OBJECTIVE_LAWS, *LAWS))
    subject = function_subject(path, objective=objective, normalizer=normalizer, hyper=hyper)
    return Report(path, "", (subject,), (tuple(judge(subject)),), ours=True)


def counterexamples(report: Report) -> list[str]:
    """Return one line for each way in which a law is broken, with the losses that break it so."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, verdicts in zip(report.names(), report.verdicts, strict=True):
        for v in verdicts:
            if v.status == BROKEN:
                example = f"{v.counterexample}: {v.detail}" if v.counterexample else v.detail
                found.setdefault((v.law, example), []).append(name)
    order = {law: place for place, law in enumerate(report.laws)}
    ordered = sorted(found.items(), key=lambda item: order[item[0][0]])
    return [f"{law} ({', '.join(names)}): {example}" for (law, example), names in ordered]


def markdown(reports: list[Report], command: str) -> str:
    """Return the page docs/conformance.md: laws, tables and counterexamples, with the versions they hold for."""
    shown = {law for report in reports for law in report.laws}
    laws = {name: law for name, law in {**OBJECTIVE_LAWS, **LAWS}.items() if name in shown}
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
        *(f"- `{name}`: {_first_paragraph(law.__doc__)}" for name, law in laws.items()),
    ]
    for report in reports:
        names = report.names()
        lines += ["", f"## {report.family} {report.version}".rstrip(), ""]
        lines += ["| law | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for place, law in enumerate(report.laws):
            marks = [MARKS[verdicts[place].status] for verdicts in report.verdicts]
            lines.append(f"| `{law}` | " + " | ".join(marks) + " |")
        lines += ["", "| loss | compared with | normalizer | call |", "|---|---|---|---|"]
        for name, s in zip(names, report.subjects, strict=True):
            lines.append(f"| {name} | `{s.objective!r}` | `{s.normalizer}` | `{s.call}` |")
        examples = [line.replace("|", "\\|") for line in counterexamples(report)]
        lines += ["", *(f"- {line}" for line in examples)] if examples else ["", "No law is broken."]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """Return one line: the number of verdicts of each kind."""
    everything = [v.status for verdicts in report.verdicts for v in verdicts]
    held, broken = everything.count(HELD), everything.count(BROKEN)
    name = f"{report.family} {report.version}".rstrip()
    rest = len(everything) - held - broken
    return f"{name}: {held} held, {broken} broken" + (f", {rest} do not apply" if rest else "")


def _first_paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((text or "").split("\n\n")[0].split())
