"""PyTorch's side of weights files:

    pytorch_state.py check MODEL.pt STATE.safetensors
    pytorch_state.py write FOLDER STATE.safetensors

`check` loads MODEL.pt as a user does (weights_only, strict) into a module with the names, shapes and kinds of STATE, and
compares every bit. `write` writes the tensors of STATE in every form in which people keep them. Both print JSON.
safetensors is read and written by hand: the format is that simple.
"""

import json
import os
import struct
import sys

import torch
from torch import nn

KINDS = {"F32": torch.float32, "I64": torch.int64}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    state = {}
    for name, info in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in info["data_offsets"])
            values = torch.frombuffer(bytearray(data[start:end]), dtype=KINDS[info["dtype"]])
            state[name] = values.reshape(info["shape"])
    return state


def write_safetensors(path, state):
    names = {kind: name for name, kind in KINDS.items()}
    header, parts, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in state.items():
        values = tensor.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(values)],
        }
        parts.append(values)
        offset += len(values)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


class Named(nn.Module):
    """A module with the given names, and nothing that computes."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            zeros = torch.zeros_like(tensor)
            if leaf in BUFFERS:
                module.register_buffer(leaf, zeros)
            else:
                module.register_parameter(leaf, nn.Parameter(zeros))


def same_bits(a, b):
    raw = (a.detach().contiguous().numpy().tobytes(), b.contiguous().numpy().tobytes())
    return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]


def check(model, expected):
    expected = read_safetensors(expected)
    module = Named(expected)
    loaded = torch.load(model, weights_only=True, map_location="cpu")
    module.load_state_dict(loaded, strict=True)
    # load_state_dict converts kinds in silence; the file itself must have the right ones.
    wrong = [name for name, tensor in expected.items() if not same_bits(loaded[name], tensor)]
    wrong += [name for name, tensor in module.state_dict().items() if not same_bits(tensor, expected[name])]
    return {"tensors": len(loaded), "wrong": wrong, "type": type(loaded).__name__}


def strided(tensor):
    """The same values, laid out by columns."""
    if tensor.dim() < 2:
        return tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def shared(state):
    """All floats as views of one storage."""
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    flat = torch.cat([tensor.reshape(-1) for tensor in floats.values()])
    views, at = {}, 0
    for name, tensor in state.items():
        if name in floats:
            tensor, at = flat[at : at + tensor.numel()].view(tensor.shape), at + tensor.numel()
        views[name] = tensor
    return views


def checkpoint(state):
    """What the reference's training keeps for resuming: the network is one entry among others."""
    module = Named(state)
    module.load_state_dict(state)
    parameters = [parameter for parameter in module.parameters()][:3]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    module.load_state_dict(state)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=10)
    return {
        "epoch": 3,
        "global_step": 1234,
        "state_dict_backbone": module.state_dict(),
        "state_dict_softmax_fc": {"weight": torch.randn(10, 16)},
        "state_optimizer": optimizer.state_dict(),
        "state_lr_scheduler": {
            key: value for key, value in scheduler.state_dict().items() if not callable(value)
        },
    }


def write(folder, state):
    state = read_safetensors(state)
    module = Named(state)
    module.load_state_dict(state)
    prefixed = lambda prefix: {prefix + name: tensor for name, tensor in state.items()}
    floats = lambda kind: {
        name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    files = {
        "module": module.state_dict(),
        "data_parallel": prefixed("module."),
        "compiled": prefixed("_orig_mod."),
        "both": prefixed("module._orig_mod."),
        "parameters": {
            name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()
        },
        "strided": {name: strided(tensor) for name, tensor in state.items()},
        "shared": shared(state),
        "half": floats(torch.float16),
        "bf16": floats(torch.bfloat16),
        "double": floats(torch.float64),
        "checkpoint": checkpoint(state),
        "nested": {"state_dict": state, "arch": "tiny", "best": 0.99},
    }
    written = []
    for name, content in files.items():
        for form, zipped in (("zip", True), ("legacy", False)):
            written.append(f"{name}.{form}.pt")
            path = os.path.join(folder, written[-1])
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
    written.append("reversed.safetensors")
    write_safetensors(os.path.join(folder, written[-1]), dict(reversed(state.items())))
    return {"files": written}


if __name__ == "__main__":
    command, first, second = sys.argv[1:]
    print(json.dumps({"check": check, "write": write}[command](first, second)))
