/** Line charts as SVG: a mean with its band, and single points. */

import { h, put, svg } from "./dom.js";

const WIDTH = 360;
const HEIGHT = 150;
const MARGIN = { left: 46, right: 8, top: 8, bottom: 20 };

/**
 * @param {object} chart
 * @param {string} chart.title
 * @param {Array<{label: string, color: string, points: Array<[number, number]>, band?: Array<[number, number, number]>,
 *   dots?: boolean}>} chart.series points are [iteration, value], bands [iteration, low, high]
 * @returns {HTMLElement}
 */
export function lineChart({ title, series }) {
  const shown = series.filter((one) => one.points.length);
  const box = h("figure", { class: "dg-chart" }, h("figcaption", {}, h("span", { class: "dg-chart-title", text: title })));
  if (!shown.length) {
    box.append(h("p", { class: "dg-muted", text: "no values yet" }));
    return box;
  }
  const scale = scales(shown);
  const plot = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `${title}: ${shown.map((one) => `${one.label} ${format(one.points.at(-1)[1])}`).join(", ")}`,
  });
  plot.append(...axes(scale));
  for (const one of shown) plot.append(...drawn(one, scale));
  const readout = put(h("span", { class: "dg-chart-readout" }), latest(shown));
  box.firstChild.append(readout);
  follow(plot, shown, scale, readout);
  box.append(plot, legend(shown));
  return box;
}

function legend(series) {
  return h(
    "div",
    { class: "dg-legend" },
    series.map((one) => h("span", {}, h("i", { style: { background: one.color } }), one.label)),
  );
}

function latest(series) {
  return values(series, series.map((one) => one.points.at(-1)));
}

/** A value of each line in its colour. */
function values(series, points) {
  return points.map(([, y], index) => h("span", { text: format(y), title: series[index].label, style: { color: series[index].color } }));
}

function scales(series) {
  const xs = [];
  const ys = [];
  for (const one of series) {
    for (const [x, y] of one.points) xs.push(x), ys.push(y);
    for (const [, low, high] of one.band ?? []) ys.push(low, high);
  }
  const x = spread(minimum(xs), maximum(xs));
  const y = padded(minimum(ys), maximum(ys));
  return {
    x,
    y,
    px: (value) => MARGIN.left + ((value - x[0]) / (x[1] - x[0])) * (WIDTH - MARGIN.left - MARGIN.right),
    py: (value) => HEIGHT - MARGIN.bottom - ((value - y[0]) / (y[1] - y[0])) * (HEIGHT - MARGIN.top - MARGIN.bottom),
  };
}

const minimum = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);
const maximum = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);

function spread(low, high) {
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

function padded(low, high) {
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
  return [low - margin, high + margin];
}

function axes({ x, y, px, py }) {
  const parts = [];
  const levels = ticks(y, 4);
  for (const value of levels) {
    parts.push(
      svg("line", { class: "dg-gridline", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: py(value), y2: py(value) }),
      svg("text", { class: "dg-tick", x: MARGIN.left - 5, y: py(value) + 3, "text-anchor": "end", text: tickText(value, levels) }),
    );
  }
  for (const value of ticks(x, 5)) {
    if (!Number.isInteger(value)) continue;
    const anchor = px(value) > WIDTH - MARGIN.right - 16 ? "end" : "middle";
    parts.push(svg("text", { class: "dg-tick", x: px(value), y: HEIGHT - 6, "text-anchor": anchor, text: String(value) }));
  }
  return parts;
}

/** Round values that divide a range into about `count` parts. */
export function ticks([low, high], count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const values = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n += 1) values.push(Number((n * step).toPrecision(12)));
  return values;
}

/** A tick with as many decimals as tell it from the next, in scientific notation where those are many. */
export function tickText(value, levels) {
  const step = levels.length > 1 ? levels[1] - levels[0] : 0;
  const decimals = step > 0 ? Math.max(0, -Math.floor(Math.log10(step * (1 + 1e-9)))) : 7;
  return decimals > 5 || Math.abs(value) >= 1e5 ? format(value) : value.toFixed(decimals);
}

function drawn(one, { px, py }) {
  const parts = [];
  if (one.band?.length) {
    const upper = one.band.map(([x, , high]) => `${px(x).toFixed(1)},${py(high).toFixed(1)}`);
    const lower = one.band.map(([x, low]) => `${px(x).toFixed(1)},${py(low).toFixed(1)}`).reverse();
    parts.push(svg("polygon", { points: [...upper, ...lower].join(" "), fill: one.color, opacity: 0.15 }));
  }
  const line = one.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
  parts.push(svg("polyline", { points: line, fill: "none", stroke: one.color, "stroke-width": 1.5 }));
  if (one.dots || one.points.length === 1) {
    for (const [x, y] of one.points) parts.push(svg("circle", { cx: px(x), cy: py(y), r: 2.6, fill: one.color }));
  }
  return parts;
}

/** Show the values under the pointer. */
function follow(plot, series, { x, px }, readout) {
  const cursor = svg("line", { class: "dg-cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
  plot.append(cursor);
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect();
    const share = ((event.clientX - frame.left) / frame.width) * WIDTH;
    const wanted = x[0] + ((share - MARGIN.left) / (WIDTH - MARGIN.left - MARGIN.right)) * (x[1] - x[0]);
    const nearest = series.map((one) => closest(one.points, wanted));
    cursor.setAttribute("x1", px(nearest[0][0]));
    cursor.setAttribute("x2", px(nearest[0][0]));
    cursor.setAttribute("visibility", "visible");
    put(readout, `at ${nearest[0][0]}:`, values(series, nearest));
  });
  plot.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    put(readout, latest(series));
  });
}

function closest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
}

/** A number with three significant digits. */
export function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
