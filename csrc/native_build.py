"""Build the native CPU library: plain compiler calls, once per instruction set, linked into one shared library.

setup.py runs this while the package is built, so it imports nothing of the package and nothing that must be installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARY_NAME = "libdeberta_kernels_cpu.so"
FOLDER_PREFIX = ".build-"  # of folders in which something is built

COMMON_FLAGS = (
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# What nothing refers to is left out: parts of libstdc++ need a newer glibc than the kernels do.
LINK_FLAGS = ("-shared", "-Wl,--gc-sections")
SANITIZE_FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# A newer libstdc++ than the one torch brought along must not be needed, and ours must not be seen by others.
STATIC_RUNTIME_FLAGS = ("-static-libstdc++", "-Wl,--exclude-libs,ALL")
COMPILE_TIMEOUT_SECONDS = 600
# What compilers call extensions of ARM processors that Linux names otherwise.
ARM_EXTENSIONS = {"asimd": "simd", "atomics": "lse"}
# For gcc, which otherwise moves loads of the products forward until registers run out, and spills sums.
ARM_GCC_FLAGS = ("-fno-schedule-insns",)


class BuildError(RuntimeError):
    """The native library could not be built."""


@dataclass(frozen=True)
class Layout:
    """The folders of one build.

    Attributes:
        sources: folder with dispatch.cpp and kernel.cpp.
        include: folder given to the compiler with -I.
        library: path of the shared library to write.
        flags: more flags for every call of the compiler.
    """

    sources: Path = ROOT / "csrc" / "cpu"
    include: Path = ROOT / "csrc"
    library: Path = ROOT / "deberta_kernels" / "lib" / LIBRARY_NAME
    flags: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        """Return the path of the file that says how the library beside it was built."""
        return self.library.with_name("build.json")


SANITIZED = Layout(library=ROOT / "build" / "sanitized" / LIBRARY_NAME, flags=SANITIZE_FLAGS)


def package_file(name: str) -> Any:
    """Load one file of the package, such as "env.py", as a module of its own.

    The package itself cannot be imported while it is built: its dependencies may not be there.
    """
    path = ROOT / "deberta_kernels" / name
    spec = importlib.util.spec_from_file_location(f"deberta_kernels_build_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BuildError(f"{path} cannot be loaded; build from a complete checkout or source archive")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_library_file() -> Any:
    """Load the module that seals the library."""
    return package_file("native/library_file.py")


def variants_for(platform: str) -> dict[str, tuple[str, ...]]:
    """Return the compiler flags of each variant to try on a platform such as "linux-x86_64", generic first.

    Flags are named one by one and never -march=native: the library must run on machines other than the one it was built
    on, and picks its variant when it is loaded.
    """
    env = package_file("env.py")
    isas = env.isas_of(platform.rpartition("-")[2])
    return {name: compiler_flags(env.ISA_FEATURES[name]) for name in reversed(isas)}


def compiler_flags(features: tuple[str, ...]) -> tuple[str, ...]:
    """Return the compiler's flags for features of a processor, which Linux names."""
    if "asimd" not in features:
        return tuple(f"-m{feature.replace('_', '')}" for feature in features)
    base = "armv8.2-a" if "bf16" in features else "armv8-a"
    extensions = ("+" + ARM_EXTENSIONS.get(feature, feature) for feature in features)
    return ("-march=" + base + "".join(extensions), "-DDK_NEON")


def compiled_variants(names: Collection[str]) -> str:
    """Return the definition that tells dispatch.cpp which variants there are, fastest first, and what each uses."""
    features = package_file("env.py").ISA_FEATURES
    uses = {name: " && ".join(f"DK_HAS({feature})" for feature in features[name]) for name in features}
    return "-DDK_VARIANTS(V)=" + " ".join(f"V({name}, {uses[name] or 'true'})" for name in features if name in names)


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command: CXX if set, else the first of c++, g++, clang++ on the PATH.

    Raises:
        BuildError: there is none, or CXX names something that is not there.
    """
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        try:
            command = shlex.split(chosen)
        except ValueError as error:
            raise BuildError(f"CXX is {chosen!r}, which is no command ({error}); unset CXX or close it") from error
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX is {chosen!r}, which is not on the PATH; unset CXX or point it to a C++ compiler")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler on the PATH (looked for c++, g++, clang++); on Debian or Ubuntu: apt install g++")


def platform_of(compiler: list[str]) -> str:
    """Return what the compiler compiles for, such as "linux-x86_64": a cross compiler's is not this machine."""
    machine = run_compiler([*compiler, "-dumpmachine"], "asking the compiler what it compiles for").strip()
    processor, _, system = machine.partition("-")
    return f"linux-{processor}" if "linux" in system else sysconfig.get_platform()


