"""What is published about devices: memory, dense peaks of matrix products, bandwidth; each row with its source."""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9
NVIDIA = "https://www.nvidia.com"
SHEETS = "https://www.nvidia.com/content/dam/en-zz/Solutions"


@dataclass(frozen=True)
class PublishedDevice:
    """A row of a data sheet: memory in bytes, peaks in FLOP/s without sparsity, bandwidth of the memory in bytes a second.

    `words` are in the name that the driver gives; of several rows that fit, the first one is meant. None: there is no such unit.
    """

    title: str
    words: str
    memory: float
    bf16: float | None
    tf32: float | None
    fp32: float
    bandwidth: float
    source: str


def _row(
    title: str, words: str, gigabytes: float, bf16: float | None, tf32: float | None, fp32: float, speed: float, source: str
) -> PublishedDevice:
    """Return a row from the units of data sheets: GB, TFLOP/s and GB/s."""
    peaks = [None if value is None else value * TERA for value in (bf16, tf32)]
    return PublishedDevice(title, words, gigabytes * GIGA, peaks[0], peaks[1], fp32 * TERA, speed * GIGA, source)


# Sheets that print peaks with sparsity print twice what is here. Each number was compared with a second publication: the tables of
# FLOP/s in Lightning (H100 SXM and PCIe, A100, A10, V100, T4), or lists of the sheets' numbers (H200, H100 NVL, L40S, L4).
DEVICES: dict[str, PublishedDevice] = {
    "h200": _row("NVIDIA H200 SXM", "H200", 141, 989, 494, 67, 4800, f"{NVIDIA}/en-us/data-center/h200/"),
    "h100-pcie": _row("NVIDIA H100 PCIe", "H100 PCIe", 80, 756, 378, 51, 2000, f"{NVIDIA}/en-us/data-center/h100/"),
    "h100-nvl": _row("NVIDIA H100 NVL", "H100 NVL", 94, 835, 417, 60, 3900, f"{NVIDIA}/en-us/data-center/h100/"),
    "h100": _row("NVIDIA H100 SXM", "H100", 80, 989, 494, 67, 3350, f"{NVIDIA}/en-us/data-center/h100/"),
    "a100-40gb": _row(
        "NVIDIA A100 40 GB", "A100 40GB", 40, 312, 156, 19.5, 1555,
        "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"),
    "a100-pcie": _row(
        "NVIDIA A100 PCIe 80 GB", "A100 80GB PCIe", 80, 312, 156, 19.5, 1935,
        f"{SHEETS}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
    "a100": _row(
        "NVIDIA A100 SXM 80 GB", "A100", 80, 312, 156, 19.5, 2039,
        f"{SHEETS}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
    "l40s": _row("NVIDIA L40S", "L40S", 48, 362, 183, 91.6, 864, f"{NVIDIA}/en-us/data-center/l40s/"),
    "l4": _row("NVIDIA L4", "L4", 24, 121, 60, 30.3, 300, f"{NVIDIA}/en-us/data-center/l4/"),
    "a10": _row("NVIDIA A10", "A10", 24, 125, 62.5, 31.2, 600, f"{SHEETS}/Data-Center/a10/pdf/a10-datasheet.pdf"),
    "v100": _row(
        "NVIDIA V100 SXM2 32 GB", "V100", 32, None, None, 15.7, 900,
        "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"),
    "t4": _row("NVIDIA T4", "T4", 16, None, None, 8.1, 320, f"{SHEETS}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"),
}  # fmt: skip


def published(name: str) -> PublishedDevice | None:
    """Return the row of a device by the name its driver gives, such as `NVIDIA H100 80GB HBM3`; None where there is none."""
    words = set(name.replace("-", " ").split())
    return next((row for row in DEVICES.values() if set(row.words.split()) <= words), None)
