"""GPUs by name: what their makers' data sheets say, and what mp-offload-bench measured of a machine. Imports no torch.

Sources: NVIDIA's data sheets of each GPU, and for memory what its driver reports (nvidia-smi, in MiB), which is what a
run can have. Peaks are of bf16 without sparsity; links are of one direction. GPUs that are only joined by PCIe have its
rate between them. Host memory is not a property of a GPU: 400 GB/s for eight of them is a common server of two sockets
with DDR5, of which each GPU has an eighth; --bench replaces it, and the rates to host memory, by what was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError

GIB, GB = 2**30, 1e9
HOST_MEMORY = 50e9  # bytes/s for each GPU
ADAM_BYTES = 28  # of host memory that a step on the host's processors moves per parameter


@dataclass(frozen=True)
class Machine:
    """Rates in bytes/s and FLOP/s of one GPU, and of its share of what it is joined to."""

    name: str
    flops: float
    memory: float
    memory_bytes: int
    node_link: float  # to GPUs of its node, in one direction
    host_link: float  # to host memory, in one direction
    network: float = 50e9  # to other nodes: 400 Gbit/s for each GPU
    host_memory: float = HOST_MEMORY
    source: str = "data sheet"


def _gpu(name: str, tflops: float, memory_gb: float, mib: int, node_gb: float, host_gb: float) -> Machine:
    return Machine(name, tflops * 1e12, memory_gb * GB, mib << 20, node_gb * GB, host_gb * GB)


KNOWN = {
    machine.name: machine
    for machine in (  # TFLOP/s, memory GB/s, MiB, GB/s to a neighbour, GB/s to the host
        _gpu("A100-40GB", 312, 1555, 40960, 300, 32),  # SXM4: NVLink 600 GB/s both ways, PCIe 4
        _gpu("A100-80GB", 312, 2039, 81920, 300, 32),
        _gpu("A800-80GB", 312, 2039, 81920, 200, 32),  # NVLink 400 GB/s
        _gpu("H100", 989.5, 3350, 81559, 450, 64),  # SXM5: NVLink 900 GB/s, PCIe 5
        _gpu("H100-PCIe", 756.5, 2000, 81559, 64, 64),
        _gpu("H800", 989.5, 3350, 81559, 200, 64),
        _gpu("H20", 148, 4000, 97871, 450, 64),
        _gpu("H200", 989.5, 4800, 143771, 450, 64),
        _gpu("B200", 2250, 8000, 183359, 900, 64),  # HGX: NVLink 1.8 TB/s
        _gpu("L40S", 362, 864, 46068, 32, 32),
        _gpu("RTX-4090", 165.2, 1008, 24564, 32, 32),
    )
}


def find(name: str) -> Machine:
    """A machine by its GPU's name (UserError where it is not known)."""
    found = {known.lower(): machine for known, machine in KNOWN.items()}.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: not known; known: {', '.join(KNOWN)}")
    return found


def measured(machine: Machine, path: Path, gpus_per_node: int) -> Machine:
    """The same with the rates to and of host memory from mp-offload-bench's JSON lines (UserError without any)."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = _rates([row for row in rows if isinstance(row, dict)], gpus_per_node)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--bench {path}: not JSON lines of mp-offload-bench ({error}); write them with mp-offload-bench >FILE"
        ) from error
    if not found:
        raise UserError(
            f"--bench {path}: has no line of part link, memory or adam; write it with mp-offload-bench >FILE"
        )
    return replace(machine, **found, source=f"{machine.source}, {path.name}")  # type: ignore[arg-type]


def _rates(rows: list[Mapping[str, Any]], gpus_per_node: int) -> dict[str, float]:
    """Fields of Machine: the slower direction of the largest pinned copy; what Adam or an update in place reaches."""
    found: dict[str, float] = {}
    links = [row for row in rows if row.get("part") == "link" and row.get("pinned") and row["operation"] != "both"]
    if links:
        largest = max(row["bytes"] for row in links)
        found["host_link"] = min(row["bytes_per_s"] for row in links if row["bytes"] == largest)
    adam = [row["bytes_per_s"] for row in rows if row.get("part") == "adam" and row.get("kernel") == "fused"]
    memory = [row["bytes_per_s"] for row in rows if row.get("part") == "memory" and row.get("operation") == "update"]
    if adam or memory:
        found["host_memory"] = max(adam or memory) / gpus_per_node
    return found
