"""Write out/scratchformer.html: scratchformer.py with its prose beside the code it explains.

    python data/make_page.py

The page is one file that loads nothing else. Every line of scratchformer.py is on it once, in
order, as an element `<span class="l">`. What the page hides of a line (#, quotes, asterisks) is
in `<i>` inside of it, so that the text of these elements is the text of the file. The frame,
with styles and scripts, is data/page.html. This needs Pygments.
"""

import html
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from name_links import Names

try:
    from pygments.lexers import PythonConsoleLexer, PythonLexer
    from pygments.token import Token
except ImportError:
    sys.exit("this needs Pygments: uv run data/make_page.py, or pip install pygments")

ROOT = Path(__file__).resolve().parent.parent
# The figures, and what each one belongs to. It stands before a definition, and after the prose
# of a chapter or section.
FIGURES = {
    "merges.svg": "learn_merges_naive",
    "windows.svg": "chapter-4",
    "block.svg": "Block",
    "rope.svg": "apply_rope",
    "attention.svg": "attention_naive",
    "learning_rate.svg": "learning_rate",
    "loss.svg": "train_model",
    "cache.svg": "section-the-key-value-cache",
    "processes.svg": "chapter-12",
    "muon.svg": "orthogonalize",
}

# Text with tags
# --------------

Piece = tuple[str, str, str]  # an opening tag, text, a closing tag
STYLES = {  # for Pygments' kinds of tokens; all others are plain
    Token.Comment: "co",
    Token.Keyword: "kw",
    Token.Operator.Word: "kw",
    Token.Literal.String: "st",
    Token.Literal.Number: "nu",
    Token.Generic.Prompt: "pr",
    Token.Generic.Output: "out",
}


def tagged(tag: str, text: str, style: str = "") -> Piece:
    return f'<{tag} class="{style}">' if style else f"<{tag}>", text, f"</{tag}>"


def to_lines(pieces: Iterable[Piece]) -> list[str]:
    """The HTML of each line of the text: tags close at the end of a line and open again."""
    lines = [""]
    for start, text, end in pieces:
        for n, part in enumerate(text.split("\n")):
            if n > 0:
                lines.append("")
            if part:
                lines[-1] += start + html.escape(part, quote=False) + end
    return lines


def mark(text: str, tag: str = "", style: str = "") -> Iterator[Piece]:
    """`text`, in which WHY and TRAP stand out."""
    for n, part in enumerate(re.split(r"\b(WHY|TRAP)\b", text)):
        if n % 2:
            yield tagged("b", part, part.lower())
        else:
            yield tagged(tag, part, style) if tag else ("", part, "")


class Line(NamedTuple):
    """A line of prose, with what the page hides in front of it and after it."""

    before: str
    text: str
    after: str = ""

    def html(self, inner: str = "", style: str = "l") -> str:
        before, after = (to_lines([tagged("i", x)])[0] for x in (self.before, self.after))
        return f'<span class="{style}">{before}{inner}{after}</span>'

    def hidden(self) -> str:
        return Line(self.before + self.text, "", self.after).html(style="l gone")


# Prose
# -----

INLINE = re.compile(r"""
    `(?P<code>[^`]+)`
    | (?<![\w*])\*(?P<em>(?=\w)[^*`]+)\*(?![\w*])
    | (?<=arXiv\s)(?P<arxiv>\d{4}\.\d{4,5})\b
    | (?P<fixed>(?<=\S)[ ]{2,}(?=\S)|(?<!\S)-+\w[\w-]*)  # spaces; -x isn't cut after -
    | (?P<url>github\.com/[\w/-]+\w)
    | (?<=hapters\s|.hapter\s)(?P<chapter>\d+)
    | (?<![\w.])(?P<name>[A-Za-z]\w*_\w+|[A-Z]+[a-z]\w*[A-Z]\w*|[A-Z]{2,}[a-z]\w*)\b
""", re.X)  # fmt: skip
LINKS = {"arxiv": "https://arxiv.org/abs/", "url": "https://", "chapter": "#chapter-"}
RULE = re.compile(r"(=|-)\1{2,}$")
ITEM = re.compile(r"\d+\. ")
PARAGRAPH = re.compile(r"(WHY|TRAP|Source)\b|Worked example")  # these start a new one


