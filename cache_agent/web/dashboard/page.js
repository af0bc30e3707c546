// Shows one node: polls its status, and follows its events as they happen.
// Everything from the agent goes into the page as text, never as markup.

const NOW_AND_THEN = 5000, LOADING = 1000, MOST_EVENTS = 200, MOST_STARTS = 20;
const here = new URL(".", location.href);
const state = { token: sessionStorage.getItem("glowplug-token") || "", events: [], last: 0, open: new Set(), seen: "", pid: 0, stream: null };

// --- asking ----------------------------------------------------------------------------------------------------------

class Denied extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const response = await fetch(new URL(path, here), { ...options, headers, cache: "no-store", credentials: "omit" });
  if (response.status === 401 || response.status === 403) {
    const body = await response.json().catch(() => ({}));
    throw new Denied(body.error?.message || `refused with ${response.status}`);
  }
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response;
}

let timer = 0, due = Infinity;

function plan(pause) {
  const at = performance.now() + pause;
  if (at >= due) return;  // a stream of events must not postpone the refresh for ever
  clearTimeout(timer);
  due = at;
  timer = setTimeout(refresh, pause);
}

async function refresh() {
  due = Infinity;
  let pause = NOW_AND_THEN;
  try {
    const status = await (await ask("status.json")).json();
    const view = await (await ask("view.json")).json();
    unlocked();
    if (state.pid && state.pid !== status.pid) startedAgain();
    state.pid = status.pid;
    show(status, view);
    badge("live", "live");
    if (status.models.some((model) => model.state === "loading")) pause = LOADING;
  } catch (error) {
    if (error instanceof Denied) return locked(error.message);
    badge("lost", "no answer; trying again");
  }
  plan(document.hidden ? 6 * pause : pause);
}

async function follow() {
  for (;;) {
    try {
      const headers = state.last ? { "Last-Event-ID": String(state.last) } : {};
      state.stream = new AbortController();
      const response = await ask("events/stream", { headers, signal: state.stream.signal });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
        const blocks = (rest + part.value).split("\n\n");
        rest = blocks.pop();
        const found = blocks.map(parse).filter(Boolean);
        if (found.length) happened(found);
      }
    } catch (error) {
      if (error instanceof Denied) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// A restarted agent counts its events from one; the events of its predecessor stay on the page.
function startedAgain() {
  state.last = 0;
  state.stream?.abort();
}

function parse(block) {
  const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
  return data ? JSON.parse(data) : null;
}

function happened(found) {
  for (const event of found) {
    if (event.number <= state.last) continue;
    state.last = event.number;
    state.events.unshift(event);
  }
  state.events.length = Math.min(state.events.length, MOST_EVENTS);
  showEvents();
  plan(300);
}

// --- words and numbers -----------------------------------------------------------------------------------------------

function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(bytes < 1e10 ? 2 : 1)} GB`;
  return `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
}

function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

const short = (revision) => (revision ? revision.replace(/^rev-/, "").slice(0, 8) : "not known yet");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const sum = (list, key) => list.reduce((total, each) => total + each[key], 0);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key === "style") Object.assign(made.style, value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const byId = (id) => document.getElementById(id);
const fill = (id, ...children) => byId(id).replaceChildren(...children);
const empty = (text) => element("p", { class: "empty" }, text);

function table(headings, rows) {
  const head = element("tr", {}, ...headings.map(([text, right]) => element("th", { scope: "col", class: right ? "right" : "" }, text)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, column) => {
    const [text, right] = headings[column];
    const kind = [right ? "right num" : "", column === 0 ? "uri" : ""].join(" ").trim();
    return element("td", { class: kind, "data-label": text }, cell);
  })));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

// --- showing ---------------------------------------------------------------------------------------------------------

function badge(kind, text) {
  const live = byId("live");
  live.className = `badge ${kind}`;
  if (live.textContent !== text) live.textContent = text;
}

function locked(why) {
  badge("lost", "locked");
  byId("unlock").hidden = false;
  byId("main").hidden = true;
  byId("denied").textContent = state.token ? why : "";
  byId("token").focus();
}

