"""Search for better options of a daily job, by Ray Tune: the papers' ranges, or spaces of your own.

    python jobs/sweep.py cela --data DATA --state STATE
    python jobs/sweep.py cela --data DATA --state STATE --space alpha --space 'align.temperature=loguniform(0.01,10)'
    python jobs/sweep.py clickprompt --help

Every option of the daily job is one here, and `ctr.yaml` is read as there; what is in no space stays as they say. Ends
in a table, `STATE/sweeps/NAME/sweep.html`, and `best.yaml` beside it, which the daily job takes with --config.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # the jobs are files, and this one reads the others

from jobs import cela_daily, clickprompt_daily, elec_daily  # noqa: E402
from raycluster import cli  # noqa: E402
from raycluster.sweep import Method, SweepOptions, sweep  # noqa: E402


@dataclass(frozen=True)
class Search:
    """What a sweep asks besides the daily job's options.

    Args:
        space: an option and what to draw it from, uniform(low,high), loguniform(low,high), quniform(low,high,step),
            randint(low,high) without high itself, or choice(a,b,c); or the name of one of the papers' ranges. Once for
            each option; without any, the papers' ranges are all swept.
        sweep: how to search.
    """

    space: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    sweep: SweepOptions = field(default_factory=SweepOptions)


@dataclass(frozen=True)
class CelaSearch(Search, cela_daily.CelaOptions):
    """CELA: tau1 and alpha of DAP, tau2 of ROMA."""


@dataclass(frozen=True)
class ElecSearch(Search, elec_daily.ElecOptions):
    """ELEC: alpha of the distillation."""


@dataclass(frozen=True)
class ClickPromptSearch(Search, clickprompt_daily.ClickPromptOptions):
    """ClickPrompt: K prompts a layer."""


CELA = Method(
    "cela",
    cela_daily.train,
    {
        "tau1": "pretrain.simcse_temperature=loguniform(0.001,0.1)",
        "alpha": "pretrain.simcse_weight=uniform(0.1,1.5)",
        "tau2": "align.temperature=loguniform(0.01,10)",
    },
)
ELEC = Method("elec", elec_daily.train, {"alpha": "distill.mse_weight=loguniform(0.0001,0.1)"})
CLICKPROMPT = Method("clickprompt", clickprompt_daily.train, {"K": "prompts.count=choice(1,3,5,10)"})
METHODS = {
    "cela": (CELA, cela_daily.CelaOptions, CelaSearch),
    "elec": (ELEC, elec_daily.ElecOptions, ElecSearch),
    "clickprompt": (CLICKPROMPT, clickprompt_daily.ClickPromptOptions, ClickPromptSearch),
}
"""What can be swept, by the name of its subcommand: with its daily job's options, and these with a search's."""


def run(name: str, options: Search) -> None:
    """A sweep of one method."""
    method, daily, _ = METHODS[name]
    base = daily(**{f.name: getattr(options, f.name) for f in fields(daily)})
    sweep(method, base, options.sweep, options.space)


def main(arguments: list[str]) -> None:
    """A sweep from the command line."""
    if not arguments or arguments[0] not in METHODS:
        print(f"{__doc__}\nfirst argument: one of {', '.join(METHODS)}")
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 1)
    method, _, searched = METHODS[arguments[0]]
    named = ", ".join(f"{name} ({text})" for name, text in method.spaces.items())
    run(arguments[0], cli.parse(searched(), f"{__doc__}\nThe paper's ranges, by name: {named}.", arguments[1:]))


if __name__ == "__main__":
    cli.main(lambda: main(sys.argv[1:]))
