"""For the built site: formulas as MathML, which browsers draw by themselves, without scripts."""

import html
import re

import latex2mathml.converter


def on_page_content(text, **_):
    """What pymdownx.arithmatex has marked, converted; a tag (...) goes to the margin."""
    def convert(match):
        source = html.unescape(match[2].strip())
        block, source = source.startswith("\\["), source[2:-2]
        tag = re.search(r"\\tag\{(.*?)\}", source)
        source = re.sub(r"\\tag\{.*?\}|\\[,;](?=\s*$)", "", source).strip()
        mathml = latex2mathml.converter.convert(source, display="block" if block else "inline")
        if not block:
            return mathml
        number = f"<span>({tag[1]})</span>" if tag else ""
        return (f'<div style="display: flex; align-items: center; gap: 1em"><div style="flex: 1; '
                f'overflow: auto hidden; padding: .4em 0">{mathml}</div>{number}</div>')

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', convert, text, flags=re.DOTALL)
