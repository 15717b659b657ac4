"""How a study computes on this machine: the device, the precision, what makes it fast, and the memory it takes."""

import logging
import os
import platform
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from rethink_prune.errors import UserError
from rethink_prune.training.distributed import ALONE, Processes

log = logging.getLogger(__name__)

Images = TypeVar("Images", torch.Tensor, list[torch.Tensor])

# The sizes of work space with which cuBLAS sums in the same order every time.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")
# cuDNN's search takes about 8 s a process (on an H100), the time of 4,500 steps of VGG-16 there. Of a training of more
# steps than these, that is less than a quarter.
SEARCH_STEPS = 20_000
# torch.compile takes 5 s for VGG-16 and saves 0.3 ms a step (on an H100), 47 s and 1.1 ms for ResNet-56: what it takes
# is saved after 17,000 and 43,000 steps.
COMPILE_STEPS = 50_000


@dataclass(frozen=True)
class Speed:
    """What makes a training on a device fast, by its length; recorded in the ``config.yaml`` of its stage.

    Attributes
    ----------
    compiles : bool
        The network goes through ``torch.compile``.
    searches : bool
        cuDNN times its kernels and takes the fastest.
    """

    compiles: bool
    searches: bool

    def apply(self) -> None:
        """Set what PyTorch keeps for the whole process: another training may have had a turn."""
        torch.backends.cudnn.benchmark = self.searches


