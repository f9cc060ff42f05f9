// What every console does: it keeps the sections current, and asks before it changes anything.
// Text of the server goes into the page as text; only the sections and dialogs, which the server escapes, as HTML.

const LIVE_MILLISECONDS = 2000;
export const token = document.querySelector('meta[name="console-token"]').content;
const dialog = document.getElementById("dialog");
const notice = document.getElementById("notice");

export function say(text, isError = false) {
  notice.textContent = text;
  notice.classList.toggle("error", isError);
  notice.hidden = text === "";
}

export async function send(path, body, signal) {
  const headers = { "content-type": "application/json", "x-console-token": token };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  return checked(answer);
}

export async function checked(answer) {
  if (answer.status === 401) location.assign("/console/login");
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  throw new Error(found.error || `the server answered ${answer.status}`);
}

// live sections: only those that changed are replaced, and the focus stays where it was

const shown = new Map();
let isLost = false;

function show(sections) {
  for (const [name, html] of Object.entries(sections)) {
    const place = document.querySelector(`.live[data-section="${name}"]`);
    if (!place || shown.get(name) === html) continue;
    const focused = place.contains(document.activeElement) ? document.activeElement : undefined;
    place.innerHTML = html;
    shown.set(name, html);
    if (focused) (document.getElementById(focused.id) || ofTheSame(focused, place))?.focus();
  }
  document.dispatchEvent(new Event("sections"));
}

// when a button has gone, the focus stays with its variant: never at another's
function ofTheSame(button, place) {
  return place.querySelector(`button[data-name="${CSS.escape(button.dataset.name ?? "")}"]`);
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await checked(await fetch("/console/live", { signal: AbortSignal.timeout(10000) }));
    show(await answer.json());
    if (isLost) say("");
    isLost = false;
  } catch (error) {
    isLost = true;
    say(`The server has not answered since ${new Date().toLocaleTimeString()}: ${error.message}`, true);
  }
}

async function keepCurrent() {
  await refresh();
  setTimeout(keepCurrent, LIVE_MILLISECONDS);
}

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// actions, each after a dialog that says what it costs

let opener = "";

async function ask(button) {
  opener = button.id;
  const query = new URLSearchParams({ verb: button.dataset.verb });
  if (button.dataset.name !== undefined) query.set("name", button.dataset.name);
  if (button.dataset.digest !== undefined) query.set("digest", button.dataset.digest);
  try {
    const answer = await checked(await fetch(`/console/dialog?${query}`));
    dialog.innerHTML = await answer.text();
    dialog.showModal();
  } catch (error) {
    say(error.message, true);
  }
}

async function confirmed(form) {
  const fields = new FormData(form);
  const action = { verb: form.dataset.verb, name: fields.get("name") };
  for (const key of ["source", "digest"]) if (fields.has(key)) action[key] = fields.get(key);
  for (const key of ["hold", "drain"]) if (fields.has(key)) action[key] = true;
  const [go, error, working] = ["go", "dialog-error", "dialog-working"].map((id) => form.querySelector(`#${id}`));
  go.disabled = true;
  working.hidden = false;
  error.hidden = true;
  try {
    const answer = await send("/console/act", action);
    show(await answer.json());
    if (form.isConnected) dialog.close();
    say(`Done: ${form.querySelector("#dialog-title").textContent}.`);
  } catch (failure) {
    error.textContent = failure.message;
    error.hidden = false;
    if (!form.isConnected || !dialog.open) say(failure.message, true);
    await refresh();
  } finally {
    go.disabled = false;
    working.hidden = true;
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.verb) ask(button);
  if (button?.id === "dismiss") dialog.close();
});
dialog.addEventListener("close", () => document.getElementById(opener)?.focus());
document.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.target.id === "confirm") confirmed(event.target);
});

// theme and session

const themeButton = document.getElementById("theme");
function nameTheme() {
  themeButton.textContent = `Theme: ${document.documentElement.dataset.theme || "auto"}`;
}
themeButton.addEventListener("click", () => {
  const next = { auto: "light", light: "dark", dark: "auto" }[document.documentElement.dataset.theme || "auto"];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  nameTheme();
});
document.getElementById("logout").addEventListener("click", async () => {
  await send("/console/logout", {}).catch(() => null);
  location.assign("/console/login");
});

nameTheme();
keepCurrent();