def blocks(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Cut prose into paragraphs ("p"), list items ("li"), indented drawings and tables ("pre"),
    examples (">>>"), headings ("h2" to "h4"), and lines that the page hides (""). The headings
    are those of parts and chapters, between rules, and of sections, which are underlined.
    """
    kind, block = "", list[Line]()
    for n, line in enumerate(lines):
        rule = RULE.match(lines[n - 1].text) if n > 0 else None
        underline = RULE.match(lines[n + 1].text) if n + 1 < len(lines) else None
        old, is_new = kind, False
        if RULE.match(line.text):
            kind = ""
        elif not line.text:
            kind = "pre" if old == "pre" else ""
        elif rule and len(rule[0]) > 80:
            kind = "h2" if rule[1] == "=" else "h3"
        elif underline and len(underline[0]) == len(line.text):
            kind = "h4"
        elif line.text.startswith(">>>") or old == ">>>":
            kind = ">>>"
        elif old in ("", "li") and ITEM.match(line.text):
            kind, is_new = "li", True
        elif old != "li":
            kind = "pre" if line.text.startswith("  ") else "p"
            is_new = bool(PARAGRAPH.match(line.text))
        if block and (kind != old or is_new):
            yield old, block
            block = []
        block.append(line)
    if block:
        yield kind, block


def prose_lines(names: Names, element: "Element") -> list[Line]:
    """The lines of a comment or docstring, without what marks them as such."""
    lines = names.lines[element.first - 1 : element.end - 1]
    if element.kind == "comment":
        matches = [re.match(r"\s*(# ?)?(Exercises?$|Exercise: )?", line) for line in lines]
        return [Line(m[0], line[m.end() :]) for m, line in zip(matches, lines) if m]
    indent = len(lines[0]) - len(lines[0].lstrip())
    result = [Line(line[:indent], line[indent:]) for line in lines]
    before, quotes, text = re.split('(""")', lines[0], maxsplit=1)
    result[0] = Line(before + quotes, text)
    last = names.docs[element.first] - element.first
    before, text, _ = result[last]
    result[last] = Line(before, text.removesuffix(quotes), quotes)
    return result


# The page
# --------


class Element(NamedTuple):
    """Lines of one kind, "code", "comment" or "doc", from `first` to before `end`."""

    kind: str
    first: int
    end: int


def elements(names: Names) -> Iterator[Element]:
    """Cut the file into elements. Blank lines belong to the element before them."""
    lines, n = names.lines, 1
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
    comments = dict(token.start for token in tokens if token.type == tokenize.COMMENT
                    and token.line.lstrip().startswith("#"))  # fmt: skip
    while n <= len(lines):
        first, kind = n, "doc" if n in names.docs else "comment" if n in comments else "code"
        n = names.docs.get(n, n) + 1
        if kind == "comment":
            while comments.get(n) == comments[first]:
                n += 1
        elif kind == "code":
            others = names.docs.keys() | comments.keys() | names.starts.keys()
            while n <= len(lines) and n not in others:
                n += 1
        while n <= len(lines) and not lines[n - 1].strip():
            n += 1
        yield Element(kind, first, n)


