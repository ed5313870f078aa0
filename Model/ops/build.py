"""Compiles the operators in ``csrc`` on this machine, once, and caches the libraries.

``python -m Model.ops.build`` builds ahead of the first use and reports; ``--cuda-check`` compiles
the CUDA sources for several architectures without a GPU and keeps nothing but the result.

The libraries lie in ``$TORCH_EXTENSIONS_DIR``, else ``$XDG_CACHE_HOME``, else ``~/.cache``, under a
name made of everything they depend on: sources, flags, compiler, processor and PyTorch version.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

Part = Literal["cpu", "cuda"]

SOURCES = Path(__file__).parent / "csrc"
# No flag changes a result beyond contracting a * b + c; these two let comparisons vectorise.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr")
CHECKED_ARCHITECTURES = ("80", "90")


class BuildError(RuntimeError):
    """The operators can not be compiled here; the message says why and what to do."""


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
    raise BuildError(f"no {wanted} on this machine; {remedy}")


def compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    return _program("CXX", ("g++", "c++", "clang++"), "install one (Debian: apt install g++)")


def nvcc() -> str:
    """Path of the CUDA compiler: below CUDA_HOME, on PATH, or in /usr/local/cuda.

    Raises:
        BuildError: there is none, or it is of another major version than PyTorch's CUDA.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    remedy = "install the CUDA toolkit and point CUDA_HOME at it"
    found = _program("NVCC", names, remedy)
    printed = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    version = printed.partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda or ""
    if wanted and version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"{found} is CUDA {version or 'of an unknown version'}, PyTorch is built for {wanted}; "
            f"install the CUDA {wanted} toolkit and point CUDA_HOME at it"
        )
    return found


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


def _key(*parts: str) -> str:
    """Hash of the sources and of everything else a build depends on."""
    content = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    content.update("\0".join((torch.__version__, platform.machine(), *parts)).encode())
    return content.hexdigest()[:16]


def _architectures() -> tuple[str, ...]:
    """The visible GPUs' architectures, or the checked ones where there is no GPU."""
    if not torch.cuda.is_available():
        return CHECKED_ARCHITECTURES
    pairs = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(pairs))


def _march() -> tuple[str, ...]:
    """Flags for this very processor; the libraries are not meant to travel."""
    return ("-mcpu=native",) if platform.machine() == "aarch64" else ("-march=native",)


def _includes() -> list[str]:
    return ["-I", str(Path(torch.__file__).parent / "include")]


def _link_flags() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    return ["-shared", "-L", str(folder), "-ltorch_cpu", "-lc10"]


def _abi() -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a compiler; on failure name the first error and keep the rest in a file."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode == 0:
        return
    if result.returncode < 0:
        raise InterruptedBuildError(f"{Path(command[0]).name}: signal {-result.returncode}")
    printed = result.stdout + result.stderr
    log = folder / "failed_build.log"
    log.write_text(" ".join(command) + "\n" + printed)
    errors = [line for line in printed.splitlines() if "error" in line.lower()]
    first = errors[0].strip() if errors else f"exit code {result.returncode}"
    raise BuildError(f"{Path(command[0]).name} failed: {first[:200]} (all of it: {log})")


def _compile_cpu(target: Path) -> None:
    # Compiled with OpenMP but not linked to it: the runtime PyTorch has loaded is to be the only
    # one, or two pools of threads would fight.
    command = [compiler(), *FLAGS, *_march(), _abi(), "-fopenmp", *_includes()]
    link = [str(SOURCES / "cpu.cpp"), "-o", str(target), *_link_flags()]
    flags = [flag for flag in command if flag != "-fopenmp"]
    objects = target.with_suffix(".o")
    _run([*command, "-c", str(SOURCES / "cpu.cpp"), "-o", str(objects)], target.parent)
    _run([*flags, str(objects), *link[1:]], target.parent)
    objects.unlink()


