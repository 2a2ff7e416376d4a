"""The selection page on a model of 3,000 modules: how long until it is seen, and until a keystroke is answered.

    python benchmarks/interactive_page.py

Needs Chromium and the extra `test`. Two models: a Transformer of 230 equal layers, which the page collapses into one,
and one whose layers all differ, all expanded, which is the worst case. Times are measured in the browser: the first
paint from the start of navigation, a keystroke from its event to the frame that shows its result.
"""

import os
import shutil
import statistics
import time

import jax.numpy as jnp
from flax import linen as nn
from playwright.sync_api import sync_playwright

import jdelta
from jdelta.display import interactive
from jdelta.display.interactive.cost import costs

LAYERS = 230
KEYS = ["attention.query", "29.attention.value", "mlp.up", r"[r]layers_1\d\d\.attention\.(query|value)", "x"]

FIRST_PAINT = """() => new Promise((done) => new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (entry.name === "first-contentful-paint") done(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""

KEYSTROKE = """async (text) => {
  const input = document.getElementById("pattern"), frame = () => new Promise((next) => requestAnimationFrame(next));
  const times = [];
  for (let i = 1; i <= text.length; i++) {
    await frame(); await frame();
    const start = performance.now();
    input.value = text.slice(0, i);
    input.dispatchEvent(new Event("input"));
    canvas.getBoundingClientRect();
    const done = performance.now();
    await frame();
    await new Promise((next) => { const c = new MessageChannel(); c.port1.onmessage = next; c.port2.postMessage(0); });
    times.push([done - start, performance.now() - start]);
  }
  return times;
}"""


class Attention(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(self.width, name=name)(x) for name in ("query", "key", "value"))
        return nn.Dense(x.shape[-1], name="output")(q * k + v)


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(self.width, name="up")(x)))


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.width, name="attention")(nn.LayerNorm(name="norm_1")(x))
        x = x + Mlp(4 * self.width, name="mlp")(nn.LayerNorm(name="norm_2")(x))
        return nn.Dropout(0.1, name="dropout", deterministic=True)(nn.LayerNorm(name="norm_3")(x))


class Transformer(nn.Module):
    alike: bool

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = Layer(8 if self.alike else 8 + i, name=f"layers_{i}")(x)
        return nn.Dense(2, name="head")(x)


def main():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for alike in (True, False):
            measure(browser, alike)
        browser.close()


def measure(browser, alike):
    backbone = jdelta.Backbone(Transformer(alike), None, dummy_inputs=(jnp.ones((1, 8)),))
    state = interactive._unattached(backbone, jdelta.LoraModel, {"lora_r": 2})
    start = time.perf_counter()
    found = costs(state)
    priced = time.perf_counter() - start
    page = interactive.describe(
        state.structure, dict(found.reasons), found, model="m", method="LoraModel", arguments=""
    )
    described = time.perf_counter() - start - priced
    with interactive.Server(lambda nonce: interactive.document(page, nonce), "127.0.0.1", True) as server:
        paints, counts = [], 0
        for _ in range(5):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(server.url, wait_until="load")
            tab.locator(".row").first.wait_for()
            paints.append(tab.evaluate(FIRST_PAINT))
            if len(paints) < 5:
                tab.close()
        if not alike:  # every row open
            tab.evaluate(
                "() => { const all = (n) => { open.add(n.key); below(n).forEach(all); }; all(root); layOut(); draw(); }"
            )
        counts = tab.evaluate("[N - 1, rows.length, document.querySelectorAll('.row').length]")
        times = [pair for text in KEYS for pair in tab.evaluate(KEYSTROKE, text)]
        select = tab.evaluate(
            "() => { const t = performance.now(); set(M.keys(), true); return performance.now() - t }"
        )
        tab.close()
    work, shown = sorted(t[0] for t in times), sorted(t[1] for t in times)
    print(f"\n{'equal layers, collapsed' if alike else 'layers that all differ, everything open'}")
    print(f"  modules {counts[0]:,}, lines {counts[1]:,}, of these in the document {counts[2]}")
    print(f"  Python: costs {priced:.2f} s, description {described:.2f} s")
    print(f"  first paint    median {statistics.median(paints):.0f} ms, worst of 5 {max(paints):.0f} ms")
    print(f"  keystroke      median {statistics.median(work):.1f} ms, worst of {len(work)} {work[-1]:.1f} ms")
    print(f"    to its frame median {statistics.median(shown):.1f} ms, worst {shown[-1]:.1f} ms")
    print(f"  selecting everything {select:.0f} ms")


if __name__ == "__main__":
    main()
