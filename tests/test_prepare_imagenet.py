"""The script that unpacks ImageNet's archives, on archives of a few images."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts/prepare_imagenet.py"
WNIDS = ("n00000003", "n00000001", "n00000002")  # their IDs, from 1, are not in their order
TRUTH = (2, 1, 3, 3, 1, 2)


def jpeg(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def packed(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def devkit(images: int = 4) -> bytes:
    synsets = np.zeros(len(WNIDS) + 1, dtype=[(name, object) for name in FIELDS])
    for i, wnid in enumerate((*WNIDS, "n09999999")):
        inner = i == len(WNIDS)  # a node above the classes
        synsets[i] = (i + 1, wnid, "words", len(WNIDS) if inner else 0, 0 if inner else images)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "\n".join(map(str, TRUTH)) + "\n"
    folder = "ILSVRC2012_devkit_t12/data"
    files = {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    return gzip.compress(packed(files))


FIELDS = ("ILSVRC2012_ID", "WNID", "words", "num_children", "num_train_images")


def class_archive(wnid: str, images: int = 4) -> bytes:
    return packed({f"{wnid}_{i}.JPEG": jpeg(10 * WNIDS.index(wnid) + i) for i in range(images)})


def val_files() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(100 + i) for i in range(len(TRUTH))}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("prepare_imagenet", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "prepare_imagenet", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "ILSVRC2012_img_train.tar").write_bytes(packed({f"{w}.tar": class_archive(w) for w in sorted(WNIDS)}))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(packed(val_files()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return folder


def refusal(script: ModuleType, archives: Path, target: Path, *, verify: bool = False) -> str:
    with pytest.raises(script.BadArchiveError) as error:
        script.prepare(archives, target, verify=verify)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(archives), "ARCHIVES")


def contents(target: Path) -> dict[str, bytes]:
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*.JPEG")}


def expected() -> dict[str, bytes]:
    train = {f"train/{w}/{w}_{i}.JPEG": jpeg(10 * k + i) for k, w in enumerate(WNIDS) for i in range(4)}
    val = {
        f"val/{WNIDS[label - 1]}/{name}": data for label, (name, data) in zip(TRUTH, val_files().items(), strict=True)
    }
    return {**train, **val}


def test_images_land_in_the_folders_of_their_classes(script: ModuleType, archives: Path, tmp_path: Path) -> None:
    script.prepare(archives, tmp_path / "imagenet", verify=False)
    assert contents(tmp_path / "imagenet") == expected()
    assert sorted(path.name for path in (tmp_path / "imagenet").iterdir()) == ["train", "val"]


def test_official_checksums_decide_and_are_not_computed_twice(
    script: ModuleType, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "imagenet"
    assert script.MD5["ILSVRC2012_img_train.tar"] == "1d675b47d978889d74fa0da5fadfb00e"
    message = refusal(script, archives, target, verify=True)
    assert message.startswith("ARCHIVES/ILSVRC2012_devkit_t12.tar.gz: is damaged: its MD5 sum is ")
    assert contents(target) == {}
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in archives.iterdir()}
    monkeypatch.setattr(script, "MD5", {**sums, script.VAL: "0" * 32})
    assert refusal(script, archives, target, verify=True).startswith("ARCHIVES/ILSVRC2012_img_val.tar: is damaged")
    monkeypatch.setattr(script, "MD5", {**dict.fromkeys(sums, "0" * 32), script.VAL: sums[script.VAL]})
    script.prepare(archives, target)  # the other two were found intact before
    assert contents(target) == expected()


KILLER = """
    import importlib.util, os, signal, sys
    from pathlib import Path
    script, archives, target, count = sys.argv[1:]
    specification = importlib.util.spec_from_file_location("prepare_imagenet", script)
    module = importlib.util.module_from_spec(specification)
    sys.modules["prepare_imagenet"] = module
    specification.loader.exec_module(module)
    write, calls = Path.write_bytes, 0

    def half(path, content):
        global calls
        calls += 1
        if calls == int(count):
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    Path.write_bytes = half
    module.prepare(Path(archives), Path(target), verify=False)
