"""Prints the features of a crate that docs.rs documents, from the output of `cargo metadata`."""

import json
import sys

package = next(package for package in json.load(sys.stdin)["packages"] if package["name"] == sys.argv[1])
docs = ((package["metadata"] or {}).get("docs") or {}).get("rs") or {}
print(",".join(package["features"] if docs.get("all-features") else docs.get("features", [])))
