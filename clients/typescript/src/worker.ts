// The worker: its options, its handler, and its end. The loops do the rest.

import type { Client } from "./client.js";
import { MAX_BYTES } from "./connection.js";
import { consume } from "./consume.js";
import { guarded, logEvent, type OnEvent } from "./events.js";
import { fetchBatches } from "./fetch_loop.js";
import { Places, type Handler, type Job, type Tracer } from "./held.js";
import { decoderOf, type Decode } from "./message.js";
import { Stop } from "./stop.js";
import { LONGEST_TIMER } from "./time.js";

const HOUR = 3_600_000;

/** All times are in milliseconds. */
export interface WorkerOptions<T> {
  /** The most handlers at once: 1 to 1000. 16 unless set. */
  concurrency?: number;
  /** `consume`: one stream brings messages as handlers are free. `fetch`: a call for each batch. */
  mode?: "consume" | "fetch";
  /** With `fetch`: the most messages that wait or are handled, 1 to 1000. As `concurrency` unless set. */
  batch?: number;
  /** With `fetch`: the longest wait of a call for messages, 0 to 5 min. 10 s unless set. */
  maxWait?: number;
  /** With `fetch`: the length of a lease, 1 s or more, which is extended again and again. */
  lease?: number;
  /** With `consume`: messages of a worker that dies come back after this time. 1 s to 3 min; 10 s unless set. */
  grace?: number;
  /**
   * The bytes of messages in hand at which the worker takes no more, 1 KiB to 64 MiB. 16 MiB unless set. An answer
   * or a frame has at most 16 MiB, and the last may pass this limit.
   */
  maxBytes?: number;
  /** The longest time that a lease is kept for one handler: 1 s or more. 1 h unless set. */
  atMost?: number;
  /** Makes `data` out of the payload. `json` unless set, which checks no type. */
  decode?: Decode<T>;
  /** How long handlers may continue after `stop`. Until they end, unless set. */
  stopTimeout?: number;
  /** Gets each event, in order. Warnings go to the standard error output unless set. */
  onEvent?: OnEvent;
  /** The name of the worker in the logs of the proxy, at most 1 KiB. */
  name?: string;
  /** Makes a span around each handler: see `fetchproxy/otel`. */
  tracer?: Tracer;
}

/**
 * Runs a handler for each message of a consumer, many at once. If the handler returns, its message is acked. It may
 * throw a {@link Nak} or a {@link Term}. After any other error, the message comes back later.
 */
export class Worker<T = unknown> {
  readonly #client: Client;
  readonly #job: Job;
  readonly #options: Options<T>;
  readonly #stop: Stop;
  #isRun = false;

  /** @throws RangeError or TypeError if an option is not in its range. */
  constructor(
    client: Client,
    stream: string,
    consumer: string,
    handler: Handler<T>,
    options: WorkerOptions<T> = {},
  ) {
    this.#client = client;
    this.#options = checked(options);
    const { mode, batch, concurrency, decode, tracer, atMost, onEvent } = this.#options;
    for (const [name, value] of Object.entries({ stream, consumer }))
      if (!value) throw new TypeError(`${name} must have a name`);
    this.#job = {
      ...{ stream, consumer, handler, tracer, atMost },
      decoder: decoderOf(decode),
      places: new Places(mode === "fetch" ? Math.min(concurrency, batch) : concurrency),
      emit: guarded(onEvent),
    };
    this.#stop = new Stop(this.#options.stopTimeout);
  }

  /**
   * Works until {@link stop}, and with `signals` also until SIGTERM or SIGINT. Then waits for the handlers that run,
   * and for their settlements. May be called once.
   *
   * @throws FetchProxyError if a person must look at it: the consumer does not exist, for example.
   */
  async run({ signals = false } = {}): Promise<void> {
    if (this.#isRun) throw new Error("a worker runs once");
    this.#isRun = true;
    const stop = () => this.stop();
    const names = signals ? ["SIGTERM", "SIGINT"] : [];
    for (const signal of names) process.on(signal, stop);
    const { connection } = this.#client;
    try {
      this.#job.emit({ name: "ready" });
      const loop = this.#options.mode === "fetch" ? fetchBatches : consume;
      await loop(connection, this.#job, this.#options, this.#stop);
      this.#job.emit({ name: "stopped" });
    } finally {
      this.#stop.over();
      for (const signal of names) process.off(signal, stop);
    }
  }

  /** Takes no more messages. A second call cancels the handlers, and gives their messages back. */
  stop(): void {
    this.#stop.ask();
  }
}

type Options<T> = ReturnType<typeof checked<T>>;

/** All options, with their defaults. */
function checked<T>(options: WorkerOptions<T>) {
  const { concurrency = 16, mode = "consume", maxBytes = MAX_BYTES } = options;
  const all = {
    ...options,
    concurrency: whole("concurrency", concurrency, 1, 1_000),
    batch: whole("batch", options.batch ?? concurrency, 1, 1_000),
    maxWait: within("maxWait", options.maxWait ?? 10_000, 0, 300_000),
    lease: optional("lease", options.lease, 1_000),
    grace: within("grace", options.grace ?? 10_000, 1_000, 180_000),
    maxBytes: whole("maxBytes", maxBytes, 1_024, 64 << 20),
    maxFrameBytes: Math.min(maxBytes, MAX_BYTES),
    atMost: within("atMost", options.atMost ?? HOUR, 1_000, LONGEST_TIMER),
    stopTimeout: optional("stopTimeout", options.stopTimeout, 0),
    decode: options.decode ?? "json",
    onEvent: options.onEvent ?? logEvent,
    name: options.name ?? "fetch-proxy typescript",
    mode,
  };
  if (mode !== "consume" && mode !== "fetch") throw new TypeError("mode must be consume or fetch");
  if (Buffer.byteLength(all.name) > 1_024) throw new RangeError("name has more than 1 KiB");
  return all;
}

function whole(name: string, value: number, least: number, most: number): number {
  if (!Number.isInteger(value))
    throw new RangeError(`${name} must be a whole number, not ${value}`);
  return within(name, value, least, most);
}

function optional(name: string, value: number | undefined, least: number): number | undefined {
  return value === undefined ? undefined : within(name, value, least, LONGEST_TIMER);
}

function within(name: string, value: number, least: number, most: number): number {
  if (!(value >= least && value <= most))
    throw new RangeError(`${name} must be from ${least} to ${most}, not ${value}`);
  return value;
}
