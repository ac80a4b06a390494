// A line chart: axes with round numbers, a readout under the pointer or the arrow keys. Draws itself into an element and
// keeps what the reader points at when new points come.

import { h, svg } from "./dom.js";
import { count } from "./format.js";

const HEIGHT = 220;
const MARGIN = { top: 12, right: 16, bottom: 30, left: 60 };
const NARROW = 320;

const drawn = new WeakMap();

/** Round numbers that cover a range in about so many steps. */
export const ticks = (low, high, about) => {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
};

const range = (values, zero) => {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (zero) low = Math.min(0, low);
  if (low === high) {
    const room = Math.abs(low) * 0.05 || 1;
    [low, high] = [zero && low === 0 ? 0 : low - room, high + room];
  } else if (!zero) {
    const room = (high - low) * 0.06;
    [low, high] = [low - room, high + room];
  } else {
    high += (high - low) * 0.08;
  }
  return [low, high];
};

const compact = (value) => {
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))}G`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  return size >= 1000 ? count(value) : String(Number(value.toPrecision(4)));
};

/** Points of a line with gaps where there is no number. */
const path = (points, x, y) => {
  let pen = "M";
  let text = "";
  for (const [step, value] of points) {
    if (value === null) {
      pen = "M";
      continue;
    }
    text += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  return text;
};

const nearest = (steps, wanted) =>
  steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), steps[0]);

class Chart {
  constructor(element) {
    this.element = element;
    this.pointed = null;
    this.title = h("h3", {});
    this.readout = h("p", { class: "readout" });
    this.canvas = svg("svg", { role: "img", tabindex: "0", class: "lines" });
    this.nothing = h("p", { class: "empty small" });
    element.append(h("div", { class: "chart-head" }, this.title, this.readout), this.canvas, this.nothing);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.stepAt(event)));
    this.canvas.addEventListener("pointerdown", (event) => this.point(this.stepAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(element);
  }

  /**
   * Shows `{title, unit, series: [{name, points: [[step, value]]}], marks: [{step, text}], format, tick, zero, dots, none}`:
   * `format` writes a value, `tick` one beside the axis, `none` stands where there are no points.
   */
  show(data) {
    this.data = data;
    this.steps = [...new Set(data.series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    if (!this.steps.includes(this.pointed)) this.pointed = null;
    this.draw();
  }

  point(step) {
    if (step === this.pointed) return;
    this.pointed = step;
    this.draw();
  }

  stepAt(event) {
    if (!this.scale || this.steps.length === 0) return null;
    const place = event.clientX - this.canvas.getBoundingClientRect().left;
    return nearest(this.steps, this.scale.step(place));
  }

  key(event) {
    const at = this.pointed === null ? this.steps.length : this.steps.indexOf(this.pointed);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: this.steps.length - 1 }[event.key];
    if (event.key === "Escape") this.point(null);
    if (to === undefined || this.steps.length === 0) return;
    event.preventDefault();
    this.point(this.steps[Math.min(Math.max(to, 0), this.steps.length - 1)]);
  }

  valuesAt(step) {
    return this.data.series
      .map(({ points }, index) => ({ index, value: points.find(([at]) => at === step)?.[1] ?? null }))
      .filter(({ value }) => value !== null);
  }

  say() {
    const { series, format, unit } = this.data;
    const step = this.pointed ?? this.steps.at(-1);
    const many = series.length > 1;
    const latest = ({ points }) => points.findLast(([, value]) => value !== null)?.[1] ?? null;
    const values =
      this.pointed === null ? series.map((line, index) => ({ index, value: latest(line) })) : this.valuesAt(step);
    const said = values
      .filter(({ value }) => value !== null)
      .map(({ index, value }) =>
        h(
          "span",
          { class: "value" },
          many ? h("span", { class: `key series-${index % 6}` }, series[index].name) : null,
          h("strong", {}, format(value)),
          unit && !many ? ` ${unit}` : null,
        ),
      );
    this.readout.replaceChildren(...said, h("span", { class: "at" }, `step ${count(step)}`));
  }

  draw() {
    const { data, element, canvas } = this;
    const width = element.clientWidth;
    if (!data || width === 0) return;
    this.title.textContent = data.title;
    const values = data.series.flatMap(({ points }) => points.map(([, value]) => value)).filter((value) => value !== null);
    const empty = values.length === 0;
    canvas.toggleAttribute("hidden", empty);
    this.nothing.hidden = !empty;
    this.nothing.textContent = data.none;
    if (empty) {
      this.readout.replaceChildren();
      return;
    }
    const inner = { width: Math.max(width - MARGIN.left - MARGIN.right, 50), height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const [low, high] = range(values, data.zero);
    const first = this.steps[0];
    const last = this.steps.at(-1);
    const across = last - first || 1;
    const x = (step) => MARGIN.left + (first === last ? inner.width / 2 : (inner.width * (step - first)) / across);
    const y = (value) => MARGIN.top + inner.height * (1 - (value - low) / (high - low));
    this.scale = { step: (place) => first + ((place - MARGIN.left) / inner.width) * across };
    canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    canvas.setAttribute("height", HEIGHT);
    canvas.setAttribute("aria-label", this.summary(values));
    const bottom = MARGIN.top + inner.height;
    const grid = ticks(low, high, 4).map((value) => [
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, (data.tick ?? compact)(value)),
    ]);
    const steps = ticks(first, last, width < NARROW ? 3 : 5).filter(
      // One at the left end would stand on the name of the axis.
      (step) => Number.isInteger(step) && (first === last || x(step) > MARGIN.left + 14),
    );
    const axis = steps.map((step) =>
      svg(
        "text",
        { class: "tick", x: x(step), y: bottom + 18, "text-anchor": x(step) > width - 36 ? "end" : "middle" },
        compact(step),
      ),
    );
    const marks = data.marks
      .filter(({ step }) => step >= first && step <= last)
      .map(({ step, text }) =>
        svg(
          "line",
          { class: "mark", x1: x(step), x2: x(step), y1: MARGIN.top, y2: bottom },
          svg("title", {}, text),
        ),
      );
    const lines = data.series.map(({ points }, index) => {
      const alone = points.filter(([, value]) => value !== null).length === 1;
      return [
        svg("path", { class: `line series-${index % 6}`, d: path(points, x, y) }),
        alone || data.dots
          ? points
              .filter(([, value]) => value !== null)
              .map(([step, value]) => svg("circle", { class: `dot series-${index % 6}`, cx: x(step), cy: y(value), r: 3 }))
          : null,
      ];
    });
    canvas.replaceChildren(
      ...[
        grid,
        svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }),
        axis,
        svg("text", { class: "tick", x: MARGIN.left - 8, y: bottom + 18, "text-anchor": "end" }, "step"),
        marks,
        lines,
        this.pointer(x, y, bottom),
      ]
        .flat(Infinity)
        .filter((part) => part !== null),
    );
    this.say();
  }

  pointer(x, y, bottom) {
    const step = this.pointed;
    if (step === null) return [];
    return [
      svg("line", { class: "pointer", x1: x(step), x2: x(step), y1: MARGIN.top, y2: bottom }),
      this.valuesAt(step).map(({ index, value }) =>
        svg("circle", { class: `dot series-${index % 6}`, cx: x(step), cy: y(value), r: 4 }),
      ),
    ];
  }

  summary(values) {
    const { title, format } = this.data;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return (
      `${title} from step ${count(this.steps[0])} to ${count(this.steps.at(-1))}: between ${format(low)} and ` +
      `${format(high)}. Arrow keys read single steps.`
    );
  }
}

/** Draws into an element, in which a chart may be already. */
export const drawChart = (element, data) => {
  let chart = drawn.get(element);
  if (chart === undefined) {
    chart = new Chart(element);
    drawn.set(element, chart);
  }
  chart.show(data);
};