def compile_kernels(target: Path, architecture: Sequence[str], *extra: str) -> None:
    """Compile the CUDA kernels alone, without any PyTorch library.

    Args:
        target: object file.
        architecture: compute capabilities without the point, e.g. ("80", "90").
        extra: further flags.

    Raises:
        BuildError: no compiler, or it fails.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architecture]
    source = str(SOURCES / "kernels.cu")
    command = [nvcc(), *NVCC_FLAGS, _abi(), *codes, *extra, *_includes(), "-c", source]
    _run([*command, "-o", str(target)], target.parent)


def _compile_cuda(target: Path) -> None:
    kernels = target.with_suffix(".o")
    compile_kernels(kernels, _architectures())
    home = Path(nvcc()).resolve().parent.parent
    if not (home / "include").is_dir():
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    cuda = ["-I", str(home / "include"), "-L", str(home / "lib64"), "-lc10_cuda", "-lcudart"]
    source = [str(SOURCES / "cuda.cpp"), str(kernels), "-o", str(target)]
    command = [compiler(), *FLAGS, _abi(), *_includes(), *source, *_link_flags(), *cuda]
    _run(command, target.parent)
    kernels.unlink()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    import fcntl

    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _library_path(part: Part) -> Path:
    if part == "cpu":
        key = _key(_identity(compiler()), _processor(), *FLAGS)
    else:
        key = _key(_identity(compiler()), _identity(nvcc()), *_architectures(), *NVCC_FLAGS)
    return cache_folder() / f"{part}_{key}.so"


def _build(part: Part, target: Path) -> None:
    """Compile into a temporary file and rename, so that nobody ever loads half a library."""
    expected = "20 s" if part == "cpu" else "a minute"
    print(
        f"building the compiled {part.upper()} operators, once, about {expected} ...",
        file=sys.stderr,
        flush=True,
    )
    start = time.monotonic()
    temporary = target.with_name(f"{target.stem}.{os.getpid()}.so")
    try:
        (_compile_cpu if part == "cpu" else _compile_cuda)(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_suffix(".o").unlink(missing_ok=True)
    print(f"built in {time.monotonic() - start:.0f} s: {target}", file=sys.stderr, flush=True)


def library(part: Part, retry: bool = False) -> Path:
    """The compiled library of a part, built if it is not there yet.

    Processes that ask at the same time wait for the first one's build. A build that failed is
    remembered until something it depends on changes.

    Args:
        part: "cpu" or "cuda".
        retry: build even if it failed before.

    Raises:
        BuildError: it can not be built.
    """
    target = _library_path(part)
    failure = target.with_suffix(".failed")
    if target.exists():
        return target
    with _locked(target.parent / "lock"):
        if target.exists():
            return target
        if failure.exists() and not retry:
            raise BuildError(failure.read_text())
        try:
            _build(part, target)
        except InterruptedBuildError:
            raise
        except BuildError as error:
            message = f"{error}; after mending it run python -m Model.ops.build"
            failure.write_text(message)
            raise BuildError(message) from None
        failure.unlink(missing_ok=True)
    return target


def check_cuda(architectures: Sequence[str] = CHECKED_ARCHITECTURES) -> dict[str, bool]:
    """Compile the CUDA kernels for each architecture; nothing is kept but the fact.

    Returns:
        For each architecture whether an earlier check of the same sources was taken over.

    Raises:
        BuildError: no compiler, or it fails.
    """
    folder = cache_folder()
    cached = {}
    for architecture in architectures:
        mark = folder / f"cuda_{_key(_identity(nvcc()), architecture, *NVCC_FLAGS)}.checked"
        cached[architecture] = mark.exists()
        if not cached[architecture]:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                compile_kernels(Path(place) / "kernels.o", (architecture,))
            mark.touch()
    return cached


def main(argv: list[str] | None = None) -> int:
    """Build what this machine can build and report it; 1 if the CPU part fails."""
    parser = argparse.ArgumentParser(description="Compile the operators ahead of their first use.")
    parser.add_argument(
        "--cuda-check",
        action="store_true",
        help=f"only compile the CUDA kernels for sm_{', sm_'.join(CHECKED_ARCHITECTURES)}",
    )
    flags = parser.parse_args(argv)
    if flags.cuda_check:
        try:
            for architecture, cached in check_cuda().items():
                print(f"sm_{architecture}: compiles{' (checked before)' if cached else ''}")
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    parts: tuple[Part, ...] = ("cpu", "cuda") if torch.version.cuda else ("cpu",)
    failed = set()
    for part in parts:
        try:
            print(f"{part}: {library(part, retry=True)}")
        except BuildError as error:
            print(f"{part}: not built: {error}")
            failed.add(part)
    needed = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    return int(bool(failed & needed))


if __name__ == "__main__":
    sys.exit(main())
