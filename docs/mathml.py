"""For the built site: formulas as MathML, which browsers draw by themselves, without scripts.

The pages write formulas as code hosts read them: a block as ```math, within a line as $x$, or as
$`x`$ where x holds what Markdown would take for its own. The font is for readers whose system has
none for mathematics: without one, brackets do not grow and sums are small.
"""

import html
import re
import shutil
from importlib import resources
from pathlib import Path

import latex2mathml.converter

FONT = "STIXTwoMath-Regular.ttf"  # SIL Open Font License
BAR = r'<mo(?: stretchy="false")?>&#x0007C;</mo>'
ABSOLUTE = (r'<mo form="prefix" stretchy="false">|</mo>\1'
            r'<mo form="postfix" stretchy="false">|</mo>')
THIN = '<mspace width="0.167em" />'


def on_page_markdown(text, **_):
    """To the one form that pymdownx.arithmatex knows."""
    text = re.sub(r"^```math\n(.*?)^```$", r"$$\n\1$$", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\$`([^`\n]+)`\$", r"$\1$", text)


def on_page_content(text, **_):
    """What arithmatex has marked, converted; a tag goes to the margin."""
    def convert(match):
        source = html.unescape(match[2].strip())
        block, source = source.startswith("\\["), source[2:-2]
        tag = re.search(r"\\tag\{(.*?)\}", source)
        source = re.sub(r"\\tag\{.*?\}", "", source).strip()
        mathml = latex2mathml.converter.convert(source, display="block" if block else "inline")
        mathml = re.sub(r"(<mi>log</mi>)(?!<mo stretchy=\"false\">)", rf"\1{THIN}", mathml)
        mathml = mathml.replace('<mo movablelimits="true">Pr</mo>', "<mi>Pr</mi>")
        mathml = mathml.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
        mathml = re.sub(f"{BAR}(.*?){BAR}", ABSOLUTE, mathml)
        if not block:
            return mathml
        number = f"<span>({tag[1]})</span>" if tag else ""
        return f'<div class="equation"><div>{mathml}</div>{number}</div>'

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', convert, text, flags=re.DOTALL)


def on_post_build(config):
    """Lay the font beside pages.css."""
    with resources.as_file(resources.files("ziamath") / "fonts" / FONT) as path:
        shutil.copy(path, Path(config["site_dir"], FONT))
