// The page at /ui: the state once, then what changes as server-sent events. No build, no library.
const $ = (id) => document.getElementById(id);
const SIGNS = { good: "●", watch: "▲", bad: "■", unknown: "○" };
const HOT = 10; // alarm thresholds at the hot end of the colours
const ROW = 20; // pixels of a layer, as in page.css

let state = null; // what /ui/state answered, brought up to date by each event
let shown = 0; // index of the memory that is shown
let chosen = null; // the layer whose channels are shown
let byHand = false; // whether the user has chosen it
let lost = null; // when the server was last heard, once it is gone

const clock = (at, exact) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", ...(exact && { second: "2-digit" }) });
const when = (at) => (new Date(at * 1000).toDateString() === new Date().toDateString() ? clock(at) : new Date(at * 1000).toLocaleDateString([], { month: "short", day: "numeric" }) + ", " + clock(at));
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toLocaleString());
const duration = (seconds) => (seconds === null ? "–" : seconds < 1 ? `${number(seconds * 1000, 2)} ms` : `${number(seconds, 2)} s`);
const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const drawn = (tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `status ${answer.status}`);
  return answer.json();
}

async function load() {
  state = await get("ui/state");
  renderOnce();
  render();
}

function follow() {
  const events = new EventSource("ui/events");
  let fresh = true;
  events.onmessage = async (event) => {
    if (fresh || !state) {
      fresh = false;
      await load(); // what was missed in between, and a server that may be another one
    }
    lost = null;
    take(JSON.parse(event.data));
    render();
  };
  events.onerror = () => {
    fresh = true;
    if (lost === null) lost = state?.now.at ?? Date.now() / 1000;
    renderConnection();
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, 3000); // it does not try again by itself
  };
}

function take(now) {
  state.now = now;
  now.points.forEach((point, i) => {
    const { points } = state.memories[i];
    if (point && point.at !== points.at(-1)?.at) points.push(point);
    if (points.length > 300) points.splice(0, points.length - 300);
  });
}

function renderOnce() {
  $("model").textContent = `${state.model} on ${state.device}`;
  $("about").textContent = `guardserve ${state.version}. Looked at every ${state.interval} s; times are this device's.`;
  const spans = state.memories.map((memory) => memory.interval * 300);
  $("span").replaceChildren(
    $("span").firstElementChild,
    ...spans.map((seconds, i) => {
      const radio = element("input", { type: "radio", name: "span", value: i, ...(i === shown && { checked: "" }) });
      radio.addEventListener("change", () => { shown = i; render(); });
      return element("label", {}, radio, seconds < 3600 ? ` last ${seconds / 60} minutes` : ` last ${seconds / 3600} hours`);
    }),
  );
  $("layers").replaceChildren(
    ...state.layers.map((name, i) => {
      const option = element("div", { class: "layer", role: "option", id: `layer-${i}`, title: name, "data-layer": name }, element("bdi", {}, name || "(the model)"));
      option.addEventListener("click", () => choose(name, true));
      return option;
    }),
  );
  $("heat").hidden = state.layers.length === 0;
  const unobserved = Object.entries(state.unobserved);
  $("unobserved").textContent = unobserved.length ? `Not watched: ${unobserved.map(([name, why]) => `${name} (${why})`).join("; ")}.` : "";
  $("findings").replaceChildren(
    ...(state.findings.length
      ? state.findings.map((f) => element("li", { "data-level": f.severity }, element("strong", {}, `${f.severity} ${f.code}`), ` ${f.module || "the model"}: ${f.message.replace(/\.$/, "")}. `, element("em", {}, f.remedy)))
      : [element("li", { "data-level": "good" }, "No hazard was found in the model's layers and flags.")]),
  );
}

function render() {
  renderConnection();
  renderVerdict();
  renderEvidence();
  renderHeat();
  renderTraffic();
  renderEvents();
  if (!byHand && state.now.layer && state.now.layer !== chosen) choose(state.now.layer, false);
  else if (chosen !== null) showChannels();
}

function renderConnection() {
  const gone = lost !== null;
  document.documentElement.classList.toggle("gone", gone);
  $("gone").hidden = !gone;
  if (gone) {
    $("gone").textContent = `Server gone since ${clock(lost, true)}. What you see is what it said last; trying again.`;
    document.title = `✕ server gone - ${state?.model ?? "guardserve"}`;
  }
}

function renderVerdict() {
  const { headline } = state.now;
  document.body.dataset.level = headline.level;
  $("sign").textContent = SIGNS[headline.level];
  if ($("title").textContent !== headline.title) $("title").textContent = headline.title; // is read aloud
  $("since").textContent = `Since ${when(headline.since)}`;
  $("detail").textContent = headline.detail;
  if (lost === null) document.title = `${SIGNS[headline.level]} ${headline.title} - ${state.model}`;
  const steps = Object.entries(state.now.guard).map(([kind, count]) => `${kind.replaceAll("_", " ")}: ${count}`);
  $("guard").textContent = steps.length ? `The guard had to step in or warn. ${steps.join("; ")}.` : "The guard never had to step in.";
}

