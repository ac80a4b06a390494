"""Reads YAML for tests/tests/deploy.rs:

    deploy_yaml.py parse FILE...       prints {file: [document, ..]} as JSON
    deploy_yaml.py kubernetes VERSION  reads manifests from standard input, compares each with the schema of its kind in
                                       this version of Kubernetes' API, refuses unknown keys, and prints the manifests

Keys that stand twice in one mapping are errors, which PyYAML itself lets pass.
"""

import json
import sys

import yaml


class Strict(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def documents(text):
    return [document for document in yaml.load_all(text, Strict) if document is not None]


def parse(files):
    read = {}
    for file in files:
        with open(file, encoding="utf-8") as source:
            read[file] = documents(source)
    return read


def kubernetes(version):
    import kubernetes_validate

    # Kinds of the Prometheus operator have no schema there.
    foreign = {"monitoring.coreos.com/v1"}
    manifests = documents(sys.stdin)
    for manifest in manifests:
        if manifest["apiVersion"] not in foreign:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                sys.exit(f"{manifest['kind']} {manifest['metadata']['name']}: {error}")
    return manifests


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps(parse(arguments) if what == "parse" else kubernetes(*arguments)))
