// The loop with Consume: the messages in hand, and the streams that carry them, one after the other.

import { setTimeout as sleep } from "node:timers/promises";

import { status, type ClientDuplexStream } from "@grpc/grpc-js";

import type { Connection } from "./connection.js";
import { backoff, FetchProxyError } from "./errors.js";
import {
  ConsumeStart,
  type ConsumeRequest,
  type ConsumeResponse,
  type Delivery,
  type Rejected,
  type Settlement,
} from "./gen/fetchproxy/v1/fetch.js";
import { Held, type Job } from "./held.js";
import { Message, rejectedMessage } from "./message.js";
import { ofRejected } from "./outcome.js";
import type { Stop } from "./stop.js";
import { Stream, type Carried, type Owner } from "./stream.js";
import { Alarm, duration, pause } from "./time.js";

/** A stream without a frame for so many heartbeats is dead. So is a worker. */
const MISSED_BEATS = 3;
/** The shortest heartbeat and the shortest lease that the proxy allows, in milliseconds. */
const SHORTEST = 1_000;

export interface ConsumeOptions {
  /** The name of the worker in the logs of the proxy. */
  readonly name: string;
  /** In milliseconds. */
  readonly grace: number;
  /** The most bytes of messages in hand. */
  readonly maxBytes: number;
  /** The most bytes of a frame. */
  readonly maxFrameBytes: number;
}

/**
 * Ends when `stop` was asked for and every message is gone.
 *
 * @throws FetchProxyError if the proxy refuses the stream, and a repeat would be refused, too.
 */
export async function consume(
  connection: Connection,
  job: Job,
  options: ConsumeOptions,
  stop: Stop,
): Promise<void> {
  const loop = new ConsumeLoop(connection, job, options, stop);
  try {
    await loop.run();
  } finally {
    loop.over();
  }
}

class ConsumeLoop implements Owner {
  readonly held = new Set<ConsumeHeld>();
  /** Handlers that work on messages that are gone. They have their places. */
  readonly strays = new Set<ConsumeHeld>();
  /** How long a lease lives without a stream, in milliseconds. */
  readonly keep: number;
  /** The stream that is open, or will be next. */
  current: Stream = new Stream(this);
  readonly #open = new Set<Stream>();
  readonly #beat: number;
  readonly #beats: NodeJS.Timeout;
  /** Rings when a stream drains or is over. */
  readonly #changed = new Alarm();

