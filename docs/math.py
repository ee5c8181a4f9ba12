"""For the built site: formulas as MathML, which browsers draw by themselves, without scripts."""

import html
import re

import latex2mathml.converter


def on_page_content(page, **_):
    """What pymdownx.arithmatex has marked, converted; a tag (...) goes to the margin."""
    def convert(match):
        source = html.unescape(match[2].strip())
        block, source = source.startswith("\\["), source[2:-2]
        tag = re.search(r"\\tag\{(.*?)\}", source)
        source = re.sub(r"\\tag\{.*?\}|\\[,;](?=\s*$)", "", source).strip()
        mathml = latex2mathml.converter.convert(source, display="block" if block else "inline")
        if not block:
            return mathml
        number = f'<span style="float:right">({tag[1]})</span>' if tag else ""
        return f'<div style="overflow-x:auto">{number}{mathml}</div>'

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', convert, page, flags=re.DOTALL)
