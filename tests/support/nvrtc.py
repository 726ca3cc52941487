"""Compile CUDA sources and read the machine code, on any machine: neither needs a GPU.

NVRTC and nvdisasm come from NVIDIA's wheels, wherever pip put them. NVRTC 12 knows every GPU that
the kernels run on; NVRTC 13 knows none before compute capability 7.5. Both may be installed: what
is given no wheel takes the first.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")  # CUDA 12 and 13
DISASSEMBLER = "nvidia-cuda-nvdisasm"
OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # the first is what the engine gives


class CompileError(Exception):
    """The compiler refused a source; its message is the compiler's."""


class Kernel(NamedTuple):
    """What the compiler says of one kernel, and its machine code."""

    name: str
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Local memory of a thread: arrays that are indexed at run time, and spilled registers."""
    spilled_bytes: int
    """That are stored and loaded because registers were lacking."""
    cubin: bytes


def missing(*wheels: str) -> str | None:
    """Return why none of some wheels can be used, or None if one of them can."""
    if any(map(_files, wheels)):
        return None
    return f"needs {' or '.join(wheels)}, got neither: pip install {wheels[0]}"


def compilers() -> list[str]:
    """Return the wheels of NVRTC that are installed."""
    return [wheel for wheel in COMPILERS if _files(wheel)]


def compile_kernel(source: str, name: str, capability: int, wheel: str | None = None) -> Kernel:
    """Compile a source for one compute capability; return its kernel ``name``.

    What was compiled once is kept, outside the checkout, under a hash of all that it is made of.
    """
    options = (f"--gpu-architecture=sm_{capability}", *OPTIONS)
    key = "\0".join((*map(str, version(wheel)), *options, source))
    kept = _folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not kept.exists():
        log, cubin = _compile(source, options, _library(wheel))
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as new:
            new.write(b"\0".join((log, cubin)))
        os.replace(new.name, kept)
    log, _, cubin = kept.read_bytes().partition(b"\0")
    said = log.decode()
    said = said[said.index(f"entry function '{name}'") :]
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    (registers,) = _numbers(r"Used (\d+) registers", said)
    return Kernel(name, registers, stack, stores + loads, cubin)


def version(wheel: str | None = None) -> tuple[int, int]:
    """Return the compiler's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library(wheel).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def capabilities(wheel: str | None = None) -> list[int]:
    """Return the compute capabilities that the compiler knows."""
    library, number = _library(wheel), ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(number)))
    known = (ctypes.c_int * number.value)()
    _check(library.nvrtcGetSupportedArchs(known))
    return list(known)


def multiply_adds(loop: Counter[str]) -> int:
    """Return the multiply-adds that a thread does in a loop."""
    return loop["FFMA"] + 2 * loop["FFMA2"] + loop["DFMA"]


def additions(loop: Counter[str]) -> int:
    """Return the additions that a thread does in a loop."""
    return loop["FADD"] + 2 * loop["FADD2"] + loop["DADD"]


def instructions(kernel: Kernel) -> Counter[str]:
    """Return how often each instruction stands in a kernel."""
    return Counter(_operation(instruction) for instruction, _ in _disassemble(kernel))


def widths(kernel: Kernel, *names: str) -> set[int]:
    """Return how many bytes a thread moves by a kernel's instructions of some names."""
    bytes_of = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = set()
    for instruction, _ in _disassemble(kernel):
        name, *options = _parts(instruction)
        if name in names:
            found.add(next((bytes_of[option] for option in options if option in bytes_of), 4))
    return found


def mark(number: int) -> str:
    """Return a statement that marks its place in machine code; ways through it can be left out."""
    return f'asm volatile("pmevent {number};");'


def loops(
    kernel: Kernel,
    work: Callable[[Counter[str]], int] = multiply_adds,
    without: Collection[int] = (),
) -> tuple[Counter[str], Counter[str]]:
    """Return how often each instruction stands in the loops that do the work: inner and outer.

    Of the loops with the most ``work``, the innermost, and the innermost with a barrier; they may
    be one. Of branches that exclude each other the longest counts that passes none of the marks
    ``without``, and loops inside count once. All of the kernel counts as a loop if its loops leave
    most work out: a loop that runs once is none in machine code.
    """
    code = _disassemble(kernel)
    whole = _longest_path(code, 0, len(code) - 1, without)
    found = [
        _longest_path(code, target, end, without)
        for end, (_, target) in enumerate(code)
        if target is not None and target < end
    ]
    most = max(map(work, found), default=0)
    if 2 * most < work(whole):
        return whole, whole
    found = sorted((loop for loop in found if work(loop) == most), key=Counter.total)
    return found[0], next((loop for loop in found if loop["BAR"]), whole)


def straight(kernel: Kernel, without: Collection[int] = ()) -> int:
    """Return the instructions of the longest way through a kernel, each loop once."""
    code = _disassemble(kernel)
    ends = [at for at, (instruction, _) in enumerate(code) if "EXIT" in instruction]
    return max(_longest_path(code, 0, end, without).total() for end in ends)


