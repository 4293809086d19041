"""The documentation site: its pages, links and reference, and that it needs nothing of other servers."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sana.pipelines.request import Request
from tools import docs_docstrings, docs_site

ROOT = Path(__file__).parents[1]
ADDRESSES = ("href", "src", "srcset", "data-src", "poster")


class Html(HTMLParser):
    """What a page links to, loads and shows.

    Attributes:
        links: (tag, attribute, address).
        names: ids that a link may lead to.
        text: what is read, code left out; code: what stands in code.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.names: set[str] = set()
        self.text, self.code = "", ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given and tag != "meta"}
        rel = f"[{given['rel']}]" if tag == "link" and "rel" in given else ""
        self.links += [(tag + rel, name, given[name]) for name in ADDRESSES if name in given]
        if tag in ("script", "style", "code", "pre", "svg"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside[-1] in ("code", "pre"):
            self.code += data


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; whatever would ask another server fails."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def page(path: Path) -> Html:
    return Html(path.read_text(encoding="utf-8"))


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def target(folder: Path, path: Path, address: str) -> Path:
    """Returns the file of the site that an address on a page means."""
    local = unquote(urlsplit(address).path)
    if not local:
        return path
    found = folder / local.lstrip("/") if local.startswith("/") else path.parent / local
    return Path(os.path.normpath(found / "index.html" if found.is_dir() else found))


@pytest.mark.slow
def test_every_guide_is_a_page_in_the_navigation(built: Path) -> None:
    guides = [path.relative_to(ROOT / "asset/docs") for path in (ROOT / "asset/docs").rglob("*.md")]
    assert guides
    home = {target(built, built / "index.html", address) for _, name, address in page(built / "index.html").links}
    for guide in guides:
        path = built / guide.with_suffix(".html")
        assert path.is_file()
        assert path in home, f"{guide} is not in the navigation"
    for name in ("project/changelog.html", "project/sana_tiny.html", "reference/sanapipeline.html"):
        assert built / name in home


@pytest.mark.slow
def test_no_link_is_broken(built: Path) -> None:
    broken = []
    for path in pages(built):
        for tag, _, address in page(path).links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address.startswith("data:"):
                continue
            found = target(built, path, address)
            fragment = unquote(parts.fragment)
            missing = not found.is_file()
            missing = missing or (fragment and found.suffix == ".html" and fragment not in page(found).names)
            if missing:
                broken.append(f"{path.relative_to(built)}: {tag} {address}")
    assert broken == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    loaded = [
        f"{path.relative_to(built)}: {tag} {address}"
        for path in pages(built)
        for tag, name, address in page(path).links
        if tag != "a" and tag != "link[canonical]" and urlsplit(address).netloc and name in ADDRESSES
    ]
    assert loaded == []
    sheets = [path.read_text(encoding="utf-8") for path in built.rglob("*.css")]
    assert sheets
    assert [
        found for sheet in sheets for found in re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", sheet)
    ] == []
    # the theme fetches this script only for a page with a diagram of that kind
    assert [path for path in pages(built) if 'class="mermaid"' in path.read_text(encoding="utf-8")] == []


@pytest.mark.slow
def test_the_arguments_of_a_call_are_documented(built: Path) -> None:
    shown = page(built / "reference/sanapipeline.html")
    name = "sana.pipelines.sana_pipeline.SanaPipeline"
    assert {f"{name}.__call__", f"{name}.from_pretrained", f"{name}.compile", f"{name}.quantize"} <= shown.names
    html = (built / "reference/sanapipeline.html").read_text(encoding="utf-8")
    described = set(re.findall(r'title="sana\.pipelines\.request\.Request\.(\w+)"', html))
    named = set(re.findall(r"<code>(\w+)</code>", html))  # the mask is described where the embeddings are
    assert {field.name for field in fields(Request)} <= described | named
    assert {"prompt", "seed", "guidance_scale", "num_inference_steps", "output_type"} <= described
    call = html[html.index(f'id="{name}.__call__"') : html.index(f'id="{name}.generate"')]
    assert {"prompt", "height", "width"} <= set(re.findall(r"<b>\s*<code>(\w+)", re.sub("<span[^>]*>", "", call)))
    assert "search_index.json" in {path.name for path in (built / "search").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("title", docs_site.REFERENCE)
def test_the_reference_holds_what_its_modules_hold(built: Path, title: str) -> None:
    shown = page(built / docs_site.reference_name(title).replace(".md", ".html"))
    modules = [module for name in docs_site.REFERENCE[title] for module in docs_site.modules_of(name)]
    assert modules
    assert [module for module in modules if module not in shown.names] == []
    assert [name for name in shown.names if name.startswith(f"{modules[-1]}.") or name.count(".") > 2]


@pytest.mark.slow
def test_no_markdown_is_left_over(built: Path) -> None:
    left = []
    for path in pages(built):
        if "files" in path.relative_to(built).parts or "reference" in path.relative_to(built).parts:
            continue
        for sign in (r"^```.*", r"^\|[-: |]+\|$", r"^(?:[*-]|\d+\.) \S.*", r"\]\(\S+\)", r"\*\*\S.*\*\*"):
            left += [f"{path.relative_to(built)}: {found}" for found in re.findall(sign, page(path).text, re.MULTILINE)]
    assert left == []


def test_every_link_of_every_page_leads_somewhere() -> None:
    broken = []
    for path in docs_site.Site().pages:
        if path.endswith(".md"):
            _, found = docs_site.links((ROOT / path).read_text(encoding="utf-8"))
            broken += [f"{path}: {link}" for link in found if docs_site.Site.resolve(path, link) is None]
    assert broken == []


def test_every_package_stands_in_the_reference_once() -> None:
    listed = [
        module for names in docs_site.REFERENCE.values() for name in names for module in docs_site.modules_of(name)
    ]
    assert len(listed) == len(set(listed))
    packages = {path.parent.name for path in (ROOT / "sana").glob("*/__init__.py")} - {"commands"}
    assert packages <= {module.split(".")[1] for module in listed if module.startswith("sana.")}


def test_links_are_rewritten_and_code_is_not() -> None:
    text = '[a](b.md#c "d") ![e](f.png) [g](https://h) [i](#j) `k`\n```bash\n[l](m.md)\n```\n'
    text += '<img src="n.png">\n[`o`](p.py)'
    rewritten, found = docs_site.links(text, str.upper)
    assert sorted(found) == ["b.md#c", "f.png", "n.png", "p.py"]
    assert '[a](B.MD#C "d") ![e](F.PNG) [g](https://h) [i](#j)' in rewritten
    assert "[l](m.md)" in rewritten


def test_a_page_outside_the_guides_is_linked_where_the_site_has_it() -> None:
    site = docs_site.Site()
    assert site.rewrite("[a](asset/docs/serving.md#safety) [b](LICENSE)", "README.md") == (
        "[a](serving.md#safety) [b](files/LICENSE.md)"
    )
    card = "asset/models/sana_tiny/README.md"
    assert site.rewrite("[a](../../docs/cli.md)", card) == "[a](../cli.md)"
    assert docs_site.Site.resolve("asset/docs/cli.md", "../models/sana_tiny") == card
    assert docs_site.Site.resolve("asset/docs/cli.md", "../../../../etc/passwd") is None
    assert docs_site.Site.resolve("asset/docs/cli.md", "no_such_page.md") is None


def test_pages_without_a_place_are_put_into_the_last_section() -> None:
    guides = docs_site.navigation(["cli.md", "brand_new.md", "benchmarks/a.md"])[1]["Guides"]
    assert guides[0] == {"Make pictures": ["cli.md"]}
    assert guides[-2:] == [{"Inside": ["brand_new.md"]}, {"Measured": [{"a": "benchmarks/a.md"}]}]


def test_arguments_described_together_get_a_line_each() -> None:
    text = "Does it.\n\nArgs:\n    a, b: both;\n        and more.\n    *args, **kwargs: rest[x][y], `z[0][1]`.\n\n"
    text += "Note, this: stays."
    assert docs_docstrings.prepared(text).splitlines()[3:] == [
        "    a: both;", "        and more.", "    b: both;", "        and more.",
        r"    *args: rest[x]\[y], `z[0][1]`.", r"    **kwargs: rest[x]\[y], `z[0][1]`.", "", "Note, this: stays.",
    ]  # fmt: skip
