"""Where random weights of a published model's shape are drawn."""

import torch


def build_place() -> tuple[torch.device, torch.dtype]:
    """The device and the format: on a GPU in bf16 billions of weights take seconds."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
