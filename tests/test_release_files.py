"""Files that a release and the pages of a repository are made of: versions, citation, templates, workflows."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.source

CFF_REQUIRED = {"cff-version", "message", "title", "authors"}
"""Required keys of the Citation File Format 1.2.0 (its guide to the schema)."""
CFF_KEYS = CFF_REQUIRED | {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url",
    "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url",
    "version",
}  # fmt: skip
ENTITY_KEYS = {
    "address", "alias", "city", "country", "date-end", "date-start", "email", "fax", "location", "name", "orcid",
    "post-code", "region", "tel", "website",
}  # fmt: skip
PERSON_KEYS = {
    "address", "affiliation", "alias", "city", "country", "email", "family-names", "fax", "given-names",
    "name-particle", "name-suffix", "orcid", "post-code", "region", "tel", "website",
}  # fmt: skip
FORM_TYPES = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
"""Kinds of elements of an issue form."""
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
"""Headings of Keep a Changelog 1.1.0."""
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def load(path: Path) -> dict[Any, Any]:
    value = yaml.safe_load(path.read_text())
    assert isinstance(value, dict), path
    return value


def read_project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def find_cff_faults(citation: dict[Any, Any]) -> list[str]:
    """Return what of a citation file is not of format 1.2.0."""
    faults = [f"no {key}" for key in sorted(CFF_REQUIRED - citation.keys())]
    faults += [f"unknown key {key}" for key in citation.keys() - CFF_KEYS]
    if citation.get("cff-version") != "1.2.0":
        faults.append("cff-version is not 1.2.0")
    for name in ("message", "title", "version"):
        if not isinstance(citation.get(name, "x"), str):
            faults.append(f"{name} is no text")
    if citation.get("type", "software") not in ("software", "dataset"):
        faults.append("type")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", str(citation.get("date-released", "2026-01-01"))):
        faults.append("date-released")
    authors = citation.get("authors") or []
    if not authors:
        faults.append("no author")
    faults += [
        f"author {a}" for a in authors if not ((a.keys() <= ENTITY_KEYS and "name" in a) or a.keys() <= PERSON_KEYS)
    ]
    keywords = citation.get("keywords", ["x"])
    if not keywords or len(set(keywords)) < len(keywords) or not all(isinstance(word, str) for word in keywords):
        faults.append("keywords")
    return faults


def test_the_citation_is_of_format_1_2_0() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert find_cff_faults(citation) == []
    assert citation["license"] == read_project()["license"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"cff-version": "1.1.0"}, "cff-version is not 1.2.0"),
        ({"licence": "MIT"}, "unknown key licence"),
        ({"authors": []}, "no author"),
        ({"authors": [{"firstname": "A"}]}, "author {'firstname': 'A'}"),
        ({"version": 0.1}, "version is no text"),
        ({"keywords": ["a", "a"]}, "keywords"),
    ],
)
def test_faults_of_a_citation_are_found(change: dict[str, Any], fault: str) -> None:
    assert find_cff_faults(load(ROOT / "CITATION.cff") | change) == [fault]


def test_the_version_is_the_same_everywhere() -> None:
    project = read_project()["version"]
    assert version("genssd") == project
    assert load(ROOT / "CITATION.cff")["version"] == project
    newest, *_ = read_releases()
    assert newest in ("Unreleased", project)


def read_releases() -> list[str]:
    """Return the releases of the changelog, the newest first."""
    return re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert lines[0] == "# Changelog"
    headings = [line for line in lines if line.startswith("## ")]
    assert headings
    assert all(re.fullmatch(r"## \[Unreleased\]|## \[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", line) for line in headings)
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= CHANGES
    first = lines.index(headings[0])
    assert next(line for line in lines[first + 1 :] if line).startswith("### ")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_one(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    elements = form["body"]
    assert all(element["type"] in FORM_TYPES and element["attributes"]["label"] for element in elements)
    identifiers = [element["id"] for element in elements]
    assert len(set(identifiers)) == len(identifiers)
    assert any(element["validations"]["required"] for element in elements)


def test_there_are_issue_forms_and_what_surrounds_them() -> None:
    assert {path.name for path in FORMS} == {"bug.yml", "idea.yml"}
    assert load(ROOT / ".github/ISSUE_TEMPLATE/config.yml").keys() == {"blank_issues_enabled"}
    assert "make check" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
    assert "genssd env" in (ROOT / "SECURITY.md").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_of_make(path: Path) -> None:
    """Every step uses an action or calls `make`; every target is in the Makefile; the token may read alone."""
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert triggers
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)) | {"docs"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            words = step.get("run", "make").split()
            assert words[0] == "make"
            assert set(words[1:]) <= targets


def test_ci_runs_every_version_that_has_wheels() -> None:
    versions = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == load(ROOT / ".github/workflows/wheels.yml")["jobs"]["try"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == read_project()["requires-python"]
