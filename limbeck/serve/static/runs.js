// Curves of a stage as they grow (uPlot), and a word to everybody when a run's state has changed.

import { tell } from "./studio.js";

const TONES = ["one", "two", "three", "four", "right", "wrong", "muted"];
const SOON = 2000, LATER = 15000; // milliseconds: a stage at rest may be gone on with at a terminal
const KNOWN = new Set(["bytes"]); // columns that mean nothing to an eye

/** Of the marks of a logarithmic axis, the powers of ten. */
const powers = (_, marks) => marks.map((mark) => (Math.abs(Math.log10(mark) - Math.round(Math.log10(mark))) < 1e-6 ? mark : null));

const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function written(value, scale) {
  if (value == null) return "–";
  if (scale === "share") return `${(100 * value).toFixed(1)}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1);
  return size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

/** The last value of a column that is one. */
const last = (values) => values.findLast((value) => value != null);

class Panel {
  constructor(figure) {
    this.figure = figure;
    this.columns = figure.dataset.columns.split(" ");
    this.scale = figure.dataset.scale;
    this.legend = figure.querySelector(".legend");
    this.plot = null;
    this.shape = "";
  }

  /** Draw what was recorded; `beside` is another stage's record, or null. */
  draw(record, beside) {
    const here = this.columns.filter((name) => record.columns[name]?.some((value) => value != null));
    this.figure.hidden = here.length === 0;
    if (this.figure.hidden) return;
    const there = beside ? here.filter((name) => beside.columns[name]?.some((value) => value != null)) : [];
    const own = [record.steps, ...here.flatMap((name) => [record.columns[name], record.means[name]])];
    const positive = (rows) => (this.scale === "log" ? [rows[0], ...rows.slice(1).map((row) => row.map((value) => (value > 0 ? value : null)))] : rows);
    const data = there.length
      ? uPlot.join([positive(own), positive([beside.steps, ...there.map((name) => beside.means[name])])])
      : positive(own);
    this.names = [...here.flatMap((name) => [null, name]), ...there.map(() => null)];
    const shape = JSON.stringify([here, there]);
    if (this.plot && shape === this.shape) this.plot.setData(data);
    else this.begin(data, here, there, shape);
    this.say(null);
  }

  begin(data, here, there, shape) {
    this.plot?.destroy();
    this.shape = shape;
    const line = (name, more) => ({ label: name, stroke: () => tone(TONES[here.indexOf(name) % TONES.length]), spanGaps: true, points: { show: data[0].length < 3 }, ...more });
    const series = [{}, ...here.flatMap((name) => [line(name, { alpha: 0.35, width: 1 }), line(name, { width: 2 })]), ...there.map((name) => line(name, { width: 1.5, dash: [5, 4] }))];
    const axis = { stroke: () => tone("muted"), grid: { stroke: () => tone("rule"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const place = this.figure.querySelector(".plot");
    this.plot = new uPlot({
      width: Math.max(200, place.clientWidth), height: 170, series, legend: { show: false }, padding: [8, 8, 0, 0],
      scales: { x: { time: false }, y: this.scale === "log" ? { distr: 3 } : {} },
      axes: [{ ...axis, grid: { show: false }, size: 26, space: 60 }, { ...axis, ...(this.scale === "log" ? { filter: powers, grid: { ...axis.grid, filter: powers } } : {}), size: 52, values: (_, marks) => marks.map((mark) => (mark == null ? "" : this.scale === "share" ? `${Math.round(1000 * mark) / 10}%` : written(mark, this.scale))) }],
      cursor: { sync: { key: "steps" }, points: { show: false }, drag: { x: true, y: false } },
      hooks: { setCursor: [(plot) => this.say(plot.cursor.idx)] },
    }, data, place);
  }

  /** The legend: each curve's name in its colour, with its value under the cursor, else its last one. */
  say(at) {
    const values = (row) => this.plot.data[row];
    const rows = this.names.flatMap((name, i) => (name ? [[name, i + 1]] : []));
    this.legend.replaceChildren(...rows.map(([name, row], i) => {
      const entry = document.createElement("span");
      entry.className = `key ${TONES[i % TONES.length]}`;
      const value = at == null ? last(values(row)) : values(row)[at];
      entry.textContent = rows.length > 1 ? `${name.replaceAll("_", " ")} ${written(value, this.scale)}` : written(value, this.scale);
      return entry;
    }), ...(at == null ? [] : [step(this.plot.data[0][at])]));
  }

  resize() {
    const place = this.figure.querySelector(".plot");
    if (this.plot && place.clientWidth) this.plot.setSize({ width: place.clientWidth, height: 170 });
  }
}

const section = document.getElementById("curves");

function step(number) {
  const entry = document.createElement("small");
  entry.textContent = `${section.dataset.step} ${Math.round(number)}`;
  return entry;
}

/** A record, or null where it is what it was. */
async function fetched(url, tags) {
  const answer = await fetch(url, { headers: tags.has(url) ? { "if-none-match": tags.get(url) } : {}, cache: "no-store" });
  if (answer.status === 304 || !answer.ok) return null;
  tags.set(url, answer.headers.get("etag"));
  return answer.json();
}

async function watch() {
  const tags = new Map();
  const panels = [...section.querySelectorAll("figure[data-columns]")].map((figure) => new Panel(figure));
  const rest = section.querySelector(".rest");
  let record = null, beside = null;
  const draw = () => {
    section.querySelector(".empty").hidden = record.steps.length > 0;
    const shown = new Set([...KNOWN, ...panels.flatMap((panel) => panel.columns)]);
    for (const name of Object.keys(record.columns).filter((one) => !shown.has(one)).sort()) panels.push(new Panel(figure(name, rest)));
    rest.hidden = rest.querySelector("figure") === null;
    for (const panel of panels) panel.draw(record, beside);
  };
  const look = async () => {
    if (document.hidden) return SOON;
    const [news, other] = [await fetched(section.dataset.curves, tags), section.dataset.beside ? await fetched(section.dataset.beside, tags) : null];
    record = news ?? record;
    beside = other ?? beside;
    if (record && (news || other)) draw();
    return record?.alive ? SOON : LATER;
  };
  for (const one of [section, rest]) new ResizeObserver(() => panels.forEach((panel) => panel.resize())).observe(one);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panels.forEach((panel) => panel.plot?.redraw()));
  for (;;) {
    const pause = await look().catch(() => LATER); // the server may be away for a while
    section.dataset.drawn = String(panels.filter((panel) => panel.plot).length);
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

/** A place for a column that no chart was planned for. */
function figure(name, rest) {
  const one = document.createElement("figure");
  one.dataset.columns = name;
  one.dataset.scale = "plain";
  const caption = document.createElement("figcaption");
  const title = document.createElement("b");
  title.textContent = name.replaceAll("_", " ");
  const legend = document.createElement("span");
  legend.className = "legend";
  caption.append(title, legend);
  const plot = document.createElement("div");
  plot.className = "plot";
  one.append(caption, plot);
  rest.querySelector(".panels").append(one);
  return one;
}

if (section) watch();

let standing = document.querySelector("[data-standing]")?.dataset.standing;
document.addEventListener("htmx:afterSettle", () => {
  const now = document.querySelector("[data-standing]")?.dataset.standing;
  if (now && now !== standing) tell(now);
  standing = now;
});
