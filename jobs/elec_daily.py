"""ELEC, every day: a gain network that reads what a language model made of a row teaches the network that serves.

Reads a prepared log (jobs/prepare.py), encodes texts by a frozen language model, trains its new layers on clicks
(M-LLM), writes their representation of every row beside the log, trains the backbone alone and the pair of gain and
vanilla network, evaluates all four on the same test rows, and releases and registers the vanilla network: no text, no
language model. A run for the next day starts from the day before; a run that was cut off goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ctrdist import backbones
from ctrdist.config import to_dict
from ctrdist.interaction_text import TextConfig
from ctrdist.language.encode import EncodeConfig, Source
from ctrdist.language.model import check_model
from ctrdist.storage import Manifest, fingerprint
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig
from raycluster import cli, cluster, registry, reporting
from raycluster.day import Day, DayOptions, run_day
from raycluster.stages.click import train_click
from raycluster.stages.elec import (
    GAIN,
    FrozenLanguageModelConfig,
    Granularity,
    distill,
    encode_interactions,
    represent,
    train_m_llm,
)
from raycluster.stages.evaluate import evaluate
from raycluster.stages.read import Days, Read, read_log


@dataclass(frozen=True)
class ElecOptions(DayOptions):
    """Options of the day.

    Args:
        text_granularity: what is encoded. `item`: each item's text once; a row's state is that of its item, and the
            mean of those of its history. `interaction`: each distinct text of a row, as the paper does, at the cost of
            the rows and not of the items.
        lm: the language model.
        text: what it reads.
        encode: texts to states.
        m_llm: the layers on it.
        ctr: the CTR model: of the backbone alone, and of both networks of the pair.
        distill: how the gain network teaches.
    """

    experiment: str = "elec"
    model_name: str = "elec"
    text_granularity: Granularity = "item"
    lm: FrozenLanguageModelConfig = field(default_factory=FrozenLanguageModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    m_llm: MLLMConfig = field(default_factory=MLLMConfig)
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    distill: DistillConfig = field(default_factory=DistillConfig)

    job = "elec_daily"
    served_stage = "distill"

    def check(self) -> None:
        """Raise a UserError for what can be known to be wrong before anything is read."""
        backbones.check(self.ctr.backbone)
        if not self.distill.without_text:
            check_model(self.lm.name, head=False)

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch, by option."""
        return {"--ctr.batch-size": self.ctr.batch_size, "--m-llm.batch-size": self.m_llm.batch_size}

    def encoding(self) -> tuple[int, float]:
        """Processes that encode texts at most, 0 for what there is room for; and the share of a GPU of each."""
        return self.encode.encoders, self.encode.gpu_share

    def source(self) -> Source:
        """The language model, as any process finds it."""
        name = self.lm.name
        return Source(cluster.absolute(name) if Path(name).is_dir() else name, pooling=self.lm.pooling)

    def representation(self) -> str:
        """Fingerprint of what a row's representation means, besides the weights of the new layers, and how the pair is
        built on it."""
        if self.distill.without_text:
            return fingerprint("without text", self.distill.share_embeddings)
        parts = to_dict(self.text), self.text_granularity, self.m_llm.hidden, self.distill.share_embeddings
        return fingerprint(self.source().fingerprint(self.encode), *parts)


def run(options: ElecOptions) -> None:
    """The paper's day, from the log to the release."""
    options.check()
    run_day(options, lambda day: elec(day, options))


def elec(day: Day, options: ElecOptions) -> dict:
    """All stages, in order; returns the report."""
    read, days, text, m_llm, represented, pair = train(day, options)
    start = (
        None if starts_anew(day, options) else day.earlier("backbone")
    )  # as the pair does: what is compared is alike
    backbone = train_click(day, "backbone", read, options.ctr, start=start, days=days)

    models = {"backbone": (backbone, None)}
    if m_llm:
        models["m_llm"] = (None, None)
    models |= {"gain": (pair, None, GAIN), "vanilla": (pair, None)}
    report = reporting.assemble(day, read, evaluate(day, read, models, represented), text, days)
    facts = {"representation": options.representation(), "backbone": backbone.name}
    facts |= {"m_llm": m_llm.name} if m_llm else {}
    registry.release(day, read, {"elec": (pair, None)}, report, facts)
    return report


def starts_anew(day: Day, options: ElecOptions) -> bool:
    """Whether the states mean something else than on the day before, as those of another language model: all networks
    then learn the whole window anew."""
    return day.previous is not None and day.previous.facts["representation"] != options.representation()


def train(
    day: Day, options: ElecOptions
) -> tuple[Read, Days, Manifest | None, Manifest | None, Manifest | None, Manifest]:
    """The stages up to the served model: what was read, the days trained on, texts, M-LLM, its representations and the
    pair."""
    options.text.check(day.schema)
    anew = starts_anew(day, options)
    read = read_log(day, whole_window=anew)
    days = day.window.train if anew else read.train

    def before(part: str):
        return None if anew else day.earlier(part)

    text = m_llm = represented = None
    if not options.distill.without_text:
        granularity = options.text_granularity
        text = encode_interactions(day, read, options.source(), granularity, options.encode, options.text, days)
        m_llm = train_m_llm(day, read, text, granularity, options.m_llm, before("m_llm"), days)
        represented = represent(day, read, text, m_llm, granularity, days)
    pair = distill(day, read, represented, options.ctr, options.distill, before("elec"), days)
    return read, days, text, m_llm, represented, pair


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(ElecOptions(), __doc__)))
