// The live page of `submit serve`. Whatever a run has written gets into it as text nodes only; charts are drawn
// by the server, which has escaped the names in them.
"use strict";

const PAUSE = 2000; // milliseconds between two looks
const AT_ONCE = 200; // rows of the list of runs, until more are asked for
const LOG_LINES = 5000; // that are kept on the page
const GOING_ON = ["running", "suspended", "pending", "unknown"];
const ENDED_BADLY = ["failed", "timeout", "node_fail", "out_of_memory", "unreadable", "damaged"];

const main = document.getElementById("main");
const trouble = document.getElementById("trouble");
let shown = 0; // which page is: what belongs to an earlier one stops

// --- small parts ---------------------------------------------------------------------------------------------

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat(2).filter((child) => child != null && child !== false && child !== ""));
  return node;
}

async function get(path, parameters) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, { cache: "no-store" });
  if (answer.status === 204) return null;
  if (!answer.ok) throw new Error((await answer.text()).trim().replace(/^\d{3}: /, ""));
  return answer.json();
}

const count = (value) => (value == null ? "" : Math.round(value).toLocaleString("en"));
const short = (value) => (value == null ? "" : Number(value.toPrecision(4)).toString());

function duration(seconds) {
  if (seconds == null) return "";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; size >= 1000 && unit < units.length - 1; unit++) size /= 1000;
  return `${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

function moment(seconds) {
  if (!seconds) return "";
  const at = new Date(seconds * 1000);
  return isNaN(at) ? "" : `${at.toLocaleDateString("sv")} ${at.toLocaleTimeString("sv").slice(0, 5)}`;
}

function badge(state, words) {
  const kind = GOING_ON.includes(state) || state === "in progress" || state === "queued" ? "on" : "";
  const bad = ENDED_BADLY.includes(state) ? "bad" : state === "stale" || state === "missing" ? "doubt" : "";
  return el("span", { class: `badge ${kind || bad}` }, words || state);
}

function facts(rows) {
  const cells = rows.filter(([, value]) => value != null && value !== "" && value.length !== 0);
  return cells.length
    ? el("table", { class: "facts" }, el("tbody", {}, cells.map(([name, value]) =>
        el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))))
    : null;
}

function files(pages) {
  return el("ul", { class: "files" }, pages.map((page) => el("li", {},
    el("a", { href: `file/${page.id}`, target: "_blank", rel: "noopener" }, page.title),
    el("small", {}, ` ${page.kind} · ${page.folder}/${page.name} · ${bytes(page.bytes)} · ${moment(page.written)}`))));
}

// What the server has drawn; a document that is parsed for itself runs nothing.
function drawn(text) {
  return document.adoptNode(new DOMParser().parseFromString(text, "text/html").body.firstElementChild);
}

// A part of a page that is made again only where what it tells has changed: a selection or the focus in it stays.
function part(make, name = "section") {
  const node = el(name);
  let told = "";
  return {
    node,
    tell(value) {
      const now = JSON.stringify(value);
      if (now === told) return;
      told = now;
      const open = new Set([...node.querySelectorAll("details[open]")].map((each) => each.dataset.id));
      node.replaceChildren(...[make(value)].flat().filter(Boolean));
      for (const each of node.querySelectorAll("details")) if (open.has(each.dataset.id)) each.open = true;
    },
  };
}

// --- runs ----------------------------------------------------------------------------------------------------

// What was chosen stays while one looks at a run and comes back.
const choice = { text: "", state: "", sort: "going on", marked: new Set() };

function runsPage() {
  const runs = new Map(); // id → the run, and its row
  let version = 0, order = [], most = AT_ONCE, folder = "";
  const redraw = () => draw();
  const filter = el("input", { type: "search", id: "filter", placeholder: "name, state or reason", value: choice.text,
    oninput: () => { choice.text = filter.value; most = AT_ONCE; redraw(); } });
  const states = el("select", { id: "state", onchange: () => { choice.state = states.value; redraw(); } });
  const sort = el("select", { id: "sort", onchange: () => { choice.sort = sort.value; redraw(); } },
    ["going on", "newest", "name"].map((word) => el("option", { selected: word === choice.sort }, word)));
  const compare = el("a", { class: "button", id: "compare" });
  const tally = el("p", { class: "quiet", role: "status" });
  const body = el("tbody");
  const more = el("button", { type: "button", onclick: () => { most = Infinity; redraw(); } });
  const heads = ["", "run", "state", "step", "loss", "images/s", "time left", "restarts", "where", "submitted"];
  const table = el("table", { class: "runs" },
    el("thead", {}, el("tr", {}, heads.map((head, index) =>
      el("th", { scope: "col", class: index > 2 && index < 7 ? "n" : null }, head)))), body);

  function row(run) {
    const mark = el("input", { type: "checkbox", "aria-label": `overlay the curves of ${run.name}`,
      onchange: () => { choice.marked[mark.checked ? "add" : "delete"](run.id); marks(); } });
    mark.checked = choice.marked.has(run.id);
    const cell = (label, value, kind) => el("td", { "data-label": label, class: kind }, value);
    const steps = run.step == null ? "" : `${count(run.step)} / ${count(run.steps)}`;
    return el("tr", {},
      el("td", { class: "mark" }, mark),
      el("td", { class: "name" }, el("a", { href: `#/run/${run.id}` }, run.name)),
      el("td", { class: "state" }, badge(run.state, run.words),
        run.why ? el("small", {}, run.why) : null,
        (run.warnings || []).map((warning) => el("small", { class: "bad" }, warning))),
      cell("step", run.steps && GOING_ON.includes(run.state) ? [steps, el("progress", { max: run.steps, value: run.step })] : steps, "n"),
      cell("loss", run.loss == null ? "" : run.loss.toFixed(4), "n"),
      cell("images/s", count(run.rate), "n"),
      cell("time left", duration(run.left), "n"),
      cell("restarts", run.restarts ? [run.restarts, el("small", {}, run.restarted)] : ""),
      cell("where", run.where),
      cell("submitted", moment(run.submitted)));
  }

  function marks() {
    const ids = [...choice.marked].filter((id) => runs.has(id)).slice(0, 8);
    const many = choice.marked.size > ids.length ? "the first " : "";
    compare.textContent = ids.length ? `Curves of ${many}${ids.length} marked` : "Mark runs to overlay their curves";
    if (ids.length) compare.setAttribute("href", `#/run/${ids.join(",")}`);
    else compare.removeAttribute("href");
  }

  function draw() {
    const word = choice.text.toLowerCase();
    const fits = ({ run }) => (!choice.state || run.state === choice.state) &&
      (!word || `${run.name}\n${run.words}\n${run.why}\n${run.restarts}`.toLowerCase().includes(word));
    const found = order.map((id) => runs.get(id)).filter(fits);
    const recent = (one, other) => (other.run.submitted || 0) - (one.run.submitted || 0);
    const ended = ({ run }) => !GOING_ON.includes(run.state);
    if (choice.sort === "newest") found.sort(recent);
    if (choice.sort === "going on") found.sort((one, other) => ended(one) - ended(other) || recent(one, other));
    const rows = found.slice(0, most).map((entry) => (entry.row ??= row(entry.run)));
    // Rows that stay where they are keep the focus.
    rows.forEach((each, index) => { if (body.children[index] !== each) body.insertBefore(each, body.children[index] || null); });
    while (body.children.length > rows.length) body.lastChild.remove();
    more.hidden = found.length <= most;
    more.textContent = `Show all ${count(found.length)}`;
    const all = [...runs.values()].map(({ run }) => run.state);
    const tallies = [...new Set(all)].sort().map((state) => `${count(all.filter((each) => each === state).length)} ${state}`);
    tally.textContent = runs.size
      ? `${count(found.length)} of ${count(runs.size)} runs in ${folder}: ${tallies.join(", ")}`
      : `No runs in ${folder}; \`submit pretrain\` starts one.`;
    const options = ["", ...new Set(all)].sort();
    if (options.join() !== [...states.options].map((option) => option.value).join()) {
      states.replaceChildren(...options.map((state) => el("option", { value: state, selected: state === choice.state }, state || "all")));
    }
    marks();
  }

  return {
    title: "Runs",
    nodes: [el("h1", {}, "Runs"), tally, el("div", { class: "tools" },
      el("label", {}, "Filter ", filter), el("label", {}, "State ", states), el("label", {}, "Sort by ", sort), compare),
      el("div", { class: "scroll" }, table), more],
    async update() {
      const news = await get("api/runs", { since: version });
      folder = news.folder;
      if (news.version === version) return;
      version = news.version;
      for (const run of news.runs) runs.set(run.id, { run, row: null });
      if (news.order) order = news.order;
      const there = new Set(order);
      for (const id of [...runs.keys()]) if (!there.has(id)) runs.delete(id);
      draw();
    },
  };
}

