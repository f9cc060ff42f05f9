// The playground of a server of variants: one prompt, answered by several, streamed side by side.

import { checked, make, say, send } from "./console.js";

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
document.addEventListener("sections", offerVariants);
document.addEventListener("submit", (event) => {
  if (event.target.id === "trial") tryOut(event.target);
});
