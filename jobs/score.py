"""Score Parquet files of raw ids with a released model into Parquet files of probabilities.

    python jobs/score.py --input REQUESTS --output SCORES --model models:/cela@champion --state STATE
    python jobs/score.py --input 'requests/*.parquet' --output SCORES --model STATE/releases/2024-01-14.1a2b3c4d

Each file becomes one of the same name, whole or not at all. Run again, files that the same model has scored and that
have not changed since are left as they are: so a run that was cut off goes on where it was.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import fs
from rich.console import Console
from rich.table import Table

from ctrdist.errors import UserError
from ctrdist.items import require_columns
from ctrdist.report import duration
from ctrdist.scoring import Job, Scored, needed, open_parquet
from ctrdist.serving.model import ServedModel
from ctrdist.storage import filesystem, list_parquet
from raycluster import cli, cluster, planning
from raycluster.day import Progress, say
from raycluster.model_source import ModelSource, find_model
from raycluster.scoring import score_files

QUARANTINE = "_quarantine"


@dataclass(frozen=True)
class ScoreOptions:
    """What to score, and with what.

    Args:
        input: a folder of Parquet files, a pattern of them or one file; a folder may be a URI. They have the columns of
            the log but label and timestamp; a history, and the user's fields, may be left out.
        output: folder or URI for the scored files; made if it is not there.
        model: a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`, or the folder of a release.
        state: folder of the daily job's state, whose registry is asked.
        tracking_uri: MLflow's server or database; SQLite in the state if not given.
        keep: columns that the scored files have besides `user_id`, `item_id` and `probability`.
        max_bad_fraction: largest share of rows without user or item with which the job succeeds.
        workers: files that are scored at once; 0 takes as many as the cluster has room for.
        plan: how the cluster's resources are shared out, and what to wait for on one that grows by itself; no GPUs.
        config: YAML file of options; `score.yaml` in the working folder is read if it is there.
    """

    input: str = ""
    output: str = ""
    model: str = ""
    state: str = ""
    tracking_uri: str | None = None
    keep: tuple[str, ...] = ()
    max_bad_fraction: float = 0.01
    workers: int = 0
    plan: planning.PlanConfig = field(default_factory=planning.PlanConfig)
    config: str | None = None

    def check(self) -> None:
        """Raise a UserError for what can be known to be wrong before anything is read."""
        for name in ("input", "output", "model"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give it on the command line or in score.yaml")
        for name in ("input", "output", "state"):
            cluster.check_path(f"--{name}", getattr(self, name) or "/")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction}: a share from 0 to 1")


def run(options: ScoreOptions) -> None:
    """From the files to the scored files, and a summary."""
    options.check()
    source = find_model(options.model, options.tracking_uri, options.state)
    jobs = find_jobs(options, source)
    cluster.connect()
    say(f"score      {len(jobs):,} files with {source.name}")
    plan = planning.make_plan(options.workers, config=options.plan, on_gpus=False)
    began, progress = time.monotonic(), Progress("score", "files")
    found = score_files(jobs, source, options.keep, plan, progress.items)
    show(options, source, found, time.monotonic() - began)
    rows, bad = sum(one.rows for one in found), sum(one.bad for one in found)
    if bad > options.max_bad_fraction * (rows + bad):
        raise UserError(
            f"{bad:,} of {rows + bad:,} rows have no user or no item: more than --max-bad-fraction "
            f"{options.max_bad_fraction}. They lie in {options.output}/{QUARANTINE}; the others are scored"
        )


def find_jobs(options: ScoreOptions, source: ModelSource) -> list[Job]:
    """The files to score, their columns checked. Raises UserError if there are none, or one lacks a column."""
    output = cluster.absolute(options.output).rstrip("/")
    files, root, paths = list_parquet(cluster.absolute(options.input))
    if not paths:
        raise UserError(f"--input {options.input}: no Parquet files there; give a folder, or a pattern in quotes")
    target, inside = filesystem(output)
    deep = _is_read_whole(options.input, files) and Path(inside).is_relative_to(root)
    if target.equals(files) and (deep or inside == root):
        raise UserError(f"--output {options.output}: within --input, whose files a next run would take it for; move it")
    wanted = needed(ServedModel(source.local()), options.keep)

    def check(path: str) -> None:
        with files.open_input_file(path) as stream:
            require_columns(path, wanted, open_parquet(stream, path).schema_arrow.names)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, paths))
    made, folder = [], options.input.rstrip("/").removesuffix(f"/{Path(paths[0]).name}")
    for path in paths:
        name = Path(path).relative_to(root).as_posix()
        source_ = f"{folder}/{name}" if "://" in options.input else path
        made.append(Job(source_, f"{output}/{name}", f"{output}/{QUARANTINE}/{name}"))
    return made


def _is_read_whole(where: str, files: fs.FileSystem) -> bool:
    """Whether a next run finds what lies deep in the folder that `--input` names."""
    return "**" in where or files.get_file_info(filesystem(cluster.absolute(where))[1]).type == fs.FileType.Directory


def show(options: ScoreOptions, source: ModelSource, found: list[Scored], seconds: float) -> None:
    """Print what was done, and what it took."""
    now = [one for one in found if not one.before]
    summary = Table(title=options.output, show_header=False)
    summary.add_column(style="bold")
    summary.add_column(justify="right")
    for name, value in (
        ("model", source.name),
        ("files", f"{len(found):,}"),
        ("of these done before", f"{len(found) - len(now):,}"),
        ("rows", f"{sum(one.rows for one in found):,}"),
        ("rows set aside", f"{sum(one.bad for one in found):,}"),
        ("time", duration(seconds)),
        ("rows/s, the start included", f"{sum(one.rows for one in now) / seconds:,.0f}"),
    ):
        summary.add_row(name, value)
    Console().print(summary)


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(ScoreOptions(), __doc__, file="score.yaml")))