const points = () => state.memories[shown].points;

// The stretch of time that is shown: all that is remembered, at most.
function stretch() {
  const { interval } = state.memories[shown], end = state.now.at;
  const first = (points()[0]?.at ?? end) - interval;
  return { begin: Math.max(Math.min(first, end - 30 * interval), end - 300 * interval), end, interval };
}

// Each list: its class, its name in the key, and one value a point (null where there is none).
function chart(id, lists, { least = 0, unit = number, threshold = null, wide = false } = {}) {
  const times = points().map((point) => point.at);
  const key = element("p", { class: "key" });
  for (const { kind, name } of [...lists, ...(threshold === null ? [] : [{ kind: "threshold", name: "threshold" }])]) key.append(element("span", { class: kind }, element("i"), name));
  const values = lists.flatMap((list) => list.values).filter((value) => value !== null);
  if (!values.length) {
    $(id).replaceChildren(key, element("p", { class: "note" }, "Nothing yet."));
    return;
  }
  const width = Math.max(240, $(id).clientWidth), height = 144, left = 56, bottom = 20;
  const top = 1.08 * Math.max(least, threshold ?? 0, ...values);
  const { begin, end } = stretch();
  const x = (at) => left + ((width - left) * (at - begin)) / Math.max(1, end - begin);
  const log = wide && top > 10; // values of very different size
  const scaled = log ? Math.log1p : (value) => value;
  const y = (value) => height - bottom - ((height - bottom - 6) * scaled(value)) / scaled(top);
  const ticks = log ? [0, 1, 10, 100, 1000, 1e4, 1e5, 1e6].filter((value) => value < top) : [0, top / 2, top];
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": lists.map((list) => `${list.name} now ${unit(list.values.at(-1))}`).join(", ") });
  const line = (kind, value) => svg.append(drawn("line", { class: kind, x1: left, x2: width, y1: y(value), y2: y(value) }));
  for (const value of ticks) {
    line("grid", value);
    svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, unit(value)));
  }
  if (threshold !== null) line("threshold", threshold);
  for (const { kind, values: list } of lists) {
    let run = [];
    const flush = () => { if (run.length) svg.append(drawn("polyline", { class: kind, points: run.length > 1 ? run.join(" ") : `${run[0]} ${run[0]}`, "stroke-linecap": "round" })); run = []; };
    list.forEach((value, i) => (value === null || times[i] < begin ? flush() : run.push(`${x(times[i]).toFixed(1)},${y(value).toFixed(1)}`)));
    flush();
  }
  for (const [at, anchor] of [[begin, "start"], [end, "end"]]) svg.append(drawn("text", { x: anchor === "end" ? width : left, y: height - 4, "text-anchor": anchor }, clock(at)));
  $(id).replaceChildren(key, svg);
}

function renderEvidence() {
  const { name, value, threshold } = state.now.judged_by;
  $("evidence-said").textContent = value === null ? `The ${name} is not known yet: ${number(state.now.samples)} samples so far.` : `The ${name} is ${number(value)}; from ${number(threshold)} on it is a shift. ${state.now.samples.toLocaleString()} samples so far.`;
  chart("evidence", [{ kind: "one", name: `${name}, as a share of the threshold`, values: points().map((point) => point.level) }], { least: 1, threshold: 1, wide: true });
  $("note").textContent = state.now.note;
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const parse = (name) => style.getPropertyValue(name).trim().match(/\w\w/g).map((part) => parseInt(part, 16));
  const cold = parse("--cold"), hot = parse("--hot");
  return (value) => {
    const share = Math.log1p(Math.min(HOT, Math.max(0, value))) / Math.log1p(HOT); // small values are to be told apart
    return `rgb(${cold.map((from, i) => Math.round(from + share * (hot[i] - from))).join(" ")})`;
  };
}

