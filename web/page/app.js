// The page: controls -> state -> pictures of every model, one after another, each one timed.

import { checkedWebGPU, loadMappings, loadSyntheses, toPixels, whyNoWebGPU } from "./models.js";
import { median, onCircle, randomZ, wPlus } from "./latents.js";

const STEP = 0.02; // radians of a walk's circle for each picture
const KEPT = 25; // times that a speed is the median of
const WARM_UP = 12;
const PATIENCE = 1000; // milliseconds at most for the speed of a backend
const [FIRST, PARTNER] = [6, 9]; // faces at the start
const TITLES = { teacher: "Teacher", compressed: "Compressed" };
const RANGES = { coarse: "coarse: pose and shape", middle: "middle: features", fine: "fine: colours" };

const $ = (id) => document.getElementById(id);
const state = { z: null, partner: null, psi: 0.7, amounts: [], mixed: [], walk: null };
let data, names, mappings, backends, views;
let seed = 1;
let dirty = true;

/** An element with properties and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function count(n) {
  return n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : `${Math.round(n / 1e3)} k`;
}

/** The card of a model: its picture, its costs, and its speed, which is filled in later. */
function makeView(model) {
  const canvas = make("canvas", { width: model.size, height: model.size });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Face made by the ${model.name} model`);
  const [rate, time] = [make("strong", { textContent: "–" }), make("span", { className: "time" })];
  const cost = make("div", { className: "cost" }, make("i"));
  cost.firstChild.style.width = `${(100 * model.macs) / data.models[0].macs}%`;
  const card = make(
    "figure", { id: model.name }, canvas,
    make("figcaption", {},
      make("h2", { textContent: TITLES[model.name] ?? model.name }),
      make("p", { className: "rate" }, rate, " images/s ", time),
      cost,
      make("p", { className: "facts", textContent:
        `${count(model.macs)} MACs · ${count(model.parameters)} parameters · ${(model.bytes / 1e6).toFixed(1)} MB` }),
    ),
  );
  $("pictures").append(card);
  return { model, canvas, rate, time, times: [] };
}

function slider(label, share, change) {
  const output = make("output");
  const input = make("input", { type: "range", min: -3, max: 3, step: 0.1, value: 0 });
  input.addEventListener("input", () => {
    output.textContent = Number(input.value).toFixed(1);
    change(Number(input.value));
  });
  output.textContent = "0.0";
  return make("label", { className: "slider" }, make("span", { textContent: `${label} · ${share}` }), input, output);
}

/** A strip of faces to choose one from. */
function fillStrip(strip, name, chosen, choose) {
  const size = data.models[0].size;
  return data.z.map((z, i) => {
    const canvas = make("canvas", { width: size, height: size });
    const radio = make("input", { type: "radio", name, value: i, checked: i === chosen });
    radio.setAttribute("aria-label", `Face ${i + 1}`);
    radio.addEventListener("change", () => choose(Float32Array.from(z)));
    strip.append(make("label", {}, radio, canvas));
    return canvas;
  });
}

function makeControls() {
  data.shares.forEach((share, k) => {
    state.amounts[k] = 0;
    const label = slider(`${k + 1}`, `${Math.round(100 * share)} %`, (value) => {
      state.amounts[k] = value;
      dirty = true;
    });
    $("directions").append(label);
  });
  for (const [group, layers] of Object.entries(data.layers)) {
    const box = make("input", { type: "checkbox", value: group });
    box.addEventListener("change", () => {
      state.mixed = state.mixed.filter((other) => other !== layers);
      if (box.checked) state.mixed.push(layers);
      dirty = true;
    });
    $("groups").append(make("label", {}, box, make("span", { textContent: RANGES[group] ?? group })));
  }
  $("psi").addEventListener("input", showPsi);
  $("walk").addEventListener("click", () => setWalk(!state.walk));
  $("another").addEventListener("click", () => {
    document.querySelectorAll("#faces input").forEach((radio) => { radio.checked = false; });
    setFace(randomZ(seed += 1, state.z.length));
  });
  $("reset").addEventListener("click", reset);
  $("backend").addEventListener("change", () => setBackend($("backend").value));
}

function showPsi() {
  state.psi = Number($("psi").value);
  document.querySelector("output[for=psi]").textContent = state.psi.toFixed(2);
  dirty = true;
}

function setFace(z) {
  setWalk(false);
  state.z = z;
  dirty = true;
}

/** Start or stop a walk from the present face; where it stops is the next face. */
function setWalk(walking) {
  state.walk = walking ? { from: state.z, through: randomZ(seed += 1, state.z.length), angle: 0 } : null;
  if (walking) document.querySelectorAll("#faces input").forEach((radio) => { radio.checked = false; });
  $("walk").setAttribute("aria-pressed", String(walking));
  $("walk").textContent = walking ? "Stop" : "Walk";
}

function reset() {
  document.querySelectorAll("#directions input").forEach((input) => {
    input.value = 0;
    input.dispatchEvent(new Event("input"));
  });
  document.querySelectorAll("#groups input:checked").forEach((box) => box.click());
  $("psi").value = 0.7;
  showPsi();
  document.querySelectorAll("#faces input")[FIRST].click();
}

/** The present w+ of a model; `state` may not change in between, so it is copied first. */
async function latentOf(index, now) {
  const map = mappings[names[index]];
  const [w, partner] = [await map(now.z), now.mixed.length ? await map(now.partner) : null];
  return wPlus(w, partner, data.models[0].n_latent, now.mixed, data.directions[index], now.amounts);
}

async function draw(view, index, now) {
  const w = await latentOf(index, now);
  const { values, ms } = await synthesise(view.model.name, w, now.psi);
  view.canvas.getContext("2d").putImageData(toPixels(values, view.model.size), 0, 0);
  view.times = [...view.times, ms].slice(-KEPT);
}

/** Run a model on the chosen backend, on WebAssembly from then on if that breaks down. */
async function synthesise(name, w, psi) {
  const backend = $("backend").value;
  try {
    return await backends[backend][name](w, psi);
  } catch (error) {
    if (backend === "wasm") throw error;
    $("backend-note").textContent = "WebGPU broke down; WebAssembly goes on.";
    document.querySelector("#backend option[value=webgpu]").remove();
    setBackend("wasm");
    return backends.wasm[name](w, psi);
  }
}

function showSpeeds() {
  for (const view of views) {
    const ms = median(view.times);
    view.rate.textContent = Math.round(1000 / ms);
    view.time.textContent = `${ms.toFixed(1)} ms`;
  }
  const [slow, fast] = views.map((view) => median(view.times));
  $("status").textContent = `Compressed: ${(slow / fast).toFixed(1)} times as fast`;
}

/** Draw every model whenever something has changed, and all the time on a walk. */
async function loop() {
  if (state.walk) {
    state.walk.angle += STEP;
    state.z = onCircle(state.walk.from, state.walk.through, state.walk.angle);
    dirty = true;
  }
  if (dirty) {
    dirty = false;
    document.body.dataset.state = "drawing";
    const now = { ...state, amounts: [...state.amounts], mixed: [...state.mixed] };
    for (const [index, view] of views.entries()) await draw(view, index, now);
    showSpeeds();
  }
  if (!dirty) document.body.dataset.state = "idle";
  requestAnimationFrame(() => loop().catch(fail));
}

/** Pictures of the strips, by the first model. */
async function drawStrips(strips) {
  const { name, size, n_latent: nLatent } = data.models[0];
  for (const [i, z] of data.z.entries()) {
    const w = await mappings[name](Float32Array.from(z));
    const { values } = await backends.wasm[name](wPlus(w, w, nLatent, [], [], []), 0.7);
    for (const strip of strips) strip[i].getContext("2d").putImageData(toPixels(values, size), 0, 0);
  }
}

/** Offer WebGPU if there is one that agrees, and take it where it is faster. */
async function addWebGPU() {
  const reason = await whyNoWebGPU();
  const now = { ...state, mixed: [], amounts: state.amounts.map(() => 0) };
  const latents = {};
  for (const [index, name] of names.entries()) latents[name] = await latentOf(index, now);
  const { syntheses, note } = reason
    ? { syntheses: null, note: reason }
    : await checkedWebGPU(backends.wasm, latents, data.models[0].n_latent);
  $("backend-note").textContent = `${syntheses ? "WebGPU agrees" : "WebGPU is not used"}: ${note}.`;
  if (!syntheses) return;
  backends.webgpu = syntheses;
  $("backend").append(make("option", { value: "webgpu", textContent: "WebGPU" }));
  const [wasm, webgpu] = [await speed("wasm", latents), await speed("webgpu", latents)];
  setBackend(webgpu < wasm ? "webgpu" : "wasm");
}

/** Median milliseconds for the pictures of all models. */
async function speed(backend, latents) {
  const times = [];
  const end = performance.now() + PATIENCE;
  while (times.length < WARM_UP && (times.length === 0 || performance.now() < end)) {
    let sum = 0;
    for (const name of names) sum += (await backends[backend][name](latents[name], 1)).ms;
    times.push(sum);
  }
  return median(times);
}

function setBackend(backend) {
  $("backend").value = backend;
  views.forEach((view) => { view.times = []; });
  dirty = true;
}

function fail(error) {
  document.body.dataset.state = "error";
  $("error").textContent = `The page could not go on: ${error.message ?? error}`;
  $("error").classList.add("shown");
  $("status").textContent = "";
  throw error;
}

async function start() {
  const answer = await fetch("data.json");
  if (!answer.ok) throw new Error(`data.json: ${answer.status}; build the page by make web`);
  data = await answer.json();
  names = data.models.map((model) => model.name);
  [state.z, state.partner] = [FIRST, PARTNER].map((face) => Float32Array.from(data.z[face]));
  views = data.models.map(makeView);
  makeControls();
  const strips = [
    fillStrip($("faces"), "face", FIRST, setFace),
    fillStrip($("partners"), "partner", PARTNER, (z) => { state.partner = z; dirty = true; }),
  ];
  mappings = await loadMappings(names);
  backends = { wasm: await loadSyntheses(names, data.models[0].n_latent, "wasm") };
  for (let i = 0; i < WARM_UP; i += 1) {
    for (const [index, view] of views.entries()) await draw(view, index, state);
  }
  showPsi();
  await drawStrips(strips);
  await addWebGPU();
  await loop();
}

if (location.protocol !== "file:") start().catch(fail);
