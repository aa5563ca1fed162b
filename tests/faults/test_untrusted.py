"""A file from someone else never executes code: a pickle with code is refused by every loader of the project."""

from __future__ import annotations

import builtins
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.checkpoint import load_tensors
from components.checkpoint.metadata_unpickler import read_index
from components.safetensors import PickledWeights
from recipes import cli
from recipes.resume import schedule_mismatch
from recipes.stored_config import load_stored_config
from tests.checkpoints import rewrite_manifest
from tests.conftest import TinyRun
from tools import export_hf, generate, import_hf

SHORT = "--training.total_tokens=400"


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return builtins.exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyRun(tmp_path_factory.mktemp("trained"))
    assert tiny.launch(SHORT) == 0
    return tiny.folder


@pytest.fixture
def untrusted(trained: Path, tmp_path: Path) -> TinyRun:
    """A run directory that someone else sent."""
    folder = tmp_path / "untrusted"
    shutil.copytree(trained, folder)
    tiny = TinyRun.__new__(TinyRun)
    tiny.folder, tiny.recipe, tiny.directory = folder, folder / "tiny.toml", folder / "run"
    for older in sorted((tiny.directory / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(older)
    return tiny


def newest(tiny: TinyRun) -> Path:
    return max((tiny.directory / "checkpoints").iterdir())


def in_metadata(checkpoint: Path, evil: Evil) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(evil))
    rewrite_manifest(checkpoint)


def beside_metadata(checkpoint: Path, evil: Evil) -> None:
    """Add code to the expected content."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = evil
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_manifest(checkpoint)


def in_tensors(checkpoint: Path, evil: Evil) -> None:
    """Replace every tensor and every setting that is large enough."""
    (file,) = checkpoint.glob("*.distcp")
    content = bytearray(file.read_bytes())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    stream = Path(f"{file}.evil")
    torch.save(evil, stream)
    planted = stream.read_bytes()
    stream.unlink()
    start = len(content)
    for place in metadata.storage_data.values():
        place.offset, place.length = start, len(planted)
    file.write_bytes(bytes(content) + planted)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    rewrite_manifest(checkpoint)


PLANTED = [in_metadata, beside_metadata, in_tensors]
LOADERS: dict[str, Callable[[TinyRun], object]] = {
    "--resume": lambda tiny: tiny.launch("--resume", "--training.total_tokens=800"),
    "a fork": lambda tiny: tiny.launch(f"--resume={newest(tiny)}", f"--run.dir={tiny.folder / 'fork'}"),
    "tools.generate": lambda tiny: generate.main([str(newest(tiny)), "It was"]),
    "an evaluation": lambda tiny: cli.main(
        [
            str(cli.ROOT / "train_configs" / "evaluate.toml"),
            f"--evaluation.checkpoint={newest(tiny)}",
            f"--evaluation.cache_dir={tiny.folder / 'cache'}",
            "--data.use=components.data:TextFiles",
            f"--data.path={tiny.folder / 'text' / '*.txt'}",
        ]
    ),
    "branched training": lambda tiny: tiny.launch(
        "--recipe=recipes.critical_batch:CriticalBatch",
        f"--branches.checkpoint={newest(tiny)}",
        "--branches.tokens=400",
        "--branches.batch_multipliers=[1]",
        "--branches.lr=0.001",
        f"--run.dir={tiny.folder / 'branches'}",
    ),
    "tools.export_hf": lambda tiny: export_hf.main([str(newest(tiny)), str(tiny.folder / "out")]),
}


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_checkpoint_with_code_in_it_is_refused(untrusted: TinyRun, tmp_path, capsys, plant, loader: str) -> None:
    mark = tmp_path / "executed"
    plant(newest(untrusted), Evil(mark))
    assert LOADERS[loader](untrusted) == 2
    output = capsys.readouterr()
    assert not mark.exists()
    assert "damaged, or" in output.err
    assert "Traceback" not in output.out + output.err


@pytest.mark.parametrize("plant", PLANTED)
def test_the_planted_code_runs_where_torch_loads_it(untrusted: TinyRun, tmp_path, plant) -> None:
    """The same files do execute code where torch loads them."""
    import torch.distributed.checkpoint as dcp

    mark, checkpoint = tmp_path / "executed", newest(untrusted)
    plant(checkpoint, Evil(mark))
    state = {"optimizer": {"param_groups": [{"lr": 0.0}, {"lr": 0.0}]}}
    with pytest.raises((Exception, dcp.api.CheckpointException)):
        dcp.load({"optimizer.param_groups.w.lr": 0.0, **state}, checkpoint_id=checkpoint, no_dist=True)
        raise RuntimeError("loaded")
    if plant is not in_tensors:
        assert mark.exists()


def test_every_reader_of_the_component_refuses(untrusted: TinyRun, tmp_path) -> None:
    mark, checkpoint = tmp_path / "executed", newest(untrusted)
    in_metadata(checkpoint, Evil(mark))
    with pytest.raises(ValueError, match=r"it names builtins.exec, which is not allowed in metadata"):
        read_index(checkpoint)
    with pytest.raises(ValueError, match="damaged, or"):
        load_tensors(checkpoint, {"x": torch.zeros(1)}, no_dist=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: setattr(place, "relative_path", "../../../text/0.txt"), "is not a file of this checkpoint"),
        (lambda place: setattr(place, "relative_path", "/etc/passwd"), "is not a file of this checkpoint"),
        (lambda place: setattr(place, "length", 2**40), "beyond the end"),
        (lambda place: setattr(place, "offset", -1), "a number is negative or too large"),
    ],
)
def test_places_stay_within_the_checkpoint(untrusted: TinyRun, change, said: str) -> None:
    checkpoint = newest(untrusted)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(next(iter(metadata.storage_data.values())))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=said):
        read_index(checkpoint)


def test_a_link_out_of_the_checkpoint_is_not_followed(untrusted: TinyRun) -> None:
    checkpoint = newest(untrusted)
    (file,) = checkpoint.glob("*.distcp")
    file.rename(untrusted.folder / "elsewhere")
    file.symlink_to(untrusted.folder / "elsewhere")
    with pytest.raises(ValueError, match="is not a file of this checkpoint"):
        read_index(checkpoint)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",  # LONG_BINPUT: a memo of two thousand million entries
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # BYTEARRAY8 of an exabyte
        b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    ],
)
def test_a_pickle_that_asks_for_more_than_its_size_is_refused(tmp_path, bomb: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(bomb)
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        read_index(tmp_path)


def test_metadata_may_be_as_large_as_the_tensors_it_describes_and_no_larger(untrusted: TinyRun) -> None:
    checkpoint = newest(untrusted)
    content = (checkpoint / ".metadata").read_bytes()
    held = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    (checkpoint / ".metadata").write_bytes(content.ljust(held + 2**20, b"\0"))  # what follows its end is not read
    assert read_index(checkpoint).entries
    (checkpoint / ".metadata").write_bytes(content.ljust(held + 2**20 + 1, b"\0"))
    with pytest.raises(ValueError, match=r"\.metadata has [\d,]+ bytes; .* at most [\d,]+ are accepted"):
        read_index(checkpoint)


def test_a_list_that_many_tensors_share_is_not_traversed_for_each(untrusted: TinyRun) -> None:
    """A thousand names of one list of a thousand chunks are a few kilobytes, and a million chunks."""
    checkpoint = newest(untrusted)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    name, tensor = next((name, entry) for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size"))
    tensor.chunks *= 1000
    metadata.state_dict_metadata |= {f"{name}.{number}": tensor for number in range(1000)}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="fewer places than chunks"):
        read_index(checkpoint)


def test_tensors_that_unpack_to_more_than_their_size_are_refused(untrusted: TinyRun) -> None:
    checkpoint = newest(untrusted)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (file,) = checkpoint.glob("*.distcp")
    torch.save(torch.zeros(10**6), untrusted.folder / "zeros")
    start = file.stat().st_size
    with file.open("ab") as end, zipfile.ZipFile(untrusted.folder / "zeros") as plain:
        with zipfile.ZipFile(untrusted.folder / "bomb", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
        end.write((untrusted.folder / "bomb").read_bytes())
    length = file.stat().st_size - start
    name = next(name for name, entry in metadata.state_dict_metadata.items() if name.startswith("model."))
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.offset, place.length = start, length
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    target = torch.zeros(metadata.state_dict_metadata[name].size)
    with pytest.raises(ValueError, match="it is compressed, and"):
        load_tensors(checkpoint, {name: target}, no_dist=True)


def test_old_hugging_face_weights_with_code_in_them_are_refused(tmp_path, capsys) -> None:
    mark, directory = tmp_path / "executed", tmp_path / "model"
    directory.mkdir()
    torch.save({"w": Evil(mark)}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        PickledWeights(directory)
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 16}')
    assert import_hf.main([str(directory), str(tmp_path / "out")]) == 2
    assert not mark.exists()
    assert "Traceback" not in capsys.readouterr().err


USES = {
    "a module beside it": 'use = "planted:Evil"',
    "a module elsewhere": 'import_paths = ["."]\n[x]\nuse = "planted:Evil"',
    "the standard library": 'use = "subprocess:Popen"',
    "what a module of ours has imported": 'use = "recipes.config.load:Path"',
    "another recipe file": 'extends = ["planted.toml"]',
}


@pytest.mark.parametrize("name", USES)
def test_the_configuration_in_a_checkpoint_may_not_name_code(untrusted: TinyRun, tmp_path, capsys, name: str) -> None:
    checkpoint, mark = newest(untrusted), tmp_path / "executed"
    (checkpoint / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    stored = (checkpoint / "config.toml").read_text()
    named = USES[name]
    text = f"[lr_schedule]\n{named}\n" if named.startswith("use") else f"{named}\n"
    head, _, rest = stored.partition("[lr_schedule]")
    (checkpoint / "config.toml").write_text(text + head.replace("\n[", "\n[", 1) + "[other]" + rest)
    rewrite_manifest(checkpoint)
    with pytest.raises(ValueError, match="if you trust its source"):
        load_stored_config(checkpoint)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out")]) == 2
    assert "if you trust its source, use --trust-code" in capsys.readouterr().err
    assert not mark.exists()


def test_resuming_does_not_import_what_the_checkpoint_names(untrusted: TinyRun, tmp_path) -> None:
    from recipes.config import Override, load

    checkpoint, mark = newest(untrusted), tmp_path / "executed"
    (checkpoint / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    stored = (checkpoint / "config.toml").read_text()
    assert 'use = "components.lr_schedules:WSD"' in stored
    (checkpoint / "config.toml").write_text(stored.replace("components.lr_schedules:WSD", "planted:Evil"))
    assert schedule_mismatch(checkpoint, load(untrusted.recipe, [Override("training.total_tokens", "9000")])) is None
    assert not mark.exists()
