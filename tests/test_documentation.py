"""What the documents refer to exists: tests by path and name, and files of the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "SECURITY.md", "deploy/README.md", "tests/benchmarks/README.md"]
TEST_REFERENCE = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
FILE_REFERENCE = re.compile(r"`((?:client|server|common|configs|tests)/[\w/.]+\.(?:py|yaml))`")


def list_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_a_document_names_exists(document: str) -> None:
    for file, name in TEST_REFERENCE.findall((ROOT / document).read_text()):
        assert (ROOT / file).is_file(), f"{document}: {file}"
        assert name in list_functions(ROOT / file), f"{document}: {file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    for file in FILE_REFERENCE.findall((ROOT / document).read_text()):
        assert (ROOT / file).is_file(), f"{document}: {file}"
