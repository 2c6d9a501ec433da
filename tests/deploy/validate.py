"""Validates files of Kubernetes objects, strictly: `validate.py FILE...` prints a table, a line for
each file and a column for each version of Kubernetes. Exit code 1 if anything is wrong.

Kinds of Kubernetes itself go by its own schemas of each version, other kinds by those beside this
file. A kind that is in neither is wrong."""

import functools
import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

VERSIONS = ["1.29", "1.31", "1.33", "1.35", "1.37"]
OWN = pathlib.Path(__file__).parent / "schemas"

# Without a cache the schemas would be read for every object, and some of them are megabytes.
utils = kubernetes_validate.utils
utils.schema_contents = functools.cache(utils.schema_contents)


def main(files):
    wrong = []
    width = max(len(pathlib.Path(file).stem) for file in files)
    print(" " * width, *(f"{version:>10}" for version in VERSIONS))
    for file in files:
        name = pathlib.Path(file).stem
        objects = [one for one in yaml.safe_load_all(pathlib.Path(file).read_text()) if one]
        cells = []
        for version in VERSIONS:
            errors = [error for one in objects if (error := fault(one, version))]
            wrong += [f"{name}, {version}: {error}" for error in errors]
            cells.append(f"{len(errors)} wrong" if errors else f"{len(objects)} ok")
        print(f"{name:{width}}", *(f"{cell:>10}" for cell in cells))
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong or not files else 0


def fault(one, version):
    kind, group = one["kind"], one["apiVersion"].partition("/")[0]
    own = OWN / f"{kind}.{group}.json"
    try:
        if own.exists():
            jsonschema.validate(one, json.loads(own.read_text()))
        else:
            # A newer schema would be taken for a version that is not there.
            used = kubernetes_validate.validate(one, version, strict=True)
            if used != version:
                return f"no schemas of {version}"
    except jsonschema.ValidationError as error:
        return f"{kind} {'/'.join(map(str, error.absolute_path))}: {error.message}"
    except utils.SchemaNotFoundError as error:
        return error.message
    return None


sys.exit(main(sys.argv[1:]))
