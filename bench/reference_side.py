"""One measurement of the reference, in a process of its own:

    reference_side.py --reference DIR head --classes 100000 --dim 512 --batch 128 --rate 0.1
    reference_side.py --reference DIR backbone --network r18 --batch 64 --train
    reference_side.py --reference DIR step --network r18 --classes 100000 --batch 64 --rate 1
    reference_side.py --reference DIR --device cuda head --classes 250000 --dim 512 --batch 1024
    reference_side.py --reference DIR --device cuda products --classes 250000 --dim 512 --batch 1024 --cosines 2

DIR is the folder of its modules (partial_fc_v2, losses, backbones), which are imported as they are. The options, the repetition
that does not count, the sizes, the way memory is counted and the JSON are those of `arcface-worker bench`. The order of its
trainer's step is kept: backbone, head, backward, clipping of the backbone at norm 5, one SGD (momentum 0.9, decay 5e-4) over
both, gradients let go. What the trainer would add with one process (DistributedDataParallel and its fp16 hook) is left out, in
its favour. On the CPU everything is fp32; on a GPU it has what its recipes say: fp16 with a loss scale, convolutions
searched for (cudnn.benchmark). `products` are a head's matrix products alone, which no head is faster than: cosines, the gradient of
embeddings, that of weights; a head that keeps no cosines forms them twice. A GPU's memory is that of all its tensors, weights and state with them.
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


def device(args):
    return torch.device(args.device)


def done(args):
    """Waits for a GPU."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def status(name):
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"^{name}:\s*(\d+) kB", file.read(), re.MULTILINE).group(1)) * 1024


def resident(args):
    return status("VmRSS") if args.device == "cpu" else 0


def forget_peak(args):
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass  # the peak then stays that of the whole process, as the worker's does


def growth(args, before):
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return max(status("VmHWM") - before, 0)


def measure(args, work):
    """Milliseconds of each repetition, the first run not counted."""
    work()
    done(args)
    times = []
    for _ in range(args.repetitions):
        begin = time.perf_counter()
        work()
        done(args)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def new_head(args, classes, dim, rate):
    from losses import CombinedMarginLoss
    from partial_fc_v2 import PartialFC_V2

    margin = CombinedMarginLoss(SCALE, *MARGIN, 0)
    return PartialFC_V2(margin, dim, classes, rate, args.device == "cuda").train().to(device(args))


def new_backbone(args, dim=512):
    from backbones import get_model

    return get_model(args.network, dropout=0.0, fp16=args.device == "cuda", num_features=dim).to(device(args))


def sgd(groups, rate):
    return torch.optim.SGD([{"params": group} for group in groups], lr=rate, momentum=0.9, weight_decay=5e-4)


def random_images(args):
    return (torch.rand(args.batch, 3, 112, 112) * 2 - 1).to(device(args))


def random_labels(args, classes):
    return torch.randint(classes, (args.batch,)).to(device(args))


def head(args):
    embedding = torch.randn(args.batch, args.dim).to(device(args))

    def stepper(classes):
        module = new_head(args, classes, args.dim, args.rate)
        optimizer = sgd([module.parameters()], 0.1)
        labels = random_labels(args, classes)

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
    before = resident(args)
    step = stepper(args.classes)
    forget_peak(args)
    times = measure(args, step)
    return times, growth(args, before)


def products(args):
    kind = torch.bfloat16 if args.device == "cuda" else torch.float32
    embedding, weight, logits = (
        torch.randn(*size, dtype=kind, device=device(args))
        for size in [(args.batch, args.dim), (args.classes, args.dim), (args.batch, args.classes)]
    )
    before = resident(args)
    forget_peak(args)

    def step():
        for _ in range(args.cosines):
            embedding @ weight.t()
        logits @ weight
        logits.t() @ embedding

    times = measure(args, step)
    return times, growth(args, before)


def backbone(args):
    network = new_backbone(args).train(args.train)
    images = random_images(args)

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
        before = resident(args)
        del room
    else:
        before = resident(args)
    forget_peak(args)
    times = measure(args, step)
    return times, growth(args, before)


def whole_step(args):
    before = resident(args)
    forget_peak(args)
    network = new_backbone(args).train()
    module = new_head(args, args.classes, 512, args.rate)
    # Random images teach nothing: a step that diverges is not wanted here either.
    optimizer = sgd([network.parameters(), module.parameters()], 1e-6)
    images = random_images(args)
    labels = random_labels(args, args.classes)
    scaler = torch.amp.GradScaler(args.device, growth_interval=100, enabled=args.device == "cuda")

    def step():
        loss = module(network(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    times = measure(args, step)
    return times, growth(args, before)


def arguments():
    parser = argparse.ArgumentParser(description="Measures one part of the reference.")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=10)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, what in [("head", head), ("products", products), ("backbone", backbone), ("step", whole_step)]:
        part = parts.add_parser(name)
        part.set_defaults(what=what)
        part.add_argument("--batch", type=int, required=True)
        if what is not backbone:
            part.add_argument("--classes", type=int, required=True)
            part.add_argument("--rate", type=float, default=1.0)
        if what in (head, products):
            part.add_argument("--dim", type=int, default=512)
        else:
            part.add_argument("--network", required=True)
        if what is products:
            part.add_argument("--cosines", type=int, default=1)
        if what is backbone:
            part.add_argument("--train", action="store_true")
    return parser.parse_args()


def main():
    args = arguments()
    sys.path.insert(0, args.reference)
    if args.device == "cpu":
        stay_on_the_cpu()
    else:
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    # Its head wants a process group: one process, over loopback.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo" if args.device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    times, peak = args.what(args)
    distributed.destroy_process_group()
    result = {
        "bench": args.part,
        "implementation": "reference",
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "peak_bytes": peak,
        "repetitions": args.repetitions,
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__.split("+")[0],
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
