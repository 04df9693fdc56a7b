"""Compile every kernel for sm_80 and sm_90 on any machine, and read registers, spills and instructions from the result.

In: the `variants()` of each operator, one per kernel and shape class with the default configuration, and the entries of
`kernels/results/configurations.json` for single devices. Out: a table, kept as `kernels/results/compiled.csv`. Triton's
package carries ptxas and cuobjdump, so no GPU and no CUDA toolkit is needed.

    python -P -m megavl.kernels.ahead_of_time [--op rmsnorm] [--write]

exits non-zero when a variant spills registers, needs more shared memory than the card has, lacks an instruction that it
was written to use, or has grown by more than 10% in registers since the kept table. TRITON_INTERPRET must not be set.
"""

import argparse
import csv
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megavl.kernels.configurations import Configuration
from megavl.kernels.configurations import read_table as read_configurations

KERNELS = Path(__file__).parent
TABLE = KERNELS / "results" / "compiled.csv"
SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may use: A100 (163 KiB) and H100/H200 (227 KiB)."""
GROWTH = 1.10
"""Registers may grow by this factor over the kept table before the check fails."""
FAMILIES = ("HMMA", "HGMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "STG.E.128")
"""Instructions that are counted: tensor cores (sm_80, sm_90), asynchronous and bulk copies, 16-byte accesses."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with one configuration at one shape class."""

    op: str
    """Folder of the operator."""
    name: str
    """What tells this variant from the operator's others."""
    kernel: Any
    """The `triton.jit` function."""
    arguments: dict[str, str]
    """Types of the run-time arguments: `*bf16`, `i32`, `fp32`, ..."""
    constants: dict[str, Any]
    """Values of the constexpr arguments."""
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    """Integer arguments that need not be multiples of 16."""
    expects: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Capability -> instruction families that must appear."""
    capabilities: tuple[int, ...] = (80, 90)
    """What it is compiled for."""
    tries: tuple[Configuration, ...] = ()
    """Other configurations that are worth a measurement on a new device."""
    measured_by: tuple[str, str] = ("", "forward")
    """Part of the name, and direction, of the benchmark case in which this variant runs."""

    def with_configuration(self, chosen: Configuration) -> "Variant":
        """The same with other launch options."""
        options = {name: chosen[name] for name in ("num_warps", "num_stages") if name in chosen}
        constants = {name: value for name, value in chosen.items() if name not in options}
        unknown = sorted(constants.keys() - self.constants.keys())
        assert not unknown, f"{self.op}/{self.name} has no option {', '.join(unknown)}"
        return replace(self, constants={**self.constants, **constants}, **options)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant; one row of the table."""

    op: str
    variant: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    instructions: int
    counts: str
    triton: str


def operators() -> list[str]:
    """Folders that hold an operator."""
    return sorted(path.parent.name for path in KERNELS.glob("*/kernel.py"))


def variants(op: str) -> list[Variant]:
    """The variants that an operator ships."""
    return importlib.import_module(f"megavl.kernels.{op}.kernel").variants()


def shipped(op: str) -> list[Variant]:
    """The variants of an operator with their defaults, and as configured for single devices."""
    found = variants(op)
    by_name = {f"{op}/{variant.name}": variant for variant in found}
    for device, table in read_configurations().items():
        for name, chosen in table["configurations"].items():
            if name.startswith(f"{op}/"):
                variant = by_name[name].with_configuration(chosen)
                found.append(replace(variant, name=f"{variant.name} on {device}", capabilities=(table["capability"],)))
    return found


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile to machine code and read it back."""
    kernel, place = variant.kernel, {name: (i,) for i, name in enumerate(variant.kernel.arg_names)}
    types = variant.arguments
    aligned = [n for n, t in types.items() if t.startswith("*") or (t in ("i32", "i64") and n not in variant.unaligned)]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={place[name]: value for name, value in variant.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spill_bytes, lines = _read_machine_code(compiled.asm["cubin"])
    counts = {family: sum(family in line for line in lines) for family in FAMILIES}
    return Compiled(
        op=variant.op,
        variant=variant.name,
        capability=capability,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spill_bytes=spill_bytes,
        instructions=len(lines),
        counts=" ".join(f"{family}:{count}" for family, count in counts.items() if count),
        triton=triton.__version__,
    )


def _read_machine_code(cubin: bytes) -> tuple[int, int, list[str]]:
    """(registers, bytes of local memory, instruction lines) of a cubin, through cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(\S.*?;)", code, flags=re.MULTILINE)
    stores_to_local = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines)
    return figures["REG"], max(figures["LOCAL"], figures["STACK"], 4 * stores_to_local), lines


def problems(variant: Variant, row: Compiled, kept: dict[tuple[str, str, int], dict[str, str]]) -> Iterator[str]:
    """Reasons to refuse a compiled variant, one sentence each."""
    where = f"{row.op}/{row.variant} for sm_{row.capability}"
    if row.spill_bytes:
        yield f"{where} spills {row.spill_bytes} bytes of registers to memory"
    if row.shared_bytes > SHARED_LIMIT[row.capability]:
        yield f"{where} needs {row.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT[row.capability]}"
    for family in variant.expects.get(row.capability, ()):
        if f"{family}:" not in row.counts:
            yield f"{where} was written to use {family}, but has only {row.counts or 'none of the counted'}"
    before = kept.get((row.op, row.variant, row.capability))
    if before and before["triton"] == row.triton and row.registers > GROWTH * int(before["registers"]):
        yield f"{where} uses {row.registers} registers, the kept table has {before['registers']}"


def main() -> int:
    """Compile, print the table, and say what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", action="append", help="only these operators")
    parser.add_argument("--write", action="store_true", help="keep the table of all operators")
    options = parser.parse_args()
    kept = read_table()
    rows: list[Compiled] = []
    found: list[str] = []
    for op in options.op or operators():
        for variant in shipped(op):
            for capability in variant.capabilities:
                rows.append(compile_variant(variant, capability))
                found.extend(problems(variant, rows[-1], kept))
                row = rows[-1]
                print(
                    f"{row.op:22} {row.variant:34} sm_{row.capability} warps {row.num_warps} stages {row.num_stages} "
                    f"registers {row.registers:3} shared {row.shared_bytes:6} spills {row.spill_bytes} {row.counts}",
                    flush=True,
                )
    if options.write and not found:
        _write_table(rows, kept)
    for sentence in found:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if found else 0


def read_table() -> dict[tuple[str, str, int], dict[str, str]]:
    """The kept table by (operator, variant, capability)."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {(r["op"], r["variant"], int(r["capability"])): r for r in csv.DictReader(file)}


def _write_table(rows: list[Compiled], kept: dict[tuple[str, str, int], dict[str, str]]) -> None:
    """Replace the rows of the operators in `rows`, keep those of the others."""
    replaced = {row.op for row in rows}
    others = [row for row in kept.values() if row["op"] not in replaced]
    merged = sorted([*others, *map(asdict, rows)], key=lambda r: (r["op"], r["variant"], int(r["capability"])))
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(merged)


if __name__ == "__main__":
    sys.exit(main())