// --- one run, or several -------------------------------------------------------------------------------------

function runPage(ids) {
  const single = ids.length === 1;
  const head = el("h1", {}, single ? "Run" : `${ids.length} runs`);
  const about = part(aboutRun);
  const curves = curvesOf(ids);
  const log = single ? logOf(ids[0]) : null;
  const behind = part(behindRun);
  return {
    title: single ? "Run" : "Runs overlaid",
    nodes: [el("p", { class: "back" }, el("a", { href: "#/runs" }, "← all runs")), head, about.node, ...curves.nodes,
      log && log.node, behind.node],
    async update() {
      if (single) {
        const run = await get("api/run", { id: ids[0] });
        head.textContent = run.run;
        document.title = run.run;
        const { recipe, ...rest } = run;
        about.tell(rest);
        behind.tell({ recipe, starts: run.starts });
        await log.update(run.texts);
      }
      await curves.update();
    },
  };
}

function aboutRun(run) {
  const progress = run.progress || {};
  const restarts = run.restarts || [];
  const why = (run.why || "").split("\n");
  return [
    el("p", {}, badge(run.state), " ", run.failure || !["running", "completed"].includes(run.state) ? why[0] : ""),
    why.length > 1 ? el("details", { "data-id": "why", open: true }, el("summary", {}, "The end of its log"), el("pre", {}, why.slice(1).join("\n"))) : null,
    (progress.warnings || []).map((warning) => el("p", { class: "bad" }, warning)),
    progress.total_steps ? el("p", { class: "quiet" }, el("progress", { max: progress.total_steps, value: progress.step, "aria-label": "steps" }),
      ` step ${count(progress.step)} of ${count(progress.total_steps)}`) : null,
    facts([
      ["loss", progress.loss == null ? "" : short(progress.loss)],
      ["images/s", run.state === "running" ? count(progress.images_per_second) : ""],
      ["time left", run.state === "running" ? duration(progress.seconds_left) : ""],
      ["where", run.executor ? `${run.executor} ${run.id}${run.nodes ? ` on ${run.nodes}` : ""}, ${run.ranks} ${run.ranks === 1 ? "rank" : "ranks"}, attempt ${run.attempt}` : ""],
      ["submitted", moment(run.submitted)],
      ["newest checkpoint", run.checkpoint],
      ["GPU-hours", run.gpus ? short(run.gpu_hours) : ""],
      ["watched", run.unwatched],
      ["branch of", run.parent ? `${run.parent.run.split("/").pop()} at step ${run.parent.step}, by ${run.parent.user}` : ""],
      ["changed", (run.changes || []).map((change) => el("div", {}, `${moment(change.time)} from step ${change.step} on, by ${change.user}: ${settings(change.settings)}`))],
      ["restarts", restarts.map((restart) => el("div", {}, `attempt ${restart.attempt}, ${moment(restart.time)}: ${restart.cause}`
        + `${restart.rank == null ? "" : `, rank ${restart.rank}`}${restart.node ? ` on ${restart.node}` : ""}: ${restart.message} [${restart.checkpoint || "nothing saved"}]`))],
      ["folder", el("code", {}, run.folder)],
      ["graph", run.graph ? el("a", { href: `#/graph/${run.graph}` }, "what it was made from, and what was made from it") : ""],
      ["reports", (run.pages || []).length ? files(run.pages) : ""],
    ]),
  ].flat();
}

