import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms as tv
from PIL import Image
from torch.utils.data import DataLoader

from rethink_prune.config import DatasetConfig
from rethink_prune.data import EvalBatches, ImageFiles, TrainBatches, decoding, load_dataset, memory
from rethink_prune.data import workers as workers_module
from rethink_prune.data.batches import Shard
from rethink_prune.data.decoding import CropBox, place_crop, read_centre, read_crop
from rethink_prune.data.normalization import Normalization
from rethink_prune.data.streamed_images import StreamedImages
from rethink_prune.data.workers import BatchReader, WorkerPool, default_workers
from rethink_prune.errors import UserError

CPU = torch.device("cpu")
SIZE = 32
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}

Make = Callable[..., Path]
Passed = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def photographs(make_photographs: Make) -> ImageFiles:
    """18 training images, each of whose labels names its image."""
    options = DatasetConfig(name="imagenet", root=str(make_photographs()), image_size=SIZE)
    files = load_dataset(options, cache_dir=Path()).train
    assert isinstance(files, ImageFiles)
    return ImageFiles(files.root, files.names, torch.arange(len(files)))


def make_images(
    files: ImageFiles,
    *,
    image_size: int = SIZE,
    batch_size: int = 4,
    device: torch.device = CPU,
    workers: int = 0,
    **options: Any,
) -> StreamedImages:
    normalize = Normalization(**STATISTICS, image_size=image_size, device=device)
    return StreamedImages(BatchReader(files, image_size, **options), normalize, batch_size=batch_size, workers=workers)


def train_batches(files: ImageFiles, batch_size: int = 4, **options: Any) -> TrainBatches:
    drawn = {"seed": 0, "augment": True, "flip": True, **options}
    return TrainBatches(make_images(files, batch_size=batch_size, **drawn), batch_size)


def eval_batches(files: ImageFiles, workers: int = 0) -> EvalBatches:
    return EvalBatches(make_images(files, workers=workers), batch_size=4)


def pool_of(batches: TrainBatches) -> WorkerPool:
    assert isinstance(batches.images, StreamedImages)
    return batches.images._pool


def joined(batches: Iterator[Passed]) -> Passed:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def usual(pixels: np.ndarray) -> torch.Tensor:
    """What ToTensor and Normalize make of an H x W x C image."""
    normalize = tv.Normalize(*STATISTICS.values())
    return normalize(tv.ToTensor()(pixels))


