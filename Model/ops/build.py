"""Compiles the operators in ``csrc`` on this machine, once, and caches the libraries.

``python -m Model.ops.build`` builds and loads them ahead of their first use and reports. The CUDA
library needs no GPU to be built: TORCH_CUDA_ARCH_LIST says for which it is.

The libraries lie in ``$TORCH_EXTENSIONS_DIR``, else ``$XDG_CACHE_HOME``, else ``~/.cache``, under a
name made of everything they depend on: sources, flags, compilers, PyTorch version, and the
processor or the GPU architectures.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from Util.cli import OneLineParser, run_script
from Util.progress import duration, tell

Part = Literal["cpu", "cuda"]

SOURCES = Path(__file__).parent / "csrc"
PYTORCH = Path(torch.__file__).parent
# No flag changes a result beyond contracting a * b + c; these two let comparisons vectorise.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr")
# Compute capabilities without the point, for a build on a machine without a GPU: between them they
# run on every GPU from the A100 on, the ones to come included.
ARCHITECTURES = ("80", "90+PTX")


class BuildError(RuntimeError):
    """The operators can not be compiled here; the message says why and what to do."""


class MissingCompilerError(BuildError):
    """There is no compiler, or none that fits."""


class InterruptedBuildError(BuildError):
    """The compiler was ended from outside, which says nothing about the next try."""


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    # A library is code: none is loaded from a folder that belongs to somebody else.
    return os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid()


def cache_folder() -> Path:
    """Where libraries are kept: the first writable one of the places in the module's description.

    Raises:
        BuildError: not even the temporary folder can be written.
    """
    extensions, cache = os.environ.get("TORCH_EXTENSIONS_DIR"), os.environ.get("XDG_CACHE_HOME")
    places = [extensions, cache, os.path.expanduser("~/.cache")]
    folders = [Path(place) / "stylegan_ops" for place in places if place]
    folders.append(Path(tempfile.gettempdir()) / f"stylegan_ops_{os.getuid()}")
    for folder in folders:
        if _writable(folder):
            return folder
    raise BuildError(
        f"no folder for compiled code can be written (tried {', '.join(map(str, folders))}); "
        "point TORCH_EXTENSIONS_DIR at one"
    )


def _program(variable: str, names: Sequence[str], remedy: str) -> str:
    """Path of a compiler: the environment variable's, else the first of the names on PATH."""
    chosen = os.environ.get(variable)
    for name in [chosen] if chosen else names:
        if found := shutil.which(name):
            return found
    wanted = f"{variable}={chosen}" if chosen else " or ".join(names)
    raise MissingCompilerError(f"no {wanted} on this machine; {remedy}")


def compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    return _program("CXX", ("g++", "c++", "clang++"), "install one (Debian: apt install g++)")


def nvcc() -> str:
    """Path of the CUDA compiler: NVCC, below CUDA_HOME, beside PyTorch (from pip), on PATH.

    Raises:
        BuildError: there is none, or it is of another major version than PyTorch's CUDA.
    """
    wanted = torch.version.cuda
    if not wanted:
        raise MissingCompilerError("this PyTorch is built without CUDA")
    major = wanted.partition(".")[0]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    from_pip = f"{PYTORCH.parent}/nvidia/cu{major}/bin/nvcc"
    names = [f"{home}/bin/nvcc"] if home else [from_pip, "nvcc", "/usr/local/cuda/bin/nvcc"]
    from_index = f'pip install "cuda-toolkit[nvcc,cccl]=={wanted}.*"'
    remedy = f"run {from_index} or point CUDA_HOME at a toolkit"
    found = _program("NVCC", names, remedy)
    version = _version(found).partition("release ")[2].partition(",")[0]
    if version.partition(".")[0] != major:
        raise MissingCompilerError(
            f"{found} is CUDA {version or 'of an unknown version'}, PyTorch is built for {wanted}; "
            f"{remedy}"
        )
    return found


def _version(program: str) -> str:
    """What a compiler says about itself; behind a script it may change without the script."""
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout


def _identity(program: str) -> str:
    status = os.stat(program)
    return f"{program} {status.st_size} {status.st_mtime_ns}"


