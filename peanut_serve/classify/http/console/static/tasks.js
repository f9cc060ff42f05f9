// The playground of a server of tasks: one image, sound or text, answered by several tasks side by side.

import { checked, make, say, token } from "/console/static/console.js";

const trial = document.getElementById("trial");
const answers = document.getElementById("answers");

function chosenTasks() {
  return new FormData(trial).getAll("task");
}

// tasks come while the page is open; what is chosen stays chosen
function offerTasks() {
  const names = [...document.querySelectorAll("tr[data-task]")].map((row) => row.dataset.task);
  const choices = document.getElementById("choices");
  const offered = [...choices.querySelectorAll("input")].map((input) => input.value);
  if (names.join("\n") === offered.join("\n")) return;
  const chosen = chosenTasks();
  choices.replaceChildren(...names.map((name) => {
    const label = make("label", "choice");
    const input = make("input");
    Object.assign(input, { type: "checkbox", name: "task", value: name, checked: chosen.includes(name) });
    label.append(input, ` ${name}`);
    return label;
  }));
}

// a file as it is; texts as JSON, a pair by the names that the task gives its two texts
function inputOf(fields, does) {
  const file = fields.get("file");
  if (file && file.size) return { body: file, type: file.type || "application/octet-stream" };
  const [text, context] = [fields.get("text"), fields.get("context")];
  const pair = does === "question-answering" ? { question: text, context } : { text, text_pair: context };
  return { body: JSON.stringify({ inputs: context ? pair : text }), type: "application/json" };
}

function show(place, found) {
  const rows = Array.isArray(found) && Array.isArray(found[0]) && found.length === 1 ? found[0] : found;
  const elements = Array.isArray(rows) ? rows : [rows];
  if (elements.length && typeof elements[0] !== "object") {
    const first = elements.slice(0, 8).map((one) => one.toFixed(4)).join(", ");
    place.text.textContent = `${elements.length} numbers: ${first}${elements.length > 8 ? ", ..." : ""}`;
    return;
  }
  place.text.textContent = elements.map((one) => {
    const name = one.label ?? one.answer ?? `${one.entity_group ?? one.entity}: ${one.word}`;
    return one.score === undefined ? JSON.stringify(one).slice(0, 200) : `${one.score.toFixed(4)}  ${name}`;
  }).join("\n") || "nothing found";
}

async function ask(name, fields, place) {
  const does = document.querySelector(`tr[data-task="${CSS.escape(name)}"] td[data-label="Does"]`)?.textContent;
  const { body, type } = inputOf(fields, does);
  const start = performance.now();
  try {
    const headers = { "content-type": type, "x-console-token": token };
    const query = new URLSearchParams({ name });
    const answer = await checked(await fetch(`/console/playground?${query}`, { method: "POST", headers, body }));
    show(place, await answer.json());
    const digest = (answer.headers.get("x-peanut-digest") || "unknown").slice(0, 12);
    place.facts.textContent = `digest ${digest}; ${((performance.now() - start) / 1000).toFixed(2)} s`;
  } catch (error) {
    place.facts.textContent = error.message;
    place.facts.className = "error";
  }
}

async function tryOut(form) {
  const [fields, tasks] = [new FormData(form), chosenTasks()];
  if (tasks.length < 1 || tasks.length > 3) return say("Choose one to three tasks.", true);
  say("");
  const places = tasks.map((name) => {
    const [article, facts, text] = [make("article"), make("p", "note", "waiting"), make("pre")];
    article.append(make("h3", "", name), facts, text);
    return { article, facts, text };
  });
  answers.replaceChildren(...places.map((place) => place.article));
  const button = document.getElementById("ask");
  button.disabled = true;
  await Promise.all(tasks.map((name, index) => ask(name, fields, places[index])));
  button.disabled = false;
}

document.addEventListener("sections", offerTasks);
document.addEventListener("submit", (event) => {
  if (event.target.id === "trial") tryOut(event.target);
});