function settings(changed) {
  return Object.entries(changed).map(([key, [before, since]]) => `${key} ${JSON.stringify(before)} → ${JSON.stringify(since)}`).join(", ");
}

function behindRun({ recipe, starts }) {
  return [
    starts.length ? el("details", { "data-id": "starts" }, el("summary", {}, `Starts (${starts.length})`),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["when", "host", "ranks", "device", "torch", "source"].map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, starts.map((start) => el("tr", {}, [moment(start.time), start.host, start.ranks, start.device, start.torch,
          [start.version, String(start.commit || "").slice(0, 12), start.dirty ? "and changes" : ""].filter(Boolean).join(" ")].map((value) => el("td", {}, String(value ?? "")))))))) ) : null,
    recipe ? el("details", { "data-id": "recipe" }, el("summary", {}, "Recipe"), el("pre", {}, recipe)) : null,
  ];
}

function curvesOf(ids) {
  let have = "";
  const legend = el("p", { class: "legend" });
  const charts = el("div", { class: "charts" });
  const panels = new Map(); // key → the figure, and what is drawn in it
  const last = part((runs) => lastValues(runs), "div");
  const heading = el("h2", {}, "Curves");
  return {
    nodes: [heading, legend, charts, last.node],
    async update() {
      const news = await get("api/curves", [...ids.map((id) => ["id", id]), ["have", have]]);
      if (news === null) return;
      have = news.version;
      heading.textContent = news.panels.length ? "Curves" : "No curves yet";
      legend.replaceChildren(...(ids.length > 1
        ? news.runs.map((run, index) => el("a", { href: `#/run/${ids[index]}` }, el("i", { class: `key ${run.tone}` }), run.name)) : []));
      for (const panel of news.panels) {
        const there = panels.get(panel.key) || { figure: el("figure", { class: "card" }), chart: "" };
        if (there.chart !== panel.chart) {
          // The column that is being read keeps the focus.
          const read = [...there.figure.querySelectorAll("input")].indexOf(document.activeElement);
          there.chart = panel.chart;
          there.figure.replaceChildren(el("h3", {}, panel.title), drawn(panel.chart), el("figcaption", {}, panel.meaning));
          if (read >= 0) there.figure.querySelectorAll("input")[read]?.focus({ preventScroll: true });
        }
        panels.set(panel.key, there);
      }
      const figures = news.panels.map((panel) => panels.get(panel.key).figure);
      if (figures.length !== charts.children.length || figures.some((figure, index) => charts.children[index] !== figure)) {
        charts.replaceChildren(...figures);
      }
      last.tell(news.runs);
    },
  };
}

