"""Runs an exported network with onnxruntime:

    onnx_check.py MODEL.onnx IMAGES.npy EMBEDDINGS.npy

The file must pass ONNX's own checker. It embeds the images [N, 3, 112, 112] one by one, all at once and in a batch of
three, and prints how far the results are from the given embeddings, as JSON.
"""

import json
import sys

import numpy
import onnx
import onnxruntime


def difference(ours, expected):
    ours, expected = ours.astype(numpy.float64), expected.astype(numpy.float64)
    norms = numpy.linalg.norm(ours, axis=1) * numpy.linalg.norm(expected, axis=1)
    return {
        "rows": len(ours),
        "max_difference": float(numpy.abs(ours - expected).max()),
        "min_cosine": float(((ours * expected).sum(axis=1) / norms).min()),
    }


def main():
    path, images, expected = sys.argv[1:]
    images, expected = numpy.load(images), numpy.load(expected)
    # By path: a model with its weights in a second file is checked together with them.
    onnx.checker.check_model(path, full_check=True)
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given], [made] = session.get_inputs(), session.get_outputs()

    def embed(rows):
        return session.run([made.name], {given.name: rows})[0]

    one_by_one = numpy.concatenate([embed(images[i : i + 1]) for i in range(len(images))])
    report = {
        "onnxruntime": onnxruntime.__version__,
        "input": [given.name, given.type, given.shape],
        "output": [made.name, made.type, made.shape],
        "metadata": session.get_modelmeta().custom_metadata_map,
        "rms": float(numpy.sqrt(numpy.square(expected, dtype=numpy.float64).mean())),
        "one_by_one": difference(one_by_one, expected),
        "all_at_once": difference(embed(images), expected),
        "three": difference(embed(images[:3]), expected[:3]),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
