"""Check the built site in _docs: `make docs` runs this after tools/build_docs.py.

Links: every link and anchor within the site leads somewhere; links to elsewhere are listed, never followed. Screenshots: each page in headless chromium at desktop and phone width; an empty page, raw markup, an
image that is not there, anything wider than the phone, a console error or a request to another machine fails. Without chromium (Debian: `apt install chromium`) that half is left out, in words."""
import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE, SHOTS = ROOT / "_docs", ROOT / "_screenshots"
WIDTHS = {"desktop": 1280, "phone": 390}
TILE = 4000  # pixels: the height of one picture of a long page
ELSEWHERE = ("http://", "https://", "mailto:")
CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "chrome"]
# Quiet, offline, in a profile of its own; a name other than this machine's is not even looked up
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-allow-origins=*", "--remote-debugging-port=0"]


class Page(HTMLParser):
    "The links, images and ids of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("name"): self.ids.add(attrs["name"])
        for key in ("href", "src"):
            if attrs.get(key) and not attrs[key].startswith(("data:", "javascript:")) and tag not in ("meta",): self.links.append(attrs[key])


def check_links(site):
    "(what is wrong, addresses elsewhere): a line for each link or anchor within `site` that leads nowhere; the rest as address -> pages."
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    wrong, elsewhere = [], {}
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        for link in page.links:
            if link.startswith(ELSEWHERE):
                elsewhere.setdefault(link, []).append(here)
                continue
            address, anchor = urldefrag(link)
            target = path if not address else (site / unquote(urlsplit(address).path).lstrip("/") if address.startswith("/") else path.parent / unquote(urlsplit(address).path)).resolve()
            if target.is_dir(): target = target / "index.html"
            if not target.is_file() or not target.is_relative_to(site): wrong.append(f"{here}: {link} leads nowhere")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids | {"", "top"}: wrong.append(f"{here}: {link}: the page has no such anchor")
    return wrong, elsewhere


# The browser --------------------------------------------------------------------------------------------------------

# What a reader would stumble over, asked of the page itself. Code is not searched for markup, but for nbdev's directives
LOOK = r"""(() => {
  const main = document.querySelector('main') || document.body, text = [], wrong = [], W = document.documentElement.clientWidth;
  const walk = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const n = walk.currentNode; if (!n.parentElement.closest('pre,code,script,style,math,template')) text.push(n.data); }
  const all = text.join(' ');
  for (const [mark, re] of [['$$', /\$\$/], ['$...$', /\$[^$\s][^$]*[^$\s]\$/], ['\\( or \\[', /\\[(\[]/], [':::', /:::/], ['{{<', /\{\{</], ['**', /\*\*/], ['#|', /#\|/], ['](', /\]\(/], ['|---|', /\|\s*-{3,}/]]) {
    const m = all.match(re); if (m) wrong.push(`raw markup ${mark} in "${all.slice(Math.max(0, m.index - 40), m.index + 40).replace(/\s+/g, ' ')}"`);
  }
  for (const c of main.querySelectorAll('pre')) { const m = c.innerText.match(/^#\|.*$/m); if (m) wrong.push(`an nbdev directive in a code cell: ${m[0]}`); }
  if (main.innerText.trim().length < 200) wrong.push(`an empty page: ${main.innerText.trim().length} characters`);
  if (document.querySelectorAll('h1').length != 1) wrong.push(`${document.querySelectorAll('h1').length} titles`);
  for (const re of [/\bat 0x[0-9a-f]{6,}/, /\S*\/site-packages\/\S*/, /__main__\.\w+/]) { const m = main.innerText.match(re); if (m) wrong.push(`what only this machine knows: ${m[0]}`); }
  { const m = all.match(/\b[A-Z]{4,}(_[A-Z]{2,})+\b/); if (m) wrong.push(`a placeholder: ${m[0]}`); }
  for (const c of main.querySelectorAll('pre')) if (W >= 1000 && c.querySelector('code.sourceCode') && c.scrollWidth > c.clientWidth + 1) wrong.push(`code that is cut: ${c.innerText.slice(0, 60)}`);
  for (const i of document.images) if (i.complete && !i.naturalWidth) wrong.push(`an image that is not there: ${i.src.slice(0, 80)}`);
  const inBox = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return true; };
  if (document.documentElement.scrollWidth > window.innerWidth) {
    const out = [...main.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > W + 1 && !inBox(e)).slice(0, 3).map(e => `<${e.tagName.toLowerCase()} class="${e.className}"> ${(e.innerText || '').slice(0, 40).replace(/\s+/g, ' ')}`);
    wrong.push(`${document.documentElement.scrollWidth} pixels wide in a window of ${window.innerWidth}: ${out.join('; ')}`);
  }
  return {wrong, height: Math.ceil(document.documentElement.scrollHeight)};
})()"""


