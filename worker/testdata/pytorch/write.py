"""Writes checkpoint.pth as torch.save lays out a training checkpoint, with Python's own pickler and stand-ins for
torch's classes: a state_dict under "state_dict_backbone", names with "module.", a view with permuted strides, two
views of one storage, a Parameter, an integer counter, and the `_metadata` that state_dict() attaches.

Run beside the file: python3 write.py
"""
import array
import collections
import io
import pickle
import sys
import types
import zipfile

torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
sys.modules.update({"torch": torch, "torch._utils": utils})


def stand_in(module, name, thing):
    thing.__module__, thing.__qualname__ = module.__name__, name
    setattr(module, name, thing)
    return thing


FLOAT = stand_in(torch, "FloatStorage", type("FloatStorage", (), {}))
LONG = stand_in(torch, "LongStorage", type("LongStorage", (), {}))
REBUILD = stand_in(utils, "_rebuild_tensor_v2", lambda *args: None)
PARAMETER = stand_in(utils, "_rebuild_parameter", lambda *args: None)


class Storage:
    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, values


class Tensor:
    def __init__(self, storage, offset, size, stride):
        self.args = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce_ex__(self, protocol):
        return REBUILD, self.args


class Parameter:
    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce_ex__(self, protocol):
        return PARAMETER, (self.tensor, True, collections.OrderedDict())


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", value.kind, value.key, "cpu", len(value.values)
        return None


shared = Storage("0", FLOAT, array.array("f", range(12)))
count = Storage("1", LONG, array.array("q", [7]))
state = collections.OrderedDict()
state["module.permuted"] = Tensor(shared, 0, (3, 4), (1, 3))
state["module.tail"] = Parameter(Tensor(shared, 8, (4,), (1,)))
state["module.count"] = Tensor(count, 0, (), ())
state._metadata = collections.OrderedDict([("", {"version": 1})])
checkpoint = {"epoch": 3, "global_step": 1200, "lr": 0.1, "state_dict_backbone": state, "scaler": None}

pickled = io.BytesIO()
Pickler(pickled, 2).dump(checkpoint)
with zipfile.ZipFile("checkpoint.pth", "w") as archive:
    fixed = lambda name: zipfile.ZipInfo("checkpoint/" + name)
    archive.writestr(fixed("data.pkl"), pickled.getvalue())
    archive.writestr(fixed("byteorder"), "little")
    for storage in (shared, count):
        archive.writestr(fixed("data/" + storage.key), storage.values.tobytes())
    archive.writestr(fixed("version"), "3\n")
