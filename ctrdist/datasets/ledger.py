"""What a dataset of one's own tables was made of, and the step that makes a run of it count.

`Ledger.save` is that step: before it the dataset is as it was, after it `complete` puts the run's files in place, as
often as it takes.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ctrdist.config import to_dict
from ctrdist.datasets.canonical import HISTORIES, LEDGER, save_schema
from ctrdist.datasets.table import TableOptions
from ctrdist.errors import UserError
from ctrdist.schema import Schema


@dataclass(frozen=True)
class Ledger:
    """What a dataset was made of, so that it can be appended to: `histories.json` in it.

    Args:
        through: last day in it.
        buckets: how many parts its users are dealt to.
        split: whether its log has a column `split`.
        schema: of the dataset.
        options: how its log was made.
        inputs: path, size and time of change of the files of the last run.
        summary: of the last run.
        work: folder of the last run, relative to the dataset; while it is there, not all is in place.
    """

    through: str
    buckets: int
    split: bool
    schema: dict
    options: dict
    inputs: list
    summary: dict
    work: str

    @property
    def histories(self) -> str:
        """Folder, relative to the dataset, of what each user did last."""
        return f"{HISTORIES}{self.through}"

    def save(self, out: Path) -> None:
        """Write it in one piece."""
        part = out / f"{LEDGER}.part"
        part.write_text(json.dumps(asdict(self)))
        part.replace(out / LEDGER)

    @classmethod
    def load(cls, out: Path) -> "Ledger | None":
        """None where there is none. Raises UserError for one that another version wrote."""
        try:
            return cls(**json.loads((out / LEDGER).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{out / LEDGER}: not readable here ({error}); write the dataset anew") from None

    def difference(self, schema: Schema, options: TableOptions) -> str:
        """The first thing that is not as it was, in words; "" if all is."""
        for before, now, kind in ((self.schema, to_dict(schema), "schema"), (self.options, to_dict(options), "option")):
            for name, value in now.items():
                if value != before.get(name):
                    return f"{kind} '{name}' was {before.get(name)}, and is {value} now"
        return ""


def complete(out: Path, ledger: Ledger, schema: Schema) -> None:
    """Put in place what a run has in its `work` folder, and tidy up; done again after it was cut off, it goes on.

    Items come before the days: who reads meanwhile finds items without rows, but no rows without their items.
    """
    work = out / ledger.work
    if (work / "items").exists():
        (out / "items").mkdir(exist_ok=True)
        for path in (work / "items").iterdir():
            path.replace(out / "items" / path.name)
    for folder in sorted((work / "interactions").glob("dt=*")):
        (out / "interactions").mkdir(exist_ok=True)
        folder.replace(out / "interactions" / folder.name)
    if (work / "histories").exists():
        (work / "histories").replace(out / ledger.histories)
    if not (out / "schema.yaml").exists():
        save_schema(schema, out)
    for folder in out.glob(f"{HISTORIES}*"):
        if folder.is_dir() and folder.name != ledger.histories:
            shutil.rmtree(folder)
    shutil.rmtree(out / "work", ignore_errors=True)