function lastValues(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.last)))];
  if (!keys.length) return null;
  return el("details", { "data-id": "last" }, el("summary", {}, "Last values"), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), runs.map((run) => el("th", { scope: "col", class: "n" }, run.name)))),
    el("tbody", {}, keys.map((key) => el("tr", {}, el("th", { scope: "row" }, key), runs.map((run) => el("td", { class: "n" }, run.last[key] ?? ""))))))));
}

function logOf(id) {
  let name = "", at = null, texts = [];
  const pick = el("select", { id: "text", onchange: () => { name = pick.value; at = null; text.replaceChildren(); read().catch(tellTrouble); } });
  const follow = el("input", { type: "checkbox", id: "follow", checked: true });
  const text = el("pre", { class: "log", tabindex: "0", "aria-label": "log" });
  const node = el("section", { hidden: true }, el("h2", {}, "Log"),
    el("div", { class: "tools" }, el("label", {}, "File ", pick), el("label", {}, follow, " follow")), text);
  async function read() {
    if (!name) return;
    const asked = name;
    const piece = await get("api/text", at === null ? { id, name } : { id, name, at });
    if (asked !== name) return;
    if (piece.anew) text.replaceChildren();
    at = piece.at;
    if (!piece.text) return;
    text.append(piece.text);
    const lines = text.textContent.split("\n");
    if (lines.length > LOG_LINES) text.textContent = lines.slice(-LOG_LINES).join("\n");
    if (follow.checked) text.scrollTop = text.scrollHeight;
  }
  return {
    node,
    async update(found) {
      if (found.join() !== texts.join()) {
        texts = found;
        name = texts.includes(name) ? name : texts.find((each) => each.startsWith("logs/")) || texts[0] || "";
        pick.replaceChildren(...texts.map((each) => el("option", { value: each, selected: each === name }, each)));
        node.hidden = !texts.length;
      }
      if (follow.checked || at === null) await read();
    },
  };
}

