/** The HTTP API of `python -m gpt serve`. Every failure is an ApiError whose message is one sentence for the user. */

const KEY = "chargpt.key";
const GONE = "The server does not answer. Check that `python -m gpt serve` is still running, then try again.";
const BROKEN = "The server closed the connection before the text was complete. Try again.";

/** An error to be shown; `status` is the HTTP status, 0 if there was no answer. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/**
 * @typedef {Object} Model
 * @property {string} id
 * @property {string} sha256
 * @property {string} kind
 * @property {number} layers
 * @property {number} heads
 * @property {number} block_size
 * @property {string} position
 * @property {number} ngram
 * @property {string} tokenizer
 * @property {number} vocab_size
 * @property {number} parameters
 */

/**
 * @typedef {Object} Token
 * @property {string} text
 * @property {number | null} probability null for the first token and for those before the context window
 * @property {{text: string, probability: number}[]} alternatives the most probable ones, sorted
 */

/** @typedef {{tokens: Token[], warnings: string[], finish: string | null}} Chunk */

/** @param {string} key the API key, kept until the tab is closed */
export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** @returns {Promise<Model[]>} */
export const listModels = async () => (await (await request("v1/models")).json()).data;

/** @param {object} body @returns {Promise<{text: string, before: number, after: number}[]>} */
export const nextTokens = async (body) => (await (await request("explore/next", body)).json()).tokens;

/** @param {object} body @returns {Promise<any>} */
export const inspect = async (body) => (await request("explore/inside", body)).json();

/**
 * Stream the prompt and its continuation.
 * @param {object} body settings of the request
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Chunk>}
 */
export async function* complete(body, signal) {
  const response = await request("v1/completions", { ...body, stream: true, echo: true, logprobs: 5 }, signal);
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, response.status);
    const choice = event.choices[0];
    yield { tokens: tokensOf(choice), warnings: event.warnings ?? [], finish: choice?.finish_reason ?? null };
  }
  throw new ApiError(BROKEN);
}

/** @param {unknown} error @returns {boolean} whether a request was cancelled by this page */
export const isAbort = (error) => error instanceof DOMException && error.name === "AbortError";

async function request(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = {
    ...(body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  const response = await answered(fetch(path, options));
  if (!response.ok) throw await failure(response);
  return response;
}

/** A failed fetch or read is a TypeError: the server is gone. */
async function answered(promise) {
  try {
    return await promise;
  } catch (error) {
    throw isAbort(error) ? error : new ApiError(GONE);
  }
}

async function failure(response) {
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `The server answered with status ${response.status}.`;
  if (response.status === 429) return new ApiError(`The server is busy. Try again ${when(response)}.`, 429);
  if (response.status !== 401) return new ApiError(message, response.status);
  document.dispatchEvent(new Event("key-needed"));
  return new ApiError("This server needs an API key: enter it at the top of the page.", 401);
}

function when(response) {
  const seconds = Number(response.headers.get("Retry-After"));
  return seconds > 0 ? `in ${seconds} second${seconds === 1 ? "" : "s"}` : "in a moment";
}

/** The data of the server-sent events of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await answered(reader.read());
    if (done) return;
    const blocks = (pending + value).split(/\r?\n\r?\n/);
    pending = blocks.pop() ?? "";
    for (const line of blocks.flatMap((block) => block.split(/\r?\n/))) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

/** The tokens of a choice. Where they do not spell its text (parts of a character), the text is one token. */
function tokensOf(choice) {
  const { text = "", logprobs = null } = choice ?? {};
  if (!logprobs || logprobs.tokens.join("") !== text)
    return text ? [{ text, probability: null, alternatives: [] }] : [];
  return logprobs.tokens.map((token, index) => ({
    text: token,
    probability: logprobs.token_logprobs[index] === null ? null : Math.exp(logprobs.token_logprobs[index]),
    alternatives: sorted(logprobs.top_logprobs?.[index]),
  }));
}

function sorted(top) {
  // A part of a character cannot be added to a text.
  const whole = Object.entries(top ?? {}).filter(([text]) => !text.startsWith("bytes:"));
  const all = whole.map(([text, logprob]) => ({ text, probability: Math.exp(logprob) }));
  return all.sort((a, b) => b.probability - a.probability).slice(0, 5);
}
