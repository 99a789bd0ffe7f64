"""The training steps of other libraries, on their own models where they come with the package, or else on their layers.

Sizes are those of our networks. What they do in a step is theirs: torch-rechub decays all weights, FuxiCTR clips the
norm of all gradients, DeepCTR-Torch takes ids as floats; regularisation of whole tables, which some offer, is off.
"""

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step.world import DIM, HISTORY, Rows, World
from ctrdist.backbones import BackboneConfigs

CONFIGS = BackboneConfigs()
HIDDEN = {name: list(getattr(CONFIGS, name).hidden) for name in ("din", "dcnv2", "deepfm")}
CROSS_LAYERS = CONFIGS.dcnv2.cross_layers
FIELDS = ("user", "hour", "item", "category")
BEHAVIOURS = {"history": "item", "history_category": "category"}


class Rechub:
    """torch-rechub: its models and the step of its `CTRTrainer`."""

    def __init__(self, network: str, world: World, device: str) -> None:
        from torch_rechub.basic.features import SequenceFeature, SparseFeature
        from torch_rechub.models.ranking import DIN, DCNv2, DeepFM

        size = world.sizes
        one = {name: SparseFeature(name, size[name], DIM) for name in FIELDS}
        pooling = "concat" if network == "din" else "mean"
        many = [
            SequenceFeature(name, size[of], DIM, pooling, shared_with=of, padding_idx=0)
            for name, of in BEHAVIOURS.items()
        ]
        mlp = {"dims": HIDDEN[network], "dropout": 0.2}
        if network == "din":
            attention = {"dims": list(CONFIGS.din.attention)}
            self.model = DIN([one["user"], one["hour"]], many, [one["item"], one["category"]], mlp, attention)
        elif network == "dcnv2":
            features = [*one.values(), *many]
            self.model = DCNv2(features, CROSS_LAYERS, mlp, use_low_rank_mixture=False)
        else:
            features = [*one.values(), *many]
            self.model = DeepFM(features, features, mlp)
        self.model.to(device).train()
        self.device = device
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-5)
        self.criterion = nn.BCELoss()

    def prepare(self, rows: Rows) -> dict[str, Tensor]:
        """What a step takes."""
        return rows.tensors(self.device)

    def step(self, x: dict[str, Tensor]) -> None:
        """One step."""
        loss = self.criterion(self.model(x), x["label"])
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()


