"""The documentation site as hooks of MkDocs: which pages there are, their order, and where their links lead.

Nothing is written for the site alone. README.md, CHANGELOG.md and the cards of models become pages beside asset/docs,
the reference is a page for each package, and a link to any other file of the repository leads to a page of its text.
So the same Markdown is right on GitHub and on the site. The look is in mkdocs.yml.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.docs_site")  # below MkDocs' own: its warnings end a strict build

ROOT = Path(__file__).resolve().parents[1]
DOCS = "asset/docs"
HOME = "README.md"
OUTSIDE = {  # Markdown of the repository outside asset/docs -> its page
    HOME: "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "asset/models/sana_tiny/README.md": "project/sana_tiny.md",
}
GUIDES = {  # section -> pages of asset/docs in their order; a page that stands in none is put into the last
    "Make pictures": ["web_app", "cli", "docker", "serving", "comfyui", "upscaling"],
    "Models and training": ["models", "training", "autoencoder_training", "conversion", "quantization"],
    "Speed and memory": ["performance", "approximations", "memory"],
    "Inside": ["architecture", "parity"],
}
MEASURED = "benchmarks/"  # reports of machines, whose titles are alike
REFERENCE = {  # page -> modules, or packages with all that is in them
    "SanaPipeline": ["sana.pipelines.sana_pipeline", "sana.pipelines.request"],
    "Pipelines": ["sana.pipelines"],
    "Configuration": ["sana.config", "sana.config_sections", "sana.config_extra", "sana.registry"],
    "Transformers": ["sana.models.transformer"],
    "Autoencoders": ["sana.models.autoencoder"],
    "Text encoders": ["sana.models.text_encoder", "sana.models.captioner"],
    "Quantisation": ["sana.models.quantization"],
    "Weights": ["sana.models"],
    "Samplers": ["sana.diffusion"],
    "Operators": ["sana.ops"],
    "Data": ["sana.data"],
    "Training": ["sana.training"],
    "Serving": ["sana.serving"],
    "Web app": ["app"],
    "Utilities": ["sana.utils"],
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}
FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<head>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()(?P<target>[^)\s]+)(?P<tail>(?:\s+\"[^\"]*\")?\))")
TAG = re.compile(r"(?P<head><(?:img|a|source|video)\b[^>]*?\b(?:src|href)=\")(?P<target>[^\"]+)(?P<tail>\")")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|/", re.IGNORECASE)
STYLE = """/* Room for commands on wide screens; tables and pictures on narrow ones; names that break. */
.md-grid { max-width: 70rem; }
.md-typeset img { max-width: 100%; height: auto; }
.md-typeset table:not([class]) th { min-width: 0; }
.md-typeset td code { word-break: normal; overflow-wrap: normal; }
.md-typeset .doc-heading { overflow-wrap: anywhere; }
"""


def pieces(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yields the parts of a text with whether each is code in a fence."""
    end = 0
    for fence in FENCE.finditer(markdown):
        yield markdown[end : fence.start()], False
        yield fence[0], True
        end = fence.end()
    yield markdown[end:], False


def links(markdown: str, replace: Any = None) -> tuple[str, list[str]]:
    """Finds, and replaces, the links of a text that do not leave the repository.

    Args:
        markdown: a page.
        replace: takes a link as written and returns what stands there instead; None changes nothing.

    Returns:
        the text, and the links.
    """
    found: list[str] = []

    def one(match: re.Match[str]) -> str:
        target = match["target"]
        if ELSEWHERE.match(target):
            return match[0]
        found.append(target)
        return match["head"] + (replace(target) if replace else target) + match["tail"]

    text = [part if code else TAG.sub(one, LINK.sub(one, part)) for part, code in pieces(markdown)]
    return "".join(text), found


class Site:
    """Which file of the repository is which page.

    Attributes:
        pages: path in the repository -> path of its page or copy on the site.
        sources: the other way round.
    """

    def __init__(self) -> None:
        self.pages = {path: page for path, page in OUTSIDE.items() if (ROOT / path).is_file()}
        self.pages |= {
            path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / DOCS).as_posix()
            for path in (ROOT / DOCS).rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        self._follow()
        self.sources = {page: path for path, page in self.pages.items()}

    def _follow(self) -> None:
        """Adds every file that a page links to, and what these link to."""
        todo = [path for path in self.pages if path.endswith(".md")]
        while todo:
            path = todo.pop()
            for link in links((ROOT / path).read_text(encoding="utf-8"))[1]:
                target = self.resolve(path, link)
                if target is None:
                    logger.warning("%s links to %s, and there is no such file.", path, link)
                    continue
                if target in self.pages:
                    continue
                self.pages[target] = place(target)
                if target.endswith(".md"):
                    todo.append(target)

    @staticmethod
    def resolve(path: str, link: str) -> str | None:
        """Returns the file of the repository that a link means, None if none; a folder means its README.md."""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.partition("#")[0]))
        if (ROOT / target / "README.md").is_file():
            target = f"{target}/README.md"
        return target if not target.startswith("..") and (ROOT / target).is_file() else None

    def rewrite(self, markdown: str, path: str) -> str:
        """Returns a file's text with links that are right on the site."""
        here = posixpath.dirname(self.pages[path])

        def replace(link: str) -> str:
            target, (_, mark, anchor) = self.resolve(path, link), link.partition("#")
            return posixpath.relpath(self.pages[target], here or ".") + mark + anchor if target else link

        return links(markdown, replace)[0]


