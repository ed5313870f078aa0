"""What of an error a user sees: one line where it says what to do, else its traceback too."""

import pytest
import torch
from torch import distributed

from Compression.training import NonFiniteError
from Model.ops.build import BuildError
from Util.cli import OneLineParser, run_script
from Util.distributed import OutOfStepError


def ended(error):
    def run(args):
        raise error

    return run_script(OneLineParser(prog="script"), run, [])


@pytest.mark.parametrize("kind", [NonFiniteError, BuildError, OutOfStepError, ValueError, OSError])
def test_an_error_of_our_own_is_one_line(capsys, kind):
    assert ended(kind("what to\ndo")) == 2
    assert capsys.readouterr().err == "script: error: what to do\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_lack_of_memory_is_one_line(capsys, error):
    assert ended(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("script: error: out of memory (")
    assert line.endswith("); end what else takes memory on this machine")


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("batch_size fid_batch n_sample size", "--batch_size or --fid_batch"),
        ("n_sample sizes", "--n_sample"),
        ("size frames", "--size"),
    ],
)
def test_lack_of_memory_names_flags_that_the_command_has(capsys, flags, remedy):
    parser = OneLineParser(prog="script")
    for name in flags.split():
        parser.add_argument(f"--{name}")

    def run(args):
        raise MemoryError

    assert run_script(parser, run, []) == 2
    assert capsys.readouterr().err == f"script: error: out of memory (); lower {remedy}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"),
        distributed.DistNetworkError("the server socket has failed to listen"),
        NotImplementedError("no such operator"),
        RecursionError(),
    ],
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        ended(error)