"""


def test_killed_and_run_again_goes_on(script: ModuleType, archives: Path, tmp_path: Path) -> None:
    target = tmp_path / "imagenet"
    for count, finished in ((7, ["n00000001"]), (4, ["n00000001", "n00000002"]), (7, sorted(WNIDS))):
        command = [sys.executable, "-c", textwrap.dedent(KILLER), str(SCRIPT), str(archives), str(target), str(count)]
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
        assert sorted(path.name for path in (target / "train").iterdir() if path.name[0] != ".") == finished
        assert not (target / "val").exists()
    before = {path: path.stat().st_mtime_ns for path in (target / "train").rglob("*.JPEG")}
    (archives / "ILSVRC2012_img_train.tar").unlink()  # is not needed any more
    script.prepare(archives, target, verify=False)
    assert contents(target) == expected()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in (target / "train").iterdir()) == sorted(WNIDS)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.7])
def test_truncated_archives_are_refused_and_can_be_replaced(
    name: str, kept: float, script: ModuleType, archives: Path, tmp_path: Path
) -> None:
    target = tmp_path / "imagenet"
    whole = (archives / name).read_bytes()
    (archives / name).write_bytes(whole[: int(len(whole) * kept)])
    assert refusal(script, archives, target).startswith(f"ARCHIVES/{name}: ")
    assert not (target / "val").exists()
    (archives / name).write_bytes(whole)
    script.prepare(archives, target, verify=False)
    assert contents(target) == expected()


def test_archives_cut_between_two_files_are_noticed_by_their_counts(
    script: ModuleType, archives: Path, tmp_path: Path
) -> None:
    train, target = archives / "ILSVRC2012_img_train.tar", tmp_path / "imagenet"
    files = {f"{w}.tar": class_archive(w) for w in sorted(WNIDS)}
    train.write_bytes(packed({**files, "n00000002.tar": class_archive("n00000002", images=3)}))
    assert refusal(script, archives, target) == (
        "ARCHIVES/ILSVRC2012_img_train.tar: n00000002.tar: holds 3 images instead of 4; download it again"
    )
    assert sorted(path.name for path in (target / "train").glob("n*")) == ["n00000001"]
    files.pop("n00000003.tar")
    train.write_bytes(packed(files))
    assert "ends too early: 1 classes are missing, n00000003 among them" in refusal(script, archives, target)
    train.write_bytes(packed({f"{w}.tar": class_archive(w) for w in WNIDS}))
    fewer = val_files()
    fewer.popitem()
    (archives / "ILSVRC2012_img_val.tar").write_bytes(packed(fewer))
    assert "holds 5 images instead of 6" in refusal(script, archives, target)


@pytest.mark.parametrize(
    "name", ["../outside.JPEG", "/tmp/outside.JPEG", "n00000001/../../x.JPEG", "a\\b.JPEG", ".JPEG"]
)
@pytest.mark.parametrize("where", ["train", "class", "val"])
def test_names_that_lead_elsewhere_are_refused(
    name: str, where: str, script: ModuleType, archives: Path, tmp_path: Path
) -> None:
    files = {f"{w}.tar": class_archive(w) for w in WNIDS}
    if where == "train":
        files = {name.replace(".JPEG", ".tar"): class_archive("n00000001"), **files}
    if where == "class":
        files["n00000003.tar"] = packed({name: jpeg(0)})
    (archives / "ILSVRC2012_img_train.tar").write_bytes(packed(files))
    if where == "val":
        (archives / "ILSVRC2012_img_val.tar").write_bytes(packed({**val_files(), name: jpeg(0)}))
    assert "holds " in refusal(script, archives, tmp_path / "imagenet")
    assert not list(tmp_path.rglob("outside*"))
    assert not Path("/tmp/outside.JPEG").exists()


def test_links_are_refused(script: ModuleType, archives: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    (archives / "ILSVRC2012_img_val.tar").write_bytes(content.getvalue())
    assert "which is not a regular file" in refusal(script, archives, tmp_path / "imagenet")


def test_command_line(archives: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--archives", str(archives), "--target", "imagenet", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    done = run()
    assert done.returncode == 1
    assert "is damaged: its MD5 sum is" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--skip-checksums")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imagenet is complete: python -m rethink_prune dataset=imagenet dataset.root=imagenet\n"
    assert contents(tmp_path / "imagenet") == expected()
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    done = run()
    assert done.returncode == 1
    assert "ILSVRC2012_devkit_t12.tar.gz is not there" in done.stderr
