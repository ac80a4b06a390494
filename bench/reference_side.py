"""One measurement of the reference, in a process of its own, on the CPU:

    reference_side.py --reference DIR head --classes 100000 --dim 512 --batch 128 --rate 0.1
    reference_side.py --reference DIR backbone --network r18 --batch 64 --train
    reference_side.py --reference DIR step --network r18 --classes 100000 --batch 64 --rate 1

DIR is the folder of its modules (partial_fc_v2, losses, backbones), which are imported as they are. The options, the repetition
that does not count, the sizes, the way memory is counted and the JSON are those of `arcface-worker bench`. The trainer itself
cannot run without a GPU; the order of its step is kept: backbone, head, backward, clipping of the backbone at norm 5, one SGD
(momentum 0.9, decay 5e-4) over both, gradients let go. What it would add with one process (DistributedDataParallel and
its fp16 hook) is left out, in its favour.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
import warnings

import torch
from torch import distributed

MARGIN = (1.0, 0.5, 0.0)
SCALE = 64


def stay_on_the_cpu():
    """The reference moves its tensors to a GPU as it goes."""
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.nn.Module.cuda = lambda module, *_, **__: module
    torch.cuda.is_available = lambda: False
    # About GPUs that are not there.
    warnings.simplefilter("ignore")


def status(name):
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"^{name}:\s*(\d+) kB", file.read(), re.MULTILINE).group(1)) * 1024


def resident():
    return status("VmRSS")


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass  # the peak then stays that of the whole process, as the worker's does


def growth(before):
    return max(status("VmHWM") - before, 0)


def measure(repetitions, work):
    """Milliseconds of each repetition, the first run not counted."""
    work()
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def new_head(classes, dim, rate):
    from losses import CombinedMarginLoss
    from partial_fc_v2 import PartialFC_V2

    margin = CombinedMarginLoss(SCALE, *MARGIN, 0)
    return PartialFC_V2(margin, dim, classes, rate, False).train().cuda()


def new_backbone(network, dim=512):
    from backbones import get_model

    return get_model(network, dropout=0.0, fp16=False, num_features=dim).cuda()


def sgd(groups, rate):
    return torch.optim.SGD([{"params": group} for group in groups], lr=rate, momentum=0.9, weight_decay=5e-4)


def random_images(batch):
    return torch.rand(batch, 3, 112, 112) * 2 - 1


def head(args):
    embedding = torch.randn(args.batch, args.dim)

    def stepper(classes):
        module = new_head(classes, args.dim, args.rate)
        optimizer = sgd([module.parameters()], 0.1)
        labels = torch.randint(classes, (args.batch,))

        def step():
            leaf = embedding.detach().requires_grad_()
            loss = module(leaf, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    # Code that is loaded when it is first used is not the head's memory: a small head goes first.
    small = stepper(8)
    small()
    small()
    del small
    before = resident()
    step = stepper(args.classes)
    forget_peak()
    times = measure(args.repetitions, step)
    return times, growth(before)


def backbone(args):
    network = new_backbone(args.network).train(args.train)
    images = random_images(args.batch)

    def step():
        if args.train:
            embedding = network(images)
            embedding.backward(embedding.detach())
            network.zero_grad()
        else:
            with torch.no_grad():
                network(images)

    if args.train:
        # As large as the gradients of a pass, which do not count as its memory.
        room = [torch.ones_like(parameter) for parameter in network.parameters() if parameter.requires_grad]
        before = resident()
        del room
    else:
        before = resident()
    forget_peak()
    times = measure(args.repetitions, step)
    return times, growth(before)


def whole_step(args):
    before = resident()
    forget_peak()
    network = new_backbone(args.network).train()
    module = new_head(args.classes, 512, args.rate)
    # Random images teach nothing: a step that diverges is not wanted here either.
    optimizer = sgd([network.parameters(), module.parameters()], 1e-6)
    images = random_images(args.batch)
    labels = torch.randint(args.classes, (args.batch,))

    def step():
        loss = module(network(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    times = measure(args.repetitions, step)
    return times, growth(before)


def arguments():
    parser = argparse.ArgumentParser(description="Measures one part of the reference on the CPU.")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=10)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, what in [("head", head), ("backbone", backbone), ("step", whole_step)]:
        part = parts.add_parser(name)
        part.set_defaults(what=what)
        part.add_argument("--batch", type=int, required=True)
        if what is not backbone:
            part.add_argument("--classes", type=int, required=True)
            part.add_argument("--rate", type=float, default=1.0)
        if what is head:
            part.add_argument("--dim", type=int, default=512)
        else:
            part.add_argument("--network", required=True)
        if what is backbone:
            part.add_argument("--train", action="store_true")
    return parser.parse_args()


def main():
    args = arguments()
    sys.path.insert(0, args.reference)
    stay_on_the_cpu()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    # Its head wants a process group: one process, over loopback.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    times, peak = args.what(args)
    distributed.destroy_process_group()
    result = {
        "bench": args.part,
        "implementation": "reference",
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "peak_bytes": peak,
        "repetitions": args.repetitions,
        "torch": torch.__version__.split("+")[0],
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
