"""The registered model, as MLflow loads it: from code, so that no pickle is read. Only MLflow runs this file."""

from pathlib import Path

import mlflow
import pandas as pd

from ctrdist.serving.model import SERVING, ServedModel


class ReleaseModel(mlflow.pyfunc.PythonModel):
    """Scores a DataFrame with a release's model."""

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Memory-map the release."""
        self.model = ServedModel(Path(context.artifacts[SERVING]))

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        """Click probability of each row, one float32 column `probability`."""
        return pd.DataFrame({"probability": self.model.predict_frame(model_input)})


mlflow.models.set_model(ReleaseModel())
