"""Who may write to a run directory, and what the dead leave in one."""

import pytest

from components import durable, run_directory
from components.durable import replace_file
from components.run_directory import RunDirectory

pytestmark = pytest.mark.quick


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_PATIENCE_SECONDS", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first.held(), pytest.raises(ValueError, match="another run is writing"), second.held():
        pass
    with second.held():
        pass


def test_a_file_that_a_killed_run_was_writing_is_swept_away_by_the_next(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    replace_file(directory.config, "the old one")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable.Path, "replace", killed)
        patch.setattr(durable.Path, "unlink", lambda *_, **__: None)  # nobody tidies up after a kill
        replace_file(directory.config, "the new one")
    assert len(list(tmp_path.iterdir())) == 2
    with directory.held():
        assert [file.name for file in tmp_path.iterdir()] == ["config.toml"]
        assert directory.config.read_text() == "the old one"