def store_loops(
    kernel: Kernel, without: Collection[int] = ()
) -> list[tuple[Counter[str], Counter[str] | None]]:
    """Return how often each instruction stands in the loops that store to global memory.

    Of each loop without a barrier that is in no other such loop, and of the longest of those inside
    of it that store, or None. Loops inside count once.
    """
    code = _disassemble(kernel)
    spans = [
        (target, end) for end, (_, target) in enumerate(code) if target is not None and target < end
    ]
    storing = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        within = Counter(_operation(instruction) for instruction, _ in code[start : end + 1])
        if within["STG"] and not within["BAR"]:
            storing.append((start, end))
    found, last = [], -1
    for start, end in storing:
        if start > last:
            inner = [
                _longest_path(code, *span, without)
                for span in storing
                if start < span[0] and span[1] < end
            ]
            longest = max(filter(None, inner), key=Counter.total, default=None)
            found.append((_longest_path(code, start, end, without), longest))
            last = end
    return found


def innermost(kernel: Kernel) -> Counter[str]:
    """Return how often each instruction stands in the loop that loads most from global memory."""
    code = _disassemble(kernel)
    spans = [
        (target, end) for end, (_, target) in enumerate(code) if target is not None and target < end
    ]
    inner = [
        _longest_path(code, *span)
        for span in spans
        if not any(span != one and span[0] <= one[0] and one[1] <= span[1] for one in spans)
    ]
    return max(inner, key=lambda loop: loop["LDG"])


def _compile(source, options, library):
    """Return the compiler's log and the machine code."""
    program = ctypes.c_void_p()
    text, title = source.encode(), b"constants"
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, title, 0, None, None))
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        log = _get(library, program, "ProgramLog").rstrip(b"\0")
        if failed:
            raise CompileError(log.decode())
        return log, _get(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _get(library, program, what):
    """Read one of the compiler's results: its size first, then its bytes."""
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status):
    if status:
        raise RuntimeError(f"NVRTC must succeed, got status {status}")


def _numbers(pattern, text):
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler must report {pattern!r}, got:\n{text}")
    return [int(number) for number in match.groups()]


@lru_cache(maxsize=4)
def _disassemble(kernel):
    """Return a kernel's instructions in order, each with the number of that it may branch to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.cubin)
        tool = next(iter(_files(DISASSEMBLER)), None)
        if tool is None:
            raise RuntimeError(missing(DISASSEMBLER))
        command = [str(tool), "--print-code", "--no-dataflow", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, labels = [], {}
    text = text[text.index(f"\n.text.{kernel.name}:") :]
    for line in re.split(r"\n//-+ ", text)[0].splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(instruction[1])
    # A call with a predicate that nothing returns from is a branch, too.
    jump = re.compile(r"(?:\bBRA\b|^@.*\bCALL\.REL\.NOINC\b).*`\((\.L_\w+)\)")
    branches = [jump.search(instruction) for instruction in code]
    return [
        (instruction, labels[branch[1]] if branch else None)
        for instruction, branch in zip(code, branches, strict=True)
    ]


def _longest_path(code, start, end, without=()):
    """Count the instructions of the longest way forward from one instruction to another.

    Of those that pass none of some marks; nothing if there is none. Marks do not count.
    """
    never = float("-inf")
    shut = {f"PMTRIG {1 << number:#x}" for number in without}
    length, follower = {end: 1}, {end: None}
    for at in range(end - 1, start - 1, -1):
        instruction, target = code[at]
        # Of warps whose lanes are apart BRA.DIV and BRA.CONV take care.
        always = not instruction.startswith("@") and re.match(
            r"(BRA(?!\.(DIV|CONV))|EXIT|RET)\b", instruction
        )
        ways = [] if always else [at + 1]
        if target is not None and at < target <= end:
            ways.append(target)
        follower[at] = max(ways, key=lambda way: length[way], default=None)
        passes = follower[at] is not None and instruction.strip() not in shut
        length[at] = 1 + length[follower[at]] if passes else never
    path, at = Counter(), start if length[start] > never else None
    while at is not None:
        path[_operation(code[at][0])] += 1
        at = follower[at]
    del path["PMTRIG"]
    return path


def _operation(instruction):
    """Return an instruction's name: without predicate and, but for the width of loads, options.

    A multiplication by zero, which tells finite values from others, is no multiply-add.
    """
    name, *options = _parts(instruction)
    if name in ("FFMA", "DFMA") and re.search(r"[FD]FMA\S* \w+, (RZ, R|R\w+, RZ,)", instruction):
        return f"{name}.ZERO"
    return f"{name}.128" if name == "LDS" and "128" in options else name


def _parts(instruction):
    """Return an instruction's name and its options, without predicate and operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")


@cache
def _folder():
    """Return the folder of what was compiled: the user's own."""
    folder = Path(tempfile.gettempdir(), f"cupycorr-nvrtc-{getpass.getuser()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def _library(wheel):
    for candidate in COMPILERS if wheel is None else (wheel,):
        for path in _files(candidate):
            return ctypes.CDLL(str(path))
    raise RuntimeError(missing(*COMPILERS))


@cache
def _files(wheel):
    """Return the library or the tool of an installed wheel."""
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        return []
    names = re.compile(r"(libnvrtc\.so(\.\d+)*|nvrtc64_\d+_0\.dll|nvdisasm(\.exe)?)")
    return [path.locate() for path in files if names.fullmatch(path.name)]