function unlocked() {
  byId("unlock").hidden = true;
  byId("main").hidden = false;
}

function show(status, view) {
  const seen = JSON.stringify([status, view]);
  if (seen === state.seen) return;
  state.seen = seen;
  byId("node").textContent = `node ${status.node}, pid ${status.pid}`;
  document.title = `${status.node} · Glowplug`;
  byId("summary").textContent = summary(status, view.starts);
  showTiers(status);
  showModels(status);
  showStarts(view.starts);
  showCluster(status, view);
  showLayers(status.layers);
  showHandoffs(status.handoffs);
  byId("main").setAttribute("aria-busy", "false");
}

function summary(status, starts) {
  const loading = status.models.filter((model) => model.state === "loading");
  const holds = status.models.length
    ? `This node holds ${plural(status.models.length, "model")} in ${size(status.used)} of memory, for ${plural(sum(status.models, "leases"), "lease")}`
    : "This node holds no model";
  const now = loading.length ? `; ${plural(loading.length, "model")} on the way` : "";
  const last = starts.length && starts[0].diagnosis
    ? ` The last start took ${duration(starts[0].diagnosis.seconds)}, most of it in ${starts[0].diagnosis.bottleneck}.` : "";
  return `${holds}${now}.${last}`;
}

function meter(label, capacity, parts) {
  const bars = parts.map((part) => element("i", {
    class: part.loading ? "loading" : "", title: `${part.name}: ${size(part.bytes)}`,
    style: { width: `${capacity ? Math.min(100, 100 * part.bytes / capacity) : 0}%` },
  }));
  return element("div", { class: "meter", role: "img", "aria-label": label }, ...bars);
}

function tier(name, used, capacity, parts, note) {
  const text = `${size(used)} of ${size(capacity)}`;
  return element("div", { class: "tier" },
    element("div", { class: "tier-head" }, element("h3", {}, name), element("span", { class: "num" }, text)),
    meter(`${name}: ${text} in use`, capacity, parts),
    note ? element("p", { class: "soft" }, note) : null);
}

function showTiers(status) {
  const found = [tier("Memory", status.used, status.capacity, status.models.map((model) => (
    { name: model.model, bytes: model.bytes, loading: model.state === "loading" })),
    status.orphaned ? `${size(status.orphaned)} more are mapped by functions and not lent by this agent` : "")];
  if (status.ssd) {
    const bad = status.ssd.quarantined.length;
    found.push(tier("SSD", status.ssd.used, status.ssd.capacity, status.ssd.images.map((image) => (
      { name: image.model, bytes: image.bytes })),
      `${status.ssd.directory}${bad ? `; ${plural(bad, "damaged image")} set aside` : ""}`));
  } else found.push(element("p", { class: "soft" }, "The SSD tier is off: what leaves memory is read from its origin again."));
  if (status.tiers.length) {
    found.push(element("p", { class: "rates soft" }, ...status.tiers.map((each) => element("span", { class: "num" },
      `${each.tier}: ${Math.round(each.rate / 1e6)} MB/s over ${plural(each.loads, "load")}, estimates off by ${Math.round(100 * each.error)} %`))));
  }
  fill("tiers", ...found);
}

function showModels(status) {
  const rows = status.models.map((model) => [
    model.model,
    element("span", {}, ...chips(model)),
    size(model.bytes), String(model.leases), duration(model.age_seconds),
    model.leases ? "in use" : duration(model.idle_seconds), short(model.revision),
  ]);
  for (const image of status.ssd?.images || []) {
    if (status.models.some((model) => model.model === image.model)) continue;
    rows.push([image.model, element("span", { class: "chip" }, "on SSD only"), size(image.bytes), String(image.users), "–", "–", short(image.revision)]);
  }
  const headings = [["model"], ["state"], ["size", true], ["leases", true], ["age", true], ["idle", true], ["revision", true]];
  fill("models", rows.length ? table(headings, rows) : empty("None yet. glowplug warm MODEL brings one in, and so does the first function."));
}