// --- graphs --------------------------------------------------------------------------------------------------

function graphsPage() {
  const list = part(({ graphs }) => graphs.length
    ? el("ul", { class: "cards" }, graphs.map((graph) => el("li", { class: "card" },
        el("a", { href: `#/graph/${graph.id}` }, graph.name),
        el("div", {}, Object.entries(graph.states).map(([state, number]) => [badge(state, `${number} ${state}`), " "])))))
    : el("p", {}, "No graphs here; `submit dag` runs one."));
  return {
    title: "Graphs",
    nodes: [el("h1", {}, "Graphs"), el("p", { class: "quiet" }, "What made what, as the receipts of their stages tell."), list.node],
    async update() { list.tell(await get("api/graphs")); },
  };
}

function graphPage([id]) {
  const head = el("h1", {}, "Graph");
  const picture = part(({ picture: drawing }) => (drawing ? drawn(drawing) : null), "div");
  const list = part(({ stages }) => stages.map((stage) => stageOf(stage, stages)));
  return {
    title: "Graph",
    nodes: [el("p", { class: "back" }, el("a", { href: "#/graphs" }, "← all graphs")), head,
      el("p", { class: "quiet" }, "Each stage below what it was made from."),
      el("div", { class: "scroll graph", tabindex: "0", role: "group", "aria-label": "the graph" }, picture.node), list.node],
    async update() {
      const graph = await get("api/graph", { id });
      head.textContent = graph.name;
      document.title = graph.name;
      picture.tell(graph);
      list.tell(graph);
    },
  };
}

function stageOf(stage, stages) {
  const to = (name, id) => id
    ? el("button", { type: "button", class: "link", onclick: () => openStage(id) }, name)
    : el("span", {}, `${name} (gone)`);
  const used = stages.flatMap((other) => other.inputs.filter((input) => input.id === stage.id).map((input) => [other.name, other.id]));
  const uses = [...new Map(used.map(([name, known]) => [known, name]))].map(([known, name]) => el("div", {}, to(name, known)));
  const from = stage.inputs.map((input) => el("div", {}, `${input.role}: `, to(input.name, input.id), input.path ? ` / ${input.path}` : "", input.replaced ? " (replaced since)" : ""));
  return el("details", { class: "stage", "data-id": stage.id, id: `stage-${stage.id}` },
    el("summary", {}, el("b", {}, stage.name), " ", badge(stage.state), " ",
      el("small", {}, [stage.kind, stage.seconds == null ? "" : duration(stage.seconds), stage.inputs.length ? `from ${[...new Set(stage.inputs.map((input) => input.name))].join(", ")}` : "", stage.detail].filter(Boolean).join(" · "))),
    facts([
      ["made from", from],
      ["used by", uses],
      ["data from outside", stage.data],
      ["source", stage.source],
      ["results", Object.entries(stage.facts).length ? facts(Object.entries(stage.facts)) : ""],
      ["made", stage.started ? `${moment(stage.started)} on ${stage.machine}` : ""],
      ["GPU-hours", stage.gpu_hours ? short(stage.gpu_hours) : ""],
      ["run", stage.run ? el("a", { href: `#/run/${stage.run}` }, "its log and curves") : ""],
      ["also called", stage.also.join(", ")],
      ["reports", stage.pages.length ? files(stage.pages) : ""],
      ["outputs", stage.outputs.map((output) => el("div", {}, el("code", {}, `${output.path}  ${output.sha256.slice(0, 12)}`)))],
      ["folder", el("code", {}, stage.folder)],
      ["key", stage.key ? el("code", {}, stage.key) : ""],
      ["recipe", stage.recipe ? el("details", { "data-id": `recipe ${stage.id}` }, el("summary", {}, "all keys"), el("pre", {}, stage.recipe)) : ""],
    ]));
}

