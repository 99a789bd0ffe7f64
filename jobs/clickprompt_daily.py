"""ClickPrompt, every day: the CTR model writes prompts into every layer of a language model, and learns from its words.

Reads a prepared log (jobs/prepare.py), says every distinct value of its fields as tokens, pre-trains CTR model and
language model together on masked words (PA-MLM), fine-tunes the CTR model alone from there (without PLM), and both
together (with PLM), evaluates these and the backbone alone on the same test rows, and releases and registers the one
without a language model. A run for the next day starts from the day before; a run that was cut off goes on.
"""

from dataclasses import dataclass, field, replace

from ctrdist import backbones
from ctrdist.config import to_dict
from ctrdist.errors import UserError
from ctrdist.language import source
from ctrdist.language.model import check_model
from ctrdist.language.prompts import PromptConfig, check_prompts
from ctrdist.row_texts import RowTextConfig
from ctrdist.storage import Manifest, fingerprint
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.prompted import PromptPretrainConfig
from ctrdist.tasks.prompted_click import PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig
from raycluster import cli, registry, reporting
from raycluster.day import Day, DayOptions, run_day
from raycluster.stages.click import train_click
from raycluster.stages.clickprompt import Prompted, finetune, pretrain, pretraining_due, tokens
from raycluster.stages.clickprompt_report import inference_times, prompt_attention, quadrants
from raycluster.stages.evaluate import evaluate
from raycluster.stages.read import Days, Read, read_log


@dataclass(frozen=True)
class ClickPromptOptions(DayOptions):
    """Options of the day.

    Args:
        lm: the language model.
        text: what it reads of a row.
        prompts: what it reads besides.
        ctr: the CTR model: of the backbone alone, of pre-training, and of both fine-tunings.
        pretrain: masked words with prompts (PA-MLM).
        finetune: fine-tuning with the language model; that without it has the options of `ctr`.
    """

    experiment: str = "clickprompt"
    model_name: str = "clickprompt"
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    text: RowTextConfig = field(default_factory=RowTextConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    pretrain: PromptPretrainConfig = field(default_factory=PromptPretrainConfig)
    finetune: PromptFinetuneConfig = field(default_factory=PromptFinetuneConfig)

    job = "clickprompt_daily"
    served_stage = "without_plm"

    def check(self) -> None:
        """Raise a UserError for what can be known to be wrong before anything is read."""
        backbones.check(self.ctr.backbone)
        check_model(self.lm.name, head=self.pretrain.epochs > 0)
        check_prompts(self.lm.name, self.prompts)
        if (self.lm.precision == "float64") != (self.ctr.precision == "float64"):
            raise UserError(
                f"--lm.precision {self.lm.precision}, --ctr.precision {self.ctr.precision}: float64 is of both models, "
                "or of none"
            )
        for name, config in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if self.lm.gradient_checkpointing and not config.lm_lr:
                raise UserError(
                    f"--{name}.lm-lr 0 with --lm.gradient-checkpointing: layers of a frozen language model are not "
                    f"computed again; give --{name}.chunk, which saves as much memory"
                )

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch, by option."""
        parts = {"ctr": self.ctr, "pretrain": self.pretrain, "finetune": self.finetune}
        return {f"--{name}.batch-size": part.batch_size for name, part in parts.items()}

    def parts(self) -> Prompted:
        """What the trainings with the language model are made of."""
        return Prompted(self.ctr, self.lm, self.prompts)

    def meaning(self) -> str:
        """Fingerprint of what pre-training makes, besides the rows, and of what warm models with the language model
        are made of: with another one both begin anew. When it is due, and how it fits the memory, are not in it."""
        pretrain = replace(self.pretrain, every_days=PromptPretrainConfig.every_days, chunk=0)
        parts = (replace(self.lm, gradient_checkpointing=False), self.text, self.prompts, pretrain)
        return fingerprint(
            source.identity(self.lm.name), *map(to_dict, parts), self.finetune.prompts, self.finetune.combine
        )


def run(options: ClickPromptOptions) -> None:
    """The paper's day, from the log to the release."""
    options.check()
    run_day(options, lambda day: clickprompt(day, options))


def clickprompt(day: Day, options: ClickPromptOptions) -> dict:
    """All stages, in order; returns the report."""
    due, read, days, said, pretrained, without = train(day, options)
    # The backbone starts anew with those that it is compared with: what differs is pre-training alone.
    alone = None if due else day.earlier("backbone")
    backbone = train_click(day, "backbone", read, options.ctr, start=alone, days=days, warm=not due)
    start = pretrained if due else day.earlier("with_plm")
    both = finetune(day, read, said, options.parts(), options.finetune, start, days, warm=not due)

    outputs = {"backbone": backbone, "with_plm": both, "without_plm": without}
    result = evaluate(day, read, {name: (output, None) for name, output in outputs.items()}, tokens=said)
    times = inference_times(day, read, said, outputs).facts["batch_ms"]
    for name, milliseconds in times.items():
        result["models"][name]["batch_ms"] = milliseconds
    report = reporting.assemble(day, read, result, days=days)
    report["quadrants"] = quadrants(day, read, list(outputs))
    if pretrained:
        report["attention"] = prompt_attention(day, read, said, pretrained)
    facts = {
        "meaning": options.meaning(),
        "pretrained": str(day.date) if due else day.previous.facts["pretrained"],
        "backbone": backbone.name,
        "with_plm": both.name,
    }
    registry.release(day, read, {"clickprompt": (without, None)}, report, facts)
    return report


def train(day: Day, options: ClickPromptOptions) -> tuple[bool, Read, Days, Manifest, Manifest | None, Manifest]:
    """The stages up to the served model: whether pre-training was due, what was read, the days trained on, the tokens,
    PA-MLM and the fine-tuning without the language model."""
    options.text.check(day.schema)
    due = pretraining_due(day, options.meaning(), options.pretrain)
    read = read_log(day, whole_window=due)
    # After pre-training both fine-tunings start anew from it, on the whole window; else they go on with new days.
    days = day.window.train if due else read.train
    said = tokens(day, read, options.lm.name, options.prompts, options.text)
    pretrained = None
    if due and options.pretrain.epochs:
        pretrained = pretrain(day, read, said, options.parts(), options.pretrain, days)
    start = pretrained if due else day.earlier("clickprompt")
    without = train_click(day, "without_plm", read, options.ctr, start=start, days=days, warm=not due)
    return due, read, days, said, pretrained, without


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(ClickPromptOptions(), __doc__)))
