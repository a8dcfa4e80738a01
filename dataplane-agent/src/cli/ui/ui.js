"use strict";
// Names come from the cluster: they become text of the page, and never a part of its language.

const EVERY_MS = 1500;
const SERVICES = 30, EDGES_OF_DROPS = 20, FLOWS = 200, DENIED = 15;
const DENIED_SECONDS = 300;

// `alone`: why the tables answer in place of an agent; `wanted`: the Pod that somebody chose, which may not be there now.
const state = {
  before: null, load: null, dead: null, alone: null, served: null, toldByAgent: true, verdicts: [], last: 0, flows: null, flowsError: null,
  wanted: location.hash.slice(1) || null, pod: null, podsInTables: [], policies: null, policiesError: null,
};

const $ = id => document.getElementById(id);

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

async function get(path) {
  let reason;
  try {
    const answer = await fetch(path, { cache: "no-store" });
    const value = await answer.json();
    if (answer.ok) return { value, alone: answer.headers.get("x-dataplane-without-agent") };
    reason = value.error || "status " + answer.status;
  } catch (error) {
    reason = "this page's own server does not answer: dataplane-agent ui has ended, or it cannot be reached";
  }
  return { error: reason };
}

// Rates: what was counted anew, and is smaller than before, has none.

function seconds() {
  if (!state.before) return 0;
  return (Date.parse(state.load.at) - Date.parse(state.before.at)) / 1000;
}

function rate(before, now) {
  const time = seconds();
  if (!before || time <= 0) return null;
  const made = {};
  for (const key of ["connections", "packets_in", "bytes_in", "packets_out", "bytes_out", "dropped"]) {
    if (now[key] < before[key]) return null;
    made[key] = (now[key] - before[key]) / time;
  }
  made.bytes = made.bytes_in + made.bytes_out;
  return made;
}

function short(value) {
  let unit = "";
  for (const larger of ["k", "M", "G", "T"]) {
    if (value < 999.5) break;
    value /= 1000;
    unit = larger;
  }
  return (value === 0 || value >= 99.95 || (!unit && value >= 9.95) ? value.toFixed(0) : value.toFixed(1)) + unit;
}

const inWords = of => of ? short(of.connections) + " conn/s, " + short(of.bytes) + "B/s" : "";

// The map.

function servicesOfLoad() {
  const before = new Map((state.before ? state.before.services : []).map(one => [one.object, one]));
  return state.load.services.map(service => {
    const old = before.get(service.object);
    const met = new Map();
    // An address may be there for each of two protocols, in the same order each time.
    const key = (endpoint, met) => {
      const place = (met.get(endpoint.at) || 0) + 1;
      met.set(endpoint.at, place);
      return endpoint.at + " " + place;
    };
    const metBefore = new Map();
    const known = new Map((old ? old.endpoints : []).map(one => [key(one, metBefore), one]));
    const endpoints = service.endpoints.map(one => ({ ...one, rate: rate(known.get(key(one, met)), one) }));
    return { object: service.object, rate: rate(old, service), endpoints };
  });
}

const hostOf = at => at.replace(/:\d+$/, "").replace(/^\[|\]$/g, "");

// Either end of a verdict: "namespace/pod (address)", or an address.
function end(text) {
  const space = text.indexOf(" (");
  return space > 0 ? text.slice(0, space) : text;
}

function drops() {
  const now = state.load ? Date.parse(state.load.at) : 0;
  const edges = new Map();
  for (const told of state.verdicts) {
    if (told.verdict !== "Denied" || now - Date.parse(told.time) > DENIED_SECONDS * 1000) continue;
    const [from, to] = [end(told.from), end(told.to)];
    const key = from + "\n" + to;
    const edge = edges.get(key) || { from, to, count: 0, ports: new Set(), by: new Set() };
    edge.count += 1 + told.untold;
    edge.ports.add(told.port);
    edge.by.add(by(told));
    edges.set(key, edge);
  }
  return [...edges.values()].sort((a, b) => b.count - a.count).slice(0, EDGES_OF_DROPS);
}

const LEFT = 8, BOX = 300, RIGHT = 560, WIDE = 310, ROW = 40, HIGH = 30, END = 1180;

