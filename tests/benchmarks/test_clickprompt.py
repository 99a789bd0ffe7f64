"""The benchmark of ClickPrompt trains what it says, on every row's own text."""

import json
from dataclasses import replace

import pytest

from benchmarks import clickprompt
from benchmarks.cells.options import LogOptions
from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.language.prompts import PromptConfig
from ctrdist.row_texts import RowTextConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.prompted import PromptPretrainConfig
from ctrdist.tasks.prompted_click import PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig


def test_all_variants_are_trained_once_and_compared_with_the_backbone(tmp_path, tiny_lm, capsys, cells_here):
    cells_here(clickprompt)
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=200), str(tmp_path / "data"))
    small = BackboneConfigs(dcnv2=dcnv2.Config(hidden=(8,), dropout=0.0))
    options = clickprompt.Options(
        log=LogOptions(tmp_path / "data", date="2024-01-04", train_days=4, test_days=2),
        lm=LanguageModelConfig(name=str(tiny_lm)),
        text=RowTextConfig(max_length=24),
        prompts=PromptConfig(count=2),
        ctr=ClickConfig(backbone="dcnv2", dim=4, epochs=1, batch_size=128, networks=small),
        pretrain=PromptPretrainConfig(epochs=1, batch_size=64),
        finetune=PromptFinetuneConfig(epochs=1, batch_size=64),
        seeds=(0,),
        keep=tmp_path / "kept",
        variants=tuple(clickprompt.VARIANTS),
    )
    clickprompt.main(options)
    out = capsys.readouterr().out
    made = {path: path.read_text() for path in (tmp_path / "kept").rglob("*.json")}
    clickprompt.main(options)
    assert capsys.readouterr().out == out
    assert {path: path.read_text() for path in (tmp_path / "kept").rglob("*.json")} == made
    found = json.loads(out.rstrip().splitlines()[-1])
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows) == ["backbone", "backbone_finetune", "pretrain", "without_plm", *options.variants]
    scored = [row["auc"] for row in found["rows"] if "auc" in row]
    assert len(set(scored)) == 8 and "600 training, 400 test rows" in out
    gain = found["ratios"]["auc_without_plm_less_backbone"]
    assert gain == rows["without_plm"]["auc"] - rows["backbone"]["auc"]
    with pytest.raises(SystemExit, match="unknown nothing"):
        clickprompt.main(replace(options, variants=("nothing",)))
    with pytest.raises(SystemExit, match="variant no_pretraining"):
        clickprompt.main(replace(options, pretrain=PromptPretrainConfig(epochs=0)))
