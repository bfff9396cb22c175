"""Every kernel compiled for two GPUs without one: JSON of [[kernel, sm, spilled bytes, atomics]].

A process of its own, without TRITON_INTERPRET. At sizes that are used: rows of 2,304, d_sae 16,384
and 65,536.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tcsae.products import kernels as K
from tcsae.products import triton_gpu as G

ROW, WHOLE, NUMBER, LONG = "*bf16", "*fp32", "i32", "*i64"


def rows(tile: int, block: int, warps: int) -> tuple[dict[str, int], int]:
    return {"TILE": tile, "BLOCK": block}, warps


POSITIONS = {"POSITIONS": True, "PLACED": False}
GROUPS = {"GROUP": G.GROUP, "BITS": 16}
Case = tuple[Any, dict[str, str], tuple[dict[str, Any], int]]
CASES: dict[str, Case] = {
    "decode": (K.decode_kernel, {"rows": ROW}, rows(*G.DECODE)),
    "sampled": (K.sampled_kernel, {"rows": ROW, "W": ROW}, rows(*G.SAMPLED)),
    "pieces": (K.pieces_kernel, {"rows": ROW, "of_piece": "*i32"}, rows(*G.BY_FEATURE)),
    "join": (K.join_kernel, {"several": "*i32"}, ({"BLOCK": G.BY_FEATURE[1]}, G.BY_FEATURE[2])),
    "sums": (K.sums_kernel, {}, ({"BLOCK": 128}, 1)),
    "sums of the penalty": (
        K.penalty_sums_kernel,
        {},
        (POSITIONS | {"BLOCK": 16, "PLACES": 128}, 1),
    ),
    "sums, long contexts": (
        K.penalty_sums_kernel,
        {},
        (POSITIONS | {"BLOCK": 2, "PLACES": 1024}, 1),
    ),
    "gradient of the penalty": (
        K.penalty_gradient_kernel,
        {"feature": "*i32"},
        (POSITIONS | {"BLOCK": 256}, 4),
    ),
    "smooth": (
        K.smooth_kernel,
        {"feature": "*i32"},
        ({"PER_CONTEXT": True, "BLOCK": G.SMOOTH[0]}, G.SMOOTH[1]),
    ),
    "smooth by counts": (
        K.smooth_by_counts_kernel,
        {"feature": "*i32", "windows": LONG},
        (POSITIONS | {"PER_CONTEXT": True, "BLOCK": G.SMOOTH[0]}, G.SMOOTH[1]),
    ),
    "error": (K.error_kernel, {}, ({"BLOCK": 4096}, 8)),
    "groups of 16,384": (K.groups_kernel, {"pre": ROW}, (GROUPS | {"GROUPS": 2048}, 8)),
    "groups of 65,536": (K.groups_kernel, {"pre": ROW}, (GROUPS | {"GROUPS": 8192}, 8)),
    "top k": (K.top_k_kernel, {"pre": ROW}, (GROUPS | {"KS": 64}, 4)),
    "row gradient": (K.row_gradient_kernel, {}, ({"BLOCK": 4096}, 8)),
    "update of rows": (K.update_rows_kernel, {}, ({"BLOCK": 4096}, 8)),
    "update of long rows": (K.update_rows_kernel, {}, ({"BLOCK": 8192}, 16)),
}
INDICES = ("index", "start", "token", "position", "first_piece", "first_part", "order", "place")
NUMBERS = ("window", "N", "M", "F", "D", "T", "S", "k", "n_groups")


def signature(kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constants else NUMBER if name in NUMBERS else WHOLE
        kind = LONG if name in INDICES else kind
        found[name] = given.get(name, "*i32" if name == "groups" else kind)
    return found


def main() -> None:
    tools, found = Path(triton.__file__).parent / "backends/nvidia/bin", []
    for sm in (80, 90):
        for name, (kernel, given, (constants, warps)) in CASES.items():
            of = signature(kernel, given, constants)
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, key in enumerate(kernel.arg_names)
                if of[key].startswith("*") or key in ("D", "F", "n_groups")
            }
            source = ASTSource(kernel, signature=of, constexprs=constants, attrs=aligned)
            target = GPUTarget("cuda", sm, 32)
            made = triton.compile(source, target=target, options={"num_warps": warps})
            with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                said = [
                    subprocess.run([tools / tool, way, file.name], capture_output=True, text=True)
                    for tool, way in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
                ]
            usage, code = (done.stdout for done in said)
            spilled = sum(int(re.search(rf"{of}:(\d+)", usage)[1]) for of in ("STACK", "LOCAL"))
            assert "EXIT" in code, said[1].stderr
            atomics = re.findall(r"\b(?:RED|ATOM|ATOMG|ATOMS)\b[.\w]*", code)
            found.append([name, sm, spilled, atomics])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
