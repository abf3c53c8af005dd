"use strict";
// Whatever a model or the server says enters the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const WORDS = { 2: "2 bits: fastest", 3: "3 bits: fast", 4: "4 bits: balanced", 8: "8 bits: best" };
let model = null;
let turns = [];
let running = null; // the AbortController of the answer that is being written
let before = null;

function bytes(n) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return (n / size).toFixed(1) + " " + unit;
  return Math.round(n) + " B";
}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = "Bearer " + key;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? "the server answers " + response.status);
  }
  return response;
}

async function connect() {
  const list = await (await call("/v1/models")).json();
  model = list.data[0];
  $("key-form").hidden = true;
  $("model").textContent = model.id + ", " + model.context.toLocaleString("en") + " tokens";
  $("hint").hidden = model.chat;
}

function turn(who, text) {
  const box = document.createElement("div");
  const name = document.createElement("b");
  const said = document.createElement("span");
  box.className = "turn";
  name.textContent = who;
  said.textContent = text;
  box.append(name, said);
  $("talk").append(box);
  $("talk").scrollTop = $("talk").scrollHeight;
  return { box, said };
}

function note(box, text, wrong) {
  const small = document.createElement("small");
  small.textContent = text;
  if (wrong) small.className = "wrong";
  box.append(small);
  $("talk").scrollTop = $("talk").scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a sign of life
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function ask(text) {
  const bits = Number($("bits").value);
  const shared = {
    model: model.id, bits, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), max_tokens: Number($("tokens").value),
  };
  turn("you", text);
  const { box, said } = turn(model.id, "");
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const begin = performance.now();
  try {
    const messages = [...turns, { role: "user", content: text }];
    const [path, body] = model.chat
      ? ["/v1/chat/completions", { ...shared, messages }]
      : ["/v1/completions", { ...shared, prompt: text }];
    let usage = null;
    for await (const event of events(await call(path, { method: "POST", body: JSON.stringify(body), signal: running.signal }))) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      said.textContent += choice?.delta?.content ?? choice?.text ?? "";
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    turns = [...messages, { role: "assistant", content: said.textContent }];
    const seconds = (performance.now() - begin) / 1000;
    if (usage) note(box, `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s at ${usage.bits.toFixed(1)} bits`);
  } catch (error) {
    note(box, error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("text").focus();
  }
}

function draw(state) {
  const canvas = $("grid");
  const rows = state.planes.length, columns = state.planes[0]?.length ?? 0;
  // A cell is drawn in whole pixels and scaled by the browser, so hundreds of experts still fit a phone.
  const size = Math.max(2, Math.min(16, Math.floor(1024 / Math.max(1, columns))));
  canvas.width = columns * size;
  canvas.height = rows * size;
  const pen = canvas.getContext("2d");
  let resident = 0, bits = 0;
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const width = Number(state.planes[row][column]), heat = Number(state.heat[row][column]);
      if (!width) continue;
      resident++;
      bits += width;
      pen.fillStyle = `hsl(${215 - heat * 20} 75% ${18 + width * 6}%)`;
      pen.fillRect(column * size, row * size, size - 1, size - 1);
    }
  const mean = resident ? (bits / resident).toFixed(1) : "0";
  canvas.setAttribute("aria-label", `${resident} of ${rows * columns} experts are in memory, with ${mean} bits on average`);
}

function offer(state) {
  const list = $("policy");
  if (list.length !== state.policies.length)
    list.replaceChildren(...state.policies.map((name) => new Option(name)));
  if (document.activeElement !== list) list.value = state.policy;
}

function show(state) {
  const now = performance.now();
  if (before) {
    const seconds = (now - before.at) / 1000;
    const rate = (name) => (state[name] - before.state[name]) / seconds;
    $("tokens-rate").textContent = rate("tokens").toFixed(1);
    $("reads-rate").textContent = rate("reads").toFixed(0);
    $("bytes-rate").textContent = bytes(rate("read_bytes"));
  }
  before = { at: now, state };
  $("hits").textContent = (100 * state.hit_rate).toFixed(1) + " %";
  $("answers").textContent = `${state.running}, ${state.waiting}`;
  $("experts").textContent = `${bytes(state.expert_bytes)} of ${bytes(state.expert_budget_bytes)}`;
  $("memory-note").textContent = `${bytes(state.resident_bytes)} of ${bytes(state.memory_bytes)}`;
  $("memory").max = state.memory_bytes;
  $("memory").value = state.resident_bytes;
  $("state").textContent = "connected";
  offer(state);
  draw(state);
}

async function watch() {
  if (!document.hidden)
    try {
      if (!model) await connect();
      show(await (await call("/admin/state")).json());
    } catch (error) {
      before = null;
      $("state").textContent = error.message;
    }
  setTimeout(watch, 1000);
}

function dial() {
  $("bits-note").value = WORDS[$("bits").value] ?? $("bits").value + " bits";
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (running || !model || !text.trim()) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("talk").replaceChildren();
  $("text").focus();
});
$("bits").addEventListener("input", dial);
$("grid").addEventListener("mousemove", (event) => {
  const state = before?.state;
  if (!state) return;
  const at = $("grid").getBoundingClientRect();
  const row = Math.floor(((event.clientY - at.top) / at.height) * state.planes.length);
  const column = Math.floor(((event.clientX - at.left) / at.width) * state.planes[0].length);
  const width = state.planes[row]?.[column];
  if (width !== undefined)
    $("cell").textContent = `Layer ${state.layers[row]}, expert ${column}: ${width} bits in memory, heat ${state.heat[row][column]} of 9`;
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  model = null;
  $("key").value = "";
  connect().catch((error) => ($("state").textContent = error.message));
});
async function control(what, value, said) {
  try {
    show(await (await call("/admin/" + what, { method: "POST", body: JSON.stringify({ [what]: value }) })).json());
    said.textContent = "set";
  } catch (error) {
    said.textContent = error.message;
  }
}
$("budget").addEventListener("submit", (event) => {
  event.preventDefault();
  control("memory", $("budget-size").value, $("budget-note"));
});
$("policy").addEventListener("change", () => control("policy", $("policy").value, $("policy-note")));
$("policy-form").addEventListener("submit", (event) => event.preventDefault());
dial();
watch();
