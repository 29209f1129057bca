"""The fused kernels against float64, on a small machine that runs CUDA's blocks on the CPU (emulator/)."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from branches import ACTIVATIONS, CLOSE, Branches, close, pointer

HERE = Path(__file__).parent
SHARED = 232448  # bytes of a block, as in emulator/cuda_on_cpu.cpp
FEW, MANY = 1000, 1  # processors that rows are few for, or many
INVALID = 1  # cudaErrorInvalidValue
FLAGS = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]
KERNELS = [
    "-O0", "-fno-extern-tls-init", "-fno-sanitize-recover=all",
    "-fsanitize=thread,alignment,bounds",
]  # fmt: skip


def compiled(folder: Path, compiler: str) -> Path:
    """The library: two compilers at work at a time, the kernels of one dtype each."""
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True)
    late = int(version.stdout.split(".")[0]) >= 12  # local variables start as NaN
    kernels = [*KERNELS, "-ftrivial-auto-var-init=pattern"] if late else KERNELS
    jobs = [
        ("kernels.cpp", "half.o", kernels),
        ("kernels.cpp", "bfloat.o", [*kernels, "-DBFLOAT"]),
        ("mistakes.cpp", "mistakes.o", kernels),
        ("cuda_on_cpu.cpp", "machine.o", ["-O2"]),
    ]
    running = []
    for source, output, flags in jobs:
        command = [compiler, *FLAGS, *flags, "-c", str(HERE / "emulator" / source)]
        command += ["-I", str(HERE / "emulator"), "-o", str(folder / output)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    library = folder / "kernels.so"
    objects = [str(folder / output) for _, output, _ in jobs]
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


class Machine:
    """The library, told before each launch which memory is whose."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.cpu_fault.restype = ctypes.c_char_p

    def reach(self, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        self.library.cpu_forget()
        for tensors, writable in ((read, 0), (written, 1)):
            for tensor in tensors:
                start, size = pointer(tensor), ctypes.c_size_t(tensor.nbytes)
                self.library.cpu_reach(start, size, writable)

    @property
    def fault(self) -> str:
        return self.library.cpu_fault().decode()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if sys.platform != "linux":
        pytest.skip("the machine that runs the kernels is written for Linux")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels with")
    torch.set_num_threads(1)
    return Machine(compiled(tmp_path_factory.mktemp("kernels"), compiler))


def check_grouped(
    machine: Machine,
    given: Branches,
    activation: int,
    tile: int,
    processors: int = FEW,
    within: float | None = None,
) -> None:
    out = torch.full_like(given.base, torch.nan)
    machine.reach(given.inputs(), [out])
    there = (processors, SHARED, None)
    assert given.run_grouped(machine.library, out, activation, tile, there) == 0, machine.fault
    assert close(out, given.grouped(activation), within)


def check_normed(
    machine: Machine, given: Branches, activation: int, tile: int, processors: int = FEW
) -> None:
    normed, carried = (torch.full_like(given.x, torch.nan) for _ in range(2))
    machine.reach(given.inputs(), [normed, carried])
    there = (processors, SHARED, None)
    status = given.run_normed(machine.library, normed, carried, activation, tile, there)
    assert status == 0, machine.fault
    for found, wanted in zip((normed, carried), given.normed(activation), strict=True):
        assert close(found, wanted)


dtypes = pytest.mark.parametrize("dtype", CLOSE)
ranks = pytest.mark.parametrize("rank", [16, 32, 64, 128])


@ranks
@dtypes
@pytest.mark.parametrize("tile", range(1, 9))
def test_every_tile_of_a_grouped_bottleneck(
    machine: Machine, dtype: torch.dtype, rank: int, tile: int
) -> None:
    given = Branches(dtype, (3, 16 * tile + 5, 192, 64, rank, 2), device="cpu")
    check_grouped(machine, given, tile % len(ACTIVATIONS), tile)


@ranks
@dtypes
@pytest.mark.parametrize("processors", [MANY, FEW])
@pytest.mark.parametrize(
    "sizes",
    [
        (13, 64, 192), (37, 768, 768), (150, 64, 64), (5, 192, 1024), (5, 1024, 64), (1, 2048, 64),
    ],
)  # fmt: skip
def test_a_grouped_bottleneck(
    machine: Machine, dtype: torch.dtype, rank: int, sizes: tuple[int, ...], processors: int
) -> None:
    given = Branches(dtype, (3, *sizes, rank, 2), device="cpu")
    check_grouped(machine, given, sum(sizes) % len(ACTIVATIONS), 0, processors)


@ranks
@dtypes
@pytest.mark.parametrize("processors", [MANY, 6, FEW])  # tiles of 4, 2 and 1 times 16, if they fit
@pytest.mark.parametrize("channels", [64, 192, 512, 768, 1024])
def test_a_norm_with_its_branch(
    machine: Machine, dtype: torch.dtype, channels: int, rank: int, processors: int
) -> None:
    given = Branches(dtype, (3, 37, channels, channels, rank, 2), device="cpu")
    check_normed(machine, given, (channels + rank) // 16 % len(ACTIVATIONS), 0, processors)


@dtypes
@pytest.mark.parametrize("channels", [1280, 1344, 2048])
def test_a_norm_of_many_channels(machine: Machine, dtype: torch.dtype, channels: int) -> None:
    given = Branches(dtype, (3, 21, channels, channels, 32, 2), device="cpu")
    check_normed(machine, given, 2, 0)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("tile", [1, 2, 4])
def test_tokens_that_fill_tiles_and_do_not(machine: Machine, tokens: int, tile: int) -> None:
    given = Branches(torch.float16, (1, tokens, 128, 128, 32, 3), device="cpu")
    check_grouped(machine, given, 3, tile)
    check_normed(machine, given, 3, tile)


@pytest.mark.parametrize("count", range(len(Branches.OPTIONAL) + 1))
def test_inputs_that_are_not_given(machine: Machine, count: int) -> None:
    for optional in itertools.combinations(Branches.OPTIONAL, count):
        given = Branches(torch.float16, (2, 5, 64, 64, 32, 2), optional, "cpu")
        check_grouped(machine, given, 2, 0)
        check_normed(machine, given, 2, 0)
        given = Branches(torch.float16, (1, 5, 576, 576, 16, 2), optional, "cpu")
        check_normed(machine, given, 2, 0)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_an_activation(machine: Machine, activation: int) -> None:
    given = Branches(torch.float16, (2, 21, 64, 64, 32, 2), ("down_bias",), "cpu")
    check_normed(machine, given, activation, 0)
    given.base.zero_()  # nothing but the branch, so that a constant in its third digit shows
    given.x *= 2
    check_grouped(machine, given, activation, 0, within=6e-4)


@dtypes
def test_tasks_outside_the_bank(machine: Machine, dtype: torch.dtype) -> None:
    given = Branches(dtype, (6, 21, 64, 64, 16, 2), device="cpu")
    given.task = torch.tensor([1, -1, 2, 0, 2**32, 1])
    check_grouped(machine, given, 0, 0)
    check_normed(machine, given, 0, 0)


def test_a_variance_as_small_as_epsilon(machine: Machine) -> None:
    given = Branches(torch.float16, (1, 5, 192, 192, 16, 2), ("up_bias",), "cpu")
    given.x *= 1e-3
    check_normed(machine, given, 0, 0)


def test_what_a_launch_cannot_do_is_refused(machine: Machine) -> None:
    for shape, tile in (((1, 5, 64, 64, 48, 1), 0), ((1, 5, 1024, 1024, 64, 1), 4)):
        given = Branches(torch.float16, shape, device="cpu")
        normed, carried = given.x.clone(), given.x.clone()
        there = (FEW, SHARED, None)
        assert given.run_normed(machine.library, normed, carried, 0, tile, there) == INVALID


@dtypes
def test_numbers_of_16_bits(machine: Machine, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).short()
    every, bfloat = bits.view(dtype), int(dtype == torch.bfloat16)
    found = torch.empty(len(every))
    machine.library.cpu_widen(bfloat, pointer(every), pointer(found), len(every))
    assert torch.equal(found.nan_to_num(7.0), every.float().nan_to_num(7.0))

    finite = every[every.isfinite()].sort().values.float()
    between = finite[:-1].lerp(finite[1:], 0.5)
    numbers = torch.cat(
        [finite, between, between.nextafter(finite[1:]), between.nextafter(finite[:-1])]
    )
    numbers = torch.cat([numbers, torch.tensor([65519.9, 65520.0, 1e9, -3e38, torch.inf])])
    rounded = torch.empty(len(numbers), dtype=dtype)
    machine.library.cpu_round(bfloat, pointer(numbers), pointer(rounded), len(numbers))
    assert torch.equal(rounded, numbers.to(dtype))


MISTAKES = [
    "in flight", "in flight", *["since the last barrier"] * 6, "beyond the 512", "beyond the 512", "reads global memory outside",
    "a copy reads global memory outside", "writes an input", "misaligned", "outside its array", "is at",
    "are done",
]  # fmt: skip


@pytest.mark.parametrize("mistake", range(1 + len(MISTAKES)))
def test_the_machine_finds_a_mistake(machine: Machine, mistake: int) -> None:
    numbers, out = torch.arange(64.0), torch.full((64,), torch.nan)
    machine.reach([numbers], [out])
    status = machine.library.cpu_shuffled(pointer(numbers), pointer(out), mistake)
    if mistake:
        assert status == 700
        assert MISTAKES[mistake - 1] in machine.fault
    else:
        place = torch.arange(64)
        assert status == 0, machine.fault
        assert out.equal((63 - ((63 - (place ^ 34)) ^ 1)).float())
