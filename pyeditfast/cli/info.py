"""``pyeditfast info``."""

from __future__ import annotations


def info() -> None:
    """Show versions, devices, and which backend each op takes and why."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from pyeditfast.backends import chosen_backends
    from pyeditfast.extension import extension_status

    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("pyeditfast", "torch", "triton", "transformers", "numpy", "safetensors"):
        try:
            print(f"{name:<12} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<12} not installed")
    print(f"extension    {extension_status()}")
    print(
        f"cpu          {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        print(f"cuda:{index:<7} {card.name}, {card.total_memory / 2**30:.0f} GiB")
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        print("cuda         none found")
    for device in devices:
        print(f"\nops on {device}")
        for choice in chosen_backends(device):
            print(f"  {choice.op:<16} {choice.backend:<10} {choice.reason}")