function chips(model) {
  const state = model.state === "loading" ? `loading ${Math.floor(100 * model.done / Math.max(1, model.bytes))} %` : model.state;
  const found = [element("span", { class: model.state === "loading" ? "chip strong" : "chip" }, state)];
  if (model.pinned) found.push(" ", element("span", { class: "chip" }, "pinned"));
  if (model.page > 4096) found.push(" ", element("span", { class: "chip" }, "huge pages"));
  return found;
}

function showStarts(starts) {
  if (!starts.length) return fill("start-list", empty("No function has started since this agent did."));
  if (!state.open.size) state.open.add(starts[0].start_id);
  fill("start-list", ...starts.slice(0, MOST_STARTS).map((start) => {
    const found = element("details", state.open.has(start.start_id) ? { open: "" } : {}, heading(start), waterfall(start));
    found.addEventListener("toggle", () => state.open[found.open ? "add" : "delete"](start.start_id));
    return found;
  }));
}

function heading(start) {
  const total = start.diagnosis ? duration(start.diagnosis.seconds) : "";
  const why = start.error || (start.diagnosis ? start.diagnosis.sentence : "");
  return element("summary", {},
    element("span", { class: "total num" }, total), element("span", { class: "uri" }, start.function),
    element("span", { class: start.error ? "chip bad" : "chip" }, start.error ? "failed" : `${start.kind} start`),
    start.tier ? element("span", { class: "chip" }, `weights from ${start.tier}`) : null,
    element("span", { class: "soft num" }, clock(start.began)), element("span", { class: "why" }, why));
}

function waterfall(start) {
  const first = Math.min(...start.spans.map((span) => span.start));
  const starting = start.spans.filter((span) => span.name !== "first token");
  const end = Math.max(...starting.map((span) => span.end), first + 1);
  // The first request may come long after the start; its token is drawn as if the request had come at once.
  const shift = (span) => (span.name === "first token" && span.start > end ? span.start - end : 0);
  const last = Math.max(end, ...start.spans.map((span) => span.end - shift(span)));
  const percent = (ns) => `${100 * ns / Math.max(1, last - first)}%`;
  const rows = [...start.spans].sort((a, b) => a.start - b.start).map((span) => {
    const seconds = (span.end - span.start) / 1e9;
    return element("li", { class: "row" },
      element("span", { class: "name", title: `${span.owner} ${span.name}` }, element("b", {}, `${span.owner} `), span.name),
      element("span", { class: "track", "aria-hidden": "true" }, element("i", {
        class: `bar ${["shim", "agent"].includes(span.owner) ? span.owner : "worker"}`,
        style: { left: percent(span.start - shift(span) - first), width: percent(span.end - span.start) },
      })),
      element("span", { class: "ms num" }, duration(seconds)));
  });
  return element("ol", { class: "waterfall", "aria-label": "Its phases, in order of their beginning" }, ...rows);
}

function showEvents() {
  const select = byId("kind"), kinds = [...new Set(state.events.map((event) => event.kind))].sort();
  for (const kind of kinds) {
    if (![...select.options].some((option) => option.value === kind)) select.append(element("option", { value: kind }, kind));
  }
  const shown = state.events.filter((event) => !select.value || event.kind === select.value);
  fill("events", ...(shown.length ? shown.map((event) => element("li", {},
    element("time", { class: "num soft", datetime: new Date(event.time * 1000).toISOString() }, clock(event.time)),
    element("span", {}, element("span", { class: event.kind === "failed" ? "chip bad" : event.kind === "evicted" ? "chip strong" : "chip" }, event.kind)),
    element("span", { class: "text" }, event.text))) : [element("li", { class: "empty" }, "Nothing yet.")]));
}