@dataclass(frozen=True)
class Runtime:
    """Device, precision and speed; no choice here changes a result by more than float tolerance.

    Attributes
    ----------
    precision : {"fp32", "bf16"}
    accelerate : {"auto", "compile", "off"}
        ``auto`` takes the channels-last memory format and, on CUDA, a fused optimiser, recorded steps and recorded
        evaluation (:mod:`rethink_prune.training.recording`), and ``torch.compile`` where a training is long enough;
        ``compile`` always takes that.
    deterministic : bool
        Only deterministic kernels run.
    contiguous : bool
        Take the contiguous memory format whatever `accelerate` says, for a network that runs on no other.
    checkpoint_seconds : float
        At least this long between two checkpoints.
    show_progress : bool
        Draw a progress bar.

    Examples
    --------
    >>> runtime = Runtime(torch.device("cpu"), "fp32")
    >>> model = runtime.place(nn.Conv2d(3, 8, 3))
    >>> model.weight.is_contiguous(memory_format=torch.channels_last)
    True
    >>> with runtime.autocast():
    ...     model(torch.zeros(1, 3, 4, 4)).dtype
    torch.float32
    """

    device: torch.device
    precision: str
    accelerate: str = "auto"
    deterministic: bool = False
    contiguous: bool = False
    checkpoint_seconds: float = 60.0
    show_progress: bool = False

    @property
    def accelerates_cuda(self) -> bool:
        """Whether a CUDA device runs the fused optimiser, recorded steps and recorded evaluation."""
        return self.accelerate != "off" and self.device.type == "cuda"

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory."""
        # The fastest convolutions of cuDNN and oneDNN read images in the channels-last format.
        return torch.contiguous_format if self.contiguous or self.accelerate == "off" else torch.channels_last

    def choose(self, steps: int) -> Speed:
        """Return what pays in a training of so many steps.

        Examples
        --------
        >>> Runtime(torch.device("cuda"), "bf16").choose(30_000), Runtime(torch.device("cpu"), "bf16").choose(99_999)
        (Speed(compiles=False, searches=True), Speed(compiles=False, searches=False))
        """
        # With deterministic=true neither: the fastest kernel may be another one in the next run.
        long_enough = self.accelerates_cuda and not self.deterministic
        return Speed(
            compiles=self.accelerate == "compile" or (long_enough and steps > COMPILE_STEPS),
            searches=self.device.type == "cuda" and not self.deterministic and steps > SEARCH_STEPS,
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, in the memory format in which its convolutions are fastest."""
        return model.to(self.device).to(memory_format=self.memory_format)

    def take(self, images: Images) -> Images:
        """Return images in the memory format of the network; a list of pictures as it is."""
        if not isinstance(images, torch.Tensor):
            return images
        return images.contiguous(memory_format=self.memory_format)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the forward pass runs; weights and their updates stay in float32."""
        # Gradients need no scaling: bfloat16 has the range of float32, unlike float16.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def prepare_runtime(
    device: str, precision: str = "auto", *, deterministic: bool = False, processes: Processes = ALONE
) -> Runtime:
    """Find the device and the precision, and set what PyTorch keeps for the whole process.

    This is the only way to ask for either, because both questions can start CUDA, and ``deterministic`` has to be set
    before.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Processes that train together take one CUDA device each, by their numbers on the machine.
    precision : {"auto", "fp32", "bf16"}
        ``auto`` is ``bf16`` where the hardware computes in bfloat16, else ``fp32``.
    deterministic : bool
        Let only deterministic kernels run.
    processes : Processes
        Those that train together.

    Raises
    ------
    UserError
        If a CUDA device is named and there is none of that number, or fewer devices than processes; or if CUDA has
        started already in a way that is not deterministic.

    Examples
    --------
    >>> runtime = prepare_runtime("cpu", "fp32")
    >>> runtime.device, runtime.precision
    (device(type='cpu'), 'fp32')
    """
    # First: cuBLAS reads the variable once, when CUDA starts, so setting it later changes nothing.
    if deterministic and device != "cpu" and not torch.cuda.is_initialized():
        os.environ.setdefault(_CUBLAS, _DETERMINISTIC_CUBLAS[0])
    found = _resolve_device(device, processes)
    _set_process(found, deterministic=deterministic)
    return Runtime(found, _resolve_precision(precision, found), deterministic=deterministic)


def _resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if processes.world > 1 and count > 0:
        return _device_of(processes, name, count)
    device = torch.device("cuda" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device={name}: no such CUDA device; this machine has {count}; use device=auto or device=cpu")
    return device


def _device_of(processes: Processes, name: str, devices: int) -> torch.device:
    started = f"torchrun started {processes.local_world} processes on this machine"
    if ":" in name and processes.local_world > 1:
        raise UserError(f"device={name}: {started}, each of which needs a device of its own; use device=auto")
    if processes.local_world > devices:
        raise UserError(f"device={name}: {started}, which has {devices} CUDA devices; use --nproc-per-node={devices}")
    return torch.device(name if ":" in name else f"cuda:{processes.local_rank}")


def describe_device(device: torch.device) -> str:
    """Return the name of a device and, of a CPU, the number of threads.

    Examples
    --------
    >>> describe_device(torch.device("cpu")).startswith("CPU (")
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def _resolve_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    # Look for the instructions, not for whether torch can run the type: emulated bfloat16 is slower than float32.
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return "bf16" if has_bf16 else "fp32"


def _set_process(device: torch.device, *, deterministic: bool) -> None:
    if device.type == "cuda" and deterministic:
        value = os.environ.get(_CUBLAS)
        if value not in _DETERMINISTIC_CUBLAS:
            found = f"{_CUBLAS} is {value}" if value else f"CUDA has started without {_CUBLAS}"
            raise UserError(f"deterministic=true: {found}; start again with {_CUBLAS}={_DETERMINISTIC_CUBLAS[0]} set")
        log.info("deterministic=true: CUDA takes slower kernels; scripts/benchmark.py train measures what that costs")
    # So that what names no device, such as cuBLAS's work space, is on this one as well.
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, on CUDA; the peak of a process, which is that of a CPU, cannot be reset.

    Examples
    --------
    >>> reset_peak_memory(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the greatest number of bytes that were in use; None where the system does not say.

    On CUDA, what tensors took of the device since `reset_peak_memory`. On a CPU, what the whole process, Python and its
    libraries included, had resident at any time since it was started.

    Examples
    --------
    >>> peak_memory(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux can be the peak of the process that started this one.
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None
    if sys.platform == "darwin":
        # Imported here because Windows has no such module.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
