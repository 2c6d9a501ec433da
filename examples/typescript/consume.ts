// The loop with Consume: it works on many messages at once, and one stream carries all of them. Copy it
// without changes. It must know nothing of the work.

import { setTimeout as sleep } from "node:timers/promises";

import type { ClientDuplexStream, ServiceError } from "@grpc/grpc-js";

import {
  about,
  backoff,
  duration,
  millis,
  outcomeOf,
  outcomeOfRejected,
  passes,
  pause,
  refusalIn,
  say,
  tellOf,
  type Action,
  type FetchProxy,
  type Handler,
  type Outcome,
  type Refusal,
} from "./fetchproxy.js";
import {
  ConsumeRequest,
  Delivery,
  Outcome as Effect,
  Settlement,
  type ConsumeResponse,
  type ConsumeResult,
  type ConsumeStart,
} from "./gen/fetchproxy/v1/fetch.js";

/** A stream without a frame for so many heartbeats is dead. So is a worker. */
const MISSED_BEATS = 3;
/** The shortest heartbeat and the shortest lease that the proxy allows, in milliseconds. */
const SHORTEST = 1_000;
/** A frame with more settlements is refused. */
const MOST_SETTLEMENTS = 1_000;

/**
 * Works on as many messages at once as `start` has credit for. Ends when `stop` is aborted and every
 * message is settled. If the worker dies, others get its messages after `grace`, in milliseconds.
 */
export async function consume(
  proxy: FetchProxy,
  start: ConsumeStart,
  grace: number,
  handle: Handler,
  stop: AbortSignal,
): Promise<void> {
  const consumer = new Consumer(proxy, start, Math.max(grace, SHORTEST), handle, stop);
  const { held, open } = consumer;
  stop.addEventListener("abort", () => open.forEach((stream) => stream.stop()));
  for (let failed = 0; ;) {
    const stream = consumer.current;
    open.add(stream);
    stream.open();
    await stream.leaves;
    // The next stream takes over from one that drains, which ends by itself.
    if (!stream.isOver) continue;
    if (stop.aborted) {
      await Promise.all([...open].map(({ over }) => over));
      if (held.size === 0) return;
    }
    if (stream.isServed) failed = 0;
    const { refusal } = stream;
    // After UNAUTHENTICATED, the file may have a newer credential.
    if (!refusal || (stream.isServed && refusal.reason === "UNAUTHENTICATED")) continue;
    if (!passes(refusal)) {
      held.forEach((message) => message.lose(refusal));
      throw new Error(`${refusal.reason}: ${refusal.message}`);
    }
    const wait = backoff(refusal, failed++);
    await (stop.aborted ? sleep(wait) : pause(wait, stop));
  }
}

/** The messages in hand, and the streams that carry them. */
class Consumer {
  readonly held = new Set<Held>();
  readonly open = new Set<Stream>();
  readonly beat: number;
  readonly start: ConsumeStart;
  /** The stream that is open, or will be next. */
  current: Stream;

  constructor(
    readonly proxy: FetchProxy,
    start: ConsumeStart,
    readonly grace: number,
    readonly handle: Handler,
    readonly stop: AbortSignal,
  ) {
    this.beat = Math.max(grace / MISSED_BEATS, SHORTEST);
    const keep = { grace: duration(grace), atMost: undefined };
    const holding = { $case: "keep" as const, value: keep };
    this.start = { ...start, holding, heartbeat: duration(this.beat) };
    this.current = new Stream(this);
  }
}

/** A message in hand. */
class Held {
  /** The name of the message on its stream. 0: it came by an earlier stream. */
  number: number;
  /** Aborts when the message is settled or lost. */
  readonly gone = new AbortController();
  outcome?: Outcome;

  constructor(
    readonly message: Delivery,
    /** Carries the settlement. */
    public stream: Stream,
    private readonly consumer: Consumer,
    /** A rejected message was logged already. */
    private readonly rejected = false,
  ) {
    this.number = message.number;
    consumer.held.add(this);
  }

  decide(outcome: Outcome): void {
    this.outcome = outcome;
    this.send();
  }

  /** Puts the message into the next frame. */
  send(): void {
    if (this.gone.signal.aborted) return;
    this.stream.ready.add(this);
    this.stream.wake();
  }

  /** The outcome, or an Extend if there is no outcome. */
  settlement(): Settlement {
    const extend = { lease: duration(this.consumer.grace) };
    const action: Action = this.outcome?.action ?? { $case: "extend", value: extend };
    return { action, number: this.number, token: this.number ? "" : this.message.token };
  }

  lose({ reason, message }: Pick<Refusal, "reason" | "message">): void {
    if (this.gone.signal.aborted) return;
    console.error(`message ${this.message.streamSequence} is lost: ${reason}: ${message}`);
    this.end("lost");
  }

  end(event: string, told?: object | void): void {
    if (this.gone.signal.aborted) return;
    this.gone.abort();
    this.consumer.held.delete(this);
    this.stream.ready.delete(this);
    this.stream.wake();
    if (!this.rejected) say({ event, ...about(this.message), ...told });
  }
}

