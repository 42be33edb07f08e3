"""The machine that the expected speed of training assumes: figures of data sheets, and guesses."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Machine:
    """The assumed devices and their connections.

    Peaks are from NVIDIA's data sheets of H100 SXM, DGX H100 and ConnectX-7; all shares, and the seconds, are guesses.

    Attributes:
        name: Name of a device.
        peak: bfloat16 operations per second without sparsity (data sheet).
        memory: Bytes of memory (data sheet).
        memory_rate: Bytes per second from memory (data sheet).
        devices: Devices per machine (data sheet).
        link: Bytes per second that a device receives inside a machine: NVLink in one direction (data sheet).
        network: Bytes per second that a device receives from other machines: 400 Gb/s (data sheet).
        product_share: Share of the peak that large matrix products reach (a guess).
        score_share: Share of the peak that fused attention reaches (a guess; heads of 256 elements and given masks use
            no Hopper kernel).
        memory_share: Share of `memory_rate` that operations by element reach (a guess).
        link_share: Share of `link` and `network` that collectives reach (a guess).
        launch: Seconds for a process to launch a kernel from Python (a guess).
        hop: Seconds that each device of a group adds to a collective (a guess).
        disk: Bytes per second that all devices together write (a guess).
    """

    name: str = "H100 SXM"
    peak: float = 989e12
    memory: float = 80e9
    memory_rate: float = 3.35e12
    devices: int = 8
    link: float = 450e9
    network: float = 50e9
    product_share: float = 0.7
    score_share: float = 0.25
    memory_share: float = 0.8
    link_share: float = 0.8
    launch: float = 6e-6
    hop: float = 2e-6
    disk: float = 2e9


H100: Final = Machine()


def assumptions(machine: Machine) -> str:
    """Return what is assumed of a machine, in one line."""
    return (
        f"from data sheets: {machine.peak / 1e12:g} TFLOP/s, memory {machine.memory_rate / 1e12:g} TB/s, "
        f"{machine.devices} devices a machine, {machine.link / 1e9:g} GB/s between them, "
        f"{machine.network / 1e9:g} GB/s from each to other machines; guesses: matrix products reach "
        f"{machine.product_share:.0%} of the peak, attention {machine.score_share:.0%}, memory "
        f"{machine.memory_share:.0%} and links {machine.link_share:.0%} of theirs, "
        f"{machine.launch * 1e6:g} us to launch a kernel, {machine.hop * 1e6:g} us for each device of a collective, "
        f"{machine.disk / 1e9:g} GB/s to disk"
    )
