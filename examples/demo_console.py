"""Starts peanut-serve on the example adapters with its console, and says what to open.

    python examples/demo_console.py BASE [--pictures FOLDER]

With --pictures, a headless Chromium logs in instead, uses the console, saves pictures of it, and the server stops.
"""

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ADAPTERS = Path(__file__).parent / "adapters"
PORT, ADMIN_PORT = 8000, 8001
CONSOLE = f"http://127.0.0.1:{ADMIN_PORT}/console"
STOP_SECONDS = 120
START_SECONDS, PATIENCE = 900, 300_000  # and milliseconds
QUESTION = "What colour is grass? Answer in one word."


def command(base: str, state: str) -> list[str]:
    """A small server in merged mode, with a state of its own."""
    program = str(Path(sys.executable).with_name("peanut-serve"))
    where = ["--port", str(PORT), "--admin-port", str(ADMIN_PORT), "--state", state]
    small = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    return [program, "--base", base, "--adapters", str(ADAPTERS), "--mode", "merged", *where, *small]


def wait_until_ready(server: "subprocess.Popen[bytes]") -> None:
    """Return when the server answers. Raises `RuntimeError` if it ends before, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start; its messages above say why")


def take_pictures(folder: Path, key: str) -> None:
    """Use the console as a person would, and save three pictures."""
    from playwright.sync_api import expect, sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise RuntimeError("pictures need Chromium: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(CONSOLE)
        page.get_by_label("Admin key").fill(key)
        page.get_by_role("button", name="Log in").click()
        for name in ("smollm2-upper", "smollm2-json"):
            page.get_by_role("button", name=f"Activate {name}").click()
            page.locator("#go").click()
            expect(page.locator("#resident")).to_have_text(name)
            expect(page.locator("#dialog")).to_be_hidden()
        page.locator("#prompt").fill(QUESTION)
        page.locator('input[name="max_tokens"]').fill("24")
        for name in ("base", "smollm2-json", "smollm2-upper"):
            box = page.locator("#choices label", has_text=name if name != "base" else "instruct").locator("input")
            box.check()
        page.locator("#ask").click()
        expect(page.locator(".answers .diff:visible")).to_have_count(2)
        page.get_by_role("button", name="Activate smollm2-json").click()
        expect(page.locator("#costs li").first).to_be_visible()
        page.screenshot(path=folder / "console-activate.png")
        page.locator("#dismiss").click()
        page.emulate_media(color_scheme="dark")
        page.locator("#memory").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('memory').scrollIntoView()")
        page.screenshot(path=folder / "console-swaps.png")
        page.emulate_media(color_scheme="light")
        page.evaluate("document.getElementById('playground').scrollIntoView()")
        page.screenshot(path=folder / "console-playground.png")
        browser.close()


def main() -> None:
    """Start the server, and wait for Ctrl-C or take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    key = os.environ.get("PEANUT_ADMIN_KEY") or secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory() as state:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "PEANUT_ADMIN_KEY": key}
        server = subprocess.Popen(command(options.base, state), env=environment)
        try:
            wait_until_ready(server)
            if options.pictures is not None:
                take_pictures(options.pictures, key)
            else:
                print(f"\nOpen {CONSOLE} and log in with the key {key}\nCtrl-C stops the server.\n", flush=True)
                server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()  # its engine ends with it


if __name__ == "__main__":
    main()
