"""How a job ends."""

import pytest

from ctrdist.errors import UserError
from raycluster.cli import main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("--state is missing"), 1, "error: --state is missing\n"),
        (KeyboardInterrupt(), 130, "stopped: what is done stays, and the same command goes on from there\n"),
    ],
)
def test_what_a_user_can_act_on_is_a_line_and_a_status(capsys, error, status, said):
    def job() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main(job)
    assert ended.value.code == status and capsys.readouterr().err == said


def test_what_is_ours_to_mend_keeps_its_trace():
    def job() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main(job)
