"""One CTR model, alone, on a prepared log: train, evaluate, release.

Any backbone (`--backbone`), by dates or by the log's own parts (`--split column`), with early stopping on the
validation rows. A run for the next day goes on from the day before.
"""

from dataclasses import dataclass, field, replace

from ctrdist import backbones
from ctrdist.tasks.click import ClickConfig
from raycluster import cli, registry, reporting
from raycluster.day import Day, DayOptions, run_day
from raycluster.stages.click import train_click
from raycluster.stages.evaluate import evaluate
from raycluster.stages.read import read_log


@dataclass(frozen=True)
class TrainOptions(DayOptions):
    """Options of the day.

    Args:
        backbone: name of the network, in place of `ctr.backbone`.
        ctr: the CTR model.
    """

    experiment: str = "train"
    model_name: str = "train"
    backbone: str = ""
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(patience=2))

    job = "train"

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch, by option."""
        return {"--ctr.batch-size": self.ctr.batch_size}


def run(options: TrainOptions) -> None:
    """A day, from the log to the release."""
    if options.backbone:
        options = replace(options, ctr=replace(options.ctr, backbone=options.backbone))
    backbones.check(options.ctr.backbone)
    run_day(options, lambda day: train(day, options))


def train(day: Day, options: TrainOptions) -> dict:
    """All stages, in order; returns the report."""
    name = options.ctr.backbone
    read = read_log(day)
    model = train_click(day, "train", read, options.ctr, start=day.earlier("model"))
    models = {name: (model, None)}
    report = reporting.assemble(day, read, evaluate(day, read, models))
    registry.release(day, read, models, report, {"model": model.name})
    return report


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(TrainOptions(), __doc__)))
