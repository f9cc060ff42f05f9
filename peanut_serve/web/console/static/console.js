// The console's behaviour: it keeps the sections current, asks before it changes anything, and streams the playground.
// Text of the server goes into the page as text; only the sections and dialogs, which the server escapes, as HTML.

const LIVE_MILLISECONDS = 2000;
const token = document.querySelector('meta[name="console-token"]').content;
const dialog = document.getElementById("dialog");
const notice = document.getElementById("notice");

function say(text, isError = false) {
  notice.textContent = text;
  notice.classList.toggle("error", isError);
  notice.hidden = text === "";
}

async function send(path, body, signal) {
  const headers = { "content-type": "application/json", "x-console-token": token };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  return checked(answer);
}

async function checked(answer) {
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
    const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
    place.innerHTML = html;
    shown.set(name, html);
    if (focused) (document.getElementById(focused) || place.querySelector("button"))?.focus();
  }
  offerVariants();
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
  if (event.target.id === "trial") tryOut(event.target);
});

// the playground

const trial = document.getElementById("trial");
const answers = document.getElementById("answers");
let running = null;

function chosenVariants() {
  return new FormData(trial).getAll("variant");
}

// variants come and go while the page is open; what is chosen stays chosen
function offerVariants() {
  const names = [...document.querySelectorAll("tr[data-variant]")].map((row) => row.dataset.variant);
  const choices = document.getElementById("choices");
  const offered = [...choices.querySelectorAll("input")].map((input) => input.value);
  if (names.join("\n") === offered.join("\n")) return;
  const chosen = chosenVariants();
  choices.replaceChildren(...names.map((name) => {
    const label = make("label", "choice");
    const input = make("input");
    Object.assign(input, { type: "checkbox", name: "variant", value: name, checked: chosen.includes(name) });
    label.append(input, ` ${name}`);
    return label;
  }));
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function column(name) {
  const article = make("article");
  const [facts, text, diff] = [make("p", "note", "waiting"), make("pre"), make("pre", "diff")];
  diff.hidden = true;
  article.append(make("h3", "", name), facts, text, diff);
  return { article, facts, text, diff, origin: "" };
}

function put(columns, event) {
  const place = columns[event.of];
  if (event.event === "start") {
    place.origin = `${event.path}, digest ${(event.digest || "unknown").slice(0, 12)}`;
    place.facts.textContent = place.origin;
  } else if (event.event === "text") {
    place.text.append(event.text);
  } else if (event.event === "error") {
    place.facts.textContent = event.message;
    place.facts.className = "error";
  } else if (event.event === "end") {
    const first = event.first_seconds === null ? "no token" : `first token after ${event.first_seconds.toFixed(2)} s`;
    place.facts.textContent = `${place.origin}; ${first}, ${event.seconds.toFixed(2)} s in all`;
  } else if (event.event === "diff") {
    const tags = { same: "span", gone: "del", new: "ins" };
    const isSame = event.parts.every(([kind]) => kind === "same");
    place.diff.append(make("strong", "", isSame ? "The same as the first answer." : "Differences from the first:\n"));
    if (!isSame) place.diff.append(...event.parts.map(([kind, text]) => make(tags[kind], "", text)));
    place.diff.hidden = false;
  }
}

async function tryOut(form) {
  const fields = new FormData(form);
  const variants = chosenVariants();
  if (variants.length < 1 || variants.length > 3) return say("Choose two or three variants to compare.", true);
  const numbers = { max_tokens: Number(fields.get("max_tokens")), temperature: Number(fields.get("temperature")) };
  const body = { prompt: fields.get("prompt"), variants, ...numbers, chat: fields.has("chat") };
  const columns = variants.map(column);
  answers.replaceChildren(...columns.map((one) => one.article));
  running = new AbortController();
  busy(true);
  try {
    const answer = await send("/console/playground", body, running.signal);
    await eachLine(answer.body, (line) => put(columns, JSON.parse(line)));
    say("");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    busy(false);
  }
}

function busy(isBusy) {
  document.getElementById("ask").disabled = isBusy;
  document.getElementById("stop").hidden = !isBusy;
  answers.setAttribute("aria-busy", String(isBusy));
}

async function eachLine(stream, use) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    lines.forEach(use);
  }
}

trial.addEventListener("change", async () => {
  const query = new URLSearchParams(chosenVariants().map((name) => ["name", name]));
  const answer = await fetch(`/console/comparison?${query}`).then(checked).catch(() => null);
  if (answer) document.getElementById("comparison-cost").textContent = (await answer.json()).cost;
});
document.getElementById("stop").addEventListener("click", () => running?.abort());

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