def is_foreign(platform: str) -> bool:
    """Tell whether what is built for a platform cannot run here."""
    return platform != sysconfig.get_platform()


def version_of(compiler: list[str]) -> str:
    """Return what the compiler says about itself."""
    return run_compiler([*compiler, "--version"], "asking the compiler for its version")


def run_compiler(command: list[str], what: str, stdin: str = "") -> str:
    """Run one compiler call and return its output; `what` names it in the error."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, encoding="utf-8", errors="replace",
            timeout=COMPILE_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{what}: {error}") from error
    if done.returncode:
        raise BuildError(f"{what} failed ({shlex.join(command)}):\n{done.stderr.strip()[-4000:]}")
    return done.stdout


def accepts(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Return whether the compiler knows these flags."""
    probe = [*compiler, *flags, "-Werror", "-x", "c++", "-fsyntax-only", "-"]
    try:
        run_compiler(probe, "probe", "int probe() { return 0; }\n")
    except BuildError:
        return False
    return True


def digest(layout: Layout, compiler: list[str], platform: str) -> str:
    """Return a hash over everything the library depends on: sources, this file, compiler and platform."""
    state = hashlib.sha256()
    state.update(version_of(compiler).encode())
    state.update(json.dumps([compiler, platform, layout.flags, variants_for(platform)]).encode())
    sources = sorted(p for p in layout.include.rglob("*") if p.suffix in {".cpp", ".h", ".hpp", ".inc"})
    for path in [Path(__file__).resolve(), ROOT / "deberta_kernels" / "native" / "library_file.py", *sources]:
        state.update(str(path.name).encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def compile_variants(
    layout: Layout, compiler: list[str], platform: str, folder: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Compile kernel.cpp once per variant, in parallel.

    Returns:
        (object file per variant that compiled, reason per variant left out).

    Raises:
        BuildError: the generic variant, which every machine needs, did not compile.
    """
    objects: dict[str, Path] = {}
    left_out: dict[str, str] = {}

    def compile_one(name: str, flags: tuple[str, ...]) -> Path:
        if flags and not accepts(compiler, flags):
            raise BuildError(f"the compiler does not know {' '.join(flags)}")
        if "-DDK_NEON" in flags and accepts(compiler, ARM_GCC_FLAGS):
            flags = (*flags, *ARM_GCC_FLAGS)
        target = folder / f"kernel_{name}.o"
        command = [*compiler, *COMMON_FLAGS, *layout.flags, *flags, f"-I{layout.include}", f"-DDK_VARIANT={name}"]
        run_compiler([*command, "-c", str(layout.sources / "kernel.cpp"), "-o", str(target)], f"variant {name}")
        if not target.is_file():
            raise BuildError(f"variant {name}: the compiler reported no error and wrote nothing")
        return target

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        running = {name: pool.submit(compile_one, name, f) for name, f in variants_for(platform).items()}
    for name, future in running.items():
        try:
            objects[name] = future.result()
        except BuildError as error:
            if name == "generic":
                raise
            left_out[name] = str(error)
    return objects, left_out


def link(layout: Layout, compiler: list[str], objects: dict[str, Path], folder: Path) -> Path:
    """Compile dispatch.cpp for the variants there are and link everything; return the library, still in `folder`."""
    dispatch = folder / "dispatch.o"
    source = layout.sources / "dispatch.cpp"
    command = [*compiler, *COMMON_FLAGS, *layout.flags, f"-I{layout.include}", compiled_variants(objects)]
    run_compiler([*command, "-c", str(source), "-o", str(dispatch)], "dispatch")
    library = folder / LIBRARY_NAME
    command = [*compiler, *LINK_FLAGS, *layout.flags, "-o", str(library), str(dispatch), *map(str, objects.values())]
    ways = (STATIC_RUNTIME_FLAGS, ())
    for way in ways:
        try:
            run_compiler([*command, *way], "linking")
            break
        except BuildError:
            if way == ways[-1]:
                raise
    look = load_library_file()
    if library.is_file():
        with library.open("ab") as file:
            file.write(look.seal(library.read_bytes()))
    found = look.damage(library, foreign=is_foreign(platform_of(compiler)))
    if found is not None:
        raise BuildError(f"linking: the compiler reported no error, but of the library it should write: {found}")
    return library


def is_built(layout: Layout, wanted: str, platform: str) -> bool:
    """Tell whether the library of a platform is there, whole, and recorded to be of what has the digest `wanted`."""
    record = read_record(layout.record)
    complete = isinstance(record.get("variants"), list) and isinstance(record.get("left_out"), dict)
    if not complete or record.get("digest") != wanted:
        return False
    if load_library_file().damage(layout.library, foreign=is_foreign(platform)) is not None:
        return False
    # A build that was ended between its two files left a new library beside an old record.
    return record.get("library") == hashlib.sha256(layout.library.read_bytes()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Return what a build wrote down; nothing where there is no such file, or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def build_library(layout: Layout | None = None, force: bool = False) -> dict[str, Any]:
    """Build the native library, unless the one in place was built from exactly these sources.

    The library is written beside its final place and renamed, so a process that has the old one open keeps it.

    Returns:
        The record also written to build.json: digest, library (digest of the file), compiler, compiler_version,
        variants, left_out (variant -> reason); and "is_new": whether anything was built.

    Raises:
        BuildError: no compiler, sources missing, or the compiler failed.
    """
    layout = layout or Layout()
    if sysconfig.get_platform().startswith("win"):
        raise BuildError("the native library is not built on Windows")
    for name in ("dispatch.cpp", "kernel.cpp"):
        if not (layout.sources / name).is_file():
            raise BuildError(f"{layout.sources / name} is missing; build from a complete checkout or source archive")
    compiler = find_compiler()
    platform = platform_of(compiler)
    wanted = digest(layout, compiler, platform)
    said = version_of(compiler)
    if layout.flags and "clang" in said:
        raise BuildError("the sanitized build is made with g++, whose sanitizers can be loaded before Python")
    if not force and is_built(layout, wanted, platform):
        return {**read_record(layout.record), "is_new": False}
    layout.library.parent.mkdir(parents=True, exist_ok=True)
    with build_folder(layout.library.parent) as folder:
        objects, left_out = compile_variants(layout, compiler, platform, folder)
        finished = link(layout, compiler, objects, folder)
        built = hashlib.sha256(finished.read_bytes()).hexdigest()
        record = {
            "digest": wanted, "library": built, "compiler": compiler,
            "compiler_version": said.strip().partition("\n")[0], "variants": list(objects), "left_out": left_out,
        }  # fmt: skip
        (folder / "build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        put_in_place(finished, layout.library)
        put_in_place(folder / "build.json", layout.record)
    return {**record, "is_new": True}


@contextmanager
def build_folder(parent: Path) -> Iterator[Path]:
    """Give a folder in `parent` to build in; delete it at the end, and first those of builds that were killed."""
    for path in parent.glob(f"{FOLDER_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            with locked(path) as is_ours:
                if is_ours:
                    shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir=parent) as name, locked(Path(name)):
        yield Path(name)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which the system takes back when a process ends; tell whether it was to be had."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError:
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(handle)


def put_in_place(path: Path, target: Path) -> None:
    """Rename a file that is finished; a folder in its place is deleted."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(path, target)


def remove_library(layout: Layout | None = None) -> None:
    """Delete an earlier library: one that does not match the sources is worse than none."""
    layout = layout or Layout()
    for path in (layout.library, layout.record):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def record_absence(reason: str, layout: Layout | None = None) -> None:
    """Leave the reason for there being no library where the package, once installed, finds it."""
    layout = layout or Layout()
    layout.record.parent.mkdir(parents=True, exist_ok=True)
    with build_folder(layout.record.parent) as folder:
        (folder / "build.json").write_text(json.dumps({"not_built": reason}, indent=1) + "\n", encoding="utf-8")
        put_in_place(folder / "build.json", layout.record)