def test_images_crops_and_flips_do_not_depend_on_workers_or_prefetch(
    photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train_batches(photographs)
    helped = [train_batches(photographs, workers=workers) for workers in (1, 2)]
    for epoch in (0, 3):
        images, labels = joined(alone.epoch(epoch))
        for prefetch, batches in zip((2, 1), helped, strict=True):
            monkeypatch.setattr(workers_module, "_PREFETCH", prefetch)  # counts where the first pass starts the workers
            others = joined(batches.epoch(epoch))
            assert torch.equal(images, others[0])
            assert torch.equal(labels, others[1])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch(photographs: ImageFiles, world: int) -> None:
    batches = train_batches(photographs, batch_size=8)  # the last has two images, which every process takes
    shards = [Shard(rank, world) for rank in range(world)]
    parts = [batches.part(shard) for shard in shards]
    assert {part.images_per_epoch for part in parts} == {18}
    epochs = zip(batches.epoch(1), *(part.epoch(1) for part in parts), strict=True)
    for step, (batch, *shares) in enumerate(epochs):
        assert batches.size(step) == (8, 8, 2)[step]
        for together, divided in zip(batch, zip(*shares, strict=True), strict=True):
            whole = torch.cat([together] * (world if step == 2 else 1))
            assert torch.equal(whole, torch.cat(divided))


def test_batches_do_not_depend_on_batch_size(photographs: ImageFiles) -> None:
    images, labels = joined(train_batches(photographs).epoch(2))
    others = joined(train_batches(photographs, batch_size=7).epoch(2))
    assert torch.equal(images, others[0])
    assert torch.equal(labels, others[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_goes_on_where_it_was(photographs: ImageFiles, workers: int) -> None:
    batches = train_batches(photographs, workers=workers)
    images, labels = joined(batches.epoch(2))
    started = batches.epoch(2)
    next(started)
    started.close()  # a pass that is given up leaves nothing behind for the next
    later = joined(batches.epoch(2, start_step=3))
    assert torch.equal(images[12:], later[0])
    assert torch.equal(labels[12:], later[1])


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(photographs: ImageFiles) -> None:
    orders = [
        joined(train_batches(photographs, seed=seed).epoch(epoch))[1].tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(18)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_augmentation_differs_between_epochs_and_is_paired_within_a_seed(photographs: ImageFiles) -> None:
    one = ImageFiles(photographs.root, photographs.names[:2], photographs.labels[:2])
    views = {joined(train_batches(one, batch_size=2).epoch(epoch))[0].numpy().tobytes() for epoch in range(8)}
    assert len(views) == 8
    again = joined(train_batches(one, batch_size=2).epoch(3))[0].numpy().tobytes()
    assert again in views


def test_output_is_float_channels_last(photographs: ImageFiles) -> None:
    for images, labels in (next(train_batches(photographs).epoch(0)), next(iter(eval_batches(photographs)))):
        assert images.shape == (4, 3, SIZE, SIZE)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_a_single_image_at_the_end_is_dropped(photographs: ImageFiles) -> None:
    batches = train_batches(photographs, batch_size=17)
    assert (batches.steps_per_epoch, batches.images_per_epoch) == (1, 17)
    assert [len(labels) for _, labels in batches.epoch(0)] == [17]
    alone = ImageFiles(photographs.root, photographs.names[:1], photographs.labels[:1])
    with pytest.raises(UserError, match=r"recipe\.batch_size=4: cannot train on a single image"):
        train_batches(alone)


def test_half_of_the_images_are_mirrored(photographs: ImageFiles) -> None:
    centres = joined(iter(eval_batches(photographs)))[0]
    mirrored = []
    for epoch in range(20):
        for image, label in zip(*joined(train_batches(photographs, augment=False).epoch(epoch)), strict=True):
            same, other = (torch.equal(image, view) for view in (centres[label], centres[label].flip(2)))
            assert same != other
            mirrored.append(other)
    assert scipy.stats.binomtest(sum(mirrored), len(mirrored)).pvalue > 0.001
    unchanged = joined(train_batches(photographs, augment=False, flip=False).epoch(0))
    assert torch.equal(unchanged[0], centres[unchanged[1]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_counts_every_image_once_in_order(photographs: ImageFiles, workers: int, world: int) -> None:
    batches = eval_batches(photographs, workers=workers)
    shares = [batches.part(Shard(rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {18}
    for _ in range(2):
        labels = [y for share in shares for _, y in share]
        assert torch.cat(labels).tolist() == list(range(18))


def test_evaluation_is_the_usual_one(photographs: ImageFiles) -> None:
    transform = tv.Compose([tv.Resize(round(SIZE * 256 / 224)), tv.CenterCrop(SIZE)])
    images, _ = joined(iter(eval_batches(photographs)))
    for i, image in enumerate(images):
        with Image.open(photographs.root / photographs.name(i)) as opened:
            expected = usual(np.asarray(transform(opened.convert("RGB"))))
        # One grey value at most: the usual script resizes first, and rounds once in between.
        assert (image - expected).abs().max() <= 1.01 / 255 / 0.2


def test_random_parts_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    image = torch.empty(3, 90, 120)
    theirs = [tv.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    draws = torch.rand(3000, 22, dtype=torch.float64).tolist()
    ours = [place_crop(120, 90, row) for row in draws]
    for box in ours:
        assert 0 <= box.left <= 120 - box.width
        assert 0 <= box.top <= 90 - box.height
    columns = [
        ([box.top for box in ours], [top for top, *_ in theirs]),
        ([box.left for box in ours], [left for _, left, *_ in theirs]),
        ([box.height for box in ours], [height for *_, height, _ in theirs]),
        ([box.width for box in ours], [width for *_, width in theirs]),
        ([box.width / box.height for box in ours], [width / height for *_, height, width in theirs]),
    ]
    assert min(scipy.stats.ks_2samp(a, b).pvalue for a, b in columns) > 0.001


@pytest.mark.parametrize(("width", "height", "expected"), [(300, 10, (143, 0, 13, 10)), (10, 300, (0, 143, 10, 13))])
def test_parts_of_very_long_images_are_their_centres(width: int, height: int, expected: tuple[int, ...]) -> None:
    assert place_crop(width, height, [0.5, 0.5] + [0.999] * 20) == expected


def test_a_part_is_what_resizing_it_gives(photographs: ImageFiles) -> None:
    with Image.open(photographs.root / photographs.name(0)) as opened:
        whole = opened.convert("RGB")
    box = CropBox(3, 5, 30, 21)
    expected = whole.crop((3, 5, 33, 26)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    got = read_crop(photographs.read(0), SIZE, lambda width, height: box)
    assert np.abs(got.numpy().astype(int) - np.asarray(expected)).mean() < 2
    assert got.shape == (SIZE, SIZE, 3)


def test_large_photographs_are_decoded_at_a_fraction_of_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Smooth, so that a reduced decoding followed by a resize shows what a full one does.
    y, x = np.mgrid[0:600, 0:800]
    pixels = np.stack([x / 800 * 255, y / 600 * 255, (np.sin(x / 90) + np.cos(y / 70) + 2) * 63], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(tmp_path / "large.jpeg", quality=95)
    content = np.fromfile(tmp_path / "large.jpeg", dtype=np.uint8)
    decoded, decode = [], decoding._decode_opened

    def noting(*arguments: object, **options: bool) -> torch.Tensor:
        result = decode(*arguments, **options)  # type: ignore[arg-type]
        decoded.append((result.shape[1], result.shape[0]))
        return result

    monkeypatch.setattr(decoding, "_decode_opened", noting)
    for box, size in (((0, 0, 800, 600), (100, 75)), ((100, 50, 400, 300), (200, 150)), ((7, 9, 70, 300), (800, 600))):
        got = read_crop(content, 64, lambda width, height, box=box: CropBox(*box))  # type: ignore[misc]
        assert decoded.pop() == size
        left, top, width, height = box
        expected = image.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        assert np.abs(got.numpy().astype(int) - np.asarray(expected)).max() <= 4
    read_centre(content, 64)
    assert decoded.pop() == (800, 600), "tests see what everybody else's see"


def test_pillow_decodes_where_torchvision_does_not(photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, labels = joined(train_batches(photographs).epoch(0))
    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: None)
    ours, same = joined(train_batches(photographs).epoch(0))
    assert torch.equal(labels, same)
    assert (ours - theirs).abs().max() <= 4 / 255 / 0.2, "two builds of one library"


def test_files_that_are_not_what_their_names_say(photographs: ImageFiles) -> None:
    # ImageNet has a PNG file among its JPEG files, 22 in CMYK, and many in grey.
    path = photographs.root / photographs.name(0)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    alone = photographs.take(torch.tensor([0, 0]))
    expected = joined(iter(eval_batches(alone)))[0]
    for kind, mode, tolerance in (
        ("PNG", "RGB", 0.01),
        ("JPEG", "CMYK", 0.3),
        ("GIF", "P", 1.5),
        ("PNG", "RGBA", 0.01),
    ):
        content = io.BytesIO()
        image.convert(mode).save(content, kind, **({"quality": 100} if kind == "JPEG" else {}))
        path.write_bytes(content.getvalue())
        assert (joined(iter(eval_batches(alone)))[0] - expected).abs().mean() < tolerance
    image.convert("L").save(path, "JPEG")
    grey = joined(iter(eval_batches(alone)))[0]
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("mean", "std"))
    channels = grey * std + mean
    assert torch.allclose(channels[:, 0], channels[:, 2], atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_in_the_middle_of_an_epoch_is_named(photographs: ImageFiles, workers: int) -> None:
    batches = train_batches(photographs, workers=workers)
    order = joined(batches.epoch(0))[1].tolist()
    name = photographs.name(order[9])
    path = photographs.root / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    passing = batches.epoch(0)
    assert [len(labels) for _, labels in (next(passing), next(passing))] == [4, 4], "the batches before it are unharmed"
    with pytest.raises(UserError) as error:
        next(passing)
    message = str(error.value)
    assert message.startswith(f"dataset.root={photographs.root}: {name} cannot be read (")
    assert "truncated" in message
    assert "run the same command again" in message
    assert "\n" not in message

    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot be read \(not an image\)"):
        joined(batches.epoch(0))
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        joined(batches.epoch(0))
    path.write_bytes(whole)
    assert joined(batches.epoch(0))[1].tolist() == order, "once repaired, the same workers go on"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_an_error_at_the_next_batch(
    photographs: ImageFiles, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_PREFETCH", 1)
    list(DataLoader(torch.zeros(2), num_workers=1))  # type: ignore[arg-type]  # leaves its handler of dead workers
    batches = train_batches(photographs, batch_size=2, workers=2)
    passing = batches.epoch(0)
    next(passing)
    os.kill(pool_of(batches)._processes[0].pid or 0, number)
    time.sleep(0.2)  # nothing is raised here, in the middle of a step
    with pytest.raises(UserError, match=r"^dataset\.workers: a process that reads images died") as error:
        list(passing)
    assert "dataset.workers below 2" in str(error.value)
    images, labels = joined(batches.epoch(0))
    assert torch.equal(images, joined(train_batches(photographs, batch_size=2).epoch(0))[0])
    assert len(labels) == 18


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_too_little_shared_memory_is_refused_before_training(
    photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 64 * 2**20))
    with pytest.raises(UserError) as error:
        train_batches(photographs, image_size=224, batch_size=256, workers=4)
    assert str(error.value) == (
        "dataset.workers=4: batches on their way from the workers need 294 MiB of /dev/shm, which has 64 MiB left; "
        "set dataset.workers=0 or to fewer, or enlarge it "
        "(mount -o remount,size=8g /dev/shm; for a container, --shm-size=8g)"
    )
    train_batches(photographs, image_size=224, batch_size=32, workers=4)
    train_batches(photographs, image_size=224, batch_size=256, workers=0)


def test_shared_memory_that_others_fill_up_is_told(photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match=r"^dataset\.workers: unable to allocate .* set dataset\.workers=0 or to fewer"):
        next(train_batches(photographs, workers=1).epoch(0))


def test_shared_memory_that_gives_way_is_told(photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_PREFETCH", 1)
    batches = train_batches(photographs, batch_size=2, workers=1)
    passing = batches.epoch(0)
    next(passing)
    os.kill(pool_of(batches)._processes[0].pid or 0, signal.SIGBUS)
    with pytest.raises(UserError, match=r"^dataset\.workers: /dev/shm is full; set dataset\.workers=0 or to fewer"):
        list(passing)


@pytest.mark.parametrize("broken", [ConnectionResetError(errno.ECONNRESET, "reset by peer"), EOFError()])
def test_a_connection_that_breaks_before_its_worker_has_died_is_told(
    photographs: ImageFiles, broken: Exception
) -> None:
    batches = train_batches(photographs, workers=1)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()

    def breaking() -> Iterator[None]:
        threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL)).start()
        raise broken
        yield

    pool_of(batches)._start_pass = breaking  # type: ignore[assignment,method-assign]
    pool_of(batches)._processes = [worker]
    with pytest.raises(UserError, match=r"^dataset\.workers: a process that reads images died"):
        next(batches.epoch(0))


def test_no_room_for_what_workers_talk_through_is_told(
    photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(loader: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as creating a semaphore does

    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    with pytest.raises(UserError, match=r"^dataset\.workers: /dev/shm is full; set dataset\.workers=0"):
        next(train_batches(photographs, workers=1).epoch(0))


def test_workers_outlive_the_signals_that_tell_a_study_to_stop(photographs: ImageFiles) -> None:
    batches = train_batches(photographs, batch_size=2, workers=2)
    passing = batches.epoch(0)
    first = [next(passing)]
    for process in pool_of(batches)._processes:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid or 0, number)
    assert len(first + list(passing)) == 9


def test_workers_outlive_the_same_signals_while_they_start(
    photographs: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = workers_module._outlive_signals

    def late(worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        install(worker)

    monkeypatch.setattr(workers_module, "_outlive_signals", late)
    assert len(list(train_batches(photographs, batch_size=2, workers=2).epoch(0))) == 9
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}


@pytest.mark.slow
def test_a_process_with_workers_ends_at_once_and_leaves_none(photographs: ImageFiles, tmp_path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from rethink_prune.config import DatasetConfig
        from rethink_prune.data import load_dataset, train_batches
        import torch
        options = DatasetConfig(name="imagenet", root={str(photographs.root)!r}, image_size=32, flip=True, workers=2)
        dataset = load_dataset(options, cache_dir=Path())
        batches = train_batches(dataset, options, batch_size=2, augment=True, device=torch.device("cpu"), seed=0)
        next(batches.epoch(0))
        print(*(process.pid for process in batches.images._pool._processes), flush=True)
        {{}}
    """
    for ending in ("sys.exit('refused')", "raise KeyboardInterrupt", "pass"):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program).replace("{}", ending)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        pids = [int(pid) for pid in done.stdout.split()]
        assert len(pids) == 2, done.stderr
        assert time.monotonic() - start < 45
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_one_worker_for_every_core_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "48")
    assert default_workers() == 1


@pytest.mark.cuda
def test_epoch_on_cuda_equals_cpu(photographs: ImageFiles) -> None:
    images, labels = joined(train_batches(photographs).epoch(1))
    there = joined(train_batches(photographs, device=torch.device("cuda"), workers=2).epoch(1))
    torch.testing.assert_close(there[0].cpu(), images, rtol=0, atol=1e-6)
    assert torch.equal(there[1].cpu(), labels)
