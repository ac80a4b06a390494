// Questions to the coordinator that served this page.

const LIMIT_MS = 5000;
const MOST_KEPT = 32;
const kept = new Map();
let ahead = 0;

/** The coordinator answered, but not with what was asked for. */
export class Refused extends Error {
  constructor(status, body) {
    super(body?.error ?? `the coordinator answered ${status}`);
    this.status = status;
  }
}

/** Nobody answered. */
export class Unreachable extends Error {}

/** The coordinator's time in ms. */
export const now = () => Date.now() + ahead;

const remember = (path, answer) => {
  kept.delete(path);
  kept.set(path, answer);
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
};

const reach = async (path, before) => {
  try {
    return await fetch(`api/v1/${path}`, {
      cache: "no-store",
      headers: before ? { "If-None-Match": before.tag } : {},
      signal: AbortSignal.timeout(LIMIT_MS),
    });
  } catch (error) {
    throw new Unreachable("no answer", { cause: error });
  }
};

/** What the coordinator says at a path of its API. Fails with `Refused` or `Unreachable`. */
export const ask = async (path) => {
  const before = kept.get(path);
  const answer = await reach(path, before);
  const date = Date.parse(answer.headers.get("date"));
  // The header counts whole seconds.
  if (!Number.isNaN(date) && Math.abs(date + 500 - Date.now()) > 1500) ahead = date + 500 - Date.now();
  if (answer.status === 304 && before) return before.body;
  const body = await answer.json().catch(() => null);
  if (!answer.ok || body === null) throw new Refused(answer.status, body);
  remember(path, { tag: answer.headers.get("etag") ?? "", body });
  return body;
};
