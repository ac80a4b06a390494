// Numbers, times and lengths of time for people.

const NOTHING = "\u2013";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const hour = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** 12,345 */
export const count = (value) => (known(value) ? whole.format(value) : NOTHING);

/** A number with as many digits as tell it apart: 12,345 or 12.3 or 0.0123. */
export const number = (value) => {
  if (!known(value)) return NOTHING;
  const size = Math.abs(value);
  if (size >= 1000) return whole.format(value);
  if (size >= 100) return value.toFixed(1);
  if (size >= 1) return value.toFixed(size >= 10 ? 2 : 3);
  if (size === 0) return "0";
  return size >= 1e-4 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
};

/** A loss: 12.345 */
export const loss = (value) => (known(value) ? value.toFixed(3) : NOTHING);

/** Samples a second: whole when that is exact enough. */
export const speed = (value) => (known(value) ? (value >= 100 ? whole.format(value) : value.toFixed(1)) : NOTHING);

/** An accuracy: 99.78 % */
export const accuracy = (value) => (known(value) ? `${(100 * value).toFixed(2)} %` : NOTHING);

/** The same beside an axis: 99.8 % */
export const percent = (value) => `${Number((100 * value).toPrecision(4))} %`;

/** 12.3 % of a whole that is known. */
export const share = (part, all) => (all > 0 ? `${((100 * part) / all).toFixed(1)} %` : NOTHING);

/** A length of time in its two largest units: 3m 20s. */
export const duration = (seconds) => {
  if (!known(seconds) || seconds < 0) return NOTHING;
  const all = Math.round(seconds);
  const [d, h, m, s] = [Math.floor(all / 86400), Math.floor(all / 3600) % 24, Math.floor(all / 60) % 60, all % 60];
  const two = (value) => String(value).padStart(2, "0");
  if (d > 0) return `${d}d ${two(h)}h`;
  if (h > 0) return `${h}h ${two(m)}m`;
  return m > 0 ? `${m}m ${two(s)}s` : `${s}s`;
};

/** Bytes: 24.5 MiB */
export const bytes = (value) => {
  if (!known(value)) return NOTHING;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  let left = value;
  while (left >= 1023.95 && unit + 1 < units.length) {
    left /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? left : left.toFixed(1)} ${units[unit]}`;
};

/** How long ago, in one unit, from two times in ms. */
export const ago = (then, now) => {
  const seconds = Math.max(0, Math.round((now - then) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
};

/** Seconds between two times as the API writes them; null without both. */
export const between = (from, to) => (from && to ? (Date.parse(to) - Date.parse(from)) / 1000 : null);

/** A time of day and date, of ms or of what the API writes. */
export const time = (at) => (at ? moment.format(new Date(at)) : NOTHING);

/** A time of day. */
export const clock = (at) => hour.format(new Date(at));

/** 1 rank, 2 ranks */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** What stands where there is nothing. */
export const dash = (text) => (text === null || text === undefined || text === "" ? NOTHING : text);