function drawMap() {
  const svg = $("map");
  if (!state.load) return;
  const all = servicesOfLoad();
  const busy = service => service.rate ? service.rate.bytes : -1;
  const dropped = service => service.rate ? service.rate.dropped : 0;
  const busiest = [...all].sort((a, b) => busy(b) - busy(a) || dropped(b) - dropped(a));
  const shown = busiest.slice(0, SERVICES).sort((a, b) => a.object < b.object ? -1 : 1);
  $("map-note").textContent = all.length > shown.length
    ? "the " + shown.length + " busiest of " + all.length : "";

  const nodes = new Map();
  const node = (name, note) => {
    if (!nodes.has(name)) nodes.set(name, { name, note: "", place: nodes.size });
    const made = nodes.get(name);
    if (note) made.note = note;
    return made;
  };
  const edges = [];
  shown.forEach((service, place) => service.endpoints.forEach(endpoint => {
    const note = (endpoint.pod ? endpoint.at + " " : "") + endpoint.state;
    const to = node(endpoint.pod || hostOf(endpoint.at), note);
    to.gone = endpoint.state === "gone" || endpoint.state === "draining";
    edges.push({ service, place, to, endpoint });
  }));
  const red = drops();
  for (const edge of red) {
    edge.a = node(edge.from);
    edge.b = node(edge.to);
  }

  const height = Math.max(shown.length, nodes.size, 1) * ROW + 10;
  const y = place => 5 + place * ROW;
  const parts = [];
  const defs = drawn("defs", {});
  const marker = drawn("marker", { id: "arrow", viewBox: "0 0 10 10", refX: 9, refY: 5, markerWidth: 11, markerHeight: 11, markerUnits: "userSpaceOnUse", orient: "auto" });
  marker.append(drawn("path", { d: "M0 0L10 5L0 10z" }));
  defs.append(marker);
  parts.push(defs);

  for (const { service, place, to, endpoint } of edges) {
    const bytes = endpoint.rate ? endpoint.rate.bytes : 0;
    const [from, at] = [y(place) + HIGH / 2, y(to.place) + HIGH / 2];
    const middle = (LEFT + BOX + RIGHT) / 2;
    const path = drawn("path", {
      class: bytes > 0 ? "edge" : "edge unused",
      d: `M${LEFT + BOX} ${from}C${middle} ${from} ${middle} ${at} ${RIGHT} ${at}`,
      "stroke-width": bytes > 0 ? (1 + 1.3 * Math.log10(1 + bytes / 100)).toFixed(1) : 1,
    });
    path.append(drawn("title", {}, service.object + " to " + to.name + " (" + endpoint.at + "): " + (inWords(endpoint.rate) || "not known yet")));
    parts.push(path);
  }
  shown.forEach((service, place) => {
    parts.push(drawn("rect", { class: "box", x: LEFT, y: y(place), width: BOX, height: HIGH, rx: 4 }));
    parts.push(drawn("text", { x: LEFT + 8, y: y(place) + 13 }, cut(service.object.replace(/^Service /, ""), 40)));
    const rates = inWords(service.rate) || "";
    parts.push(drawn("text", { class: "rate", x: LEFT + 8, y: y(place) + 26 }, rates));
    if (dropped(service) > 0) {
      parts.push(drawn("text", { class: "count", x: LEFT + BOX - 8, y: y(place) + 26, "text-anchor": "end" }, short(dropped(service)) + " drops/s"));
    }
  });
  for (const { name, note, place, gone } of nodes.values()) {
    parts.push(drawn("rect", { class: gone ? "box gone" : "box", x: RIGHT, y: y(place), width: WIDE, height: HIGH, rx: 4 }));
    parts.push(drawn("text", { x: RIGHT + 8, y: y(place) + (note ? 13 : 19) }, cut(name, 40)));
    if (note) parts.push(drawn("text", { class: "rate", x: RIGHT + 8, y: y(place) + 26 }, note));
  }
  red.forEach((edge, index) => {
    const x = RIGHT + WIDE;
    const [from, to] = [y(edge.a.place) + 9, y(edge.b.place) + 21];
    const out = Math.min(x + 90 + 30 * index, END);
    const path = drawn("path", {
      class: "edge drop", d: `M${x} ${from}C${out} ${from} ${out} ${to} ${x + 2} ${to}`,
      "stroke-width": Math.min(1.5 + Math.log10(edge.count), 5).toFixed(1), "marker-end": "url(#arrow)",
    });
    path.dataset.from = edge.from;
    path.dataset.to = edge.to;
    const words = edge.from + " to " + edge.to + ", " + [...edge.ports].join(", ") + ": denied " + edge.count + " times by " + [...edge.by].join("; ");
    path.append(drawn("title", {}, words));
    parts.push(path);
    const right = x + (out - x) * 0.75 + 6;
    parts.push(drawn("text", { class: "count", x: right, y: (from + to) / 2 + 4 }, edge.count + " × " + cut([...edge.ports].join(" "), 14)));
  });
  svg.setAttribute("viewBox", `0 0 ${END} ${height}`);
  svg.replaceChildren(...parts);
}

