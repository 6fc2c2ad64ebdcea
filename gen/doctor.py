"""`gen doctor`: what this machine has, what `auto` makes of it, and what is missing for more.

Everything is looked up or measured here and now. torch is imported by the functions that need it only, and
its absence is one of the findings.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen import catalog, outputs, printing
from gen.request import Settings
from weights import store

# Instruction sets that decide which type is fast, by the names of /proc/cpuinfo, and what they are for
INSTRUCTIONS = {
    "avx2": "float32",
    "avx512f": "float32, twice as wide",
    "avx512_bf16": "products in bfloat16",
    "avx512_vnni": "products in int8",
    "avx_vnni": "products in int8, half as wide",
    "amx_bf16": "matrices in bfloat16",
    "amx_int8": "matrices in int8",
    "asimd": "float32",
    "bf16": "products in bfloat16",
    "i8mm": "matrices in int8",
}
SPARE = 2**30  # bytes of disk below which pictures and logs may soon fail
NAMED = ("torch", "diffusers", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Package:
    """Something that makes more possible and that nobody must have."""

    gives: str
    get: str


PACKAGES = {
    "xformers": Package(gives="another attention on NVIDIA GPUs", get="pip install 'xformers>=0.0.30'"),
    "flash-attn": Package(
        gives="FlashAttention on NVIDIA GPUs", get="pip install flash-attn --no-build-isolation (needs nvcc)"
    ),
    "sageattention": Package(gives="attention in int8 on NVIDIA GPUs", get="pip install sageattention"),
    "bitsandbytes": Package(
        gives="weights in 8 and 4 bits on NVIDIA GPUs", get="pip install 'bitsandbytes>=0.46'"
    ),
}


def examine(probe: bool = True) -> dict[str, Any]:
    """All findings. `probe` measures matrix products too, which takes seconds."""
    there = torch_missing() is None
    found = {
        "versions": versions(),
        "machine": machine(),
        "choice": choice() if there else [],
        "products": products() if there and probe else [],
        "attention": attention() if there else [],
        "packages": packages(),
        "weights": weights() if there else [],
        "disk": disk(),
        "video": video(),
    }
    return {**found, "problems": problems(found)}


# --- the machine -------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, memory and graphics."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu(),
        "memory": {"total": loader_memory("cpu"), "available": available_memory("cpu")},
        "gpus": gpus(),
        "compiler": compiler_missing() is None,
    }


def cpu() -> dict[str, Any]:
    """Name, cores this process may use, and those of INSTRUCTIONS that it has."""
    name, flags = platform.processor() or platform.machine(), set()
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return {
        "name": name,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [one for one in INSTRUCTIONS if one in flags],
    }


def gpus() -> list[dict[str, Any]]:
    """What PyTorch can use beside the CPU."""
    if torch_missing() is not None:
        return []
    import torch

    found = []
    for number in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        facts = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": "cuda",
                "name": facts.name,
                "memory": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory": loader_memory("cpu"), "capability": ""})
    return found


def loader_memory(device: str) -> int:
    """Bytes of memory that belong to the device as a whole."""
    from gen import loader

    return loader.memory(device)


def available_memory(device: str) -> int:
    """Bytes that a new process could take without swapping; on a GPU those that nobody holds."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return loader_memory("cpu")


def compiler_missing() -> str | None:
    """Why torch.compile cannot make code for the CPU here, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a C++ compiler, and there is no {' or '.join(names)}"


def versions() -> dict[str, str | None]:
    """Of Python, ours and the packages that decide about speed; None: not installed."""
    from gen import __version__

    own: dict[str, str | None] = {"gen-studio": __version__, "Python": platform.python_version()}
    return own | {name: version(name) for name in NAMED}


def version(package: str) -> str | None:
    """Of an installed package, without importing it."""
    from importlib import metadata  # 10 ms that only this command pays

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_missing() -> str | None:
    """Why there is no torch, or None."""
    from importlib.util import find_spec

    found = find_spec("torch")
    return None if found else "PyTorch is not installed: pip install -r requirements.txt"


# --- what follows from it ----------------------------------------------------------------------------


def choice() -> list[dict[str, Any]]:
    """What `--device auto --dtype auto` takes on every device there is, as the loader decides it."""
    from gen import loader

    preferred, _ = loader.choose_device(Settings())
    rows = []
    for device in devices():
        settings = Settings(device=device)
        _, large = loader.choose_device(settings)
        _, small = loader.choose_device(settings, 1)
        rows.append(
            {
                "device": device,
                "auto": device == preferred,
                "dtype": large,
                "dtype_small": small,
                "why": why(device),
            }
        )
    return rows


def devices() -> list[str]:
    """Those that PyTorch can use, the CPU last."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, present in there.items() if present]