/** One call of Consume. The library reads always. */
class Stream {
  /** Resolves when it drains, or is over. */
  readonly leaves: Promise<void>;
  readonly over: Promise<void>;
  isOver = false;
  /** The proxy has answered. */
  isServed = false;
  /** Why it is over. Undefined: an orderly end. */
  refusal?: Refusal;
  /** To be settled or extended in the next frame. */
  readonly ready = new Set<Held>();
  /** Without a result yet, by the id of the frame. */
  readonly #sent = new Map<number, Held[]>();
  #call?: ClientDuplexStream<ConsumeRequest, ConsumeResponse>;
  #beats?: NodeJS.Timeout;
  #lastId = 0;
  #heard = 0;
  #failed = 0;
  #isWoken = false;
  /** The credit was set to 0. Then no message comes any more. */
  #isPausing = false;
  #isPaused = false;
  #leave!: () => void;
  #finish!: () => void;

  constructor(private readonly consumer: Consumer) {
    this.leaves = new Promise((resolve) => (this.#leave = resolve));
    this.over = new Promise((resolve) => (this.#finish = resolve));
  }

  open(): void {
    this.#heard = performance.now();
    try {
      this.#call = this.consumer.proxy.consume();
    } catch (error) {
      return this.#end(refusalIn(error as ServiceError)); // A file cannot be read.
    }
    this.#call.on("data", (frame: ConsumeResponse) => this.#take(frame));
    this.#call.on("error", (error: ServiceError) => this.#end(refusalIn(error)));
    this.#call.on("end", () => this.#end());
    this.#call.on("drain", () => this.wake());
    this.#beats = setInterval(() => this.#beat(), this.consumer.beat);
    this.#write(this.consumer.start);
  }

  stop(): void {
    if (this.isServed || this.consumer.held.size > 0) this.wake();
    else this.#call?.cancel();
  }

  /** There is something to write. All that is there then goes into one frame. */
  wake(): void {
    if (this.#isWoken) return;
    this.#isWoken = true;
    setImmediate(() => {
      this.#isWoken = false;
      if (this.#call?.writable && !this.#call.writableNeedDrain) this.#write();
    });
  }

  #beat(): void {
    const silence = MISSED_BEATS * this.consumer.beat;
    if (performance.now() - this.#heard > silence) {
      console.error(`no frame for ${silence} ms: the stream is given up`);
      this.#call?.cancel();
      return;
    }
    // The proxy keeps the leases of this stream, but not those that have outlived theirs.
    for (const held of this.#mine()) if (!held.number && !held.outcome) held.send();
    this.wake();
  }

  /** Sends all that is there to say: if nothing, a sign of life. */
  #write(start?: ConsumeStart): void {
    const frame = ConsumeRequest.create({ start });
    if (this.consumer.stop.aborted && !this.#isPausing) {
      this.#isPausing = true;
      frame.credit = { id: 1, maxLeases: 0, maxBytes: undefined };
    }
    const parts = [...this.ready].slice(0, MOST_SETTLEMENTS);
    if (parts.length > 0) {
      const settlements = parts.map((held) => held.settlement());
      frame.settle = { id: ++this.#lastId, settlements, confirmation: 0 };
      this.#sent.set(this.#lastId, parts);
      parts.forEach((held) => this.ready.delete(held));
      if (this.ready.size > 0) this.wake();
    }
    this.#call?.write(frame);
    if (this.#isPausing && this.#isPaused && this.#mine().length === 0) this.#call?.end();
  }

  #mine(): Held[] {
    return [...this.consumer.held].filter(({ stream }) => stream === this);
  }

  #take(frame: ConsumeResponse): void {
    if (this.isOver) return; // A frame that comes too late is not taken.
    const { consumer } = this;
    this.isServed = true;
    this.#heard = performance.now();
    for (const message of frame.messages) {
      const held = new Held(message, this, consumer);
      outcomeOf(consumer.handle, message, held.gone.signal).then((done) => held.decide(done));
    }
    for (const rejected of frame.rejected) {
      tellOf(rejected);
      const { token, number, streamSequence } = rejected;
      const message = Delivery.create({ token, number, streamSequence });
      if (token) new Held(message, this, consumer, true).decide(outcomeOfRejected(rejected));
    }
    for (const result of frame.results) this.#note(result);
    for (const { number, why } of frame.ended) {
      for (const held of this.#mine()) if (held.number === number && why) held.lose(why);
    }
    if (frame.draining) {
      consumer.current = new Stream(consumer);
      this.#leave();
    }
    if (frame.creditId) {
      this.#isPaused = true;
      this.wake();
    }
  }

  /** Takes the results of one frame. */
  #note({ id, results, error: failure }: ConsumeResult): void {
    const again: Held[] = [];
    let worst: Refusal | undefined;
    this.#sent.get(id)?.forEach((held, place) => {
      const error = failure ?? results[place]?.error;
      if (error && passes(error)) {
        again.push(held);
        if (!worst || millis(error.retryDelay) > millis(worst.retryDelay)) worst = error;
      } else if (error) held.lose(error);
      else if (results[place]?.outcome !== Effect.OUTCOME_EXTENDED && held.outcome)
        held.end(held.outcome.event, held.outcome.told);
    });
    this.#sent.delete(id);
    if (!worst) this.#failed = 0;
    else setTimeout(() => again.forEach((held) => held.send()), backoff(worst, this.#failed++));
  }

  /** Hands what is left to the next stream: it is settled there by token, or extended. */
  #end(refusal?: Refusal): void {
    if (this.isOver) return;
    const { consumer } = this;
    [this.isOver, this.refusal] = [true, refusal];
    clearInterval(this.#beats);
    if (consumer.current === this) consumer.current = new Stream(consumer);
    for (const held of this.#mine()) {
      [held.stream, held.number] = [consumer.current, 0];
      held.send();
    }
    consumer.open.delete(this);
    this.#leave();
    this.#finish();
  }
}
