"""The studies of research/evidence.md: each is a command or a few that anyone can give."""

from __future__ import annotations

from dataclasses import dataclass

from sapo.workflows.comparing.plan import format_rate

COMMON = ("threads=1", "log.tensorboard=false", "log.rollouts_every=50")
"""Settings of a study whose recipe is one of a single run; only the first can change a figure, by rounding."""

DRAWS = (0, 1, 2, 3, 4)
"""Seeds of the completions that a mismatch is measured on."""


@dataclass(frozen=True)
class Study:
    """A comparison; what is left out is as its recipe has it.

    >>> Study("fig4", "paper_fig4", seeds=3).command()
    ['compare', 'paper_fig4', '--seeds', '3']
    """

    name: str
    recipe: str
    objectives: tuple[str, ...] = ()
    """Arms, where the recipe is one of a single run."""
    learning_rates: tuple[float, ...] = ()
    seeds: int | None = None
    """How many."""
    settings: tuple[str, ...] = ()
    """Of all runs, as key=value."""

    def command(self) -> list[str]:
        """Arguments of `sapo`."""
        options = {
            "--objectives": ",".join(self.objectives),
            "--learning-rates": ",".join(format_rate(rate) for rate in self.learning_rates),
            "--seeds": "" if self.seeds is None else str(self.seeds),
        }
        given = [word for option, value in options.items() if value for word in (option, value)]
        return ["compare", self.recipe, *given, *self.settings]


@dataclass(frozen=True)
class Mismatch:
    """What a sampler of another precision would make each objective do, before any update, by `sapo diagnose`.

    >>> Mismatch("bias", "mismatch", (), ("--sampler-dtype", "bfloat16")).command("a-model", 3)[-3:]
    ['--seed', '3', '--json']
    """

    name: str
    recipe: str
    """Its cold start is what is measured."""
    settings: tuple[str, ...]
    """Of the recipe, where they differ."""
    options: tuple[str, ...]
    """Of the sampler."""

    def command(self, model: str, seed: int) -> list[str]:
        """Arguments of the `sapo` command for one draw of completions."""
        task = ("--task", "arithmetic", "digits=4", "operation=add", "--problems", "128")
        return ["diagnose", model, *task, *self.options, "--seed", str(seed), "--json"]


PAPERS = ("sapo", "gspo", "grpo")
"""The paper's three objectives."""


MOE = ("model.coldstart.architecture=qwen3_moe", "model.coldstart.intermediate_size=64")

STUDIES = (
    Study("paper_fig23", "paper_fig23"),
    Study("paper_fig4", "paper_fig4"),
    Study("paper_fig5", "paper_fig5"),
    Study("paper_fig6", "paper_fig6"),
    Study("regime_clean", "regime_clean"),
    Study("regime_lr_ceiling", "regime_lr_ceiling"),
    Study("regime_stale", "regime_stale"),
    Study("regime_stale_current", "regime_stale_current"),
    Study("regime_mismatch", "regime_mismatch"),
    Study("regime_dose", "regime_dose"),
    Study("mismatch_tis", "mismatch_tis", PAPERS, seeds=5, settings=COMMON),
    Study("mismatch_switch", "mismatch_switch", PAPERS, seeds=5, settings=COMMON),
    Study("mismatch_moe", "mismatch", PAPERS, (5e-5,), 5, (*MOE, *COMMON)),
    Study("random_rewards", "random_rewards", PAPERS, seeds=5, settings=COMMON),
)

_UNSCALED = ("--sampler-scaling", "none", "--sampler-vectors")

MISMATCHES = (
    Mismatch("bfloat16, norms too", "mismatch", (), ("--sampler-dtype", "bfloat16", *_UNSCALED)),
    Mismatch("e4m3, scaled by row", "mismatch", (), ("--sampler-scaling", "channel")),
    Mismatch("e4m3, no scales", "mismatch", (), ("--sampler-scaling", "none")),
    Mismatch("e4m3, no scales, norms too", "mismatch", (), _UNSCALED),
    Mismatch("e5m2, no scales, norms too", "mismatch", (), ("--sampler-dtype", "float8_e5m2", *_UNSCALED)),
    Mismatch("mixture; e4m3, no scales, norms too", "mismatch", MOE, _UNSCALED),
)
