"""CELA, every day: align a language model to a CTR model's item embeddings, encode every item once, fuse, release.

Reads a prepared log (jobs/prepare.py), trains the ID model, pre-trains the language model when it is due (DAP), aligns
it to the item embeddings (ROMA), encodes all items into the text table, trains the CTR model with that table as one
more field (MF²), evaluates both models on the same test rows, releases and registers the result. A run for the next
day starts from the day before; a run that was cut off goes on where it was.
"""

from dataclasses import dataclass, field

from ctrdist import backbones
from ctrdist.errors import UserError
from ctrdist.language.encode import EncodeConfig
from ctrdist.language.model import check_model
from ctrdist.storage import Manifest
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_field import FuseConfig
from ctrdist.text_training import LanguageModelConfig
from raycluster import cli, registry, reporting
from raycluster.day import Day, DayOptions, run_day
from raycluster.stages.click import train_click
from raycluster.stages.evaluate import evaluate
from raycluster.stages.language import align, alignment_due, encode, pretrain, pretraining_due, table_of_embeddings
from raycluster.stages.read import Read, read_log


@dataclass(frozen=True)
class CelaOptions(DayOptions):
    """Options of the day.

    Args:
        rounds: how often to align and fuse in turn (section 4.4 of the paper).
        lm: the language model.
        ctr: the CTR model, with and without text.
        pretrain: domain-adaptive pre-training of the language model (DAP).
        align: item-level alignment (ROMA).
        encode: items to the text table.
        fuse: the text field of the fused model (MF²).
    """

    rounds: int = 1
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    ctr: ClickConfig = field(default_factory=ClickConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)

    job = "cela_daily"

    def check(self) -> None:
        """Raise a UserError for what can be known to be wrong before anything is read."""
        if self.rounds < 1:
            raise UserError(f"--rounds {self.rounds}: at least 1")
        if self.rounds > 1 and not self.align.epochs:
            raise UserError(f"--rounds {self.rounds} without alignment (--align.epochs 0) would do one thing again")
        if self.rounds > 1 and self.align.every_days != 1:
            raise UserError(f"--rounds {self.rounds} aligns every day: leave --align.every-days out")
        if self.fuse.source == "id" and (self.pretrain.epochs or self.align.epochs):
            raise UserError("--fuse.source id reads no text: add --pretrain.epochs 0 --align.epochs 0")
        backbones.check(self.ctr.backbone)
        check_model(self.lm.name, head=self.pretrain.epochs > 0 and self.pretrain.mlm_weight > 0)

    @property
    def served_stage(self) -> str:
        """Name of the stage that ends in the model that is served: MF² of the last round."""
        return f"mf2{_suffix(self.rounds)}"

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch, by option."""
        sizes = {"ctr": self.ctr.batch_size, "pretrain": self.pretrain.batch_size, "align": self.align.batch_size}
        return {f"--{name}.batch-size": size for name, size in sizes.items()}

    def encoding(self) -> tuple[int, float]:
        """Processes that encode texts at most, 0 for what there is room for; and the share of a GPU of each."""
        return self.encode.encoders, self.encode.gpu_share


def _suffix(number: int) -> str:
    """What the names of a round's stages end in."""
    return "" if number == 1 else f"_{number}"


def run(options: CelaOptions) -> None:
    """The paper's day, from the log to the release."""
    options.check()
    run_day(options, lambda day: cela(day, options))


def cela(day: Day, options: CelaOptions) -> dict:
    """All stages, in order; returns the report."""
    read, id_model, pretrained, aligned, text, fused = train(day, options)
    models = {"id": (id_model, None), "cela": (fused, text)}
    report = reporting.assemble(day, read, evaluate(day, read, models), text)
    registry.release(day, read, models, report, {"lm": aligned.name, "dap": pretrained.name})
    return report


def train(day: Day, options: CelaOptions) -> tuple[Read, Manifest, Manifest, Manifest, Manifest, Manifest]:
    """The stages up to the served model: what was read, ID model, DAP, ROMA, text table and MF²."""
    due = pretraining_due(day, options.lm, options.pretrain)
    warm = day.previous is not None and not due
    read = read_log(day, whole_window=due)
    id_model = train_click(day, "id", read, options.ctr, start=day.earlier("id"))
    pretrained = pretrain(day, read, options.lm, options.pretrain)

    # The vectors of a newly pre-trained language model mean something else: MF² then learns the whole window anew.
    aligned, fused = (day.earlier("lm"), day.earlier("cela")) if warm else (pretrained, None)
    days = read.train if warm else day.window.train
    align_due = alignment_due(day, options.align, warm)
    for number in range(1, options.rounds + 1):
        suffix, target = _suffix(number), fused if number > 1 else id_model
        aligned = align(day, f"roma{suffix}", read, aligned, target, options.align, options.lm, warm, align_due)
        if options.fuse.source == "id":
            text = table_of_embeddings(day, f"encode{suffix}", read, id_model)
        else:
            text = encode(day, f"encode{suffix}", read, aligned, options.encode)
        fused = train_click(
            day, f"mf2{suffix}", read, options.ctr, text=text, fuse=options.fuse, start=fused, days=days
        )
    return read, id_model, pretrained, aligned, text, fused


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(CelaOptions(), __doc__)))