function openStage(id) {
  const stage = document.getElementById(`stage-${id}`);
  stage.open = true;
  stage.querySelector("summary").focus();
  stage.scrollIntoView({ block: "nearest" });
}

// --- reports and datasets ------------------------------------------------------------------------------------

function reportsPage() {
  const list = part(({ pages, word }) => {
    const found = pages.filter((page) => `${page.title}\n${page.folder}/${page.name}\n${page.kind}`.toLowerCase().includes(word));
    return found.length ? files(found) : el("p", {}, pages.length ? "No report matches." : "No reports here yet.");
  });
  let pages = [];
  const filter = el("input", { type: "search", id: "filter", placeholder: "title, folder or kind", oninput: () => draw() });
  const draw = () => list.tell({ pages, word: filter.value.toLowerCase() });
  return {
    title: "Reports",
    nodes: [el("h1", {}, "Reports"), el("p", { class: "quiet" }, "Reports, galleries, figures and cards, the newest first. They open as they are, but no script in them runs."),
      el("div", { class: "tools" }, el("label", {}, "Filter ", filter)), list.node],
    async update() { ({ pages } = await get("api/pages")); draw(); },
  };
}

function dataPage() {
  const list = part(({ datasets }) => datasets.length
    ? el("ul", { class: "cards" }, datasets.map((data) => el("li", { class: "card" },
        el("h2", {}, data.stage ? `${data.stage}: ${data.name}` : data.name), badge(data.state), " ",
        el("progress", { max: data.units || 1, value: data.committed, "aria-label": "units committed" }),
        el("small", {}, ` ${count(data.committed)} of ${count(data.units)} units`),
        data.trouble ? el("p", { class: "bad" }, data.trouble) : null,
        facts([
          ["kept", `${count(data.kept)} of ${count(data.planned)} planned, ${bytes(data.bytes)}`],
          ["not kept", data.not_kept.map(([reason, number]) => `${count(number)} ${reason}`).join(", ")],
          ["time left", data.left == null ? "" : `about ${duration(data.left)}`],
          ["last commit", moment(data.newest)],
          ["still counting", data.counted < data.committed ? `${count(data.counted)} units so far` : ""],
          ["sources", data.sources.map((source) => el("div", {}, source))],
          ["root", data.root ? el("code", {}, data.root) : ""],
        ]))))
    : el("p", {}, "No datasets here; `submit serve --data FOLDER` shows those in FOLDER."));
  return {
    title: "Datasets",
    nodes: [el("h1", {}, "Datasets"), list.node],
    async update() { list.tell(await get("api/datasets")); },
  };
}

// --- which page ----------------------------------------------------------------------------------------------

const PAGES = { runs: runsPage, run: runPage, graphs: graphsPage, graph: graphPage, reports: reportsPage, data: dataPage };
const UNDER = { run: "runs", graph: "graphs" };

const tellTrouble = (error) => { trouble.textContent = error instanceof TypeError ? "The server does not answer." : error.message; };

function pause() {
  return new Promise((resolve) => setTimeout(() => {
    if (!document.hidden) resolve();
    else document.addEventListener("visibilitychange", resolve, { once: true });
  }, PAUSE));
}

async function show() {
  const mine = ++shown;
  const [name, rest] = location.hash.slice(2).split("/");
  const known = Object.hasOwn(PAGES, name) ? name : "runs";
  const page = PAGES[known]((rest || "").split(",").filter(Boolean));
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${UNDER[known] || known}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = page.title;
  main.replaceChildren(...page.nodes.filter(Boolean));
  main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
  while (mine === shown) {
    try {
      await page.update();
      trouble.textContent = "";
    } catch (error) {
      if (mine === shown) tellTrouble(error);
    }
    await pause();
  }
}

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const filter = document.getElementById("filter");
  if (event.key !== "/" || !filter || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  event.preventDefault();
  filter.focus();
});
show();
