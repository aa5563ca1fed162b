import json
import logging
import threading

import pytest

from components import retry
from components.metrics import background
from components.metrics.background import BackgroundWriter, Position, PositionFile
from components.metrics.logger import MetricsConfig
from components.metrics.writer import Writer
from tests.run_info import open_jsonl, run_info

pytestmark = pytest.mark.quick


class Recorder(Writer):
    """Keeps the rows; `errors` are raised, one for each call, before the first one is accepted."""

    def __init__(self, *errors: Exception, open_errors: tuple[Exception, ...] = ()) -> None:
        self.rows: list[dict] = []
        self.errors, self.open_errors = list(errors), list(open_errors)
        self.released = threading.Event()
        self.released.set()
        self.is_closed = False

    def open(self, run) -> None:
        if self.open_errors:
            raise self.open_errors.pop(0)

    def write(self, row) -> None:
        self.released.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.rows.append(dict(row))

    def close(self) -> None:
        self.is_closed = True

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]


class OnlyWriteAndClose:
    """The least that a custom class needs."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def write(self, row) -> None:
        self.rows.append(dict(row))

    def close(self) -> None:
        self.rows.append({"closed": True})


@pytest.fixture(autouse=True)
def retries_at_once(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_RETRY_SECONDS", 0.001)


def logger_of(folder, *, after_step=0, **writers):
    config = MetricsConfig(writers={**MetricsConfig().writers, "console": None, "tensorboard": None, **writers})
    return config.build(run_info(folder, after_step=after_step), folder / "writers")


def test_a_class_with_write_and_close_gets_every_row(tmp_path):
    mine = OnlyWriteAndClose()
    logger = logger_of(tmp_path, mine=mine)
    for step in (1, 2):
        logger.log({"step": step, "loss": 1.5})
    logger.close()
    assert mine.rows == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.5}, {"closed": True}]


def test_rows_wait_for_a_writer_that_blocks_or_fails_for_a_time(tmp_path, caplog):
    writer = Recorder(OSError("no network"), ConnectionError("still none"))
    writer.released.clear()
    with caplog.at_level(logging.INFO, "powertrain"):
        logger = logger_of(tmp_path, remote=writer)
        for step in range(1, 501):
            logger.log({"step": step})
        assert writer.rows == [], "it still blocks on the first row"
        writer.released.set()
        logger.close()
    assert writer.steps == list(range(1, 501)) and writer.is_closed
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "no network" in line or "again" in line or "could not" in line] == [
        "[metrics.writers.remote] cannot be written: no network; training continues; its rows stay in "
        "metrics.jsonl and are written later",
        "[metrics.writers.remote] can be written again",
        "[metrics.writers.remote] could not be written 2 times; the rows were written later",
    ]


def test_a_row_that_a_writer_does_not_accept_is_dropped_and_counted(tmp_path, caplog):
    writer = Recorder(TypeError("not a number"))
    logger = logger_of(tmp_path, remote=writer)
    for step in (1, 2, 3):
        logger.log({"step": step})
    logger.close()
    assert writer.steps == [2, 3]
    assert "does not accept a row: TypeError: not a number" in caplog.text
    assert "did not accept 1 rows" in caplog.text


def test_a_writer_that_hangs_at_the_end_is_left_behind_and_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.1)
    writer = Recorder()
    writer.released.clear()
    logger = logger_of(tmp_path, remote=writer)
    logger.log({"step": 1})
    logger.close()
    assert "[metrics.writers.remote] lacks the last rows" in caplog.text
    writer.released.set()


@pytest.mark.parametrize("written_up_to", [3, 5, 7])
def test_a_resumed_run_writes_every_row_once(tmp_path, written_up_to):
    """A run is killed after step 7, and resumed after step 5, when a writer had got `written_up_to`."""
    file = open_jsonl(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        file.write({"step": step, "loss": step})
        if step % 2 == 1:
            file.write({"step": step, "val_loss": step})
    file.close()
    (tmp_path / "writers").mkdir()
    position = PositionFile(tmp_path / "writers" / "remote.json")
    position.save(Position(written_up_to, 1))  # the loss of this step, but not its validation
    position.close()
    writer = Recorder()
    logger = logger_of(tmp_path, after_step=5, remote=writer)
    for step in range(6, 10):
        logger.log({"step": step, "loss": step})
        if step % 2 == 1:
            logger.log({"step": step, "val_loss": step})
    logger.close()
    every = [(step, key) for step in range(1, 10) for key in (["loss", "val_loss"] if step % 2 else ["loss"])]
    expected = every[every.index((written_up_to, "loss")) + 1 :]
    assert [(row["step"], *(row.keys() - {"step"})) for row in writer.rows] == expected


def test_a_writer_that_is_added_to_a_resumed_run_gets_the_earlier_rows(tmp_path):
    file = open_jsonl(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.write({"step": step})
    file.close()
    writer = Recorder()
    logger = logger_of(tmp_path, after_step=2, remote=writer)
    logger.log({"step": 3})
    logger.close()
    assert writer.steps == [1, 2, 3]


def test_a_destination_that_has_lost_rows_gets_them_again(tmp_path):
    class Forgetful(Recorder):
        def open(self, run) -> int:
            return 2

    file = open_jsonl(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"step": step})
    file.close()
    (tmp_path / "writers").mkdir()
    position = PositionFile(tmp_path / "writers" / "remote.json")
    position.save(Position(5, 1))
    position.close()
    writer = Forgetful()
    logger_of(tmp_path, after_step=5, remote=writer).close()
    assert writer.steps == [3, 4, 5]


def test_a_writer_that_cannot_be_opened_ends_a_new_run_and_not_a_resumed_one(tmp_path, caplog):
    with pytest.raises(ConnectionError, match="refused"):
        logger_of(tmp_path, remote=Recorder(open_errors=(ConnectionError("refused"),)))
    writer = Recorder(open_errors=(ConnectionError("refused"), ConnectionError("refused")))
    logger = logger_of(tmp_path, after_step=1, remote=writer)
    logger.log({"step": 2})
    logger.close()
    assert writer.steps == [2]
    assert "cannot be opened: refused; training continues" in caplog.text
    broken = Recorder(open_errors=(ValueError("no such project"),))
    logger_of(tmp_path, after_step=2, remote=broken).close()
    assert "cannot be opened: ValueError: no such project; training continues without it" in caplog.text
    assert broken.rows == []


def test_a_damaged_position_starts_again(tmp_path):
    path = tmp_path / "writers" / "remote.json"
    path.parent.mkdir()
    for text in (b"", b"[3", b'{"a": 1}', b"[1, 2, 3]", b"\0" * 64, b"\xff"):
        path.write_bytes(text)
        file = PositionFile(path)
        assert file.read() == Position()
        file.save(Position(4, 2))
        assert file.read() == Position(4, 2) and json.loads(path.read_bytes()[:64]) == [4, 2]
        file.close()


def test_a_row_that_is_being_written_is_read_when_it_is_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    writer = Recorder()
    each = BackgroundWriter(writer, "remote", run_info(tmp_path), tmp_path / "position")
    with path.open("a") as file:
        file.write('ep": 2}\n')
    each.wake()
    each.close()
    assert writer.steps == [1, 2] and each.failures() == []