function showCluster(status, cluster) {
  if (cluster.nodes.length < 2) return fill("cluster", empty("This node knows only itself. With GLOWPLUG_REDIS_URL nodes tell each other what they have."));
  const rows = cluster.nodes.map((node) => {
    const held = cluster.holdings.filter((holding) => holding.node === node.name);
    const rates = Object.entries(node.rates).map(([name, rate]) => `${name} ${Math.round(rate / 1e6)} MB/s`).join(", ");
    const models = ["dram", "ssd"].map((name) => [name, held.filter((each) => each.tier === name)]).filter(([, list]) => list.length)
      .map(([name, list]) => `${plural(list.length, "model")} (${size(sum(list, "done"))}) in ${name}`).join(", ");
    return [node.name === status.node ? `${node.name} (this one)` : node.name, node.capacity ? size(node.capacity) : "–", models || "nothing", rates || "–"];
  });
  fill("cluster", table([["node"], ["memory", true], ["holds"], ["measured"]], rows));
}

// Each function's layers as they stand on one another; a pool holds several models on one lang.
function showLayers(functions) {
  byId("layers-section").hidden = !functions?.length;
  if (!functions?.length) return;
  fill("layers", element("ul", { class: "tree" }, ...functions.map((each) => {
    const [langs, models, users] = ["lang", "model", "user"].map((level) => each.layers.filter((layer) => layer.level === level));
    const branches = models.map((model, at) => branch(model, at ? [] : users.map((user) => branch(user, []))));
    const above = models.length ? branches : users.map((user) => branch(user, []));
    const price = each.price ? ` a second of start is worth ${each.price} GB·s` : "";
    return element("li", {}, element("b", {}, each.function), " ", element("span", { class: "chip" }, each.mode),
      element("span", { class: "soft" }, price),
      element("ul", {}, ...(langs.length ? langs.map((lang) => branch(lang, above)) : above)));
  })));
}

function branch(layer, above) {
  const held = layer.state !== "absent" && layer.state !== "building";
  const facts = [
    held ? size(layer.bytes) : "", layer.build_seconds ? `${duration(layer.build_seconds)} to build` : "",
    layer.worth_seconds ? `worth ${duration(layer.worth_seconds)} of holding` : "",
  ].filter(Boolean).join(" · ");
  return element("li", {},
    element("span", { class: "layer" }, element("b", {}, layer.level), " ", element("span", { class: held ? "chip strong" : "chip" }, layer.state),
      " ", element("span", { class: "num" }, timeLeft(layer))),
    layer.model ? element("span", { class: "soft uri" }, layer.model) : null, element("span", { class: "soft" }, facts),
    layer.why ? element("span", { class: "soft why" }, layer.why) : null, above.length ? element("ul", {}, ...above) : null);
}

function timeLeft(layer) {
  if (layer.state !== "idle" || layer.idle_seconds === null) return "";
  return `for ${duration(layer.idle_seconds)}, ${layer.left_seconds === null ? "no end" : `${duration(layer.left_seconds)} left`}`;
}

function showHandoffs(handoffs) {
  byId("handoffs-section").hidden = !handoffs?.length;
  if (!handoffs?.length) return;
  const how = { kv: "its rows went along", recompute: "computed again there", relay: "before its first token" };
  fill("handoffs", table([["request"], ["outcome"], ["from"], ["to"], ["tokens", true], ["pause", true], ["when", true]], handoffs.map((each) => [
    element("span", {}, `${each.function} `, element("span", { class: "soft" }, each.id)),
    element("span", {}, element("span", { class: each.outcome === "lost" ? "chip bad" : each.outcome === "moved" ? "chip strong" : "chip" }, each.outcome),
      element("span", { class: "soft" }, ` ${each.reason || how[each.how] || each.how}`)),
    each.source, each.destination || "–", String(each.tokens), duration(each.pause), clock(each.time)])));
}

// --- beginning -------------------------------------------------------------------------------------------------------

byId("kind").addEventListener("change", showEvents);
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = byId("token").value.trim();
  sessionStorage.setItem("glowplug-token", state.token);
  begin();
});
document.addEventListener("visibilitychange", () => document.hidden || plan(0));

function begin() {
  showEvents();
  refresh();
  follow();
}

begin();