def _processor() -> str:
    """What ``-march=native`` stands for here."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kept = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(sorted(set(kept)))
    return platform.processor()


def key(*parts: str) -> str:
    """Hash of the sources, PyTorch's version and whatever else a build depends on."""
    content = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    content.update("\0".join((torch.__version__, platform.machine(), *parts)).encode())
    return content.hexdigest()[:16]


# --- GPU architectures ----------------------------------------------------------------------------


def _listed() -> tuple[str, ...]:
    """The architectures of TORCH_CUDA_ARCH_LIST: "8.6;9.0+PTX" gives ("86", "90+PTX")."""
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    for name in filter(None, names):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {name!r} is no compute capability; write 8.6 or 9.0+PTX, "
                "several with semicolons between them"
            )
    return tuple(name.replace(".", "") for name in names if name)


def _visible() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return sorted({torch.cuda.get_device_capability(i) for i in range(count)})


def _runs_on(architecture: str, gpu: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU of that compute capability.

    Machine code runs on the same major version from its own minor version on, PTX on everything
    newer; of "a" and "f", which tie code to some GPUs, only the exact match is taken.
    """
    number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
    own = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
    if not number.isdigit():
        return own == gpu
    return (own[0] == gpu[0] and own[1] <= gpu[1]) or (ptx and own <= gpu)


def _architectures() -> tuple[str, ...]:
    """What to compile for: what is listed, and the GPUs here that it leaves out."""
    listed = _listed()
    left_out = [gpu for gpu in _visible() if not any(_runs_on(a, gpu) for a in listed)]
    return (*listed, *(f"{major}{minor}" for major, minor in left_out)) or ARCHITECTURES


def _generate(architecture: str) -> str:
    number = architecture.removesuffix("+PTX")
    codes = f"sm_{number},compute_{number}" if number != architecture else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code=[{codes}]"


# --- Building -------------------------------------------------------------------------------------


def _run(command: Sequence[str]) -> None:
    """Run a compiler; on failure name the first error and keep the rest in a file."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode == 0:
        return
    program = Path(command[0]).name
    if result.returncode < 0:
        raise InterruptedBuildError(f"{program}: signal {-result.returncode}")
    printed = result.stdout + result.stderr
    if "signal terminated program" in printed:  # the compiler that g++ runs, for want of memory
        raise InterruptedBuildError(f"{program}: its compiler was ended by a signal")
    log = cache_folder() / f"{program}_failed.log"
    log.write_text(" ".join(command) + "\n" + printed)
    errors = [line for line in printed.splitlines() if "error" in line.lower()]
    first = errors[0].strip() if errors else f"exit code {result.returncode}"
    raise BuildError(f"{program} failed: {first[:200]} (all of it: {log})")


def compile_library(target: Path, sources: Mapping[Path, Sequence[str]], *libraries: str) -> None:
    """Compile sources side by side and link them with PyTorch.

    Args:
        target: the shared library; the objects lie beside it.
        sources: the compiler and its flags for each.
        libraries: linker flags for what is wanted beyond PyTorch's core.

    Raises:
        BuildError: a compiler fails.
    """
    includes = ("-I", str(PYTORCH / "include"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects = [str(target.with_name(f"{source.name}.o")) for source in sources]
    commands = [
        [*command, abi, *includes, "-c", str(source), "-o", compiled]
        for (source, command), compiled in zip(sources.items(), objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    core = ["-L", str(PYTORCH / "lib"), "-ltorch_cpu", "-lc10"]
    _run([compiler(), "-shared", *objects, "-o", str(target), *core, *libraries])


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    import fcntl

    with open(file, "w") as handle:
        with contextlib.suppress(OSError):  # no locks there: what several have made is replaced
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """Make a library in a folder of its own and move it, so that nobody ever loads half of one."""
    what = target.stem.partition("_")[0].upper()
    tell(f"building the compiled {what} operators, once ...")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "library.so"
        make(made)
        os.replace(made, target)
    tell(f"built in {duration(time.monotonic() - start)}: {target}")


def build_once(name: str, make: Callable[[Path], None], retry: bool = False) -> Path:
    """A library in the cache, made if it is not there yet.

    Processes that ask at the same time wait for the first one's build. A build that failed is
    remembered until something it depends on changes.

    Args:
        name: file name without suffix: the part, an underscore, and the `key` of all it depends on.
        make: writes the library to the path that it is given, in a temporary folder.
        retry: build even if it failed before.

    Raises:
        BuildError: it can not be built.
    """
    target = cache_folder() / f"{name}.so"
    failure = target.with_suffix(".failed")
    if target.exists():
        return target
    with _locked(target.parent / "lock"):
        if target.exists():
            return target
        if failure.exists() and not retry:
            raise BuildError(failure.read_text())
        try:
            _make(target, make)
        except InterruptedBuildError:
            raise
        except BuildError as error:
            message = f"{error}; after mending it run python -m Model.ops.build"
            failure.write_text(message)
            raise BuildError(message) from None
        failure.unlink(missing_ok=True)
    return target


def _cpu_library(retry: bool) -> Path:
    cxx = compiler()
    # For this very processor. Compiled with OpenMP but not linked to it: the runtime PyTorch has
    # loaded is to be the only one, or two pools of threads would fight.
    # By itself g++ makes only half of what AVX-512 offers of its vectors.
    wide = ("-march=native", "-mprefer-vector-width=512")
    march = ("-mcpu=native",) if platform.machine() == "aarch64" else wide
    command = (cxx, *FLAGS, *march, "-fopenmp")
    name = f"cpu_{key(_identity(cxx), _processor(), *command)}"
    sources = {SOURCES / "cpu.cpp": command, SOURCES / "tiles.cpp": command}
    return build_once(name, lambda to: compile_library(to, sources), retry)


def _cuda_library(retry: bool, architectures: Sequence[str]) -> Path:
    cxx, cuda = compiler(), nvcc()
    command = (cuda, "-ccbin", cxx, *NVCC_FLAGS)
    stem = f"cuda_{key(_identity(cxx), _identity(cuda), _version(cuda), *command)}"
    gpus = _visible()
    if gpus and not architectures and not _listed():
        # One that was built elsewhere, in a container's image say, will do if it runs here.
        for built in sorted(cache_folder().glob(f"{stem}_*.so")):
            codes = built.stem.removeprefix(stem).split("_")[1:]
            if all(any(_runs_on(code, gpu) for code in codes) for gpu in gpus):
                return built
    architectures = architectures or _architectures()
    targeted = [*command, *map(_generate, architectures)]
    # nvcc knows where its headers are, wherever it is installed; the runtime library comes with
    # c10_cuda, so that nothing of the toolkit is linked.
    sources = {SOURCES / "kernels.cu": targeted, SOURCES / "cuda.cpp": targeted}
    name = "_".join((stem, *architectures))
    return build_once(name, lambda to: compile_library(to, sources, "-lc10_cuda"), retry)


def library(part: Part, retry: bool = False, architectures: Sequence[str] = ()) -> Path:
    """The compiled library of a part, built if it is not there yet (see `build_once`).

    Args:
        part: "cpu" or "cuda".
        retry: build even if it failed before.
        architectures: of the CUDA library; none stands for TORCH_CUDA_ARCH_LIST and the GPUs here,
            or `ARCHITECTURES` where there are neither.

    Raises:
        BuildError: it can not be built.
    """
    return _cpu_library(retry) if part == "cpu" else _cuda_library(retry, architectures)


def main(argv: list[str] | None = None) -> int:
    """Build and load what this machine can build, and report it; returns the exit code."""
    parser = OneLineParser(
        prog="python -m Model.ops.build",
        description="Compile the operators ahead of their first use.",
    )
    parser.add_argument(
        "--cuda-check",
        action="store_true",
        help="only the CUDA library, for sm_80 and sm_90, without which this fails; needs no GPU",
    )
    return run_script(parser, lambda args: _report(args.cuda_check), argv)


def _report(check: bool) -> int:
    """Build and load the parts; `check` is --cuda-check.

    Returns:
        1 if a part fails; a missing CUDA compiler is no failure where nothing asks for one.
    """
    parts: tuple[Part, ...] = ("cpu", "cuda") if torch.version.cuda else ("cpu",)
    wanted = check or torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
    failed = False
    for part in ("cuda",) if check else parts:
        try:
            built = library(part, True, ARCHITECTURES if check else ())
            torch.ops.load_library(built)
            print(f"{part}: {built}")
        except (BuildError, OSError) as error:
            print(f"{part}: not built: {error}")
            missing = part == "cuda" and isinstance(error, MissingCompilerError)
            failed |= wanted or not missing
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