class Browser:
    "Headless chromium, spoken to over the DevTools protocol; use as a context."
    def __init__(self, path): self.path, self.n, self.events = path, 0, []

    def __enter__(self):
        import websocket
        self.profile = tempfile.mkdtemp()
        self.process = subprocess.Popen([self.path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(self.profile) / "DevToolsActivePort"
        for _ in range(300):
            if port.is_file() and len(port.read_text().splitlines()) == 2: break
            time.sleep(0.1)
        else: raise RuntimeError(f"{self.path} did not start within 30 s.")
        number = port.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list") as r: tab = next(t for t in json.load(r) if t["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60)
        for domain in ("Page", "Runtime", "Log", "Network"): self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method, **params):
        "Send one command and wait for its answer; events on the way are kept."
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") != self.n: self.events.append(message); continue
            if "error" in message: raise RuntimeError(f"{method}: {message['error']}")
            return message["result"]

    def wait(self, event):
        "Until `event` has come."
        while not any(e.get("method") == event for e in self.events): self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, code):
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer: raise RuntimeError(str(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def complaints(self):
        "Console errors, uncaught exceptions and failed requests since the last page."
        found = []
        for e in self.events:
            p = e.get("params", {})
            if e.get("method") == "Runtime.exceptionThrown": found.append(f"an exception: {p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])[:200]}")
            if e.get("method") == "Runtime.consoleAPICalled" and p["type"] == "error": found.append(f"console: {' '.join(str(a.get('value', a.get('description'))) for a in p['args'])[:200]}")
            if e.get("method") == "Log.entryAdded" and p["entry"]["level"] == "error": found.append(f"console: {p['entry']['text'][:160]} {p['entry'].get('url', '')}")
        return found

    def visit(self, url, width, dark=False):
        "Load a page in a window of `width`: what is wrong with it, and its height."
        self.events = []
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844 if width < 600 else 900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Page.navigate", url=url)
        self.wait("Page.loadEventFired")
        self.evaluate("document.fonts.ready.then(() => new Promise(r => setTimeout(r, 50)))")
        seen = self.evaluate(LOOK)
        return seen["wrong"] + self.complaints(), seen["height"]

    def shoot(self, path, width, height):
        "The page as PNGs of at most TILE pixels' height: `path`, then `-2`, `-3`..."
        for i, top in enumerate(range(0, height, TILE)):
            clip = dict(x=0, y=top, width=width, height=min(TILE, height - top), scale=1)
            data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
            (path if not i else path.with_stem(f"{path.stem}-{i + 1}")).write_bytes(base64.b64decode(data))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def check_pages(site, shots, chromium, only=""):
    "A line for each thing wrong with a page as the browser shows it; screenshots in `shots`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wrong = []
    try:
        with Browser(chromium) as browser:
            for page in sorted(site.rglob("*.html")):
                name = page.relative_to(site).as_posix()
                if only not in name: continue
                for kind, width, dark in [*((k, w, False) for k, w in WIDTHS.items()), ("dark", WIDTHS["desktop"], True)]:
                    found, height = browser.visit(f"http://127.0.0.1:{server.server_port}/{name}", width, dark)
                    wrong += [f"{name} ({kind}): {f}" for f in found]
                    target = shots / kind / name.replace("/", "_").replace(".html", ".png")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    browser.shoot(target, width, height)
    finally: server.shutdown()
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--shots", type=Path, default=SHOTS, help="folder for the screenshots; it is emptied first")
    parser.add_argument("--only", default="", help="only pages whose name has this in it")
    parser.add_argument("--external", action="store_true", help="list the links to elsewhere")
    args = parser.parse_args()
    site, start = args.site.resolve(), time.perf_counter()
    if not (site / "index.html").is_file(): sys.exit(f"There is no site in {site}; run tools/build_docs.py first.")
    wrong, elsewhere = check_links(site)
    if args.external: print("\n".join(f"{link}  ({len(pages)} times, e.g. {pages[0]})" for link, pages in sorted(elsewhere.items())))
    print(f"links: {len(wrong)} broken; {len(elsewhere)} addresses elsewhere, not followed")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None: print("screenshots: left out, for there is no chromium (Debian and Ubuntu: apt install chromium)")
    else:
        shutil.rmtree(args.shots, ignore_errors=True)
        found = check_pages(site, args.shots, chromium, args.only)
        print(f"screenshots: {len(list(args.shots.rglob('*.png')))} in {os.path.relpath(args.shots, ROOT)}; {len(found)} things wrong; {time.perf_counter() - start:.0f} s")
        wrong += found
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
