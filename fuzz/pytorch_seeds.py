"""Writes the seeds that PyTorch itself makes: scripts/python.sh fuzz/pytorch_seeds.py"""

import io
import os
import zipfile

import torch

SEEDS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seeds")


def write(target, name, data):
    folder = os.path.join(SEEDS, target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def saved(content, zipped):
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def main():
    torch.manual_seed(0)
    values = torch.arange(12.0)
    parameter = torch.nn.Parameter(values[:4].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(4)
    optimizer.step()
    contents = {
        # Two views of one storage, one of them by columns, and a counter.
        "state_dict": {
            "module.conv.weight": values.view(3, 4),
            "module.conv.turned": values.view(4, 3).t(),
            "module.bn.num_batches_tracked": torch.tensor(7),
        },
        "kinds": {
            "half": values.half(),
            "brain": values.bfloat16(),
            "byte": torch.tensor([1, 2], dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "empty": torch.zeros(0, 5),
        },
        "checkpoint": {
            "epoch": 3,
            "global_step": 1234,
            "state_dict_backbone": {"conv.weight": parameter},
            "state_dict_softmax_fc": {"weight": values.view(3, 4)},
            "state_optimizer": optimizer.state_dict(),
        },
    }
    for name, content in contents.items():
        archive = saved(content, True)
        write("pt_zip", f"good_{name}", archive)
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            write("pickle_pt", f"any_{name}", opened.read("archive/data.pkl"))
        write("pt_legacy", f"good_{name}", saved(content, False))
    whole = saved(torch.nn.Linear(2, 2), True)
    write("pt_zip", "bad_module", whole)
    write("pt_zip", "bad_cut_off", saved(contents["state_dict"], True)[:-40])
    write("pt_legacy", "bad_cut_off", saved(contents["state_dict"], False)[:-1])


if __name__ == "__main__":
    main()
