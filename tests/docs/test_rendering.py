"""README and docs as a reader of GitHub sees them: CommonMark with tables, links that lead
somewhere, files that exist, tables that fit the page."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.report.write_tables import PAGES, refuse_broken_paragraphs
from leangpt.system.errors import UserError

markdown_it = pytest.importorskip("markdown_it")
DOCS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))]
PARSER = markdown_it.MarkdownIt("commonmark").enable("table")
HISTORY = ("docs/LOG.md", "docs/CHANGELOG.md")  # may name files that are no more
# What a page can show of a table, in characters of its words and 3 of padding per column: of the
# longest word of each column, which cannot be broken, on a telephone's 400 pixels (README) and on
# GitHub's 980; see test_tables_fit.
NARROW, WIDE = 50, 105


def parsed(name):
    return PARSER.parse((ROOT / name).read_text())


def text_of(inline):
    """What a reader sees of an inline token: no comments, no image but its description."""
    return "".join(
        child.content if child.type in ("text", "code_inline", "image") else " "
        for child in inline.children
        if child.type != "html_inline"
    ).strip()


def paragraphs(tokens):
    """(line, inline token) of each paragraph, those of lists too."""
    for before, inline in zip(tokens, tokens[1:]):
        if before.type == "paragraph_open":
            yield before.map[0] + 1, inline


def tables(tokens):
    """For each table its rows, each a list of its cells' text."""
    found = []
    for before, token in zip(tokens, tokens[1:]):
        if before.type == "table_open":
            found.append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][-1].append(text_of(token))
        if token.type == "tr_open":
            found[-1].append([])
    return found


@pytest.mark.parametrize("name", DOCS)
def test_sentences_come_out_whole(name):
    tokens = parsed(name)
    for token in tokens:
        if token.type == "html_block":  # all else that begins a line ends the sentence before it
            assert re.fullmatch(r"<!-- (table: \w+|end table) -->\n?", token.content), token.content
        # "...more than\n16. A GPT" would be a list that begins with 16
        assert token.type != "ordered_list_open" or "start" not in token.attrs, token.map
    for line, inline in paragraphs(tokens):
        text = text_of(inline)
        words = "".join(c.content for c in inline.children if c.type == "text")
        assert "<!--" not in words and "-->" not in words, (name, line)
        kinds = [child.type for child in inline.children if child.content or child.nesting]
        alone = kinds in (["image"], ["strong_open", "text", "strong_close"])  # or a title
        assert alone or text[-1] in ".:;)!?" and text[0] not in ".,;:)", (name, line, text[-40:])


@pytest.mark.parametrize("name", DOCS)
def test_tables_come_out_whole(name):
    found = tables(parsed(name))
    outside = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in outside.splitlines() if line.startswith("|")]
    # a heading, a rule and rows: the rule is no row
    assert sum(len(rows) + 1 for rows in found) == len(lines), name
    for rows in found:
        assert len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}, rows[0]


@pytest.mark.parametrize("name", DOCS)
def test_tables_fit(name):
    room = NARROW if name == "README.md" else WIDE
    for rows in tables(parsed(name)):
        longest = (
            max(len(word) for cell in column for word in cell.split() or [""])
            for column in zip(*rows)
        )
        width = sum(word + 3 for word in longest)
        assert width <= room, (name, rows[0], width)


@pytest.mark.parametrize("name", DOCS)
def test_links_and_pictures_lead_somewhere(name):
    targets = []
    for token in parsed(name):
        for child in token.children or []:
            targets += [child.attrs[key] for key in ("href", "src") if key in child.attrs]
    for target in targets:
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            assert (ROOT / name).parent.joinpath(path).exists(), (name, target)
            assert not anchor, "name the file alone"
    if name == "README.md":
        assert len(targets) >= 9


@pytest.mark.parametrize("name", [name for name in DOCS if name not in HISTORY])
def test_files_named_exist(name):
    for token in parsed(name):
        for child in token.children or []:
            if child.type == "code_inline" and re.fullmatch(r"[\w/]+/[\w.]*", child.content):
                assert (ROOT / child.content).exists(), (name, child.content)


def test_the_front_page_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_000 and len(text.splitlines()) <= 176


def test_the_log_is_dated_newest_first():
    days, subject = {}, None
    for line in (ROOT / "docs" / "LOG.md").read_text().splitlines():
        if line.startswith("## "):
            subject = line
        elif line.startswith("- ") and "How to read" not in subject:
            found = re.match(r"- \*\*(\d{4}-\d\d-\d\d)( \(negative\))?\*\* ", line)
            assert found, line
            days.setdefault(subject, []).append(found[1])
    assert len(days) >= 3
    for subject, found in days.items():
        assert found == sorted(found, reverse=True), subject


@pytest.mark.parametrize(
    "text",
    [
        "it takes\n<!-- figure: long_peak -->3 GB<!-- end --> at most.\n",
        "- it takes\n  <!-- figure: long_peak -->3 GB<!-- end --> at most.\n",
        "the table:\n<!-- table: what_fits -->\n<!-- end table -->\n",
    ],
)
def test_markers_that_would_end_a_sentence_are_refused(text):
    refuse_broken_paragraphs("it takes <!-- figure: long_peak -->3 GB<!-- end -->.\n")
    with pytest.raises(UserError, match="line"):
        refuse_broken_paragraphs(text)


def test_every_page_that_is_written_is_tested_here():
    assert set(PAGES) <= set(DOCS) and all(Path(ROOT / name).exists() for name in PAGES)