class Page:
    """What is needed to write each part of the page."""

    def __init__(self, source: str, figures: dict[str, str]):
        self.names = Names(source)
        self.figures = figures  # HTML by anchor; those used are taken out
        self.headings: list[tuple[str, str, str]] = []  # tag, anchor, title
        self.code = to_lines(self.highlight(source, 1, 0, PythonLexer))

    def reference(self, target: str, is_definition: bool = False) -> str:
        """The opening tag of a link to a definition; at the definition, its anchor."""
        if not is_definition:
            title = html.escape(self.names.tooltips[target])
            return f'<a href="#{target}" title="{title}">'
        anchor = "" if target in self.names.starts.values() else f' id="{target}"'
        return f'<a class="def" href="#{target}"{anchor}>'

    def highlight(self, code: str, line: int, indent: int, lexer: type) -> Iterator[Piece]:
        """The tokens of `code`, which begins at `line` and is indented."""
        column = indent
        for kind, text in lexer(stripnl=False, ensurenl=False).get_tokens(code):
            while kind not in STYLES and kind.parent:
                kind = kind.parent
            place = line, column
            if target := self.names.places.get(place) or self.names.links.get(place):
                yield self.reference(target, place in self.names.places), text, "</a>"
            elif kind is Token.Comment:
                yield from mark(text, "span", "co")
            else:
                yield tagged("span", text, STYLES[kind]) if kind in STYLES else ("", text, "")
            line += text.count("\n")
            column = len(text.rpartition("\n")[2]) + (indent if "\n" in text else column)

    def inline(self, text: str, context: str) -> Iterator[Piece]:
        """A paragraph with its `code`, *emphasis* and links, in the definition `context`."""
        end = 0
        for match in INLINE.finditer(text):
            yield from mark(text[end : match.start()])
            kind, end = match.lastgroup or "", match.end()
            inner = match[kind]
            if kind in LINKS:
                yield f'<a href="{LINKS[kind]}{inner}">', inner, "</a>"
                continue
            hidden, tag = {"code": ("`", "code"), "em": ("*", "em")}.get(kind, ("", "span"))
            opening, _, closing = tagged(tag, "", "fixed" if kind == "fixed" else "")
            if kind in ("code", "name") and (target := self.names.mentioned(inner, context)):
                opening, closing = opening + self.reference(target), "</a>" + closing
            yield from [tagged("i", hidden), (opening, inner, closing), tagged("i", hidden)]
        yield from mark(text[end:])

    def prose(self, element: Element) -> str:
        """The HTML of a comment or docstring."""
        lines, result, at = prose_lines(self.names, element), "", element.first
        for kind, block in blocks(lines):
            text = "\n".join(line.text for line in block)
            tag, last = kind, len(block)
            while kind == "pre" and not block[last - 1].text:
                last -= 1
            if kind in ("pre", ">>>"):
                cut = min(len(x.text) - len(x.text.lstrip()) for x in block if x.text)
                block = [Line(x.before + x.text[:cut], x.text[cut:], x.after) for x in block]
                text = "\n".join(line.text for line in block[:last])
            if kind == ">>>":
                tag = 'pre class="example"'
                indent = len(block[0].before)
                pieces = self.highlight(text + "\n", at, indent, PythonConsoleLexer)
            elif kind in ("p", "li"):
                pieces = self.inline(text, self.names.owner.get(at, ""))
                start = PARAGRAPH.match(text)
                style = "item" if kind == "li" else start and start[1] or ""
                tag = f'p class="{style.lower()}"'
            else:
                pieces = iter([("", text, "")])
            if kind in ("h2", "h3", "h4"):
                part = 1 + sum(tag == "h2" for tag, _, _ in self.headings)
                slug = re.sub(r"\W+", "-", text.lower()).strip("-")
                anchor = {"h2": f"part-{part}", "h3": f"chapter-{slug.partition('-')[0]}",
                          "h4": f"section-{slug}"}[kind]  # fmt: skip
                self.headings.append((kind, anchor, text))
                tag = f'{kind} id="{anchor}"'
            if kind:
                parts = [x.html(part) for x, part in zip(block[:last], to_lines(pieces))]
                between = "" if kind == ">>>" else "\n"
                result += f"<{tag}>{between.join(parts)}</{tag.split()[0]}>"
            result += "".join(x.hidden() for x in (block[last:] if kind else block))
            at += len(block)
        if "Exercise" in lines[0].before:
            return f"<details><summary>Exercises</summary>{result}</details>"
        return result

    def code_html(self, element: Element) -> str:
        """Lines of code. Where one is too long, it goes on below, indented by four more."""
        result, end = "", element.end
        while end > element.first and not self.names.lines[end - 2].strip():
            end -= 1
        for n in range(element.first, end):
            result += f'<span class="l" style="--i:{self.indent(n)}">{self.code[n - 1]}</span>'
        return result + Line("", "").hidden() * (element.end - end)

    def indent(self, line: int) -> int:
        text = self.names.lines[line - 1]
        return len(text) - len(text.lstrip())

    def section(self, section: list[Element]) -> str:
        """A comment or a definition, on the left, and the code, on the right.

        Comments inside the code stay there. Headings and their prose take the whole width.
        """
        anchor, known = self.names.starts.get(section[0].first, ""), len(self.headings)
        cells: list[tuple[str, str]] = []  # "p" for prose or "c" for code, HTML
        for element in section:
            kind = "c" if element.kind == "code" else "p"
            content = self.code_html(element) if kind == "c" else self.prose(element)
            if element.kind == "comment" and element is not section[0]:
                indent = self.indent(element.first)
                kind, content = "c", f'<div class="n" style="--i:{indent}">{content}</div>'
            if cells and cells[-1][0] == kind:
                content = cells.pop()[1] + content
            cells.append((kind, content))

        def row(cells: list[tuple[str, str]]) -> str:
            style = "row" if any(kind == "c" for kind, _ in cells) else "row wide"
            inner = "".join(f'<div class="{kind}">{content}</div>' for kind, content in cells)
            return f'<div class="{style}">{inner}</div>' if cells else ""

        headings = [name for _, name, _ in self.headings[known:]]
        figures = "".join(self.figures.pop(name, "") for name in (anchor, *headings))
        if headings:
            return row(cells[:1]) + figures + row(cells[1:]) + "\n"
        result = f'<section id="{anchor}">{row(cells)}</section>' if anchor else row(cells)
        return figures + result + "\n"

    def main(self) -> str:
        """All sections. One begins at each comment that isn't indented, and each definition
        at the top level or with a docstring.
        """
        sections: list[list[Element]] = []
        for element in elements(self.names):
            is_comment = element.kind == "comment" and self.indent(element.first) == 0
            if not sections or is_comment or element.first in self.names.starts:
                sections.append([])
            sections[-1].append(element)
        return "".join(map(self.section, sections))

    def contents(self) -> str:
        """Parts, which fold, and their chapters."""
        result = ""
        for tag, anchor, title in self.headings:
            part, _, name = title.partition(": ")
            if tag == "h2":
                result += f"</details><details><summary>{part.title()}</summary>"
            if tag in ("h2", "h3"):
                text = name.capitalize() if tag == "h2" else title
                result += f'<a href="#{anchor}">{html.escape(text)}</a>'
        result = result.removeprefix("</details>") + "</details>"
        return result.replace("<details>", "<details open>", 1)