  constructor(
    private readonly connection: Connection,
    private readonly job: Job,
    private readonly options: ConsumeOptions,
    private readonly stop: Stop,
  ) {
    this.#beat = Math.max(options.grace / MISSED_BEATS, SHORTEST);
    this.keep = Math.max(options.grace, MISSED_BEATS * this.#beat);
    this.#beats = setInterval(() => this.#tick(), this.#beat);
    stop.asked.addEventListener("abort", () => this.#stopping());
    stop.forced.addEventListener("abort", () => this.#forced());
  }

  async run(): Promise<void> {
    for (let failed = 0; ;) {
      if (this.isStopping && this.held.size === 0) return;
      const stream = this.current;
      this.#open.add(stream);
      stream.open(this.#start());
      // The next stream takes over from a stream that drains, which ends by itself.
      while (!stream.isOver && !stream.isDraining) await this.#changed.sleep(Infinity);
      if (!stream.isOver) continue;
      if (this.isStopping) {
        while (this.#open.size > 0) await this.#changed.sleep(Infinity);
        if (this.held.size === 0) return;
      }
      if (stream.isServed) failed = 0;
      const { refusal } = stream;
      // After UNAUTHENTICATED, the file may have a newer credential.
      if (!refusal || (stream.isServed && refusal.reason === "UNAUTHENTICATED")) continue;
      if (!refusal.canRepeat) return await this.#refused(refusal);
      const wait = backoff(refusal, failed++);
      this.retry(refusal, wait);
      await (this.isStopping ? sleep(wait) : pause(wait, this.stop.asked));
    }
  }

  /** Nothing is in hand. A stream that drains may still be open. */
  over(): void {
    clearInterval(this.#beats);
    for (const stream of this.#open) stream.cancel();
  }

  get isStopping(): boolean {
    return this.stop.asked.aborted;
  }

  connect(): ClientDuplexStream<ConsumeRequest, ConsumeResponse> {
    return this.connection.consume();
  }

  credit(delivered: number): number {
    if (this.isStopping) return 0;
    const elsewhere = this.held.size - delivered + this.strays.size;
    return Math.max(this.job.places.all - elsewhere, 0);
  }

  arrived(delivery: Delivery, stream: Stream): Carried {
    const message = new Message(delivery);
    const held = new ConsumeHeld(this, this.job, delivery.token, stream, message);
    void held.work(message);
    if (this.isStopping) held.giveBackIfWaiting();
    return held;
  }

  arrivedRejected(rejected: Rejected, stream: Stream): Carried | undefined {
    const told = rejectedMessage(rejected);
    this.job.emit({ name: "rejected", rejected: told });
    if (!told.token) return undefined;
    const held = new ConsumeHeld(this, this.job, told.token, stream);
    held.decide(ofRejected(told));
    return held;
  }

  retry(error: FetchProxyError, wait: number): void {
    const { reason, message: detail } = error;
    this.job.emit({ name: "retry", reason, detail, wait, error });
  }

  drains(stream: Stream): void {
    if (this.current === stream) this.current = new Stream(this);
    this.#changed.ring();
  }

  /** Hands what is left to the next stream: it is settled there by token, or extended. */
  ended(stream: Stream, carried: Iterable<Carried>): void {
    this.#open.delete(stream);
    if (this.current === stream) this.current = new Stream(this);
    for (const one of carried) one.moveTo(this.current);
    this.#changed.ring();
  }

  #start(): ConsumeStart {
    const { stream, consumer, decoder, atMost } = this.job;
    const { name: worker, grace, maxBytes, maxFrameBytes } = this.options;
    return ConsumeStart.create({
      stream,
      consumer,
      codec: decoder.codec,
      worker,
      maxFrameBytes,
      credit: { id: 0, maxLeases: this.credit(0), maxBytes },
      holding: {
        $case: "keep",
        value: { grace: duration(grace), atMost: duration(atMost) },
      },
      heartbeat: duration(this.#beat),
    });
  }

  #tick(): void {
    for (const stream of this.#open) stream.beat(MISSED_BEATS * this.#beat);
    for (const held of this.held) held.beat();
  }

  #stopping(): void {
    for (const held of this.held) held.giveBackIfWaiting();
    for (const stream of this.#open) {
      if (stream.isServed || this.held.size > 0) stream.wake();
      else stream.cancel();
    }
  }

  #forced(): void {
    for (const held of this.held) held.giveBackByForce();
  }

  /** Streams that drain still settle what they have. */
  async #refused(refusal: FetchProxyError): Promise<never> {
    for (const held of this.held) if (!this.#open.has(held.stream)) held.lose(refusal);
    while (this.#open.size > 0) await this.#changed.sleep(Infinity);
    for (const held of this.held) held.lose(refusal);
    throw refusal;
  }
}

class ConsumeHeld extends Held implements Carried {
  /** The end of the lease, if no stream keeps it, on the clock of `performance`. */
  #ends = Infinity;

  constructor(
    private readonly loop: ConsumeLoop,
    job: Job,
    private readonly token: string,
    /** Carries the settlement. */
    public stream: Stream,
    message?: Message,
  ) {
    super(job, message);
    loop.held.add(this);
  }

  part(stream: Stream): Settlement {
    const number = stream.numberOf(this);
    const extend = { lease: duration(this.#extension()) };
    const action = this.outcome?.action ?? { $case: "extend", value: extend };
    return { action, number, token: number ? "" : this.token };
  }

  done(isExtended: boolean): void {
    if (isExtended) this.#ends = Math.min(performance.now() + this.loop.keep, this.latest);
    else this.settled();
  }

  /** Its stream is over. Without the next stream, the lease ends after a while. */
  moveTo(stream: Stream): void {
    this.stream = stream;
    this.#ends = Math.min(performance.now() + this.loop.keep, this.latest, this.#ends);
    if (this.outcome || this.#extension() >= SHORTEST) stream.send(this);
  }

  /** The proxy keeps the leases of a stream, but not those that have outlived their stream. */
  beat(): void {
    const isOrphan = this.#ends !== Infinity;
    if (this.#ends <= performance.now()) {
      const told = "no proxy has extended or settled it in time";
      this.lose(new FetchProxyError("LEASE_EXPIRED", status.FAILED_PRECONDITION, told));
    } else if (isOrphan && !this.outcome && this.#extension() >= SHORTEST) this.stream.send(this);
  }

  #extension(): number {
    return Math.min(this.loop.keep, this.latest - performance.now());
  }

  protected decided(): void {
    this.stream.send(this);
  }

  protected left(): void {
    this.loop.held.delete(this);
    if (this.isHandled) this.loop.strays.add(this);
    this.stream.drop(this);
    // The stream may drain, and then the next stream has credit for it.
    this.loop.current.wake();
  }

  protected freed(): void {
    if (this.loop.strays.delete(this)) this.loop.current.wake();
  }
}