class Deepctr:
    """DeepCTR-Torch: its models and the step of their `fit`."""

    def __init__(self, network: str, world: World, device: str) -> None:
        from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat, get_feature_names
        from deepctr_torch.models import DCN, DIN, DeepFM

        size = world.sizes
        one = [SparseFeat(name, size[name], DIM, embedding_name=name) for name in FIELDS]
        many = [
            VarLenSparseFeat(
                SparseFeat(f"hist_{of}", size[of], DIM, embedding_name=of), HISTORY, "mean", length_name="length"
            )
            for of in BEHAVIOURS.values()
        ]
        columns = one + many
        common = {"dnn_hidden_units": tuple(HIDDEN[network]), "dnn_dropout": 0.2, "l2_reg_embedding": 0}
        if network == "din":
            attention = CONFIGS.din.attention
            self.model = DIN(columns, ["item", "category"], att_hidden_size=attention, device=device, **common)
        elif network == "dcnv2":
            self.model = DCN([], columns, CROSS_LAYERS, "matrix", device=device, **common)
        else:
            self.model = DeepFM(columns, columns, device=device, l2_reg_linear=0, **common)
        self.model.compile("adam", "binary_crossentropy")
        self.names, self.device = get_feature_names(columns), device
        self.model.train()

    def prepare(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """What a step takes."""
        columns = {name: getattr(rows, name)[:, None] for name in FIELDS}
        columns |= {f"hist_{of}": getattr(rows, name) for name, of in BEHAVIOURS.items()}
        columns["length"] = (rows.history > 0).sum(1, keepdims=True)
        x = np.concatenate([columns[name] for name in self.names], 1)
        return torch.from_numpy(x).to(self.device).float(), torch.from_numpy(rows.label).to(self.device)

    def step(self, xy: tuple[Tensor, Tensor]) -> None:
        """One step."""
        x, y = xy
        predicted = self.model(x).squeeze(-1)
        self.model.optim.zero_grad()
        loss = self.model.loss_func(predicted, y, reduction="sum") + self.model.get_regularization_loss()
        (loss + self.model.aux_loss).backward()
        self.model.optim.step()


class Fuxi:
    """FuxiCTR: networks of its layers, as its model zoo has them, and the step of its `BaseModel`."""

    def __init__(self, network: str, world: World, device: str) -> None:
        from fuxictr.features import FeatureMap
        from fuxictr.pytorch.layers import CrossNetV2, DIN_Attention, FactorizationMachine, FeatureEmbedding, MLP_Block
        from fuxictr.pytorch.models import BaseModel

        size, din = world.sizes, network == "din"
        features = FeatureMap("step", tempfile.gettempdir())
        for name in FIELDS:
            spec = {"source": "", "type": "categorical", "vocab_size": size[name], "padding_idx": 0}
            features.features[name] = spec
        for name, of in BEHAVIOURS.items():
            spec = {"source": "", "type": "sequence", "vocab_size": size[of], "padding_idx": 0, "max_len": HISTORY}
            features.features[name] = spec | {"share_embedding": of}
            if not din:
                features.features[name]["feature_encoder"] = "layers.MaskedAveragePooling()"
        features.labels, features.num_fields = ["label"], len(features.features)
        width = features.num_fields * DIM
        hidden = {"hidden_units": HIDDEN[network], "dropout_rates": 0.2}

        class Model(BaseModel):
            def __init__(self) -> None:
                places = {"gpu": 0 if device == "cuda" else -1, "model_root": tempfile.gettempdir()}
                super().__init__(features, network, verbose=0, metrics=["AUC"], **places)
                self.embedding = FeatureEmbedding(features, DIM)
                if din:
                    self.attention = DIN_Attention(2 * DIM, list(CONFIGS.din.attention))
                    self.mlp = MLP_Block(width, hidden_activations="Dice", output_dim=1, **hidden)
                elif network == "dcnv2":
                    self.cross = CrossNetV2(width, CROSS_LAYERS)
                    self.mlp = MLP_Block(width, **hidden)
                    self.output = nn.Linear(width + HIDDEN[network][-1], 1)
                else:
                    self.fm = FactorizationMachine(features)
                    self.mlp = MLP_Block(width, output_dim=1, **hidden)
                self.compile("adam", "binary_crossentropy", 1e-3)

            def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
                x = self.get_inputs(inputs)
                if din:
                    of = self.embedding.embedding_layer(x)
                    target = torch.cat([of["item"], of["category"]], -1)
                    behaviours = torch.cat([of["history"], of["history_category"]], -1)
                    interest = self.attention(target, behaviours, x["history"] != 0)
                    logit = self.mlp(torch.cat([of["user"], of["hour"], target, interest], -1))
                else:
                    fields = self.embedding(x)
                    flat = fields.flatten(1)
                    if network == "dcnv2":
                        logit = self.output(torch.cat([self.cross(flat), self.mlp(flat)], -1))
                    else:
                        logit = self.fm(x, fields) + self.mlp(flat)
                return {"y_pred": self.output_activation(logit)}

        self.model = Model().to(device).train()
        self.model._max_gradient_norm = 10.0  # what its `fit` sets
        self.device = device

    def prepare(self, rows: Rows) -> dict[str, Tensor]:
        """What a step takes."""
        return rows.tensors(self.device)

    def step(self, x: dict[str, Tensor]) -> None:
        """One step."""
        self.model.train_step(x)


PEERS: dict[str, Callable] = {"torch-rechub": Rechub, "deepctr-torch": Deepctr, "fuxictr": Fuxi}
NETWORKS = tuple(HIDDEN)