def place(path: str) -> str:
    """Returns where a file of the repository stands on the site: text as a page, anything else as a copy."""
    copied = path.endswith((".md", ".png", ".jpg", ".jpeg", ".webp", ".svg", ".ipynb"))
    return f"files/{path}" if copied else f"files/{path}.md"


def shown(path: str) -> str:
    """Returns a page that shows a text file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"# `{path}`\n\n{fence}{LANGUAGES.get(posixpath.splitext(path)[1], 'text')}\n{text.rstrip()}\n{fence}\n"


def modules_of(name: str) -> list[str]:
    """Returns the public modules of a package, itself first and packages that have a page of their own left out."""
    folder = ROOT / name.replace(".", "/")
    if not folder.is_dir():
        return [name]
    others = {one for names in REFERENCE.values() for one in names if one.startswith(f"{name}.")}
    found = []
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        kernel = module.startswith("sana.ops.") and module.endswith((".forward", ".backward"))
        inside = any(module == other or module.startswith(f"{other}.") for other in others)
        if not kernel and not inside and "._" not in module:
            found.append(module)
    return found


def reference_page(title: str, names: list[str]) -> str:
    """Returns a page of the reference: what mkdocstrings fills in."""
    parts = [f"# {title}\n"]
    for module in [module for name in names for module in modules_of(name)]:
        # a page of one class shows what it inherits, too: that is how people call it
        options = "    options:\n      inherited_members: true\n" if title == "SanaPipeline" else ""
        parts.append(f"::: {module}\n{options}")
    return "\n".join(parts)


def reference_name(title: str) -> str:
    """Returns the path of a page of the reference."""
    return f"reference/{title.lower().replace(' ', '_')}.md"


def navigation(pages: list[str]) -> list[Any]:
    """Returns the navigation: every page of asset/docs stands in it.

    Args:
        pages: pages of asset/docs, relative to it.
    """
    left = [page.removesuffix(".md") for page in sorted(pages) if not page.startswith(MEASURED)]
    reports = [
        {page.removeprefix(MEASURED).removesuffix(".md"): page} for page in sorted(pages) if page.startswith(MEASURED)
    ]
    known = {page for order in GUIDES.values() for page in order}
    sections = {section: [page for page in order if page in left] for section, order in GUIDES.items()}
    sections[list(GUIDES)[-1]] += [page for page in left if page not in known]
    guides = [{section: [f"{page}.md" for page in chosen]} for section, chosen in sections.items()]
    return [
        {"Start": "index.md"},
        {"Guides": guides + ([{"Measured": reports}] if reports else [])},
        {"Reference": [{title: reference_name(title)} for title in REFERENCE]},
        {
            "Project": [
                {"The bundled model": OUTSIDE["asset/models/sana_tiny/README.md"]},
                {"Changes": OUTSIDE["CHANGELOG.md"]},
            ]
        },
    ]


class State:
    """The site in the making; MkDocs calls functions of a module, one after another."""

    site: Site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not stand in asset/docs, and sets the navigation."""
    site = State.site = Site()
    for path, page in site.pages.items():
        if path.startswith(f"{DOCS}/"):
            continue
        if page.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else shown(path)
            level = InclusionLevel.NOT_IN_NAV if page.startswith("files/") else InclusionLevel.UNDEFINED
            files.append(File.generated(config, page, content=text, inclusion=level))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for title, names in REFERENCE.items():
        files.append(File.generated(config, reference_name(title), content=reference_page(title, names)))
    files.append(File.generated(config, "site.css", content=STYLE))
    guides = [page for path, page in site.pages.items() if path.startswith(f"{DOCS}/") and page.endswith(".md")]
    config.nav = navigation(guides)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns the links of a page into links of the site."""
    path = State.site.sources.get(page.file.src_uri)
    if path == HOME:
        page.meta["hide"] = ["navigation"]  # it is alone in its part of the navigation
    return State.site.rewrite(markdown, path) if path and path.endswith(".md") else markdown