const cut = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;

// Tables.

function fill(id, rows) {
  $(id).tBodies[0].replaceChildren(...rows.map(cells => {
    const row = element("tr");
    row.append(...cells);
    return row;
  }));
}

function by(told) {
  if (told.policy === null) return told.reason;
  return told.rule === null ? "no rule of " + told.policy : told.policy + ", rule " + told.rule;
}

const VERDICTS = { Denied: "denied", Allowed: "allowed", WouldDeny: "would deny", WouldAllow: "would allow" };

function drawDenied() {
  const latest = state.verdicts.slice(-DENIED).reverse();
  $("denied-note").textContent = latest.length ? "" : "nothing";
  $("denied").hidden = !latest.length;
  fill("denied", latest.map(told => [
    element("td", told.time.slice(11, 19)),
    element("td", VERDICTS[told.verdict] || told.verdict, told.verdict === "Denied" && "denied"),
    element("td", told.direction), element("td", told.from), element("td", told.to), element("td", told.port),
    element("td", by(told)),
  ]));
}

function drawFlows() {
  const note = $("flows-note");
  if (!state.flows) {
    note.textContent = state.flowsError || "";
    $("flows").hidden = true;
    return;
  }
  const named = (addr, name) => name ? name + " (" + addr + ")" : addr;
  const wanted = $("filter").value.trim().toLowerCase();
  const rows = state.flows.flows.map(flow => [
    flow.protocol, named(flow.from, flow.from_pod), named(flow.to, flow.service),
    named(flow.endpoint, flow.endpoint_pod), flow.state, flow.idle_seconds + " s",
  ]).filter(row => row.join(" ").toLowerCase().includes(wanted));
  note.textContent = state.flowsError ? "old: " + state.flowsError
    : rows.length + " of " + state.flows.found + (state.flows.found > state.flows.flows.length ? ", the last used ones" : "");
  $("flows").hidden = !rows.length;
  fill("flows", rows.slice(0, FLOWS).map(row => row.map((text, column) => element("td", text, column === 5 && "number"))));
}

// The Pods of this node, by what is asked for: names, or in tables addresses.
function podsHere() {
  if (!state.alone) {
    const names = state.load ? state.load.pods.filter(pod => pod.here).map(pod => pod.pod) : [];
    return new Map(names.sort().map(name => [name, name]));
  }
  const known = state.podsInTables.filter(pod => pod.addresses.length);
  return new Map(known.map(pod => [pod.addresses[0], [pod.addresses.join(", "), pod.device].filter(Boolean).join(" at ")]));
}

function drawPods() {
  const here = podsHere();
  const pods = [...here.keys()];
  const select = $("pod");
  const present = [...select.options].map(option => option.value);
  if (present.join("\n") !== pods.join("\n")) {
    select.replaceChildren(...pods.map(pod => {
      const option = element("option", here.get(pod));
      option.value = pod;
      return option;
    }));
  }
  if (state.load) state.pod = [state.wanted, state.pod].find(pod => here.has(pod)) || pods[0] || null;
  if (state.pod) select.value = state.pod;
  $("pod-note").textContent = pods.length || !state.load ? "" : "no Pod of this node is known";
}

// In the order in which they are asked: the rules, then what no rule decides.
function rulesOf(name, direction) {
  const cells = (policy, rule) => [
    element("td", name), element("td", policy.tier),
    element("td", policy.policy + (policy.dry_run ? " (dry run)" : "")),
    element("td", rule.rule === null ? "none" : rule.name ? rule.rule + " " + rule.name : String(rule.rule)),
    element("td", rule.action, rule.action === "deny" && "deny"),
    element("td", rule.peers || ""), element("td", rule.ports || ""),
    element("td", String(rule.verdicts), "number"), element("td", String(rule.dry_run), "number"),
  ];
  const [rows, last] = [[], []];
  for (const policy of direction.policies) {
    for (const rule of policy.rules) (rule.rule === null ? last : rows).push(cells(policy, rule));
  }
  rows.push(...last);
  if (!direction.isolated) {
    const texts = [name, "", "none isolates it", "none", "allow", "any", "any", "", ""];
    rows.push(texts.map(text => element("td", text, "quiet")));
  }
  return rows;
}

