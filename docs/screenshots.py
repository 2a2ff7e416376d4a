"""Draws the pictures of the README and of the other pages: the selection page, and the tree in the terminal.

    python docs/screenshots.py

Needs Chromium and the extra `test`. BERT base is given as shapes; nothing is downloaded.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright
from transformers import BertConfig, FlaxBertForSequenceClassification

import jdelta
from jdelta.display import interactive
from jdelta.display.interactive.cost import costs, format_arguments

DOCS = Path(__file__).parent
PICTURES = {
    "page.png": {"width": 1200, "height": 860, "scheme": "light"},
    "page_dark.png": {"width": 1200, "height": 860, "scheme": "dark"},
    "page_phone.png": {"width": 390, "height": 800, "scheme": "light"},
}

CHOICES = {"query": "Enter", "value": "Enter", r"[r][0-3]\.attention\.self\.value": "Shift+Enter"}


def bert():
    return FlaxBertForSequenceClassification(BertConfig(), _do_init=False)


def draw_page(folder):
    state = interactive._unattached(bert(), jdelta.LoraModel, {"lora_r": 4})
    found = costs(state)
    titles = {"model": "FlaxBertForSequenceClassification", "method": "LoraModel"}
    page = interactive.describe(
        state.structure, dict(found.reasons), found, **titles, arguments=format_arguments(state.method)
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with (
        sync_playwright() as playwright,
        interactive.Server(lambda nonce: interactive.document(page, nonce), "127.0.0.1", True) as server,
    ):
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, look in PICTURES.items():
            size = {"width": look["width"], "height": look["height"]}
            tab = browser.new_page(viewport=size, color_scheme=look["scheme"])
            tab.goto(server.url)
            for pattern, keys in CHOICES.items():
                tab.fill("#pattern", pattern)
                tab.press("#pattern", keys)
            tab.fill("#pattern", r"[r]self\.(query|value)")
            tab.screenshot(path=folder / name)
            tab.close()
        browser.close()


def draw_tree(folder):
    model = bert()
    delta = jdelta.LoraModel(model, ["query", "value"], lora_r=4, unfrozen_modules=["classifier"])
    delta.visualization().to_svg(folder / "tree.svg")


if __name__ == "__main__":
    draw_page(DOCS)
    draw_tree(DOCS)
