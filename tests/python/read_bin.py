"""Reads a verification set as InsightFace does and prints what is in it as JSON:

    read_bin.py SET.bin
"""

import json
import pickle
import sys

with open(sys.argv[1], "rb") as file:
    images, issame = pickle.load(file, encoding="bytes")
print(json.dumps({"lengths": [len(image) for image in images], "issame": issame, "kind": type(images[0]).__name__}))