def why(device: str) -> str:
    """The facts that the loader decides by, in words."""
    from gen import loader, optim

    if device == "mps":
        return "bfloat16 is not tried on Apple GPUs"
    units = optim.bfloat16_units(device)
    what = "the processor" if device == "cpu" else "the GPU"
    facts = f"{what} has {'' if units else 'no '}units for bfloat16"
    if device == "cpu" and units:
        facts += f"; weights under {loader.SMALL // 10**6} M parameters gain little and stay float32"
    return facts


def products() -> list[dict[str, Any]]:
    """Speed and error of matrix products in every type that matters, on the device that `auto` takes, and on
    the CPU."""
    from gen import gemm

    rows = []
    for device in devices():
        for dtype in ("float32", "bfloat16", "int8") if device != "mps" else ("float32", "bfloat16"):
            rows += [{"device": device, **rate.to_json()} for rate in gemm.rates(dtype, device, seconds=0.15)]
    return rows


def advice(rows: list[dict[str, Any]]) -> list[str]:
    """What the measured products say about float32 on this CPU."""
    ways = {row["way"]: row for row in rows if row["device"] == "cpu" and row["dtype"] == "float32"}
    plain, other = ways.get("linear"), ways.get("linear through oneDNN")
    if not plain or not other:
        return []
    ratio = other["tflops"] / plain["tflops"]
    # Rounding to bfloat16 costs two to three digits: 4e-3 a factor against 6e-8
    exact = other["error"] < 1e-4
    kind = "as exact as float32 is" if exact else "bfloat16 in disguise: the factors are rounded"
    return [
        f"float32 through oneDNN is {ratio:.2f} times as fast as the default here, with an error of "
        f"{other['error']:.1e} against {plain['error']:.1e}: {kind}"
    ]


def attention() -> list[dict[str, Any]]:
    """Every attention function on every device: what it is, its limits, and why it cannot run (None: it
    can)."""
    from pipelines.attention import survey

    return [{"device": device, **row._asdict()} for device in devices() for row in survey(device)]


def packages() -> list[dict[str, Any]]:
    """Optional packages; none is imported."""
    return [
        {"name": name, "version": version(name), "gives": row.gives, "get": row.get}
        for name, row in PACKAGES.items()
    ]


def weights() -> list[dict[str, Any]]:
    """Every set of weights of the catalog: whether it is here, and whether it fits into the memory."""
    return [_fit(row, tag) for row in catalog.MODELS.values() for tag in row.weights]