function renderHeat() {
  const layers = state.layers, rows = layers.length, list = points(), interval = state.memories[shown].interval;
  const canvas = $("cells"), colour = colours(), scale = $("scale").getContext("2d");
  for (let i = 0; i < 120; i++) { scale.fillStyle = colour(Math.expm1((Math.log1p(HOT) * i) / 119)); scale.fillRect(i, 0, 1, 10); }
  $("heat-said").textContent = rows === 0 ? "" : state.now.judged_by.name === "evidence" ? "Evidence of each layer by itself against the reference profile: from 1 on, the threshold, it alarms." : "Distance of each layer from training, as a share of the threshold.";
  $("heat-note").textContent = rows === 0 ? "This model has no layer to watch." : list.some((point) => point.layers.some((value) => value !== null)) ? "" : "No layer has been judged yet: there must be enough samples first.";
  const { begin, end } = stretch(), columns = Math.max(1, Math.round((end - begin) / interval));
  canvas.width = columns;
  canvas.height = rows * ROW;
  canvas.style.height = `${rows * ROW}px`;
  const context = canvas.getContext("2d");
  let next = 0; // the first column that is still empty
  for (const point of list) {
    const column = columns - 1 - Math.round((end - point.at) / interval);
    if (column < 0) continue;
    const from = column - next === 1 ? next : column; // a look that came a little late leaves no gap
    next = column + 1;
    point.layers.forEach((value, row) => {
      if (value === null) return;
      context.fillStyle = colour(value);
      context.fillRect(from, row * ROW + 1, next - from, ROW - 2);
    });
  }
  $("heat-axis").replaceChildren(element("span", {}, clock(begin)), element("span", {}, clock(end)));
  for (const option of $("layers").children) {
    const name = option.dataset.layer;
    option.classList.toggle("lead", state.now.state === "shifted" && name === state.now.layer);
    option.setAttribute("aria-selected", name === chosen);
  }
}

async function choose(name, hand) {
  chosen = name;
  byHand ||= hand;
  const index = state.layers.indexOf(name);
  $("layers").setAttribute("aria-activedescendant", `layer-${index}`);
  for (const option of $("layers").children) option.setAttribute("aria-selected", option.dataset.layer === name);
  if (hand) $(`layer-${index}`)?.scrollIntoView({ block: "nearest" });
  await showChannels();
}

async function showChannels() {
  const name = chosen;
  let channels;
  try {
    channels = await get(`ui/layer?name=${encodeURIComponent(name)}`);
  } catch (error) {
    $("layer-said").textContent = String(error.message ?? error);
    $("channels").replaceChildren();
    return;
  }
  if (name !== chosen) return;
  $("layer-said").textContent = `${name}: the ${channels.length} channels furthest from training, over the last samples.`;
  const moved = Object.fromEntries(state.now.moved.map((channel) => [channel.channel, channel]));
  const widest = Math.max(0.5, ...channels.map((channel) => Math.abs(channel.mean ?? 0)));
  const head = element("tr", {}, ...["channel", "mean, in running standard deviations", "", "spread"].map((text) => element("th", { scope: "col" }, text)));
  $("channels").replaceChildren(
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...channels.map((channel) => {
      const svg = drawn("svg", { viewBox: "-100 0 200 14", preserveAspectRatio: "none", "aria-hidden": "true" });
      const width = (100 * Math.abs(channel.mean ?? 0)) / widest;
      svg.append(drawn("line", { x1: 0, x2: 0, y1: 0, y2: 14, stroke: "var(--line)" }));
      svg.append(drawn("rect", { x: channel.mean < 0 ? -width : 0, y: 2, width, height: 10, fill: moved[channel.channel] && state.now.layer === name ? "var(--bad)" : "var(--series)" }));
      return element("tr", {}, element("td", {}, String(channel.channel)), element("td", {}, svg), element("td", { class: "number" }, `${channel.mean > 0 ? "+" : ""}${number(channel.mean, 2)}`), element("td", { class: "number" }, `×${number(channel.spread, 2)}`));
    }))),
  );
}

function renderTraffic() {
  const list = points(), last = list.at(-1);
  const served = list.findLast((point) => point.requests > 0);
  $("traffic-said").textContent = last && last.requests > 0 ? `${number(last.requests)} requests a second, half of them within ${duration(last.p50)}, 99 % within ${duration(last.p99)}.` : served ? `No requests now; the last came about ${clock(served.at)}.` : "No requests yet.";
  chart("requests", [{ kind: "one", name: "requests / s", values: list.map((point) => point.requests) }, { kind: "two", name: "failed / s", values: list.map((point) => point.failed) }], { least: 1 });
  chart("latency", [{ kind: "one", name: "median", values: list.map((point) => point.p50) }, { kind: "two", name: "99th percentile", values: list.map((point) => point.p99) }], { unit: duration });
}

function renderEvents() {
  $("events").replaceChildren(
    ...(state.now.events.length
      ? state.now.events.map((event) => element("li", { "data-level": event.level }, element("time", { datetime: new Date(event.at * 1000).toISOString() }, when(event.at)), ` ${event.text}`))
      : [element("li", {}, "Nothing since the server started.")]),
  );
}

$("layers").addEventListener("keydown", (event) => {
  const last = state.layers.length - 1, at = state.layers.indexOf(chosen);
  const to = { ArrowDown: Math.min(last, at + 1), ArrowUp: Math.max(0, at - 1), Home: 0, End: last }[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  choose(state.layers[to], true);
});
addEventListener("resize", () => state && render());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state && render());
load().catch(() => {}); // follow() tells when the server cannot be reached
follow();
