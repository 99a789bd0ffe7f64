"""Serve a released model over HTTP, by Ray Serve, until it is stopped; follows the registry's champion.

    python jobs/serve.py --state STATE
    python jobs/serve.py --model models:/elec@champion --tracking-uri http://mlflow:5000 --replicas 4
    curl localhost:8000 -d '{"user": {"user_id": "u1"}, "context": {}, "history": [], "candidates": ["i1", "i2"]}'

Options may stand in `serve.yaml`.
"""

import threading
from dataclasses import dataclass

from ctrdist.errors import UserError
from raycluster import cli, cluster
from raycluster.model_source import RegistryAway, find_model, remembered


@dataclass(frozen=True)
class ServeOptions:
    """Options of serving.

    Args:
        model: a registered model, models:/NAME@ALIAS, which is followed as the alias moves, or models:/NAME/VERSION;
            or the folder of a release.
        state: the daily job's, whose MLflow database is taken if `tracking_uri` is not given.
        tracking_uri: MLflow's server or database.
        host: address to listen on; 0.0.0.0 for all.
        port: to listen on.
        replicas: processes that score.
        threads: CPUs of each, and threads that it computes with.
        batch_requests: most requests that are scored in one go.
        batch_wait_ms: milliseconds that the first of them waits for others.
        poll_seconds: between two looks at the alias.
        config: YAML file of options; `serve.yaml` in the working folder is read if it is there.
    """

    model: str = "models:/cela@champion"
    state: str = ""
    tracking_uri: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    threads: int = 1
    batch_requests: int = 16
    batch_wait_ms: float = 2.0
    poll_seconds: float = 10.0
    config: str | None = None

    def check(self) -> None:
        """Raise a UserError for a number out of range."""
        for name in ("replicas", "threads", "batch_requests"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: 1 or more")
        if self.batch_wait_ms < 0 or self.poll_seconds <= 0:
            raise UserError("--batch-wait-ms takes 0 or more, --poll-seconds more than 0")


def run(options: ServeOptions) -> None:
    """Serve, until a signal ends it."""
    options.check()
    try:
        from raycluster import serve
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error.name}): pip install '.[serve]'") from None
    model = options.model if options.model.startswith("models:/") else cluster.absolute(options.model)
    try:
        source = find_model(model, options.tracking_uri, options.state)
    except RegistryAway:
        source = remembered(model, options.tracking_uri)
        if source is None:
            raise
    cluster.connect()
    batching = (options.poll_seconds, options.batch_requests, options.batch_wait_ms)
    with serve.alone():
        serve.start(
            model, source.tracking_uri, options.host, options.port, options.replicas, options.threads, *batching
        )
        print(f"{options.model} (version {source.version}) at http://{options.host}:{options.port}/", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(ServeOptions(), __doc__, file="serve.yaml")))
