"""The console: the page at `/console` of the admin port, on which people see and change what a server serves.

It is HTML that the server renders with Jinja2, one style sheet and one script. Why not NiceGUI 3.18, the first
candidate: its Vue compiles templates in the browser, so that a Content-Security-Policy has to allow `unsafe-eval` and
inline styles; it keeps one global application per process and needs the lifespan events that a server inside vLLM's
loop does not send; it brings 14 packages, 26 MB of assets and a websocket into the process that holds the engine.
Its advisories of 2026 are about code injection (GHSA-78qv-3mpx-9cqq) and path traversal (CVE-2026-39844).

Streamlit brings 7 packages, Panel and Dash 12, Gradio 14, Reflex 23, and most of them a server of their own. htmx was
found in a wheel only together with Django. vLLM itself needs FastAPI and Jinja2, so this way adds no package, nothing
listens but plain HTTP, and the policy allows no inline code.
"""