def figure_html(path: Path) -> str:
    """The picture in `path`, with its title and description below it."""
    svg = path.read_text(encoding="utf-8").strip()
    title, text = (re.search(f"<{tag}>(.*?)</{tag}>", svg, re.S) for tag in ("title", "desc"))
    caption = f"<b>{title[1] if title else ''}.</b> {text[1] if text else ''}"
    return f'<figure tabindex="0">{svg}<figcaption>{caption}</figcaption></figure>'


def make_page(source: str, pictures: Path) -> str:
    """The HTML of a page that shows `source`; with `pictures`, if there is such a directory."""
    figures = {}
    if pictures.is_dir():
        figures = {anchor: figure_html(pictures / file) for file, anchor in FIGURES.items()}
    else:
        print(f"no {pictures}: the page has no figures", file=sys.stderr)
    page = Page(source, figures)
    main = page.main()
    if figures:
        sys.exit(f"nothing in the file is called {', '.join(figures)}: correct FIGURES")
    frame = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return frame.replace("<!-- contents -->", page.contents()).replace("<!-- main -->", main)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "out/scratchformer.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    file = (ROOT / "scratchformer.py").read_text(encoding="utf-8")
    out.write_text(make_page(file, ROOT / "data/figures"), encoding="utf-8")
    print(out)
