"""The page of rows as text is what the code does, and the rebuilt template of SmolLM2 behaves as the published one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.row_texts import ROWS, read_row, render_page, save_named

from genssd.engine.texts.text import Tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs" / "row_texts.md"
SMOLLM2 = os.environ.get("GENSSD_SMOLLM2", "")


@pytest.mark.source
def test_the_page_is_what_the_code_does(tmp_path: Path) -> None:
    page = render_page(tmp_path)
    if os.environ.get("GENSSD_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


@pytest.mark.skipif(not SMOLLM2, reason="GENSSD_SMOLLM2 names no directory of SmolLM2-Instruct")
@pytest.mark.parametrize("title", ROWS)
def test_the_published_template_of_smollm2_does_the_same(tmp_path: Path, title: str) -> None:
    rebuilt, published = save_named(tmp_path / "rebuilt", "SmolLM2-Instruct"), Tokenizer(Path(SMOLLM2))
    texts = [read_row(ROWS[title], tokenizer, tmp_path / "row.jsonl") for tokenizer in (rebuilt, published)]
    assert texts[0] == texts[1]