function drawRules() {
  const of = state.policies;
  $("rules").hidden = !of;
  if (state.policiesError) $("pod-note").textContent = state.policiesError;
  if (!of) return;
  if (of.problems.length) {
    $("pod-note").textContent = "closed: " + of.problems.map(problem => problem.reason).join("; ");
  }
  fill("rules", [...rulesOf("ingress", of.ingress), ...rulesOf("egress", of.egress)]);
}

// What is wrong comes first.

function drawProblems() {
  $("dead").hidden = !state.dead && !state.alone;
  $("dead").textContent = state.dead ? "What stands here is old: " + state.dead
    : state.alone ? "No agent answers: " + state.alone + "; this is what the pinned tables say, without names" : "";
  const lines = [];
  if (state.served) {
    for (const { type, status, message } of state.served.conditions) {
      if (!status) lines.push(type + " does not hold: " + message);
    }
    for (const { object, field, reason, file } of state.served.problems) {
      lines.push([object, field, reason].filter(Boolean).join(": ") + (file ? " (" + file + ")" : ""));
    }
  }
  $("problems").hidden = !lines.length;
  $("problem-list").replaceChildren(...lines.map(line => element("li", line)));
}

function drawTotals() {
  $("totals").textContent = "";
  if (!state.load) return;
  $("time").textContent = state.load.at.slice(0, 19).replace("T", " ") + " UTC";
  const time = seconds();
  if (time <= 0) return;
  const total = { connections: 0, bytes: 0 };
  for (const { rate } of servicesOfLoad()) {
    if (!rate) continue;
    total.connections += rate.connections;
    total.bytes += rate.bytes;
  }
  let dropped = 0;
  for (const [reason, count] of Object.entries(state.load.drops)) {
    dropped += Math.max(0, count - (state.before.drops[reason] || 0)) / time;
  }
  $("totals").textContent = inWords(total) + ", " + short(dropped) + " drops/s";
}

function draw() {
  for (const part of [drawProblems, drawTotals, drawMap, drawPods, drawRules, drawDenied, drawFlows]) {
    // A picture that cannot be drawn takes no other one with it.
    try { part(); } catch (error) { console.error(part.name, error); }
  }
}

function takeLoad(load) {
  if (state.dead && load.value) forgetVerdicts();
  state.dead = load.error || null;
  if (!load.value || state.load && state.load.at === load.value.at) return;
  // Tables call everything by other names than an agent.
  state.before = !state.alone === !load.alone ? state.load : null;
  state.load = load.value;
  state.alone = load.alone;
}

// Another agent, perhaps, or the tables: each numbers its verdicts from the beginning.
function forgetVerdicts() {
  state.last = 0;
  state.verdicts = [];
}

function takeVerdicts(asked, told) {
  if (!told.value || state.dead) return;
  if (state.toldByAgent !== !told.alone) forgetVerdicts();
  state.toldByAgent = !told.alone;
  // The answer to a question for another one's numbers is none.
  if (asked !== state.last || !told.value.length) return;
  state.verdicts = state.verdicts.concat(told.value).slice(-1000);
  state.last = Math.max(...told.value.map(one => one.number));
}

async function look() {
  const asked = state.last;
  // Tables know of nothing that is wrong.
  const [load, served, verdicts, flows] = await Promise.all([
    get("api/load"), state.alone ? {} : get("api/services"), get("api/verdicts?after=" + asked), get("api/flows"),
  ]);
  takeLoad(load);
  if (state.alone) state.served = null;
  else if (served.value && !served.alone) state.served = served.value;
  takeVerdicts(asked, verdicts);
  if (flows.value) state.flows = flows.value;
  state.flowsError = flows.error || null;
  if (state.alone) {
    const { value } = await get("api/policies");
    if (value) state.podsInTables = value.pods || [];
  }
  drawPods();
  await lookAtPod();
}

async function lookAtPod() {
  const pod = state.pod;
  if (!pod) {
    state.policies = null;
    return draw();
  }
  const policies = await get("api/policies?pod=" + encodeURIComponent(pod).replace("%2F", "/").replaceAll("%3A", ":"));
  if (pod !== state.pod) return;
  if (policies.value) state.policies = policies.value;
  else if (!state.dead) state.policies = null;
  state.policiesError = state.dead ? null : policies.error || null;
  draw();
}

async function always() {
  try { await look(); } finally { setTimeout(always, EVERY_MS); }
}

$("filter").addEventListener("input", drawFlows);
$("pod").addEventListener("change", event => {
  state.pod = state.wanted = event.target.value;
  state.policies = null;
  history.replaceState(null, "", "#" + state.pod);
  lookAtPod();
});
always();
