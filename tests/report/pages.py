"""Reading a page as a browser would: what it loads, and whether its elements nest."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br"}
LOADING = {"src", "href", "srcset", "poster", "action", "data", "background", "xlink:href", "formaction"}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that elements nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.styles: list[str] = []
        self.data = ""
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [str(value) for name, value in attrs if name in LOADING]
        self.styles += [attributes["style"]] if "style" in attributes else []
        if tag not in VOID:
            self.open.append("data" if attributes.get("id") == "data" else tag)

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()
        assert tag == ("script" if opened == "data" else opened), f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "data":
            self.data += data
        elif inside == "style":
            self.styles.append(data)
        elif inside != "script":
            self.text += data


def parse(content: str) -> Page:
    """Read a page, which must be well-formed."""
    page = Page(content)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    return page