def _fit(row: catalog.Model, tag: str) -> dict[str, Any]:
    from gen import loader, memory

    facts, folder = row.checkpoint(tag), store.find(row.weights[tag])
    about: dict[str, Any] = {"name": f"{row.name}:{tag}", "installed": folder is not None, "damaged": None}
    parameters, whole = facts.parameters, False
    if folder is not None:
        try:
            parameters, whole = store.parameters(folder), True
        except store.CorruptWeights as error:
            about["damaged"] = str(error)
    device, dtype = loader.choose_device(Settings(), parameters or None)
    needed = parameters * {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    plan, most = None, needed
    if whole and folder is not None:
        side = facts.native_size if outputs.OUTPUTS[row.makes].sized else None
        plan = memory.plan(folder, device, dtype, height=side, width=side)
        most = plan.peak
    return about | {
        "plan": plan and plan.to_json(),
        "whole": whole,  # counted from the files; else the denoising network alone
        "parameters": parameters or None,
        "dtype": dtype,
        "bytes": needed or None,
        "fits": most <= available_memory(device) if most else None,
    }


def disk() -> dict[str, Any]:
    """Where results go, and how much room there is."""
    home = store.home()
    there = home
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    return {
        "home": str(home),
        "exists": home.is_dir(),
        "writable": os.access(there, os.W_OK),
        "free": usage.free,
        "total": usage.total,
    }


def video() -> dict[str, str | None]:
    """What films are written with. PyAV brings its own libraries; the ffmpeg program is not needed."""
    return {"PyAV": version("av"), "ffmpeg": shutil.which("ffmpeg")}


def problems(found: Mapping[str, Any]) -> list[str]:
    """What should be mended, each with how."""
    rows = [reason for reason in (torch_missing(),) if reason]
    space = found["disk"]
    if not space["writable"]:
        rows.append(f"{space['home']} cannot be written to: set GEN_HOME to a folder of yours")
    if space["free"] < SPARE:
        rows.append(
            f"{gib(space['free'])} of disk are free below {space['home']}: make room, or move GEN_HOME"
        )
    for row in found["weights"]:
        if row["damaged"]:
            mend = f"gen verify {row['name']} --repair pulls published files again"
            rows.append(f"the weights {row['name']} are damaged: {row['damaged']}; {mend}")
        elif row["installed"] and row["fits"] is False:
            rows.append(
                f"{row['name']} takes {gib(row['bytes'])} in {row['dtype']}, more than is free: close other "
                "programs, or take smaller weights"
            )
    if not any(row["installed"] for row in found["weights"]) and torch_missing() is None:
        rows.append("no weights are installed: gen train pixart-sigma:toy makes small ones")
    if found["video"]["PyAV"] is None:
        rows.append("PyAV is missing, so films cannot be written: pip install 'av>=14'")
    return rows


def gib(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count < 2**26 else f"{count / 2**30:.2f} GiB"


# --- printed -----------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """The findings as text on stdout."""
    machine, memory = found["machine"], found["machine"]["memory"]
    names = [f"{name} {one or 'missing'}" for name, one in found["versions"].items()]
    printing.line(", ".join(names))
    units = [f"{one} ({INSTRUCTIONS[one]})" for one in machine["cpu"]["instructions"]]
    printing.line(
        f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores: {', '.join(units) or 'no units known'}"
    )
    for one in machine["gpus"]:
        printing.line(f"{one['name']}, {gib(one['memory'])}, compute capability {one['capability'] or '-'}")
    if not machine["gpus"]:
        printing.line("No GPU that PyTorch can use.")
    printing.line(f"Memory: {gib(memory['available'])} of {gib(memory['total'])} free. {machine['system']}.")
    space = found["disk"]
    printing.line(f"GEN_HOME: {space['home']}, {gib(space['free'])} of disk free.")
    tools = ", ".join(f"{name}: {one or 'not found'}" for name, one in found["video"].items())
    printing.line(f"Films: {tools}.")
    if found["choice"]:
        _table(
            "What auto takes",
            ("DEVICE", "AUTO", "TYPE", "SMALL WEIGHTS", "WHY"),
            [
                (one["device"], "yes" if one["auto"] else "-", one["dtype"], one["dtype_small"], one["why"])
                for one in found["choice"]
            ],
        )
    if found["products"]:
        _table(
            "Matrix products, measured now",
            ("DEVICE", "TYPE", "WAY", "GFLOP/S", "ERROR"),
            [
                (one["device"], one["dtype"], one["way"], f"{1e3 * one['tflops']:.0f}", f"{one['error']:.1e}")
                for one in found["products"]
            ],
        )
        for sentence in advice(found["products"]):
            printing.line(f"{sentence[0].upper()}{sentence[1:]}.")
    if found["attention"]:
        _table(
            "Attention",
            ("DEVICE", "NAME", "WHAT IT IS", "RUNS HERE"),
            [
                (
                    one["device"],
                    one["name"],
                    one["summary"],
                    "yes" if one["missing"] is None else f"no: {one['missing']}",
                )
                for one in found["attention"]
            ],
        )
    _table(
        "Optional packages",
        ("PACKAGE", "VERSION", "GIVES", "GET IT"),
        [
            (one["name"], one["version"] or "-", one["gives"], "" if one["version"] else one["get"])
            for one in found["packages"]
        ],
    )
    if found["weights"]:
        _table(
            "Weights",
            ("WEIGHTS", "INSTALLED", "TYPE", "NUMBERS", "WEIGHTS TAKE", "BESIDE THEM", "PEAK", "FITS NOW"),
            [_weights_line(one) for one in found["weights"]],
        )
    printing.line("")
    for problem in found["problems"]:
        printing.line(f"Problem: {problem}.")
    if not found["problems"]:
        printing.line("No problems found.")


def _weights_line(one: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = f"{one['parameters'] / 1e6:,.1f} M" if one["parameters"] else "-"
    weights, beside, peak = (gib(one["bytes"]) + ", network alone" if one["bytes"] else "-"), "-", "-"
    if plan := one["plan"]:
        weights = gib(sum(plan["weights_bytes"].values()))
        beside = gib(max(plan["drawing_bytes"], plan["decoding_bytes"]))
        peak = f"{gib(plan['peak_bytes'])} +- {gib(plan['error_bytes'])}"
    fits = {True: "yes" if one["whole"] else "the network does", False: "no", None: "-"}[one["fits"]]
    there = "yes" if one["installed"] else "-"
    return one["name"], there, one["dtype"], numbers, weights, beside, peak, fits


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    printing.line(f"\n{title}")
    printing.table([header, *rows])
